"""Data, random streams, defaults and metrics against independent references."""
import itertools
import json
import math
import pickle
import platform
import struct
import subprocess
import sys
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import PETS, ROOT, arguments, write_images
from PIL import Image
from torchvision import datasets
from torchvision.transforms import functional as TF

import common


def test_pad_crops_equal_torchvisions():
    images = torch.randint(256, (20, 32, 32, 3), dtype=torch.uint8, generator=common.generator(0))
    drawn = common.draw_pad_crops(20, 32, True, common.generator(1))
    crops = common.pad_crop(images, drawn).permute(0, 3, 1, 2)
    for image, (top, left, flip), crop in zip(images, drawn.tolist(), crops):
        expected = TF.crop(TF.pad(image.permute(2, 0, 1), 4), top, left, 32, 32)
        assert torch.equal(crop, TF.hflip(expected) if flip else expected)


def test_resized_crops_are_torchvisions():
    drawn = common.draw_resized_crops(5000, 40, True, common.generator(0))
    top, left, height, width, flips = drawn.unbind(1)
    assert drawn.min() >= 0
    assert max((top + height).max(), (left + width).max()) < 1.00001
    ratio = (width / height)[(height < 1) & (width < 1)]
    extremes = [(height * width).min(), (height * width).max(), ratio.min(), ratio.max()]
    assert np.allclose(extremes, [0.08, 1, 3 / 4, 4 / 3], atol=0.03)
    assert flips.mean() == pytest.approx(0.5, abs=0.05)

    noise = torch.randint(256, (50, 3, 5, 5), generator=common.generator(0))
    smooth = TF.resize(noise.float(), [40, 40]).byte()
    boxes = (40 * drawn[:50, :4]).floor()
    drawn = torch.cat([boxes / 40, flips[:50, None]], 1)
    crops = common.resized_crop(smooth.permute(0, 2, 3, 1), drawn).permute(0, 3, 1, 2)
    for image, box, flip, crop in zip(smooth, boxes.int().tolist(), flips, crops):
        expected = TF.resized_crop(image.float(), *box, [40, 40], antialias=False)
        error = (crop - (TF.hflip(expected) if flip else expected)).abs()
        assert error[:, 4:-4, 4:-4].max() < 1e-3  # outside: other neighbours


def test_batches_are_normalised_augmented_and_channels_last(small_images):
    images, labels = small_images.batch(torch.arange(400))
    expected = (small_images.images.numpy().transpose(0, 3, 1, 2) - 120.0) / 60.0
    assert np.allclose(images, expected, atol=1e-6)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(labels, small_images.labels)
    one_image = small_images.subset(torch.zeros(2000, dtype=torch.int64))
    for flip, crop, variants in ((True, "pad", 2 * 5 * 5), (False, "pad", 5 * 5),  # 16x16: pad 2
                                 (True, "resized", 2000)):
        source = common.replace(one_image, flip=flip, crop=crop)
        images, _ = next(source.passes(2000, common.generator(1), common.generator(2)))
        assert len({image.numpy().tobytes() for image in images}) == variants


def test_passes_and_evaluation_cover_all_images_once(small_images):
    marked = common.replace(small_images, labels=torch.arange(400))
    passes = marked.passes(128, common.generator(1), common.generator(2))
    batches = [labels for _, labels in itertools.islice(passes, 8)]
    assert [len(labels) for labels in batches] == [100] * 8  # near-equal, not 128 and a rest
    first, second = torch.cat(batches).split(400)
    assert not torch.equal(first, second)
    plain, labels = next(marked.passes(128, common.generator(1)))
    assert torch.equal(labels, first[:100])  # whether there are crops or not
    assert torch.equal(plain, marked.batch(labels)[0])
    third, fourth = ([labels for _, labels in marked.evaluation_batches(128)] for _ in range(2))
    assert all(map(torch.equal, third, fourth))
    assert [len(small_images.labels[labels].unique()) for labels in third] == [3] * 4
    for order in (first, second, torch.cat(third)):
        assert order.sort().values.tolist() == list(range(400))
    assert marked.subset(range(9)).num_batches(2) == 4  # none of a single image


def test_split_is_disjoint_and_stratified(digits):
    train, _ = digits
    first, second = common.split_for_search(train, arguments())
    rows = torch.cat([first.rows, second.rows])
    assert torch.equal(rows.sort().values, torch.arange(len(train)))
    counts = [train.labels[half.rows].bincount() for half in (first, second)]
    assert (counts[0] - counts[1]).abs().max() <= 1
    subset = second.subset([5, 0, 7])
    for ours, theirs in zip(subset.batch(torch.tensor([2, 0])), train.batch(second.rows[[7, 5]])):
        assert torch.equal(ours, theirs)


