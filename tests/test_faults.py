"""Kills, damaged files, full disks, hostile input, numbers that go wrong, statistics."""
import io
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, arguments, contents, shell
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_common import GOOD, write_cifar, write_folder
from test_scripts import STAGES, run_here, write_truth

import common
import retrain
import search_mixture

NATIVE = ("--kernel", "native", "--threads", "1")
COMMANDS = {
    "search_mixture": ("--num-supernets", "3", "--epochs", "4", "--rank-every", "2"),
    "search_single": ("--epochs", "4"),
    "train_exhaustive": ("--configs", "4,3,3", "1,1,8", "--epochs", "3"),
    "retrain": ("--config", "5,3,2", "--seeds", "1", "--epochs", "3")}
WRITINGS = {  # moments of a kill inside the writing of each kind of file
    "search_mixture": ["torn checkpoint.pt", "replaced checkpoint-previous.pt", "torn log",
                       "written result.json"],
    "search_single": ["written checkpoint.pt", "written log", "torn result.json"],
    "train_exhaustive": ["torn checkpoint-4,3,3-0.pt", "torn results.csv", "replaced results.csv"],
    "retrain": ["written results.csv", "torn result.json"]}


# -------------------------------------------------------------------------------------- kills

def chaos(stage, kills, cwd):
    """Run a stage, killed at each of these moments; what each start did (see chaos.py)."""
    cwd.mkdir(exist_ok=True)
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "chaos.py"), stage,
                           json.dumps(kills), *SMALL, *NATIVE, *COMMANDS[stage]], cwd=cwd,
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return json.loads(done.stdout)


def check_kills(stage, moments, tmp_path):
    """Undisturbed and killed runs leave the same; how many kills there were."""
    (events,) = chaos(stage, [], tmp_path / "whole")
    assert isinstance(events, int) and events > 20
    done = chaos(stage, moments, tmp_path / "killed")
    killed = [what for what in done if isinstance(what, str)]
    assert isinstance(done[-1], int), done
    assert {m for m in moments if isinstance(m, str)} <= set(killed), done
    assert contents(tmp_path / "whole") == contents(tmp_path / "killed")
    run, = (tmp_path / "killed" / "runs").iterdir()
    assert not list(run.glob("tmp-*")) and ("search" in stage) == bool(list(run.glob("check*")))
    return len(killed)


@pytest.mark.parametrize("stage", COMMANDS)
def test_killed_anywhere_it_ends_with_the_same_bits(stage, tmp_path):
    rng = random.Random(stage)
    moments = [*WRITINGS[stage], rng.randrange(1, 20), rng.randrange(1, 20)]
    rng.shuffle(moments)
    moments.sort(key=lambda m: m in WRITINGS[stage] and "result.json" in m)  # the last file
    assert check_kills(stage, moments, tmp_path) >= len(WRITINGS[stage]) + 1


@pytest.mark.slow
@pytest.mark.parametrize("stage", COMMANDS)
def test_killed_at_many_random_moments(stage, tmp_path):
    rng = random.Random()
    moments = [rng.randrange(1, 25) for _ in range(40)]
    print(stage, "kills survived:", check_kills(stage, moments, tmp_path))


