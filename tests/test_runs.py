"""The four stages from start to end: what they promise, survive and refuse. Most runs happen in
this process, which saves the seconds of a start."""
import argparse
import ast
import builtins
import csv
import dis
import importlib
import json
import math
import os
import pickle
import re
import resource
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import types
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import (COMMANDS, CONFIGS, FEW, NATIVE, PETS, ROOT, SMALL, arguments, check_error,
                      command_of, contents, heed_ctrl_c, run, shell, write_images)
from PIL import Image

import common
import retrain
import search_mixture

README = (ROOT / "README.md").read_text()


# --------------------------------------------------------------------------- what runs promise

@pytest.mark.parametrize("kind, steps", [("single", [4 * 5]), ("mixture", [4 * 10] * 4)])
def test_searches_write_what_they_promise_and_all_to_redo_it(kind, steps, finished):
    path = finished / kind / "runs" / f"{kind}-digits"
    result = common.load(path / "result.json")
    ranking = result["ranking"]
    assert sorted(entry["config"] for entry in ranking) == sorted(CONFIGS)
    # of each supernet: epochs, batches of the training half
    assert np.sum([entry["steps"] for entry in ranking], 0).tolist() == steps
    trained = {entry["config"]: sum(entry["steps"]) for entry in ranking}
    assert trained["8,1,1"] > 2 * trained["1,1,8"]  # --draw cost: the dearest most often
    assert {"command", "ranks", "git", "device_name", "versions"} < set(result)

    log = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in log] == [1, 2, 3, 4]
    for key in ("seconds", "train_loss", "train_accuracy", "val_accuracy", "images_per_second"):
        assert all(np.isfinite(line[key]) for line in log)
    assert log[0]["lr"] == 0.1 and log[2]["lr"] == pytest.approx(0.0505)
    assert ["kendall_tau" in line for line in log] == [False, True, False, True]
    assert log[3]["ranking"] == {entry["config"]: entry["accuracy"] for entry in ranking}
    if kind == "mixture":
        assert [line["temperature"] for line in log] == [1, 34, 67, 100]
        assert np.allclose([line["p_m"] for line in log], 1 / 4, atol=0.02)
        owners = dict(zip(CONFIGS, np.argmax(log[3]["assignment"], 1)))
        assert owners == {entry["config"]: entry["supernet"] for entry in ranking}
        assert (path / "assignment.png").stat().st_size > 10_000
    assert (path / "ranking.png").stat().st_size > 10_000

    # all that it takes to rank again
    args = argparse.Namespace(**result["settings"])
    data = common.load_dataset(args)
    assert common.fingerprint(data, args) == args.data
    _, validation = common.split_for_search(data[0], args)
    weights = common.load(path / "supernets.pt")
    network = common.make_network(args, validation, supernet=True)
    for entry in ranking:
        network.load_state_dict(weights[entry["supernet"]])
        batches = validation.evaluation_batches(args.batch_size)
        config = common.parse_config(entry["config"])
        assert common.evaluate_configs(network, [config], batches).item() == entry["accuracy"]


@pytest.mark.parametrize("kind", ["single", "mixture"])
def test_a_finished_search_is_shown_again_and_other_settings_are_refused(kind, finished, tmp_path):
    """Here one of an older version, which lacks settings: they were what is the default, or was it
    then."""
    shutil.copytree(finished / kind / "runs", tmp_path / "runs")
    folder = tmp_path / f"runs/{kind}-digits"
    record = common.load(folder / "config.json")
    for name in ("metric", "flip", "draw"):
        del record["settings"][name]
    result = (folder / "result.json").read_bytes()
    command = command_of(kind, finished)
    for argv, message in (([], "(draw uniform there, cost now): --draw uniform continues it; or"),
                          (["--draw", "uniform", "--flip"], "--no-flip continues it; or"),
                          (["--draw", "uniform", "--lr", "2", "1"], "--lr 0.1 0.001 continues it")):
        common.save(folder / "config.json", record)
        check_error(run(tmp_path, *command, *argv), 2, "holds a run with other settings", message)
    code, out, err = run(tmp_path, *command, "--draw", "uniform")
    assert (code, err) == (0, "") and "epoch" not in out
    assert "\nagainst the ground truth: kendall_tau " in out and "\npick: " in out
    assert (folder / "result.json").read_bytes() == result


