"""What the stages share: arguments, data, networks, learning, the run folder, plots.

Nothing runs on import. A stage needs this file beside it; the folder kernels/ makes it faster.
In order: errors and arguments - many processes - data - configurations - networks - learning -
the run folder - reports and plots.
The method: Javan, Toews, Pedersoli, "Balanced Mixture of SuperNets for Learning the CNN Pooling
Architecture", arXiv:2306.11982; "the paper" below.
"""
from __future__ import annotations

import argparse
import atexit
import contextlib
import csv
import ctypes
import hashlib
import itertools
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from statistics import mean, stdev

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


class TrainingError(Exception):
    """Training cannot go on, a loss is not finite: printed as one line, exit code 1."""


def run_script(main: Callable[[], None]) -> None:
    """Call `main()`; what may be expected to go wrong ends with one line and an exit code."""
    try:
        main()
    except UserError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except (TrainingError, OSError) as error:  # the latter: a full disk, say
        sys.exit(f"error: {error}; the same command continues from the last checkpoint")
    except KeyboardInterrupt:
        print("interrupted: the same command continues from the last checkpoint", file=sys.stderr)
        sys.exit(130)


# Defaults: the paper's protocol, then what a network and then a data set changes of it. Where the
# paper gives a range this is a value within it. A pair is (of a search, of training alone).
PAPER = {"epochs": (100, 200), "batch_size": 128, "lr": ([0.1, 0.001], 0.1), "weight_decay": 0.0,
         "temperature": [1.0, 100.0], "decay": 0.9, "flip": True, "crop": "pad"}
NETWORK_PROTOCOLS = {
    "resnet18": {"epochs": (400, 200), "weight_decay": 5e-4, "temperature": [1.0, 150.0]},
    "resnet50": {"epochs": (400, 200), "weight_decay": 5e-4, "temperature": [1.0, 300.0]},
}
DATASET_PROTOCOLS = {
    "digits": {"epochs": (8, 6), "batch_size": 32, "flip": False},  # minutes on a CPU
    "fashion-mnist": {"flip": False},  # a mirrored shoe is another shoe
    "cifar10": {},
    "cifar100": {},
    "food101": {"epochs": (300, 200), "decay": 0.95, "crop": "resized"},
}


def protocol(dataset: str, arch: str) -> dict:
    """The protocol's value of every setting that it decides."""
    settings = PAPER | NETWORK_PROTOCOLS.get(arch, {}) | DATASET_PROTOCOLS.get(dataset, {})
    if dataset == "food101":
        settings["image_size"] = 64 if arch == "resnet20" else 224
    return settings


def number(kind: type, low: float, high: float = math.inf) -> Callable:
    """An argparse type: a finite `kind` (int or float) in low..high."""
    def parse(text: str):
        value = kind(text)
        if not low <= value <= high or value == math.inf:  # a NaN is in no range
            raise argparse.ArgumentTypeError(f"{text}: must be from {low} to {high}")
        return value
    parse.__name__ = kind.__name__  # argparse names the type by it
    return parse


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message: str):
        raise UserError(f"{message} (--help explains)")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the defaults, and the description as it is written."""


def make_parser(description: str, search: bool) -> Parser:
    """The arguments that all stages share; search: and those of both searches."""
    parser = Parser(description=description, formatter_class=HelpFormatter)

    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="digits", metavar="NAME|FOLDER", help=", ".join(DATASET_PROTOCOLS)
        + ", or a folder of images, train/<class>/ and test/<class>/")
    add("--data-dir", default="data", help="where data sets and their caches are kept")
    add("--image-size", type=number(int, 8, 1024), metavar="N", help="resample the images to NxN; "
        "None: native, 32; food101: 64 for resnet20, else 224")
    add("--num-train", type=number(int, 2), metavar="N",
        help="use N of the training images, stratified by class; None: all")

    add = parser.add_argument_group("network").add_argument
    add("--arch", choices=ARCHS, default="resnet20", help="the network")
    add("--num-resolutions", type=number(int, 1), metavar="R",
        help="how often it pools, plus 1; None: 3 for resnet20, else 4")
    add("--downsample", choices=["maxpool", "stride"], help="a 2x2 max-pool before the layer, or "
        "stride 2 in its 3x3 convolution; None: maxpool for resnet20, else stride")
    add("--width", type=number(float, 0.0625, 16), default=1.0, help="multiplier on the channels")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=number(int, 1, 10 ** 6), help="passes over the training images; None: "
        + ("digits 8, cifar10 100, larger networks 400" if search else "digits 6, others 200"))
    add("--batch-size", type=number(int, 2, 10 ** 6), help="None: 128, digits 32")
    if search:
        add("--lr", type=number(float, 0), nargs=2, metavar=("FIRST", "LAST"),
            help="learning rate, cosine per epoch; None: 0.1 0.001")
    else:
        add("--lr", type=number(float, 0), help="learning rate; x0.1 at 40, 60, 80 and 90 %% of "
            "the epochs; None: 0.1")
    add("--momentum", type=number(float, 0, 1), default=0.9, help="of SGD")
    add("--weight-decay", type=number(float, 0), help="of SGD; None: 0, larger networks 0.0005")

    if search:
        add = parser.add_argument_group("search").add_argument
        add("--configs", nargs="+", metavar="N,N,N", help="only these configurations; None: all")
        add("--split", type=number(float, 0.01, 0.99), default=0.5, metavar="FRACTION",
            help="of the training images that trains weights; the rest validates")
        add("--draw", choices=["uniform", "cost", "blocks"], default="uniform", help="how often a "
            "step trains each configuration. uniform: all equally, as in the paper. cost: in "
            "proportion to its multiply-adds. blocks: the block lengths one after another, each "
            "uniformly among those possible")
        add("--ground-truth", metavar="CSV", help="results.csv of train_exhaustive.py: report "
            "Kendall tau, Spearman rho, rank and regret of the pick")
        add("--rank-every", type=number(int, 1), metavar="N",
            help="also rank all configurations every N epochs, into log.jsonl")

    add = parser.add_argument_group("run").add_argument
    add("--out", help="run folder; None: runs/<stage>-<dataset>")
    add("--seed", type=number(int, 0, 2 ** 62), default=0, help="origin of every random stream")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda (ranks take the GPUs in turn), cuda:1")
    add("--kernel", choices=["auto", "fused", "native"], default="auto",
        help="of the layers; auto: fused (kernels/) on a CPU, native ops on a GPU")
    add("--amp", choices=["off", "bf16", "fp16"], default="off",
        help="autocast of the network; scores and statistics stay in full precision")
    add("--threads", type=number(int, 1, 1024), default=torch.get_num_threads(),
        help="of the CPU, for each process")
    return parser


def fill_defaults(args: argparse.Namespace, search: bool) -> argparse.Namespace:
    """Give the protocol's value to every setting that was left open."""
    for name, value in protocol(args.dataset, args.arch).items():
        if name in args and getattr(args, name) is None:
            if isinstance(value, tuple):
                value = value[0] if search else value[1]
            setattr(args, name, value)
    return args