@pytest.fixture(autouse=True)
def interruptible():
    """Where the tests run in the background SIGINT is ignored, and processes inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def start(*argv, cwd):
    return subprocess.Popen([sys.executable, *map(str, argv)], cwd=cwd, text=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                            env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"})


def wait_for_log(cwd, lines):
    deadline = time.time() + 120
    while time.time() < deadline:
        logs = list(cwd.glob("**/log.jsonl"))
        if logs and logs[0].read_bytes().count(b"\n") >= lines:
            return
        time.sleep(0.01)
    raise AssertionError("no log")


LONG = (ROOT / "search_mixture.py", *SMALL, *NATIVE, "--epochs", "400")


@pytest.mark.parametrize("moment", [0, *(pytest.param(i / 20, marks=pytest.mark.slow)
                                         for i in range(1, 20))])
@pytest.mark.parametrize("signum, code, word", [(signal.SIGTERM, 143, "stopped"),
                                                (signal.SIGINT, 130, "interrupted")])
def test_signals_end_it_with_a_line_that_says_how_to_go_on(signum, code, word, moment, tmp_path):
    process = start(*LONG, cwd=tmp_path)
    wait_for_log(tmp_path, 2)
    time.sleep(moment)
    process.send_signal(signum)
    _, err = process.communicate(timeout=30)
    line = re.fullmatch(f"{word}: the same command continues from (runs/mixture-digits/"
                        r"checkpoint(-previous)?\.pt), epoch (\d+)\n", err)
    assert process.returncode == code and line, err
    assert common.read_file(tmp_path / line[1])["epoch"] == int(line[3]) >= 1


def test_compilers_do_not_outlive_the_run(tmp_path, monkeypatch):
    """With a compiler that would take a minute; it notes the processes of it."""
    compiler = tmp_path / "slow-c++"
    compiler.write_text('#!/bin/sh\ncase "$*" in *.cpp*) echo $$ >> '
                        f'{tmp_path}/pids; sleep 60;; esac\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "built"))
    process = start(ROOT / "search_single.py", *SMALL, cwd=tmp_path)
    while not (tmp_path / "pids").exists():
        assert process.poll() is None
        time.sleep(0.05)
    pids = (tmp_path / "pids").read_text().split()
    process.terminate()
    _, err = process.communicate(timeout=20)
    assert process.returncode == 143 and err.endswith("stopped: there is no checkpoint yet\n")
    deadline = time.time() + 5
    while any(os.path.exists(f"/proc/{pid}") for pid in pids) and time.time() < deadline:
        time.sleep(0.05)
    assert pids and not any(os.path.exists(f"/proc/{pid}") for pid in pids)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_within_the_saving_of_tensors_is_not_hidden(signum, tmp_path, monkeypatch, capsys):
    """torch.save would turn it into an error of its own."""
    class File(io.BytesIO):
        def write(self, data):
            os.kill(os.getpid(), signum)
            return super().write(data)
    monkeypatch.setattr(signal, "signal", lambda *args, real=signal.signal: real(*args)
                        if args[1] != signal.SIG_IGN else None)
    monkeypatch.setattr(common.Run, "folder", None)
    with pytest.raises(SystemExit) as end:
        common.run_script(lambda: common.save_tensors([torch.zeros(3)], File()))
    assert end.value.code == 128 + signum and "no checkpoint yet" in capsys.readouterr().err


def test_torchruns_ranks_are_gone_after_a_signal(tmp_path):
    process = start("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *LONG,
                    cwd=tmp_path)
    wait_for_log(tmp_path, 2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    ours = [line for line in err.splitlines() if "the same command continues" in line]
    assert process.returncode != 0 and len(ours) == 1, err
    assert len(children) >= 2 and not any(os.path.exists(f"/proc/{pid}") for pid in children)


def test_only_one_process_writes_to_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    first = start(*LONG, cwd=tmp_path)
    wait_for_log(tmp_path, 1)
    for more in ((), ("--overwrite",)):
        code, _, err = run_here(monkeypatch, capsys, "search_mixture", *LONG[1:], *more)
        assert code == 2 and "another process is writing to" in err and err.count("\n") == 1
    assert first.poll() is None
    first.kill()
    first.communicate()
    lines = (tmp_path / "runs/mixture-digits/log.jsonl").read_bytes().count(b"\n")
    third = start(*LONG, cwd=tmp_path)  # the kernel has released the lock
    wait_for_log(tmp_path, lines + 2)
    third.terminate()
    assert "continues from" in third.communicate()[1]


# --------------------------------------------------------------------------------- disks

@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=900k", "none", folder],
                      capture_output=True).returncode:
        pytest.skip("may not mount a small disk here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_leaves_the_last_checkpoint(small_disk, tmp_path):
    argv = (*SMALL, *NATIVE, "--epochs", "4", "--num-supernets", "4")
    done = shell("search_mixture.py", *argv, "--out", "disk/runs/a", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "No space left on device" in done.stderr and "epoch 1\n" in done.stderr
    assert "continues from disk/runs/a/checkpoint.pt" in done.stderr
    subprocess.run(["mount", "-o", "remount,size=10m", small_disk], check=True)
    done = shell("search_mixture.py", *argv, "--out", "disk/runs/a", cwd=tmp_path)
    assert done.returncode == 0 and "epochs 2 to 4" in done.stdout, done.stderr
    (tmp_path / "whole").mkdir()
    assert shell("search_mixture.py", *argv, cwd=tmp_path / "whole").returncode == 0
    assert contents(small_disk) == contents(tmp_path / "whole")


def test_a_disk_that_cannot_be_written_is_said_before_training(small_disk, tmp_path):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    done = shell("search_single.py", *SMALL, *NATIVE, "--out", str(small_disk / "a"), cwd=tmp_path)
    assert done.returncode == 2 and "not writable" in done.stderr
    write_folder(tmp_path / "pets")
    done = shell("search_single.py", *SMALL, *NATIVE, "--dataset", "pets", "--data-dir",
                 str(small_disk / "a"), cwd=tmp_path)
    assert done.returncode == 2 and "cannot write" in done.stderr and done.stderr.count("\n") == 1


# -------------------------------------------------------------------------- damaged files

class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Finished runs of a search and of stage 1, its results as ground truth, a cache."""
    folder = tmp_path_factory.mktemp("finished")
    np.savez(folder / "cifar10.npz", **GOOD)
    write_truth(folder / "truth.csv")
    for script, *argv in (("search_single.py", "--epochs", "2"),
                          ("train_exhaustive.py", "--epochs", "1", "--configs", "4,3,3")):
        done = shell(script, *SMALL, *NATIVE, *argv, cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder


def flip(content, bit):
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def other_format(path):
    if path.suffix == ".pt":
        torch.save(torch.load(path, weights_only=True) | {"format": 99}, path)
    else:
        path.write_text(json.dumps(common.seal(common.read_file(path) | {"format": 99})))


def zipped_pickle(path):
    torch.save({"format": 1, "epoch": Evil()}, path)


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-30]),
    "flipped": lambda path: path.write_bytes(flip(path.read_bytes(), path.stat().st_size * 4)),
    "foreign": lambda path: path.write_bytes(b"\x00PNG, or anything\n" * 20),
    "pickle": lambda path: path.write_bytes(pickle.dumps(Evil())),
    "zipped pickle": zipped_pickle,
    "other format": other_format}
