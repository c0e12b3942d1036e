"""What all stages share: data, the network, evaluation, stand-alone training, run folders, plots.

Nothing runs on import. A stage script needs this file beside it and nothing else; the folder
kernels/ makes it faster. In order:
errors and arguments - many processes - data - configurations - network - training - run folder -
report and plots.
The method: Javan, Toews, Pedersoli, "Balanced Mixture of SuperNets for Learning the CNN Pooling
Architecture", arXiv:2306.11982; "the paper" below.
"""
from __future__ import annotations

import argparse
import copy
import csv
import ctypes
import hashlib
import io
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import mean

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

Config = tuple[int, ...]  # a pooling configuration: the number of layers at each resolution


# --------------------------------------------------------------------- errors and arguments

class UserError(Exception):
    """A mistake of the user's: printed as one line, exit code 2."""
    code = 2


class TrainingError(UserError):
    """Training cannot go on, the loss is not finite: printed as one line, exit code 1."""
    code = 1


class Stopped(Exception):
    """SIGTERM, or another rank is gone: printed as one line, exit code 143."""


def run_script(main) -> None:
    """Call `main()`, turning the expected failures into one line on stderr and an exit code."""
    def stop(*_):
        raise Stopped
    signal.signal(signal.SIGTERM, stop)
    try:
        join_ranks()
        main()
        return
    except (UserError, OSError) as error:
        code, line = getattr(error, "code", 1), f"error: {' '.join(str(error).split())}"
    except KeyboardInterrupt:
        code, line = 130, f"\ninterrupted: {how_to_go_on()}"
    except Stopped:
        code, line = 143, f"{why_stopped()}: {how_to_go_on()}"
    except Exception:  # a mistake of ours
        code, line = 1, traceback.format_exc()
    if tell_once():
        print(line, file=sys.stderr, flush=True)
    if store:
        os._exit(code)  # an ordinary exit would wait for the other ranks' messages
    sys.exit(code)


# Defaults of a data set: the paper's protocol; digits is cut down to minutes. Flips change what a
# digit or a shoe is.
PAPER = {"search_epochs": 100, "train_epochs": 200, "batch_size": 128, "flip": True}
PROTOCOLS = {
    "digits": {"search_epochs": 8, "train_epochs": 6, "batch_size": 32, "flip": False},
    "fashion-mnist": PAPER | {"flip": False}, "cifar10": PAPER, "cifar100": PAPER,
}


class Parser(argparse.ArgumentParser):
    """argparse with the arguments that all stages (or both searches) share, and one-line errors."""

    class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    def __init__(self, description: str, search: bool):
        super().__init__(description=description, formatter_class=self.Help)
        self.epochs = "search_epochs" if search else "train_epochs"
        digits = PROTOCOLS["digits"]
        add = self.add_argument_group("data").add_argument
        add("--dataset", default="digits", metavar="NAME|FOLDER", help=", ".join(PROTOCOLS)
            + ", or a folder with train/<class>/*.png|jpg and test/<class>/")
        add("--data-dir", default="data", help="where data sets and their caches are kept")
        add("--image-size", type=number(int, 8), metavar="N",
            help="resample the images to NxN (area filter); None: native, 32")
        add("--num-train", type=number(int, 2), metavar="N",
            help="use N of the training images, stratified by class; None: all")
        add = self.add_argument_group("training").add_argument
        add("--epochs", type=number(int, 1), help="passes over the training images; None: "
            f"{PAPER[self.epochs]}, for digits {digits[self.epochs]}")
        add("--batch-size", type=number(int, 2),
            help=f"None: {PAPER['batch_size']}, for digits {digits['batch_size']}")
        if search:
            add("--lr", type=number(float, 0), nargs=2, default=[0.1, 0.001],
                metavar=("FIRST", "LAST"), help="learning rate, cosine per epoch")
        else:
            add("--lr", type=number(float, 0), default=0.1,
                help="learning rate; x0.1 at 40, 60, 80 and 90 %% of the epochs")
        add("--momentum", type=number(float, 0, 1), default=0.9, help="of SGD")
        add("--weight-decay", type=number(float, 0), default=0.0, help="of SGD")
        add("--width", type=number(float, 0.0625), default=1.0,
            help="multiplier on the channels 16, 32, 64")
        if search:
            add = self.add_argument_group("search").add_argument
            add("--split", type=number(float, 0.01, 0.99), default=0.5, metavar="FRACTION",
                help="of the training images that trains weights; the rest validates")
            add("--ground-truth", metavar="CSV", help="results.csv of train_exhaustive.py: report "
                "Kendall tau, Spearman rho, rank and regret of the pick")
            add("--rank-every", type=number(int, 1), metavar="N",
                help="also rank all configurations every N epochs, into log.jsonl")
        add = self.add_argument_group("run").add_argument
        add("--out", help="run folder; None: runs/<stage>-<dataset>")
        add("--overwrite", action="store_true", help="start anew where --out holds a run")
        add("--seed", type=number(int, 0), default=0, help="origin of every random stream")
        add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda:1")
        add("--kernel", choices=["auto", "fused", "native"], default="auto",
            help="pooling + convolution; auto: fused (kernels/) on a CPU, native ops on a GPU")
        add("--amp", choices=["off", "bf16", "fp16"], default="off",
            help="autocast of the network; scores and batch statistics stay in full precision")
        add("--threads", type=number(int, 1), default=torch.get_num_threads(),
            help="of the CPU, for each process")

    def error(self, message: str):
        raise UserError(f"{message} (--help explains)")

    def parse_args(self, *args, **kwargs) -> argparse.Namespace:
        """Parse, fill in the data set's defaults, check --device, apply --threads."""
        found = super().parse_args(*args, **kwargs)
        protocol = PROTOCOLS.get(found.dataset, PAPER)
        found.epochs = found.epochs or protocol[self.epochs]
        found.batch_size = found.batch_size or protocol["batch_size"]
        torch.set_num_threads(found.threads)
        if world > 1 and found.device == "cuda":  # several ranks may share a GPU
            found.device = f"cuda:{local_rank % max(torch.cuda.device_count(), 1)}"
        try:
            torch.empty(1, device=found.device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"--device {found.device}: {str(error).splitlines()[0]}") from error
        return found


def number(kind: type, low: float, high: float = math.inf):
    """An argparse type: a finite `kind` (int or float) in low..high."""
    def parse(text: str):
        value = kind(text)
        if not (low <= value <= high and math.isfinite(value)):
            bounds = f"at least {low}" if high == math.inf else f"in {low}..{high}"
            raise argparse.ArgumentTypeError(f"{text}: must be {bounds}")
        return value
    parse.__name__ = kind.__name__  # argparse names the type by it
    return parse


