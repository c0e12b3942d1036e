"""Each stage through the shell, killed and continued, and every mistake a user may make."""
import argparse
import csv
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, contents, shell

import common
import retrain
import search_mixture
import search_single
import train_exhaustive

STAGES = {module.__name__: module
          for module in (train_exhaustive, search_single, search_mixture, retrain)}
CONFIGS = [common.config_name(config) for config in common.enumerate_configs(10, 3)]


def run_here(monkeypatch, capsys, stage, *argv):
    """Run a stage in this process: (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", [f"{stage}.py", *argv])
    try:
        common.run_script(STAGES[stage].main)
        code = 0
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


def write_truth(path, configs=CONFIGS):
    rng = np.random.default_rng(0)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["config", "seed", "test_accuracy"])
        writer.writerows([name, seed, rng.random()] for name in configs for seed in (0, 1))


@pytest.fixture(scope="module")
def searches(tmp_path_factory):
    """A finished run of both searches, undisturbed, in a folder of its own."""
    folder = tmp_path_factory.mktemp("searches")
    write_truth(folder / "truth.csv")
    for script, more in (("search_mixture.py", ["--num-supernets", "3"]),
                         ("search_single.py", ["--rank-every", "2"])):
        done = shell(script, *SMALL, "--epochs", "4", "--ground-truth", "truth.csv", *more,
                     cwd=folder)
        assert done.returncode == 0, done.stderr
        (folder / f"{script}.txt").write_text(done.stdout)
    return folder


@pytest.mark.parametrize("stage, supernets", [("mixture", 3), ("single", 1)])
def test_searches_write_and_say_what_they_promise(searches, stage, supernets):
    run, text = searches / "runs" / f"{stage}-digits", (
        searches / f"search_{stage}.py.txt").read_text()
    result = json.loads((run / "result.json").read_text())
    accuracies = [entry["accuracy"] for entry in result["ranking"]]
    assert sorted(entry["config"] for entry in result["ranking"]) == sorted(CONFIGS)
    assert accuracies == sorted(accuracies, reverse=True)
    assert result["pick"] == result["ranking"][0]["config"]
    assert {entry["supernet"] for entry in result["ranking"]} <= set(range(supernets))
    assert set(result["metrics"]) == {"kendall_tau", "spearman_rho", "pick_rank", "regret",
                                      "kendall_tau_interval"}
    low, high = result["metrics"]["kendall_tau_interval"]
    assert low - 0.1 < result["metrics"]["kendall_tau"] < high + 0.1
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in log] == [1, 2, 3, 4]
    for key in ("seconds", "train_loss", "train_accuracy", "val_accuracy", "lr",
                "images_per_second", "utilisation"):
        assert all(np.isfinite(line[key]) for line in log)
    assert log[0]["lr"] == 0.1 and log[2]["lr"] == pytest.approx(0.0505)
    if stage == "mixture":
        assert [line["temperature"] for line in log] == [1, 34, 67, 100]
        assert all(abs(p - 1 / 3) < 0.02 for line in log for p in line["p_m"])
        assert all(1 / 3 <= line["mean_max_p"] <= 1 for line in log)
    else:
        assert ["kendall_tau" in line for line in log] == [False, True, False, True]
        assert log[3]["ranking"][result["pick"]] == accuracies[0]
    weights = torch.load(run / "supernets.pt", weights_only=True)
    assert len(weights) == supernets
    for image in ["ranking.png"] + ["assignment.png"] * (stage == "mixture"):
        assert (run / image).stat().st_size > 10000
    settings = json.loads((run / "config.json").read_text())["settings"]
    assert settings["batch_size"] == 32 and settings["epochs"] == 4
    assert "expected time" in text and f"pick: {result['pick']}" in text
    assert f"next: python retrain.py --from runs/{stage}-digits" in text
    assert text.count("default") == 1 and "epoch 4" in text
    assert not list(run.glob("tmp-*"))


@pytest.mark.parametrize("stage", ["mixture", "single"])
def test_the_ranking_can_be_redone_from_weights_settings_and_data(searches, stage):
    run = searches / "runs" / f"{stage}-digits"
    args = argparse.Namespace(**common.read_file(run / "config.json")["settings"])
    train, test = common.load_dataset(args)
    assert common.fingerprint((train, test)) == args.data
    train, validation = common.split_for_search(train, args)
    assert common.choose_kernel(args.kernel, "cpu") == args.kernel
    weights, result = (torch.load(run / "supernets.pt", weights_only=True),
                       common.read_file(run / "result.json"))
    correct = common.read_file(run / "correct.pt")["correct"]
    for entry, right in zip(result["ranking"], correct, strict=True):
        network = common.make_network(args, train, True)
        network.load_state_dict(weights[entry["supernet"]])
        found, = common.evaluate_configs(network, [common.parse_config(entry["config"])],
                                         validation.evaluation_batches(args.batch_size))
        assert torch.equal(found, right) and found.double().mean().item() == entry["accuracy"]
    assert result["validation_images"] == len(validation) == correct.shape[1]
    steps = np.sum([entry["steps"] for entry in result["ranking"]], 0)
    assert (steps == 4 * train.num_batches(args.batch_size)).all()
    for key in ("command", "versions", "git", "device_name", "ranks"):
        assert key in result


def test_finished_searches_are_shown_other_settings_refused(searches, monkeypatch, capsys):
    monkeypatch.chdir(searches)
    run, argv = searches / "runs" / "mixture-digits", (*SMALL, "--epochs", "4")
    before = (run / "result.json").read_bytes()
    code, out, _ = run_here(monkeypatch, capsys, "search_mixture", *argv, "--num-supernets", "3")
    assert code == 0 and "pick: " in out and "epochs 1 to" not in out
    assert "kendall_tau_interval" in out and " - " in out
    assert (run / "result.json").read_bytes() == before
    code, _, err = run_here(monkeypatch, capsys, "search_mixture", *argv, "--num-supernets", "2")
    assert code == 2 and "num_supernets 3 there, 2 now" in err and err.count("\n") == 1
    assert (run / "result.json").read_bytes() == before


def test_retrain_takes_the_pick_and_its_settings(searches):
    done = shell("retrain.py", "--from", "runs/mixture-digits", "--epochs", "2", "--seeds", "2",
                 "--batch-size", "32", cwd=searches)
    assert done.returncode == 0, done.stderr
    pick = json.loads((searches / "runs/mixture-digits/result.json").read_text())["pick"]
    run = searches / "runs" / "retrain-digits"
    result = json.loads((run / "result.json").read_text())
    assert set(result["configs"]) == {pick, "4,3,3"} and result["found"] == pick
    rows = common.read_results(run / "results.csv")
    for name, entry in result["configs"].items():
        values = [row["test_accuracy"] for row in rows if row["config"] == name]
        assert len(values) == entry["seeds"] == 2
        assert entry["test_accuracy"] == pytest.approx(np.mean(values))
        assert entry["std"] == pytest.approx(np.std(values, ddof=1))
    settings = json.loads((run / "config.json").read_text())["settings"]
    assert settings["width"] == 0.25 and settings["image_size"] == 8
    assert settings["num_train"] == 320


def test_the_same_command_leaves_the_same_bits(searches, tmp_path):
    """With the kernels and all threads; test_faults.py kills the stages in between."""
    write_truth(tmp_path / "truth.csv")
    done = shell("search_mixture.py", *SMALL, "--epochs", "4", "--ground-truth", "truth.csv",
                 "--num-supernets", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    shutil.copytree(searches / "runs" / "mixture-digits", tmp_path / "first" / "runs" / "a")
    assert contents(tmp_path) == contents(tmp_path / "first")


@pytest.mark.parametrize("stage, streams", [("search_mixture", 2 * 4 * 4), ("search_single", 2 * 4),
                                            ("train_exhaustive", 2 * 2)])
def test_every_random_stream_has_one_use(stage, streams, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    keys = []
    monkeypatch.setattr(STAGES[stage], "stream",
                        lambda *key: keys.append(key) or common.stream(*key))
    more = ("--configs", "4,3,3") if stage == "train_exhaustive" else ()
    code, _, err = run_here(monkeypatch, capsys, stage, *SMALL, *more, "--epochs", "2")
    assert (code, err) == (0, "") and len(keys) == len(set(keys)) == streams


def test_more_seeds_and_configurations_extend_a_run(tmp_path):
    for argv, said in ((("4,3,3", "1,1,8"), "0 finished, 2 to train"),
                       (("7,1,2", "--seeds", "2"), "0 finished, 2 to train"),
                       (("4,3,3", "--seeds", "2"), "1 finished, 1 to train")):
        done = shell("train_exhaustive.py", *SMALL, "--epochs", "2", "--configs", *argv,
                     cwd=tmp_path)
        assert done.returncode == 0 and said in done.stdout, done.stderr
    rows = common.read_results(tmp_path / "runs" / "exhaustive-digits" / "results.csv")
    assert [(row["config"], row["seed"]) for row in rows] == [
        ("1,1,8", 0), ("4,3,3", 0), ("7,1,2", 0), ("4,3,3", 1), ("7,1,2", 1)]


def test_without_balance(tmp_path):
    done = shell("search_mixture.py", *SMALL, "--epochs", "1", "--no-balance", "--temperature",
                 "500", "500", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    line = json.loads((tmp_path / "runs/mixture-digits/log.jsonl").read_text())
    divergence = sum(p * np.log(4 * p) for p in line["p_m"])
    assert divergence > 5e-4 and sum(line["p_m"]) == pytest.approx(1)  # nothing holds it at 1/4


def test_loss_that_is_not_finite_stops_the_run(tmp_path):
    done = shell("search_mixture.py", *SMALL, "--epochs", "2", "--lr", "1e38", "1e38",
                 cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    for what in ("epoch 1", "round ", "configuration ", "supernet "):
        assert what in done.stderr
    assert not (tmp_path / "runs/mixture-digits/result.json").exists()


def test_compare_makes_a_row_of_the_runs_that_differ_in_the_seed_alone(searches, tmp_path, capsys,
                                                                       monkeypatch):
    """Against scipy and numpy on what the runs wrote; one run faked as two seeds."""
    from scipy.stats import kendalltau
    runs, truth = [searches / "runs" / f"{kind}-digits" for kind in ("single", "mixture")], {}
    for row in csv.DictReader(open(searches / "truth.csv")):
        truth.setdefault(row["config"], []).append(float(row["test_accuracy"]))
    other = shutil.copytree(runs[0], tmp_path / "other")
    result = common.read_file(other / "result.json")
    result["settings"]["seed"] = 1
    result["ranking"][0]["accuracy"] = 0.0
    (other / "result.json").write_text(json.dumps(common.seal(result)))
    code, out, err = run_here(monkeypatch, capsys, "search_mixture", "--compare",
                              *map(str, (runs[0], other, runs[1])), "--out", str(tmp_path / "plot"),
                              "--ground-truth", str(searches / "truth.csv"))
    assert code == 0, err
    header, _, single, mixture, none = [line.strip("| ").split(" | ")
                                        for line in out.splitlines()[:5]]
    assert header[0] == "stage" and "seed" not in header
    single, mixture = dict(zip(header, single)), dict(zip(header, mixture))
    assert (single["stage"], single["runs"], mixture["stage"]) == ("single", "2", "mixture")
    taus = []
    for folder in (runs[0], other):
        scores = {e["config"]: e["accuracy"]
                  for e in common.read_file(folder / "result.json")["ranking"]}
        taus.append(kendalltau(list(scores.values()),
                               [np.mean(truth[name]) for name in scores]).statistic)
    assert single["kendall_tau"] == f"{np.mean(taus):.3f} +- {np.std(taus, ddof=1):.3f}"
    assert none[0] == "no search" and none[-1] == "8,1,1"  # the dearest
    assert mixture["steps"] == f"{3 * int(single['steps']):,}"
    assert (tmp_path / "plot" / "compare.png").stat().st_size > 1000  # --rank-every of the single


def test_ground_truth_says_how_well_two_seeds_agree():
    accuracies = {0: [0.1, 0.2, 0.3, 0.4], 1: [0.1, 0.3, 0.2], 2: [0.5]}
    rows = [{"config": CONFIGS[i], "seed": seed, "test_accuracy": value}
            for seed, found in accuracies.items() for i, value in enumerate(found)]
    # of the pairs of 0 and 1 two agree and one does not; a single configuration has no ranking
    assert train_exhaustive.tau_between_seeds(rows) == pytest.approx(1 / 3)
    assert train_exhaustive.tau_between_seeds(rows[:4]) is None


@pytest.mark.parametrize("stage, argv, message", [
    ("search_mixture", ["--dataset", "cifar11"], "unknown data set 'cifar11'"),
    ("search_mixture", ["--num-supernets", "0"], "must be at least 1"),
    ("search_mixture", ["--num-supernets", "37"], "at most 36"),
    ("search_mixture", ["--batch-size", "1000"], "larger than a part of the split"),
    ("search_mixture", ["--compare", "file"], "--compare needs --ground-truth"),
    ("search_mixture", ["--compare", "foreign", "--ground-truth", "odd.csv"], "no finished search"),
    ("search_single", ["--batch-size", "1000"], "larger than a part of the split"),
    ("search_single", ["--epochs", "many"], "invalid int value"),
    ("search_single", ["--lr", "nan", "0"], "must be at least 0"),
    ("search_single", ["--ground-truth", "nowhere.csv"], "nowhere.csv"),
    ("search_single", ["--ground-truth", "part.csv"], "lacks 33 of 36 configurations"),
    ("search_single", ["--ground-truth", "odd.csv"], "columns config, seed, test_accuracy"),
    ("search_single", ["--device", "warp"], "--device warp"),
    ("search_single", ["--out", "file/run"], "not writable"),
    ("search_single", ["--out", "foreign"], "other settings"),
    ("search_single", ["--dataset", "pets"], "two or more classes"),
    ("search_single", ["--dataset", "cifar10", "--data-dir", "."], "not a usable cache"),
    ("train_exhaustive", ["--configs", "5,3,1"], "add to 10"),
    ("train_exhaustive", ["--nonsense"], "unrecognized arguments"),
    ("retrain", ["--config", "5,3,1"], "add to 10"),
    ("retrain", ["--from", "nowhere"], "no finished search"),
    ("retrain", [], "one of the arguments --from --config is required"),
])
def test_mistakes_end_with_one_line_and_code_2(stage, argv, message, tmp_path, monkeypatch,
                                               capsys):
    from test_common import write_folder
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("a file, not a folder")
    (tmp_path / "cifar10.npz").write_text("damaged")
    (tmp_path / "odd.csv").write_text("config,accuracy\n4;3;3,1\n")
    write_truth(tmp_path / "part.csv", CONFIGS[:3])
    write_folder(tmp_path / "pets", classes=("only",))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text(
        json.dumps(common.seal({"format": common.FORMAT, "settings": {"stage": "mixture"}})))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code, _, err = run_here(monkeypatch, capsys, stage, *argv)
    assert code == 2 and message in err and err.startswith("error: ") and err.count("\n") == 1
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*")
                      if path.is_file() and path.suffix != ".lock"}


def test_overwrite_starts_anew(searches, tmp_path):
    run = shutil.copytree(searches / "runs" / "single-digits", tmp_path / "run")
    (run / "mine.txt").write_text("kept")
    done = shell("search_single.py", *SMALL, "--epochs", "1", "--out", str(run), "--overwrite",
                 cwd=tmp_path)
    assert done.returncode == 0 and "epochs 1 to 1" in done.stdout, done.stderr
    assert (run / "log.jsonl").read_text().count("\n") == 1 and (run / "mine.txt").exists()


@pytest.mark.parametrize("stage, argv", [
    ("train_exhaustive", ["--configs", "9,0,1"]), ("search_single", ["--epochs", "1"]),
    ("search_mixture", ["--epochs", "1", "--num-supernets", "1"]), ("retrain", ["--config", "x"])])
def test_a_stage_script_needs_common_py_and_nothing_else(stage, argv, tmp_path):
    """Copied alone into an empty folder it runs (or finds the mistake it was given), and importing
    it writes nothing and prints nothing. Stage 3 also needs stage 1, whose training it does."""
    files = ["common.py", f"{stage}.py"] + ["train_exhaustive.py"] * (stage == "retrain")
    for file in files:
        shutil.copy(ROOT / file, tmp_path)
    done = subprocess.run([sys.executable, "-B", "-c", f"import {stage}"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert len(list(tmp_path.iterdir())) == len(files)
    done = shell(f"{stage}.py", *SMALL, *argv, cwd=tmp_path, root=tmp_path)
    assert done.returncode == (0 if "search" in stage else 2), done.stderr
