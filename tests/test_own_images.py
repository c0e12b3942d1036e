"""Folders and files of one's own: what is read, refused, left out, split and cached."""
import io
import os
import shutil
from unittest.mock import Mock

import numpy as np
import pytest
from conftest import PETS, arguments, write_images
from PIL import Image

import common

RED, GREEN = (200, 40, 10), (10, 200, 40)


def load(dataset, data_dir, *argv):
    """(train, test) at 16x16 unless `argv` says otherwise."""
    return common.load_dataset(arguments("--dataset", str(dataset), "--data-dir", str(data_dir),
                                         "--image-size", "16", *argv))


def values(images):
    """The value of each image's first pixel."""
    return images.images[images.rows][:, 0, 0, 0].tolist()


# ---------------------------------------------------------------------------------- the pictures

def two_colours(mode, colours):
    """The left half of one colour, the right half of the other."""
    image = Image.new(mode, (40, 40), colours[0])
    image.paste(colours[1], (20, 0, 40, 40))
    return image


PLAIN = two_colours("RGB", (RED, GREEN))
PALETTE = PLAIN.quantize(2)
OF_16_BITS = Image.fromarray(np.tile(np.repeat([20 * 257, 200 * 257], 20), (40, 1)).astype("u2"))
TURNED = Image.Exif()
TURNED[0x0112] = 8  # Orientation: to be shown turned left
TURNED[0x010F] = "maker"
BROKEN_TAG = TURNED.tobytes().replace(b"\x01\x0f\x00\x02", b"\x01\x1a\x00\x02")
assert BROKEN_TAG != TURNED.tobytes()  # the maker, a text, is now the resolution


