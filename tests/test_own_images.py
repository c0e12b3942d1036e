"""Folders and files of one's own: what is read, refused, left out, split and cached."""
import os
import shutil
import sys
from unittest.mock import Mock

import numpy as np
import pytest
from conftest import arguments, write_folder
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
BROKEN_TAG = TURNED.tobytes().replace(b"\x01\x0f\x00\x02", b"\x01\x0f\x00\x06")
assert BROKEN_TAG != TURNED.tobytes()  # the maker, a text, is now a signed byte


@pytest.mark.parametrize("name, picture, options, expected", [
    ("grey.png", OF_16_BITS, {}, ((20,) * 3, (200,) * 3)),
    ("grey.tif", OF_16_BITS, {}, ((20,) * 3, (200,) * 3)),
    ("grey.pgm", OF_16_BITS, {}, ((20,) * 3, (200,) * 3)),
    ("turned.png", PLAIN.rotate(-90), {"exif": TURNED}, (RED, GREEN)),
    ("turned.webp", PLAIN.rotate(-90), {"exif": TURNED, "quality": 100}, (RED, GREEN)),
    ("turned.jpg", PLAIN.rotate(-90), {"exif": TURNED, "quality": 100}, (RED, GREEN)),
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
    pixels = np.asarray(common.open_image(tmp_path / name)).astype(int)
    assert pixels.shape == (40, 40, 3)
    lossy = name.endswith(("jpg", "webp"))
    for half, colour in zip((pixels[5:35, 2:18], pixels[5:35, 22:38]), expected):
        assert np.abs(half - colour).max() <= (6 if lossy else 0)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK", "I;16"])
def test_turned_tiffs_keep_their_pixels(mode, tmp_path):
    pixels = np.arange(128, dtype=np.uint8).reshape(8, 16)
    image = Image.fromarray(pixels.astype(np.uint16) * 257) if mode == "I;16" \
        else Image.fromarray(pixels).convert("RGB").convert(mode)
    image.save(tmp_path / "a.tif", exif=TURNED)
    shown = np.asarray(common.open_image(tmp_path / "a.tif"))
    assert np.array_equal(shown[..., 0], np.rot90(pixels))


@pytest.mark.parametrize("name, mode, kind, message", [
    ("float.tif", "F", None, "TIFF: 32 bits"), ("int.tif", "I", None, "TIFF: 32 bits"),
    ("a.jpg", "RGB", "GIF", "GIF: a format"), ("a.png", "RGB", "PDF", "no image")])
def test_pictures_without_a_meaning_are_refused(name, mode, kind, message, tmp_path):
    Image.new(mode, (40, 40)).save(tmp_path / name, kind)
    with pytest.raises(common.UserError, match=f"{name} .*{message}"):
        common.open_image(tmp_path / name)


def test_all_that_cannot_be_read_is_in_one_message(tmp_path):
    folder = write_folder(tmp_path / "pets")
    (folder / "train/cat/1.bmp").write_bytes(b"")
    Image.new("L", (9, 9)).save(folder / "train/dog/0.bmp", "GIF")
    whole = (folder / "test/dog/2.bmp").read_bytes()
    (folder / "test/dog/2.bmp").write_bytes(whole[:2000])
    with pytest.raises(common.UserError) as error:
        load(folder, tmp_path)
    for words in ("train/cat/1.bmp (no image: ", "train/dog/0.bmp (GIF: ", "test/dog/2.bmp (BMP: "):
        assert words in str(error.value)
    assert not list(tmp_path.glob("tmp-*"))
    for path in ("train/cat/1.bmp", "train/dog/0.bmp", "test/dog/2.bmp"):
        (folder / path).unlink()
    train, test = load(folder, tmp_path)
    assert (values(train), values(test)) == ([0, 2, 51, 52], [0, 1, 2, 50, 51])


# -------------------------------------------------------------------------- folders and splits

def test_what_is_left_out_is_counted(tmp_path, capsys):
    folder = write_folder(tmp_path / "pets")
    shutil.copytree(folder / "train/cat", folder / "train/.ipynb_checkpoints")
    shutil.copy(folder / "train/cat/0.bmp", folder / "test/dog/._0.bmp")
    shutil.copy(folder / "train/cat/0.bmp", folder / "train/dog/x.gif")
    (folder / "train/cat/gone.bmp").symlink_to("nowhere")
    (folder / "train/cat/loop").symlink_to("..")
    (folder / "test/owl").mkdir()
    (folder / "old").mkdir()
    train, test = load(folder, tmp_path)
    assert train.classes == ["cat", "dog"]
    assert (values(train), values(test)) == ([0, 1, 2, 50, 51, 52], [0, 1, 2, 50, 51, 52])
    line, = capsys.readouterr().out.splitlines()
    assert sorted(line.removeprefix(f"left out of {folder}: ").split(", ")) == [
        "1 *.gif", "1 hidden", "1 old/", "1 test/owl/ without an image", "1 that lead to no file"]


@pytest.mark.parametrize("parts, used", [
    (("train", "test"), "test"), (("train", "val"), "val"),
    (("Training_set", "Validation"), "Validation"),
    (("train", "val", "test"), "test"), (("train", "valid", "testing"), "testing")])
def test_the_splits_that_people_have(parts, used, tmp_path):
    folder = tmp_path / "pets"
    for part in parts:
        write_folder(folder, parts=(part,), count=2 + len(part))
    train, test = load(folder, tmp_path)
    assert (len(train), len(test)) == (2 * (2 + len(parts[0])), 2 * (2 + len(used)))


def test_a_folder_without_a_split_needs_a_fraction(tmp_path):
    write_folder(tmp_path / "flat", parts=(".",), count=10)
    write_folder(tmp_path / "kaggle", parts=("train",), count=10)
    (tmp_path / "kaggle/test").mkdir()
    shutil.copy(tmp_path / "flat/cat/0.bmp", tmp_path / "kaggle/test")
    for name in ("flat", "kaggle"):
        with pytest.raises(common.UserError, match=f"{name} has no test set.*--test-fraction"):
            load(tmp_path / name, tmp_path)
        train, test = load(tmp_path / name, tmp_path, "--test-fraction", "0.3")
        assert sorted(values(train) + values(test)) == [*range(10), *range(50, 60)]
        assert train.labels.bincount().tolist() == [7, 7]
        other, _ = load(tmp_path / name, tmp_path, "--test-fraction", "0.3", "--seed", "1")
        assert values(other) == values(train)  # no seed trains on another one's test images
    with pytest.raises(common.UserError, match="--test-fraction: .*kaggle has a test set of its"):
        write_folder(tmp_path / "kaggle", parts=("test",))
        load(tmp_path / "kaggle", tmp_path, "--test-fraction", "0.3")


def test_classes_that_differ_or_are_too_small_are_named(tmp_path):
    folder = write_folder(tmp_path / "pets", ("cat", "dog", "owl"))
    (folder / "test/owl").rename(folder / "test/Owl")
    with pytest.raises(common.UserError, match="training images: owl; only .*: Owl"):
        load(folder, tmp_path)
    (folder / "test/Owl").rename(folder / "test/owl")
    for i in (0, 1):
        (folder / f"train/owl/{i}.bmp").unlink()
    train, _ = load(folder, tmp_path)
    with pytest.raises(common.UserError, match="the smallest, owl, has 1"):
        common.split_for_search(train, arguments("--batch-size", "2"))
    with pytest.raises(common.UserError, match="two or more classes are needed, found cat"):
        load(write_folder(tmp_path / "one", ("cat",)), tmp_path)


# ------------------------------------------------------------------------------------ npz files

def arrays_like_medmnist(**changes):
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 8), ("val", 2), ("test", 4)):
        arrays[f"{part}_images"] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[f"{part}_labels"] = np.arange(count, dtype=np.uint8)[:, None] % 2 + 3
    return arrays | changes


