import argparse
import contextlib
import hashlib
import importlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

# threads that spin while they wait make a busy machine several times slower; torch reads it once
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# runs repeat bit for bit on a CPU only; GPU=0 python -m pytest tests/test_kernels.py
# tests/test_block.py tests the kernels on GPU 0, without TF32, against float64
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("GPU", "")
os.environ["NVIDIA_TF32_OVERRIDE"] = "0"

import torch  # noqa: E402
from PIL import Image  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402

# the smallest search that still does everything: seconds
SMALL = ["--image-size", "8", "--width", "0.25", "--num-train", "320", "--batch-size", "32"]
NATIVE = ("--kernel", "native", "--threads", "1")
CONFIGS = ("1,1,8", "4,3,3", "5,3,2", "8,1,1")
FEW = (*SMALL, *NATIVE, "--configs", *CONFIGS)
TRUTH = ("--ground-truth", "../exhaustive/runs/exhaustive-digits/results.csv")
COMMANDS = {  # each in a folder of its name, in this order: they read what others wrote
    "exhaustive": ("train_exhaustive", *FEW, "--seeds", "2", "--epochs", "2"),
    "single": ("search_single", *FEW, *TRUTH, "--epochs", "4", "--rank-every", "2"),
    # batches of 16: ten rounds an epoch, so that scores are exchanged within it, too
    "mixture": ("search_mixture", *FEW, *TRUTH, "--epochs", "4", "--rank-every", "2",
                "--batch-size", "16", "--draw", "cost"),
    "no-balance": ("search_mixture", *FEW, "--epochs", "2", "--no-balance", "--draw", "uniform",
                   "--temperature", "1e4", "1e4", "--batch-size", "16"),
    "retrain": ("retrain", "--from", "../mixture/runs/mixture-digits",
                "../single/runs/single-digits", "--top", "2", *NATIVE, "--seeds", "2",
                "--epochs", "2", "--batch-size", "32")}


def shell(script: str, *arguments: str, cwd, root=ROOT) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(root / script), *arguments], cwd=cwd,
                          capture_output=True, text=True, timeout=300,
                          env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"})


def run(folder: Path, stage: str, *argv: str) -> tuple[int, str, str]:
    """Run a stage in a folder: (exit code, stdout, stderr)."""
    out = io.StringIO()
    err = io.StringIO()
    code = 0
    before = os.getcwd()
    os.chdir(folder)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            common.run_script(lambda: importlib.import_module(stage).main([*argv]))
        except SystemExit as end:
            code = end.code
        finally:
            os.chdir(before)
    if isinstance(code, str):  # what Python makes of sys.exit("a message")
        return 1, out.getvalue(), f"{err.getvalue()}{code}\n"
    return code, out.getvalue(), err.getvalue()


def check_error(outcome: tuple[int, str, str], code: int, *messages: str) -> None:
    """Assert that a run ended with this code and one line of error that says all of these. Before
    argparse's line stands one of usage."""
    lines = outcome[2].splitlines()
    if outcome[2].startswith("usage: "):
        lines = lines[1:]
    assert outcome[0] == code and len(lines) == 1 and "error: " in lines[0], outcome
    for message in messages:
        assert message in lines[0]


def command_of(name: str, finished: Path) -> list[str]:
    """The command for another folder."""
    return [part.replace("..", str(finished)) for part in COMMANDS[name]]


def heed_ctrl_c() -> None:
    """In a new process: one that is started in the background would ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def write_folder(folder: Path, classes=("cat", "dog"), parts=("train", "test"), count=3) -> Path:
    """Images of 60x40, of value 50 * class + i in the centre square, black beside it."""
    for part in parts:
        for label, name in enumerate(classes):
            (folder / part / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = np.zeros((40, 60, 3), np.uint8)
                pixels[:, 10:50] = 50 * label + i
                Image.fromarray(pixels).save(folder / part / name / f"{i}.bmp")
    return folder


def arguments(*argv: str, search: bool = True) -> argparse.Namespace:
    """What a stage makes of these arguments, with native ops."""
    parser = common.make_parser("test")
    if search:
        common.add_search_flags(parser, draw="cost")
    else:
        common.add_training_flags(parser, seeds=1)
    return common.parse_arguments(parser, ["--kernel", "native", *argv], search)


def make_learner(images: common.Images, *argv: str) -> common.Learner:
    """A supernet a quarter as wide as the default network, unless the arguments say otherwise."""
    args = arguments("--width", "0.25", *argv)
    network = common.make_network(args, images, True, device=images.device)
    return common.Learner(network, args)


def weights_digest(state: dict[str, torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in state.values())).hexdigest()


def without_times(lines: Iterable[dict]) -> list[dict]:
    """The entries of epochs, but for how long they took."""
    return [{key: value for key, value in line.items()
             if key not in ("seconds", "images_per_second")} for line in lines]


def contents(folder: Path) -> dict:
    """What the only run in a folder leaves, but for times and how it was started: two runs that
    should agree bit for bit have equal contents."""
    run, = (folder / "runs").iterdir()
    result = common.load(run / "result.json")
    for key in ("command", "ranks", "git", "settings"):
        del result[key]
    left = {"result.json": result}
    if (run / "supernets.pt").exists():  # a search
        left["supernets.pt"] = list(map(weights_digest, common.load(run / "supernets.pt")))
        lines = (run / "log.jsonl").read_text().splitlines()
        left["log.jsonl"] = without_times(map(json.loads, lines))
        return left
    left["results.csv"] = (run / "results.csv").read_text()
    for path in (run / "networks").iterdir():
        content = common.load(path)
        content["history"] = without_times(content["history"])
        if path.suffix == ".pt":
            content = weights_digest(content["network"])
        left[path.name] = content
    return left


@pytest.fixture(autouse=True)
def native_kernel(monkeypatch):
    """Every test begins with native ops, whatever another one has chosen."""
    monkeypatch.setattr(common, "fused_kernels", None)


@pytest.fixture(scope="session")
def digits():
    """(train, test) of the embedded digits."""
    return common.load_dataset(arguments())


@pytest.fixture
def small_images():
    """400 random images of three classes, sorted by class."""
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (400, 16, 16, 3), dtype=np.uint8))
    return common.Images(images, torch.arange(400) * 3 // 400, torch.arange(400),
                         torch.full((3,), 120.0), torch.full((3,), 60.0), classes=list("abc"),
                         flip=True, crop="pad", device="cpu")


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A folder where every command has run in one process, undisturbed; what it printed is in the
    file `printed` beside its runs."""
    folder = tmp_path_factory.mktemp("finished")
    for name, command in COMMANDS.items():
        (folder / name).mkdir()
        code, out, err = run(folder / name, *command)
        assert (code, err) == (0, "")
        (folder / name / "printed").write_text(out)
    return folder
