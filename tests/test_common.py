"""Data, network and evaluation against independent references."""
import gzip
import math
import pickle
import platform
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, arguments
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets
from torchvision.transforms import functional as TF

import common

CONFIGS = common.enumerate_configs(10, 3)


# --------------------------------------------------------------------------- configurations

def test_configurations_are_in_the_papers_order():
    assert len(CONFIGS) == 36 and all(sum(c) == 10 and min(c) >= 1 for c in CONFIGS)
    number = {config: i for i, config in enumerate(CONFIGS, 1)}
    assert number[1, 1, 8] == 1 and number[8, 1, 1] == 36
    assert number[4, 3, 3] == 24 and number[5, 3, 2] == 29 and number[7, 1, 2] == 34
    brute = [(a, b, 10 - a - b) for a in range(1, 9) for b in range(1, 9) if a + b < 10]
    assert CONFIGS == brute
    assert len(common.enumerate_configs(9, 4)) == math.comb(8, 3) == 56
    assert len(common.enumerate_configs(16, 4)) == 455
    assert common.enumerate_configs(3, 1) == [(3,)]
    assert common.downsampling_layers((5, 3, 2)) == {5, 8}


def test_configurations_are_read_and_written():
    assert all(common.parse_config(common.config_name(config)) == config for config in CONFIGS)
    assert common.parse_config("[5, 3, 2]") == (5, 3, 2)
    for text in ("5,3,1", "5,5", "10,0,0", "a,b,c", "", "5,3,2,0", "12,-1,-1"):
        with pytest.raises(common.UserError, match="add to 10"):
            common.parse_config(text, (4, 3, 3))


# ---------------------------------------------------------------------------------- network

