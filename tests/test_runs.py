"""The four stages from start to end: what they promise, survive and refuse. Most runs happen in
this process, which saves the seconds of a start."""
import argparse
import ast
import contextlib
import csv
import functools
import importlib
import json
import math
import os
import pickle
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import (COMMANDS, CONFIGS, FEW, NATIVE, ROOT, SMALL, arguments, check_error,
                      command_of, contents, heed_ctrl_c, run, shell, write_folder)
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
    accuracies = [entry["accuracy"] for entry in ranking]
    assert sorted(entry["config"] for entry in ranking) == sorted(CONFIGS)
    assert accuracies == sorted(accuracies, reverse=True)
    assert result["pick"] == ranking[0]["config"] and result["default"] == "4,3,3"
    # of each supernet: epochs, batches of the training half
    assert np.sum([entry["steps"] for entry in ranking], 0).tolist() == steps
    trained = {entry["config"]: sum(entry["steps"]) for entry in ranking}
    assert trained["8,1,1"] > 2 * trained["1,1,8"]  # --draw cost: the dearest most often
    assert {"command", "ranks", "git", "device_name", "versions"} < set(result)
    assert set(result["metrics"]) == {"kendall_tau", "spearman_rho", "pick_rank", "regret"}

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
        assert (path / "assignment.png").stat().st_size > 10_000
    assert (path / "ranking.png").stat().st_size > 10_000
    for words in (f"pick: {result['pick']}", "epoch 4  ", "against the ground truth: kendall_tau",
                  f"next: python {ROOT}/retrain.py --from runs/{kind}-digits"):
        assert words in (finished / kind / "printed").read_text()

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


def test_a_finished_search_is_shown_again_and_other_settings_are_refused(finished):
    folder = finished / "mixture"
    before = (folder / "runs/mixture-digits/result.json").read_bytes()
    code, out, err = run(folder, *COMMANDS["mixture"])
    assert (code, err) == (0, "") and "\npick: " in out and "epoch" not in out
    check_error(run(folder, *COMMANDS["mixture"], "--num-supernets", "2"), 2,
                "(num_supernets 4 there, 2 now): --num-supernets 4 continues it; or choose another")
    assert (folder / "runs/mixture-digits/result.json").read_bytes() == before


def test_a_stopped_run_goes_on_where_it_was_moved_with_its_kernels_if_they_can_be_had(
        tmp_path, monkeypatch):
    """Folder and images have moved; then the kernels cannot be built any more."""
    folder = tmp_path / "two"
    write_folder(tmp_path / "one/my pets", count=16)
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
    few = ("--epochs", "1", "--seeds", "1", *NATIVE, "--batch-size", "8")
    assert run(folder, "retrain", *argv, *few)[0] == 0
    argv = ["--from", str(folder / "runs/single-my pets"), *few, "--out", "elsewhere"]
    code, out, _ = run(tmp_path, "retrain", *argv)  # the data are found from anywhere
    assert code == 0 and "note: these are other images" not in out
    code, out, _ = run(tmp_path, "retrain", *argv, "--image-size", "10", "--out", "other")
    assert code == 0 and "note: these are other images" in out
    (folder / "pets").rename(folder / "gone")
    check_error(run(tmp_path, "retrain", *argv), 2, f"not at {folder}/pets any more: say where")


def test_a_run_of_an_older_version_goes_on_and_a_changed_default_is_told(finished, tmp_path):
    """An older config.json lacks settings: they were what is the default, or was it then."""
    shutil.copytree(finished / "single/runs", tmp_path / "runs")
    config = tmp_path / "runs/single-digits/config.json"
    content = common.load(config)
    del content["settings"]["metric"], content["settings"]["flip"]
    common.save(config, content)
    command = command_of("single", finished)
    assert run(tmp_path, *command)[0] == 0
    for argv in (["--metric", "balanced"], ["--flip"]):
        common.save(config, content)
        check_error(run(tmp_path, *command, *argv), 2, "other settings", "continues it; or")
    del content["settings"]["draw"]
    common.save(config, content)
    check_error(run(tmp_path, *command), 2, "(draw uniform there, cost now): --draw uniform contin")


def test_a_cell_is_interrupted_and_run_again_and_one_runs_in_a_thread(tmp_path, monkeypatch):
    """As in a notebook: the traceback keeps the first one's objects alive."""
    argv = [*FEW, "--epochs", "1", "--out", str(tmp_path)]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as kept:
        patch.setattr(common, "write_log", Mock(side_effect=KeyboardInterrupt))
        search_mixture.main(argv)
    thread = threading.Thread(target=search_mixture.main, args=(argv,))
    thread.start()
    thread.join()
    assert kept.value and (tmp_path / "result.json").exists()