def stream_seed(seed: int, *key: str | int) -> int:
    """A 63-bit seed for the random stream named by `key`, e.g. ("batches", supernet, epoch).

    Streams of different keys are independent, so changing one setting reshuffles nothing else,
    and a stream made for one epoch needs no place in a checkpoint.
    """
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def stream(seed: int, *key: str | int) -> torch.Generator:
    """A CPU generator for the stream `key`; see `stream_seed`."""
    return torch.Generator().manual_seed(stream_seed(seed, *key))


# --------------------------------------------------------------------------- many processes

# torchrun starts `world` processes and tells each its rank; alone, a process is rank 0 of 1
rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
local_rank = int(os.environ.get("LOCAL_RANK", 0))
store = None  # key-value store that the ranks share; it is torchrun's and outlives them
progress = partial(tqdm, disable=True if rank else None)


def join_ranks() -> None:
    """Join the other ranks, if there are any. All but rank 0 print nothing but errors.

    The backend is gloo on GPUs, too: what is exchanged are small tensors that the CPU needs, and
    nccl lets no two ranks share a GPU.
    """
    global store
    if world > 1:
        store, *_ = next(dist.rendezvous("env://"))
        store.set(f"process {rank}", f"{platform.node()} {os.getpid()}")
        # only a dead rank ends a wait, and its connection closes
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world,
                                timeout=timedelta(days=1))
        if rank:
            sys.stdout = open(os.devnull, "w")


class Gather:
    """The same small tensor of every rank, stacked: (world, *shape), on the CPU.

    It begins at once and waits for nobody, neither the device nor a rank; `result()` does.
    """

    def __init__(self, tensor: torch.Tensor):
        self.own = tensor.to("cpu", non_blocking=True, copy=True)
        self.copied = torch.cuda.current_stream(tensor.device).record_event() \
            if tensor.is_cuda else None
        self.all = [torch.empty_like(self.own) for _ in range(world)]
        self.work = None if self.copied else self._send()

    def _send(self):
        return dist.all_gather(self.all, self.own, async_op=True) if store else None

    def result(self) -> torch.Tensor:
        if self.copied:
            self.copied.synchronize()
            self.work = self._send()
        if not store:
            return self.own[None]
        try:
            self.work.wait()
        except RuntimeError as error:
            raise Stopped from error
        return torch.stack(self.all)


def barrier() -> None:
    Gather(torch.zeros(1)).result()


def collect(content) -> list | None:
    """The content (what torch.save takes) of every rank on rank 0, tensors on the CPU."""
    buffer, found = io.BytesIO(), [None] * world
    torch.save(content, buffer)
    if store:
        barrier()  # here a dead rank is noticed
        dist.gather_object(buffer.getvalue(), found if rank == 0 else None)
    else:
        found = [buffer.getvalue()]
    return None if rank else [torch.load(io.BytesIO(part), map_location="cpu", weights_only=True)
                              for part in found]


@contextmanager
def rank_0_first() -> Iterator[None]:
    """Rank 0 does it before the others: it may download, build or write what they only read."""
    if rank:
        barrier()
    yield
    if not rank:
        barrier()


def deal(items: list) -> Iterator:
    """The items in turn; each goes to the rank that asks first, so that none waits for another."""
    if not store:
        yield from items
        return
    while (i := store.add("dealt", 1)) <= len(items):
        yield items[i - 1]


def tell_once() -> bool:
    """Whether this rank is the first with an error, which is what the user should read."""
    try:
        return not store or store.add("told", 1) == 1
    except RuntimeError:  # torchrun itself is gone
        return True


def why_stopped() -> str:
    """Which rank of this machine is gone, if it is that."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun is about to send it
    time.sleep(0.5)  # until then torchrun has noticed, too
    for other in range(world if store else 0):
        try:
            node, pid = store.get(f"process {other}").decode().rsplit(" ", 1)
            if node == platform.node():
                os.kill(int(pid), 0)
        except ProcessLookupError:
            return f"error: rank {other} (process {pid}) has died"
        except RuntimeError:
            return "error: torchrun has died"
    return "stopped"


def how_to_go_on() -> str:
    found = sorted(Run.folder.glob("checkpoint*.pt"), key=os.path.getmtime) if Run.folder else []
    if not found:
        return "there is no checkpoint yet"
    epoch = torch.load(found[-1], map_location="cpu", weights_only=True)["epoch"]
    return f"the same command continues from {found[-1]}, epoch {epoch}"


# ------------------------------------------------------------------------------------- data

@dataclass(frozen=True)
class Images:
    """Images on the device. images: uint8 (N,H,W,3); labels: int64 (N,); mean, std: float32 (3,)
    of the training pixels in 0..255; flip: whether training batches may be mirrored."""
    images: torch.Tensor
    labels: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor
    num_classes: int
    flip: bool

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index) -> Images:
        index = torch.as_tensor(index, device=self.labels.device)
        return replace(self, images=self.images[index], labels=self.labels[index])

    def batch(self, index: torch.Tensor, crops: torch.Tensor | None = None):
        """Normalised images, float32 (B,3,H,W) in channels_last memory, and labels (B,).

        index: int64 (B,); crops: for augmented images the rows of `draw_crops` (B,3).
        """
        images = self.images[index]
        if crops is not None:
            images = crop_and_flip(images, crops[:, :2], crops[:, 2] > 0, images.shape[1] // 8)
        # whole rows at once: with an innermost dimension of 3, torch is 6 times slower
        mean, std = (value.repeat(images.shape[2]) for value in (self.mean, self.std))
        images = ((images.flatten(2) - mean) / std).view(images.shape)
        return images.permute(0, 3, 1, 2), self.labels[index]  # NHWC seen as NCHW: channels_last

    def draw_crops(self, count: int, rng: torch.Generator) -> torch.Tensor:
        """Where to crop from a border of H/8 zeros (4 at 32x32, as in the paper), and whether to
        flip: int64 (count,3): top, left, flip."""
        pad = self.images.shape[1] // 8
        places = torch.randint(0, 2 * pad + 1, (count, 2), generator=rng)
        flips = torch.rand(count, 1, generator=rng) < (0.5 if self.flip else 0.0)
        return torch.cat([places, flips], 1)

    def passes(self, batch_size: int, rng: torch.Generator, augment: bool) -> Iterator:
        """Batches without end: pass after pass over all images, each in a new random order and cut
        into ceil(N / batch_size) batches of near-equal size. What is random is drawn and moved to
        the device once a pass, so that no batch makes the CPU wait for the device."""
        count, device = len(self), self.labels.device
        parts = math.ceil(count / batch_size)
        while True:
            index = torch.randperm(count, generator=rng).to(device).tensor_split(parts)
            crops = self.draw_crops(count, rng).to(device).tensor_split(parts) \
                if augment else [None] * parts
            yield from map(self.batch, index, crops)

    def evaluation_batches(self, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches that cover every image once, always the same for the same N: shuffled and of
        near-equal size, since supernets normalise with the statistics of the batch, and a
        class-sorted batch or a last one of three images would falsify them."""
        batches = self.passes(batch_size, stream(0, "evaluation"), augment=False)
        for _ in progress(range(math.ceil(len(self) / batch_size)), "evaluating", leave=False):
            yield next(batches)