def drawn_with(*argv):
    """What a search with these arguments draws from its streams of --seed."""
    args = arguments(*argv)
    train, _ = common.load_dataset(args)
    half, _ = common.split_for_search(train, args)
    order, crops = (common.generator(args.seed, name, 0, 0) for name in ("order", "crops"))
    numbered = common.replace(half, labels=torch.arange(len(train)))
    passes = numbered.passes(args.batch_size, order, crops)
    batches = itertools.islice(passes, half.num_batches(args.batch_size))
    images, labels = map(torch.cat, zip(*batches))
    network = common.make_network(args, train, True, common.derive_seed(args.seed, "weights", 0))
    return {"split": half.rows, "order": labels, "crops": images,
            "weights": network.layers[0].conv.weight}


def test_one_setting_does_not_reshuffle_the_others():
    before = drawn_with()
    for argv, changed in ((["--batch-size", "50", "--epochs", "3"], []),
                          (["--image-size", "16"], ["crops"]), (["--width", "0.5"], ["weights"]),
                          (["--split", "0.4"], ["split", "order", "crops"]),
                          (["--seed", "1"], [*before])):
        after = drawn_with(*argv)
        assert [key for key in before if not torch.equal(before[key], after[key])] == changed


def test_random_streams_are_independent():
    keys = [(0, "a", 1), (0, "a", 2), (0, "b", 1), (1, "a", 1), (0, "a", 1)]
    draws = [torch.randint(1000, (4,), generator=common.generator(*key)).tolist() for key in keys]
    assert len(set(map(tuple, draws))) == 4
    assert draws[0] == draws[4]


def test_digits_are_resampled_and_cut(digits):
    train, test = digits
    assert (len(train), len(test), len(train.classes), train.flip) == (1438, 359, 10, False)
    pixels = train.images.double()
    assert torch.allclose(train.mean.double(), pixels.mean((0, 1, 2)), atol=1e-4)
    assert torch.allclose(train.std.double(), pixels.std((0, 1, 2)), atol=1e-4)
    small, _ = common.load_dataset(arguments("--image-size", "16", "--num-train", "500"))
    assert small.images.shape == (500, 16, 16, 3)
    means = pixels.view(-1, 16, 2, 16, 2, 3).mean((2, 4)).round().byte()
    originals = {image.numpy().tobytes() for image in means}
    assert all(image.numpy().tobytes() in originals for image in small.images)
    whole = torch.cat([train.labels, test.labels]).bincount() / 1797
    for images in (train, small):
        assert (images.labels.bincount() / len(images) - whole).abs().max() < 0.003


def write_cifar(name, folder, part, images, labels):
    """In the official format, as are those below: pickles of rows, channel after channel."""
    kind = getattr(datasets, name.upper())
    (folder / kind.base_folder).mkdir(exist_ok=True)
    files = kind.train_list if part == "train" else kind.test_list
    rows = images.transpose(0, 3, 1, 2).reshape(10, 3072)
    for (file, _), chosen in zip(files, np.array_split(range(10), len(files))):
        batch = {"data": rows[chosen], "labels": labels[chosen], "fine_labels": labels[chosen]}
        (folder / kind.base_folder / file).write_bytes(pickle.dumps(batch))
    classes = pickle.dumps({kind.meta["key"]: ["a", "b", "c"]})
    (folder / kind.base_folder / kind.meta["filename"]).write_bytes(classes)


def write_fashion_mnist(name, folder, part, images, labels):
    grey = images[:, 2:30, 2:30, 0].tobytes()
    images[:] = np.pad(images[:, 2:30, 2:30, :1], ((0, 0), (2, 2), (2, 2), (0, 0)))
    raw = folder / "FashionMNIST/raw"
    raw.mkdir(parents=True, exist_ok=True)
    prefix = "t10k" if part == "test" else part
    (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, 10, 28, 28) + grey)
    (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, 10)
                                                      + bytes(labels.tolist()))