def test_a_stopped_run_goes_on_where_it_was_moved_with_its_kernels_if_they_can_be_had(
        tmp_path, monkeypatch):
    """Folder and images have moved; then the kernels cannot be built any more."""
    folder = tmp_path / "two"
    write_images(tmp_path / "one/my pets", *(name.replace("3", "16") for name in PETS))
    argv = ("--image-size", "8", "--width", "0.25", "--epochs", "3", "--batch-size", "8",
            "--threads", "1", "--configs", *CONFIGS)
    with monkeypatch.context() as patch:
        patch.setattr(common, "compare_kernels", lambda *_: "fused")  # whatever is faster here
        patch.setattr(common, "show_epoch", Mock(side_effect=KeyboardInterrupt))
        assert run(tmp_path / "one", "search_single", "--dataset", "my pets", *argv)[0] == 130
    monkeypatch.setattr("kernels.load", Mock(side_effect=RuntimeError("no compiler")))
    (tmp_path / "one").rename(folder)
    (folder / "my pets").rename(folder / "pets")
    code, out, err = run(folder, "search_single", "--dataset", "pets", "--out",
                         "runs/single-my pets", *argv)
    assert code == 0 and "epochs 2 to 3 of" in out and "native kernels" in out
    assert err == "warning: no fused kernels: no compiler; goes on with native ops, to other bits\n"

    _, *argv = shlex.split(re.search("next: python (.*)", out)[1])
    assert argv == ["--from", "runs/single-my pets", "--top", "3"]
    argv = ["--from", str(folder / "runs/single-my pets"), "--epochs", "1", "--seeds", "1", *NATIVE,
            "--batch-size", "8", "--out", "elsewhere"]
    code, out, _ = run(tmp_path, "retrain", *argv)  # the data are found from anywhere
    assert code == 0 and "note: these are other images" not in out
    code, out, _ = run(tmp_path, "retrain", *argv, "--image-size", "10", "--out", "other")
    assert code == 0 and "note: these are other images" in out
    (folder / "pets").rename(folder / "gone")
    check_error(run(tmp_path, "retrain", *argv), 2, f"not at {folder}/pets any more: say where")


def test_a_cell_is_interrupted_and_run_again_and_one_runs_in_a_thread(tmp_path, monkeypatch):
    """As in a notebook: the traceback keeps the first one's objects alive."""
    argv = [*FEW, "--epochs", "1", "--out", str(tmp_path)]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as kept:
        patch.setattr(search_mixture, "search_step", Mock(side_effect=KeyboardInterrupt))
        search_mixture.main(argv)
    thread = threading.Thread(target=search_mixture.main, args=(argv,))
    thread.start()
    thread.join()
    assert kept.value and (tmp_path / "result.json").exists()


@pytest.mark.parametrize("metric, accuracies, chance, pick, cheap, message", [
    ("accuracy", [0.95, 0.7, 0.9, 0.8], 0.95, "1,1,8", "1,1,8",
     "warning: the best is no better than the same answer for all"),
    ("accuracy", [0.96, 0.7, 0.9, 0.96], 0.95, "1,1,8", "1,1,8",
     "warning: 2 configurations share the best accuracy"),
    ("balanced", [0.7, 0.8, 0.9, 0.8], 0.5, "5,3,2", "4,3,3",
     "pick: 5,3,2; of no more multiply-adds than the default: 4,3,3 ")])
def test_picks_and_what_is_none(metric, accuracies, chance, pick, cheap, message, small_images,
                                tmp_path, capsys):
    space = common.search_space(arguments("--configs", *CONFIGS), small_images)
    validation = common.replace(small_images, classes=["a", "b"],
                                labels=(torch.arange(400) >= 380).long())
    record = {"settings": {"metric": metric, "arch": "resnet20", "dataset": "digits"}}
    result = common.search_result(record, space, torch.tensor(accuracies), [0] * 4,
                                  torch.zeros(4, 1, dtype=torch.int64), validation)
    common.report_search(tmp_path, result, space, None)
    out = capsys.readouterr().out
    assert message in out and out.count("warning") == message.count("warning")
    result = common.load(tmp_path / "result.json")
    assert (result["pick"], result["pick_at_no_cost"]) == (pick, cheap)
    assert result["chance"] == pytest.approx(chance)
    macs = {entry["config"]: round(entry["relative_macs"], 2) for entry in result["ranking"]}
    assert macs == {"1,1,8": 0.46, "4,3,3": 1, "5,3,2": 1.54, "8,1,1": 3.66}