@pytest.mark.parametrize("metric, accuracies, chance, warning", [
    ("accuracy", [0.95, 0.7, 0.9, 0.8], 0.95, "warning: the best is no better than the same "),
    ("accuracy", [0.96, 0.7, 0.9, 0.96], 0.95, "warning: 2 configurations share the best accuracy"),
    ("balanced", [0.7, 0.8, 0.9, 0.8], 0.5, "pick: 5,3,2; of no more multiply-adds")])
def test_picks_and_what_is_none(metric, accuracies, chance, warning, small_images, tmp_path,
                                capsys):
    space = common.search_space(arguments("--configs", *CONFIGS), small_images)
    validation = common.replace(small_images, classes=["a", "b"],
                                labels=(torch.arange(400) >= 380).long())
    record = {"settings": {"metric": metric, "arch": "resnet20", "dataset": "digits"}}
    result = common.search_result(record, space, torch.tensor(accuracies), [0] * 4,
                                  torch.zeros(4, 1, dtype=torch.int64), validation)
    common.report_search(tmp_path, result, space, None)
    lines = capsys.readouterr().out.splitlines()
    after = 1 + next(i for i, line in enumerate(lines) if line.startswith("relative_macs: "))
    assert lines[after].startswith(warning)
    result = common.load(tmp_path / "result.json")
    best = [(1, 1, 8), (5, 3, 2)][metric == "balanced"]
    assert (result["pick"], result["pick_at_no_cost"]) == (
        common.config_name(best), "4,3,3" if metric == "balanced" else "1,1,8")
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
    by_seed = {}
    for name, entry in result["configs"].items():
        by_seed[name] = [common.load(path / "networks" / f"{name}-{seed}.json")["test_accuracy"]
                         for seed in (0, 1)]
        assert entry["test_accuracy"] == pytest.approx(np.mean(by_seed[name]))
        assert entry["std"] == pytest.approx(np.std(by_seed[name], ddof=1))
    for name, entry in result["configs"].items():
        if name != "4,3,3":
            expected = np.mean(by_seed[name]) - np.mean(by_seed["4,3,3"])
            assert entry["difference"] == pytest.approx(expected)
    values = [entry["test_accuracy"] for entry in result["configs"].values()]
    assert values == sorted(values, reverse=True)
    assert (path / "comparison.png").stat().st_size > 10_000
    assert "2 searches agree with Kendall tau" in (finished / "retrain/printed").read_text()

    shutil.copytree(finished / "retrain/runs", tmp_path / "runs")
    more = ("--top", "3", "--seeds", "3")
    code, out, err = run(tmp_path, *command_of("retrain", finished), *more)
    after = common.load(tmp_path / "runs/retrain-digits/result.json")
    new = 3 * len(after["configs"]) - 2 * len(result["configs"])  # networks that were not trained
    assert (code, err, out.count("epoch 1 ")) == (0, "", new) and len(after["chosen"]) == 3
    run(tmp_path, *command_of("retrain", finished), "--top", "1", "--seeds", "3")
    assert common.load(tmp_path / "runs/retrain-digits/result.json")["configs"] == after["configs"]


def test_conclusions_by_hand():
    assert retrain.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06})
    assert retrain.average_ranks([{"a": 0.9, "b": 0.9, "c": 0.1}, {"a": 0.1, "b": 0.2, "c": 0.3}]) \
        == {"b": 1.75, "c": 2.0, "a": 2.25}
    entries = {"a": {"difference": 0.02, "interval": [0.01, 0.03], "p_holm": 0.01,
                     "relative_macs": 1.5, "seeds": 3},
               "b": {"difference": 0.01, "interval": [-0.01, 0.03], "p_holm": 0.2,
                     "relative_macs": 0.8, "seeds": 3}, "4,3,3": {"seeds": 3}}
    for difference, better, worse in ((0.02, "a", "none"), (-0.02, "none", "a")):
        entries["a"]["difference"] = difference
        shown, cheaper, unseen = retrain.conclusion(entries).splitlines()
        assert shown.endswith(f"Holm over 2): {better}; worse: {worse}.")
        assert cheaper == "Of fewer multiply-adds and not shown to be worse: b."
        assert unseen.startswith("With 3 seeds a difference below about 0.0150 goes unseen")


