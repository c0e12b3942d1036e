"""The networks, their downsampling and search spaces against references written on their own."""
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import ROOT, SMALL, arguments, shell
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import functional as TF

import common

WIDTH = 8  # the networks here are an eighth as wide
SHAPES = {  # channels of the blocks, expansion, channels of the stem
    "resnet20": ([2] * 3 + [4] * 3 + [8] * 3, 1, 2),
    "resnet18": ([8] * 2 + [16] * 2 + [32] * 2 + [64] * 2, 1, 8),
    "resnet50": ([8] * 3 + [16] * 4 + [32] * 6 + [64] * 3, 4, 8),
}


def reference(arch, state, images, config, downsample, supernet, large):
    """The network again, on a dict of weights of which only the order matters."""
    channels, expansion, c_in = SHAPES[arch]
    weights, cuts = iter(state.values()), set(np.cumsum(config)[:-1])
    first = 0 if arch == "resnet50" else 1  # the number of the first block

    def norm(x):
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, correction=0)
        x = (x - mean) / torch.sqrt(var + 1e-5)
        if not supernet:
            gamma, beta, *_ = (next(weights) for _ in range(5))  # two more, and a counter
            x = x * gamma[:, None, None] + beta[:, None, None]
        return x

    def conv(x, stride=1):
        weight = next(weights)
        return norm(F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2))

    x = conv(images, 2 if large else 1).relu()
    x = F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 2) if large else x  # x >= 0
    for number, c in enumerate(channels, first):
        stride = 1
        if number in cuts and downsample == "maxpool":
            n, d, h, w = x.shape
            x = x.view(n, d, h // 2, 2, w // 2, 2).amax((3, 5))
        elif number in cuts:
            stride = 2
        if expansion == 1:
            y = conv(conv(x, stride).relu())
        else:
            y = conv(conv(conv(x).relu(), stride).relu())
        if c_in != c * expansion:
            x = conv(x, stride)
        elif stride == 2:  # an identity: every second pixel
            x = x[:, :, torch.arange(0, x.shape[2], 2)][:, :, :, torch.arange(0, x.shape[3], 2)]
        x, c_in = (x + y).relu(), c * expansion
    return x.mean((2, 3)) @ next(weights).T + next(weights)


CASES = [("resnet20", "stride", (3, 3, 4), 16, True),
         ("resnet20", "stride", (1, 1, 8), 12, False),
         ("resnet18", "stride", (3, 2, 2, 2), 16, False),
         ("resnet18", "maxpool", (1, 1, 1, 6), 16, True),
         ("resnet18", "stride", (2, 4, 3), 64, True),
         ("resnet50", "stride", (3, 4, 6, 3), 64, True),
         ("resnet50", "maxpool", (9, 4, 2, 1), 16, False),
         ("resnet50", "stride", (1, 1, 1, 13), 20, True)]


@pytest.mark.parametrize("arch, downsample, config, size, supernet", CASES)
def test_networks_equal_references_forward_and_backward(arch, downsample, config, size, supernet):
    torch.manual_seed(0)
    network = common.ResNet(arch, 5, supernet, 1 / WIDTH, downsample, size).double()
    for name, p in network.named_parameters():
        if p.dim() == 1 and "classifier" not in name:
            torch.nn.init.normal_(p, 1.0, 0.3)
    images = torch.randn(3, 3, size, size, dtype=torch.float64)
    weight = torch.randn(3, 5, dtype=torch.float64)
    large = size >= 64 and arch != "resnet20"
    (network(images, config) * weight).sum().backward()
    found = [p.grad for p in network.parameters()]
    state = {k: v.detach().clone().requires_grad_(v.is_floating_point())
             for k, v in network.state_dict().items()}
    expected = reference(arch, state, images, config, downsample, supernet, large)
    assert torch.allclose(network(images, config), expected, rtol=0, atol=1e-9)
    grads = torch.autograd.grad((expected * weight).sum(),
                                [state[name] for name, _ in network.named_parameters()])
    for one, two in zip(found, grads):
        assert torch.allclose(one, two, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("arch, size", [("resnet50", 64), ("resnet18", 32)])
def test_default_with_stride_is_torchvisions_network(arch, size):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, arch)(num_classes=7)
    if arch == "resnet18":
        theirs.conv1, theirs.maxpool = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False), \
            torch.nn.Identity()
    for name, tensor in theirs.state_dict().items():
        if "bn" in name or "downsample.1" in name:
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    ours = common.ResNet(arch, 7, image_size=size)
    assert ours.downsample == "stride"
    values = list(theirs.state_dict().values())  # ours stand in the same order
    ours.load_state_dict(dict(zip(ours.state_dict(), values, strict=True)))
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    for mode in (False, True):
        ours.double().train(mode), theirs.double().train(mode)
        assert torch.allclose(ours(images, ours.default_config), theirs(images), atol=1e-10)
    assert ours.default_config == ((3, 4, 6, 3) if arch == "resnet50" else (3, 2, 2, 2))