def stream_seed(seed: int, *key: str | int) -> int:
    """A 63-bit seed for the random stream named by `key`, e.g. ("order", supernet, epoch).

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
rank = int(os.environ.get("RANK", 0))
world = int(os.environ.get("WORLD_SIZE", 1))
progress = partial(tqdm, disable=True if rank else None, leave=False)  # None: quiet in a file


def join_ranks() -> None:
    """Join the other ranks, if there are any. All but rank 0 print nothing but errors.

    The backend is gloo on GPUs, too: what is exchanged are small tensors that the CPU needs, and
    nccl lets no two ranks share a GPU.
    """
    if world == 1 or dist.is_initialized():
        return
    if "MASTER_ADDR" not in os.environ:
        raise UserError("WORLD_SIZE is set, but nothing else of torchrun's: start with torchrun, "
                        "or unset RANK and WORLD_SIZE")
    # torchrun's store outlives a restart, and with it the addresses of the processes that died
    store, *_ = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world,
                            timeout=timedelta(days=20))  # who is done first waits
    # gloo's threads may still hold tensors when Python takes itself apart: SIGABRT
    atexit.register(dist.destroy_process_group)
    if rank > 0:
        sys.stdout = open(os.devnull, "w")


def barrier() -> None:
    """Wait for all ranks."""
    if world > 1:
        dist.barrier()


def choose_device(device: str) -> str:
    """`device`, or this rank's share of it: ranks take the GPUs in turn. UserError if it fails."""
    if device == "cuda" and world > 1:
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        device = f"cuda:{local_rank % max(torch.cuda.device_count(), 1)}"
    try:
        torch.zeros(1, device=device)
    except Exception as error:  # torch raises many kinds
        raise UserError(f"--device {device}: {str(error).splitlines()[0]}") from error
    return device