SINGLE = ("search_single", *SMALL, *NATIVE, "--epochs", "2")
USES = {  # file: the command that reads it
    "runs/single-digits/checkpoint.pt": SINGLE,
    "runs/single-digits/config.json": SINGLE,
    "runs/single-digits/result.json": SINGLE,
    "runs/single-digits/log.jsonl": SINGLE,
    "runs/exhaustive-digits/results.csv": ("train_exhaustive", *SMALL, *NATIVE, "--epochs", "1",
                                           "--configs", "4,3,3"),
    "cifar10.npz": ("search_single", "--dataset", "cifar10", "--data-dir", ".", "--batch-size",
                    "2")}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", USES)
def test_damaged_files_are_named_and_left(file, damage, finished, tmp_path, monkeypatch, capsys):
    if "format" in damage and Path(file).suffix not in (".pt", ".json") or (
            damage == "zipped pickle" and Path(file).suffix != ".pt") or (
            file.endswith("csv") and damage == "empty"):  # an empty table is one without networks
        pytest.skip("no such damage")
    if file.endswith("log.jsonl") and damage in ("empty", "truncated"):
        pytest.skip("as after a kill")
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    if "checkpoint" in file:
        os.unlink("runs/single-digits/result.json")  # not finished after all
    path = Path(file)
    DAMAGES[damage](path)
    before = path.read_bytes()
    code, _, err = run_here(monkeypatch, capsys, *USES[file])
    assert code == 2 and file in err and err.count("\n") == 1, err
    assert path.read_bytes() == before
    assert not os.path.exists("executed")
    assert any(word in err for word in ("move it away", "delete it", "no table"))
    if "checkpoint" in file:  # the previous good one is offered, and works
        assert err.endswith("goes on without it, from checkpoint-previous.pt\n")
        path.unlink()
        code, out, err = run_here(monkeypatch, capsys, *USES[file])
        assert code == 0 and "epochs 2 to 2" in out, err
        again, whole = (common.read_file(folder / "runs/single-digits/result.json")["ranking"]
                        for folder in (tmp_path, finished))
        assert again == whole


def test_every_flipped_bit_is_found_or_harmless(finished, tmp_path):
    """In checkpoints, sealed JSON, results.csv and stored .npz: never other content."""
    def read(path):
        try:
            if path.suffix == ".pt":
                return repr(common.read_file(path))
            if path.suffix == ".json":
                return common.read_file(path)
            if path.suffix == ".csv":
                return [(row["config"], row["seed"], row["test_accuracy"])
                        for row in common.read_results(path)]
            return {key: value.tolist() for key, value in common._cached(path, None).items()}
        except common.UserError:
            return None
    torch.set_printoptions(profile="full", precision=12)
    rng, found = random.Random(0), 0
    for name in ("runs/single-digits/checkpoint.pt", "runs/single-digits/result.json",
                 "runs/exhaustive-digits/results.csv", "cifar10.npz"):
        content, path = (finished / name).read_bytes(), tmp_path / Path(name).name
        whole = read(finished / name)
        assert whole is not None
        for _ in range(60):
            path.write_bytes(flip(content, rng.randrange(8 * len(content))))
            changed = read(path)
            found += changed is None
            assert changed in (None, whole)
    torch.set_printoptions(profile="default")
    assert found > 200