def space(*argv, size=32):
    images = common.Images(torch.zeros(2, size, size, 3, dtype=torch.uint8), torch.arange(2),
                           torch.zeros(3), torch.ones(3), 2, True)
    return common.search_space(arguments(*argv), images, True)


def test_search_spaces():
    # ResNet-20 and -18 count the stem as a layer; in ResNet-50 it belongs to the first block
    for arch, count, first, default, last in (
            ("resnet20", 36, (1, 1, 8), (4, 3, 3), (8, 1, 1)),
            ("resnet18", 56, (1, 1, 1, 6), (3, 2, 2, 2), (6, 1, 1, 1)),
            ("resnet50", 455, (1, 1, 1, 13), (3, 4, 6, 3), (13, 1, 1, 1))):
        found = space("--arch", arch)
        assert len(found.configs) == count == len(set(found.configs))
        assert found.configs == sorted(found.configs) and found.default == default
        assert (found.configs[0], found.configs[-1]) == (first, last) and default in found.configs
        network = common.ResNet(arch, 2, True)
        assert found.parameters == sum(p.numel() for p in network.parameters())
        for config in (first, default):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                network(torch.zeros(1, 3, 32, 32), config)
            assert found.macs[config] == counter.get_total_flops() // 2
    for paper in ((6, 4, 5, 1), (8, 3, 3, 2), (9, 4, 2, 1)):
        assert paper in found.configs
    assert sum(map(found.macs.get, found.configs)) / found.tree_macs > 4


def test_search_spaces_of_other_sizes():
    assert len(space("--num-resolutions", "4").configs) == math.comb(9, 3)
    assert space("--num-resolutions", "2").default == (5, 5)
    assert space("--num-resolutions", "1").configs == [(10,)]
    some = space("--configs", "5,3,2", "1,1,8")
    assert some.configs == [(5, 3, 2), (1, 1, 8)] and (4, 3, 3) in some.macs
    assert some.tree_macs < sum(map(some.macs.get, some.configs))
    for argv, message in ((("--configs", "5,3,1"), "add to 10"),
                          (("--num-resolutions", "11"), "has 10 layers"),
                          (("--num-resolutions", "7"), "too small for 7 resolutions")):
        with pytest.raises(common.UserError, match=message):
            space(*argv)


def test_defaults_follow_data_set_and_network():
    def of(*argv, search=True):
        return vars(arguments(*argv, search=search))
    assert of("--dataset", "cifar10")["epochs"] == 100
    assert of("--dataset", "cifar10", search=False)["epochs"] == 200
    assert of("--dataset", "cifar10", search=False)["lr"] == 0.1
    assert of()["batch_size"] == 32 and of("--arch", "resnet18")["epochs"] == 8  # digits: minutes
    large = of("--dataset", "cifar100", "--arch", "resnet50")
    assert (large["epochs"], large["weight_decay"], large["lr"]) == (400, 5e-4, [0.1, 0.001])
    assert of("--dataset", "cifar100", "--weight-decay", "0.1")["weight_decay"] == 0.1
    assert of("--dataset", "food101")["image_size"] == 64
    assert of("--dataset", "food101", "--arch", "resnet50")["image_size"] == 224
    assert of("--dataset", "food101", "--image-size", "96")["image_size"] == 96