def shown(path, size):
    """The pixels of the centre square, float32 (size,size,3), 0..255."""
    about = {"image_size": size, "mean": [0.0] * 3, "std": [1.0] * 3}
    return common.load_picture(path, about)[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("name, picture, options, expected", [
    ("grey.png", OF_16_BITS, {}, ((20,) * 3, (200,) * 3)),
    ("grey.tif", OF_16_BITS, {}, ((20,) * 3, (200,) * 3)),
    ("grey.pgm", OF_16_BITS, {}, ((20,) * 3, (200,) * 3)),
    ("turned.webp", PLAIN.rotate(-90), {"exif": TURNED, "quality": 100}, (RED, GREEN)),
    ("broken-tag.jpg", PLAIN.rotate(-90), {"exif": BROKEN_TAG, "quality": 100}, (RED, GREEN)),
    ("palette.png", PALETTE, {"transparency": PALETTE.getpixel((30, 0))}, (RED, (255,) * 3)),
    ("alpha.png", two_colours("RGBA", ((*RED, 255), (*GREEN, 51))), {},
     (RED, tuple(round(0.2 * v + 0.8 * 255) for v in GREEN))),
    ("alpha.tif", two_colours("LA", ((9, 255), (9, 0))), {}, ((9,) * 3, (255,) * 3)),
    ("print.jpg", two_colours("CMYK", ((0, 255, 255, 0), (255, 0, 0, 0))), {"quality": 100},
     ((255, 0, 0), (0, 255, 255))),
    ("bits.png", two_colours("1", (0, 1)), {}, ((0,) * 3, (255,) * 3)),
    ("plain.ppm", PLAIN, {}, (RED, GREEN))])
def test_pictures_are_read_as_a_viewer_shows_them(name, picture, options, expected, tmp_path):
    picture.save(tmp_path / name, **options)
    pixels = shown(tmp_path / name, 40)
    lossy = name.endswith(("jpg", "webp"))
    for half, colour in zip((pixels[5:35, 2:18], pixels[5:35, 22:38]), expected):
        assert np.abs(half - colour).max() <= (6 if lossy else 0)


@pytest.mark.parametrize("dtype, factor", [("u1", 1), ("u2", 257)])
def test_turned_tiffs_keep_their_pixels(dtype, factor, tmp_path):
    pixels = np.arange(128).reshape(8, 16)
    Image.fromarray((pixels * factor).astype(dtype)).save(tmp_path / "a.tif", exif=TURNED)
    assert np.array_equal(shown(tmp_path / "a.tif", 8)[..., 0], np.rot90(pixels)[4:12])


def test_load_picture_takes_what_pil_opens(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    PLAIN.save(path)
    about = {"image_size": 20, "mean": [10.0, 20.0, 30.0], "std": [2.0, 4.0, 5.0]}
    pixels = np.asarray(PLAIN)[::2, ::2].astype(float)
    expected = ((pixels - about["mean"]) / about["std"]).transpose(2, 0, 1)[None]
    with open(path, "rb") as file, Image.open(path) as image:
        for source in (path, str(path), file, image, io.BytesIO(path.read_bytes()), PLAIN,
                       np.asarray(PLAIN)):
            assert np.allclose(common.load_picture(source, about), expected, atol=1e-5)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(common.UserError, match="a.png: .*1600 pixels.* exceeds limit"):
        common.load_picture(path, about)


def test_all_that_cannot_be_read_is_in_one_message(tmp_path):
    folder = write_images(tmp_path / "pets", *PETS)
    os.truncate(folder / "test/dog/2.BMP", 2000)
    for name, mode, kind in (("train/dog/a.png", "L", "GIF"), ("test/cat/f.tif", "F", "TIFF"),
                             ("test/cat/i.tif", "I", "TIFF")):
        Image.new(mode, (9, 9)).save(folder / name, kind)
    with pytest.raises(common.UserError, match="cannot be read, 4, ") as error:
        load(folder, tmp_path)
    for line in ("test/dog/2.BMP: image file is truncated", "train/dog/a.png: no image",
                 "test/cat/f.tif: 32 bits a pixel", "test/cat/i.tif: 32 bits a pixel"):
        assert line in str(error.value)
        (folder / line.partition(":")[0]).unlink()
    assert not os.listdir(tmp_path / "cache")
    assert values(load(folder, tmp_path)[1]) == [6, 7, 8, 9, 10]


# ------------------------------------------------------------------------------------- layouts

@pytest.mark.parametrize("layout, classes, train_values, test_values, left_out", [
    ("train/a:2 train/b:1 test/a:1 test/b:1", "ab", [0, 1, 2], [3, 4], ""),
    ("Training_set/a:1 Training_set/b:1 Validation/b:1", "ab", [0, 1], [2], ""),
    ("train/a/images:1 train/b/images:1 val/a:1 val/b:1 test/images:2", "ab", [0, 1], [2, 3],
     "2 files or folders, such as test/images/0.BMP"),  # Tiny ImageNet
    ("train/a:1 train/b:1 test:1 val/a:1 val/b:1", "ab", [0, 1], [3, 4], "such as test/0.BMP"),
    ("train/a:1 train/b:1 test/a:1 val/a:1 val/b:1", "ab", [0, 1], [3, 4], "test/a/0.BMP"),
    ("train/a:1 train/b:1 test/a:1 test/b:0 b:1 .:1", "ab", [0, 1], [2], "2 files"),
    ("train/train:1 train/test:1 test/train:1", ["test", "train"], [1, 0], [2], ""),
    ("train/a:1 train/b:1 test/a:1 train/@eaDir/a:2 test/a/@eaDir/0.BMP:1 .cache/a:1 __MACOSX:1 "
     "$RECYCLE.BIN/a:1 lost+found:1 train/#recycle:1", "ab", [0, 1], [2], "7 files or folders")])
def test_layouts_that_people_have(layout, classes, train_values, test_values, left_out, tmp_path,
                                  capsys):
    train, test = load(write_images(tmp_path / "set", *layout.split()), tmp_path)
    assert train.classes == list(classes)
    assert (values(train), values(test)) == (train_values, test_values)
    assert train.labels.tolist() == sorted(train.labels.tolist())
    out = capsys.readouterr().out
    assert left_out in out and bool(left_out) == bool(out)


@pytest.mark.parametrize("layout, message", [
    ("train:4 test:2", "expected .*train/<class>/ .* found images in test/, train/"),
    ("bus:2 car:2 train:2", "in bus/, car/, train/"), ("test/a:1 test/b:1", "found"),
    ("bus:2 train/steam:2 train/diesel:2", r"in bus/, train/ \(diesel, steam\)"),
    ("train_1/a:1 train_1/b:1 train_2/a:1 train_2/b:1 test/a:1", "found"), (".:3", "in no folder"),
    ("images/train/a:1 images/train/b:1", r"images/ \(train\)"),
    ("train/a:1 train/b:1 test/a:1 test/B:1", "no test set: .*test has the class B"),
    ("train/a:1 train/b:1 test:1 val/images:1", "test has no classes, val has the class images"),
    (" ".join(f"train/n{i:0200}:1 val/m{i:0200}:1" for i in range(30)), "no test set"),
    (" ".join(f"val{i:0200}:1" for i in range(30)), "found")])
def test_other_layouts_are_refused_in_a_line(layout, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "set", *layout.split())
    with pytest.raises(common.UserError, match=message) as error:
        load("set", tmp_path)
    assert len(str(error.value)) <= 300


def test_links_are_followed_but_not_back_up_and_hidden_files_left_out(tmp_path, capsys):
    folder = write_images(tmp_path / "pets", *PETS)
    shutil.copy(folder / "train/cat/0.BMP", folder / "train/cat/._0.BMP")  # as macOS does
    for name, target in (("gone.bmp", "nowhere"), ("loop", ".."), ("self", "self"),
                         ("far", tmp_path), ("../bird", folder / "train/cat")):
        (folder / "train/cat" / name).symlink_to(target)
    train, test = load(folder, tmp_path)
    assert train.classes == ["bird", "cat", "dog"]
    assert (values(train), values(test)) == ([0, 1, 2, 0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11])
    printed = capsys.readouterr().out
    assert f"{folder}: 10 files or folders, such as train/bird/._0.BMP: hidden" in printed


def test_without_a_test_set_a_fraction_is_split_off(tmp_path):
    flat = write_images(tmp_path / "flat", "train_station:10", "valley:10")
    kaggle = write_images(tmp_path / "kaggle", "train/a:10", "train/b:10", "test:5")
    for folder in (flat, kaggle):
        train, test = load(folder, tmp_path, "--test-fraction", "0.3")
        assert sorted(values(train) + values(test)) == [*range(20)]
        assert train.labels.bincount().tolist() == [7, 7]
        other, _ = load(folder, tmp_path, "--test-fraction", "0.3", "--seed", "1")
        assert values(other) == values(train)  # no seed trains on another one's test images
    with pytest.raises(common.UserError, match="the smallest, b, has 1"):
        common.split_for_search(train.subset([0, 1, 13]), arguments("--batch-size", "2"))
    write_images(kaggle, "val/a:1", "val/b:1")
    for name in (kaggle, "digits"):
        with pytest.raises(common.UserError, match=f"--test-fraction: {name} has a test set"):
            load(name, tmp_path, "--test-fraction", "0.3")


# ------------------------------------------------------------------------------------ npz files

def write_npz(path, **changes):
    """A file like MedMNIST's, but for the changes; None: without that array."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 8), ("val", 2), ("test", 4)):
        arrays[f"{part}_images"] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[f"{part}_labels"] = np.arange(count, dtype=np.uint8)[:, None] % 2 + 3
    arrays |= changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


@pytest.mark.parametrize("shape", [(28, 28), (28, 28, 1), (28, 28, 3), (28, 36, 3), (35, 28, 1)])
def test_files_like_medmnists(shape, tmp_path):
    images = np.random.default_rng(1).integers(0, 256, (8, *shape), dtype=np.uint8)
    write_npz(tmp_path / "blood.npz", train_images=images)
    top = (shape[0] - 28) // 2
    left = (shape[1] - 28) // 2
    expected = images.reshape(8, *shape[:2], -1)[:, top:top + 28, left:left + 28]
    for name in ("blood", str(tmp_path / "blood.npz")):  # the former is one in --data-dir
        args = arguments("--dataset", name, "--data-dir", str(tmp_path), "--no-flip")
        train, test = common.load_dataset(args)
        assert np.array_equal(train.images, np.broadcast_to(expected, (8, 28, 28, 3)))
        assert (train.classes, train.labels.tolist()) == (["3", "4"], [0, 1] * 4)
        assert (len(test), train.flip) == (4, False)
    assert os.listdir(tmp_path) == ["blood.npz"]  # no cache
    os.truncate(tmp_path / "blood.npz", 900)
    with pytest.raises(common.UserError, match="cannot use .*blood.npz .*: expected train_images"):
        load("blood", tmp_path)


@pytest.mark.parametrize("test_labels, val_labels, count", [
    (None, [3, 4], 2), (np.zeros(0, int), [3, 4], 2), ([3, 4, 3, 9], [3, 4], 2),
    ([3, 3, 3, 3], None, 4)])
def test_the_test_set_of_a_file(test_labels, val_labels, count, tmp_path):
    write_npz(tmp_path / "a.npz", test_labels=test_labels, val_labels=val_labels)
    assert len(load("a", tmp_path)[1]) == count


@pytest.mark.parametrize("changes, message", [
    ({"train_images": np.zeros((8, 28, 28), np.float32)}, "train_images: float32"),
    ({"test_images": np.zeros((4, 28, 28, 28), np.uint8)}, r"test_images: uint8 \(4, 28, 28, 28\)"),
    ({"train_images": np.zeros((7, 28, 28), np.uint8)}, r"uint8 \(7, 28, 28\), train_labels.*8, 1"),
    ({"train_labels": np.zeros((8, 14), np.uint8)}, "fewer than two classes"),
    ({"test_labels": np.zeros(4)}, "test_labels: float64"),
    ({"train_labels": None}, "train_labels"), ({"train_labels": np.full(8, 3)}, "classes"),
    ({"train_labels": np.array([None] * 8)}, "pickle"),
    ({"test_labels": None, "val_labels": None}, "there is neither.; --test-fraction")])
def test_other_files_are_refused(changes, message, tmp_path):
    write_npz(tmp_path / "blood.npz", **changes)
    with pytest.raises(common.UserError, match=f"blood.*{message}"):
        load("blood", tmp_path)


# ---------------------------------------------------------------------------------- the cache

def test_the_cache_is_found_by_content(tmp_path, monkeypatch):
    """Both parts are links to a store, where images are deleted and replaced behind them."""
    store = write_images(tmp_path / "store", "cat:3", "dog:3")
    folder = tmp_path / "pets"
    folder.mkdir()
    for part in ("train", "test"):
        (folder / part).symlink_to(store)

    def loaded():
        return values(load(folder, tmp_path / "data")[0])
    assert loaded() == [0, 1, 2, 3, 4, 5]
    os.renames(folder, tmp_path / "elsewhere/pets")
    folder = tmp_path / "elsewhere/pets"
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", None)  # where the folder lies does not count
        assert loaded() == [0, 1, 2, 3, 4, 5]
    (store / "cat/1.BMP").unlink()
    assert loaded() == [0, 2, 3, 4, 5]
    for value, width in ((9, 60), (8, 90)):  # another time, as of cp -p; then another size
        Image.new("RGB", (width, 40), (value,) * 3).save(store / "dog/0.BMP")
        os.utime(store / "dog/0.BMP", (1e9, 1e9))
        assert loaded() == [0, 2, value, 4, 5]
    assert load(folder, tmp_path / "data", "--image-size", "12")[0].size == 12
    for cache in (tmp_path / "data/cache").iterdir():
        os.truncate(cache, 2000)
    with pytest.raises(common.UserError, match="cache .*/data/cache/pets-.* is damaged.*delete it"):
        loaded()


@pytest.mark.parametrize("name", ["pathlib.Path.mkdir", "os.replace", "numpy.load"])
def test_without_a_cache_images_stay_in_memory(name, tmp_path, monkeypatch, capsys):
    folder = write_images(tmp_path / "pets", *PETS)
    monkeypatch.setattr(name, Mock(side_effect=OSError("not on this disk")))
    train, test = load(folder, tmp_path)
    assert (values(train), values(test)) == ([0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11])
    assert "the images stay in memory, without a cache: " in capsys.readouterr().out
    assert len(list(tmp_path.glob("cache/*"))) == (name == "numpy.load")


@pytest.mark.parametrize("size, device", [(2 ** 32, "meta"), (2 ** 32 + 1, "cpu")])
def test_more_than_4_gib_stay_on_the_disk(size, device, tmp_path, monkeypatch):
    """An array on the disk seems to have this size. One in memory would move to the device."""
    folder = write_images(tmp_path / "pets", *PETS)
    monkeypatch.setattr(np.memmap, "nbytes", size)
    train, _ = load(folder, tmp_path, "--device", "meta")
    assert train.images.device.type == device
    assert device == "meta" or values(train) == [0, 1, 2, 3, 4, 5]
    batch = next(train.subset([3, 0]).passes(2, common.generator(0), common.generator(1)))
    assert [tensor.device.type for tensor in batch] == ["meta", "meta"]