def crop_and_flip(images: torch.Tensor, offsets: torch.Tensor, flips: torch.Tensor,
                  pad: int) -> torch.Tensor:
    """Crop each image at its own place from a border of `pad` zeros, then mirror some.

    images: (B,H,W,3); offsets: int64 (B,2), top and left in 0..2*pad; flips: bool (B,).
    """
    count, height, width, _ = images.shape
    device = images.device
    padded = F.pad(images, (0, 0, pad, pad, pad, pad))
    columns = torch.arange(width, device=device).expand(count, width)
    columns = offsets[:, 1:] + torch.where(flips[:, None], width - 1 - columns, columns)
    rows = offsets[:, :1] + torch.arange(height, device=device)
    rows += torch.arange(count, device=device)[:, None] * padded.shape[1]
    pixels = rows[:, :, None] * padded.shape[2] + columns[:, None, :]
    return padded.view(-1, 3)[pixels.flatten()].view(images.shape)  # 1.6x of three indices


def load_dataset(args: argparse.Namespace) -> tuple[Images, Images]:
    """(train, test) of --dataset on --device, resampled to --image-size, cut to --num-train."""
    name, data_dir = args.dataset, Path(args.data_dir)
    with rank_0_first():
        if name == "digits":
            arrays = _read_digits()
        elif name in PROTOCOLS:
            arrays = _cached(data_dir / f"{name}.npz", lambda: _read_torchvision(name, data_dir))
        elif Path(name).is_dir():
            arrays = _read_folder(Path(name).resolve(), args.image_size or 32)
        else:
            raise UserError(f"unknown data set {name!r}: choose {', '.join(PROTOCOLS)}, or give a "
                            "folder that holds train/<class>/ and test/<class>/")
    classes = int(arrays["train_labels"].max()) + 1
    if classes < 2:
        raise UserError(f"{name}: there is only one class, a classifier needs two")
    if args.num_train not in (None, len(arrays["train_labels"])):
        kept, _ = stratified_split(arrays["train_labels"], args.num_train,
                                   stream_seed(args.seed, "subset"))
        arrays |= {key: arrays[key][kept] for key in ("train_images", "train_labels")}
    if args.image_size:
        arrays |= {key: _resample(arrays[key], args.image_size)
                   for key in ("train_images", "test_images")}
    pixels = arrays["train_images"]
    mean = pixels.mean((0, 1, 2), dtype=np.float64)  # einsum casts in small pieces: no float copy
    square = np.einsum("nhwc,nhwc->c", pixels, pixels, dtype=np.float64, casting="unsafe")
    variance = square / (pixels.size / 3) - mean ** 2
    mean, std = (torch.from_numpy(v).float().to(args.device)
                 for v in (mean, np.sqrt(np.maximum(variance, 1.0))))
    flip = PROTOCOLS.get(name, PAPER)["flip"]
    return tuple(Images(torch.from_numpy(arrays[f"{part}_images"]).to(args.device),
                        torch.from_numpy(arrays[f"{part}_labels"]).to(args.device),
                        mean, std, classes, flip) for part in ("train", "test"))


def stratified_split(labels: np.ndarray, first: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split 0..N-1 into index arrays of `first` and N - `first` images, stratified by class."""
    from sklearn.model_selection import train_test_split
    try:
        parts = train_test_split(np.arange(len(labels)), train_size=first, stratify=labels,
                                 random_state=seed % 2 ** 32)
    except ValueError as error:
        raise UserError(f"cannot split {len(labels)} images into {first} and "
                        f"{len(labels) - first}: {error}") from error
    return tuple(np.sort(part) for part in parts)


def split_for_search(train: Images, args: argparse.Namespace) -> tuple[Images, Images]:
    """The training images, split by class into the part that trains weights and the part that
    validates (paper: half and half). UserError if a part is smaller than a batch."""
    parts = stratified_split(train.labels.cpu().numpy(), round(args.split * len(train)),
                             stream_seed(args.seed, "split"))
    if args.batch_size > min(map(len, parts)):
        raise UserError(f"--batch-size {args.batch_size} is larger than a part of the split "
                        f"({len(parts[0])} training, {len(parts[1])} validation images)")
    return tuple(train.subset(part) for part in parts)


def _cached(path: Path, read) -> dict[str, np.ndarray]:
    """The arrays of the cache `path`; where it does not exist, those of `read()`, kept there."""
    if not path.exists():
        arrays = read()
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            np.savez(temporary, **arrays)
        return arrays
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {f"{part}_{kind}": file[f"{part}_{kind}"]
                      for part in ("train", "test") for kind in ("images", "labels")}
        known, size = np.unique(arrays["train_labels"]), arrays["train_images"].shape[1]
        for part in ("train", "test"):
            images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
            if images.dtype != np.uint8 or images.shape != (len(images), size, size, 3):
                raise ValueError(f"{part}_images: {images.dtype} {images.shape}, not uint8 NHHC")
            if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1] or not labels.size:
                raise ValueError(f"{part}_labels: {labels.dtype} {labels.shape}, not integers (N,)")
            if not (np.isin(labels, known).all() and (known == np.arange(len(known))).all()):
                raise ValueError(f"{part}_labels: not 0..K-1, each among the training images")
            arrays[f"{part}_labels"] = labels.astype(np.int64)
    except Exception as error:  # a damaged file raises many kinds
        raise UserError(f"{path} is not a usable cache ({error}): delete it to have it made anew; "
                        "README, 'Cache format', says what it must hold") from error
    return arrays


def _read_digits() -> dict[str, np.ndarray]:
    """scikit-learn's 1,797 handwritten digits (8x8, greys 0..16) as 32x32 RGB, split 80:20."""
    from sklearn.datasets import load_digits
    grey, labels = load_digits(return_X_y=True)
    grey = torch.from_numpy(grey).view(-1, 1, 8, 8) * (255 / 16)
    grey = F.interpolate(grey, size=(32, 32), mode="bilinear")
    images = grey.round().byte().permute(0, 2, 3, 1).repeat(1, 1, 1, 3).numpy()
    train, test = stratified_split(labels, round(0.8 * len(labels)), seed=0)
    return {"train_images": images[train], "train_labels": labels[train],
            "test_images": images[test], "test_labels": labels[test]}


def _read_torchvision(name: str, data_dir: Path) -> dict[str, np.ndarray]:
    """A torchvision data set, downloaded into `data_dir` unless its files are there."""
    from torchvision import datasets
    source = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100,
              "fashion-mnist": datasets.FashionMNIST}[name]
    arrays = {}
    for part in ("train", "test"):
        try:
            found = source(str(data_dir), train=part == "train", download=True)
        except Exception as error:  # network, archive, checksum: the advice is the same
            where, what = ((data_dir / "FashionMNIST" / "raw", "the four *-ubyte.gz files")
                           if name == "fashion-mnist" else (data_dir, source.filename))
            raise UserError(f"cannot download {name} ({str(error) or type(error).__name__}): put "
                            f"{what} into {where}, or a cache at {data_dir / name}.npz") from error
        images = np.asarray(found.data)
        if images.ndim == 3:  # 28x28 grey: a border of zeros, three equal channels
            images = np.pad(images, ((0, 0), (2, 2), (2, 2)))[..., None].repeat(3, axis=3)
        arrays |= {f"{part}_images": images,
                   f"{part}_labels": np.asarray(found.targets, dtype=np.int64)}
    return arrays