# ------------------------------------------------------------------------------- large images

def write_food(folder, rng, count=3):
    for part in ("train", "test"):
        listed = {}
        for value, name in enumerate(("pie", "soup")):
            (folder / "food-101/images" / name).mkdir(parents=True, exist_ok=True)
            listed[name] = [f"{name}/{part}{i}" for i in range(count)]
            for i, path in enumerate(listed[name]):
                pixels = np.full((70 + 10 * i, 100, 3), 200 * value + 10 * i, np.uint8)
                Image.fromarray(pixels).save(folder / f"food-101/images/{path}.jpg", quality=95)
        (folder / "food-101/meta").mkdir(exist_ok=True)
        (folder / f"food-101/meta/{part}.json").write_text(json.dumps(listed))
    for name in ("classes", "labels"):
        (folder / f"food-101/meta/{name}.txt").write_text("pie\nsoup\n")


def test_food101_from_official_files_then_from_the_cache(tmp_path):
    write_food(tmp_path, np.random.default_rng(0))
    argv = ("--dataset", "food101", "--data-dir", str(tmp_path), "--image-size", "32")
    for _ in range(2):
        train, test = common.load_dataset(arguments(*argv))
        assert train.images.shape == (6, 32, 32, 3) and len(test) == 6 and train.crop == "resized"
        assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
        means = train.images.double().mean((1, 2, 3))
        assert torch.allclose(means, torch.tensor([0., 10, 20, 200, 210, 220]).double(), atol=3)
        for file in tmp_path.glob("food-101/images/*/*"):
            file.unlink()
    assert (tmp_path / "food101-32.npz").exists()
    for name in ("food101-32.npz", "food-101/meta/train.json"):
        (tmp_path / name).unlink()
    write_food(tmp_path, np.random.default_rng(0))
    (tmp_path / "food-101/images/pie/train1.jpg").write_bytes(b"no image")
    with pytest.raises(common.UserError, match="cannot read image 1.*pie/train1.jpg"):
        common.load_dataset(arguments(*argv))
    assert not list(tmp_path.glob("*.npz"))


def test_resized_crops_equal_torchvisions():
    torch.manual_seed(0)
    smooth = TF.resize(torch.randint(0, 256, (6, 3, 5, 5)).float(), [40, 40]).byte()
    boxes = [(4, 8, 24, 16), (0, 0, 40, 40), (10, 20, 20, 20), (5, 5, 8, 11), (20, 0, 20, 30)]
    boxes = torch.tensor([*boxes, (1, 2, 39, 38)])
    flips = torch.tensor([0, 1, 0, 1, 1, 0])
    found = common.resized_crop_and_flip(smooth.permute(0, 2, 3, 1), torch.cat(
        [boxes / 40, flips[:, None]], 1))
    for image, (top, left, height, width), flip, got in zip(smooth, boxes.tolist(), flips, found):
        expected = TF.resized_crop(image.float(), top, left, height, width, [40, 40],
                                   antialias=False)
        expected = TF.hflip(expected) if flip else expected
        error = (got.permute(2, 0, 1) - expected).abs()[:, 4:-4, 4:-4]  # outside: other neighbours
        assert error.max() < 1e-3


