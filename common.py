"""What the stages share: arguments, data, networks, learning, the run folder, reports.

Nothing runs on import. A stage needs this file beside it; the folder kernels/ makes it faster.
"The paper" is Javan, Toews, Pedersoli, "Balanced Mixture of SuperNets for Learning the CNN Pooling
Architecture", arXiv:2306.11982.
"""
from __future__ import annotations

import argparse
import atexit
import contextlib
import copy
import csv
import ctypes
import errno
import hashlib
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from statistics import mean, stdev
from weakref import WeakSet

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

Config = tuple[int, ...]  # a pooling configuration: the number of layers at each resolution
Batch = tuple[Tensor, Tensor]  # images and labels
Arrays = dict[str, np.ndarray]  # a data set: {train,test}_images, {train,test}_labels, classes


# --------------------------------------------------------------------- errors and arguments

class UserError(Exception):
    """A mistake of the user's. `run_script` prints it as one line and exits with code 2."""


class TrainingError(Exception):
    """Training cannot go on. `run_script` prints it as one line and exits with code 1."""


def run_script(main: Callable[[], None]) -> None:
    """Call `main()`. What may be expected to go wrong ends with one line and an exit code."""
    for output in (sys.stdout, sys.stderr):
        if hasattr(output, "reconfigure"):  # a class may have a name that a terminal cannot show
            output.reconfigure(errors="replace")
    try:
        main()
    except (UserError, TrainingError, torch.OutOfMemoryError) as error:  # the last: a GPU's memory
        message = " ".join(str(error).split())
        sys.stderr.write(f"error: {message}\n")  # one write: ranks may fail at the same moment
        sys.exit(2 if isinstance(error, UserError) else 1)
    except OSError as error:  # a full disk, for example
        sys.exit(f"error: {error}; the same command continues from the last checkpoint")
    except KeyboardInterrupt:
        print("interrupted: the same command continues from the last checkpoint", file=sys.stderr)
        sys.exit(130)


# The paper's protocol; where the paper gives a range, a value within it. NETWORK_PROTOCOLS, then
# DATASET_PROTOCOLS, override it. Epochs and lr are pairs: of a search, of training alone.
PAPER = {"epochs": (100, 200), "lr": ([0.1, 0.001], 0.1), "batch_size": 128, "weight_decay": 0.0,
         "temperature": [1.0, 100.0], "decay": 0.9, "image_size": None, "flip": True, "crop": "pad"}
NETWORK_PROTOCOLS = {
    "resnet18": {"epochs": (400, 200), "weight_decay": 5e-4, "temperature": [1.0, 150.0]},
    "resnet50": {"epochs": (400, 200), "weight_decay": 5e-4, "temperature": [1.0, 300.0]},
}
DATASET_PROTOCOLS = {
    "digits": {"epochs": (8, 6), "batch_size": 32, "flip": False},  # minutes on a CPU
    "fashion-mnist": {"flip": False},  # a mirrored shoe is another shoe
    "cifar10": {},
    "cifar100": {},
    "food101": {"epochs": (300, 200), "decay": 0.95, "crop": "resized", "image_size": 224},
}


def protocol(dataset: str, arch: str, search: bool = True) -> dict:
    """The value of every setting that the protocol of a data set and a network decides."""
    settings = PAPER | NETWORK_PROTOCOLS.get(arch, {}) | DATASET_PROTOCOLS.get(dataset, {})
    if dataset == "food101" and arch == "resnet20":
        settings["image_size"] = 64
    for name in ("epochs", "lr"):
        of_search, of_training_alone = settings[name]
        settings[name] = of_search if search else of_training_alone
    return settings


def in_range(kind: type, low: float, high: float = math.inf) -> Callable:
    """An argparse type: a finite `kind` (int or float) from low to high."""
    def parse(text: str):
        value = kind(text)
        if not low <= value <= high or value == math.inf:  # a NaN is in no range
            raise argparse.ArgumentTypeError(f"{text}: must be from {low} to {high}")
        return value
    parse.__name__ = kind.__name__  # argparse's messages name the type so
    return parse


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description, and shows the default of each flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        has_default = action.default not in (None, argparse.SUPPRESS)
        return action.help + (" (default: %(default)s)" if has_default else "")


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the flags of every stage. `parse_arguments` gives it the protocol's defaults,
    and --help with them."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=HelpFormatter, add_help=False,
        usage="%(prog)s [flags]; --help explains them",
        epilog="These defaults are of this --dataset and --arch: --dataset cifar10 --help shows "
               "those of CIFAR-10. Where none is given, the network or the data decide.")
    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="digits", metavar="NAME|FOLDER|NPZ", type=os.path.expanduser,
        help=", ".join(DATASET_PROTOCOLS) + "; a folder with train/<class>/ and test/<class>/ or "
        "val/<class>/; an .npz file as MedMNIST ships them")
    add("--data-dir", default="data", type=os.path.expanduser,
        help="folder of downloaded data sets, of NAME.npz files, and of the cache of image folders")
    add("--test-fraction", type=in_range(float, 0.01, 0.99), metavar="FRACTION",
        help="the part of the images that becomes the test set, where there is none; the same for "
        "every --seed")
    add("--image-size", type=in_range(int, 8, 1024), metavar="N",
        help="resample the images to NxN pixels; folders: 32 unless given, others: their own size")
    add("--num-train", type=in_range(int, 2), metavar="N",
        help="use only N of the training images, stratified by class, the same for every --seed")
    add("--flip", action=argparse.BooleanOptionalAction, help="mirror half of the training images")

    add = parser.add_argument_group("network").add_argument
    add("--arch", choices=ARCHS, default="resnet20", help="the network")
    add("--num-resolutions", type=in_range(int, 1), metavar="R",
        help="resolutions of a configuration; resnet20 has 3, the larger networks 4")
    add("--downsample", choices=["maxpool", "stride"],
        help="a 2x2 max-pool before the layer (resnet20), or the stride of its 3x3 convolution")
    add("--max-macs", type=in_range(float, 0), metavar="TIMES",
        help="no configuration of more than so many times the default's multiply-adds")
    add("--width", type=in_range(float, 0.0625, 16), default=1.0, help="multiplies the channels")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=in_range(int, 1, 10 ** 6), help="passes over the training images")
    add("--batch-size", type=in_range(int, 2, 10 ** 6), help="images of a training step")
    add("--momentum", type=in_range(float, 0, 1), default=0.9, help="of SGD")
    add("--weight-decay", type=in_range(float, 0), help="of SGD")
    add("--amp", choices=["off", "bf16"], default="off",
        help="autocast of the network; scores and statistics keep full precision")

    add = parser.add_argument_group("run").add_argument
    add("--out", type=os.path.expanduser, help="run folder; runs/<stage>-<dataset> unless given")
    add("--seed", type=in_range(int, 0, 2 ** 62), default=0, help="where all randomness starts")
    add("--metric", choices=["accuracy", "balanced"], default="accuracy",
        help="ranks and tests by the accuracy of all images, or by the mean of the classes'")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda (ranks take the GPUs in turn), cuda:1")
    add("--kernel", choices=["auto", "fused", "native"], default="auto",
        help="kernels/, or torch's native ops; auto: the faster one, measured as a run starts")
    add("--threads", type=in_range(int, 1, 1024), default=torch.get_num_threads(),
        help="of the CPU, for each process")
    return parser


def add_search_flags(parser: argparse.ArgumentParser, draw: str) -> None:
    """The flags of both searches; draw: the default of --draw."""
    add = parser.add_argument_group("search").add_argument
    add("--configs", nargs="+", metavar="N,N,N", help="only these configurations")
    add("--lr", type=in_range(float, 0), nargs=2, metavar=("FIRST", "LAST"),
        help="learning rate, which falls by a cosine over the epochs")
    add("--split", type=in_range(float, 0.01, 0.99), default=0.5, metavar="FRACTION",
        help="of the training images, the part that trains weights; the rest validates")
    add("--draw", choices=["cost", "uniform"], default=draw,
        help="how often a step trains each configuration: in proportion to its multiply-adds, or "
        "equally, as in the paper")
    add("--ground-truth", metavar="CSV", type=os.path.expanduser,
        help="results.csv of train_exhaustive.py, to compare the ranking with")
    add("--rank-every", type=in_range(int, 1), metavar="N",
        help="also rank all configurations every N epochs, into log.jsonl")


def add_training_flags(parser: argparse.ArgumentParser, seeds: int) -> None:
    """The flags of stages 1 and 3, which train networks alone; seeds: the default of --seeds."""
    add = parser.add_argument_group("training alone").add_argument
    add("--lr", type=in_range(float, 0),
        help="learning rate; a tenth after 40, 60, 80 and 90 %% of the epochs each")
    add("--seeds", type=in_range(int, 1, 1000), default=seeds, metavar="N",
        help="networks of each configuration, with the seeds --seed, --seed + 1, ...")


def parse_arguments(parser: argparse.ArgumentParser, argv: list[str] | None, search: bool,
                    taken_over: dict = {}) -> Namespace:
    """Parse twice: first the data set and the network, which decide the defaults, then all.
    taken_over: defaults that come before the protocol's (retrain.py --from). The result's
    `defaults` is what each flag would have been."""
    parser.set_defaults(**taken_over)
    first = parser.parse_known_args(argv)[0]
    if first.dataset != taken_over.get("dataset"):  # of other images nothing is known
        taken_over = {name: taken_over[name] for name in taken_over.keys() - {"flip", "image_size"}}
    of_protocol = protocol(first.dataset, first.arch, search) | taken_over
    parser.set_defaults(**{name: of_protocol[name] for name in vars(first) if name in of_protocol})
    parser.add_argument("-h", "--help", action="help", help="show this text and end")
    args = parser.parse_args(argv)
    args.defaults = {name: parser.get_default(name) for name in vars(args)}
    return args