def _read_folder(folder: Path, size: int) -> dict[str, np.ndarray]:
    """The images of train/<class>/ and test/<class>/, the centre square resized to size x size;
    cached beside the folder, read again when anything below it is newer than the cache."""
    from PIL import Image, ImageOps, UnidentifiedImageError
    from torchvision.datasets import ImageFolder

    def read():
        arrays, classes = {}, None
        for part in ("train", "test"):
            try:
                found = ImageFolder(str(folder / part))
            except FileNotFoundError as error:
                raise UserError(f"{folder}: expected images in train/<class>/ and test/<class>/ "
                                f"({error})") from error
            classes = classes or found.classes
            if found.classes != classes or len(classes) < 2:
                raise UserError(f"{folder}: train/ and test/ must hold the same two or more "
                                f"classes; {part}/ holds {', '.join(found.classes)}")
            images = np.empty((len(found), size, size, 3), np.uint8)
            for i, (path, _) in enumerate(progress(found.samples, f"reading {part}")):
                try:
                    image = Image.open(path).convert("RGB")
                except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
                    raise UserError(f"cannot read the image {path}: {error}") from error
                images[i] = ImageOps.fit(image, (size, size), Image.Resampling.BOX)
            arrays |= {f"{part}_images": images, f"{part}_labels": np.array(found.targets)}
        return arrays

    cache = folder.with_name(f"{folder.name}-{size}.npz")
    if cache.exists() and cache.stat().st_mtime < max(p.stat().st_mtime
                                                      for p in (folder, *folder.rglob("*"))):
        cache.unlink()
    return _cached(cache, read)


def _resample(images: np.ndarray, size: int) -> np.ndarray:
    if images.shape[1] == size:
        return images
    parts = [F.interpolate(part.permute(0, 3, 1, 2).float(), size=(size, size), mode="area")
             for part in torch.from_numpy(images).split(1000)]
    return torch.cat([part.round().byte() for part in parts]).permute(0, 2, 3, 1).numpy()


# --------------------------------------------------------------------------- configurations

def enumerate_configs(num_layers: int, num_resolutions: int) -> list[Config]:
    """Every way to cut `num_layers` layers into `num_resolutions` blocks of one layer or more, in
    lexicographic order, the paper's numbering: C(num_layers - 1, num_resolutions - 1) of them."""
    cuts = itertools.combinations(range(1, num_layers), num_resolutions - 1)
    return [tuple(b - a for a, b in itertools.pairwise((0, *cut, num_layers))) for cut in cuts]


def downsampling_layers(config: Config) -> set[int]:
    """The layers (stem = 0) that stand behind a pooling: (5,3,2) -> {5, 8}."""
    return set(itertools.accumulate(config[:-1]))


def config_name(config: Config) -> str:
    return ",".join(map(str, config))


def parse_config(text: str) -> Config:
    """"5,3,2" -> (5, 3, 2); UserError unless it is one of ResNet-20's configurations."""
    layers, parts = ResNet20.num_layers, len(ResNet20.default_config)
    try:
        config = tuple(int(part) for part in text.strip(" []").split(","))
    except ValueError:
        config = ()
    if len(config) != parts or min(config) < 1 or sum(config) != layers:
        raise UserError(f"impossible configuration {text!r}: {parts} parts, each at least 1, that "
                        f"add to {layers} are needed, like {config_name(ResNet20.default_config)}")
    return config


# ---------------------------------------------------------------------------------- network

def native_pool_conv2d(x: torch.Tensor, weight: torch.Tensor,
                       downsample: str = "none") -> tuple[torch.Tensor, torch.Tensor]:
    """3x3 convolution, padding 1, no bias, that may downsample: (y, pooled).

    x: (N,C_in,H,W); weight: (C_out,C_in,3,3). "none": y = conv(x), pooled is x; "maxpool":
    pooled = maxpool2x2(x), y = conv(pooled); "stride": y = conv(x) with stride 2, pooled is x.
    """
    pooled = F.max_pool2d(x, 2) if downsample == "maxpool" else x
    return F.conv2d(pooled, weight, stride=2 if downsample == "stride" else 1, padding=1), pooled


fused = None  # the module kernels where `choose_kernel` chose it


def pool_conv2d(x: torch.Tensor, weight: torch.Tensor,
                downsample: str = "none") -> tuple[torch.Tensor, torch.Tensor]:
    return (fused.pool_conv2d if fused else native_pool_conv2d)(x, weight, downsample)


def choose_kernel(kernel: str, device: str) -> str:
    """Let the networks use the kernels that --kernel asks for; "fused" or "native", what it is now.

    auto: fused on a CPU; native on a GPU, where nobody has measured it. UserError if it must be
    fused and cannot be built; with auto that is a warning.
    """
    global fused
    fused = None
    if kernel == "native" or (kernel == "auto" and torch.device(device).type != "cpu"):
        return "native"
    try:
        import kernels
        kernels.load()
    except (ImportError, RuntimeError) as error:  # BuildError is a RuntimeError
        if kernel == "fused":
            raise UserError(f"--kernel fused: {error}") from error
        print(f"warning: {error}; native ops are used, slower", file=sys.stderr)
        return "native"
    fused = kernels
    return "fused"