def test_resized_crops_have_torchvisions_ranges(small_images):
    images = common.replace(small_images, crop="resized")
    crops = images.draw_crops(5000, common.stream(0))
    top, left, height, width, flip = crops.unbind(1)
    assert (crops >= 0).all() and max((top + height).max(), (left + width).max()) < 1.00001
    area, inside = height * width, (height < 1) & (width < 1)
    assert 0.079 < area.min() < 0.1 and area.max() > 0.95 and abs(flip.mean() - 0.5) < 0.05
    ratio = (width / height)[inside]
    assert 0.749 < ratio.min() < 0.77 and 1.3 < ratio.max() < 1.334
    batch, _ = images.batch(torch.arange(400), crops[:400])
    assert batch.shape == (400, 3, 16, 16) and batch.isfinite().all()
    assert next(images.passes(64, common.stream(1), common.stream(2)))[0].shape[1:] == (3, 16, 16)


def test_a_cache_larger_than_memory_allows_is_mapped(tmp_path):
    """300 MB of images in a process that may take 100 MB more: reading them all is impossible."""
    code = """
import os, resource, sys
import numpy as np, torch, common
torch.set_num_threads(1)
pixels = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
def source(part):
    count = 2000 if part == "train" else 4
    return count, ((pixels + np.uint8(i % 256), i % 4) for i in range(count))
args = common.Parser("", True).parse_args(["--dataset", "food101", "--data-dir", sys.argv[1],
                                           "--image-size", "224", "--batch-size", "8"])
from sklearn.model_selection import train_test_split
used = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (used * 1024 + 100 * 2 ** 20, -1))
common._torchvision = lambda name, folder, size, part: source(part)
if sys.argv[2] == "mapped":
    os.sysconf = {"SC_PHYS_PAGES": 2 ** 16, "SC_PAGE_SIZE": 2 ** 12}.get
train, test = common.load_dataset(args)
assert isinstance(train.images, torch.Tensor) and len(train) == 2000
train, validation = common.split_for_search(train, args)
images, labels = next(validation.passes(8, common.stream(0)))
assert ((images[0] - images[0].mean()).abs().max() > 0.5).item()
row = validation.rows[3]
assert np.array_equal(train.images[row].numpy(), pixels + np.uint8(row % 256))
next(train.passes(8, common.stream(0), common.stream(1)))
"""
    for way, works in (("mapped", True), ("read", False)):
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path), way], cwd=ROOT,
                              capture_output=True, text=True)
        assert (done.returncode == 0) == works, done.stderr
    assert "allocate" in done.stderr or "MemoryError" in done.stderr


# ----------------------------------------------------------------------------------- searching

def test_search_and_retraining_of_resnet18(tmp_path):
    argv = ("--arch", "resnet18", "--width", "0.125", "--image-size", "8", "--num-train", "160",
            "--batch-size", "20", "--epochs", "2")
    done = shell("search_mixture.py", *argv, "--num-supernets", "2", cwd=tmp_path)
    assert done.returncode == 0 and "56 configurations" in done.stdout, done.stderr
    result = json.loads((tmp_path / "runs/mixture-digits/result.json").read_text())
    assert len(result["ranking"]) == 56 and result["default"] == "3,2,2,2"
    settings = json.loads((tmp_path / "runs/mixture-digits/config.json").read_text())["settings"]
    assert settings["weight_decay"] == 5e-4 and settings["temperature"] == [1, 150]
    done = shell("retrain.py", "--from", "runs/mixture-digits", "--epochs", "1", "--seeds", "1",
                 cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "runs/retrain-digits/result.json").read_text())
    assert result["default"] == "3,2,2,2" and len(result["configs"]) in (1, 2)


def test_the_readmes_network_of_your_own_is_searched(tmp_path):
    readme = (ROOT / "README.md").read_text()
    code, = re.findall(r"```python\n(# my_search.py.*?)```", readme, re.DOTALL)
    assert code.count("\n") <= 30
    Path(tmp_path / "my_search.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "my_search.py", "--arch", "vgg", *SMALL, "--epochs", "1"], cwd=tmp_path,
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert len(json.loads((tmp_path / "runs/mixture-digits/result.json").read_text())["ranking"]) \
        == math.comb(7, 2)