def test_pickles_of_cifar_are_read_only_after_their_checksum(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_cifar(tmp_path, "cifar10", np.random.default_rng(0))
    for path in tmp_path.glob("cifar-10-batches-py/*"):
        path.write_bytes(pickle.dumps(Evil()))
    outside = tmp_path.parent / "escaped"
    with tarfile.open("cifar-10-python.tar.gz", "w:gz") as archive:  # with ways out of the folder
        for name, link in (("../escaped", None), (str(outside), None), ("link", "..")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = (tarfile.SYMTYPE, link) if link else (
                tarfile.REGTYPE, "")
            archive.addfile(member)
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: (_ for _ in ()).throw(
        OSError("no network")))
    code, _, err = run_here(monkeypatch, capsys, "search_single", "--dataset", "cifar10",
                            "--data-dir", ".", *NATIVE)
    assert code == 2 and "cannot download cifar10" in err and err.count("\n") == 1
    assert not os.path.exists("executed") and not outside.exists() and not os.path.exists("link")


def test_images_that_bomb_block_or_run_programs_are_refused(tmp_path):
    def load():
        return common.load_dataset(arguments("--dataset", str(tmp_path / "a"), "--data-dir",
                                             str(tmp_path / "data")))
    write_folder(tmp_path / "a")
    (tmp_path / "a/train/cat/loop").symlink_to(tmp_path / "a")
    os.mkfifo(tmp_path / "a/train/cat/pipe.png")
    assert len(load()[0]) == 6
    victim = tmp_path / "a/train/dog/1.png"
    for side in (10_000, 20_000):  # 100 and 400 million pixels in some kB
        Image.new("1", (side, side)).save(victim)
        assert victim.stat().st_size < 100_000
        with pytest.raises(common.UserError, match="dog/1.png.*exceeds limit"):
            load()
    victim.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with pytest.raises(common.UserError, match="dog/1.png"):
        load()


def test_caches_that_bomb_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "cifar10.npz"
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 2 ** 10, "SC_PAGE_SIZE": 2 ** 10}.get)
    big = GOOD | {"train_images": np.zeros((400, 32, 32, 3), np.uint8)} | {
        "train_labels": np.arange(400) % 2}
    np.savez_compressed(path, **big)
    assert path.stat().st_size < 10_000
    with pytest.raises(common.UserError, match="compressed and too large"):
        common._cached(path, None)
    with zipfile.ZipFile(path, "w") as archive:  # a header that promises 10^15 bytes
        for name, array in GOOD.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array_header_1_0(member, {
                    "descr": array.dtype.str, "fortran_order": False,
                    "shape": (10 ** 15, *array.shape[1:])})
    with pytest.raises(common.UserError, match="not a usable cache"):
        common._cached(path, None)


# -------------------------------------------------------------------------- hostile input

class Reached(Exception):
    """Everything was read and checked; training would begin."""


TOKENS = st.one_of(
    st.sampled_from(["0", "1", "-1", "2", "3", "1e9", "1e400", "nan", "-inf", "", " ", "8", "64",
                     "4,3,3", "1,1,8", "9,9", "..", "/", "/proc", "digits", "truth.csv",
                     "cifar10", "runs/single-digits", "cpu", "meta", "cuda:7", "\u0663", "--",
                     "x" * 300, "x" * 5000, "9" * 400, "99999999999999999999", "\udcff", "a\nb"]),
    st.integers(-5, 300).map(str), st.floats().map(str),
    st.text(st.characters(exclude_characters="\0"), max_size=12))
FLAGS = st.sampled_from(
    "--dataset --data-dir --image-size --num-train --arch --num-resolutions --downsample --width "
    "--configs --epochs --batch-size --lr --momentum --weight-decay --split --ground-truth "
    "--rank-every --out --seed --device --kernel --amp --threads --num-supernets --temperature "
    "--decay --tolerance --no-balance --overwrite --seeds --from --config".split())