precision: torch.dtype | None = None  # what --amp asks for


def autocast(device: torch.device | str):
    """The context of a forward pass: what --amp asks for."""
    return torch.autocast(torch.device(device).type, precision or torch.bfloat16,
                          enabled=precision is not None)


def use_device(args: argparse.Namespace) -> None:
    """Apply --kernel and --amp and let the device be fast."""
    global precision
    with rank_0_first():
        args.kernel = choose_kernel(args.kernel, args.device)
    precision = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.amp]
    keep_freed_memory()
    if "cuda" in args.device:
        # Tries every algorithm once a shape: ResNet-20 has 22 convolutions of different shape over
        # its 36 configurations, each with two batch sizes (near-equal) and three passes.
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.fp32_precision = "tf32"  # cudnn's convolutions: by default


def keep_freed_memory() -> None:
    """Let glibc keep what is freed. It would return large tensors to the system and get them back
    page by page: up to 1.4x of a training step with native ops."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # not glibc
        return
    mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD
    mallopt(-4, 0)  # M_MMAP_MAX


class Gauge:
    """Time since `restart`, and utilisation in direct-convolution equivalents: the multiply-adds
    (3 times the forward ones for a training step) over what matrix products in float32 reach on
    this device with these threads, measured here for half a second. A direct convolution stays
    below 1; Winograd's kernels may exceed it."""

    def __init__(self, device: str):
        a, b, product = torch.randn(3, 2048, 2048, device=device)
        torch.mm(a, b, out=product)[0, 0].item()  # waits for the device
        start, count = time.perf_counter(), 0
        while time.perf_counter() < start + 0.5:
            torch.mm(a, b, out=product)[0, 0].item()
            count += 1
        self.rate = count * 2048 ** 3 / (time.perf_counter() - start)
        self.restart()

    def restart(self) -> None:
        self.began, self.macs = time.perf_counter(), 0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    @property
    def utilisation(self) -> float:
        return self.macs / self.seconds / self.rate

    def epoch(self, images: int) -> dict[str, float]:
        """What log.jsonl keeps of an epoch of so many images."""
        seconds = self.seconds
        return {"seconds": seconds, "images_per_second": images / seconds,
                "utilisation": self.macs / seconds / self.rate}


def batch_norm(channels: int, supernet: bool) -> nn.BatchNorm2d:
    """In a supernet: no affine parameters, batch statistics always, since running ones would mix
    configurations. In a stand-alone network: ordinary."""
    return nn.BatchNorm2d(channels, affine=not supernet, track_running_stats=not supernet)


class Stem(nn.Module):
    """Layer 0: 3x3 convolution, BatchNorm, ReLU."""

    def __init__(self, channels: int, supernet: bool):
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.norm = batch_norm(channels, supernet)

    def forward(self, x: torch.Tensor, downsample: str) -> torch.Tensor:
        if fused and downsample == "none" and fused.can_fuse(x, self.conv.weight, self.norm):
            return fused.stem(x, self.conv.weight, self.norm)
        return F.relu(self.norm(pool_conv2d(x, self.conv.weight, downsample)[0]))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (1x1 convolution where the channels change); the pooled
    input feeds both the first convolution and the shortcut."""

    def __init__(self, c_in: int, c_out: int, supernet: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
        self.norm1 = batch_norm(c_out, supernet)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.norm2 = batch_norm(c_out, supernet)
        self.shortcut = nn.Sequential() if c_in == c_out else nn.Sequential(
            nn.Conv2d(c_in, c_out, 1, bias=False), batch_norm(c_out, supernet))

    def forward(self, x: torch.Tensor, downsample: str) -> torch.Tensor:
        if fused and downsample != "stride" and fused.can_fuse(x, self.conv1.weight, self.norm1):
            return fused.basic_block(x, self.conv1.weight, self.norm1, self.conv2.weight,
                                     self.norm2, *self.shortcut, downsample=downsample)
        y, pooled = pool_conv2d(x, self.conv1.weight, downsample)
        y, _ = pool_conv2d(F.relu(self.norm1(y)), self.conv2.weight)
        return F.relu(self.norm2(y) + self.shortcut(pooled))


class ResNet20(nn.Module):
    """ResNet-20 for small images; where it pools is an argument of the call.

    `model(images, config)`: any call may take any configuration, nothing is rebuilt and no state
    is kept. 10 layers: stem and 9 basic blocks. Channels never move with the pooling (paper,
    section 3). A network of your own is searchable if it offers `layers` (modules called as
    layer(x, downsample), downsample "none" or "maxpool"), `head(x)` and the two constants.
    """
    num_layers = 10
    default_config = (4, 3, 3)

    def __init__(self, num_classes: int, width: float = 1.0, supernet: bool = False):
        super().__init__()
        c = [max(1, round(width * channels)) for channels in (16,) * 4 + (32,) * 3 + (64,) * 3]
        blocks = [BasicBlock(c_in, c_out, supernet) for c_in, c_out in itertools.pairwise(c)]
        self.layers = nn.ModuleList([Stem(c[0], supernet), *blocks])
        self.classifier = nn.Linear(c[-1], num_classes)

    def head(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(x.mean((2, 3)))

    def forward(self, images: torch.Tensor, config: Config) -> torch.Tensor:
        """images: (N,3,H,W) -> logits (N,num_classes)."""
        x, downsampling = images, downsampling_layers(config)
        for i, layer in enumerate(self.layers):
            x = layer(x, "maxpool" if i in downsampling else "none")
        return self.head(x)


def make_network(args: argparse.Namespace, num_classes: int, supernet: bool,
                 *key: str | int) -> ResNet20:
    """A network on --device in channels_last, initialised from the stream ("weights", *key)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(args.seed, "weights", *key))
        network = ResNet20(num_classes, args.width, supernet)
    return network.to(args.device, memory_format=torch.channels_last)


def count_macs(network: nn.Module, config: Config, image_size: int) -> int:
    """Multiply-adds of one image's forward pass, convolutions and classifier; the convolutions of
    a layer all run at the resolution behind its pooling."""
    size, total = image_size, network.classifier.weight.numel()
    for depth, layer in enumerate(network.layers):
        size //= 2 if depth in downsampling_layers(config) else 1
        total += size ** 2 * sum(w.numel() for w in layer.parameters() if w.dim() == 4)
    return total


