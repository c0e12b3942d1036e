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


def shell(script: str, *arguments: str, cwd, root=ROOT) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(root / script), *arguments], cwd=cwd,
                          capture_output=True, text=True, timeout=300,
                          env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"})


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