@pytest.mark.parametrize("shape", [(28, 28), (28, 28, 1), (28, 28, 3), (28, 36, 3)])
def test_files_like_medmnists(shape, tmp_path):
    images = np.random.default_rng(1).integers(0, 256, (8, *shape), dtype=np.uint8)
    np.savez(tmp_path / "blood.npz", **arrays_like_medmnist(train_images=images))
    args = arguments("--dataset", str(tmp_path / "blood.npz"), "--data-dir", str(tmp_path))
    train, test = common.load_dataset(args)
    expected = images.reshape(8, 28, shape[1], -1)[:, :, (shape[1] - 28) // 2:][:, :, :28]
    assert np.array_equal(train.images, np.broadcast_to(expected, (8, 28, 28, 3)))
    assert (train.classes, train.labels.tolist()) == (["3", "4"], [0, 1] * 4)
    assert len(test) == 4


@pytest.mark.parametrize("changes, message", [
    ({"train_images": np.zeros((8, 28, 28), np.float32)}, "train_images: float32"),
    ({"test_images": np.zeros((4, 28, 28, 28), np.uint8)}, r"test_images: uint8 \(4, 28, 28, 28\)"),
    ({"train_images": np.zeros((8, 784), np.uint8)}, r"train_images: uint8 \(8, 784\)"),
    ({"train_labels": np.zeros((8, 14), np.uint8)}, r"train_labels: uint8 \(8, 14\), not one"),
    ({"test_labels": np.zeros(4)}, "test_labels: float64"),
    ({"test_labels": np.array([3, 4, 3, 9])}, "test_labels: one is no training image's"),
    ({"train_labels": np.array([None] * 8)}, "pickle"),
    ({"test_labels": np.zeros(0, int), "test_images": np.zeros((0, 8, 8), np.uint8)}, "two or")])
def test_other_files_are_refused(changes, message, tmp_path):
    np.savez(tmp_path / "blood.npz", **arrays_like_medmnist(**changes))
    with pytest.raises(common.UserError, match=f"blood.npz.*: .*{message}"):
        load(tmp_path / "blood.npz", tmp_path)


def test_a_file_without_a_test_set(tmp_path):
    arrays = arrays_like_medmnist()
    np.savez(tmp_path / "a.npz", train_images=arrays["train_images"],
             train_labels=arrays["train_labels"])
    (tmp_path / "b.npz").write_bytes(b"PK nothing")
    np.savez_compressed(tmp_path / "c.npz", **arrays)
    damaged = bytearray((tmp_path / "c.npz").read_bytes())
    damaged[66:70] = b"\xff" * 4  # where zlib begins
    (tmp_path / "c.npz").write_bytes(damaged)
    train, test = load(tmp_path / "a.npz", tmp_path, "--test-fraction", "0.25")
    assert (len(train), len(test)) == (6, 2)
    for name in ("b.npz", "c.npz"):
        with pytest.raises(common.UserError, match=f"cannot use .*{name}"):
            load(tmp_path / name, tmp_path)


# ---------------------------------------------------------------------------------- the caches

def test_a_cache_is_valid_by_content(tmp_path, monkeypatch):
    """Class folders are links to a store, where images are deleted and replaced behind it."""
    write_folder(tmp_path / "store", parts=(".",))
    folder = tmp_path / "pets"
    for part in ("train", "test"):
        (folder / part).mkdir(parents=True)
        for name in ("cat", "dog"):
            (folder / part / name).symlink_to(tmp_path / "store" / name)

    def loaded():
        return values(load(folder, tmp_path / "caches")[0])
    assert loaded() == [0, 1, 2, 50, 51, 52]
    (tmp_path / "elsewhere").mkdir()
    folder = folder.rename(tmp_path / "elsewhere/pets")
    with monkeypatch.context() as patch:
        patch.setattr(common, "write_cache", None)  # paths do not count
        assert loaded() == [0, 1, 2, 50, 51, 52]
    (tmp_path / "store/cat/1.bmp").unlink()
    assert loaded() == [0, 2, 50, 51, 52]
    Image.new("RGB", (60, 40), (9, 9, 9)).save(tmp_path / "older.bmp")
    os.utime(tmp_path / "older.bmp", (1e9, 1e9))
    shutil.copy2(tmp_path / "older.bmp", tmp_path / "store/dog/0.bmp")  # cp -p
    assert loaded() == [0, 2, 9, 51, 52]
    os.utime(tmp_path / "store/dog/1.bmp", (4e9, 4e9))
    Image.new("RGB", (60, 40), (8, 8, 8)).save(tmp_path / "store/dog/2.bmp")
    assert loaded() == [0, 2, 9, 51, 8]


def test_where_nobody_may_write_caches_go_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = write_folder(tmp_path / "pets")
    (tmp_path / "file").touch()
    train, _ = load(folder, tmp_path / "file")  # no folder can be made of a file
    caches = list((tmp_path / "home/.cache/cnn-pooling").glob("pets-*-16"))
    assert len(caches) == 1
    load(folder, tmp_path / "file", "--cache-dir", str(tmp_path / "caches"))
    assert len(list((tmp_path / "caches").glob("pets-*-16"))) == 1
    monkeypatch.setattr(common, "lock", None)  # a cache that is there needs nothing but reading
    again, _ = load(folder, tmp_path / "file")
    assert values(again) == values(train)
    monkeypatch.undo()
    with pytest.raises(common.UserError, match="no cache can be written.*give another --cache-dir"):
        load(folder, tmp_path, "--cache-dir", str(tmp_path / "file"), "--image-size", "17")


def test_without_file_locks_there_is_a_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError("No locks available")))
    load(write_folder(tmp_path / "pets"), tmp_path)
    monkeypatch.setitem(sys.modules, "fcntl", None)  # Windows
    load(tmp_path / "pets", tmp_path, "--image-size", "17")
    warning, other = capsys.readouterr().err.splitlines()
    assert "cannot be locked here (No locks" in warning and "only Linux and macOS" in other