def reference_forward(state, images, config, supernet):
    """ResNet-20 written again, from the paper's description, on a plain dict of weights."""
    def norm(x, name):
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, correction=0)
        y = (x - mean) / torch.sqrt(var + 1e-5)
        if not supernet:
            y = y * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]
        return y

    def pooled(x, layer):
        if layer not in (config[0], config[0] + config[1]):
            return x
        n, c, h, w = x.shape
        return x.view(n, c, h // 2, 2, w // 2, 2).amax((3, 5))

    x = norm(F.conv2d(images, state["layers.0.conv.weight"], padding=1), "layers.0.norm").relu()
    for i in range(1, 10):
        name, x = f"layers.{i}", pooled(x, i)
        y = norm(F.conv2d(x, state[f"{name}.conv1.weight"], padding=1), f"{name}.norm1").relu()
        y = norm(F.conv2d(y, state[f"{name}.conv2.weight"], padding=1), f"{name}.norm2")
        if f"{name}.shortcut.0.weight" in state:
            x = norm(F.conv2d(x, state[f"{name}.shortcut.0.weight"]), f"{name}.shortcut.1")
        x = (x + y).relu()
    return x.mean((2, 3)) @ state["classifier.weight"].T + state["classifier.bias"]


@pytest.mark.parametrize("supernet", [True, False])
def test_forward_equals_a_reference_network_for_all_configurations(supernet):
    torch.manual_seed(0)
    network = common.ResNet("resnet20", 10, supernet, 0.5).double()
    for name, p in network.named_parameters():
        if "norm" in name or "shortcut.1" in name:
            torch.nn.init.normal_(p, 1.0, 0.3)
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    state = network.state_dict()
    for config in CONFIGS:
        expected = reference_forward(state, images, config, supernet)
        assert torch.allclose(network(images, config), expected, rtol=0, atol=1e-10)


def test_network_has_the_papers_shape():
    network = common.ResNet("resnet20", 10)
    channels = [layer.conv.weight.shape[0] if i == 0 else layer.conv1.weight.shape[0]
                for i, layer in enumerate(network.layers)]
    assert channels == [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
    supernet = common.ResNet("resnet20", 10, supernet=True)
    assert not any("norm" in key for key in supernet.state_dict())  # neither affine nor running
    images = torch.randn(8, 3, 16, 16)
    assert torch.equal(supernet.train()(images, (4, 3, 3)), supernet.eval()(images, (4, 3, 3)))


def test_multiply_adds_agree_with_torchs_counter():
    network = common.ResNet("resnet20", 10)
    for config in ((1, 1, 8), (4, 3, 3), (8, 1, 1)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.zeros(1, 3, 32, 32), config)
        assert common.count_macs(network, [config], 32)[0] == [counter.get_total_flops() // 2]


# ------------------------------------------------------------------------------- evaluation

def test_tree_evaluation_equals_separate_passes_exactly(small_images, monkeypatch):
    torch.manual_seed(1)
    network = common.ResNet("resnet20", 3, True, 0.5)
    logits, head = [], network.head
    monkeypatch.setattr(network, "head", lambda x: logits.append(head(x)) or logits[-1])
    tree = common.evaluate_configs(network, CONFIGS, small_images.evaluation_batches(150))
    shared, logits = logits, []
    batches = [[b.clone() for b in batch] for batch in small_images.evaluation_batches(150)]
    for config, found in zip(CONFIGS, tree):
        with torch.inference_mode():
            outputs = [network(images, config) for images, _ in batches]
        assert torch.equal(found, torch.cat([out.argmax(1) == labels for out, (_, labels)
                                             in zip(outputs, batches)]))
        assert all(any(torch.equal(out, other) for other in shared) for out in outputs)
    assert len(shared) == 36 * 3 and tree.shape == (36, 400) and len(set(tree.sum(1).tolist())) > 1


def test_tree_evaluation_halves_the_work():
    network, batch = common.ResNet("resnet20", 10, supernet=True), (torch.randn(2, 3, 32, 32),
                                                          torch.zeros(2, dtype=torch.long))
    with FlopCounterMode(display=False) as counter:
        common.evaluate_configs(network, CONFIGS, [batch])
    macs, tree_macs = common.count_macs(network, CONFIGS, 32)
    assert 4 * tree_macs == counter.get_total_flops()
    assert sum(macs) / tree_macs == pytest.approx(2.03, abs=0.01)


def test_evaluation_batches_cover_all_images_once(small_images):
    batches = [labels for _, labels in small_images.evaluation_batches(128)]
    assert [len(labels) for labels in batches] == [100] * 4  # 400 = 3 x 128 + 16, not that
    assert sum((labels == 1).sum() for labels in batches) == (small_images.labels == 1).sum()
    assert all(len(labels.unique()) == 3 for labels in batches)
    again = [labels for _, labels in small_images.evaluation_batches(128)]
    assert all(map(torch.equal, batches, again))


def test_accuracy_does_not_depend_on_the_order_of_the_images(digits):
    train, test = digits
    args = arguments("--width", "0.5", "--image-size", "16")
    train, test = common.load_dataset(args)
    network, config = common.make_network(args, train, True, 0), (4, 3, 3)
    learner = common.Learner(network, args)
    batches = train.passes(64, common.stream(0), common.stream(1))
    for _ in range(4 * math.ceil(len(train) / 64)):
        learner.step(*next(batches), config, 0.1)

    def score(images):
        return common.evaluate_configs(network, [config], images.evaluation_batches(64)
                                       ).double().mean().item()
    by_class = test.subset(test.labels.argsort())
    shuffled = test.subset(torch.randperm(len(test), generator=common.stream(5)))
    naive = common.evaluate_configs(network, [config], (
        by_class.batch(torch.arange(i, min(i + 64, len(test)))) for i in range(0, len(test), 64)))
    assert score(shuffled) > 0.8
    assert abs(score(by_class) - score(shuffled)) < 0.04
    assert naive.double().mean().item() < score(shuffled) - 0.15


# ------------------------------------------------------------------------------------- data

def test_crop_and_flip_equal_torchvisions():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (20, 32, 32, 3), dtype=torch.uint8)
    offsets, flips = torch.randint(0, 9, (20, 2)), torch.rand(20) < 0.5
    found = common.crop_and_flip(images, torch.cat([offsets, flips[:, None]], 1))
    for image, (top, left), flip, got in zip(images, offsets.tolist(), flips, found):
        expected = TF.crop(TF.pad(image.permute(2, 0, 1), 4), top, left, 32, 32)
        expected = TF.hflip(expected) if flip else expected
        assert torch.equal(got.permute(2, 0, 1), expected)


def test_batches_are_normalised_augmented_and_channels_last(small_images):
    images, labels = small_images.batch(torch.arange(400))
    expected = (small_images.images.numpy().transpose(0, 3, 1, 2) - 120.0) / 60.0
    assert np.allclose(images.numpy(), expected, atol=1e-6)
    assert images.is_contiguous(memory_format=torch.channels_last) and labels.dtype == torch.long
    one = torch.zeros(2000, dtype=torch.long)  # one image, many augmentations
    for flip, kinds in ((True, 2 * 5 * 5), (False, 5 * 5)):  # 16x16: pad 2, and mirrored
        source = common.replace(small_images, flip=flip)
        drawn, _ = source.batch(one, source.draw_crops(2000, common.stream(1)))
        assert len({image.numpy().tobytes() for image in drawn}) == kinds


def test_passes_cover_all_images_in_a_new_order_each_time(small_images):
    marked = common.replace(small_images, labels=torch.arange(400))
    batches = marked.passes(128, common.stream(1), common.stream(2))
    found = [next(batches) for _ in range(8)]
    assert [len(labels) for _, labels in found] == [100] * 8  # near-equal, not 128 and a rest
    first, second = (torch.cat([labels for _, labels in found[i:i + 4]]) for i in (0, 4))
    assert torch.equal(first.sort().values, torch.arange(400)) and not torch.equal(first, second)
    assert torch.equal(second.sort().values, torch.arange(400))
    plain, labels = next(marked.passes(128, common.stream(1)))
    assert torch.equal(plain, marked.batch(labels)[0])
    again = marked.passes(128, common.stream(1), common.stream(2))
    assert all(torch.equal(images, next(again)[0]) for images, _ in found)


def test_split_is_disjoint_stratified_and_reproducible(digits):
    train, _ = digits
    halves = common.split_for_search(train, arguments())
    ids = [half.rows for half in halves]
    assert torch.equal(torch.cat(ids).sort().values, torch.arange(len(train)))
    for label in range(10):
        counts = [(half.labels == label).sum().item() for half in halves]
        assert abs(counts[0] - counts[1]) <= 1
    for half in halves:
        assert torch.equal(half.labels, train.labels[half.rows])
    again = common.split_for_search(train, arguments())
    other = common.split_for_search(train, arguments("--seed", "1"))
    assert torch.equal(ids[0], again[0].rows) and not torch.equal(ids[0], other[0].rows)
    quarter = halves[1].subset(torch.arange(0, len(halves[1]), 2))
    picked = torch.tensor([3, 0])
    expected, labels = train.batch(quarter.rows[picked])
    found = quarter.batch(picked)
    assert torch.equal(found[0], expected) and torch.equal(found[1], labels)
    with pytest.raises(common.UserError, match="larger than a part of the split"):
        common.split_for_search(train, arguments("--batch-size", "1000"))


def test_one_setting_does_not_reshuffle_the_others(digits):
    """Split, initial weights, order of the images and crops, each by its own stream of --seed."""
    def seen(*argv, crops=True):
        args = arguments(*argv)
        train, _ = common.load_dataset(args)
        half, _ = common.split_for_search(train, args)
        marked = common.replace(half, labels=torch.arange(len(half)))
        order = torch.cat([labels for _, (_, labels) in zip(
            range(half.num_batches(args.batch_size)), marked.passes(
                args.batch_size, common.stream(args.seed, "order", 0, 0),
                common.stream(args.seed, "crops", 0, 0) if crops else None))])
        network = common.make_network(args, train, True,
                                      common.stream_seed(args.seed, "weights", 0))
        return {"split": half.rows, "weights": network.layers[0].conv.weight, "order": order,
                "crops": half.draw_crops(9, common.stream(args.seed, "crops", 0, 0))}
    base = seen()
    for argv, changed in ((("--batch-size", "50"), ()), (("--image-size", "16"), "crops"),
                          (("--width", "0.5"), "weights"), (("--epochs", "3"), ()),
                          (("--split", "0.4"), ("split", "order")),
                          (("--seed", "1"), ("split", "weights", "order", "crops"))):
        found = seen(*argv)
        for key in base:
            assert torch.equal(found[key], base[key]) != (key in changed), (argv, key)
    assert torch.equal(seen(crops=False)["order"], base["order"])


def test_random_streams_are_independent():
    draws = [tuple(torch.randint(0, 1000, (4,), generator=common.stream(*key)).tolist())
             for key in ((0, "a", 1), (0, "a", 2), (0, "b", 1), (1, "a", 1), (0, "a", 1))]
    assert len(set(draws)) == 4 and draws[0] == draws[4]


def test_digits():
    train, test = common.load_dataset(arguments())
    assert train.images.shape == (1438, 32, 32, 3) and test.images.shape == (359, 32, 32, 3)
    assert train.num_classes == 10 and not train.flip
    pixels = train.images.numpy().astype(np.float64)
    assert np.allclose(train.mean, pixels.mean((0, 1, 2)), atol=1e-4)
    assert np.allclose(train.std, pixels.std((0, 1, 2)), atol=1e-4)
    counts = np.bincount(train.labels) / (np.bincount(train.labels) + np.bincount(test.labels))
    assert np.all(np.abs(counts - 0.8) < 0.01)


def test_image_size_and_num_train(digits):
    full, small = digits[0], common.load_dataset(
        arguments("--image-size", "16", "--num-train", "500"))[0]
    assert small.images.shape == (500, 16, 16, 3)
    means = full.images.double().view(-1, 16, 2, 16, 2, 3).mean((2, 4)).round()  # area filter
    known = {image.numpy().astype(np.uint8).tobytes() for image in means}
    assert all(image.numpy().tobytes() in known for image in small.images)
    share = np.bincount(small.labels) / 500 - np.bincount(full.labels) / len(full)
    assert np.abs(share).max() < 0.003
    with pytest.raises(common.UserError, match="cannot split"):
        common.load_dataset(arguments("--num-train", "100000"))


def write_cifar(folder, name, rng):
    """Tiny files in CIFAR's official format; returns the images and labels they hold."""
    base = folder / ("cifar-10-batches-py" if name == "cifar10" else "cifar-100-python")
    base.mkdir()
    files = ([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"] if name == "cifar10"
             else ["train", "test"])
    key = "labels" if name == "cifar10" else "fine_labels"
    held = {}
    for file in files:
        pixels = rng.integers(0, 256, (8, 3072), dtype=np.uint8)
        labels = [0, 1, 2, 0, 1, 2, 0, 1]
        (base / file).write_bytes(pickle.dumps({"data": pixels, key: labels}, protocol=2))
        part = "test" if "test" in file else "train"
        images = pixels.reshape(8, 3, 32, 32).transpose(0, 2, 3, 1)
        held.setdefault(part, []).append((images, labels))
    meta = {"label_names": list("abc"), "fine_label_names": list("abc")}
    (base / ("batches.meta" if name == "cifar10" else "meta")).write_bytes(pickle.dumps(meta))
    return {part: [np.concatenate(column) for column in zip(*parts)]
            for part, parts in held.items()}


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_from_official_files_then_from_the_cache(name, tmp_path, monkeypatch):
    held = write_cifar(tmp_path, name, np.random.default_rng(0))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *a, **k: True)
    argv = ("--dataset", name, "--data-dir", str(tmp_path))
    for _ in range(2):  # the second time from the cache, the official files gone
        for images, part in zip(common.load_dataset(arguments(*argv)), ("train", "test")):
            assert np.array_equal(images.images, held[part][0])
            assert np.array_equal(images.labels, held[part][1])
            assert images.flip and images.num_classes == 3
        for file in tmp_path.glob("cifar-*/*"):
            file.unlink()
    with np.load(tmp_path / f"{name}.npz") as cache:
        assert cache["train_images"].dtype == np.uint8 and set(cache) == {
            f"{part}_{kind}" for part in ("train", "test") for kind in ("images", "labels")}


def test_fashion_mnist_from_official_files(tmp_path, monkeypatch):
    rng, raw, held = np.random.default_rng(0), tmp_path / "FashionMNIST" / "raw", {}
    raw.mkdir(parents=True)
    for part, prefix in (("train", "train"), ("test", "t10k")):
        pixels, labels = rng.integers(0, 256, (6, 28, 28), dtype=np.uint8), bytes([0, 1, 2] * 2)
        held[part] = pixels
        with gzip.open(raw / f"{prefix}-images-idx3-ubyte.gz", "wb") as file:
            file.write(struct.pack(">4i", 2051, 6, 28, 28) + pixels.tobytes())
        with gzip.open(raw / f"{prefix}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(struct.pack(">2i", 2049, 6) + labels)
    monkeypatch.setattr(datasets.FashionMNIST, "resources",
                        [(name, None) for name, _ in datasets.FashionMNIST.resources])
    train, test = common.load_dataset(
        arguments("--dataset", "fashion-mnist", "--data-dir", str(tmp_path)))
    for images, part in ((train, "train"), (test, "test")):
        padded = np.pad(held[part], ((0, 0), (2, 2), (2, 2)))
        assert all(np.array_equal(images.images[..., channel], padded) for channel in range(3))
    assert not train.flip and (tmp_path / "fashion-mnist.npz").exists()


def write_folder(folder, classes=("cat", "dog"), count=3):
    for part in ("train", "test"):
        for value, name in enumerate(classes):
            (folder / part / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = np.zeros((40, 60, 3), np.uint8)
                pixels[:, 10:50] = 50 * value + i  # the centre square
                Image.fromarray(pixels).save(folder / part / name / f"{i}.png")


def test_image_folder_is_cropped_resized_cached_and_read_again(tmp_path):
    write_folder(tmp_path / "pets")
    args = arguments("--dataset", str(tmp_path / "pets"), "--image-size", "16", "--data-dir",
                     str(tmp_path))
    train, _ = common.load_dataset(args)
    assert train.images.shape == (6, 16, 16, 3) and train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert train.images[:, 0, 0, 0].tolist() == [0, 1, 2, 50, 51, 52]
    assert len(list(tmp_path.glob("pets-*-16.npz"))) == 1
    write_folder(tmp_path / "pets", count=4)  # newer than the cache
    assert len(common.load_dataset(args)[0]) == 8


def test_image_folder_mistakes(tmp_path):
    args = arguments("--dataset", str(tmp_path / "a"), "--data-dir", str(tmp_path))
    write_folder(tmp_path / "a", classes=("only",))
    with pytest.raises(common.UserError, match="two or more classes"):
        common.load_dataset(args)
    write_folder(tmp_path / "a")
    (tmp_path / "a" / "train" / "cat" / "0.png").write_bytes(b"no image")
    with pytest.raises(common.UserError, match="0.png"):
        common.load_dataset(args)
    assert not list(tmp_path.glob("*.npz"))


GOOD = {"train_images": np.zeros((4, 32, 32, 3), np.uint8), "train_labels": np.array([0, 1, 0, 1]),
        "test_images": np.zeros((2, 32, 32, 3), np.uint8), "test_labels": np.array([0, 1])}


@pytest.mark.parametrize("change", [
    {"train_images": np.zeros((4, 32, 32, 3), np.float32)}, {"test_labels": np.array([0, 7])},
    {"train_images": np.zeros((4, 3, 32, 32), np.uint8)}, {"train_labels": np.array([0, 1])},
    {"train_labels": np.array([0, 2, 0, 2])}, {"train_labels": np.array([.5, 1, 0, 1])},
    {"test_images": np.zeros((2, 16, 16, 3), np.uint8)}, {"train_images": np.uint8(3)},
    {"train_labels": np.array([None] * 4)}, {"test_images": None}, "truncated", "empty"])
def test_damaged_caches_are_refused_and_left_alone(change, tmp_path):
    path = tmp_path / "cifar10.npz"
    arrays = GOOD | (change if isinstance(change, dict) else {})
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    if change == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    elif change == "empty":
        path.write_bytes(b"")
    before = path.read_bytes()
    with pytest.raises(common.UserError, match="not a usable cache"):
        common.load_dataset(arguments("--dataset", "cifar10", "--data-dir", str(tmp_path)))
    assert path.read_bytes() == before


def test_impossible_download_says_where_the_files_go(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no route to host")
    for module in ("cifar", "mnist"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.download_and_extract_archive", fail)
    for name, what in (("cifar10", "cifar-10-python.tar.gz"), ("cifar100", "cifar-100-python"),
                       ("fashion-mnist", "ubyte.gz")):
        with pytest.raises(common.UserError, match=f"no route to host.*{what}.*{tmp_path}"):
            common.load_dataset(arguments("--dataset", name, "--data-dir", str(tmp_path)))


# ---------------------------------------------------------------------------------- metrics

def test_rank_metrics_against_brute_force():
    rng = np.random.default_rng(0)
    names = [str(i) for i in range(12)]
    found = dict(zip(names, rng.integers(0, 6, 12) / 6))  # with ties
    found["3"] = 2.0
    truth = dict(zip(names, rng.integers(0, 8, 12) / 8))
    a, b = ([d[n] for n in names] for d in (found, truth))
    pairs = [(i, j) for i in range(12) for j in range(i)]
    signs = [np.sign(a[i] - a[j]) * np.sign(b[i] - b[j]) for i, j in pairs]
    untied = [sum(v[i] != v[j] for i, j in pairs) for v in (a, b)]
    metrics = common.rank_metrics(found, truth)
    assert metrics["kendall_tau"] == pytest.approx(sum(signs) / math.sqrt(untied[0] * untied[1]))
    assert metrics["pick_rank"] == 1 + sum(v > truth["3"] for v in b)
    assert metrics["regret"] == pytest.approx(max(b) - truth["3"])
    assert common.rank_metrics(dict.fromkeys(names, 0.5), truth)["kendall_tau"] is None


def test_freed_memory_is_kept():
    """Page faults of allocating, filling and freeing 40 MB ten times, in a process of its own."""
    code = ("import resource, torch, common\n"
            "def faults():\n"
            "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
            "    for _ in range(10): torch.ones(10 << 20)\n"
            "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
            "first = faults(); common.keep_freed_memory(); faults(); print(first, faults())")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    before, after = map(int, done.stdout.split())
    assert after < 1000 and (before > 50_000 or platform.libc_ver()[0] != "glibc"), done.stdout


def test_gauge_measures_what_was_done(monkeypatch):
    gauge = common.Gauge("cpu")
    assert 1e8 < gauge.rate < 1e14
    monkeypatch.setattr(common.time, "perf_counter", lambda: gauge.began + 2.0)
    gauge.macs = gauge.rate * 3
    assert gauge.seconds == 2 and gauge.utilisation == pytest.approx(1.5)