def keep_freed_memory() -> None:
    """Let glibc keep what is freed. It would return large tensors to the system and get them back
    page by page: up to 1.4x of a training step with native ops."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # not glibc
        return
    mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD
    mallopt(-4, 0)  # M_MMAP_MAX


# ------------------------------------------------------------------------------------- data

@dataclass(frozen=True)
class Images:
    """Images with labels, of which `rows` are this set's.

    images: uint8 (N,H,H,3), labels: int64 (N,), rows: int64 (n,), all on the device or, if the
    images are memory-mapped, on the CPU; device: where batches are made; mean, std: float32 (3,)
    of the training pixels, 0..255; flip: whether training batches may be mirrored; crop: how
    they are cropped, "pad" from a border of zeros or "resized".
    """
    images: torch.Tensor
    labels: torch.Tensor
    rows: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor
    num_classes: int
    flip: bool
    crop: str
    device: str

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def size(self) -> int:
        return self.images.shape[1]

    def subset(self, index: np.ndarray | torch.Tensor) -> Images:
        """Those at these places of this set, int64 (n,)."""
        return replace(self, rows=self.rows[torch.as_tensor(index, device=self.rows.device)])

    def batch(self, index: torch.Tensor,
              crops: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised images, float32 (B,3,H,H) in channels_last memory, and labels, int64 (B,).

        index: int64 (B,); crops: for augmented images, what CROPS drew for them.
        """
        rows = self.rows[index]
        images = self.images[rows].to(self.device, non_blocking=True)
        labels = self.labels[rows].to(self.device, non_blocking=True)
        if crops is not None:
            images = CROPS[self.crop][1](images, crops)

        # whole rows at once: with an innermost dimension of 3, torch is 6 times slower
        mean = self.mean.repeat(self.size)
        std = self.std.repeat(self.size)
        images = ((images.flatten(2) - mean) / std).view(images.shape)
        return images.permute(0, 3, 1, 2), labels  # NHWC seen as NCHW: channels_last

    def num_batches(self, batch_size: int) -> int:
        """Batches of near-equal size in a pass: ceil(n / batch_size), or fewer so that none is of a
        single image, which has no batch statistics where a feature map is 1x1."""
        return max(min(math.ceil(len(self) / batch_size), len(self) // 2), 1)

    def passes(self, batch_size: int, order: torch.Generator,
               crops: torch.Generator | None = None) -> Iterator:
        """Batches without end: pass after pass over all images, each in a new random `order`,
        augmented if there is a stream for the `crops`. What is random is drawn and moved to the
        device once a pass, so that no batch makes the CPU wait for the device."""
        count = self.num_batches(batch_size)
        while True:
            index = torch.randperm(len(self), generator=order).to(self.rows.device)
            index = index.tensor_split(count)
            if crops is None:
                yield from map(self.batch, index)
            else:
                drawn = CROPS[self.crop][0](len(self), self.size, self.flip, crops)
                yield from map(self.batch, index, drawn.to(self.device).tensor_split(count))

    def evaluation_batches(self, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches that cover every image once, always the same for the same n: shuffled and of
        near-equal size, since supernets normalise with the statistics of the batch, and a
        class-sorted batch or a last one of three images would falsify them."""
        batches = self.passes(batch_size, stream(0, "evaluation"))
        for _ in progress(range(self.num_batches(batch_size)), "evaluating"):
            yield next(batches)


def draw_pad_crops(count: int, size: int, flip: bool, rng: torch.Generator) -> torch.Tensor:
    """For `pad_crop`, from a border of H/8 zeros (4 at 32x32, as in the paper)."""
    flips = torch.rand(count, 1, generator=rng) < (0.5 if flip else 0.0)
    places = torch.randint(0, 2 * (size // 8) + 1, (count, 2), generator=rng)
    return torch.cat([places, flips], 1)


def pad_crop(images: torch.Tensor, crops: torch.Tensor) -> torch.Tensor:
    """Crop each image at its own place from a border of H/8 zeros, then mirror some.

    images: uint8 (B,H,H,3); crops: int64 (B,3): top and left in 0..2*(H/8), flip.
    """
    count, size, _, _ = images.shape
    top, left, flips = crops[:, :, None].unbind(1)
    pad = size // 8
    padded = F.pad(images, (0, 0, pad, pad, pad, pad))

    # the place of every pixel, (B,H,H), among all pixels of the padded images in a row
    line = torch.arange(size, device=images.device).expand(count, size)
    columns = left + torch.where(flips > 0, size - 1 - line, line)
    rows = top + line
    rows = rows + torch.arange(count, device=images.device)[:, None] * padded.shape[1]
    pixels = rows[:, :, None] * padded.shape[2] + columns[:, None, :]
    return padded.view(-1, 3)[pixels.flatten()].view(images.shape)  # 1.6x of three indices


def draw_resized_crops(count: int, size: int, flip: bool, rng: torch.Generator) -> torch.Tensor:
    """For `resized_crop`, with torchvision's ranges: 8 to 100 % of the area, 3:4 to 4:3."""
    flips = torch.rand(count, 1, generator=rng) < (0.5 if flip else 0.0)
    area, ratio, *places = torch.rand(4, count, generator=rng)
    area = 0.08 + 0.92 * area
    ratio = torch.exp((2 * ratio - 1) * math.log(4 / 3))
    sides = torch.stack([(area / ratio).sqrt(), (area * ratio).sqrt()], 1).clamp(max=1)
    return torch.cat([torch.stack(places, 1) * (1 - sides), sides, flips], 1)


def resized_crop(images: torch.Tensor, crops: torch.Tensor) -> torch.Tensor:
    """Cut a box out of each image, resize it bilinearly to the image's size, mirror some.

    images: uint8 (B,H,H,3); crops: float32 (B,5): top, left, height, width in 0..1, flip. -> float.
    """
    top, left, height, width, flip = crops.unbind(1)
    zero = torch.zeros_like(top)
    boxes = torch.stack([width * (1 - 2 * flip), zero, 2 * left + width - 1,
                         zero, height, 2 * top + height - 1], 1).view(-1, 2, 3)
    images = images.permute(0, 3, 1, 2).float()
    grid = F.affine_grid(boxes, images.shape, align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return images.permute(0, 2, 3, 1)


CROPS = {"pad": (draw_pad_crops, pad_crop), "resized": (draw_resized_crops, resized_crop)}


def load_dataset(args: argparse.Namespace) -> tuple[Images, Images]:
    """(train, test) of --dataset on --device, cut to --num-train, resampled to --image-size."""
    arrays = read_arrays(args.dataset, Path(args.data_dir), args.image_size)
    arrays = choose_images(arrays, args)
    return make_images(arrays, protocol(args.dataset, args.arch), args.device)


def read_arrays(name: str, data_dir: Path, size: int | None) -> dict[str, np.ndarray]:
    """The images and labels of a data set, from its cache or to be cached: uint8 (N,H,H,3)
    train_images, int64 (N,) train_labels, and test_images, test_labels alike."""
    if name == "digits":
        return read_digits()
    if name in DATASET_PROTOCOLS:
        size = size if name == "food101" else 32
        cache = data_dir / (f"{name}-{size}" if name == "food101" else name)
        open_part = partial(open_torchvision, name, data_dir)
    elif os.path.isdir(name):
        folder = Path(name).resolve()
        size = size or 32
        cache = data_dir / f"{folder.name}-{folder_digest(folder)}-{size}"
        open_part = partial(open_folder, folder)
    else:
        raise UserError(f"unknown data set {name!r}: choose {', '.join(DATASET_PROTOCOLS)}, or "
                        "give a folder that holds train/<class>/ and test/<class>/")
    if not cache.exists():
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            with lock(data_dir / f"{cache.name}.lock"):  # ranks and other runs wait for the first
                if not cache.exists():
                    write_cache(cache, open_part, size)
        except OSError as error:
            raise UserError(f"cannot write the cache {cache}: {error}") from error
    return read_cache(cache)


def read_digits() -> dict[str, np.ndarray]:
    """scikit-learn's 1,797 handwritten digits (8x8, greys 0..16) as 32x32 RGB, split 80:20."""
    from sklearn.datasets import load_digits
    grey, labels = load_digits(return_X_y=True)
    grey = torch.from_numpy(grey).view(-1, 1, 8, 8) * (255 / 16)
    grey = F.interpolate(grey, size=(32, 32), mode="bilinear")
    images = grey.round().byte().permute(0, 2, 3, 1).repeat(1, 1, 1, 3).numpy()
    train, test = stratified_split(labels, round(0.8 * len(labels)), seed=0)
    return {"train_images": images[train], "train_labels": labels[train],
            "test_images": images[test], "test_labels": labels[test]}


def open_torchvision(name: str, data_dir: Path, part: str) -> Sequence:
    """A part ("train" or "test") of a torchvision data set, downloaded into `data_dir` unless its
    files are there: a sequence of (PIL image, label)."""
    from torchvision import datasets, transforms
    try:
        if name == "food101":
            return datasets.Food101(data_dir, split=part, download=True)
        train = part == "train"
        if name == "fashion-mnist":  # 28x28: a border of zeros
            return datasets.FashionMNIST(data_dir, train, transforms.Pad(2), download=True)
        source = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
        return source(data_dir, train, download=True)
    except Exception as error:  # network, archive, checksum: the advice is the same
        raise UserError(f"cannot download {name} ({str(error) or type(error).__name__}): put its "
                        f"official files into {data_dir}, as torchvision keeps them") from error


def folder_digest(folder: Path) -> str:
    """Names, sizes and times of all files below a folder, links followed: a cache made of other
    files has another name."""
    digest = hashlib.sha256(os.fsencode(folder))
    paths = []
    for parent, _, names in os.walk(folder, followlinks=True):
        paths += [os.path.join(parent, name) for name in names]
    for path in sorted(filter(os.path.exists, paths)):  # a link may lead nowhere
        state = os.stat(path)
        digest.update(repr((os.fsencode(path), state.st_size, state.st_mtime_ns)).encode())
    return digest.hexdigest()[:8]


def open_folder(folder: Path, part: str) -> Sequence:
    """A part of a folder <part>/<class>/, as `open_torchvision`; torchvision's ImageFolder says
    what counts as a class and an image."""
    from torchvision.datasets.folder import ImageFolder, find_classes
    try:
        dataset = ImageFolder(folder / part, loader=open_image)
        classes, _ = find_classes(folder / "train")
        if dataset.classes != classes or len(classes) < 2:
            raise FileNotFoundError(f"{part}/ holds {', '.join(dataset.classes)}")
        return dataset
    except FileNotFoundError as error:
        raise UserError(f"{folder}: expected images in train/<class>/ and test/<class>/, of the "
                        f"same two or more classes: {error}") from error


def open_image(path: str):
    """The image as RGB; no formats but these: some would start a program."""
    from PIL import Image
    warnings.simplefilter("error", Image.DecompressionBombWarning)  # over 89 million pixels
    try:
        with Image.open(path, formats=("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")) as image:
            return image.convert("RGB")  # reads it
    except Exception as error:  # a damaged file raises many kinds
        raise UserError(f"cannot read {path}: {error}") from error


def read_squares(dataset: Sequence, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """The centre squares of (PIL image, label), uint8 (size,size,3), read in parallel."""
    from PIL import Image, ImageOps

    def read(i: int) -> tuple[np.ndarray, int]:
        image, label = dataset[i]
        image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BOX)
        return np.asarray(image), label

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(dataset), 256):  # not all at once: they would fill the memory
            yield from pool.map(read, range(start, min(start + 256, len(dataset))))


def write_cache(cache: Path, open_part: Callable[[str], Sequence], size: int) -> None:
    """The folder `cache`: {train,test}_{images,labels}.npy. It appears when it is complete."""
    temporary = cache.with_name(f"tmp-{cache.name}")
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed run
    temporary.mkdir()
    for part in ("train", "test"):
        dataset = open_part(part)
        shape = (len(dataset), size, size, 3)
        if math.prod(shape) > shutil.disk_usage(temporary).free:  # a full disk would be SIGBUS
            raise OSError(f"{math.prod(shape) / 2 ** 30:.1f} GiB of images do not fit the disk")
        images = np.lib.format.open_memmap(temporary / f"{part}_images.npy", "w+", np.uint8, shape)
        labels = np.empty(len(dataset), np.int64)
        squares = progress(read_squares(dataset, size), f"reading {part}", total=len(dataset))
        for i, (image, label) in enumerate(squares):
            images[i] = image
            labels[i] = label
        images.flush()
        np.save(temporary / f"{part}_labels.npy", labels)
    os.rename(temporary, cache)


def read_cache(cache: Path) -> dict[str, np.ndarray]:
    """The arrays of a cache, memory-mapped if they take more than 4 GiB. UserError if they are not
    what `read_arrays` promises."""
    arrays = {}
    try:
        for part in ("train", "test"):
            # "c": what torch may write to, though nobody does, without changing the file
            images = np.load(cache / f"{part}_images.npy", mmap_mode="c")
            labels = np.load(cache / f"{part}_labels.npy")
            if images.dtype != np.uint8 or images.shape[1:] != (images.shape[1],) * 2 + (3,):
                raise ValueError(f"{part}_images: {images.dtype} {images.shape}, not uint8 NHHC")
            if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
                raise ValueError(f"{part}_labels: {labels.dtype} {labels.shape}, not integers (N,)")
            arrays[f"{part}_images"] = images if images.nbytes > 2 ** 32 else np.array(images)
            arrays[f"{part}_labels"] = labels.astype(np.int64)
        if arrays["test_images"].shape[1:] != arrays["train_images"].shape[1:]:
            raise ValueError("test_images are of another size than train_images")
        classes = np.unique(arrays["train_labels"]).tolist()
        if classes != list(range(len(classes))) or not set(arrays["test_labels"]) <= set(classes):
            raise ValueError("labels: not 0..K-1, each among the training images")
    except Exception as error:  # a damaged file raises many kinds
        raise UserError(f"{cache} is not a usable cache ({error}): delete it to have it made "
                        "anew") from error
    return arrays


def choose_images(arrays: dict[str, np.ndarray], args: argparse.Namespace) -> dict[str, np.ndarray]:
    """The arrays cut to --num-train, stratified by class, and resampled to --image-size."""
    labels = arrays["train_labels"]
    classes = int(labels.max()) + 1
    if classes < 2:
        raise UserError(f"{args.dataset}: there is only one class, a classifier needs two")
    if (args.num_train or 0) > len(labels):
        raise UserError(f"--num-train {args.num_train}: there are {len(labels)} training images")
    if args.num_train not in (None, len(labels)):
        chosen, _ = stratified_split(labels, args.num_train, stream_seed(args.seed, "subset"))
        if len(np.unique(labels[chosen])) < classes:
            raise UserError(f"--num-train {args.num_train}: too few for each of {classes} classes")
        arrays = arrays | {"train_images": arrays["train_images"][chosen],
                           "train_labels": labels[chosen]}
    if args.image_size:
        arrays = arrays | {name: resample(arrays[name], args.image_size)
                           for name in ("train_images", "test_images")}
    return arrays


def resample(images: np.ndarray, size: int) -> np.ndarray:
    """uint8 (N,H,H,3) -> uint8 (N,size,size,3), each pixel the mean of its area."""
    if images.shape[1] == size:
        return images
    resampled = np.empty((len(images), size, size, 3), np.uint8)
    step = max(1, 2 ** 22 // max(size, images.shape[1]) ** 2)  # all as floats might not fit
    for i in range(0, len(images), step):
        part = torch.from_numpy(images[i:i + step]).permute(0, 3, 1, 2).float()
        part = F.interpolate(part, size=(size, size), mode="area")
        resampled[i:i + step] = part.round().byte().permute(0, 2, 3, 1)
    return resampled


def make_images(arrays: dict[str, np.ndarray], recipe: dict,
                device: str) -> tuple[Images, Images]:
    """(train, test) of the arrays; recipe: its "flip" and "crop" say how to augment."""
    pixels = arrays["train_images"]
    pixels = pixels[::math.ceil(pixels.nbytes / 2 ** 30)]  # of a large set not all need be read
    pixel_mean = pixels.mean((0, 1, 2), dtype=np.float64)
    # einsum casts in small pieces: no copy as floats
    square = np.einsum("nhwc,nhwc->c", pixels, pixels, dtype=np.float64, casting="unsafe")
    pixel_std = np.sqrt(np.maximum(square / (pixels.size / 3) - pixel_mean ** 2, 1.0))

    sets = []
    for part in ("train", "test"):
        place = "cpu" if isinstance(arrays[f"{part}_images"], np.memmap) else device
        labels = torch.from_numpy(arrays[f"{part}_labels"]).to(place)
        sets.append(Images(
            images=torch.from_numpy(arrays[f"{part}_images"]).to(place), labels=labels,
            rows=torch.arange(len(labels), device=place),
            mean=torch.from_numpy(pixel_mean).float().to(device),
            std=torch.from_numpy(pixel_std).float().to(device),
            num_classes=int(arrays["train_labels"].max()) + 1, flip=recipe["flip"],
            crop=recipe["crop"], device=device))
    return tuple(sets)


def describe(args: argparse.Namespace, first: Images, second: Images, folder: Path) -> str:
    """What a stage prints as it begins: the network, the images of both sets, the machine."""
    return (f"{args.arch} on {args.dataset}, {len(first)} + {len(second)} images "
            f"{first.size}x{first.size}, {first.num_classes} classes; {world} x {args.device}, "
            f"{args.kernel} kernels, {args.threads} threads; writing to {folder}")


def stratified_split(labels: np.ndarray, first: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split 0..N-1 into index arrays of `first` and N - `first` images, stratified by class."""
    from sklearn.model_selection import train_test_split
    try:
        parts = train_test_split(np.arange(len(labels)), train_size=first, stratify=labels,
                                 random_state=seed % 2 ** 32)
    except ValueError as error:
        raise UserError(f"cannot split {len(labels)} images into {first} and "
                        f"{len(labels) - first}: {error}") from error
    return np.sort(parts[0]), np.sort(parts[1])


def split_for_search(train: Images, args: argparse.Namespace) -> tuple[Images, Images]:
    """The training images, split by class into the part that trains weights and the part that
    validates (paper: half and half). UserError if a part is smaller than a batch."""
    labels = train.labels[train.rows].cpu().numpy()
    first, second = stratified_split(labels, round(args.split * len(train)),
                                     stream_seed(args.seed, "split"))
    if args.batch_size > min(len(first), len(second)):
        raise UserError(f"--batch-size {args.batch_size} is larger than a part of the split "
                        f"({len(first)} training, {len(second)} validation images)")
    for part in (first, second):
        if len(np.unique(labels[part])) < train.num_classes:
            raise UserError(f"--split {args.split}: a class has too few images for both parts")
    return train.subset(first), train.subset(second)


# --------------------------------------------------------------------------- configurations

def enumerate_configs(num_layers: int, num_resolutions: int) -> list[Config]:
    """Every way to cut `num_layers` layers into `num_resolutions` blocks of one layer or more, in
    lexicographic order, the paper's numbering: C(num_layers - 1, num_resolutions - 1) of them."""
    configs = []
    for cuts in itertools.combinations(range(1, num_layers), num_resolutions - 1):
        ends = itertools.pairwise((0, *cuts, num_layers))
        configs.append(tuple(end - start for start, end in ends))
    return configs


def config_name(config: Config) -> str:
    """(5, 3, 2) -> "5,3,2"."""
    return ",".join(map(str, config))


def parse_config(text: str, like: Config | None = None) -> Config:
    """"5,3,2" -> (5, 3, 2); UserError unless these are positive integers and, with `like`, as many
    as there and of the same sum."""
    try:
        config = tuple(int(part) for part in text.strip(" []").split(","))
    except ValueError:
        config = (0,)
    if min(config) < 1:
        raise UserError(f"impossible configuration {text!r}: expected integers like 5,3,2")
    if like and (len(config), sum(config)) != (len(like), sum(like)):
        raise UserError(f"impossible configuration {text!r}: {len(like)} parts are needed that "
                        f"add to {sum(like)}, like {config_name(like)}")
    return config


@dataclass(frozen=True)
class Space:
    """The pooling configurations to choose from; macs: multiply-adds of one image's forward pass,
    also of the default."""
    configs: list[Config]
    default: Config
    macs: dict[Config, int]


def search_space(args: argparse.Namespace, images: Images) -> Space:
    """The configurations of --arch, --num-resolutions, --configs. Where the network knows no
    default for so many resolutions, the default are blocks of near-equal length."""
    network = make_network(args, images, supernet=True, device="meta")
    layers = len(network.layers)
    default = network.default_config
    resolutions = args.num_resolutions or len(default)
    if resolutions > layers:
        raise UserError(f"--num-resolutions {resolutions}: {args.arch} has {layers} layers")
    if resolutions != len(default):
        default = tuple(map(len, np.array_split(range(layers), resolutions)))

    configs = enumerate_configs(layers, resolutions)
    if "configs" in args and args.configs:
        configs = list(dict.fromkeys(parse_config(text, default) for text in args.configs))
    try:
        macs = count_macs(network, [*configs, default], images.size)
    except (RuntimeError, ValueError) as error:  # of torch and of kernels/
        raise UserError(f"{images.size}x{images.size} images are too small for {resolutions} "
                        "resolutions") from error
    return Space(configs, default, macs)


def draw_probabilities(configs: list[Config], draw: str, macs: dict[Config, int]) -> torch.Tensor:
    """pi(c), how often --draw trains each configuration: float64 (C,), of sum 1.

    "uniform": equally (paper, section 3); "cost": in proportion to its multiply-adds; "blocks": n1
    uniformly among those that occur, then n2 among those that occur behind this n1, and so on.
    """
    weights = torch.ones(len(configs), dtype=torch.float64)
    for i, config in enumerate(configs):
        if draw == "cost":
            weights[i] = macs[config]
        elif draw == "blocks":
            for k in range(len(config)):
                possible = [other[k] for other in configs if other[:k] == config[:k]]
                weights[i] /= len(set(possible))
    return weights / weights.sum()


def draw_configs(probabilities: torch.Tensor, count: int, rng: torch.Generator) -> torch.Tensor:
    """`count` independent draws c ~ pi, int64 (count,)."""
    if (probabilities == probabilities[0]).all():  # other random numbers than multinomial's:
        return torch.randint(len(probabilities), (count,), generator=rng)  # those of results/
    return torch.multinomial(probabilities, count, replacement=True, generator=rng)


# --------------------------------------------------------------------------------- networks

kernels = None  # the module kernels/, where `choose_kernel` chose it


def choose_kernel(kernel: str, device: str) -> str:
    """Let the networks use the kernels that --kernel asks for; "fused" or "native", what it is now.

    auto: fused on a CPU; native on a GPU, where nobody has measured it. UserError if it must be
    fused and cannot be built; with auto that is a warning.
    """
    global kernels
    kernels = None
    if kernel == "native" or (kernel == "auto" and torch.device(device).type != "cpu"):
        return "native"
    try:
        import kernels as module
        module.load()
    except (ImportError, RuntimeError) as error:  # BuildError is a RuntimeError
        if kernel == "fused":
            raise UserError(f"--kernel fused: {error}") from error
        print(f"warning: {error}; native ops are used, slower", file=sys.stderr)
        return "native"
    kernels = module
    return "fused"


def conv3x3(conv: nn.Conv2d, x: torch.Tensor, stride: bool) -> torch.Tensor:
    """A 3x3 convolution without bias that has stride 2 in this call, or not."""
    if kernels:
        return kernels.pool_conv2d(x, conv.weight, "stride" if stride else "none")[0]
    return F.conv2d(x, conv.weight, stride=2 if stride else 1, padding=1)


def batch_norm(channels: int, supernet: bool) -> nn.BatchNorm2d:
    """In a supernet: no affine parameters, batch statistics always, since running ones would mix
    configurations. In a stand-alone network: ordinary."""
    return nn.BatchNorm2d(channels, affine=not supernet, track_running_stats=not supernet)


def make_shortcut(c_in: int, c_out: int, supernet: bool) -> nn.Sequential:
    """The identity, or a 1x1 convolution where the channels change."""
    if c_in == c_out:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(c_in, c_out, 1, bias=False), batch_norm(c_out, supernet))


class Stem(nn.Module):
    """3x3 convolution, BatchNorm, ReLU; large, for images of 64 pixels or more: 7x7 convolution of
    stride 2, BatchNorm, ReLU, 3x3 max-pool of stride 2. The first layer never downsamples."""

    def __init__(self, channels: int, supernet: bool, large: bool = False):
        super().__init__()
        self.large = large
        size, stride = (7, 2) if large else (3, 1)
        self.conv = nn.Conv2d(3, channels, size, stride, size // 2, bias=False)
        self.norm = batch_norm(channels, supernet)

    def forward(self, x: torch.Tensor, downsample: str) -> torch.Tensor:
        if kernels and not self.large:
            return kernels.stem(x, self.conv, self.norm)
        x = F.relu(self.norm(self.conv(x)))
        return F.max_pool2d(x, 3, 2, 1) if self.large else x


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (1x1 convolution where the channels change).

    "maxpool": the pooled input feeds the first convolution and the shortcut. "stride": the first
    convolution has stride 2, and the shortcut starts from every second pixel of every second row,
    which for a 1x1 convolution is stride 2 and for an identity a subsampling without parameters.
    """
    expansion = 1

    def __init__(self, c_in: int, channels: int, supernet: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, channels, 3, padding=1, bias=False)
        self.norm1 = batch_norm(channels, supernet)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = batch_norm(channels, supernet)
        self.shortcut = make_shortcut(c_in, channels, supernet)

    def forward(self, x: torch.Tensor, downsample: str) -> torch.Tensor:
        if kernels:
            return kernels.basic_block(x, self.conv1, self.norm1, self.conv2, self.norm2,
                                       self.shortcut, downsample)
        if downsample == "maxpool":
            x = F.max_pool2d(x, 2)
        y = F.relu(self.norm1(conv3x3(self.conv1, x, stride=downsample == "stride")))
        y = self.norm2(self.conv2(y))
        if downsample == "stride":
            x = x[:, :, ::2, ::2]
        return F.relu(y + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut, 4 times as many channels at its ends; as
    BasicBlock otherwise, the stride on the 3x3 convolution."""
    expansion = 4

    def __init__(self, c_in: int, channels: int, supernet: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, channels, 1, bias=False)
        self.norm1 = batch_norm(channels, supernet)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = batch_norm(channels, supernet)
        self.conv3 = nn.Conv2d(channels, 4 * channels, 1, bias=False)
        self.norm3 = batch_norm(4 * channels, supernet)
        self.shortcut = make_shortcut(c_in, 4 * channels, supernet)

    def forward(self, x: torch.Tensor, downsample: str) -> torch.Tensor:
        if downsample == "maxpool":
            x = F.max_pool2d(x, 2)
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(conv3x3(self.conv2, y, stride=downsample == "stride")))
        y = self.norm3(self.conv3(y))
        if downsample == "stride":
            x = x[:, :, ::2, ::2]
        return F.relu(y + self.shortcut(x))


class AsOneLayer(nn.ModuleList):
    """Modules that count as the first layer, which never downsamples."""

    def forward(self, x: torch.Tensor, downsample: str) -> torch.Tensor:
        for module in self:
            x = module(x, downsample)
        return x


class Network(nn.Module):
    """A network whose pooling is an argument of the call: any call may take any configuration,
    nothing is rebuilt and no state is kept. What makes it searchable:

    layers: modules, layer(x, downsample) with "none" or `self.downsample`, the first always "none";
    head(x): logits of the last layer's output; default_config: whose sum is the number of layers.
    In a supernet BatchNorm has no running statistics (`batch_norm`).
    """
    layers: nn.ModuleList
    default_config: Config
    downsample = "maxpool"

    def downsampling(self, config: Config) -> list[str]:
        """What each layer does first: (2, 1) -> ["none", "none", "maxpool"]."""
        modes = ["none"] * sum(config)
        for layer in itertools.accumulate(config[:-1]):
            modes[layer] = self.downsample
        return modes

    def forward(self, images: torch.Tensor, config: Config) -> torch.Tensor:
        """images: (N,3,H,W) -> logits (N,num_classes)."""
        x = images
        for layer, mode in zip(self.layers, self.downsampling(config)):
            x = layer(x, mode)
        return self.head(x)


RESNETS = {  # block; channels of the stem and the blocks; default; whether the stem and the first
    # block count as one layer (so that ResNet-50's default is 3,4,6,3 as everywhere) or as two
    "resnet20": (BasicBlock, (16,) * 4 + (32,) * 3 + (64,) * 3, (4, 3, 3), False),
    "resnet18": (BasicBlock, (64,) * 3 + (128,) * 2 + (256,) * 2 + (512,) * 2, (3, 2, 2, 2), False),
    "resnet50": (Bottleneck, (64,) * 4 + (128,) * 4 + (256,) * 6 + (512,) * 3, (3, 4, 6, 3), True),
}


class ResNet(Network):
    """ResNet-20 (10 layers: the stem and 9 blocks), ResNet-18 (9: the stem and 8 blocks) or
    ResNet-50 (16 blocks; the stem belongs to the first). Channels never move with the pooling
    (paper, section 3). downsample: "maxpool" or "stride"; None: as --downsample says."""

    def __init__(self, arch: str, num_classes: int, supernet: bool = False, width: float = 1.0,
                 downsample: str | None = None, image_size: int = 32):
        super().__init__()
        block, channels, self.default_config, stem_in_first_block = RESNETS[arch]
        small = arch == "resnet20"
        self.downsample = downsample or ("maxpool" if small else "stride")

        channels = [max(1, round(width * c)) for c in channels]
        layers = [Stem(channels[0], supernet, large=image_size >= 64 and not small)]
        c_in = channels[0]
        for c in channels[1:]:
            layers.append(block(c_in, c, supernet))
            c_in = block.expansion * c
        if stem_in_first_block:
            layers[:2] = [AsOneLayer(layers[:2])]
        self.layers = nn.ModuleList(layers)
        self.classifier = nn.Linear(c_in, num_classes)

    def head(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(x.mean((2, 3)))


# --arch; a network of your own is called like these: (num_classes, supernet=, width=, ...)
ARCHS = {name: partial(ResNet, name) for name in RESNETS}


def make_network(args: argparse.Namespace, images: Images, supernet: bool, seed: int = 0,
                 device: str | None = None) -> Network:
    """The network of --arch for these images, on --device in channels_last; seed: of its initial
    weights, `stream_seed(..., "weights", ...)`."""
    with torch.random.fork_rng(devices=[]), torch.device(device or "cpu"):
        torch.manual_seed(seed)
        network = ARCHS[args.arch](images.num_classes, supernet=supernet, width=args.width,
                                   downsample=args.downsample, image_size=images.size)
    return network.to(device or args.device, memory_format=torch.channels_last)


@torch.no_grad()
def count_macs(network: Network, configs: list[Config], image_size: int) -> dict[Config, int]:
    """Multiply-adds, by torch's own counter, of one image's forward pass with each configuration;
    network: on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode

    @cache  # a layer is counted once at each resolution
    def run(depth: int, shape: torch.Size, mode: str) -> tuple[torch.Size, int]:
        x = torch.zeros(shape, device="meta")
        with FlopCounterMode(display=False) as counter:  # 2 a multiply-add, for 2 images
            y = network.head(x) if mode == "head" else network.layers[depth](x, mode)
        return y.shape, counter.get_total_flops() // 4

    macs = dict.fromkeys(configs, 0)
    for config in macs:
        shape = torch.Size((2, 3, image_size, image_size))
        for depth, mode in enumerate([*network.downsampling(config), "head"]):
            shape, layer_macs = run(depth, shape, mode)
            macs[config] += layer_macs
    return macs


@torch.inference_mode()
def evaluate_configs(network: Network, configs: list[Config],
                     batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
                     amp: str = "off") -> torch.Tensor:
    """The accuracy of each configuration over all (images, labels) batches: float64 (C,).

    Up to their first different pooling, configurations have the same activations, so they are
    walked as a tree of shared prefixes: 2.03x fewer multiply-adds for the 36 of ResNet-20. Exact:
    every layer sees the very inputs it would see in a pass of its own, batch statistics included.
    """
    modes = [network.downsampling(config) for config in configs]

    def walk(x: torch.Tensor, depth: int, members: list[int]) -> None:
        if depth == len(network.layers):
            hits = (network.head(x).argmax(1) == labels).sum()  # stays on the device
            for i in members:
                correct[i] += hits
            return
        for mode in ("none", network.downsample):
            group = [i for i in members if modes[i][depth] == mode]
            if group:
                walk(network.layers[depth](x, mode), depth + 1, group)

    correct = [0] * len(configs)
    count = 0
    for images, labels in batches:
        count += len(labels)
        with autocast(images.device, amp):
            walk(images, 0, list(range(len(configs))))
    return torch.stack(correct).double().cpu() / count


# --------------------------------------------------------------------------------- learning

def autocast(device: torch.device | str, amp: str) -> contextlib.AbstractContextManager:
    """The context of a forward pass: what --amp asks for."""
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast(torch.device(device).type, dtype, enabled=amp != "off")


class Learner:
    """A network that learns: with its SGD and, for --amp fp16, its gradient scaler."""

    def __init__(self, network: nn.Module, args: argparse.Namespace):
        scaled = args.amp == "fp16"
        self.network = network
        self.amp = args.amp
        # fused: the scaler's check for infinities stays on the device
        self.optimizer = torch.optim.SGD(network.parameters(), lr=0.0, momentum=args.momentum,
                                         weight_decay=args.weight_decay, fused=scaled)
        self.scaler = torch.amp.GradScaler(torch.device(args.device).type, enabled=scaled)
        if scaled:  # torch leaves them uninitialised if the scaler skips the first step
            for parameter in network.parameters():
                state = self.optimizer.state[parameter]
                state["momentum_buffer"] = torch.zeros_like(parameter)

    def step(self, images: torch.Tensor, labels: torch.Tensor, config: Config,
             lr: float) -> torch.Tensor:
        """One SGD step; loss and accuracy of the batch, float64 (2,), left on the device."""
        self.optimizer.param_groups[0]["lr"] = lr
        with autocast(images.device, self.amp):
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
        with autocast(images.device, self.amp):
            return accuracy(self.network(images, config), labels)

    def state_dict(self) -> dict:
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


def cpu_weights(network: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of a network, to be saved for any machine."""
    return {name: value.cpu() for name, value in network.state_dict().items()}


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The share of rows whose largest logit is the label's, float64 ()."""
    return (logits.argmax(1) == labels).double().mean()


def read_steps(steps: list[tuple[str, torch.Tensor]], network: nn.Module) -> torch.Tensor:
    """What an epoch's steps left on the device, as rows on the CPU: float64 (steps, numbers).

    steps: (where, numbers). TrainingError naming the first step whose numbers are not finite, or
    the last one if the network's weights are not.
    """
    if not steps:  # of a supernet that was never drawn
        return torch.zeros(0, 3, dtype=torch.float64)
    advice = "the checkpoint of the last epoch is kept; a smaller learning rate usually helps"
    values = torch.stack([numbers for _, numbers in steps]).cpu()
    for (where, _), row in zip(steps, values):
        if not row.isfinite().all():
            raise TrainingError(f"the loss or an accuracy is not finite at {where}; {advice}")
    if not all(value.isfinite().all() for value in network.state_dict().values()):
        raise TrainingError(f"a weight is not finite at {steps[-1][0]}; {advice}")
    return values


def cosine(first: float, last: float, epoch: int, epochs: int) -> float:
    """Learning rate of `epoch` (0-based), from `first` towards `last`."""
    return last + (first - last) * (1 + math.cos(math.pi * epoch / epochs)) / 2


def train_alone(path: Path, args: argparse.Namespace, train: Images, test: Images, config: Config,
                seed: int, bar: tqdm) -> None:
    """Stages 1 and 3: train a network of its own, from scratch or from where it was interrupted.

    Protocol (paper): SGD, learning rate x0.1 at 40, 60, 80 and 90 % of the epochs, the accuracy of
    the last epoch on the test images. Writes `path`, *.pt, the checkpoint ("network": the weights),
    and, when it is finished, *.json: config, seed, test_accuracy, history (an entry an epoch).
    """
    name = config_name(config)
    steps = train.num_batches(args.batch_size)
    learner = Learner(make_network(args, train, False, stream_seed(seed, "weights")), args)
    history = []
    if path.exists():
        state = load(path)
        learner.load_state_dict(state)
        history = state["history"]
    bar.update(len(history) * steps)

    for epoch in range(len(history), args.epochs):
        start = time.perf_counter()
        drops = [epoch >= part * args.epochs for part in (0.4, 0.6, 0.8, 0.9)]
        lr = args.lr * 0.1 ** sum(drops)
        order = stream(seed, "order", epoch)
        crops = stream(seed, "crops", epoch)
        batches = train.passes(args.batch_size, order, crops)
        learner.network.train()
        numbers = []
        shares = []
        for step in range(steps):
            images, labels = next(batches)
            place = f"epoch {epoch + 1}, step {step + 1}, configuration {name}, seed {seed}"
            numbers.append((place, learner.step(images, labels, config, lr)))
            shares.append(len(labels) / len(train))
            bar.update()
        shares = torch.tensor(shares, dtype=torch.float64)
        loss, train_accuracy = (shares @ read_steps(numbers, learner.network)).tolist()
        seconds = time.perf_counter() - start
        history.append({"epoch": epoch + 1, "train_loss": loss, "train_accuracy": train_accuracy,
                        "lr": lr, "seconds": seconds, "images_per_second": len(train) / seconds})
        save(path, learner.state_dict() | {"history": history})
        show_epoch(bar, history, args.epochs, f"{name} seed {seed}  ")

    batches = test.evaluation_batches(args.batch_size)
    accuracies = evaluate_configs(learner.network.eval(), [config], batches, args.amp)
    save(path.with_suffix(".json"), {"config": name, "seed": seed,
                                     "test_accuracy": accuracies.item(), "history": history})


def train_pairs(folder: Path, args: argparse.Namespace, train: Images, test: Images,
                pairs: list[tuple[Config, int]]) -> None:
    """Stages 1 and 3: train this rank's (configuration, seed) pairs, but for the finished ones.
    Rank 0 writes results.csv. Returns when all ranks are done."""
    networks = folder / "networks"
    networks.mkdir(exist_ok=True)
    steps = args.epochs * train.num_batches(args.batch_size)
    bar = progress(total=len(pairs) * steps, unit="step")
    for config, seed in pairs:
        path = networks / f"{config_name(config)}-{seed}.pt"
        if path.with_suffix(".json").exists():
            bar.update(steps)
            continue
        train_alone(path, args, train, test, config, seed, bar)
        if rank == 0:
            collect_results(folder)
    bar.close()
    barrier()


# --------------------------------------------------------------------------- the run folder

@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that takes the place of `path` when the block ends without an error, so
    that no reader, no kill and no power cut ever meets half a file. One writer at a time."""
    temporary = path.with_name(f"tmp-{path.name}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # the latter is torch's
        raise OSError(f"cannot write {path}, is the disk full? ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def lock(path: Path, wait: bool = True):
    """The file `path`, open and locked until it is closed: by the kernel, if its process dies.
    BlockingIOError without `wait` if another one has it."""
    import fcntl
    file = open(path, "a")
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    return file


def save(path: Path, content: dict | list) -> None:
    """As JSON or, for *.pt, with torch.save."""
    with replacing(path) as temporary:
        if path.suffix == ".json":
            temporary.write_text(json.dumps(content, indent=1) + "\n")
        else:
            torch.save(content, temporary)


def load(path: Path) -> dict | list:
    """What `save` wrote; nothing in it is executed. UserError if it is damaged or foreign."""
    try:
        if path.suffix == ".json":
            return dict(json.loads(path.read_text()))
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # many kinds
        raise UserError(f"{path} is damaged or foreign ({str(error)[:80]}): move it away, and the "
                        "command that wrote it goes on without it") from error


def write_log(folder: Path, log: list[dict]) -> None:
    """log.jsonl, whole, a line an epoch."""
    with replacing(folder / "log.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in log))


def show_epoch(bar: tqdm, log: list[dict], epochs: int, label: str = "") -> None:
    """The numbers of the last epoch: beside the bar or, where none is seen, as a line."""
    shown = {key: value for key, value in log[-1].items() if isinstance(value, (int, float))}
    line = label + "  ".join(f"{key} {value:.4g}" for key, value in shown.items())
    bar.set_postfix_str(line[:60], refresh=False)
    if bar.disable:
        left = (epochs - len(log)) * mean(entry["seconds"] for entry in log) / 3600
        print(f"{line}  {left:.2f} h left", flush=True)


# settings that change no result, or only extend it
NOT_COMPARED = {"out", "data_dir", "device", "threads", "ground_truth", "rank_every", "config",
                "seeds", "source"}


class Run:
    """A run folder: `folder`, and `record`, what result.json needs to be redone.

    Opened again with the same settings it continues; UserError, naming the differences, if they
    differ. What does not change a result, or only extends it, may differ; extensible: and these
    settings. The folder belongs to one process (or job of ranks) as long as that lives.
    """

    def __init__(self, stage: str, args: argparse.Namespace, data: tuple[Images, Images],
                 extensible: set[str] = set()):
        self.folder = Path(args.out or f"runs/{stage}-{Path(args.dataset).name}")
        settings = {"stage": stage, "data": fingerprint(data)} | vars(args)
        self.record = {"settings": settings} | environment(args)
        config = self.folder / "config.json"
        if config.exists():
            refuse_other_settings(config, settings, NOT_COMPARED | extensible)
        if rank == 0:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.owned = lock(self.folder / "lock", wait=False)
                save(config, self.record)
            except BlockingIOError as error:
                raise UserError(f"another process is writing to {self.folder}: choose another "
                                "--out, or wait for it") from error
            except OSError as error:
                raise UserError(f"--out {self.folder} is not writable: {error}") from error
        barrier()


def refuse_other_settings(config: Path, settings: dict, ignored: set[str]) -> None:
    """UserError if config.json holds other settings, but for the `ignored`."""
    before = load(config).get("settings", {})
    differing = []
    for name in sorted((before.keys() | settings.keys()) - ignored):
        if before.get(name) != settings.get(name):
            was, now = str(before.get(name)), str(settings.get(name))
            differing.append(f"{name} {was[:20]} there, {now[:20]} now")
    if differing:
        raise UserError(f"{config.parent} holds a run with other settings "
                        f"({'; '.join(differing)}): choose another --out, or delete it")


def fingerprint(data: tuple[Images, Images]) -> str:
    """SHA-256 of the images and labels of both sets, as they are used."""
    digest = hashlib.sha256()
    for images in data:
        for tensor in (images.images, images.labels):
            digest.update(repr(tuple(tensor.shape)).encode())
            digest.update(tensor.cpu().contiguous().numpy())
    return digest.hexdigest()


def environment(args: argparse.Namespace) -> dict:
    """What a result may depend on besides the settings."""
    git = shutil.which("git") and subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    device = torch.backends.cpu.get_cpu_capability()
    if torch.device(args.device).type == "cuda":
        device = torch.cuda.get_device_name(args.device)
    return {"command": shlex.join(sys.argv), "ranks": world, "git": git or None,
            "device_name": device, "versions": {
                "python": platform.python_version(), "torch": torch.__version__,
                "numpy": np.__version__}}


# ------------------------------------------------------------------------ reports and plots

def collect_results(folder: Path) -> list[dict]:
    """results.csv, a row a finished network, from the networks' json files; its rows."""
    columns = ["config", "seed", "test_accuracy", "train_accuracy", "train_loss"]
    rows = []
    for path in (folder / "networks").glob("[0-9]*.json"):  # no tmp-*, of another rank
        network = load(path)
        merged = network["history"][-1] | network
        rows.append({column: merged[column] for column in columns})
    rows.sort(key=lambda row: (row["seed"], parse_config(row["config"])))
    with replacing(folder / "results.csv") as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return rows


def by_config(rows: list[dict]) -> dict[Config, list[float]]:
    """Test accuracies of each configuration, one a seed."""
    accuracies = {}
    for row in rows:
        config = parse_config(row["config"])
        accuracies.setdefault(config, []).append(float(row["test_accuracy"]))
    return accuracies


def spread(values: list[float]) -> float:
    """Sample standard deviation; 0 of a single value."""
    return stdev(values) if len(values) > 1 else 0.0


def read_ground_truth(path: str | None, configs: list[Config]) -> dict[Config, float] | None:
    """Mean test accuracy of each configuration in stage 1's results.csv; None without a path.
    UserError if it is no such table, or lacks one of `configs`."""
    if path is None:
        return None
    try:
        with open(path, newline="") as file:
            accuracies = by_config(list(csv.DictReader(file)))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from error
    except (UserError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is no table with the columns config, test_accuracy "
                        f"({type(error).__name__}: {error})") from error
    missing = [config_name(config) for config in configs if config not in accuracies]
    if missing:
        raise UserError(f"{path} lacks {len(missing)} of {len(configs)} configurations, "
                        f"{missing[0]} for one: train_exhaustive.py writes them")
    return {config: mean(values) for config, values in accuracies.items()}


def rank_metrics(accuracies: dict[Config, float],
                 truth: dict[Config, float]) -> dict[str, float | None]:
    """How well a ranking meets the ground truth: Kendall tau-b, Spearman rho (None where all
    accuracies are equal), the pick's rank (1 = best) and its regret (accuracy lost to the best)."""
    from scipy.stats import kendalltau, spearmanr
    estimated = list(accuracies.values())
    true = [truth[config] for config in accuracies]
    pick = truth[max(accuracies, key=accuracies.get)]
    metrics = {"kendall_tau": None, "spearman_rho": None}
    if len(set(estimated)) > 1 and len(set(true)) > 1:
        metrics = {"kendall_tau": float(kendalltau(estimated, true).statistic),
                   "spearman_rho": float(spearmanr(estimated, true).statistic)}
    return metrics | {"pick_rank": 1 + sum(value > pick for value in true),
                      "regret": max(true) - pick}


def save_ranking(run: Run, space: Space, accuracies: torch.Tensor, owners: list[int],
                 steps: torch.Tensor, validation: Images) -> None:
    """result.json: the ranking, best first (ties keep the paper's order), and the pick.

    accuracies: float64 (C,); owners: the supernet of each; steps: int64 (C,M), of training, by
    configuration and supernet.
    """
    ranking = []
    for i in accuracies.argsort(descending=True, stable=True).tolist():
        config = space.configs[i]
        ranking.append({"config": config_name(config), "accuracy": accuracies[i].item(),
                        "supernet": owners[i], "steps": steps[i].tolist(),
                        "macs": space.macs[config]})
    save(run.folder / "result.json", run.record | {
        "validation_images": len(validation), "ranking": ranking, "pick": ranking[0]["config"],
        "default": config_name(space.default), "metrics": None})


def report_search(run: Run, truth: dict[Config, float] | None) -> None:
    """Print the best ten, the default and the worst, draw ranking.png, say what comes next."""
    if rank > 0:
        return
    result = load(run.folder / "result.json")
    ranking = result["ranking"]
    accuracies = {parse_config(entry["config"]): entry["accuracy"] for entry in ranking}
    if truth:
        result["metrics"] = rank_metrics(accuracies, truth)
        save(run.folder / "result.json", result)
    plot_results(run.folder / "ranking.png",
                 {config: [accuracy] for config, accuracy in accuracies.items()},
                 f"validation accuracy; pick: {result['pick']}", parse_config(result["default"]),
                 truth)

    print("\nrank  configuration  accuracy  supernet  Mmult-adds" + "  ground truth" * bool(truth))
    for place, (entry, config) in enumerate(zip(ranking, accuracies), 1):
        default = entry["config"] == result["default"]
        if place <= 10 or place == len(ranking) or default:
            line = (f"{place:4}  {entry['config']:13}  {entry['accuracy']:8.4f}  "
                    f"{entry['supernet']:8}  {entry['macs'] / 1e6:10.1f}")
            if truth:
                line += f"  {truth[config]:12.4f}"
            print(line + "  default" * default)
    if truth:
        shown = [f"{name} {'undefined' if value is None else format(value, '.4g')}"
                 for name, value in result["metrics"].items()]
        print("against the ground truth:", ", ".join(shown))
    print(f"pick: {result['pick']}   (all of it in {run.folder}/: result.json, *.png)\n"
          f"next: python retrain.py --from {run.folder}")


def save_figure(figure, path: Path) -> None:
    """As PNG; figure: matplotlib's."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, bbox_inches="tight", format="png")


def plot_results(path: Path, accuracies: dict[Config, list[float]], label: str, default: Config,
                 truth: dict[Config, float] | None = None) -> None:
    """Accuracies (one or more a configuration: seeds) as a ranking, for three resolutions over the
    triangle (n1, n2) and, with a ground truth, as a scatter plot against it (paper, figure 3)."""
    from matplotlib.figure import Figure
    triangle = len(default) == 3
    panels = 1 + triangle + (truth is not None)
    figure = Figure(figsize=(6 * panels, 7), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    means = {config: mean(values) for config, values in accuracies.items()}
    plot_ranking(axes[0], accuracies, means, default)
    axes[0].set(xlabel=f"{label}\n(bars: seeds; orange: the default)")
    if triangle:
        plot_triangle(axes[1], means, default)
    if truth:
        plot_against_truth(axes[-1], means, truth)
    save_figure(figure, path)


def plot_ranking(axes, accuracies: dict[Config, list[float]], means: dict[Config, float],
                 default: Config) -> None:
    """A row a configuration, the best on top; of many the best 40 and the default."""
    order = sorted(means, key=means.get, reverse=True)
    shown = [config for i, config in enumerate(order) if i < 40 or config == default]
    for row, config in enumerate(shown):
        color = "tab:orange" if config == default else "tab:blue"
        axes.plot(means[config], row, "o", color=color)
        axes.plot(accuracies[config], [row] * len(accuracies[config]), "|", color=color)
    axes.set_yticks(range(len(shown)), map(config_name, shown), fontsize=7)
    axes.invert_yaxis()
    axes.grid(alpha=0.3)


def plot_triangle(axes, means: dict[Config, float], default: Config) -> None:
    """Configurations of three resolutions by n1 and n2."""
    n1, n2, _ = zip(*means)
    dots = axes.scatter(n1, n2, c=list(means.values()), marker="s", s=500)
    best = max(means, key=means.get)
    axes.plot(*best[:2], "r*", markersize=12, label=f"best: {config_name(best)}")
    axes.plot(*default[:2], "wo", markeredgecolor="k", label=f"default: {config_name(default)}")
    axes.set(xlabel="n1, layers at full resolution", ylabel="n2, layers at half resolution")
    axes.legend()
    axes.figure.colorbar(dots, ax=axes)


def plot_against_truth(axes, means: dict[Config, float], truth: dict[Config, float]) -> None:
    """A dot a configuration: what the search says over what training alone says."""
    for config, value in means.items():
        axes.plot(truth[config], value, "o", color="tab:blue")
        axes.annotate(config_name(config), (truth[config], value), fontsize=6)
    axes.set(xlabel="ground truth: test accuracy trained alone", ylabel="validation accuracy")