@torch.inference_mode()
def evaluate_configs(network: nn.Module, configs: list[Config],
                     batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Accuracy of every configuration over all (images, labels) batches: float64 (len(configs),).

    Up to their first different pooling, configurations have the same activations, so they are
    walked as a tree of shared prefixes: 2.03x fewer multiply-adds for the 36 of ResNet-20. Exact:
    every layer sees the very inputs it would see in a pass of its own, batch statistics included.
    """
    correct, count = [0] * len(configs), 0
    downsampling = [downsampling_layers(config) for config in configs]

    def walk(x: torch.Tensor, depth: int, members: list[int]):
        if depth == len(network.layers):
            hits = (network.head(x).argmax(1) == labels).sum()  # stays on the device
            for i in members:
                correct[i] = hits + correct[i]
            return
        for downsample in ("none", "maxpool"):
            group = [i for i in members
                     if (depth in downsampling[i]) == (downsample == "maxpool")]
            if group:
                walk(network.layers[depth](x, downsample), depth + 1, group)

    for images, labels in batches:
        with autocast(images.device):
            walk(images, 0, list(range(len(configs))))
        count += len(labels)
    return torch.stack(correct).cpu().double() / count


# --------------------------------------------------------------------------------- training

class Learner:
    """A network that learns: with its SGD and, for --amp fp16, its gradient scaler."""

    def __init__(self, network: nn.Module, args: argparse.Namespace):
        self.network, scaled = network, args.amp == "fp16"
        # fused: the scaler's check for infinities stays on the device
        self.optimizer = torch.optim.SGD(network.parameters(), lr=0.0, momentum=args.momentum,
                                         weight_decay=args.weight_decay, fused=scaled)
        self.scaler = torch.amp.GradScaler(torch.device(args.device).type, enabled=scaled)

    def step(self, images: torch.Tensor, labels: torch.Tensor, config: Config,
             lr: float) -> torch.Tensor:
        """One SGD step; loss and accuracy of the batch, float64 (2,), left on the device."""
        self.optimizer.param_groups[0]["lr"] = lr
        with autocast(images.device):
            logits = self.network(images, config)
            loss = F.cross_entropy(logits, labels)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return torch.stack([loss.detach().double(), accuracy(logits, labels)])

    @torch.inference_mode()
    def check(self, images: torch.Tensor, labels: torch.Tensor, config: Config) -> torch.Tensor:
        """Accuracy of the batch without learning, float64 (), left on the device."""
        with autocast(images.device):
            return accuracy(self.network(images, config), labels)

    def state_dict(self) -> dict:
        return {name: part.state_dict() for name, part in vars(self).items()}

    def load_state_dict(self, state: dict) -> None:
        for name, part in vars(self).items():
            part.load_state_dict(state[name])


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return (logits.argmax(1) == labels).double().mean()


def read_steps(steps: list[tuple[str, torch.Tensor]]) -> torch.Tensor:
    """What an epoch's steps left on the device, as rows on the CPU: (steps, numbers of a step).

    steps: (where, numbers) with the loss first. TrainingError naming the first step whose loss is
    not finite.
    """
    values = torch.stack([numbers for _, numbers in steps]).cpu()
    for (where, _), loss in zip(steps, values[:, 0].tolist()):
        if not math.isfinite(loss):
            raise TrainingError(f"the loss is {loss} at {where}; the checkpoint of the last epoch "
                                "is kept; a smaller learning rate usually helps")
    return values


def cosine(first: float, last: float, epoch: int, epochs: int) -> float:
    """Learning rate of `epoch` (0-based), from `first` towards `last`."""
    return last + (first - last) * (1 + math.cos(math.pi * epoch / epochs)) / 2


def expected_time(learner: Learner, images: Images, batch_size: int, training_macs: float,
                  forward_macs: float) -> timedelta:
    """Time for the multiply-adds of so many training steps (their forward passes counted, the
    backward ones implied) and plain forward passes, at the speed of one step of a throw-away copy.
    """
    probe, config = copy.deepcopy(learner), learner.network.default_config
    x, labels = next(images.passes(batch_size, stream(0), augment=False))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        probe.step(x, labels, config, 0.0).tolist()  # waits for the device
        seconds.append(time.perf_counter() - start)
    speed = min(seconds) / (len(x) * count_macs(probe.network, config, x.shape[2])) / world
    return timedelta(seconds=round(speed * (training_macs + forward_macs / 3)))


RESULT_COLUMNS = ("config", "seed", "test_accuracy", "train_accuracy", "train_loss")


def train_stand_alone(run: Run, args: argparse.Namespace, train: Images, test: Images,
                      pairs: list[tuple[Config, int]]) -> list[dict]:
    """Stages 1 and 3: train a network of its own for every (configuration, seed), and write each
    finished one to results.csv at once. Finished pairs are skipped, an interrupted one continues.
    Returns the rows of results.csv when all ranks are done.

    Protocol (paper): SGD, learning rate x0.1 at 40, 60, 80 and 90 % of the epochs, the accuracy
    of the last epoch on the test images.
    """
    path = run.folder / "results.csv"

    def finished() -> set:
        rows = read_results(path) if path.exists() else []
        return {(row["config"], row["seed"]) for row in rows}

    done, steps = finished(), math.ceil(len(train) / args.batch_size)
    todo = [pair for pair in pairs if (config_name(pair[0]), pair[1]) not in done]
    if todo:
        probe, size = make_network(args, train.num_classes, False), train.images.shape[1]
        macs = {config: count_macs(probe, config, size) for config, _ in pairs}
        total = sum(macs[config] for config, _ in todo)
        expected = expected_time(Learner(probe, args), train, args.batch_size,
                                 total * len(train) * args.epochs, total * len(test))
        print(f"{len(pairs) - len(todo)} finished, {len(todo)} to train; expected time {expected}",
              flush=True)
        gauge = Gauge(args.device)
    bar = progress(total=len(todo) * args.epochs * steps, unit="step")
    for config, seed in deal(pairs):  # the same list on every rank, however far the others are
        name, checkpoint = config_name(config), f"checkpoint-{config_name(config)}-{seed}.pt"
        if (name, seed) in finished():
            continue
        learner = Learner(make_network(args, train.num_classes, False, seed), args)
        state, start = run.load(checkpoint), 0
        if state:
            learner.load_state_dict(state["learner"])
            start, loss, correct = (state[key] for key in ("epoch", "loss", "correct"))
        run.trim_log(lambda line: (line["config"], line["seed"]) != (name, seed)
                     or line["epoch"] <= start)
        bar.update(start * steps)
        for epoch in range(start, args.epochs):
            gauge.restart()
            passed = sum(epoch >= part * args.epochs for part in (0.4, 0.6, 0.8, 0.9))
            lr, record, sizes = args.lr * 0.1 ** passed, [], []
            batches = train.passes(args.batch_size, stream(seed, "batches", epoch), augment=True)
            learner.network.train()
            for step, (images, labels) in zip(range(steps), batches):
                where = f"epoch {epoch + 1}, step {step + 1}, configuration {name}, seed {seed}"
                record.append((where, learner.step(images, labels, config, lr)))
                sizes.append(len(labels))
                gauge.macs += 3 * macs[config] * len(labels)
                bar.update(world)  # on rank 0; the others are about as fast
            weights = torch.tensor(sizes, dtype=torch.float64) / len(train)
            loss, correct = (weights @ read_steps(record)).tolist()
            line = dict(config=name, seed=seed, epoch=epoch + 1, **gauge.epoch(len(train)),
                        train_loss=loss, train_accuracy=correct, lr=lr)
            bar.set_postfix_str(f"{name} seed {seed}, train accuracy {correct:.3f}, "
                                f"utilisation {line['utilisation']:.2f}")
            run.log(**line)
            run.save(checkpoint, {"epoch": epoch + 1, "learner": learner.state_dict(),
                                  "loss": loss, "correct": correct})
        result = evaluate_configs(learner.network.eval(), [config],
                                  test.evaluation_batches(args.batch_size)).item()
        run.add_row(dict(zip(RESULT_COLUMNS, (name, seed, result, correct, loss))))
        (run.folder / checkpoint).unlink()
    bar.close()
    barrier()
    report_speed(run)
    return read_results(path)


def read_results(path: Path) -> list[dict]:
    """The rows of a results.csv: `config`, `seed` and `test_accuracy` (float) at least."""
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            row["test_accuracy"] = float(row["test_accuracy"])
            row["seed"] = int(row["seed"])
            row["config"] = config_name(parse_config(row["config"]))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, csv.Error) as error:
        raise UserError(f"{path} is not a table with the columns config, seed, test_accuracy "
                        f"({type(error).__name__}: {error})") from error
    return rows


def spread(values: list[float]) -> float:
    """Sample standard deviation; 0 of a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def by_config(rows: list[dict]) -> dict[str, list[float]]:
    """Test accuracies of each configuration, one a seed."""
    values: dict[str, list[float]] = {}
    for row in rows:
        values.setdefault(row["config"], []).append(row["test_accuracy"])
    return values


# ------------------------------------------------------------------------------- run folder

@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that takes the place of `path` when the block ends without an error, so
    that no reader and no kill ever meets half a file."""
    temporary = path.with_name(f"tmp-{os.getpid()}-{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Run:
    """A run folder: config.json, log.jsonl, checkpoints, results, plots.

    Opened again with the same settings it continues; UserError, naming the differences, if they
    differ, unless --overwrite. What does not change a result, or only extends it, may differ.
    """
    not_compared = {"out", "overwrite", "data_dir", "device", "threads", "ground_truth",
                    "rank_every", "configs", "config", "seeds", "source"}
    files = ("config.json", "log.jsonl", "result.json", "results.csv", "supernets.pt",
             "checkpoint*.pt", "*.png", "tmp-*", "lock")

    folder: Path | None = None

    def __init__(self, stage: str, args: argparse.Namespace):
        use_device(args)
        self.folder = Run.folder = Path(args.out or f"runs/{stage}-{Path(args.dataset).name}")
        settings = {"stage": stage} | {k: v for k, v in vars(args).items()
                                       if k not in self.not_compared}
        with rank_0_first():
            if rank == 0:
                self._open(settings, args)

    def _open(self, settings: dict, args: argparse.Namespace) -> None:
        # torchrun may restart what has died, with the same arguments: only the first is anew
        overwrite = args.overwrite and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        known = self.load("config.json")
        if known is not None and not args.overwrite:
            before = known.get("settings", {})
            differing = [f"{k} {before.get(k)} there, {settings.get(k)} now"
                         for k in sorted(before.keys() | settings.keys())
                         if before.get(k) != settings.get(k)]
            if differing:
                raise UserError(f"{self.folder} holds a run with other settings "
                                f"({'; '.join(differing)}): choose another --out, or --overwrite")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if overwrite:
                for path in itertools.chain(*(self.folder.glob(name) for name in self.files)):
                    path.unlink()
            self.save("config.json", {"settings": settings} | _environment(args))
        except OSError as error:
            raise UserError(f"--out {self.folder} is not writable: {error}") from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One rank at a time changes a file that all write; the kernel unlocks it for the dead."""
        import fcntl
        with open(self.folder / "lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def save(self, name: str, content) -> None:
        """Write `content` as JSON or, for *.pt, with torch.save."""
        with replacing(self.folder / name) as temporary:
            if name.endswith(".pt"):
                with open(temporary, "wb") as file:  # given a path, its name would be in the file
                    torch.save(content, file)
            else:
                temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")

    def load(self, name: str) -> dict | None:
        """What `save` wrote; None if it did not; UserError if that is damaged."""
        path = self.folder / name
        if not path.exists():
            return None
        if not name.endswith(".pt"):
            return read_json(path)
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file raises many kinds
            raise UserError(f"{path} is damaged ({type(error).__name__}): delete it to train "
                            "again from the start") from error

    def log(self, **line) -> None:
        """Append a line to log.jsonl; print its numbers where no progress bar is seen."""
        with self.locked(), open(self.folder / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        if not sys.stderr.isatty():
            print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                            for k, v in line.items() if not isinstance(v, (list, dict))),
                  flush=True)

    def read_log(self) -> list[dict]:
        path = self.folder / "log.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]  # a kill may tear one

    def trim_log(self, keep) -> None:
        """Drop the lines of epochs that the checkpoint does not hold and that will come again."""
        with self.locked(), replacing(self.folder / "log.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n"
                                         for line in self.read_log() if keep(line)))

    def add_row(self, row: dict) -> None:
        """Add a row to results.csv, sorted by seed and configuration, whoever was first."""
        path = self.folder / "results.csv"
        with self.locked():
            rows = [*(read_results(path) if path.exists() else []), row]
            rows.sort(key=lambda row: (row["seed"], parse_config(row["config"])))
            with replacing(path) as temporary, open(temporary, "w", newline="") as file:
                writer = csv.DictWriter(file, RESULT_COLUMNS)
                writer.writeheader()
                writer.writerows(rows)


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("not an object")
        return content
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error})") from error