GOOD_FLAGS = st.sampled_from([tuple(line.split()) for line in """--image-size 8|--epochs 3|--seed 7
--batch-size 16|--width 0.5|--num-train 400|--num-resolutions 4|--configs 4,3,3|--lr 0.1 0.01
--momentum 0|--weight-decay 1e-4|--split 0.3|--rank-every 1|--arch resnet18|--downsample stride
--ground-truth truth.csv|--num-supernets 2|--temperature 1 50|--config 5,3,2|--out there|--amp bf16
--seeds 2|--dataset digits""".replace("\n", "|").split("|")])
BAD_FLAGS = st.one_of(st.tuples(FLAGS, TOKENS), st.tuples(FLAGS, TOKENS, TOKENS), st.tuples(TOKENS))
LINES = st.tuples(st.sampled_from(list(STAGES)), st.one_of(
    st.lists(GOOD_FLAGS, max_size=3), st.tuples(GOOD_FLAGS, BAD_FLAGS),
    st.lists(BAD_FLAGS, max_size=4)).map(lambda parts: sum(parts, ())))


def hostile(examples):
    """As many examples, always the same; ten times as many with -m slow."""
    return settings(max_examples=examples * int(os.environ.get("HOSTILE", 1)), deadline=None,
                    database=None, derandomize=True, suppress_health_check=list(HealthCheck))


def tree(folder):
    return {path: path.lstat().st_size for path in folder.rglob("*")}


@pytest.fixture
def cage(finished, tmp_path, monkeypatch, capsys):
    """A function: run a stage up to its training in a folder of its own: (code, stderr)."""
    def reached(*args):
        raise Reached
    shutil.copytree(finished, tmp_path / "cage")
    monkeypatch.chdir(tmp_path / "cage")
    monkeypatch.setattr(common, "Learner", reached)
    for module in STAGES.values():
        monkeypatch.setattr(module, "Learner", reached, raising=False)
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: (_ for _ in ()).throw(
        OSError("no network")))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(common, "save_figure", lambda *args: None)  # slow, and tested elsewhere
    before = tree(tmp_path)

    def run(stage, *argv):
        code, out, err = run_here(monkeypatch, capsys, stage, *argv)
        common.Run.folder = None
        if code == 1 and err.rstrip().endswith("Reached"):
            code, err = 0, ""
        return code, err
    yield run
    assert {path for path in tree(tmp_path).keys() - before.keys()
            if tmp_path / "cage" not in path.parents} == set()


def well(code, err):
    """Success, or exit code 2 with one line."""
    return (code, err) == (0, "") or code == 2 and err.startswith("error: ") and \
        err.count("\n") == 1


def test_hostile_command_lines(cage):
    outcomes = []

    @hostile(400)
    @given(LINES)
    def throw(line):
        stage, argv = line
        argv = [f"./{a}" if flag in ("--out", "--data-dir") else a  # so that it is in the cage
                for flag, a in zip(("", *argv), argv)]
        code, err = cage(stage, "--out", f"out{len(outcomes)}", *argv, "--kernel", "native")
        outcomes.append(code)
        assert well(code, err), (argv, code, err)
    throw()
    print(len(outcomes), "command lines,", outcomes.count(0), "of them good")
    assert len(outcomes) >= 400 and outcomes.count(0) > 30


FILES = [(file, command) for file, command in USES.items()] + [
    ("truth.csv", (*SINGLE, "--ground-truth", "truth.csv")),
    ("runs/single-digits/result.json", ("retrain", "--from", "runs/single-digits", *NATIVE))]


def test_hostile_files(cage):
    originals = {file: Path(file).read_bytes() for file, _ in FILES}

    @hostile(120)
    @given(st.sampled_from(FILES), st.one_of(
        st.binary(max_size=200), st.sampled_from([
            b"[" * 100_000, b"{}", b"null", b"[]", b"1", b'{"settings": []}', b"\xff\xfe",
            b"config,seed,test_accuracy\n", b'config,seed,test_accuracy\n"',
            b"PK\x05\x06" + b"\0" * 18,
            b"config,seed,test_accuracy\n4;3;3,1,nan\n", b'{"epoch": 1}\n'])),
           st.sampled_from(["replace", "insert", "cut", "flip"]), st.floats(0, 0.999))
    def throw(use, junk, way, place):
        file, command = use
        for name, content in originals.items():
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_bytes(content)
        if "checkpoint" in file:
            os.unlink("runs/single-digits/result.json")
        content = originals[file]
        at = int(place * len(content))
        hostile = {"replace": junk, "insert": content[:at] + junk + content[at:],
                   "cut": content[:at], "flip": flip(content, 8 * at + len(junk) % 8)}[way]
        Path(file).write_bytes(hostile)
        code, err = cage(*command)
        assert well(code, err), (file, way, code, err)
        if code == 2:
            assert Path(file).read_bytes() == hostile
    throw()


