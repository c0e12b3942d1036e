import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

# threads that spin while they wait make a busy machine several times slower; torch reads it once
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402

# the smallest search that still does everything: seconds
SMALL = ["--image-size", "8", "--width", "0.25", "--num-train", "320", "--batch-size", "32"]


def shell(script: str, *arguments: str, cwd, root=ROOT) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(root / script), *arguments], cwd=cwd,
                          capture_output=True, text=True, timeout=300,
                          env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"})


def arguments(*argv: str, search: bool = True) -> argparse.Namespace:
    """What a stage makes of these arguments, with native ops."""
    args = common.make_parser("test", search).parse_args(["--kernel", "native", *argv])
    return common.fill_defaults(args, search)


def make_learner(images: common.Images, *argv: str, supernet: bool = True) -> common.Learner:
    """A quarter of the default network, untrained, unless the arguments say otherwise."""
    args = arguments("--width", "0.25", *argv)
    network = common.make_network(args, images, supernet, seed=0, device=images.device)
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
    monkeypatch.setattr(common, "kernels", None)


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
