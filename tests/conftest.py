import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402

# the smallest search that still does everything: seconds
SMALL = ["--image-size", "8", "--width", "0.25", "--num-train", "320", "--batch-size", "32"]


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long; only with -m slow")


def pytest_collection_modifyitems(config, items):
    if not config.option.markexpr:
        items[:] = [item for item in items if "slow" not in item.keywords]


def shell(script: str, *arguments: str, cwd, root=ROOT) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(root / script), *arguments], cwd=cwd,
                          capture_output=True, text=True, timeout=300,
                          env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"})


def contents(folder):
    """What the only run in a folder leaves, but for times and how it was started."""
    run, = (folder / "runs").iterdir()
    kept = {path.name: path.read_bytes() for path in run.glob("results.csv")}
    if (run / "supernets.pt").exists():
        kept["correct"] = common.read_file(run / "correct.pt")["correct"].tolist()
        kept["weights"] = [{name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
                            for name, tensor in state.items()}
                           for state in torch.load(run / "supernets.pt")]
    kept["result.json"] = common.read_file(run / "result.json")
    for key in ("command", "ranks", "settings"):
        del kept["result.json"][key]
    log = [common.unseal(json.loads(line)) for line in open(run / "log.jsonl")]
    for line in log:
        for key in ("seconds", "images_per_second", "utilisation"):
            del line[key]
    return kept, sorted(log, key=lambda line: (line.get("config"), line.get("seed"),
                                               line["epoch"]))


def arguments(*argv: str, search: bool = True):
    return common.Parser("test", search=search).parse_args(["--kernel", "native", *argv])


@pytest.fixture(autouse=True)
def native_kernel(monkeypatch):
    """Every test begins with native ops, whatever another one has chosen."""
    monkeypatch.setattr(common, "fused", None)


@pytest.fixture(scope="session")
def digits():
    return common.load_dataset(arguments())


@pytest.fixture
def small_images():
    """400 random images of three classes, sorted by class."""
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (400, 16, 16, 3), dtype=np.uint8))
    return common.Images(images, torch.arange(400) * 3 // 400, torch.full((3,), 120.0),
                         torch.full((3,), 60.0), 3, True)