# ------------------------------------------------------------------- numbers that go wrong

def search(monkeypatch, capsys, stage, *argv):
    """A small search in this process and folder: (code, stderr, result.json)."""
    code, _, err = run_here(monkeypatch, capsys, stage, "--image-size", "8", "--width", "0.25",
                            *NATIVE, "--overwrite", *argv)
    results = list(Path().glob("runs/*/result.json"))
    return code, err, common.read_file(results[0]) if results else None


@pytest.mark.parametrize("stage, argv, supernets", [
    ("search_mixture", ("--num-train", "80", "--num-supernets", "36", "--no-balance"), 36),
    ("search_mixture", ("--num-train", "80", "--num-supernets", "36"), 36),
    ("search_mixture", ("--num-train", "80", "--num-supernets", "1"), 1),
    ("search_mixture", ("--num-train", "80", "--configs", "4,3,3", "4,3,3", "--num-supernets", "1"),
     1),
    ("search_mixture", ("--num-train", "46", "--batch-size", "2", "--num-supernets", "2"), 2),
    ("search_single", ("--num-train", "46", "--batch-size", "2"), 1),
    ("search_single", ("--num-train", "80", "--configs", "5,3,2"), 1),
    ("search_single", ("--num-train", "80", "--lr", "0", "0"), 1)])
def test_extreme_searches_are_sensible(stage, argv, supernets, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_truth(tmp_path / "truth.csv")
    code, err, result = search(monkeypatch, capsys, stage, "--epochs", "1", *argv,
                               "--ground-truth", "truth.csv")
    assert (code, err) == (0, "")
    ranking = result["ranking"]
    assert len(ranking) == (1 if "--configs" in argv else 36)
    assert all(0 <= e["interval"][0] <= e["accuracy"] <= e["interval"][1] <= 1 for e in ranking)
    assert sum(entry["p_best"] for entry in ranking) == pytest.approx(1)
    steps = np.sum([entry["steps"] for entry in ranking], 0)
    half = int(argv[1]) // 2
    assert len(steps) == supernets and steps.sum() == supernets * (half // 2 if "2" in argv[3:4]
                                                                   else math.ceil(half / 32))
    assert ("--no-balance" in argv) == bool((steps == 0).any())  # a supernet without a step
    assert (result["metrics"]["kendall_tau"] is None) == (len(ranking) == 1)
    if "--lr" in argv:  # nothing was learned
        args = common.argparse.Namespace(**result["settings"])
        train, _ = common.load_dataset(args)
        initial = common.make_network(args, train, True, common.stream_seed(0, "weights", 0))
        weights, = torch.load("runs/single-digits/supernets.pt", weights_only=True)
        assert all(torch.equal(value, weights[key]) for key, value in initial.state_dict().items())


@pytest.mark.parametrize("argv, message", [
    (("--epochs", "0"), "must be at least 1"),
    (("--epochs", "9" * 400), "must be at most 1000000"),
    (("--lr", "inf", "0"), "must be at most"),
    (("--temperature", "1", "nan"), "must be at least 0"), (("--num-train", "12"), "cannot split"),
    (("--num-train", "40", "--split", "0.8"), "cannot split"),
    (("--num-supernets", "0"), "must be at least 1"),
    (("--configs", "4,3,3"), "--num-supernets 4: at most 1"),
    (("--dataset", "cifar10", "--data-dir", ".", "--split", "0.9", "--batch-size", "2"),
     "--split 0.9: a class has too few images"),
    (("--dataset", "cifar10", "--data-dir", ".", "--num-train", "4"),
     "--num-train 4: too few for each of 3 classes")])
def test_what_makes_no_sense_is_refused(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    labels = np.array([0] * 30 + [1] * 28 + [2] * 2)  # class 2 is rare
    np.savez("cifar10.npz", train_images=np.zeros((60, 8, 8, 3), np.uint8), train_labels=labels,
             test_images=np.zeros((3, 8, 8, 3), np.uint8), test_labels=np.arange(3))
    code, err, _ = search(monkeypatch, capsys, "search_mixture", *argv)
    assert code == 2 and message in err and err.count("\n") == 1, err


def test_weights_that_are_not_finite_stop_the_run(tmp_path, monkeypatch, capsys):
    count, real = 0, common.Learner.step

    def step(self, *args):
        nonlocal count
        count, numbers = count + 1, real(self, *args)
        if count == 40:  # the last one of epoch 2 of supernet 3: no loss shows it
            next(self.network.parameters()).data[0] = math.inf
        return numbers
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common.Learner, "step", step)
    monkeypatch.setattr(common, "expected_time", lambda *args: 0)
    monkeypatch.setattr(search_mixture, "expected_time", lambda *args: 0)
    code, err, _ = search(monkeypatch, capsys, "search_mixture", "--epochs", "3", "--num-train",
                          "320")
    assert code == 1 and err.count("\n") == 1
    for what in ("a weight is not finite at epoch 2, round 5, configuration ", "supernet 3"):
        assert what in err
    state = torch.load("runs/mixture-digits/checkpoint.pt", weights_only=True)
    assert state["epoch"] == 1


def test_scores_that_are_not_finite_are_named():
    network, numbers = torch.nn.Linear(2, 2), torch.tensor([1.0, 0.5, 0.5])
    steps = [(f"step {i}", numbers.clone()) for i in range(4)]
    assert common.read_steps(steps, network).shape == (4, 3)
    assert common.read_steps([], network).shape == (0, 3)
    steps[2][1][2] = math.nan
    with pytest.raises(common.TrainingError, match="step 2"):
        common.read_steps(steps, network)


# ----------------------------------------------------------------------------- statistics

def test_bootstrap_against_all_samples_there_are():
    """Four images have 256 samples with replacement: exact probabilities."""
    correct = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1], [1, 1, 0, 0]]).bool()
    every = np.array(np.meshgrid(*[range(4)] * 4)).reshape(4, -1).T
    exact = correct.numpy()[:, every].mean(2).T  # (256 samples, 4 configurations)
    found = common.bootstrap(correct, 20_000).numpy()
    for value in np.unique(exact):
        assert np.allclose((found == value).mean(0), (exact == value).mean(0), atol=0.015)
    both = (exact[:, 0] > exact[:, 1]).mean()
    assert (found[:, 0] > found[:, 1]).mean() == pytest.approx(both, abs=0.015)
    assert (found[:, 0] == found[:, 3]).all()