def test_the_rules_network_is_the_one_of_most_layers_at_full_resolution(digits):
    space = common.search_space(arguments(), digits[0])
    assert retrain.rule_network((8, 1, 1), space) == (8, 1, 1)
    assert retrain.rule_network((1, 1, 8), space) == (1, 1, 8)
    for pick in ((5, 3, 2), (4, 3, 3), (3, 5, 2)):
        rule = retrain.rule_network(pick, space)
        for config, macs in space.macs.items():
            if macs <= space.macs[pick]:
                assert (config[0], macs) <= (rule[0], space.macs[rule])


def test_more_seeds_and_configurations_extend_stage_1(tmp_path):
    argv = (*SMALL, *NATIVE, "--epochs", "1", "--configs", "4,3,3")
    for more in ([], ["1,1,8"], ["--seeds", "2"]):  # each time one network is to be trained
        code, out, err = run(tmp_path, "train_exhaustive", *argv, *more)
        assert (code, err, out.count("epoch 1 ")) == (0, "", 1)
    path = tmp_path / "runs/exhaustive-digits"
    rows = list(csv.DictReader(open(path / "results.csv")))
    assert [(row["config"], row["seed"]) for row in rows] == [
        ("1,1,8", "0"), ("4,3,3", "0"), ("4,3,3", "1")]
    for row in rows:
        network = common.load(path / f"networks/{row['config']}-{row['seed']}.json")
        assert network["test_accuracy"] == float(row["test_accuracy"])


def test_mean_tau():
    rankings = [dict(zip(CONFIGS, column))
                for column in ([0.1, 0.2, 0.3, 0.4], [0.1, 0.3, 0.2], [0.5])]
    # of the pairs of the first two, two agree and one does not; one configuration is no ranking
    assert common.mean_tau(rankings) == pytest.approx(1 / 3)
    assert common.mean_tau(rankings[:1]) is None


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
    pictures = [Image.fromarray(image) for image in test.images.numpy()]
    pictures[0].save("picture.jpg", "PNG")
    code, = re.findall(r"```python\n(import torch\nimport common.*?)```",
                       README, re.DOTALL)
    code = re.sub('"runs/.*?"', repr(str(path)), code)
    if not importlib.util.find_spec("onnxscript"):
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
        if importlib.util.find_spec("onnxscript") and importlib.util.find_spec("onnxruntime"):
            onnx = importlib.import_module("onnxruntime").InferenceSession("network.onnx")
            logits, = onnx.run(None, {onnx.get_inputs()[0].name: batch.numpy()})
            assert np.allclose(logits, network(batch).detach(), atol=1e-4)
    assert not list(tmp_path.glob("*.data"))  # network.onnx is all that is needed

    # on the images that it was tested on, file by file, it is right as often as it was
    hits = 0
    for picture, label in zip(pictures, test.labels):
        picture.save("picture.png")
        hits += network(common.load_picture("picture.png", names["about"])).argmax() == label
    expected = common.load(path.with_suffix(".json"))["test_accuracy"]
    assert abs(hits / len(test) - expected) < 1.5 / len(test)  # a tie may be rounded otherwise


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
    assert rows["exhaustive"]["found"] == "1 of 1"
    assert rows["by multiply-adds"]["picks"] == "8,1,1"
    assert (tmp_path / "compare.png").stat().st_size > 10_000


def test_compare_finds_the_largest_n1_at_the_cost_of_the_pick():
    judge = runpy.run_path(str(ROOT / "results/compare.py"))["judge"]
    ranking = {(1, 3): 0.1, (2, 2): 0.9, (3, 1): 0.5}
    truth = {(1, 3): 0.3, (2, 2): 0.5, (3, 1): 0.8}
    for macs, regret in ((20, 0.0), (40, 0.3)):  # of 3,1; the pick is 2,2
        metrics = judge(ranking, truth, {(1, 3): 10, (2, 2): 30, (3, 1): macs})
        assert metrics["n1 at its macs"] == pytest.approx(regret)