def _environment(args: argparse.Namespace) -> dict:
    """What a result may depend on besides the settings."""
    cpu = re.search("model name.*: (.*)", Path("/proc/cpuinfo").read_text()) if \
        Path("/proc/cpuinfo").exists() else None
    git = shutil.which("git") and subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return {"command": " ".join(sys.argv), "data_dir": args.data_dir, "device": args.device,
            "device_name": torch.cuda.get_device_name(args.device) if "cuda" in args.device
            else cpu[1] if cpu else platform.machine(), "threads": args.threads, "ranks": world,
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "numpy": np.__version__},
            "git": git.stdout.strip() if git and git.returncode == 0 else None}


# -------------------------------------------------------------------------- report and plots

def report_speed(run: Run) -> None:
    """Print the means over the log's epochs; nothing for a log from before they were kept."""
    lines = [line for line in run.read_log() if "utilisation" in line]
    if not lines:
        return
    speed, utilisation = (mean(line[key] for line in lines)
                          for key in ("images_per_second", "utilisation"))
    print(f"\n{speed:.0f} images/s; utilisation {utilisation:.2f} direct-convolution equivalents "
          "(1: a direct convolution at the rate of a matrix product)")


def read_ground_truth(path: str | None, configs: list[Config]) -> dict[str, float] | None:
    """Test accuracy of every configuration from stage 1's results.csv; None without a path."""
    if path is None:
        return None
    truth = {name: mean(found) for name, found in by_config(read_results(Path(path))).items()}
    missing = [config_name(config) for config in configs if config_name(config) not in truth]
    if missing:
        raise UserError(f"{path} lacks {len(missing)} of {len(configs)} configurations "
                        f"({'; '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}): "
                        "train_exhaustive.py writes them")
    return truth