def test_intervals_are_those_of_a_proportion():
    rng = np.random.default_rng(0)
    correct = torch.from_numpy(rng.random((3, 4000)) < np.array([[0.5], [0.8], [0.95]]))
    low, high = common.interval(common.bootstrap(correct))
    p = correct.double().mean(1)
    width = 1.96 * (p * (1 - p) / 4000).sqrt()
    assert torch.allclose(low, p - width, atol=0.002) and torch.allclose(high, p + width,
                                                                         atol=0.002)


def test_probability_of_being_best_is_shared_by_equals(tmp_path):
    run = argparse_run(tmp_path)
    space = common.Space([(1, 2), (2, 1)], (1, 2), {(1, 2): 1, (2, 1): 2}, 1, 1)
    correct = torch.tensor([[1, 0, 1, 0]] * 2).bool()
    common.finish_search(run, space, correct, [0, 1], torch.tensor([[3, 0], [1, 2]]))
    result = common.read_file(tmp_path / "result.json")
    assert [entry["p_best"] for entry in result["ranking"]] == [0.5, 0.5]
    assert [entry["config"] for entry in result["ranking"]] == ["1,2", "2,1"]
    assert [entry["steps"] for entry in result["ranking"]] == [[3, 0], [1, 2]]


def argparse_run(folder):
    run = common.Run.__new__(common.Run)
    run.folder, run.record = folder, {}
    return run


def test_tau_interval_against_numpy():
    rng = np.random.default_rng(1)
    p = np.linspace(0.5, 0.7, 12)
    correct, true = rng.random((12, 500)) < p[:, None], (p + rng.normal(0, 0.05, 12)).tolist()
    taus = []
    for _ in range(1000):
        found = correct[:, rng.integers(0, 500, 500)].mean(1)
        signs = [np.sign(found[i] - found[j]) * np.sign(true[i] - true[j])
                 for i in range(12) for j in range(i)]
        ties = sum(found[i] == found[j] for i in range(12) for j in range(i))
        taus.append(sum(signs) / math.sqrt((66 - ties) * 66))
    low, high = common.tau_interval(torch.from_numpy(correct), true)
    assert low == pytest.approx(np.quantile(taus, 0.025), abs=0.05)
    assert high == pytest.approx(np.quantile(taus, 0.975), abs=0.05)
    constant = torch.ones(12, 50).bool()
    assert common.tau_interval(constant, true) is None