def derive_seed(seed: int, *key: str | int) -> int:
    """The 63-bit seed of the random stream named by `key`, e.g. ("order", supernet, epoch). Each
    purpose and epoch has a stream of its own: changing one setting reshuffles no other stream, and
    a checkpoint need not keep the state of any."""
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, *key: str | int) -> torch.Generator:
    """A CPU generator of random numbers for the stream `key`; see `derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, *key))


# --------------------------------------------------------------------------- many processes

# torchrun starts `world` processes and tells each one its rank. A process alone is rank 0 of 1.
world = int(os.environ.get("WORLD_SIZE") or 1)
rank = int(os.environ.get("RANK") or 0) if world > 1 else 0
progress = partial(tqdm, disable=True if rank else None, leave=False)  # None: quiet in a file


def join_ranks() -> None:
    """Join the other ranks, if there are any. All but rank 0 print nothing but errors. gloo also
    serves GPUs: few small tensors are exchanged, and nccl lets no two ranks share a GPU.
    UserError if torchrun did not start the processes."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS") or "1"
    if tasks != "1" and "SLURM_PROCID" in os.environ and "RANK" not in os.environ:
        raise UserError(f"SLURM started {tasks} tasks that do not know of each other: start with "
                        "torchrun (srun --ntasks-per-node=1 torchrun ...), or with --ntasks=1")
    if world == 1 or dist.is_initialized():
        return
    if not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise UserError("WORLD_SIZE is set, but nothing else of torchrun's: start with "
                        "torchrun, or unset RANK and WORLD_SIZE")
    # Waiting happens inside gloo (C++), where Python's Ctrl-C handler never runs; the default
    # handler ends the process.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if rank == 0:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        print(f"rank 0 of {world} waits for the others at {address}", file=sys.stderr, flush=True)
    # torchrun's store outlives a restart, and with it the addresses of the processes that died
    store, _, _ = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world,
                            timeout=timedelta(days=20))  # the first to finish waits for the last
    # gloo's threads may still hold tensors while Python shuts down, which ends in SIGABRT
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
        local_rank = int(os.environ.get("LOCAL_RANK", rank))
        device = f"cuda:{local_rank % max(torch.cuda.device_count(), 1)}"
    try:
        torch.zeros(1, device=device, dtype=torch.float64)  # mps has no float64, which scores need
    except Exception as error:  # torch raises many kinds
        raise UserError(f"--device {device}: {str(error).splitlines()[0]}") from error
    return device


def keep_freed_memory() -> None:
    """Let glibc keep the memory that is freed. It would return large tensors to the system and get
    them back page by page, which takes up to 1.4x of a training step with native ops."""
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-4, 0)  # M_MMAP_MAX


def prepare_torch(args: Namespace) -> None:
    """Join the ranks; set threads, args.device (the rank's), matrix products and memory."""
    join_ranks()
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    args.device = choose_device(args.device)
    if torch.device(args.device).type == "cuda":  # the stream that torch begins with has no graphs
        torch.cuda.set_stream(torch.cuda.Stream(args.device))
    keep_freed_memory()


# ------------------------------------------------------------------------------------- data