def write_food101(name, folder, part, images, labels):
    images[:] = images[:, :1, :1]  # JPEG keeps a single colour
    paths = {"0": [], "1": [], "2": []}
    for i, (image, label) in enumerate(zip(images, labels)):
        path = folder / f"food-101/images/{label}/{part}{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.tile(image, (2, 3, 1))).save(path, quality=95)
        paths[str(label)].append(f"{label}/{part}{i}")
    meta = folder / "food-101/meta"
    meta.mkdir(exist_ok=True)
    (meta / f"{part}.json").write_text(json.dumps(paths))


@pytest.mark.parametrize("name, write", [
    ("cifar10", write_cifar), ("cifar100", write_cifar), ("fashion-mnist", write_fashion_mnist),
    ("food101", write_food101)])
def test_data_sets_from_official_files(name, write, tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.utils.check_md5", lambda *args: True)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 10, 32, 32, 3), dtype=np.uint8)
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2, 2])
    for part, images in zip(("train", "test"), pixels):
        write(name, tmp_path, part, images, labels)
    argv = ("--dataset", name, "--data-dir", str(tmp_path), "--image-size", "32")
    for tolerance in (4 if name == "food101" else 0, 0):  # JPEG
        for images, expected in zip(common.load_dataset(arguments(*argv)), pixels.astype(int)):
            assert np.abs(images.images.numpy() - expected).max() <= tolerance
            assert np.array_equal(images.labels, labels)
            assert images.flip == (name != "fashion-mnist")
            assert images.crop == ("resized" if name == "food101" else "pad")
        pixels[:] = 255 - pixels  # others, in a file that comes first
        np.savez(tmp_path / f"{name}.npz", train_images=pixels[0], train_labels=labels,
                 test_images=pixels[1], test_labels=labels)


def test_what_cannot_be_downloaded_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive",
                        Mock(side_effect=OSError("no route to host")))
    for reason in ("no route to host", "import of torchvision halted"):
        with pytest.raises(common.UserError, match=f"{reason}.*files into {tmp_path}"):
            common.load_dataset(arguments("--dataset", "cifar10", "--data-dir", str(tmp_path)))
        monkeypatch.setitem(sys.modules, "torchvision", None)  # not installed
    common.load_dataset(arguments("--dataset", str(write_images(tmp_path / "pets", *PETS))))


@pytest.mark.parametrize("argv, expected", [
    ("--dataset digits --arch resnet18", {"epochs": 8, "batch_size": 32}),  # minutes
    ("--dataset cifar10", {"epochs": 100, "lr": [0.1, 0.001], "image_size": None}),
    ("--dataset cifar100 --arch resnet50", {"epochs": 400, "weight_decay": 5e-4}),
    ("--dataset food101 --weight-decay 0.1", {"weight_decay": 0.1, "image_size": 64})])
def test_defaults_follow_data_set_and_network(argv, expected):
    assert vars(arguments(*argv.split())).items() >= expected.items()
    alone = common.protocol("food101", "resnet50", search=False)
    assert alone.items() >= {"epochs": 200, "lr": 0.1, "image_size": 224}.items()


def test_rank_metrics_against_brute_force():
    estimates, truths = np.random.default_rng(0).integers(0, 6, (2, 12)) / 8  # with ties
    estimates[3] = 2.0
    signs, true_signs = (np.sign(values - values[:, None]) for values in (estimates, truths))
    tau = (signs * true_signs).sum() / math.sqrt((signs ** 2).sum() * (true_signs ** 2).sum())
    ranks = [signs.sum(0), true_signs.sum(0)]  # but for a factor and a constant
    names = [str(i) for i in range(12)]
    truth = dict(zip(names, truths))
    metrics = common.rank_metrics(dict(zip(names, estimates)), truth)
    assert metrics["kendall_tau"] == pytest.approx(tau)
    assert metrics["spearman_rho"] == pytest.approx(np.corrcoef(ranks)[0, 1])
    assert metrics["pick_rank"] == 1 + (truths > truths[3]).sum()
    assert metrics["regret"] == pytest.approx(truths.max() - truths[3])
    assert common.rank_metrics(dict.fromkeys(names, 0.5), truth)["kendall_tau"] is None


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is a setting of glibc")
def test_freed_memory_is_kept():
    """Page faults of allocating, filling and freeing 40 MB again, in a process of its own."""
    code = ("import resource, torch, common\n"
            "common.keep_freed_memory()\n"
            "for _ in range(20):\n"
            "    torch.ones(10 << 20)\n"
            "    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    faults = list(map(int, done.stdout.split()))
    assert faults[-1] - faults[9] < 1000  # else 10,000 each of ten times