def rank_metrics(accuracies: dict[str, float], truth: dict[str, float]) -> dict[str, float | None]:
    """How well a ranking meets the ground truth: Kendall tau-b, Spearman rho (None where all
    accuracies are equal), the pick's rank (1 = best) and its regret (accuracy lost to the best)."""
    from scipy.stats import kendalltau, spearmanr
    names = list(accuracies)
    found, true = [accuracies[n] for n in names], [truth[n] for n in names]
    constant = len(set(found)) == 1 or len(set(true)) == 1
    pick = truth[max(names, key=accuracies.get)]
    return {"kendall_tau": None if constant else float(kendalltau(found, true).statistic),
            "spearman_rho": None if constant else float(spearmanr(found, true).statistic),
            "pick_rank": 1 + sum(value > pick for value in true), "regret": max(true) - pick}


def finish_search(run: Run, configs: list[Config], accuracies: torch.Tensor, owners: list[int],
                  macs: list[int]) -> None:
    """Rank 0 writes result.json: the ranking, best first; ties keep the paper's order."""
    if rank:
        return
    ranking = [{"config": config_name(config), "accuracy": float(a), "supernet": m, "macs": count}
               for config, a, m, count in zip(configs, accuracies, owners, macs)]
    ranking.sort(key=lambda entry: -entry["accuracy"])
    run.save("result.json", {"ranking": ranking, "pick": ranking[0]["config"], "metrics": None})


def report_search(run: Run, args: argparse.Namespace, truth: dict[str, float] | None) -> None:
    """Print the best ten, the default and the worst, draw the plots, say what comes next."""
    if rank:
        return
    result = run.load("result.json")
    ranking = result["ranking"]
    scores = {entry["config"]: entry["accuracy"] for entry in ranking}
    if truth:
        result["metrics"] = rank_metrics(scores, truth)
        run.save("result.json", result)
    plot_results(run.folder / "ranking.png", {k: [v] for k, v in scores.items()},
                 "validation accuracy", truth)
    default = config_name(ResNet20.default_config)
    print(f"\n{'rank':>4}  {'configuration':13}  {'accuracy':>8}  supernet  Mmult-adds"
          + ("  ground truth" if truth else ""))
    for place, entry in enumerate(ranking, 1):
        if place <= 10 or place == len(ranking) or entry["config"] == default:
            print(f"{place:4}  {entry['config']:13}  {entry['accuracy']:8.4f}  "
                  f"{entry['supernet']:8}  {entry['macs'] / 1e6:10.1f}"
                  + (f"  {truth[entry['config']]:12.4f}" if truth else "")
                  + ("  default" if entry["config"] == default else ""))
    if result["metrics"]:
        print("against the ground truth: " + ", ".join(
            f"{k} {v:.4g}" if v is not None else f"{k} undefined"
            for k, v in result["metrics"].items()))
    report_speed(run)
    print(f"pick: {result['pick']}   (all of it in {run.folder}/: result.json, *.png)")
    print(f"next: python retrain.py --from {run.folder}"
          + (f" --data-dir {args.data_dir}" if args.data_dir != "data" else ""))


def save_figure(figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, bbox_inches="tight")


def plot_results(path: Path, values: dict[str, list[float]], label: str,
                 truth: dict[str, float] | None = None) -> None:
    """Accuracies (one or more a configuration: seeds) as a ranking, over the triangle (n1, n2)
    and, with a ground truth, as a scatter plot against it (paper, figure 3)."""
    from matplotlib.figure import Figure
    means = {name: mean(found) for name, found in values.items()}
    order, default = sorted(means, key=means.get), config_name(ResNet20.default_config)
    figure = Figure(figsize=(18 if truth else 12, 1.5 + 0.15 * len(order)), layout="constrained")
    ranking, triangle, *scatter = figure.subplots(1, 3 if truth else 2)
    for row, name in enumerate(order):
        color = "tab:orange" if name == default else "tab:blue"
        ranking.plot(means[name], row, "o", color=color, markersize=7)
        ranking.plot(values[name], [row] * len(values[name]), "|", color=color, markersize=9)
    ranking.set_yticks(range(len(order)), order, fontsize=7)
    ranking.grid(alpha=0.3)
    ranking.set(xlabel=f"{label} (dot: mean; bars: seeds; orange: the default)",
                ylabel="pooling configuration")
    configs = {name: parse_config(name) for name in order}
    dots = triangle.scatter([configs[n][0] for n in order], [configs[n][1] for n in order],
                            c=[means[n] for n in order], marker="s", s=500)
    triangle.plot(*configs[order[-1]][:2], "r*", markersize=12, label=f"best: {order[-1]}")
    if default in configs:
        triangle.plot(*configs[default][:2], "wo", markeredgecolor="k", label=f"default: {default}")
    triangle.set(xlabel="n1, layers at full resolution", ylabel="n2, layers at half resolution")
    triangle.legend()
    figure.colorbar(dots, label=label)
    for axes in scatter:
        axes.plot([truth[n] for n in order], [means[n] for n in order], "o")
        for name in order:
            axes.annotate(name, (truth[name], means[name]), fontsize=6)
        tau = rank_metrics(means, truth)["kendall_tau"]
        axes.set(xlabel="ground truth: test accuracy trained alone", ylabel=label,
                 title="all equal" if tau is None else f"Kendall tau {tau:.3f}")
    save_figure(figure, path)
