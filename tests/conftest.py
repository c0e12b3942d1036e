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


PETS = ("train/cat:3", "train/dog:3", "test/cat:3", "test/dog:3")


def write_images(folder: Path, *counts: str) -> Path:
    """"train/cat:3" stands for three images in this folder. They are 60x40, black beside the centre
    square, whose value is another one in every image: 0, 1, ..."""
    value = 0
    for text in counts:
        name, count = text.split(":")
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(int(count)):
            image = Image.new("RGB", (60, 40))
            image.paste((value,) * 3, (10, 0, 50, 40))
            image.save(folder / name / f"{i}.BMP")
            value += 1
    return folder


def arguments(*argv: str) -> argparse.Namespace:
    """What a search makes of these arguments, with native ops."""
    parser = common.make_parser("test")
    common.add_search_flags(parser, draw="cost")
    return common.parse_arguments(parser, ["--kernel", "native", *argv], search=True)


def make_learner(images: common.Images, *argv: str) -> common.Learner:
    """A supernet a quarter as wide as the default network, unless the arguments say otherwise."""
    args = arguments("--width", "0.25", *argv)
    network = common.make_network(args, images, True, device=images.device)
    return common.Learner(network, args)


def contents(folder: Path) -> dict:
    """What the only run in a folder leaves, but for times and how it was started: two runs that
    should agree bit for bit have equal contents. Weights are digests."""
    differing = ("seconds", "images_per_second", "command", "ranks", "git", "settings")

    def read(text: str) -> dict:
        return json.loads(text, object_hook=lambda entry: {
            key: entry[key] for key in entry if key not in differing})

    files = {}
    for path in (folder / "runs").rglob("*.*"):
        if path.suffix == ".json":
            files[path.name] = read(path.read_text())
        elif path.suffix == ".jsonl":
            files[path.name] = list(map(read, path.read_text().splitlines()))
        elif path.suffix == ".csv":
            files[path.name] = path.read_text()
        elif path.suffix == ".pt" and path.name != "checkpoint.pt":
            content = common.load(path)
            states = content if path.name == "supernets.pt" else [content["network"]]
            weights = [value.numpy().tobytes() for state in states for value in state.values()]
            files[path.name] = hashlib.sha256(b"".join(weights)).hexdigest()
    return files


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
    """A folder where every command has run in one process, undisturbed."""
    folder = tmp_path_factory.mktemp("finished")
    for name, command in COMMANDS.items():
        (folder / name).mkdir()
        code, _, err = run(folder / name, *command)
        assert (code, err) == (0, "")
    return folder