def test_retrain_compares_the_first_of_averaged_ranks_with_the_default(finished, tmp_path):
    path = finished / "retrain/runs/retrain-digits"
    result = common.load(path / "result.json")
    rankings = []
    for kind in ("mixture", "single"):
        search = common.load(finished / kind / f"runs/{kind}-digits/result.json")
        rankings.append({entry["config"]: entry["accuracy"] for entry in search["ranking"]})
    mean_ranks = retrain.average_ranks(rankings)
    assert result["mean_ranks"] == mean_ranks
    assert {mean_ranks[name] for name in result["chosen"]} == set(sorted(mean_ranks.values())[:2])
    assert set(result["configs"]) == {*result["chosen"], "4,3,3", result["rule"]}
    assert result["settings"]["width"] == 0.25 and result["settings"]["num_train"] == 320
    tested = {name: [common.load(path / f"networks/{name}-{seed}.json")["test_accuracy"]
                     for seed in (0, 1)] for name in result["configs"]}
    default = np.mean(tested["4,3,3"])
    for name, entry in result["configs"].items():
        mean = np.mean(tested[name])
        assert entry["test_accuracy"] == pytest.approx(mean)
        assert entry["std"] == pytest.approx(np.std(tested[name], ddof=1))
        assert entry.get("difference", 0) == pytest.approx(mean - default)
    values = [entry["test_accuracy"] for entry in result["configs"].values()]
    assert values == sorted(values, reverse=True)
    assert (path / "comparison.png").stat().st_size > 10_000

    shutil.copytree(finished / "retrain/runs", tmp_path / "runs")
    code, out, err = run(tmp_path, *command_of("retrain", finished), "--top", "3", "--seeds", "3")
    after = common.load(tmp_path / "runs/retrain-digits/result.json")
    new = 3 * len(after["configs"]) - 2 * len(result["configs"])  # networks that were not trained
    assert (code, err, out.count("epoch 1 ")) == (0, "", new) and len(after["chosen"]) == 3
    assert "2 searches agree with Kendall tau" in out
    run(tmp_path, *command_of("retrain", finished), "--top", "1", "--seeds", "3")
    assert common.load(tmp_path / "runs/retrain-digits/result.json")["configs"] == after["configs"]