@dataclass(frozen=True)
class Images:
    """Images with labels, of which `rows` are this set's.

    images: uint8 (N,H,H,3), labels: int64 (N,), rows: int64 (n,), all on the device or, if the
    images are memory-mapped, on the CPU; mean, std: float32 (3,) of the training pixels, 0..255;
    classes: their names; flip, crop: whether training batches may be mirrored, and how they are
    cropped, one of CROPS; device: where batches are made.
    """
    images: Tensor
    labels: Tensor
    rows: Tensor
    mean: Tensor
    std: Tensor
    classes: list[str]
    flip: bool
    crop: str
    device: str

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def size(self) -> int:
        return self.images.shape[1]

    def subset(self, index: np.ndarray | Tensor) -> Images:
        """Those at these places of this set, int64 (n,)."""
        return replace(self, rows=self.rows[torch.as_tensor(index, device=self.rows.device)])

    def batch(self, index: Tensor, crops: Tensor | None = None) -> Batch:
        """Normalised images, float32 (B,3,H,H) in channels_last memory, and labels, int64 (B,).
        index: int64 (B,); crops: for augmented images, what CROPS drew for them."""
        rows = self.rows[index]
        images = self.images[rows].to(self.device, non_blocking=True)
        labels = self.labels[rows].to(self.device, non_blocking=True)
        if crops is not None:
            images = CROPS[self.crop][1](images, crops)
        return normalise(images, self.mean, self.std), labels

    def num_batches(self, batch_size: int) -> int:
        """Batches of near-equal size in a pass: ceil(n / batch_size), or fewer so that none is of a
        single image, which has no batch statistics where a feature map is 1x1."""
        return max(min(math.ceil(len(self) / batch_size), len(self) // 2), 1)

    def passes(self, batch_size: int, order: torch.Generator,
               crops: torch.Generator | None = None) -> Iterator[Batch]:
        """Batches without end: pass after pass over all images, each in a new random `order`,
        augmented if there is a stream for the `crops`. Randomness is moved to the device once a
        pass, so that no batch makes the CPU wait for it."""
        count = self.num_batches(batch_size)
        while True:
            index = torch.randperm(len(self), generator=order).to(self.rows.device)
            drawn = [None] * count
            if crops is not None:
                drawn = CROPS[self.crop][0](len(self), self.size, self.flip, crops)
                drawn = drawn.to(self.device).tensor_split(count)
            yield from map(self.batch, index.tensor_split(count), drawn)

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        """Batches that cover every image once, always the same: shuffled and of near-equal size,
        since supernets normalise with the statistics of the batch."""
        batches = self.passes(batch_size, generator(0, "evaluation"))
        for _ in progress(range(self.num_batches(batch_size)), "evaluating"):
            yield next(batches)


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Pixels 0..255, (B,H,H,3) -> float32 (B,3,H,H) in channels_last memory; mean, std: (3,)."""
    size = images.shape[1]
    # whole rows at once: with an innermost dimension of 3, torch is 6 times slower
    rows = (images.flatten(2) - mean.repeat(size)) / std.repeat(size)
    return rows.view(images.shape).permute(0, 3, 1, 2)


def draw_pad_crops(count: int, size: int, flip: bool, rng: torch.Generator) -> Tensor:
    """For `pad_crop`, from a border of H/8 zeros (4 at 32x32, as in the paper)."""
    flips = torch.rand(count, 1, generator=rng) < (0.5 if flip else 0.0)
    places = torch.randint(0, 2 * (size // 8) + 1, (count, 2), generator=rng)
    return torch.cat([places, flips], 1)


def pad_crop(images: Tensor, crops: Tensor) -> Tensor:
    """Crop each image at its own place from a border of H/8 zeros, then mirror some. images: uint8
    (B,H,H,3); crops: int64 (B,3): top and left in 0..2*(H/8), flip."""
    size = images.shape[1]
    pad = size // 8
    top, left, flips = crops.unbind(1)
    padded = F.pad(images, (0, 0, pad, pad, pad, pad))
    windows = padded.unfold(1, size, 1).unfold(2, size, 1)  # no copy: (B,P,P,3,H,H)
    images = windows[torch.arange(len(images), device=images.device), top, left]
    images = torch.where(flips[:, None, None, None] > 0, images.flip(3), images)
    return images.permute(0, 2, 3, 1)


def draw_resized_crops(count: int, size: int, flip: bool, rng: torch.Generator) -> Tensor:
    """For `resized_crop`, with torchvision's ranges: 8 to 100 % of the area, 3:4 to 4:3."""
    flips = torch.rand(count, 1, generator=rng) < (0.5 if flip else 0.0)
    area, ratio, *places = torch.rand(4, count, generator=rng)
    area = 0.08 + 0.92 * area
    ratio = torch.exp((2 * ratio - 1) * math.log(4 / 3))
    sides = torch.stack([(area / ratio).sqrt(), (area * ratio).sqrt()], 1).clamp(max=1)
    return torch.cat([torch.stack(places, 1) * (1 - sides), sides, flips], 1)


def resized_crop(images: Tensor, crops: Tensor) -> Tensor:
    """Cut a box out of each image, resize it bilinearly to the image's size, mirror some. images:
    uint8 (B,H,H,3), to float32; crops: float32 (B,5): top, left, height, width in 0..1, flip."""
    top, left, height, width, flip = crops.unbind(1)
    zero = torch.zeros_like(top)
    boxes = torch.stack([width * (1 - 2 * flip), zero, 2 * left + width - 1,
                         zero, height, 2 * top + height - 1], 1).view(-1, 2, 3)
    images = images.permute(0, 3, 1, 2).float()
    grid = F.affine_grid(boxes, images.shape, align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return images.permute(0, 2, 3, 1)


CROPS = {"pad": (draw_pad_crops, pad_crop), "resized": (draw_resized_crops, resized_crop)}


def load_dataset(args: Namespace) -> tuple[Images, Images]:
    """(train, test) of --dataset on --device, cut to --num-train, at --image-size; without it,
    pictures in folders become 32x32 and all others keep their size. UserError if it cannot be."""
    arrays = read_dataset(args, args.image_size or 32)
    if "test_images" not in arrays:
        arrays = split_test(arrays, args.test_fraction)
    elif args.test_fraction:
        raise UserError(f"--test-fraction: {args.dataset} has a test set of its own")
    labels = arrays["train_labels"]
    if (args.num_train or 0) > len(labels):
        raise UserError(f"--num-train {args.num_train}: there are {len(labels)} training images")
    if args.num_train not in (None, len(labels)):
        seed = derive_seed(0, "subset")  # all seeds search, and retrain, the same images
        chosen, _ = stratified_split(labels, args.num_train, seed, arrays["classes"])
        for name in ("train_images", "train_labels"):
            arrays[name] = arrays[name][chosen]
    size = args.image_size or min(arrays["train_images"].shape[1:3])
    for name in ("train_images", "test_images"):
        arrays[name] = resample(arrays[name], size)
    return make_images(arrays, args.flip, protocol(args.dataset, args.arch)["crop"], args.device)


def read_dataset(args: Namespace, picture_size: int) -> Arrays:
    """--dataset: images, uint8 (N,H,W), (N,H,W,1) or (N,H,W,3), labels, int64 (N,), 0..K-1, and the
    names of the K classes; without test images if --test-fraction is to split them off.
    picture_size: H and W of images that are files."""
    name = args.dataset
    data_dir = Path(args.data_dir)
    npz = name if name.endswith(".npz") else data_dir / f"{name}.npz"
    if name == "digits":
        return read_digits()
    if name not in DATASET_PROTOCOLS and os.path.isdir(name):
        return read_pictures(Path(name), *list_folder(args), picture_size, data_dir / "cache")
    if os.path.isfile(npz):
        return read_npz(args, npz)
    if name in DATASET_PROTOCOLS:
        return read_torchvision(name, data_dir, picture_size)
    raise UserError(f"unknown data set {name[:60]!r}: choose {', '.join(DATASET_PROTOCOLS)}, or "
                    "give a folder of images, an .npz file or the name of one in --data-dir")


def read_digits() -> Arrays:
    """scikit-learn's 1,797 handwritten digits (8x8, greys 0..16) as 32x32 RGB, split 80:20."""
    from sklearn.datasets import load_digits
    grey, labels = load_digits(return_X_y=True)
    grey = torch.from_numpy(grey).view(-1, 1, 8, 8) * (255 / 16)
    grey = F.interpolate(grey, size=(32, 32), mode="bilinear")
    images = grey.round().byte().permute(0, 2, 3, 1).repeat(1, 1, 1, 3).numpy()
    classes = np.arange(10).astype(str)
    return split_test({"train_images": images, "train_labels": labels, "classes": classes}, 0.2)


def read_torchvision(name: str, data_dir: Path, picture_size: int) -> Arrays:
    """CIFAR, Fashion-MNIST (with a border of zeros: 32x32) or Food-101, downloaded into `data_dir`
    unless the official files are there."""
    try:
        from torchvision import datasets
        kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100,
                "fashion-mnist": datasets.FashionMNIST, "food101": datasets.Food101}[name]
        parts = ("train", "test") if name == "food101" else (True, False)
        train, test = (kind(data_dir, part, download=True) for part in parts)
    except Exception as error:  # no torchvision, network, archive, checksum
        reason = str(error).strip() or type(error).__name__
        raise UserError(f"cannot load {name} with torchvision ({reason[:80]}): put its official "
                        f"files into {data_dir}, as torchvision keeps them") from error
    if name == "food101":
        files = [[(path, source.classes[label])
                  for path, label in zip(source._image_files, source._labels)]
                 for source in (train, test)]
        return read_pictures(data_dir / "food-101", *files, picture_size, data_dir / "cache")
    arrays = {"classes": np.array(train.classes)}
    for part, source in (("train", train), ("test", test)):
        images = np.ascontiguousarray(source.data)
        if name == "fashion-mnist":
            images = np.pad(images, ((0, 0), (2, 2), (2, 2)))
        arrays[f"{part}_images"] = images
        arrays[f"{part}_labels"] = np.array(source.targets, np.int64)
    return arrays


def read_npz(args: Namespace, path: str | Path) -> Arrays:
    """A file as MedMNIST ships them: train_images, uint8 (N,H,W), (N,H,W,1) or (N,H,W,3), and
    train_labels, integers (N,) or (N,1); test_* or val_* are alike. UserError for other files."""
    try:
        with np.load(path) as content:
            labels = {part: content[f"{part}_labels"] for part in ("train", "test", "val")
                      if part == "train" or f"{part}_labels" in content}
            for part, values in labels.items():
                if values.dtype.kind not in "iu":
                    raise ValueError(f"{part}_labels: {values.dtype}")
            found = {part: set(values.ravel().tolist()) for part, values in labels.items()}
            classes = sorted(found.pop("train"))
            if len(classes) < 2:
                raise ValueError("train_labels: fewer than two classes")
            arrays = {"classes": np.array(classes).astype(str)}
            for part, source in (("train", "train"), ("test", choose_test(args, classes, found))):
                if source is None:
                    continue
                images = content[f"{source}_images"]
                numbers = labels[source]
                if images.dtype != np.uint8 or images.shape[3:] not in ((), (1,), (3,)) \
                        or images.ndim < 3 or not images.size or numbers.size != len(images):
                    raise ValueError(f"{source}_images: {images.dtype} {images.shape}, "
                                     f"{source}_labels: {numbers.shape}")
                arrays[f"{part}_images"] = images
                arrays[f"{part}_labels"] = np.searchsorted(classes, numbers.ravel())
    except (UserError, MemoryError):
        raise
    except Exception as error:  # a damaged file raises many kinds
        raise UserError(f"cannot use {path} ({str(error)[:100]}): expected train_images, uint8 "
                        "(N,H,W) or (N,H,W,3), train_labels, N integers, and test_* or val_* alike"
                        ) from error
    return arrays


def choose_test(args: Namespace, classes: Iterable, others: dict[str, set]) -> str | None:
    """The name of the part that is the test set: of the parts whose classes are all among those of
    the training images, the one of the most classes; of equals, the first. others: the classes of
    each part. If there is no such part: None with --test-fraction, UserError without."""
    fitting = [name for name, found in others.items() if found and found <= set(classes)]
    if not fitting and not args.test_fraction:
        unlike = [f"{name} has the class {min(found - set(classes))}" if found else
                  f"{name} has no classes" for name, found in others.items()]
        raise UserError(f"{args.dataset} has no test set: no test or val with classes of the "
                        f"training images alone ({brief(unlike) or 'there is neither'}); "
                        "--test-fraction 0.2 splits one off")
    return max(fitting, key=lambda name: len(others[name]), default=None)


def brief(names: Iterable, width: int = 100) -> str:
    """As many of the names as a message has room for."""
    return textwrap.shorten(", ".join(map(str, names)), width, placeholder=" ...")


# what systems make: NAS thumbnails, recycle bins, notebooks' checkpoints, __MACOSX
SYSTEM_FOLDERS = (".", "@", "#", "$", "__", "lost+found")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")  # Pillow starts programs for some others
PART_NAME = re.compile(r"(train|test|val)(ing|id|idation)?([-_ ]?(set|data|images?|\d+))*", re.I)
Labelled = list[tuple[Path, str]]  # image files and the names of their classes


def list_files(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """All files below a folder, sorted by name, through links. Folders that systems make and links
    that lead back up are listed, but not their files."""
    above = (*above, folder.resolve())
    for name in sorted(os.listdir(folder)):
        path = folder / name
        if not os.path.isdir(path) or name.startswith(SYSTEM_FOLDERS) \
                or any(parent.is_relative_to(path.resolve()) for parent in above):
            yield path
        else:
            yield from list_files(path, above)


def list_folder(args: Namespace) -> tuple[Labelled, Labelled]:
    """The training and test images of the folder --dataset, which lie in train/<class>/ and in
    test/<class>/ or val/<class>/ (a name need only begin so: Training_set), or all in <class>/.
    Without test images if --test-fraction is to split them off. Prints what is left out. UserError
    for other layouts."""
    root = Path(args.dataset)
    try:
        files = list(list_files(root))
        images = [path for path in files if path.is_file() and path.name[0] != "."
                  and path.suffix.lower() in EXTENSIONS]
    except OSError as error:
        raise UserError(f"cannot read {root}: {error}") from error
    parts = {"": []}  # images and their classes in each folder of the root and, "", in the root
    for path in images:
        names = path.relative_to(root).parts
        if len(names) > 1:
            parts[""].append((path, names[0]))
            parts.setdefault(names[0], [])
        if len(names) > 2:
            parts[names[0]].append((path, names[1]))
    classes = {part: {name for _, name in images} for part, images in parts.items()}
    trains = [part for part in parts if part.lower().startswith("train") and parts[part]]
    others = {part: classes[part] for word in ("test", "val") for part in parts
              if trains and part.lower().startswith(word)}
    if trains:  # several, or one that may be a class, since it lies beside classes
        unclear = len(trains) > 1 or (len(classes[""]) > 1 and not others)
    else:  # every folder is a class, and none may be named as a part
        unclear = any(map(PART_NAME.fullmatch, classes[""]))
    train = trains[0] if trains else ""
    if unclear or len(classes[train]) < 2:
        found = [f"{name}/ ({brief(sorted(classes[name]), 30)})" if classes[name] else f"{name}/"
                 for name in sorted(classes[""])]
        raise UserError(f"{root}: expected images of two classes or more in one train/<class>/ and "
                        "test/<class>/ or val/<class>/; or in <class>/, where no class is named as "
                        f"these; found images in {brief(found) or 'no folder'}")
    test = choose_test(args, classes[train], others)
    sets = parts[train], parts[test] if test else []
    used = {path for images in sets for path, _ in images}
    unused = [path for path in files if path not in used]
    if unused:
        print(f"left out of {root}: {len(unused)} files or folders, such as "
              f"{unused[0].relative_to(root)}: hidden, of other formats, or not in a class folder "
              "of the training or test set", flush=True)
    return sets


def read_pictures(root: Path, train: Labelled, test: Labelled, size: int, caches: Path) -> Arrays:
    """Image files below `root` as arrays; what takes more than 4 GiB stays on the disk. They are
    kept in the folder `caches`, in a file whose name changes when the files change."""
    paths = [path for path, _ in train + test]
    content = [size]
    try:
        for path in paths:
            state = path.stat()
            content.append((str(path.relative_to(root)), state.st_size, state.st_mtime_ns))
    except OSError as error:
        raise UserError(f"cannot read {root}: {error}") from error
    digest = hashlib.sha256(repr(content).encode()).hexdigest()[:16]
    images = read_squares(paths, size, caches / f"{root.resolve().name[:80]}-{digest}.npy")
    classes = np.unique([name for _, name in train])
    arrays = {"classes": classes}
    parts = {"train": (train, images[:len(train)]), "test": (test, images[len(train):])}
    for part, (pairs, pixels) in parts.items():
        if pairs:
            arrays[f"{part}_images"] = pixels if pixels.nbytes > 2 ** 32 else np.array(pixels)
            arrays[f"{part}_labels"] = np.searchsorted(classes, [name for _, name in pairs])
    return arrays


def read_squares(paths: list[Path], size: int, cache: Path) -> np.ndarray:
    """The images as uint8 (N,size,size,3), memory-mapped from the file `cache`, which is written
    unless it is there. Where it cannot be written or mapped they stay in memory."""
    shape = (len(paths), size, size, 3)
    try:
        if not os.path.exists(cache):
            cache.parent.mkdir(parents=True, exist_ok=True)
            own = cache.with_name(f"{os.getpid()}-{cache.name}")  # ranks write at the same time
            with replacing(own) as temporary, open(temporary, "wb") as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                file.writelines(decode(paths, size))
            os.replace(own, cache)
        images = np.load(cache, mmap_mode="c")  # torch warns of arrays that are read-only
        if (images.shape, images.dtype) != (shape, np.uint8):
            raise ValueError("it holds other images")
        return images
    except OSError as error:
        print(f"the images stay in memory, without a cache: {error}", flush=True)
        return np.fromiter(decode(paths, size), np.dtype((np.uint8, shape[1:])), len(paths))
    except (ValueError, EOFError) as error:
        raise UserError(f"the cache {cache} is damaged ({error}): delete it") from error


def decode(paths: list[Path], size: int) -> Iterator[np.ndarray]:
    """The centre square of each image, uint8 (size,size,3). UserError after the last one, with the
    names of those that cannot be read."""
    unreadable = []

    def read(path: Path) -> np.ndarray:
        try:
            return open_square(path, size)
        except UserError as error:
            unreadable.append(str(error))
            return np.zeros((size, size, 3), np.uint8)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from progress(pool.map(read, paths), "reading images", total=len(paths))
    if unreadable:
        raise UserError(f"mend or remove the files that cannot be read, {len(unreadable)}, of "
                        f"which at most 20 here: {'; '.join(sorted(unreadable)[:20])}")


def open_square(source, size: int) -> np.ndarray:
    """The centre square of an image, uint8 (size,size,3); see `open_image`."""
    from PIL import Image, ImageOps
    return np.asarray(ImageOps.fit(open_image(source), (size, size), Image.Resampling.BOX))


def open_image(source):
    """An image as a viewer shows it, PIL's in RGB: turned as EXIF says, on white where it is
    transparent, 16 bits as 8. source: a path, an open file, an image of PIL's or an array.
    UserError with the path and what is wrong."""
    from PIL import Image, ImageOps, UnidentifiedImageError
    is_path = isinstance(source, (str, os.PathLike))
    try:
        # a file, not its path: Pillow would map a TIFF with the sides that it has when turned
        with open(source, "rb") if is_path else contextlib.nullcontext(source) as content:
            if isinstance(content, np.ndarray):
                image = Image.fromarray(content)
            elif isinstance(content, Image.Image):
                image = content
            else:
                image = Image.open(content, formats=FORMATS)
            image.load()  # turns a TIFF itself, and removes its tag
        orientation = image.getexif().get(0x0112)
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
            pixels = np.asarray(image.convert("I")) >> 8
            if image.format == "TIFF" and image.tag_v2.get(262) == 0:  # white is 0
                pixels = 255 - pixels
            image = Image.fromarray(pixels.astype(np.uint8))
        if image.mode in ("I", "F"):
            raise ValueError("32 bits a pixel: the range is unknown")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        image.info.clear()  # Pillow writes all tags again as it turns, and fails if one is broken
        image.getexif()[0x0112] = orientation
        return ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file raises many kinds
        reason = str(error)[:100]
        if isinstance(error, UnidentifiedImageError):
            reason = f"no image in {', '.join(FORMATS)}"
        raise UserError(f"{source if is_path else type(source).__name__}: {reason}") from error


def split_test(arrays: Arrays, fraction: float) -> Arrays:
    """The arrays with a part of the training images as test images, the same for every --seed."""
    images = arrays["train_images"]
    labels = arrays["train_labels"]
    first = round((1 - fraction) * len(labels))
    train, test = stratified_split(labels, first, 0, arrays["classes"])
    return arrays | {"train_images": images[train], "train_labels": labels[train],
                     "test_images": images[test], "test_labels": labels[test]}


def resample(images: np.ndarray, size: int) -> np.ndarray:
    """uint8 (N,H,W), (N,H,W,1) or (N,H,W,3) -> the centre squares, uint8 (N,size,size,3), of which
    each pixel is the mean of its area."""
    if images.shape[1:] == (size, size, 3):
        return images  # on the disk, maybe
    side = min(images.shape[1:3])
    top, left = ((length - side) // 2 for length in images.shape[1:3])
    images = images.reshape(*images.shape[:3], -1)[:, top:top + side, left:left + side]
    parts = []
    for part in torch.from_numpy(images).split(64):  # all as floats might not fit
        part = part.permute(0, 3, 1, 2).expand(-1, 3, -1, -1).float()
        part = F.interpolate(part, size=(size, size), mode="area")
        parts.append(part.round().byte().permute(0, 2, 3, 1).contiguous())
    return torch.cat(parts).numpy()


def make_images(arrays: Arrays, flip: bool, crop: str, device: str) -> tuple[Images, Images]:
    """(train, test) of the arrays; those that are memory-mapped stay on the disk."""
    pixels = arrays["train_images"]
    pixels = pixels[::math.ceil(pixels.nbytes / 2 ** 30)]  # of a large set not all need be read
    pixel_mean = pixels.mean((0, 1, 2), dtype=np.float64)
    # einsum casts in small pieces: no copy as floats
    squares = np.einsum("nhwc,nhwc->c", pixels, pixels, dtype=np.float64, casting="unsafe")
    pixel_std = np.sqrt(np.maximum(squares / (pixels.size / 3) - pixel_mean ** 2, 1.0))
    pixel_mean, pixel_std = torch.tensor(np.stack([pixel_mean, pixel_std])).float().to(device)

    sets = []
    for part in ("train", "test"):
        images = torch.from_numpy(arrays[f"{part}_images"])
        labels = torch.from_numpy(arrays[f"{part}_labels"])
        rows = torch.arange(len(labels))
        if not isinstance(arrays[f"{part}_images"], np.memmap):
            images, labels, rows = (tensor.to(device) for tensor in (images, labels, rows))
        sets.append(Images(images, labels, rows, pixel_mean, pixel_std, arrays["classes"].tolist(),
                           flip, crop, device))
    return tuple(sets)


def describe(args: Namespace, first: Images, second: Images, folder: Path) -> str:
    """What a stage prints as it begins: the network, the images of both sets, the machine."""
    classes = ", ".join(first.classes[:10]) + ", ..." * (len(first.classes) > 10)
    return (f"{args.arch} on {args.dataset}, {len(first)} + {len(second)} images "
            f"{first.size}x{first.size}, {len(first.classes)} classes ({classes}); "
            f"{world} x {args.device}, {args.kernel} kernels, {args.threads} threads; "
            f"writing to {folder}")


def stratified_split(labels: np.ndarray, first: int, seed: int,
                     classes: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Split 0..N-1 into index arrays of `first` and N - `first` images, stratified by class.
    UserError naming the class that is too small to be in both."""
    from sklearn.model_selection import train_test_split
    parts = ()
    with contextlib.suppress(ValueError):  # sklearn wants one of each class, too
        parts = train_test_split(np.arange(len(labels)), train_size=first, stratify=labels,
                                 random_state=seed % 2 ** 32)
    if not parts or any(len(np.unique(labels[part])) < len(classes) for part in parts):
        counts = np.bincount(labels, minlength=len(classes))
        raise UserError(f"cannot split {len(labels)} images into {first} and {len(labels) - first} "
                        f"with each of {len(classes)} classes in both; the smallest, "
                        f"{classes[counts.argmin()]}, has {counts.min()}")
    return np.sort(parts[0]), np.sort(parts[1])


def split_for_search(train: Images, args: Namespace) -> tuple[Images, Images]:
    """The part of the training images that trains weights and the one that validates."""
    labels = train.labels[train.rows].cpu().numpy()
    first, second = stratified_split(labels, round(args.split * len(train)),
                                     derive_seed(args.seed, "split"), train.classes)
    if args.batch_size > min(len(first), len(second)):
        raise UserError(f"--batch-size {args.batch_size} is larger than a part of the split "
                        f"({len(first)} training, {len(second)} validation images)")
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
    """"5,3,2" -> (5, 3, 2). UserError unless all parts are positive and, with `like`, there are as
    many parts as in `like` and they have the same sum."""
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
    """The pooling configurations to choose from. macs: the multiply-adds of one image's forward
    pass, of every configuration that the network could have."""
    configs: list[Config]
    default: Config
    macs: dict[Config, int]

    def relative_macs(self, config: Config) -> float:
        """The configuration's multiply-adds, where the default's are 1."""
        return self.macs[config] / self.macs[self.default]


def search_space(args: Namespace, images: Images) -> Space:
    """The configurations of --arch, --num-resolutions, --configs and --max-macs. The default of
    another number of resolutions than the network's has blocks of near-equal length."""
    network = make_network(args, images, supernet=True, device="meta")
    layers = len(network.layers)
    default = network.default_config
    resolutions = args.num_resolutions or len(default)
    if resolutions > layers:
        raise UserError(f"--num-resolutions {resolutions}: {args.arch} has {layers} layers")
    if resolutions != len(default):
        default = tuple(map(len, np.array_split(range(layers), resolutions)))

    configs = enumerate_configs(layers, resolutions)
    try:
        macs = count_macs(network, configs, images.size)
    except Exception as error:  # a network of the user's own raises anything
        message = f"--arch {args.arch} fails: {type(error).__name__}: {error}"
        with contextlib.suppress(Exception):
            count_macs(network, [default], 16 * images.size)  # it works with larger images
            message = (f"{images.size}x{images.size} images are too small for {resolutions} "
                       "resolutions: give a larger --image-size, or a smaller --num-resolutions")
        raise UserError(message) from error
    if "configs" in args and args.configs:
        configs = list(dict.fromkeys(parse_config(text, default) for text in args.configs))
    if args.max_macs is not None:
        fewest = min(macs[config] for config in configs) / macs[default]
        configs = [config for config in configs if macs[config] <= args.max_macs * macs[default]]
        if not configs:
            raise UserError(f"--max-macs {args.max_macs}: all configurations have {fewest:.3f} "
                            "times the default's multiply-adds or more")
    return Space(configs, default, macs)


def draw_probabilities(space: Space, draw: str) -> Tensor:
    """pi(c), how often a step trains each configuration: float64 (C,), of sum 1. draw: "cost", in
    proportion to the multiply-adds, so that late layers learn at full resolution, too; "uniform",
    as in the paper."""
    weights = [space.macs[config] if draw == "cost" else 1 for config in space.configs]
    weights = torch.tensor(weights, dtype=torch.float64)
    return weights / weights.sum()


# --------------------------------------------------------------------------------- networks

fused_kernels = None  # the module kernels/, where `use_kernel` chose it


def use_kernel(kernel: str) -> None:
    """Let the networks use "fused" kernels or "native" ops. UserError if the fused kernels cannot
    be built."""
    global fused_kernels
    fused_kernels = None
    if kernel == "fused":
        try:
            import kernels
            if kernels.__file__ != str(Path(__file__).with_name("kernels") / "__init__.py"):
                raise ImportError(f"{kernels} is not the folder kernels/ beside common.py")
            kernels.load()
        except (ImportError, RuntimeError) as error:  # BuildError is a RuntimeError
            raise UserError(f"no fused kernels: {error}") from error
        fused_kernels = kernels


def compare_kernels(args: Namespace, space: Space, images: Images) -> str:
    """"fused" or "native", whichever takes less time for training steps with the default and with
    the configuration of the most multiply-adds. "native", with a warning, if the fused kernels
    cannot be built, fail, or are wrong."""
    try:
        use_kernel("fused")
    except UserError as error:
        print(f"warning: {error}; native ops are used, slower", file=sys.stderr)
        return "native"
    network = make_network(args, images, supernet="split" in args)
    configs = (space.default, max(space.configs, key=space.macs.get))
    on_gpu = torch.device(args.device).type == Graphs.device_type
    count = min(args.batch_size if on_gpu else 8, len(images))  # a GPU is for whole batches
    batch = images.batch(torch.arange(count, device=images.rows.device))
    seconds = dict.fromkeys(("native", "fused"), math.inf)
    try:
        check_fused(network, configs, args.amp, batch)
        learners = {kernel: Learner(network, args) for kernel in seconds}
        for _ in range(5 if on_gpu else 3):  # a graph is replayed from the third time on
            for kernel, learner in learners.items():
                use_kernel(kernel)
                start = time.perf_counter()
                for config in configs:
                    metrics = learner.step(*batch, config, 0.0)
                metrics.cpu()  # waits
                seconds[kernel] = min(seconds[kernel], time.perf_counter() - start)
    except Exception as error:
        if fused_kernels is None:
            raise
        print(f"warning: native ops are used, the fused kernels do not work here ({error}): please "
              "report this, with the output of python kernels/benchmark.py", file=sys.stderr)
        return "native"
    faster = min(seconds, key=seconds.get)
    print(f"{count} images, a training step: {500 * seconds['fused']:.1f} ms with fused "
          f"kernels, {500 * seconds['native']:.1f} ms with native ops: {faster}", flush=True)
    return faster


def check_fused(network: Network, configs: Iterable[Config], amp: str, batch: Batch) -> None:
    """RuntimeError if the fused kernels are wrong. Native ops in float64 give the true logits and
    gradients. The error of the fused kernels must not be much larger than that of native ops."""
    images, labels = (tensor[:32] for tensor in batch)  # enough; float64 takes memory

    def compute(network: Network, amp: str) -> list[tuple[float, Tensor]]:
        """Pairs of the relative error that is allowed, and logits or a gradient."""
        results = []
        for config in configs:
            network.zero_grad()
            with autocast(images.device, amp):
                logits = network(images.to(next(network.parameters()).dtype), config)
            F.cross_entropy(logits, labels).backward()
            results.append((0.02, logits.detach()))
            # If two pixels of a pooling window are equal up to rounding, the gradient may go to
            # either. Two native runs then differ by 2 to 20 % of its norm (1 run in 10).
            results += [(0.5, p.grad) for p in network.parameters() if p.grad is not None]
        return results

    use_kernel("native")
    exact = compute(copy.deepcopy(network).double(), "off")
    native = compute(network, amp)
    use_kernel("fused")
    fused = compute(network, amp)
    for (allowed, ours), (_, theirs), (_, true) in zip(fused, native, exact):
        if not (ours - true).norm() <= 4 * (theirs - true).norm() + allowed * true.norm():
            raise RuntimeError("an output or a gradient is wrong")


def choose_kernel(args: Namespace, folder: Path, record: dict, space: Space,
                  images: Images) -> None:
    """Resolve --kernel, use the kernel, and keep it in config.json. "auto" is the kernel of the run
    that is continued, else what rank 0 measures for all ranks. Where the kernels of a run that is
    continued cannot be built any more, native ops are used, with a warning."""
    settings = record["settings"]
    if settings["kernel"] == "auto":
        choice = [compare_kernels(args, space, images) if rank == 0 else None]
        if world > 1:
            dist.broadcast_object_list(choice)
        settings["kernel"] = choice[0]
    try:
        use_kernel(settings["kernel"])
    except UserError as error:
        if args.kernel == "fused":
            raise
        print(f"warning: {error}; goes on with native ops, to other bits", file=sys.stderr)
    args.kernel = "fused" if fused_kernels else "native"
    if rank == 0:
        save(folder / "config.json", record)


def fused() -> bool:
    """Whether layers use `fused_kernels`. An exported network is for those who lack them."""
    return fused_kernels is not None and not torch.compiler.is_exporting()


def strided(conv: nn.Conv2d, x: Tensor, downsample: str) -> Tensor:
    """conv(x), with twice its stride in this call if `downsample` is "stride". Whatever the module
    has become, it is called, so that its hooks see the call."""
    if fused():
        return fused_kernels.pool_conv(x, conv, "stride" if downsample == "stride" else "none")[0]
    if downsample != "stride":
        return conv(x)
    stride = conv.stride
    conv.stride = tuple(2 * step for step in stride)
    try:
        return conv(x)
    finally:
        conv.stride = stride


def batch_norm(channels: int, supernet: bool) -> nn.BatchNorm2d:
    """In a supernet: without affine parameters, and always with the statistics of the batch, since
    running statistics would mix configurations. In a network trained alone: ordinary."""
    return nn.BatchNorm2d(channels, affine=not supernet, track_running_stats=not supernet)


def make_shortcut(c_in: int, c_out: int, supernet: bool) -> nn.Sequential:
    """The identity, or a 1x1 convolution where the number of channels changes."""
    if c_in == c_out:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(c_in, c_out, 1, bias=False), batch_norm(c_out, supernet))


class Stem(nn.Module):
    """3x3 convolution, BatchNorm, ReLU. A large stem, for images of 64 pixels or more, is a 7x7
    convolution of stride 2, BatchNorm, ReLU and a 3x3 max-pool of stride 2. The stem is the first
    layer, which never downsamples for a configuration."""

    def __init__(self, channels: int, supernet: bool, large: bool = False):
        super().__init__()
        self.large = large
        size, stride = (7, 2) if large else (3, 1)
        self.conv = nn.Conv2d(3, channels, size, stride, size // 2, bias=False)
        self.norm = batch_norm(channels, supernet)

    def forward(self, x: Tensor, downsample: str) -> Tensor:
        if fused() and not self.large:
            return fused_kernels.stem(x, self.conv, self.norm)
        x = F.relu(self.norm(self.conv(x)))
        return F.max_pool2d(x, 3, 2, 1) if self.large else x


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut. "maxpool": the pooled input feeds the first convolution
    and the shortcut. "stride": the first convolution has stride 2, and the shortcut starts from
    every second pixel of every second row."""
    expansion = 1

    def __init__(self, c_in: int, channels: int, supernet: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, channels, 3, padding=1, bias=False)
        self.norm1 = batch_norm(channels, supernet)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = batch_norm(channels, supernet)
        self.shortcut = make_shortcut(c_in, channels, supernet)

    def forward(self, x: Tensor, downsample: str) -> Tensor:
        if fused():
            return fused_kernels.basic_block(x, self.conv1, self.norm1, self.conv2, self.norm2,
                                             self.shortcut, downsample)
        if downsample == "maxpool":
            x = F.max_pool2d(x, 2)
        y = F.relu(self.norm1(strided(self.conv1, x, downsample)))
        y = self.norm2(self.conv2(y))
        if downsample == "stride":
            x = x[:, :, ::2, ::2]
        return F.relu(y + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut, with 4 times as many channels at its end. It
    downsamples as BasicBlock does, with the stride on the 3x3 convolution."""
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

    def forward(self, x: Tensor, downsample: str) -> Tensor:
        if downsample == "maxpool":
            x = F.max_pool2d(x, 2)
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(strided(self.conv2, y, downsample)))
        y = self.norm3(self.conv3(y))
        if downsample == "stride":
            x = x[:, :, ::2, ::2]
        return F.relu(y + self.shortcut(x))


class AsOneLayer(nn.ModuleList):
    """Modules that together count as the first layer."""

    def forward(self, x: Tensor, downsample: str) -> Tensor:
        for module in self:
            x = module(x, downsample)
        return x


class Network(nn.Module):
    """A network whose pooling configuration is an argument of the call. To be searchable it needs:

    layers: modules, called as layer(x, downsample) with "none" or `self.downsample`; the first one
    always with "none". head(x): the logits, from the output of the last layer. default_config: its
    sum is the number of layers; a call without a configuration takes it. In a supernet all norms
    must come from `batch_norm`. No dropout: its random numbers would belong to no stream of --seed,
    and searches evaluate in training mode.
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

    def run(self, images: Tensor, modes: list[str]) -> Tensor:
        """The logits, where each layer does first what `modes` says."""
        x = images
        for layer, mode in zip(self.layers, modes):
            x = layer(x, mode)
        return self.head(x)

    def forward(self, images: Tensor, config: Config | None = None) -> Tensor:
        """images: (N,3,H,W) -> logits (N,num_classes)."""
        return self.run(images, self.downsampling(config or self.default_config))


class FixedPooling:
    """`fix_pooling` mixes this into a network's class: a call takes only images, so that torch.fx
    and what builds on it, which cannot follow another argument, trace the network."""

    def forward(self, images: Tensor) -> Tensor:
        """images: (N,3,H,W) -> logits (N,num_classes)."""
        return self.run(images, self.downsampling(self.default_config))

    def __reduce__(self):  # pickle would look for this class by name, and find the network's
        network = object.__new__(type(self).__bases__[1])
        network.__dict__.update(self.__dict__)
        return fix_pooling, (network, self.default_config)


def fix_pooling(network: Network, config: Config) -> Network:
    """The same network, with the pooling `config` in every call: network(images)."""
    kind = type(network)
    network.default_config = config
    network.__class__ = type(kind.__name__, (FixedPooling, kind), {})
    return network


RESNETS = {  # block; channels of the stem and the blocks; default; whether the stem and the first
    # block count as one layer (so that ResNet-50's default is 3,4,6,3 as everywhere) or as two
    "resnet20": (BasicBlock, (16,) * 4 + (32,) * 3 + (64,) * 3, (4, 3, 3), False),
    "resnet18": (BasicBlock, (64,) * 3 + (128,) * 2 + (256,) * 2 + (512,) * 2, (3, 2, 2, 2), False),
    "resnet50": (Bottleneck, (64,) * 4 + (128,) * 4 + (256,) * 6 + (512,) * 3, (3, 4, 6, 3), True),
}


class ResNet(Network):
    """ResNet-20 (10 layers: the stem and 9 blocks), ResNet-18 (9) or ResNet-50 (16, the stem in the
    first block). Channels never move with the pooling (paper, section 3)."""

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

    def head(self, x: Tensor) -> Tensor:
        return self.classifier(x.mean((2, 3)))


# --arch; a network of your own is called like these: (num_classes, supernet=, width=, ...)
ARCHS = {name: partial(ResNet, name) for name in RESNETS}


def make_network(args: Namespace, images: Images, supernet: bool, seed: int = 0,
                 device: str | None = None) -> Network:
    """The network of --arch for these images, in channels_last; seed: of its initial weights."""
    with torch.random.fork_rng(devices=[]), torch.device(device or "cpu"):
        torch.manual_seed(seed)
        network = ARCHS[args.arch](len(images.classes), supernet=supernet, width=args.width,
                                   downsample=args.downsample, image_size=images.size)
    return network.to(device or args.device, memory_format=torch.channels_last)


def load_network(path: str) -> tuple[Network, dict]:
    """A network that stage 1 or 3 trained, from its networks/<config>-<seed>.pt, and what is needed
    to use it. The network is in evaluation mode, on the CPU, and its pooling is fixed:
    network(images). The dict has arch, width, downsample, config, epochs, image_size, classes
    (their names), mean and std of the pixels."""
    saved = load(Path(path))
    if not isinstance(saved, dict) or "about" not in saved:
        raise UserError(f"{path} is no networks/<config>-<seed>.pt of stage 1 or 3")
    about = saved["about"]
    epochs = len(saved["history"])
    if epochs < about["epochs"]:
        print(f"warning: {path} has learned {epochs} of {about['epochs']} epochs", file=sys.stderr)
    if about["arch"] not in ARCHS:
        raise UserError(f"{path}: add its --arch {about['arch']} to common.ARCHS first")
    network = ARCHS[about["arch"]](len(about["classes"]), width=about["width"],
                                   downsample=about["downsample"], image_size=about["image_size"])
    network.load_state_dict(saved["network"])
    return fix_pooling(network, parse_config(about["config"])).eval(), about


def load_picture(source, about: dict) -> Tensor:
    """An image as the network of `load_network` sees it, float32 (1,3,H,H). source: a path, an open
    file, io.BytesIO, an image of PIL's or an array. UserError if it is no image."""
    pixels = torch.tensor(open_square(source, about["image_size"]))[None]
    return normalise(pixels, torch.tensor(about["mean"]), torch.tensor(about["std"]))


@torch.no_grad()
def count_macs(network: Network, configs: list[Config], image_size: int) -> dict[Config, int]:
    """Multiply-adds of one image's forward pass with each configuration; network: on "meta"."""
    from torch.utils.flop_counter import FlopCounterMode

    @cache  # a layer is counted once at each resolution
    def run(depth: int, shape: torch.Size, mode: str) -> tuple[torch.Size, int]:
        x = torch.zeros(shape, device="meta")
        with FlopCounterMode(display=False) as counter:  # it counts 2 a multiply-add; 2 images
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
def evaluate_configs(network: Network, configs: list[Config], batches: Iterable[Batch],
                     amp: str = "off", metric: str = "accuracy") -> Tensor:
    """The accuracy of each configuration over all (images, labels) batches: float64 (C,). metric:
    "accuracy" of all images, or "balanced", the mean of the classes' accuracies.

    Configurations have the same activations up to the first layer where their pooling differs, so
    they are walked as a tree of prefixes: 2.03x fewer multiply-adds for the 36 of ResNet-20, and
    exactly the same results, batch statistics included."""
    modes = [network.downsampling(config) for config in configs]

    def walk(x: Tensor, depth: int, members: list[int]) -> None:
        if depth == len(network.layers):
            logits = network.head(x)
            by_class = torch.zeros(logits.shape[1], dtype=torch.int64, device=x.device)
            by_class.index_add_(0, labels, (logits.argmax(1) == labels).long())
            for i in members:
                hits[i] += by_class  # stays on the device
            return
        for mode in ("none", network.downsample):
            group = [i for i in members if modes[i][depth] == mode]
            if group:
                walk(network.layers[depth](x, mode), depth + 1, group)

    hits = [0] * len(configs)  # by class: int64 (K,)
    seen = []
    for images, labels in batches:
        seen.append(labels)
        with autocast(images.device, amp):
            walk(images, 0, list(range(len(configs))))
    hits = torch.stack(hits).double().cpu()
    count = torch.cat(seen).bincount(minlength=hits.shape[1]).double().cpu()
    if metric == "accuracy":
        return hits.sum(1) / count.sum()
    return (hits / count).nanmean(1)  # 0 / 0: a class without an image


# --------------------------------------------------------------------------------- learning

def autocast(device: torch.device | str, amp: str) -> torch.autocast:
    """The context of a forward pass: bfloat16 where --amp asks for it."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=amp == "bf16")


class Graphs:
    """Calls functions as CUDA graphs. A training step of ResNet-20 starts about 190 kernels, and
    the CPU needs longer to start them than the GPU to run them; a graph of them is one call.

    A kind of call is a function, a configuration and the shapes of a batch. The first call of a
    kind runs as it is, and cuDNN chooses its algorithms. The second is captured, and from then on
    its graph is replayed. A graph uses the tensors that it was captured with: a batch is copied
    into inputs that stay, and whatever else the function reads or changes must stay, too. Graphs
    run one after the other, so all share inputs and memory, and results are copied. No graph
    is deleted to make room for another: that would free memory of cuBLAS that the others use.
    """
    device_type = "cuda"
    most = 600  # graphs of a process; kinds that come later run as they are
    usable = True  # until a capture fails
    alive = WeakSet()
    pool = None
    inputs: dict[tuple, list[Tensor]] = {}  # by their shapes

    def __init__(self, device: torch.device):
        self.enabled = device.type == Graphs.device_type
        self.calls = Counter()
        self.captured = {}  # by kind: graph, inputs, result

    def __call__(self, function: Callable, config: Config, *batch: Tensor) -> Tensor:
        """function(*batch, config)"""
        kind = (function.__name__, config, tuple(tensor.shape for tensor in batch))
        self.calls[kind] += 1
        if self.enabled and self.calls[kind] == 2:
            self.capture(kind, function, config, batch)
        if kind not in self.captured:
            return function(*batch, config)
        graph, inputs, result = self.captured[kind]
        for own, given in zip(inputs, batch):
            own.copy_(given)
        graph.replay()
        return result.clone()

    def capture(self, kind: tuple, function: Callable, config: Config, batch: Batch) -> None:
        """Record what a call runs on the GPU, and run none of it. Where that fails, as it may with
        a network of the user's own, a warning is printed, and nothing is captured any more."""
        if not Graphs.usable or len(Graphs.alive) >= Graphs.most:
            return
        if not Graphs.alive:  # torch refuses the pool of graphs that are gone
            Graphs.pool = torch.cuda.graph_pool_handle()
        inputs = Graphs.inputs.setdefault(kind[2], [tensor.clone() for tensor in batch])
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, Graphs.pool, torch.cuda.current_stream()):
                result = function(*inputs, config)
        except Exception as error:
            Graphs.usable = False
            reason = str(error).partition("\n")[0]
            print(f"warning: no CUDA graphs, slower steps: {reason}", file=sys.stderr)
            return
        Graphs.alive.add(graph)
        self.captured[kind] = graph, inputs, result


class Learner:
    """A network that learns, with its SGD. On a GPU it calls its steps as graphs."""

    def __init__(self, network: nn.Module, args: Namespace):
        self.network = network
        self.amp = args.amp
        self.optimizer = torch.optim.SGD(network.parameters(), lr=0.0, momentum=args.momentum,
                                         weight_decay=args.weight_decay)
        self.begin_graphs()

    def begin_graphs(self) -> None:
        """Forget all graphs. On a GPU, make what they will read and change: the learning rate,
        which only SGD's fused kernel leaves on the GPU, and momenta of zero, which are as none."""
        device = next(self.network.parameters()).device
        self.graphs = Graphs(device)
        settings = self.optimizer.param_groups[0]
        settings["fused"] = self.graphs.enabled or None
        if self.graphs.enabled:
            settings["lr"] = torch.zeros((), device=device)
            for weight in self.network.parameters():
                state = self.optimizer.state[weight]
                state.setdefault("momentum_buffer", torch.zeros_like(weight))

    def step(self, images: Tensor, labels: Tensor, config: Config, lr: float) -> Tensor:
        """One SGD step. Loss and accuracy of the batch, float64 (2,), left on the device."""
        settings = self.optimizer.param_groups[0]
        if self.graphs.enabled:
            settings["lr"].fill_(lr)
        else:
            settings["lr"] = lr
        return self.graphs(self.compute_step, config, images, labels)

    def compute_step(self, images: Tensor, labels: Tensor, config: Config) -> Tensor:
        with autocast(images.device, self.amp):
            logits = self.network(images, config)
            loss = F.cross_entropy(logits, labels)
        self.optimizer.zero_grad()  # a capture that failed may have left some
        loss.backward()
        self.optimizer.step()
        if self.graphs.enabled:  # gradients may lie in memory that graphs share
            self.optimizer.zero_grad()
        return torch.stack([loss.detach().double(), accuracy(logits, labels)])

    def validate(self, images: Tensor, labels: Tensor, config: Config) -> Tensor:
        """The accuracy of a batch, float64 (), left on the device. Nothing is learned."""
        return self.graphs(self.compute_accuracy, config, images, labels)

    @torch.inference_mode()
    def compute_accuracy(self, images: Tensor, labels: Tensor, config: Config) -> Tensor:
        with autocast(images.device, self.amp):
            return accuracy(self.network(images, config), labels)

    def state_dict(self) -> dict:
        optimizer = self.optimizer.state_dict()
        optimizer["param_groups"][0]["lr"] = float(optimizer["param_groups"][0]["lr"])
        return {"network": self.network.state_dict(), "optimizer": optimizer}

    def load_state_dict(self, state: dict) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.begin_graphs()  # these momenta are others than before


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """The share of rows whose largest logit is the label's, float64 ()."""
    return (logits.argmax(1) == labels).double().mean()


def read_metrics(steps: list[Tensor], network: nn.Module, epoch: int) -> Tensor:
    """Copy the metrics of an epoch's steps from the device into one float64 tensor (steps,
    metrics). TrainingError if one of them, or a weight of the network, is not finite."""
    if not steps:  # of a supernet that was never drawn
        return torch.zeros(0, 3, dtype=torch.float64)
    metrics = torch.stack(steps).cpu()
    if not all(values.isfinite().all() for values in (metrics, *network.state_dict().values())):
        raise TrainingError(f"epoch {epoch}: the loss or a weight is not finite; a smaller --lr, "
                            "with another --out, usually helps")
    return metrics


def cosine(first: float, last: float, epoch: int, epochs: int) -> float:
    """Learning rate of `epoch` (0-based), from `first` towards `last`."""
    return last + (first - last) * (1 + math.cos(math.pi * epoch / epochs)) / 2


def train_alone(path: Path, args: Namespace, train: Images, test: Images, config: Config,
                seed: int, bar: tqdm) -> None:
    """Stages 1 and 3: train one network, from scratch or from where it was interrupted, as the
    paper does. Writes `path`, *.pt, the checkpoint, which `load_network` reads, and, when it is
    finished, *.json: config, seed, test_accuracy, history (of its epochs)."""
    name = config_name(config)
    steps = train.num_batches(args.batch_size)
    learner = Learner(make_network(args, train, False, derive_seed(seed, "weights")), args)
    about = {"arch": args.arch, "width": args.width, "downsample": learner.network.downsample,
             "config": name, "epochs": args.epochs, "image_size": train.size,
             "classes": train.classes, "mean": train.mean.tolist(), "std": train.std.tolist()}
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
        order = generator(seed, "order", epoch)
        crops = generator(seed, "crops", epoch)
        batches = train.passes(args.batch_size, order, crops)
        learner.network.train()
        metrics = []
        shares = []
        for _ in range(steps):
            images, labels = next(batches)
            metrics.append(learner.step(images, labels, config, lr))
            shares.append(len(labels) / len(train))
            bar.update()
        shares = torch.tensor(shares, dtype=torch.float64)
        metrics = read_metrics(metrics, learner.network, epoch + 1)
        loss, train_accuracy = (shares @ metrics).tolist()
        seconds = time.perf_counter() - start
        history.append({"epoch": epoch + 1, "train_loss": loss, "train_accuracy": train_accuracy,
                        "lr": lr, "seconds": seconds, "images_per_second": len(train) / seconds})
        save(path, learner.state_dict() | {"history": history, "about": about})
        show_epoch(bar, history, args.epochs, f"{name} seed {seed}  ")

    batches = test.evaluation_batches(args.batch_size)
    result = evaluate_configs(learner.network.eval(), [config], batches, args.amp, args.metric)
    save(path.with_suffix(".json"), {"config": name, "seed": seed, "test_accuracy": result.item(),
                                     "history": history})


def train_networks(folder: Path, args: Namespace, train: Images, test: Images,
                   pairs: list[tuple[Config, int]]) -> tuple[list[dict], TrainingError | None]:
    """Stages 1 and 3: train the (configuration, seed) pairs that are not finished; they go by seed,
    and ranks take turns. A network that diverges is recorded in its *.json, and the others go on.
    Returns, on rank 0, the rows of results.csv and an error that names what diverged."""
    networks = folder / "networks"
    networks.mkdir(exist_ok=True)
    steps = args.epochs * train.num_batches(args.batch_size)
    own = pairs[rank::world]
    bar = progress(total=len(own) * steps, unit="step")
    for seed, of_seed in itertools.groupby(own, key=lambda pair: pair[1]):
        for config, _ in of_seed:
            path = networks / f"{config_name(config)}-{seed}.pt"
            if path.with_suffix(".json").exists():
                bar.update(steps)
                continue
            try:
                train_alone(path, args, train, test, config, seed, bar)
            except TrainingError as error:
                save(path.with_suffix(".json"), {"config": config_name(config), "seed": seed,
                                                 "error": str(error)})
        if rank == 0:
            collect_results(folder)
    bar.close()
    barrier()
    if rank > 0:
        return [], None
    rows, diverged = collect_results(folder)
    diverged = [diverged[pair] for pair in pairs if pair in diverged]
    if not diverged:
        return rows, None
    return rows, TrainingError(f"{len(diverged)} networks diverged: {', '.join(diverged)}")


# --------------------------------------------------------------------------- the run folder

@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that takes the place of `path` when the block ends without an error, so that
    nobody ever meets half a file. One writer at a time."""
    temporary = path.with_name(f"tmp-{path.name}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            try:
                os.fsync(file.fileno())
            except OSError as error:  # some file systems know no fsync
                if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
                    raise
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # the latter is torch's
        raise OSError(f"cannot write {path}, is the disk full? ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def lock(folder: Path) -> None:
    """Give a run folder to this process until it ends. UserError if another process has it."""
    file = os.open(folder / "lock", os.O_CREAT | os.O_WRONLY)
    state = os.fstat(file)
    if (state.st_dev, state.st_ino) in locks:  # a notebook runs a stopped cell again
        return os.close(file)
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(file)
        raise UserError(f"another process is writing to {folder}: choose another --out, or wait "
                        "for it") from error
    except (ImportError, OSError) as error:  # Windows; NFS or Lustre without locks
        print(f"warning: files cannot be locked here ({error}): start nothing twice; only Linux "
              "and macOS are tested", file=sys.stderr)
    locks.add((state.st_dev, state.st_ino))  # the file stays open


def save(path: Path, content: dict | list) -> None:
    """As JSON, for *.jsonl an entry a line or, for *.pt, with torch.save."""
    with replacing(path) as temporary:
        if path.suffix == ".json":
            temporary.write_text(json.dumps(content, indent=1) + "\n")
        elif path.suffix == ".jsonl":
            temporary.write_text("".join(json.dumps(entry) + "\n" for entry in content))
        else:
            torch.save(content, temporary)


def load(path: Path) -> dict | list:
    """What `save` wrote; nothing in it is executed. UserError if it is damaged or foreign."""
    try:
        if path.suffix == ".json":
            return dict(json.loads(path.read_text()))
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    except Exception as error:  # torch.load raises many kinds
        raise UserError(f"{path} is damaged or foreign ({str(error)[:80]}): move it away, and the "
                        "command that wrote it goes on without it") from error


def show_epoch(bar: tqdm, log: list[dict], epochs: int, label: str = "") -> None:
    """Show the numbers of the last epoch beside the bar or, where no bar is seen, as a line."""
    numbers = {key: value for key, value in log[-1].items() if isinstance(value, (int, float))}
    line = label + "  ".join(f"{key} {value:.4g}" for key, value in numbers.items())
    bar.set_postfix_str(line[:60], refresh=False)
    if bar.disable:
        left = (epochs - len(log)) * mean(entry["seconds"] for entry in log) / 3600
        print(f"{line}  {left:.2f} h left", flush=True)


# Which settings may change when a run is continued (a setting in none of the first two sets must
# stay the same), and which ones retrain.py --from reads.
ROLES = {
    "changes no result": {"out", "dataset", "data_dir", "device", "threads", "ground_truth",
                          "rank_every"},  # paths may change: the images are compared, as "data"
    "extends stages 1 and 3": {"configs", "max_macs", "seeds", "config", "source", "top"},
    "taken over by stage 3": {"dataset", "data_dir", "test_fraction", "image_size", "num_train",
                              "flip", "arch", "num_resolutions", "downsample", "width", "metric"},
    "one in all searches": {"data", "flip", "arch", "num_resolutions", "downsample", "width",
                            "metric"},
}
locks = set()  # the files, by device and inode, that this process has locked


def open_run(stage: str, args: Namespace, data: tuple[Images, Images]) -> tuple[Path, dict]:
    """Open the run folder, --out or runs/<stage>-<dataset>. Returns the folder and its record, what
    is needed to redo a result: settings, command, versions.

    The same settings continue a run. UserError names the settings that differ. The folder belongs
    to one process (or job of ranks) as long as that lives."""
    name = Path(args.dataset).resolve().name.removesuffix(".npz")
    folder = Path(args.out or f"runs/{stage}-{name}")
    settings = {"stage": stage, "data": fingerprint(data, args)} | vars(args)
    defaults = settings.pop("defaults")
    for path in ("dataset", "data_dir"):  # retrain.py may be started elsewhere
        if settings[path] not in DATASET_PROTOCOLS and os.path.exists(settings[path]):
            settings[path] = os.path.abspath(settings[path])
    config = folder / "config.json"
    if config.exists():
        before = load(config).get("settings", {})
        if args.kernel == "auto":
            settings["kernel"] = before.get("kernel", "auto")
        # a setting that an older version did not know was what its default is, or was then
        refuse_other_settings(defaults | {"draw": "uniform"} | before, settings, folder)
    record = {"settings": settings} | environment(args)
    barrier()  # all have read config.json
    if rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock(folder)
            save(config, record)
        except OSError as error:
            raise UserError(f"--out {folder} is not writable: {error}") from error
    barrier()
    return folder, record


def refuse_other_settings(before: dict, settings: dict, folder: Path) -> None:
    """UserError if a folder's run had other settings, with the flags that continue that run."""
    may_differ = ROLES["changes no result"]
    if "seeds" in settings:
        may_differ = may_differ | ROLES["extends stages 1 and 3"]
    differing = [name for name in settings
                 if name not in may_differ and before.get(name) != settings[name]]
    if not differing:
        return
    shown = "; ".join(f"{name} {str(before.get(name))[:20]} there, {str(settings[name])[:20]} now"
                      for name in differing)
    message = f"{folder} holds a run with other settings ({shown}): "
    if not {"stage", "data"} & set(differing):
        flags = " ".join(flag(name, before[name]) for name in differing)
        message += f"{flags} continues it; or "
    raise UserError(message + "choose another --out, or delete the folder")


def flag(name: str, value: object) -> str:
    """How a setting is given on the command line: flag("lr", [0.1, 0.001]) -> "--lr 0.1 0.001"."""
    name = name.replace("_", "-")
    if value is None:
        return f"no --{name}"
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    values = value if isinstance(value, list) else [value]
    return shlex.join([f"--{name}", *map(str, values)])


def fingerprint(data: tuple[Images, Images], args: Namespace) -> str:
    """SHA-256 of the images and labels of both sets, as they are used. The protocol's flip and crop
    are hashed first because they were in older runs, whose hashes so stay valid."""
    usual = protocol(args.dataset, args.arch)
    digest = hashlib.sha256(repr((usual["flip"], usual["crop"])).encode())
    for images in data:
        for tensor in (images.images, images.labels):
            digest.update(repr(tuple(tensor.shape)).encode())
            digest.update(tensor.cpu().contiguous().numpy())
    return digest.hexdigest()


def environment(args: Namespace) -> dict:
    """What a result may depend on besides the settings."""
    git = shutil.which("git") and subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    device = torch.backends.cpu.get_cpu_capability()
    if torch.device(args.device).type == "cuda":
        device = torch.cuda.get_device_name(args.device)
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "numpy": np.__version__}
    return {"command": shlex.join(sys.argv), "ranks": world, "git": git or None,
            "device_name": device, "versions": versions}


# ------------------------------------------------------------------------ reports and plots

def collect_results(folder: Path) -> tuple[list[dict], dict[tuple[Config, int], str]]:
    """Write results.csv, a row a finished network, from the networks' json files. Returns its rows,
    and a line for each (configuration, seed) that diverged."""
    columns = ["config", "seed", "test_accuracy", "train_accuracy", "train_loss"]
    paths = sorted((folder / "networks").glob("[0-9]*.json"))  # no tmp-*, of another rank
    rows = []
    diverged = {}
    for path in paths:
        network = load(path)
        if "error" in network:
            pair = (parse_config(network["config"]), network["seed"])
            diverged[pair] = f"{path.stem} ({network['error']}; delete {path} to try it again)"
        else:
            rows.append(network["history"][-1] | network)
    rows.sort(key=lambda row: (row["seed"], parse_config(row["config"])))
    with replacing(folder / "results.csv") as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return rows, diverged


def by_config(rows: list[dict]) -> dict[Config, list[float]]:
    """Test accuracies of each configuration, one a seed."""
    accuracies = {}
    for row in rows:
        config = parse_config(row["config"])
        accuracies.setdefault(config, []).append(float(row["test_accuracy"]))
    return accuracies


def standard_deviation(values: list[float]) -> float:
    """The sample standard deviation; 0 of a single value."""
    return stdev(values) if len(values) > 1 else 0.0


def read_ground_truth(path: str | None, configs: list[Config]) -> dict[Config, float] | None:
    """Mean test accuracy of each configuration in stage 1's results.csv, also if a spreadsheet has
    saved it: with a byte order mark, semicolons and decimal commas, empty rows. None without a
    path; UserError naming the row that is wrong."""
    if path is None:
        return None
    accuracies = {}
    number = 1
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
        decimal_commas = ";" in lines[0]
        reader = csv.DictReader(lines, delimiter=";" if decimal_commas else ",")
        for number, row in enumerate(reader, 2):
            if not any(row.values()):
                continue
            text = row["test_accuracy"]
            accuracy = float(text.replace(",", ".") if decimal_commas else text)
            if not 0 <= accuracy <= 1:
                raise ValueError(f"{text} is not from 0 to 1")
            accuracies.setdefault(parse_config(row["config"]), []).append(accuracy)
    except Exception as error:  # what the file holds may be anything
        raise UserError(f"{path} is no table with the columns config, test_accuracy "
                        f"(row {number}: {type(error).__name__}: {error})") from error
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
    position = 1 + sum(value > pick for value in true)
    return metrics | {"pick_rank": position, "regret": max(true) - pick}


def mean_tau(rankings: list[dict]) -> float | None:
    """Kendall tau of two rankings over what both have, mean over all pairs; None without one."""
    taus = []
    for first, second in itertools.combinations(rankings, 2):
        both = {config: first[config] for config in first if config in second}
        tau = rank_metrics(both, second)["kendall_tau"] if both else None
        if tau is not None:
            taus.append(tau)
    return mean(taus) if taus else None


def search_result(record: dict, space: Space, accuracies: Tensor, owners: list[int],
                  steps: Tensor, validation: Images) -> dict:
    """What result.json says of a search: the ranking, best first (ties keep the paper's order), and
    the picks. accuracies: float64 (C,); owners: the supernet of each; steps: int64 (C,M)."""
    ranking = []
    for i in accuracies.argsort(descending=True, stable=True).tolist():
        config = space.configs[i]
        ranking.append({"config": config_name(config), "accuracy": accuracies[i].item(),
                        "supernet": owners[i], "steps": steps[i].tolist(),
                        "macs": space.macs[config], "relative_macs": space.relative_macs(config)})
    cheap = [entry["config"] for entry in ranking if entry["relative_macs"] <= 1]
    shares = validation.labels[validation.rows].bincount().double() / len(validation)
    balanced = record["settings"]["metric"] == "balanced"
    return record | {
        "validation_images": len(validation), "ranking": ranking, "pick": ranking[0]["config"],
        "pick_at_no_cost": cheap[0] if cheap else None, "default": config_name(space.default),
        "chance": 1 / len(shares) if balanced else shares.max().item(), "metrics": None}


def report_search(folder: Path, result: dict, space: Space,
                  truth: dict[Config, float] | None) -> None:
    """Write result.json, with the metrics against a ground truth; draw ranking.png; print the best
    ten, the default and the worst, and what comes next."""
    if rank > 0:
        return
    settings = result["settings"]
    ranking = result["ranking"]
    accuracies = {parse_config(entry["config"]): entry["accuracy"] for entry in ranking}
    if truth:
        result["metrics"] = rank_metrics(accuracies, truth)
        for entry, config in zip(ranking, accuracies):
            entry["ground_truth"] = truth[config]
    save(folder / "result.json", result)
    method = f"mixture of {settings.get('num_supernets')} SuperNets"
    if "num_supernets" not in settings:
        method = "one SuperNet"
    title = f"{Path(settings['dataset']).name}, {settings['arch']}, {method}"
    if result["metrics"]:
        metrics = [f"{name} {'undefined' if value is None else format(value, '.4g')}"
                   for name, value in result["metrics"].items()]
        title += f"; against the ground truth: {metrics[0]}"
    plot_results(folder / "ranking.png",
                 {config: [accuracy] for config, accuracy in accuracies.items()},
                 "validation accuracy", space, title, truth)

    columns = {"config": "", "accuracy": ".4f", "supernet": "", "relative_macs": ".2f"}
    if truth:
        columns["ground_truth"] = ".4f"
    print_ranking(ranking, columns, result["default"])
    if result["metrics"]:
        print("against the ground truth:", ", ".join(metrics))
    best = ranking[0]["accuracy"]
    equal = sum(entry["accuracy"] == best for entry in ranking)
    if equal > 1:
        print(f"warning: {equal} configurations share the best accuracy; the pick is but the first")
    if best <= result["chance"]:
        print("warning: the best is no better than the same answer for all images")
    print(f"pick: {result['pick']}; of no more multiply-adds than the default: "
          f"{result['pick_at_no_cost'] or 'none'}   (all of it in {folder}/)")
    script = str(Path(__file__).with_name("retrain.py"))
    if settings["arch"] not in RESNETS:  # known only to the script that adds it
        script = sys.argv[0]
    print("next:", shlex.join(["python", script, "--from", str(folder), "--top", "3"]))


def print_ranking(ranking: list[dict], columns: dict[str, str], default: str,
                  first: int = 10) -> None:
    """Print the first entries, the default and the last; columns: what of an entry is shown, and
    its format."""
    rows = [["position", *columns]]
    for position, entry in enumerate(ranking, 1):
        if position <= first or position == len(ranking) or entry["config"] == default:
            cells = [format(entry[name], form) if entry.get(name) is not None else ""
                     for name, form in columns.items()]
            rows.append([str(position), *cells])
    widths = [max(map(len, column)) for column in zip(*rows)]
    print()
    for row in rows:
        line = "  ".join(cell.rjust(width) for cell, width in zip(row, widths))
        print(line + ("  default" if row[1] == default else ""))
    print("relative_macs: multiply-adds of the network; the default's are 1")


def save_figure(figure, path: Path) -> None:
    """As PNG; figure: matplotlib's."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, bbox_inches="tight", format="png")


def plot_results(path: Path, accuracies: dict[Config, list[float]], label: str, space: Space,
                 title: str, truth: dict[Config, float] | None = None) -> None:
    """The best 40 configurations and the default, drawn layer by layer beside their accuracies (one
    or more a configuration: seeds); all accuracies over the multiply-adds and, with a ground truth,
    over that (paper, figure 3)."""
    from matplotlib.figure import Figure
    default = space.default
    means = {config: mean(values) for config, values in accuracies.items()}
    macs = {config: space.relative_macs(config) for config in means}
    order = sorted(means, key=means.get, reverse=True)
    rows = [config for i, config in enumerate(order) if i < 40 or config == default]
    widths = [2, 3, 5] if truth is None else [2, 3, 5, 5]
    figure = Figure(figsize=(1.2 * sum(widths), 7), layout="constrained")
    cells, dots, over_macs, *over_truth = figure.subplots(1, len(widths), width_ratios=widths)

    resolutions = [np.repeat(range(len(config)), config) for config in rows]
    cells.pcolormesh(resolutions, cmap="Blues_r", vmax=len(default), edgecolors="white")
    cells.set_yticks(np.arange(len(rows)) + 0.5, map(config_name, rows), fontsize=7)
    cells.set(xlabel="layers\n(darker: higher resolution)", xticks=[], ylim=(len(rows), 0))
    for row, config in enumerate(rows):
        values = accuracies[config]
        dots.plot(values, [row + 0.5] * len(values), "|", color="tab:gray")
        over_macs.plot([macs[config]] * len(values), values, "_", color="tab:gray")
    plot_dots(dots, means, {config: row + 0.5 for row, config in enumerate(rows)}, default)
    dots.set(xlabel=f"{label}\n(bars: seeds; orange: the default)", yticks=[],
             ylim=(len(rows), 0))

    front = []  # configurations whose accuracy none with fewer multiply-adds reaches
    for config in sorted(means, key=lambda config: (macs[config], -means[config])):
        if not front or means[config] > means[front[-1]]:
            front.append(config)
    over_macs.step([macs[config] for config in front], [means[config] for config in front],
                   color="tab:gray", where="post", label="Pareto front")
    plot_dots(over_macs, macs, means, default)
    over_macs.set(xlabel="multiply-adds, relative to the default's", ylabel=label)
    over_macs.legend()
    if truth:
        plot_dots(over_truth[0], truth, means, default)
        over_truth[0].set(xlabel="test accuracy trained alone", ylabel=label)
    figure.suptitle(title)
    figure.draw_without_rendering()  # labels need to know where things are
    named = [config for config in dict.fromkeys([default, *order[:3], *front]) if config in means]
    label_dots(over_macs, macs, means, named)
    if truth:
        label_dots(over_truth[0], truth, means, named)
    save_figure(figure, path)


def plot_dots(axes, x: dict[Config, float], y: dict[Config, float], default: Config) -> None:
    """A dot for each configuration of y, the default's orange."""
    for config in y:
        color = "tab:orange" if config == default else "tab:blue"
        axes.plot(x[config], y[config], "o", color=color)
    axes.grid(alpha=0.3)


def label_dots(axes, x: dict[Config, float], y: dict[Config, float],
               configs: list[Config]) -> None:
    """The names of some configurations beside their dots, the most important one first: a name that
    would cover an earlier one is left out."""
    taken = []
    for config in configs:
        name = axes.annotate(config_name(config), (x[config], y[config]), (4, 3), fontsize=7,
                             textcoords="offset points")
        box = name.get_window_extent().padded(2)
        if any(box.overlaps(other) for other in taken):
            name.remove()
        else:
            taken.append(box)