def test_paired_comparison_by_hand():
    found, default = [0.91, 0.93, 0.92], [0.90, 0.90, 0.905]
    gap, (low, high), p = retrain.compare(found, default)
    half = 4.302653 * np.std([0.01, 0.03, 0.015], ddof=1) / math.sqrt(3)  # t of 97.5 %, 2 d.o.f.
    assert gap == pytest.approx(0.055 / 3)
    assert (low, high) == pytest.approx((gap - half, gap + half), abs=1e-6)
    t = gap / (half / 4.302653)
    assert p == pytest.approx(1 - t / math.sqrt(2 + t * t))  # Student's with 2 d.o.f., closed form
    assert retrain.compare([0.9], [0.8])[1:] == (None, None)
    assert retrain.compare([0.9, 0.8], [0.8, 0.7])[1:] == (None, None)  # no spread


# ------------------------------------------------------------------------------------ soak

def soak(folder, seconds, restarts):
    """The embedded search, killed and started again: (start, bytes, open files) a sample."""
    samples = []
    for attempt in range(restarts + 1):
        process = start(ROOT / "search_mixture.py", *SMALL, *NATIVE, "--epochs", "1000000",
                        cwd=folder)
        log = folder / "runs/mixture-digits/log.jsonl"
        wait_for_log(folder, 20 + (log.read_bytes().count(b"\n") if log.exists() else 0))  # warm
        until = time.time() + seconds / (restarts + 1)
        while time.time() < until:
            time.sleep(0.25)
            assert process.poll() is None, process.communicate()
            status = Path(f"/proc/{process.pid}/status").read_text()
            memory = int(status.split("VmRSS:")[1].split()[0]) * 1024
            files = len(os.listdir(f"/proc/{process.pid}/fd"))
            samples.append((attempt, memory, files))
        process.kill()
        process.communicate()
    return samples


def check_soak(folder, samples):
    """Memory within 2 %, no more files, every epoch once in the log."""
    attempts = {attempt for attempt, *_ in samples}
    for attempt in attempts:
        memory, files = zip(*(sample[1:] for sample in samples if sample[0] == attempt))
        half = len(memory) // 2
        growth = np.median(memory[half:]) / np.median(memory[:half]) - 1
        print(f"start {attempt}: {len(memory)} samples, {np.median(memory) / 2 ** 20:.0f} MiB, "
              f"growth {growth:+.4f}, files {min(files)} to {max(files)}")
        assert growth < 0.02 and np.median(files[half:]) <= np.median(files[:half])
    lines = (folder / "runs/mixture-digits/log.jsonl").read_bytes().split(b"\n")
    epochs = [common.unseal(json.loads(line))["epoch"] for line in lines[:-1]]
    assert epochs == list(range(1, len(epochs) + 1)) and len(epochs) > 4 * len(attempts)
    print(len(epochs), "epochs")


def test_soak(tmp_path):
    check_soak(tmp_path, soak(tmp_path, 12, 1))


@pytest.mark.slow
def test_soak_for_half_an_hour(tmp_path):
    check_soak(tmp_path, soak(tmp_path, 1800, 5))


@pytest.mark.slow
def test_many_hostile_inputs():
    done = subprocess.run([sys.executable, "-m", "pytest", "-s", "-q", __file__, "-k",
                           "hostile_files or hostile_command"], cwd=ROOT, capture_output=True,
                          text=True, env=os.environ | {"HOSTILE": "10"})
    print(done.stdout)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_kernels_under_sanitizers(tmp_path):
    """AddressSanitizer and UBSan watch the CPU kernels and the CPU emulation of the CUDA ones."""
    compiler = shutil.which("g++")
    if not compiler:
        pytest.skip("no g++")
    for name in ("g++", "c++"):
        (tmp_path / name).write_text(
            f'#!/bin/sh\nunset LD_PRELOAD\nexec {compiler} "$@" -O1 -g '
            "-fsanitize=address,undefined -fno-sanitize-recover=undefined\n")
        (tmp_path / name).chmod(0o755)
    libraries = [subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True,
                                text=True).stdout.strip() for name in ("libasan.so", "libubsan.so")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_kernels.py",
         "tests/test_block.py", "-k", "float64 or ties or promised or order or threads or fused "
         "or infinity or cancel or stride"], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CXX": str(tmp_path / "g++"),
                          "TORCH_EXTENSIONS_DIR": str(tmp_path), "LD_PRELOAD": " ".join(libraries),
                          "ASAN_OPTIONS": "detect_leaks=0"})
    print(done.stdout[-2000:])
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr
    assert "ERROR: AddressSanitizer" not in done.stderr and "runtime error" not in done.stderr