def test_conclusions_by_hand():
    assert retrain.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06})
    assert retrain.average_ranks([{"a": 0.9, "b": 0.9, "c": 0.1}, {"a": 0.1, "b": 0.2, "c": 0.3}]) \
        == {"b": 1.75, "c": 2.0, "a": 2.25}
    rankings = [{"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4}, {"a": 0.1, "b": 0.3, "c": 0.2}, {"a": 1}]
    # of the pairs of the first two, two agree and one does not; one configuration is no ranking
    assert common.mean_tau(rankings) == pytest.approx(1 / 3)
    assert common.mean_tau(rankings[:1]) is None


def test_verdicts_by_hand(digits):
    """With three seeds Student's two-sided p of t is 1 - t / sqrt(2 + t^2)."""
    default = np.array([0.50, 0.53, 0.51])
    spread = np.array([-0.001, 0.0, 0.001])  # the standard error of a difference: 0.001 / sqrt(3)
    accuracies = {(4, 3, 3): default, (5, 3, 2): default + 0.01 + spread,
                  (3, 4, 3): default - 0.02 - spread, (6, 2, 2): default + 0.001 + spread}
    entries = retrain.compare(accuracies, common.search_space(arguments(), digits[0]))
    for name, difference, places, verdict in (("3,4,3", -0.02, 3, "worse"), (
            "5,3,2", 0.01, 2, "better"), ("6,2,2", 0.001, 1, "not shown")):
        t = abs(difference) / (0.001 / math.sqrt(3))
        assert entries[name]["difference"] == pytest.approx(difference)
        assert entries[name]["p_holm"] == pytest.approx(places * (1 - t / math.sqrt(2 + t ** 2)))
        assert entries[name]["verdict"] == verdict
    assert "verdict" not in entries["4,3,3"]
    # t of 97.5 % and two degrees of freedom is 4.3027: half an interval is 0.00248
    assert "With 3 seeds differences below about 0.0025 go unseen" in retrain.conclusion(entries)


def test_the_rules_network_is_the_one_of_most_layers_at_full_resolution(digits):
    space = common.search_space(arguments(), digits[0])
    for pick in space.configs:
        affordable = [(config[0], macs, config) for config, macs in space.macs.items()
                      if macs <= space.macs[pick]]
        assert retrain.rule_network(pick, space.macs) == max(affordable)[2]


def test_stage_1_is_extended_and_a_network_that_diverges_stops_no_other(tmp_path, monkeypatch):
    def step(learner, images, labels, config, lr, real=common.Learner.step):
        if config == (8, 1, 1):
            next(learner.network.parameters()).data[0] = math.inf
        return real(learner, images, labels, config, lr)

    command = ("train_exhaustive", *SMALL, *NATIVE, "--num-train", "40", "--epochs", "10",
               "--configs", "8,1,1", "4,3,3")
    with monkeypatch.context() as patch:
        patch.setattr(common.Learner, "step", step)
        outcomes = [run(tmp_path, *command)]
    outcomes.append(run(tmp_path, *command, "1,1,8"))  # that the other diverged is remembered
    for outcome in outcomes:
        check_error(outcome, 1, "1 networks diverged: 8,1,1-0 (epoch 1: the loss or a weight is")
        assert "best " in outcome[1] and outcome[1].count("epoch 1 ") == 1
    path = tmp_path / "runs/exhaustive-digits"
    (path / "networks/8,1,1-0.json").unlink()
    code, out, err = run(tmp_path, *command, "--seeds", "2")
    assert (code, err, out.count("epoch 1 ")) == (0, "", 3)
    rows = list(csv.DictReader(open(path / "results.csv")))
    assert [f"{row['config']}-{row['seed']}" for row in rows] == [
        "1,1,8-0", "4,3,3-0", "8,1,1-0", "4,3,3-1", "8,1,1-1"]
    for row in rows:
        network = common.load(path / f"networks/{row['config']}-{row['seed']}.json")
        assert network["test_accuracy"] == float(row["test_accuracy"])
        assert [line["lr"] for line in network["history"]] == pytest.approx(
            [0.1] * 4 + [0.01] * 2 + [0.001] * 2 + [1e-4, 1e-5])


def test_paired_comparison_by_hand():
    gap, (low, high), p = retrain.paired_comparison([0.91, 0.93, 0.92], [0.90, 0.90, 0.905])
    error = np.std([0.01, 0.03, 0.015], ddof=1) / math.sqrt(3)
    half = 4.302653 * error  # t of 97.5 %, 2 degrees of freedom
    t = gap / error
    assert gap == pytest.approx(0.055 / 3)
    assert (low, high) == pytest.approx((gap - half, gap + half), abs=5e-5)
    assert p == pytest.approx(1 - t / math.sqrt(2 + t * t))  # Student's, in closed form
    assert retrain.paired_comparison([0.9], [0.8])[1:] == (None, None)
    assert retrain.paired_comparison([0.9, 0.8], [0.8, 0.7])[1:] == (None, None)  # no spread


def test_the_trained_network_is_used_and_exported_as_the_readme_says(finished, tmp_path,
                                                                     monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, = finished.glob("retrain/runs/*/networks/4,3,3-1.pt")
    args = argparse.Namespace(**common.load(path.parent.parent / "config.json")["settings"])
    _, test = common.load_dataset(args)
    Image.fromarray(test.images[0].numpy()).save("picture.jpg", "PNG")
    code, = re.findall(r"```python\n(import torch\nimport common.*?)```", README, re.DOTALL)
    code = re.sub('"runs/.*?"', repr(str(path)), code)
    with_onnx = all(map(importlib.util.find_spec, ("onnxscript", "onnxruntime")))
    if not with_onnx:
        code = code.replace("torch.onnx", "# torch.onnx")
    common.use_kernel("fused")  # it is not to be in what is exported
    names = {}
    exec(code, names)
    network = names["network"]
    assert torch.equal(names["picture"], test.batch(torch.tensor([0]))[0])
    exported = torch.export.load("network.pt2").module()
    assert "pool_conv" not in exported.code
    for count in (1, 5):
        batch, _ = test.batch(torch.arange(count))
        assert torch.allclose(exported(batch), network(batch), atol=1e-4)
        if with_onnx:
            onnx = importlib.import_module("onnxruntime").InferenceSession("network.onnx")
            logits, = onnx.run(None, {onnx.get_inputs()[0].name: batch.numpy()})
            assert np.allclose(logits, network(batch).detach(), atol=1e-4)
    assert not list(tmp_path.glob("*.data"))  # network.onnx is all that is needed

    images, labels = test.batch(torch.arange(len(test)))
    hits = (network(images).argmax(1) == labels).double().mean().item()
    expected = common.load(path.with_suffix(".json"))["test_accuracy"]
    assert hits == pytest.approx(expected, abs=1.5 / len(test))  # a tie may be rounded otherwise


def test_without_balance_nothing_holds_the_marginal_and_uniform_draws_are_uniform(finished):
    path = finished / "no-balance/runs/mixture-digits"
    log = (path / "log.jsonl").read_text().splitlines()
    assert max(json.loads(log[0])["p_m"]) > 0.26  # of 4 supernets
    ranking = common.load(path / "result.json")["ranking"]
    trained = [sum(entry["steps"]) for entry in ranking]
    assert sum(trained) == 80 and 10 < min(trained) <= max(trained) < 30  # 5 deviations around 20


def test_compare_prints_the_metrics_of_every_search(finished, tmp_path):
    folders = {kind: finished / kind / f"runs/{kind}-digits"
               for kind in ("single", "mixture", "exhaustive")}
    done = shell("results/compare.py", "--ground-truth", str(folders["exhaustive"] / "results.csv"),
                 "--out", ".", *map(str, folders.values()), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]]
                        for line in done.stdout.split("\n\n")[0].splitlines()]
    rows = {row[0]: dict(zip(header, row)) for row in rows}
    assert [*rows] == [*folders, "by n1", "by multiply-adds"]
    for kind in ("single", "mixture"):
        result = common.load(folders[kind] / "result.json")
        assert rows[kind]["picks"] == result["pick"]
        assert rows[kind]["kendall_tau"] == f"{result['metrics']['kendall_tau']:.3f}"
        assert rows[kind]["regret"] == f"{result['metrics']['regret']:.3f}"
        macs = np.array([entry["macs"] for entry in result["ranking"]])
        steps = np.sum([entry["steps"] for entry in result["ranking"]], 1)
        assert rows[kind]["training cost"] == f"{macs @ steps / (20 * macs.mean()):.2f}"
    assert rows["exhaustive"]["kendall_tau"] == "1.000"  # against itself
    assert rows["by multiply-adds"]["picks"] == "8,1,1"
    assert (tmp_path / "compare.png").stat().st_size > 10_000


def test_compare_by_hand(capsys):
    compare = runpy.run_path(str(ROOT / "results/compare.py"))
    ranking = {(1, 3): 0.1, (2, 2): 0.9, (3, 1): 0.5}
    truth = {(1, 3): 0.3, (2, 2): 0.5, (3, 1): 0.8}
    for macs, regret in ((20, 0.0), (40, 0.3)):  # of 3,1; the pick is 2,2
        metrics = compare["judge"](ranking, truth, {(1, 3): 10, (2, 2): 30, (3, 1): macs})
        assert metrics["n1 at its macs"] == pytest.approx(regret)

    taus = {"single": [0.1, 0.2, 0.4, 0.3], "mixture": [0.2, 0.4, None, 0.4]}  # None: all are equal
    compare["compare_with_first"]({(kind,): [
        {"settings": {"seed": seed}, "kendall_tau": tau, "regret": 0.1}
        for seed, tau in enumerate(taus[kind])] for kind in taus})
    t = 4  # of 0.1, 0.2, 0.1
    assert capsys.readouterr().out == (
        f"- mixture against single: kendall_tau +0.133, p = {1 - t / math.sqrt(2 + t * t):.2g}, "
        "n = 3\n- mixture against single: regret +0.000, n = 4\n")
    assert compare["mean_and_deviation"](taus["mixture"], 2) == "0.33 +- 0.12"


# ------------------------------------------------------------------ kills, Ctrl-C, full disks

MOMENTS = {"exhaustive": ["torn 4,3,3-0.json 1", "step 15"],
           "single": ["step 7", "replaced log.jsonl 1", "torn result.json 1"],
           "mixture": ["step 60", "torn checkpoint.pt 2"],
           "no-balance": ["step 60"],
           "retrain": ["step 15", "torn 4,3,3-0.pt 1"]}


def test_killed_anywhere_the_same_commands_end_with_the_same_bits(finished, tmp_path):
    plan = []
    for name, (stage, *argv) in COMMANDS.items():
        (tmp_path / name).mkdir()
        plan.append((str(tmp_path / name), stage, MOMENTS[name], argv))
    done = shell("tests/chaos.py", json.dumps(plan), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert contents(tmp_path / name) == contents(finished / name), name
    assert not list(tmp_path.rglob("*tmp*"))


def test_a_folder_has_one_process_until_ctrl_c(tmp_path):
    argv = (*FEW, "--epochs", "400")
    with subprocess.Popen([sys.executable, "-B", ROOT / "search_mixture.py", *argv], cwd=tmp_path,
                          text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          preexec_fn=heed_ctrl_c) as first:
        assert any("epoch 2 " in line for line in first.stdout)
        check_error(run(tmp_path, "search_mixture", *argv), 2, "another process is writing to")
        first.send_signal(signal.SIGINT)
        _, err = first.communicate(timeout=60)
    assert first.returncode == 130
    assert err == "interrupted: the same command continues from the last checkpoint\n"
    folder = tmp_path / "runs/mixture-digits"
    common.lock(folder)
    assert len(common.load(folder / "checkpoint.pt")["log"]) >= 2 and not list(folder.glob("*tmp*"))


def test_a_full_disk_leaves_the_last_checkpoint(finished, tmp_path, monkeypatch):
    """No file may grow beyond 1 kB, which fails as a full disk does."""
    command = command_of("mixture", finished)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save(path, content, real=common.save):
        if path.name == "checkpoint.pt" and path.exists():
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            real(path, content)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with monkeypatch.context() as patch:
        patch.setattr(common, "save", save)
        outcome = run(tmp_path, *command)
    check_error(outcome, 1, "the same command continues from the last checkpoint")
    code, out, err = run(tmp_path, *command)
    assert (code, err) == (0, "") and "\nepoch 1 " in outcome[1] and "\nepoch 1 " not in out
    assert contents(tmp_path) == contents(finished / "mixture")


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("name, file", [
    ("single", "config.json"), ("single", "result.json"), ("single", "checkpoint.pt"),
    ("exhaustive", "networks/4,3,3-0.json"), ("exhaustive", "networks/4,3,3-0.pt")])
def test_damaged_files_are_named_and_left_and_never_executed(name, file, finished, tmp_path):
    shutil.copytree(finished / name / "runs", tmp_path / "runs")
    path, = tmp_path.glob(f"runs/*/{file}")
    if path.suffix == ".pt":  # only a run that is not finished reads it
        for finished_file in (path.with_name("result.json"), path.with_suffix(".json")):
            finished_file.unlink(missing_ok=True)
    torch.save({"log": Bomb()}, tmp_path / "zipped")
    half = path.read_bytes()[:path.stat().st_size // 2]
    for content in (half, pickle.dumps(Bomb(), protocol=2), (tmp_path / "zipped").read_bytes()):
        path.write_bytes(content)
        check_error(run(tmp_path, *command_of(name, finished)), 2, file, "damaged or foreign")
        assert path.read_bytes() == content and not (tmp_path / "executed").exists()


# ------------------------------------------------------------------------------- what is refused

@pytest.mark.parametrize("stage, count", [("search_mixture", 20), ("search_single", 5)])
def test_a_weight_that_is_not_finite_stops_a_search(stage, count, tmp_path, monkeypatch):
    steps = []

    def step(learner, *args, real=common.Learner.step):
        steps.append(real(learner, *args))
        if len(steps) == 2 * count:  # the last one of epoch 2: no loss shows it
            next(learner.network.parameters()).data[0] = math.inf
        return steps[-1]

    monkeypatch.setattr(common.Learner, "step", step)
    check_error(run(tmp_path, stage, *FEW, "--epochs", "3"), 1,
                "epoch 2: the loss or a weight is not finite; a smaller --lr, with another --out")
    checkpoint, = tmp_path.glob("runs/*/*.pt")
    line, = common.load(checkpoint)["log"]  # of epoch 1
    assert [line["train_loss"], line["train_accuracy"]] == pytest.approx(
        torch.stack(steps[:count]).mean(0).tolist())


@pytest.mark.parametrize("stage", ["search_mixture", "search_single"])
def test_searches_validate_on_images_that_they_do_not_train_on(stage, tmp_path, monkeypatch):
    def split(*args, real=common.split_for_search):
        train, validation = real(*args)
        return train, common.replace(validation, images=torch.zeros_like(validation.images))

    black = set()
    monkeypatch.setattr(common, "split_for_search", split)
    for name in ("step", "validate"):
        def watched(learner, images, *args, name=name, real=getattr(common.Learner, name)):
            black.add((name, images.std(dim=(2, 3)).max().item() < 1e-6))
            return real(learner, images, *args)
        monkeypatch.setattr(common.Learner, name, watched)
    assert run(tmp_path, stage, *FEW, "--epochs", "1")[0] == 0
    assert black == {("step", False), ("validate", True)}


def test_an_epochs_scores_reach_its_assignment(tmp_path, monkeypatch):
    seen = []
    balance = search_mixture.balance
    monkeypatch.setattr(search_mixture, "balance",
                        lambda scores, *args: seen.append(scores.clone()) or balance(scores, *args))
    assert run(tmp_path, "search_mixture", *FEW, "--epochs", "1", "--batch-size", "8")[0] == 0
    assert (seen[0] == 1).all() and (seen[1] == 1).all()  # 20 rounds are three intervals
    assert (seen[2] < 1).any()  # an interval later, within the first epoch


def test_a_ground_truth_that_a_spreadsheet_has_saved(tmp_path):
    path = tmp_path / "results.csv"
    rows = 'config,seed,test_accuracy\n"4,3,3",0,0.5\n"4,3,3",1,0.75\n"1,1,8",0,0.25\n'
    german = "config;seed;test_accuracy\n4,3,3;0;0,5\n4,3,3;1;0,75\n1,1,8;0;0,25\n"
    for text in (rows, "\ufeff" + rows, rows + ",,\n", german + ";;\n"):
        path.write_text(text, encoding="utf-8")
        truth = common.read_ground_truth(str(path), [(4, 3, 3)])
        assert truth == {(4, 3, 3): 0.625, (1, 1, 8): 0.25}
    for old, new in (("0.75", "75 %"), ("0.75", "75"), ("4,3,3\",1", "4.3.3\",1"), ("0.75", "")):
        path.write_text(rows.replace(old, new))
        with pytest.raises(common.UserError, match=r"results.csv is no table .*\(row 3: "):
            common.read_ground_truth(str(path), [(4, 3, 3)])


def test_a_full_gpu_is_one_line(tmp_path, monkeypatch):
    error = torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")
    monkeypatch.setattr(common.Learner, "step", Mock(side_effect=error))
    check_error(run(tmp_path, "search_single", *FEW), 1, "CUDA out of memory. Tried to allocate")


@pytest.mark.parametrize("stage, argv, message", [
    ("search_mixture", "--dataset pet", "unknown data set 'pet': choose digits, "),
    ("search_mixture", "--max-macs 0.3", "--max-macs 0.3: all configurations have 0.4"),
    ("search_mixture", "--image-size 4", "must be from 8 to 1024"),
    ("search_mixture", "--configs 4,3,3", "--num-supernets 4: at most 1"),
    ("search_mixture", "--batch-size 1000", "larger than a part of the split"),
    ("search_single", "--lr nan 1", "must be from 0"),
    ("search_single", "--ground-truth nowhere.csv", "nowhere.csv"),
    ("search_single", "--ground-truth part.csv", "lacks 35 of 36 configurations"),
    ("search_single", "--device warp", "--device warp"),
    ("search_single", "--out file/run", "not writable"),
    ("search_single", "--out foreign", "other settings"),
    ("train_exhaustive", "--configs 5,3,1", "add to 10"),
    ("train_exhaustive", "--configs 4,3,3 --epochs 1 --nonsense", "unrecognized arguments"),
    ("retrain", "", "give either --from RUN"),
    ("retrain", "--config 5,3,1", "add to 10"),
    ("retrain", "--config 8,1,1 --max-macs 1", "allows no configuration of the ranking"),
    ("retrain", "--from nowhere", "nowhere"),
    ("retrain", "--from foreign", "foreign"),
    ("retrain", "--from one one/", "the same run twice"),
    ("retrain", "--from one two", "two ranks other configurations than one"),
    ("retrain", "--from one three", "three is a search of another flip than one")])
def test_mistakes_end_with_one_line_and_leave_everything(stage, argv, message, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "part.csv").write_text('config,test_accuracy\n"4,3,3",0.5\n')
    (tmp_path / "foreign").mkdir()
    for file in ("config.json", "result.json"):
        common.save(tmp_path / "foreign" / file, {"settings": {"stage": "mixture"}})
    for name, config, settings in (("one", "4,3,3", {}), ("two", "5,3,2", {}),
                                   ("three", "4,3,3", {"flip": False})):
        (tmp_path / name).mkdir()
        common.save(tmp_path / name / "result.json", {
            "settings": {"arch": "resnet20"} | settings, "pick": config,
            "ranking": [{"config": config, "accuracy": 0.5}]})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    check_error(run(tmp_path, stage, *argv.split(), *NATIVE), 2, message)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*")
                      if path.is_file() and path.suffix != ".lock"}


# ------------------------------------------------------------------------- files of one's own

def run_alone(folder, modules, script, *argv):
    """Run a script in a folder with these modules of the project and nothing else; its output."""
    for name in modules:
        shutil.copy(ROOT / f"{name}.py", folder)
    files = set(folder.iterdir())
    done = shell(script, "--threads", "1", "--epochs", "1", *argv, cwd=folder, root=folder)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch("warning: no fused kernels: No module.*\n", done.stderr)
    assert set(folder.iterdir()) == files | {folder / "runs"}
    return done.stdout


@pytest.mark.parametrize("stage, argv", [("train_exhaustive", ("--configs", "4,3,3")),
                                         ("search_single", ("--configs", "4,3,3")),
                                         ("retrain", ("--config", "4,3,3", "--seeds", "1"))])
def test_a_stage_needs_common_py_and_nothing_else(stage, argv, tmp_path, monkeypatch):
    """The terminal cannot show the names of the classes."""
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    write_images(tmp_path / "pets", "train/ca\u0142:8", "train/do\u011f:8", "test/do\u011f:1")
    out = run_alone(tmp_path, ["common", stage], f"{stage}.py", "--dataset", "pets", "--data-dir",
                    "runs", "--image-size", "8", "--width", "0.25", "--batch-size", "4", *argv)
    assert "2 classes (ca?, do?)" in out


def test_the_network_of_the_readme_is_searched_and_retrained(tmp_path, monkeypatch):
    """What the search prints is run. The stages that are imported need no other file, too."""
    code, = re.findall(r"```python\n(# my_search.py.*?)```", README, re.DOTALL)
    (tmp_path / "my_search.py").write_text(code)
    modules = ["common", "search_mixture", "retrain"]
    out = run_alone(tmp_path, modules, "my_search.py", *SMALL, "--arch", "vgg")
    result = common.load(tmp_path / "runs/mixture-digits/result.json")
    assert len(result["ranking"]) == math.comb(7, 2)
    script, *argv = shlex.split(re.search("next: python (.*)", out)[1])
    assert script == str(tmp_path / "my_search.py")
    out = run_alone(tmp_path, [], "my_search.py", *argv, "--seeds", "1", "--batch-size", "32")
    assert "for common.load_network: runs/retrain-digits/networks/" in out


def globals_of(code):
    """The names that a code object, or one within it, reads as globals."""
    names = {instruction.argval for instruction in dis.get_instructions(code)
             if instruction.opname == "LOAD_GLOBAL"}
    return names.union(*(globals_of(value) for value in code.co_consts
                         if isinstance(value, types.CodeType)))


@pytest.mark.parametrize("row", [line.split("|")[1:-1] for line in README.splitlines()
                                 if line.startswith("| `") and line.count("|") == 4])
def test_the_pieces_of_the_readme_need_what_it_says(row):
    """They run, and what their functions take for global is there."""
    names, (file,), lines = (re.findall("`(.*?)`", cell) for cell in row)
    nodes = [node for node in ast.parse((ROOT / file).read_text()).body
             if getattr(node, "name", None) in names]
    parts = ["from __future__ import annotations", *lines, *map(ast.unparse, nodes)]
    code = compile("\n".join(parts), "piece", "exec")
    there = {}
    exec(code, there)
    assert globals_of(code) <= there.keys() | vars(builtins).keys()
    assert set(names) <= there.keys()