def test_compare_takes_a_search_whose_accuracies_are_all_equal(finished, tmp_path):
    rng = np.random.default_rng(0)
    for kind in ("single", "mixture"):
        for seed in range(4):
            result = common.load(finished / kind / f"runs/{kind}-digits/result.json")
            result["settings"]["seed"] = seed
            for entry in result["ranking"]:
                entry["accuracy"] = 0.1 if (kind, seed) == ("mixture", 2) else rng.random()
            (tmp_path / f"{kind}-{seed}").mkdir()
            common.save(tmp_path / f"{kind}-{seed}/result.json", result)
    done = shell("results/compare.py", "--ground-truth",
                 str(finished / "exhaustive/runs/exhaustive-digits/results.csv"),
                 *map(str, sorted(tmp_path.iterdir(), reverse=True)), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search("mixture.*: kendall_tau .*, n = 3\n", done.stdout)
    assert re.search("mixture.*: regret .*, n = 4\n", done.stdout)


# ------------------------------------------------------------------ kills, Ctrl-C, full disks

MOMENTS = {"exhaustive": ["torn 4,3,3-0.json 1", "step 15"],
           "single": ["step 7", "replaced log.jsonl 1", "torn result.json 1"],
           "mixture": ["step 60", "torn checkpoint.pt 2"],
           "no-balance": ["step 60"],
           "retrain": ["step 15", "torn 4,3,3-0.pt 1"]}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """As `finished`, but every command was killed at its MOMENTS and started again."""
    folder = tmp_path_factory.mktemp("killed")
    plan = []
    for name, (stage, *argv) in COMMANDS.items():
        (folder / name).mkdir()
        plan.append((str(folder / name), stage, MOMENTS[name], argv))
    done = shell("tests/chaos.py", json.dumps(plan), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_anywhere_the_same_command_ends_with_the_same_bits(name, finished, killed):
    assert contents(killed / name) == contents(finished / name)
    assert not list(killed.rglob("*tmp*"))


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


@pytest.fixture
def small_disk(tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "none", tmp_path],
                      capture_output=True).returncode:
        pytest.skip("may not mount a small disk here")
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


@pytest.mark.parametrize("name, file, once", [
    ("mixture", "checkpoint.pt", "\nepoch 1 "),
    ("exhaustive", "4,3,3-0.json", "\n4,3,3 seed 0  epoch ")])
def test_a_full_disk_leaves_the_last_checkpoint(name, file, once, finished, small_disk,
                                                monkeypatch):
    command = command_of(name, finished)

    def save(path, content, real=common.save):
        if path.name == file and path.with_suffix(".pt").exists():  # there is a checkpoint
            with contextlib.suppress(OSError):
                (small_disk / "filler").write_bytes(bytes(20 << 20))
        real(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(common, "save", save)
        outcome = run(small_disk, *command)
    check_error(outcome, 1, "the same command continues from the last checkpoint")
    (small_disk / "filler").unlink()
    code, out, err = run(small_disk, *command)
    assert (code, err) == (0, "") and once in outcome[1] and once not in out
    assert contents(small_disk) == contents(finished / name)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("damage", ["cut", "bomb", "zipped bomb"])
@pytest.mark.parametrize("name, file", [
    ("single", "config.json"), ("single", "result.json"), ("single", "checkpoint.pt"),
    ("exhaustive", "networks/4,3,3-0.json"), ("exhaustive", "networks/4,3,3-0.pt")])
def test_damaged_files_are_named_and_left_and_never_executed(name, file, damage, finished,
                                                             tmp_path):
    shutil.copytree(finished / name / "runs", tmp_path / "runs")
    path, = tmp_path.glob(f"runs/*/{file}")
    if path.suffix == ".pt":  # only a run that is not finished reads it
        for finished_file in (path.with_name("result.json"), path.with_suffix(".json")):
            finished_file.unlink(missing_ok=True)
    if damage == "cut":
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "bomb":
        path.write_bytes(pickle.dumps(Bomb(), protocol=2))
    else:
        torch.save({"log": Bomb()}, path)
    before = path.read_bytes()
    check_error(run(tmp_path, *command_of(name, finished)), 2, file, "damaged or foreign")
    assert path.read_bytes() == before and not (tmp_path / "executed").exists()


# ------------------------------------------------------------------------------- what is refused

@pytest.mark.parametrize("stage", ["search_mixture", "search_single"])
def test_a_loss_that_is_not_finite_stops_a_search(stage, tmp_path):
    check_error(run(tmp_path, stage, *FEW, "--epochs", "2", "--lr", "3e38", "3e38"), 1,
                "epoch 1: the loss or a weight is not finite; a smaller --lr, with another --out")
    assert not list(tmp_path.rglob("result.json")) and not list(tmp_path.rglob("*.pt"))


def test_a_network_that_diverges_stops_no_other(tmp_path, monkeypatch):
    def train(path, args, train, test, config, seed, bar, real=common.train_alone):
        if config == (8, 1, 1):
            raise common.TrainingError("epoch 1: the loss is not finite")
        real(path, args, train, test, config, seed, bar)

    argv = (*FEW, "--epochs", "1")
    with monkeypatch.context() as patch:
        patch.setattr(common, "train_alone", train)
        outcome = run(tmp_path, "train_exhaustive", *argv)
    for code, out, err in (outcome, run(tmp_path, "train_exhaustive", *argv)):  # it is remembered
        check_error((code, out, err), 1, "1 networks diverged: 8,1,1-0 (epoch 1: the loss is not")
        assert "best " in out
    folder = tmp_path / "runs/exhaustive-digits"
    rows = list(csv.DictReader(open(folder / "results.csv")))
    assert sorted(row["config"] for row in rows) == ["1,1,8", "4,3,3", "5,3,2"]
    (folder / "networks/8,1,1-0.json").unlink()
    code, out, err = run(tmp_path, "train_exhaustive", *argv)
    assert (code, err, out.count("epoch 1 ")) == (0, "", 1)


@pytest.mark.parametrize("stage", ["search_mixture", "search_single"])
def test_searches_validate_on_images_that_they_do_not_train_on(stage, tmp_path, monkeypatch):
    def split(*args, real=common.split_for_search):
        train, validation = real(*args)
        return train, common.replace(validation, images=torch.zeros_like(validation.images))

    def watched(learner, images, *args, real):
        black.add((real.__name__, images.std(dim=(2, 3)).max().item() < 1e-6))
        return real(learner, images, *args)

    black = set()
    monkeypatch.setattr(common, "split_for_search", split)
    for name in ("step", "validate"):
        real = getattr(common.Learner, name)
        monkeypatch.setattr(common.Learner, name, functools.partialmethod(watched, real=real))
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


def test_the_learning_rate_of_training_alone(tmp_path):
    argv = (*SMALL, *NATIVE, "--num-train", "40", "--configs", "1,1,8", "--epochs", "10")
    assert run(tmp_path, "train_exhaustive", *argv)[0] == 0
    network = common.load(tmp_path / "runs/exhaustive-digits/networks/1,1,8-0.json")
    assert [line["lr"] for line in network["history"]] == pytest.approx(
        [0.1] * 4 + [0.01] * 2 + [0.001] * 2 + [1e-4, 1e-5])


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


def test_a_class_may_have_a_name_that_the_terminal_cannot_show(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    write_folder(tmp_path / "pets", classes=("ca\u0142", "do\u011f"), count=8)
    done = shell("search_single.py", "--dataset", "pets", "--image-size", "8", "--width", "0.25",
                 "--batch-size", "4", "--epochs", "1", "--configs", "4,3,3", *NATIVE, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and "2 classes (ca?, do?)" in done.stdout


def test_a_full_gpu_is_one_line(tmp_path, monkeypatch):
    error = torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")
    monkeypatch.setattr(common.Learner, "step", Mock(side_effect=error))
    check_error(run(tmp_path, "search_single", *FEW), 1, "CUDA out of memory. Tried to allocate")


def test_a_weight_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    steps = []

    def step(learner, *args, real=common.Learner.step):
        steps.append(real(learner, *args))
        if len(steps) == 40:  # the last one of supernet 3 in epoch 2: no loss shows it
            next(learner.network.parameters()).data[0] = math.inf
        return steps[-1]

    monkeypatch.setattr(common.Learner, "step", step)
    check_error(run(tmp_path, "search_mixture", *FEW, "--epochs", "3"), 1,
                "epoch 2: the loss or a weight is not finite")
    line, = common.load(tmp_path / "runs/mixture-digits/checkpoint.pt")["log"]  # of epoch 1
    assert [line["train_loss"], line["train_accuracy"]] == pytest.approx(
        torch.stack(steps[:20]).mean(0).tolist())


@pytest.mark.parametrize("stage, argv, message", [
    ("search_mixture", "--dataset cifar11", "unknown data set 'cifar11'"),
    ("search_mixture", "--max-macs 0.3", "--max-macs 0.3: all configurations have 0.4"),
    ("search_mixture", "--test-fraction 0.2", "digits has a test set of its own"),
    ("search_mixture", "--image-size 4", "must be from 8 to 1024"),
    ("search_mixture", "--num-train 12", "cannot split"),
    ("search_mixture", "--num-resolutions 6 --image-size 8", "too small for 6 resolutions"),
    ("search_mixture", "--configs 4,3,3", "--num-supernets 4: at most 1"),
    ("search_mixture", "--batch-size 1000", "larger than a part of the split"),
    ("search_single", "--epochs " + "9" * 400, "must be from 1 to 1000000"),
    ("search_single", "--lr nan 1e400", "must be from 0"),
    ("search_single", "--ground-truth nowhere.csv", "nowhere.csv"),
    ("search_single", "--ground-truth part.csv", "lacks 35 of 36 configurations"),
    ("search_single", "--ground-truth odd.csv", "columns config, test_accuracy"),
    ("search_single", "--device warp", "--device warp"),
    ("search_single", "--out file/run", "not writable"),
    ("search_single", "--out foreign", "other settings"),
    ("train_exhaustive", "--configs 5,3,1", "add to 10"),
    ("train_exhaustive", "--nonsense", "unrecognized arguments"),
    ("retrain", "--config 5,3,1", "add to 10"),
    ("retrain", "--from nowhere", "nowhere"),
    ("retrain", "--from foreign", "foreign"),
    ("retrain", "--from one two", "two is a search of another width than one"),
    ("retrain", "--from one three", "three ranks other configurations than one"),
    ("retrain", "--from one one/", "the same run twice"),
    ("search_mixture", "--local-rank=1", "start many processes with torchrun"),
    ("retrain", "--config 8,1,1 --max-macs 1", "allows no configuration of the ranking"),
    ("retrain", "", "give either --from RUN")])
def test_mistakes_end_with_one_line_and_leave_everything(stage, argv, message, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "part.csv").write_text('config,test_accuracy\n"4,3,3",0.5\n')
    (tmp_path / "odd.csv").write_text('config,accuracy\n"4,3,3",0.5\n')
    (tmp_path / "foreign").mkdir()
    for file in ("config.json", "result.json"):
        (tmp_path / "foreign" / file).write_text('{"settings": {"stage": "mixture"}}')
    for i, name in enumerate(("one", "two", "three")):
        (tmp_path / name).mkdir()
        common.save(tmp_path / name / "result.json", {
            "settings": {"arch": "resnet20", "width": i % 2}, "pick": "4,3,3",
            "ranking": [{"config": f"{4 + i // 2},3,3", "accuracy": 0.5}]})
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
def test_a_stage_needs_common_py_and_nothing_else(stage, argv, tmp_path):
    run_alone(tmp_path, ["common", stage], f"{stage}.py", *SMALL, *argv)


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


PIECES = {
    "enumerate_configs": "assert len(enumerate_configs(10, 3)) == 36",
    "autocast": "class Net:\n    layers, downsample = [lambda x, d: x], 'maxpool'\n"
                "    downsampling = head = lambda self, x: [*x] if isinstance(x, tuple) else x\n"
                "batch = torch.eye(3), torch.tensor([0, 1, 1])\n"
                "assert evaluate_configs(Net(), [('none',)], [batch]).item() == 2 / 3",
    "balance": "p = balance(torch.rand(9, 3).double(), 5.0, 1e-6, torch.ones(9) / 9)\n"
               "assert torch.allclose(p.mean(0), torch.tensor(1 / 3).double(), atol=1e-2)",
    "batch_norm": "block = BasicBlock(16, 32, supernet=False)\n"
                  "assert block(torch.zeros(2, 16, 8, 8), 'stride').shape == (2, 32, 4, 4)\n"
                  "Stem(16, supernet=True)",
}


@pytest.mark.parametrize("row", [line.split("|")[1:-1] for line in README.splitlines()
                                 if line.startswith("| `") and line.count("|") == 4])
def test_the_pieces_of_the_readme_need_what_it_says(row, tmp_path):
    names, (file,), lines = (re.findall("`(.*?)`", cell) for cell in row)
    source = (ROOT / file).read_text()
    nodes = {getattr(node, "name", None): node for node in ast.parse(source).body}
    parts = ["from __future__ import annotations", *lines]
    for name in names:
        first = min([nodes[name], *nodes[name].decorator_list], key=lambda node: node.lineno)
        parts.append("\n".join(source.splitlines()[first.lineno - 1:nodes[name].end_lineno]))
    script = tmp_path / "piece.py"
    script.write_text("\n\n".join([*parts, PIECES[names[0]]]))
    subprocess.run([sys.executable, "-I", script], cwd=tmp_path, check=True)
