"""What the stages share: data, networks, evaluation, run folders, plots.

Nothing runs on import. A stage needs this file beside it; the folder kernels/ makes it faster.
In order: errors and arguments - many processes - data - configurations - networks - learning -
run folder - report and plots.
The method: Javan, Toews, Pedersoli, "Balanced Mixture of SuperNets for Learning the CNN Pooling
Architecture", arXiv:2306.11982; "the paper" below.
"""
from __future__ import annotations

import argparse
import atexit
import contextlib
import copy
import csv
import ctypes
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
import time
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
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
    code = 2


class TrainingError(UserError):
    """Training cannot go on, the loss is not finite: printed as one line, exit code 1."""
    code = 1


class Stopped(BaseException):  # whoever catches every Exception must not swallow it
    """SIGTERM, or another rank is gone: printed as one line, exit code 143."""


def run_script(main) -> None:
    """Call `main()`, turning the expected failures into one line on stderr and an exit code."""
    def terminate(*_):
        end_children("self")
        raise Stopped
    signal.signal(signal.SIGTERM, terminate)
    for output in (sys.stdout, sys.stderr):  # a path may hold what they cannot print
        output.reconfigure(errors="backslashreplace")
    try:
        join_ranks()
        main()
        return
    except UserError as error:
        code, line = error.code, f"error: {' '.join(str(error).split())}"
    except OSError as error:  # the disk is full, say
        code, line = 1, f"error: {error}; {how_to_go_on()}"
    except (KeyboardInterrupt, Stopped) as stop:
        for signum in (signal.SIGINT, signal.SIGTERM):  # torchrun is about to send it, too
            signal.signal(signum, signal.SIG_IGN)
        code = 130 if isinstance(stop, KeyboardInterrupt) else 143
        line = "\n" * sys.stderr.isatty() + f"{why_stopped(stop)}: {how_to_go_on()}"
    except Exception:  # a mistake of ours
        code, line = 1, traceback.format_exc()
    if tell_once():
        print(line, file=sys.stderr, flush=True)
    if store:
        os._exit(code)  # an ordinary exit would wait for the other ranks' messages
    sys.exit(code)


def end_children(pid: str) -> None:
    """SIGTERM to all descendants: the kernels' compilers would outlive us."""
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # it has ended by itself
            for child in path.read_text().split():
                end_children(child)
                os.kill(int(child), signal.SIGTERM)


# Defaults by network and by data set (which decides where both do): the paper's protocol where it
# gives a figure, a value within its range where it gives a range (temperature, weight decay and
# epochs of the larger networks). It gives no epochs for retraining the larger networks.
# epochs: of a search, of training alone. crop: from a border of zeros ("pad") or resized at random.
PAPER = {"epochs": (100, 200), "batch_size": 128, "lr": ([0.1, 0.001], 0.1), "weight_decay": 0.0,
         "temperature": [1.0, 100.0], "decay": 0.9, "flip": True, "crop": "pad"}
NETWORK_PROTOCOLS = {
    "resnet18": {"epochs": (400, 200), "weight_decay": 5e-4, "temperature": [1.0, 150.0]},
    "resnet50": {"epochs": (400, 200), "weight_decay": 5e-4, "temperature": [1.0, 300.0]},
}
PROTOCOLS = {  # flips change what a digit or a shoe is
    "digits": {"epochs": (8, 6), "batch_size": 32, "flip": False},  # minutes
    "fashion-mnist": {"flip": False}, "cifar10": {}, "cifar100": {},
    "food101": {"epochs": (300, 200), "decay": 0.95, "crop": "resized"},
}


def protocol(dataset: str, arch: str) -> dict:
    found = PAPER | NETWORK_PROTOCOLS.get(arch, {}) | PROTOCOLS.get(dataset, {})
    size = {"image_size": 64 if arch == "resnet20" else 224} if dataset == "food101" else {}
    return found | size


class Parser(argparse.ArgumentParser):
    """argparse with the arguments that all stages (or both searches) share, and one-line errors."""

    class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    def __init__(self, description: str, search: bool, configs: bool = True):
        super().__init__(description=description, formatter_class=self.Help)
        self.search = search
        by = "None: by data set and network, "
        add = self.add_argument_group("data").add_argument
        add("--dataset", default="digits", metavar="NAME|FOLDER", help=", ".join(PROTOCOLS)
            + ", or a folder with train/<class>/*.png|jpg and test/<class>/")
        add("--data-dir", default="data", help="where data sets and their caches are kept")
        add("--image-size", type=number(int, 8, 1024), metavar="N", help="resample the images to "
            "NxN (area filter); None: native, 32; food101: 64 for resnet20, else 224")
        add("--num-train", type=number(int, 2), metavar="N",
            help="use N of the training images, stratified by class; None: all")
        add = self.add_argument_group("network").add_argument
        add("--arch", choices=ARCHS, default="resnet20", help="the network")
        add("--num-resolutions", type=number(int, 1), metavar="R",
            help="how often it pools, plus 1; None: 3 for resnet20, else 4")
        add("--downsample", choices=["maxpool", "stride"], help="a 2x2 max-pool before the layer, "
            "or stride 2 in its 3x3 convolution; None: maxpool for resnet20, else stride")
        add("--width", type=number(float, 0.0625, 16), default=1.0,
            help="multiplier on the channels")
        if configs:
            add("--configs", nargs="+", metavar="N,N,N",
                help="only these pooling configurations; None: all")
        self.set_defaults(configs=None)
        add = self.add_argument_group("training").add_argument
        add("--epochs", type=number(int, 1, 10 ** 6), help="passes over the training images; " + by
            + "digits 8 (searches), 6; cifar10 100, 200")
        add("--batch-size", type=number(int, 2), help=by + "128, for digits 32")
        if search:
            add("--lr", type=number(float, 0), nargs=2, metavar=("FIRST", "LAST"),
                help="learning rate, cosine per epoch; " + by + "0.1 0.001")
        else:
            add("--lr", type=number(float, 0), help="learning rate; x0.1 at 40, 60, 80 and 90 %% "
                "of the epochs; " + by + "0.1")
        add("--momentum", type=number(float, 0, 1), default=0.9, help="of SGD")
        add("--weight-decay", type=number(float, 0), help="of SGD; " + by + "0, larger ones 0.0005")
        if search:
            add = self.add_argument_group("search").add_argument
            add("--split", type=number(float, 0.01, 0.99), default=0.5, metavar="FRACTION",
                help="of the training images that trains weights; the rest validates")
            add("--draw", choices=["uniform", "cost", "blocks"], default="uniform",
                help="how often a training step takes each configuration. uniform: all equally, as "
                "in the paper. cost: in proportion to its multiply-adds. blocks: the block lengths "
                "one after another, each uniformly among those possible, so that the rare long "
                "first blocks are trained as often as the others")
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
        add("--threads", type=number(int, 1, 1024), default=torch.get_num_threads(),
            help="of the CPU, for each process")

    def error(self, message: str):
        raise UserError(f"{message} (--help explains)")

    def parse_args(self, *args, **kwargs) -> argparse.Namespace:
        """Parse, fill in the protocol's defaults, check --device, apply --threads."""
        found = super().parse_args(*args, **kwargs)
        for key, value in protocol(found.dataset, found.arch).items():
            if key in vars(found) and getattr(found, key) is None:
                setattr(found, key, value[not self.search] if isinstance(value, tuple) else value)
        torch.set_num_threads(found.threads)
        if world > 1 and found.device == "cuda":  # several ranks may share a GPU
            found.device = f"cuda:{local_rank % max(torch.cuda.device_count(), 1)}"
        try:
            torch.zeros(1, device=found.device).item()
        except Exception as error:  # torch raises many kinds
            raise UserError(f"--device {found.device}: {str(error).splitlines()[0]}") from error
        return found


def number(kind: type, low: float, high: float | None = None):
    """An argparse type: a finite `kind` (int or float) in low..high."""
    if high is None:
        high = sys.float_info.max if kind is float else 2 ** 63 - 1

    def parse(text: str):
        value = kind(text)
        if not low <= value <= high:  # neither for a NaN
            raise argparse.ArgumentTypeError(
                f"{text}: must be at " + (f"most {high}" if value > high else f"least {low}"))
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
        # it may outlive a restart: addresses, counts and errors of the dead must not be found
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        store.set(f"process {rank}", f"{platform.node()} {os.getpid()}")
        # only a dead rank ends a wait, and its connection closes
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world,
                                timeout=timedelta(days=1))
        # gloo's threads may still hold their last tensors when Python takes itself apart: SIGABRT
        atexit.register(dist.destroy_process_group)
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


@contextlib.contextmanager
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


def why_stopped(stop: KeyboardInterrupt | Stopped) -> str:
    """Which rank of this machine is gone, if it is that."""
    if isinstance(stop, KeyboardInterrupt):
        return "interrupted"
    lost = stop.__cause__ is not None  # a connection broke; torchrun need not know that yet
    for _ in range(100 if lost else 1):
        for other in range(world if store else 0):
            try:
                node, pid = store.get(f"process {other}").decode().rsplit(" ", 1)
                if node == platform.node():
                    os.kill(int(pid), 0)
            except ProcessLookupError:
                return f"error: rank {other} (process {pid}) has died"
            except RuntimeError:
                return "error: torchrun has died"
        time.sleep(0.1)
    return "error: a rank on another machine has died" if lost else "stopped"


def how_to_go_on() -> str:
    found = Run.folder.glob("checkpoint*.pt") if Run.folder else []
    for path in sorted(found, key=os.path.getmtime, reverse=True):
        try:
            return f"the same command continues from {path}, epoch {read_file(path)['epoch']}"
        except UserError:
            pass  # damaged
    return "there is no checkpoint yet"


# ------------------------------------------------------------------------------------- data

@dataclass(frozen=True)
class Images:
    """Images with labels. images: uint8 (N,H,H,3), on the device or, memory-mapped, on the CPU;
    labels: int64 (n,); mean, std: float32 (3,) of the training pixels in 0..255, on the device;
    flip: whether training batches may be mirrored; crop: how they are cropped, "pad" from a border
    of zeros or "resized"; rows: int64 (n,), which of the images these are, None: all."""
    images: torch.Tensor
    labels: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor
    num_classes: int
    flip: bool
    crop: str = "pad"
    rows: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def size(self) -> int:
        return self.images.shape[1]

    def subset(self, index) -> Images:
        index = torch.as_tensor(index, device=self.labels.device)
        return replace(self, rows=index if self.rows is None else self.rows[index],
                       labels=self.labels[index])

    def batch(self, index: torch.Tensor, crops: torch.Tensor | None = None):
        """Normalised images, float32 (B,3,H,H) in channels_last memory, and labels (B,).

        index: int64 (B,); crops: for augmented images the rows of `draw_crops`.
        """
        device = self.mean.device
        images = self.images[index if self.rows is None else self.rows[index]]
        images, labels = (part.to(device, non_blocking=True)
                          for part in (images, self.labels[index]))
        if crops is not None:
            images = (crop_and_flip if self.crop == "pad" else resized_crop_and_flip)(images, crops)
        # whole rows at once: with an innermost dimension of 3, torch is 6 times slower
        mean, std = (value.repeat(self.size) for value in (self.mean, self.std))
        images = ((images.flatten(2) - mean) / std).view(images.shape)
        return images.permute(0, 3, 1, 2), labels  # NHWC seen as NCHW: channels_last

    def draw_crops(self, count: int, rng: torch.Generator) -> torch.Tensor:
        """What `crop_and_flip` takes, from a border of H/8 zeros (4 at 32x32, as in the paper), or
        `resized_crop_and_flip`, with torchvision's ranges: 8 to 100 % of the area, 3:4 to 4:3."""
        flips = torch.rand(count, 1, generator=rng) < (0.5 if self.flip else 0.0)
        if self.crop == "pad":
            places = torch.randint(0, 2 * (self.size // 8) + 1, (count, 2), generator=rng)
            return torch.cat([places, flips], 1)
        area, ratio, *places = torch.rand(4, count, generator=rng)
        area, ratio = 0.08 + 0.92 * area, torch.exp((2 * ratio - 1) * math.log(4 / 3))
        sides = torch.stack([(area / ratio).sqrt(), (area * ratio).sqrt()], 1).clamp(max=1)
        return torch.cat([torch.stack(places, 1) * (1 - sides), sides, flips], 1)

    def num_batches(self, batch_size: int) -> int:
        """Batches of near-equal size in a pass: ceil(n / batch_size), or fewer so that none is of a
        single image, which has no batch statistics where a feature map is 1x1."""
        return max(min(math.ceil(len(self) / batch_size), len(self) // 2), 1)

    def passes(self, batch_size: int, order: torch.Generator,
               crops: torch.Generator | None = None) -> Iterator:
        """Batches without end: pass after pass over all images, each in a new random `order`,
        augmented if there is a stream for the `crops`. What is random is drawn and moved to the
        device once a pass, so that no batch makes the CPU wait for the device."""
        parts = self.num_batches(batch_size)
        while True:
            index = torch.randperm(len(self), generator=order).to(self.labels.device)
            cut = self.draw_crops(len(self), crops).to(self.mean.device).tensor_split(parts) \
                if crops else [None] * parts
            yield from map(self.batch, index.tensor_split(parts), cut)

    def evaluation_batches(self, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches that cover every image once, always the same for the same n: shuffled and of
        near-equal size, since supernets normalise with the statistics of the batch, and a
        class-sorted batch or a last one of three images would falsify them."""
        batches = self.passes(batch_size, stream(0, "evaluation"))
        for _ in progress(range(self.num_batches(batch_size)), "evaluating", leave=False):
            yield next(batches)


def crop_and_flip(images: torch.Tensor, crops: torch.Tensor) -> torch.Tensor:
    """Crop each image at its own place from a border of H/8 zeros, then mirror some.

    images: uint8 (B,H,H,3); crops: int64 (B,3): top and left in 0..2*(H/8), flip.
    """
    count, size, _, _ = images.shape
    pad, device, (top, left, flips) = size // 8, images.device, crops[:, :, None].unbind(1)
    padded = F.pad(images, (0, 0, pad, pad, pad, pad))
    columns = torch.arange(size, device=device).expand(count, size)
    columns = left + torch.where(flips > 0, size - 1 - columns, columns)
    rows = top + torch.arange(size, device=device)
    rows = rows + torch.arange(count, device=device)[:, None] * padded.shape[1]
    pixels = rows[:, :, None] * padded.shape[2] + columns[:, None, :]
    return padded.view(-1, 3)[pixels.flatten()].view(images.shape)  # 1.6x of three indices


def resized_crop_and_flip(images: torch.Tensor, crops: torch.Tensor) -> torch.Tensor:
    """Cut a box out of each image, resize it bilinearly to the image's size, mirror some.

    images: uint8 (B,H,H,3); crops: float32 (B,5): top, left, height, width in 0..1, flip. -> float.
    """
    top, left, height, width, flip = crops.unbind(1)
    zero = torch.zeros_like(top)
    boxes = torch.stack([width * (1 - 2 * flip), zero, 2 * left + width - 1,
                         zero, height, 2 * top + height - 1], 1).view(-1, 2, 3)
    images = images.permute(0, 3, 1, 2).float()
    grid = F.affine_grid(boxes, images.shape, align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False
                         ).permute(0, 2, 3, 1)


def load_dataset(args: argparse.Namespace) -> tuple[Images, Images]:
    """(train, test) of --dataset on --device, resampled to --image-size, cut to --num-train."""
    name, data_dir, size, key = args.dataset, Path(args.data_dir), args.image_size, "train_labels"
    with rank_0_first():
        if name == "digits":
            arrays = _read_digits()
        elif name in PROTOCOLS:
            path = data_dir / (f"{name}-{size}.npz" if name == "food101" else f"{name}.npz")
            arrays = _cached(path, partial(_torchvision, name, data_dir, size))
        elif os.path.isdir(name):
            folder = Path(name).resolve()
            where = hashlib.sha256(os.fsencode(folder)).hexdigest()[:8]  # others may have its name
            arrays = _cached(data_dir / f"{folder.name}-{where}-{size or 32}.npz",
                             partial(_folder, folder, size or 32),
                             newest=max((os.lstat(path).st_mtime for part in ("train", "test")
                                         for depth in (part, f"{part}/*", f"{part}/*/*")
                                         for path in folder.glob(depth)), default=0.0))
        else:
            raise UserError(f"unknown data set {name!r}: choose {', '.join(PROTOCOLS)}, or give a "
                            "folder that holds train/<class>/ and test/<class>/")
    classes = int(arrays[key].max()) + 1
    if classes < 2:
        raise UserError(f"{name}: there is only one class, a classifier needs two")
    if args.num_train not in (None, len(arrays[key])):
        kept, _ = stratified_split(arrays[key], args.num_train, stream_seed(args.seed, "subset"))
        arrays |= {part: arrays[part][kept] for part in ("train_images", "train_labels")}
    if len(np.unique(arrays[key])) < classes:
        raise UserError(f"--num-train {args.num_train}: too few for each of {classes} classes")
    if size:
        arrays |= {key: _resample(arrays[key], size) for key in ("train_images", "test_images")}
    pixels = arrays["train_images"]
    pixels = pixels[::math.ceil(pixels.nbytes / 2 ** 30)]  # of a large set not all need be read
    mean = pixels.mean((0, 1, 2), dtype=np.float64)  # einsum casts in small pieces: no float copy
    square = np.einsum("nhwc,nhwc->c", pixels, pixels, dtype=np.float64, casting="unsafe")
    variance = square / (pixels.size / 3) - mean ** 2
    mean, std = (torch.from_numpy(v).float().to(args.device)
                 for v in (mean, np.sqrt(np.maximum(variance, 1.0))))
    recipe, sets = protocol(name, args.arch), []
    for part in ("train", "test"):
        images, labels = arrays[f"{part}_images"], torch.from_numpy(arrays[f"{part}_labels"])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*not writable.*")  # nobody writes
            tensor = torch.from_numpy(images)
        if not isinstance(images, np.memmap):
            tensor, labels = tensor.to(args.device), labels.to(args.device)
        sets.append(Images(tensor, labels, mean, std, classes, recipe["flip"], recipe["crop"]))
    return tuple(sets)


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
    halves = tuple(train.subset(part) for part in parts)
    if any(len(half.labels.unique()) < train.num_classes for half in halves):
        raise UserError(f"--split {args.split}: a class has too few images to be in both parts")
    return halves


def _cached(path: Path, source, newest: float = 0.0) -> dict[str, np.ndarray]:
    """The arrays of the cache `path`, which is made of `source(part)`, part "train" or "test",
    where it does not exist or is older than `newest`: (count, iterator of (uint8 (H,H,3), label)).
    """
    def usable() -> bool:
        return os.path.exists(path) and path.stat().st_mtime >= newest
    try:
        if not usable():
            path.parent.mkdir(parents=True, exist_ok=True)
            with lock(path.with_name(f"{path.name}.lock")):
                if not usable():  # another process may just have made it
                    _write_cache(path, source)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error
    try:
        arrays = _read_npz(path)
        known, size = np.unique(arrays["train_labels"]), arrays["train_images"].shape[1]
        for part in ("train", "test"):
            images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
            if images.dtype != np.uint8 or images.shape != (len(images), size, size, 3) \
                    or not images.size:
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


def _write_cache(path: Path, source) -> None:
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for part in ("train", "test"):
            count, pairs = source(part)
            labels = []  # image after image: a large set would not fit the memory
            with archive.open(f"{part}_images.npy", "w", force_zip64=True) as member:
                for image, label in progress(pairs, f"reading {part}", total=count):
                    if not labels:
                        np.lib.format.write_array_header_1_0(member, {
                            "descr": "|u1", "fortran_order": False,
                            "shape": (count, *image.shape)})
                    member.write(image.tobytes())
                    labels.append(label)
            with archive.open(f"{part}_labels.npy", "w") as member:
                np.lib.format.write_array(member, np.array(labels, dtype=np.int64))


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, memory-mapped if they take more than a quarter of the memory."""
    names, arrays = ("train_images", "train_labels", "test_images", "test_labels"), {}
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        members = {name: archive.getinfo(f"{name}.npy") for name in names}
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if sum(info.file_size for info in members.values()) <= memory // 4:
            with np.load(file, allow_pickle=False) as loaded:
                return {name: loaded[name] for name in names}
        for name, info in members.items():
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{name} is compressed and too large to be read")
            file.seek(info.header_offset + 26)  # zip's local header: 30 bytes, name, extra field
            lengths = file.read(4)
            file.seek(int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little"),
                      os.SEEK_CUR)
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            arrays[name] = np.memmap(path, dtype, "r", file.tell(), shape)
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


def _torchvision(name: str, data_dir: Path, size: int | None, part: str) -> tuple[int, Iterator]:
    """A torchvision data set, downloaded into `data_dir` unless its files are there."""
    from torchvision import datasets
    source, where, what = {
        "cifar10": (datasets.CIFAR10, ".", datasets.CIFAR10.filename),
        "cifar100": (datasets.CIFAR100, ".", datasets.CIFAR100.filename),
        "fashion-mnist": (datasets.FashionMNIST, "FashionMNIST/raw", "the four *-ubyte.gz files"),
        "food101": (datasets.Food101, ".", "food-101/ (images/ and meta/)")}[name]
    try:
        found = source(str(data_dir), download=True, **(
            {"split": part} if name == "food101" else {"train": part == "train"}))
    except Exception as error:  # network, archive, checksum: the advice is the same
        raise UserError(f"cannot download {name} ({str(error) or type(error).__name__}): put "
                        f"{what} into {data_dir / where}, or a cache at {data_dir / name}"
                        f"{f'-{size}' if name == 'food101' else ''}.npz") from error
    if name == "food101":
        return len(found), _squares(found, size)
    images = np.asarray(found.data)
    if images.ndim == 3:  # 28x28 grey: a border of zeros, three equal channels
        images = np.pad(images, ((0, 0), (2, 2), (2, 2)))[..., None].repeat(3, axis=3)
    return len(images), zip(images, map(int, found.targets))


def _folder(folder: Path, size: int, part: str) -> tuple[int, Iterator]:
    """The images of <part>/<class>/. No deeper: torchvision's ImageFolder follows links in circles
    and opens pipes, which may never end."""
    train, found = ([path for path in sorted(folder.glob(f"{name}/*/*")) if path.is_file()
                     and path.suffix.lower() in (".png", ".jpg", ".jpeg")]
                    for name in ("train", part))
    classes, here = (sorted({path.parent.name for path in paths}) for paths in (train, found))
    if here != classes or len(classes) < 2:
        raise UserError(f"{folder}: expected images in train/<class>/ and test/<class>/, of the "
                        f"same two or more classes; {part}/ holds {', '.join(here) or 'none'}")
    return len(found), _squares([(path, classes.index(path.parent.name)) for path in found], size)


def _squares(found, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """The centre squares of pairs (image or its path, label), size x size, read in parallel."""
    from PIL import Image, ImageOps
    warnings.simplefilter("error", Image.DecompressionBombWarning)  # over 89 million pixels

    def read(i: int) -> tuple[np.ndarray, int]:
        where = f"image {i}"
        try:
            image, label = found[i]
            if isinstance(image, Path):
                where = image  # no other formats: some would start a program
                image = Image.open(image, formats=("PNG", "JPEG"))
            image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BOX)
        except Exception as error:  # a damaged file raises many kinds
            raise UserError(f"cannot read {where}: {error}") from error
        return np.asarray(image), label
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(found), 256):  # not all at once: they would fill the memory
            yield from pool.map(read, range(start, min(start + 256, len(found))))


def _resample(images: np.ndarray, size: int) -> np.ndarray:
    if images.shape[1] == size:
        return images
    found = np.empty((len(images), size, size, 3), np.uint8)
    step = max(1, 2 ** 22 // max(size, images.shape[1]) ** 2)  # all as floats might not fit
    for i in range(0, len(images), step):
        part = torch.from_numpy(images[i:i + step]).permute(0, 3, 1, 2).float()
        part = F.interpolate(part, size=(size, size), mode="area")
        found[i:i + step] = part.round().byte().permute(0, 2, 3, 1)
    return found


# --------------------------------------------------------------------------- configurations

def enumerate_configs(num_layers: int, num_resolutions: int) -> list[Config]:
    """Every way to cut `num_layers` layers into `num_resolutions` blocks of one layer or more, in
    lexicographic order, the paper's numbering: C(num_layers - 1, num_resolutions - 1) of them."""
    cuts = itertools.combinations(range(1, num_layers), num_resolutions - 1)
    return [tuple(b - a for a, b in itertools.pairwise((0, *cut, num_layers))) for cut in cuts]


def downsampling_layers(config: Config) -> set[int]:
    """The layers (the first = 0) that downsample: (5,3,2) -> {5, 8}."""
    return set(itertools.accumulate(config[:-1]))


def config_name(config: Config) -> str:
    return ",".join(map(str, config))


def parse_config(text: str, like: Config | None = None) -> Config:
    """"5,3,2" -> (5, 3, 2); UserError unless these are positive integers and, with `like`, as many
    as there and of the same sum."""
    try:
        config = tuple(int(part) for part in text.strip(" []").split(","))
    except ValueError:
        config = (0,)
    if min(config) < 1 or (like and (len(config), sum(config)) != (len(like), sum(like))):
        raise UserError(f"impossible configuration {text!r}" + (
            f": {len(like)} parts, each at least 1, that add to {sum(like)} are needed, like "
            f"{config_name(like)}" if like else ""))
    return config


@dataclass(frozen=True)
class Space:
    """The pooling configurations to choose from; macs: multiply-adds of one image's forward pass,
    also of the default; tree_macs: of all configurations with shared prefixes."""
    configs: list[Config]
    default: Config
    macs: dict[Config, int]
    tree_macs: int
    parameters: int

    def __str__(self) -> str:
        saved = sum(map(self.macs.get, self.configs)) / self.tree_macs
        return (f"{len(self.configs)} configurations, evaluated as a tree with {saved:.2f}x fewer "
                f"multiply-adds; {self.parameters:,} parameters a network")


def search_space(args: argparse.Namespace, images: Images, supernet: bool) -> Space:
    """The configurations of --arch, --num-resolutions, --configs. Where the network knows no
    default for so many resolutions, the default are blocks of near-equal length."""
    network = make_network(args, images, supernet, device="meta")
    layers, default = len(network.layers), network.default_config
    resolutions = args.num_resolutions or len(default)
    if resolutions > layers:
        raise UserError(f"--num-resolutions {resolutions}: {args.arch} has {layers} layers")
    if resolutions != len(default):
        default = tuple(map(len, np.array_split(range(layers), resolutions)))
    configs = list(dict.fromkeys(parse_config(text, default) for text in args.configs)) \
        if args.configs else enumerate_configs(layers, resolutions)
    try:
        counts, tree_macs = count_macs(network, configs, images.size)
        macs = dict(zip(configs, counts))
        if default not in macs:
            (macs[default],), _ = count_macs(network, [default], images.size)
    except RuntimeError as error:
        raise UserError(f"{images.size}x{images.size} images are too small for {resolutions} "
                        "resolutions") from error
    return Space(configs, default, macs, tree_macs, sum(p.numel() for p in network.parameters()))


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
                weights[i] /= len({other[k] for other in configs if other[:k] == config[:k]})
    return weights / weights.sum()


def draw_configs(probabilities: torch.Tensor, count: int, rng: torch.Generator) -> torch.Tensor:
    """`count` independent draws c ~ pi, int64 (count,)."""
    if (probabilities == probabilities[0]).all():  # other random numbers than multinomial's:
        return torch.randint(len(probabilities), (count,), generator=rng)  # those of results/
    return torch.multinomial(probabilities, count, replacement=True, generator=rng)


# --------------------------------------------------------------------------------- networks

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
    return (fused.pool_conv2d if fused and not x.is_meta else native_pool_conv2d)(
        x, weight, downsample)


def can_fuse(x: torch.Tensor, weight: torch.Tensor, norm: nn.BatchNorm2d, downsample: str) -> bool:
    """Whether the kernels can take a stem or basic block as a whole."""
    return bool(fused) and downsample != "stride" and not x.is_meta and \
        fused.can_fuse(x, weight, norm)


def batch_norm(channels: int, supernet: bool) -> nn.BatchNorm2d:
    """In a supernet: no affine parameters, batch statistics always, since running ones would mix
    configurations. In a stand-alone network: ordinary."""
    return nn.BatchNorm2d(channels, affine=not supernet, track_running_stats=not supernet)


def make_shortcut(c_in: int, c_out: int, supernet: bool) -> nn.Sequential:
    return nn.Sequential() if c_in == c_out else nn.Sequential(
        nn.Conv2d(c_in, c_out, 1, bias=False), batch_norm(c_out, supernet))


class Stem(nn.Module):
    """3x3 convolution, BatchNorm, ReLU; large, for images of 64 pixels or more: 7x7 convolution of
    stride 2, BatchNorm, ReLU, 3x3 max-pool of stride 2. The first layer never downsamples."""

    def __init__(self, channels: int, supernet: bool, large: bool = False):
        super().__init__()
        self.large, (size, stride) = large, (7, 2) if large else (3, 1)
        self.conv = nn.Conv2d(3, channels, size, stride, size // 2, bias=False)
        self.norm = batch_norm(channels, supernet)

    def forward(self, x: torch.Tensor, downsample: str) -> torch.Tensor:
        if not self.large and can_fuse(x, self.conv.weight, self.norm, downsample):
            return fused.stem(x, self.conv.weight, self.norm)
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
        if can_fuse(x, self.conv1.weight, self.norm1, downsample):
            return fused.basic_block(x, self.conv1.weight, self.norm1, self.conv2.weight,
                                     self.norm2, *self.shortcut, downsample=downsample)
        y, x = pool_conv2d(x, self.conv1.weight, downsample)
        y, _ = pool_conv2d(F.relu(self.norm1(y)), self.conv2.weight)
        x = x[:, :, ::2, ::2] if downsample == "stride" else x
        return F.relu(self.norm2(y) + self.shortcut(x))


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
            x, downsample = F.max_pool2d(x, 2), "none"
        y = F.relu(self.norm1(self.conv1(x)))
        y, _ = pool_conv2d(y, self.conv2.weight, downsample)
        y = self.norm3(self.conv3(F.relu(self.norm2(y))))
        x = x[:, :, ::2, ::2] if downsample == "stride" else x
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

    def forward(self, images: torch.Tensor, config: Config) -> torch.Tensor:
        """images: (N,3,H,W) -> logits (N,num_classes)."""
        x, downsampling = images, downsampling_layers(config)
        for i, layer in enumerate(self.layers):
            x = layer(x, self.downsample if i in downsampling else "none")
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
        block, channels, self.default_config, together = RESNETS[arch]
        small = arch == "resnet20"
        self.downsample = downsample or ("maxpool" if small else "stride")
        stem, *channels = (max(1, round(width * c)) for c in channels)
        ends = [stem, *(block.expansion * c for c in channels)]
        layers = [Stem(stem, supernet, large=image_size >= 64 and not small)]
        layers += [block(c_in, c, supernet) for c_in, c in zip(ends, channels)]
        if together:
            layers[:2] = [AsOneLayer(layers[:2])]
        self.layers, self.classifier = nn.ModuleList(layers), nn.Linear(ends[-1], num_classes)

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
def count_macs(network: Network, configs: list[Config], image_size: int) -> tuple[list[int], int]:
    """Multiply-adds, by torch's own counter, of one image's forward pass with each configuration,
    and of all of them where prefixes are shared (`evaluate_configs`)."""
    from torch.utils.flop_counter import FlopCounterMode
    network, known, tree, totals = copy.deepcopy(network).to("meta"), {}, {}, []

    def run(depth: int, x: torch.Tensor, downsample: str) -> tuple[torch.Tensor, int]:
        key = depth, x.shape, downsample  # a layer is counted once at each resolution
        if key not in known:
            with FlopCounterMode(display=False) as counter:  # 2 a multiply-add, for 2 images
                y = network.layers[depth](x, downsample) if depth < len(network.layers) \
                    else network.head(x)
            known[key] = y, counter.get_total_flops() // 4
        return known[key]

    for config in configs:
        x, total, prefix = torch.zeros(2, 3, image_size, image_size, device="meta"), 0, ()
        downsampling = downsampling_layers(config)
        for depth in range(len(network.layers) + 1):
            downsample = network.downsample if depth in downsampling else "none"
            x, macs = run(depth, x, downsample)
            total, prefix = total + macs, (*prefix, downsample)
            tree[prefix] = macs
        totals.append(total)
    return totals, sum(tree.values())


@torch.inference_mode()
def evaluate_configs(network: Network, configs: list[Config],
                     batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Which images each configuration gets right, over all (images, labels) batches: bool (C,n) on
    the CPU. Its accuracies are the means of the rows.

    Up to their first different pooling, configurations have the same activations, so they are
    walked as a tree of shared prefixes: 2.03x fewer multiply-adds for the 36 of ResNet-20. Exact:
    every layer sees the very inputs it would see in a pass of its own, batch statistics included.
    """
    correct = [[] for _ in configs]
    downsampling = [downsampling_layers(config) for config in configs]

    def walk(x: torch.Tensor, depth: int, members: list[int]):
        if depth == len(network.layers):
            hits = network.head(x).argmax(1) == labels  # stays on the device
            for i in members:
                correct[i].append(hits)
            return
        for here, downsample in ((False, "none"), (True, network.downsample)):
            group = [i for i in members if (depth in downsampling[i]) == here]
            if group:
                walk(network.layers[depth](x, downsample), depth + 1, group)

    for images, labels in batches:
        with autocast(images.device):
            walk(images, 0, list(range(len(configs))))
    return torch.stack([torch.cat(parts) for parts in correct]).cpu()


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


# --------------------------------------------------------------------------------- learning

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


def read_steps(steps: list[tuple[str, torch.Tensor]], network: nn.Module) -> torch.Tensor:
    """What an epoch's steps left on the device, as rows on the CPU: (steps, numbers of a step).

    steps: (where, numbers) with the loss first. TrainingError naming the first step whose numbers
    are not finite, or the last one if the network's weights are not.
    """
    if not steps:
        return torch.zeros(0, 3, dtype=torch.float64)
    values = torch.stack([numbers for _, numbers in steps]).cpu()
    wrong = [("the loss or an accuracy", where) for (where, _), row in zip(steps, values)
             if not row.isfinite().all()]
    if not wrong and not all(value.isfinite().all() for value in network.state_dict().values()):
        wrong = [("a weight", steps[-1][0])]
    if wrong:
        raise TrainingError("{} is not finite at {}; the checkpoint of the last epoch is kept; a "
                            "smaller learning rate usually helps".format(*wrong[0]))
    return values


def cosine(first: float, last: float, epoch: int, epochs: int) -> float:
    """Learning rate of `epoch` (0-based), from `first` towards `last`."""
    return last + (first - last) * (1 + math.cos(math.pi * epoch / epochs)) / 2


def expected_time(learner: Learner, images: Images, batch_size: int, space: Space,
                  training_macs: float, forward_macs: float) -> timedelta:
    """Time for the multiply-adds of so many training steps (their forward passes counted, the
    backward ones implied) and plain forward passes, at the speed of one step of a throw-away copy.
    """
    probe, config = copy.deepcopy(learner), space.default
    x, labels = next(images.passes(batch_size, stream(0)))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        probe.step(x, labels, config, 0.0).tolist()  # waits for the device
        seconds.append(time.perf_counter() - start)
    speed = min(seconds) / (len(x) * space.macs[config]) / world
    return timedelta(seconds=round(speed * (training_macs + forward_macs / 3)))


# ------------------------------------------------------------------------------- run folder

FORMAT = 1  # of a run's files; those of another one are refused


@contextlib.contextmanager
def replacing(path: Path, previous: Path | None = None) -> Iterator[Path]:
    """A temporary path that takes the place of `path` when the block ends without an error, so
    that no reader, no kill and no power cut ever meets half a file. One writer at a time.
    previous: where to keep what is replaced."""
    temporary = path.with_name(f"tmp-{path.name}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def lock(path: Path, wait: bool = True):
    """The file `path`, open and locked until it is closed: by the kernel, if its process dies.
    BlockingIOError without `wait` if another one has it."""
    import fcntl
    file = open(path, "a")
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    return file


def seal(content: dict) -> dict:
    """`content`, which JSON can hold, with a checksum that `unseal` checks."""
    text = json.dumps(content, sort_keys=True, allow_nan=False)
    return content | {"checksum": f"{zlib.crc32(text.encode()):08x}"}


def unseal(content: dict) -> dict:
    """What was sealed; ValueError if it changed since."""
    if not isinstance(content, dict):
        raise ValueError("not an object")
    bare = {key: value for key, value in content.items() if key != "checksum"}
    if seal(bare) != content:
        raise ValueError("its checksum does not match")
    return bare


def save_tensors(content, file) -> None:
    """torch.save to an open file. Where that fails, torch raises an error of its own; this raises
    the reason, a full disk. Signals wait: an exception within torch's writer may abort Python."""
    waiting, handlers = [], {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    handlers = {s: handler for s, handler in handlers.items() if callable(handler)}
    for signum in handlers:
        signal.signal(signum, lambda *args: waiting.append(args))
    try:
        torch.save(content, file)
    except RuntimeError as error:
        raise error.__context__ or error
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    for args in waiting[:1]:
        handlers[args[0]](*args)


def read_file(path: Path) -> dict:
    """What `Run.save` wrote; nothing in it is executed. UserError if it is damaged or foreign."""
    try:
        if path.suffix == ".pt":
            with zipfile.ZipFile(path) as archive:  # torch.load does not check its checksums
                if damaged := archive.testzip():
                    raise ValueError(f"checksum of {damaged}")
            content = torch.load(path, map_location="cpu", weights_only=True)
        else:
            content = unseal(json.loads(path.read_text()))
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"not of format {FORMAT}, of these scripts")
        return content
    except Exception as error:  # many kinds
        raise UserError(f"{path} is damaged or foreign ({str(error)[:80]}): move it away, and the "
                        "command that wrote it goes on without it") from error


def read_log(folder: Path) -> list[dict]:
    """The lines of a run's log.jsonl, [] without one; UserError if one is damaged."""
    path, lines = folder / "log.jsonl", []
    for i, line in enumerate(path.read_bytes().splitlines(True) if path.exists() else [], 1):
        if line.endswith(b"\n") or not line.startswith(b"{"):  # a kill may tear the last one
            try:
                lines.append(unseal(json.loads(line)))
            except (ValueError, RecursionError) as error:
                raise UserError(f"line {i} of {path} is damaged ({error}): delete it; nothing "
                                "but plots depends on it") from error
    return lines


class Run:
    """A run folder: config.json, log.jsonl, checkpoints, results, plots.

    Opened again with the same settings it continues; UserError, naming the differences, if they
    differ, unless --overwrite. What does not change a result, or only extends it, may differ.
    record: what result.json needs to be redone: settings, versions, a hash of the data.
    """
    not_compared = {"out", "overwrite", "data_dir", "device", "threads", "ground_truth",
                    "rank_every", "config", "seeds", "source"}
    files = ("config.json", "log.jsonl", "result.json", "results.csv", "*.pt", "*.png", "tmp-*")

    folder: Path | None = None

    def __init__(self, stage: str, args: argparse.Namespace, data: tuple[Images, Images]):
        use_device(args)
        self.folder = Run.folder = Path(args.out or f"runs/{stage}-{Path(args.dataset).name}")
        with rank_0_first():
            if rank == 0:
                settings = {"stage": stage, "data": fingerprint(data)} | vars(args)
                self.record = {"settings": settings} | _environment(args)
                try:
                    self._open(settings, {"configs"} if stage == "exhaustive" else set())
                except BlockingIOError as error:
                    raise UserError(f"another process is writing to {self.folder}: choose another "
                                    "--out, or wait for it") from error
                except OSError as error:
                    raise UserError(f"--out {self.folder} is not writable: {error}") from error

    def _open(self, settings: dict, extensible: set[str]) -> None:
        # torchrun may restart what has died, with the same arguments: only the first is anew
        overwrite = settings["overwrite"] and \
            os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if not settings["overwrite"] and (known := self.load("config.json")):
            before = known["settings"]
            differing = [f"{k} {before.get(k)} there, {settings.get(k)} now"
                         for k in sorted(before.keys() | settings.keys())
                         if k not in self.not_compared | extensible
                         and before.get(k) != settings.get(k)]
            if differing:
                raise UserError(f"{self.folder} holds a run with other settings "
                                f"({'; '.join(differing)}): choose another --out, or --overwrite")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.owned = lock(self.folder / "lock", wait=False)
        for name in self.files if overwrite else self.files[-1:]:  # what a kill left half-written
            for path in self.folder.glob(name):
                path.unlink()
        self.save("config.json", self.record)

    def locked(self):
        """One rank at a time changes a file that all write."""
        return lock(self.folder / "lock-write")

    def save(self, name: str, content, previous: str | None = None) -> None:
        """Write `content` as sealed JSON or, for *.pt, with torch.save; see `replacing`."""
        if isinstance(content, dict):
            content = {"format": FORMAT} | content
        with replacing(self.folder / name, previous and self.folder / previous) as temporary:
            if name.endswith(".pt"):
                with open(temporary, "wb") as file:
                    save_tensors(content, file)
            else:
                temporary.write_text(json.dumps(seal(content), indent=1) + "\n")

    def load(self, name: str) -> dict | None:
        """What `save` wrote; None if it did not; UserError if that is damaged."""
        path = self.folder / name
        return read_file(path) if os.path.exists(path) else None

    def checkpoint_names(self, key: str) -> tuple[str, str]:
        """Of the last checkpoint and the one before; key: "" or "-<network>"."""
        return f"checkpoint{key}.pt", f"checkpoint{key}-previous.pt"

    def save_checkpoint(self, key: str = "", **state) -> None:
        last, previous = self.checkpoint_names(key)
        self.save(last, state, previous)

    def drop_checkpoint(self, key: str) -> None:
        for name in self.checkpoint_names(key):
            (self.folder / name).unlink(missing_ok=True)

    def load_checkpoint(self, key: str = "") -> dict | None:
        """The last checkpoint, or the one before if that is all there is; None without one.
        UserError if it is damaged, offering the other."""
        names = [name for name in self.checkpoint_names(key) if (self.folder / name).exists()]
        try:
            return self.load(names[0]) if names else None
        except UserError as error:
            other = names[1] if len(names) > 1 else "the start"
            raise UserError(f"{error}, from {other}") from error

    def log(self, **line) -> None:
        """Append a line to log.jsonl; print its numbers where no progress bar is seen."""
        with self.locked(), open(self.folder / "log.jsonl", "a") as file:
            file.write(json.dumps(seal(line)) + "\n")
        if not sys.stderr.isatty():
            print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                            for k, v in line.items() if not isinstance(v, (list, dict))),
                  flush=True)

    def trim_log(self, keep) -> None:
        """Drop the lines of epochs that the checkpoint does not hold and that will come again."""
        with self.locked(), replacing(self.folder / "log.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(seal(line)) + "\n"
                                         for line in read_log(self.folder) if keep(line)))


def fingerprint(data: tuple[Images, Images]) -> str:
    """SHA-256 of the images and labels of both sets, as they are used."""
    digest = hashlib.sha256()
    for images in data:
        for tensor in (images.images, images.labels):
            digest.update(repr(tuple(tensor.shape)).encode())
            digest.update(tensor.cpu().contiguous().numpy())
    return digest.hexdigest()


def _environment(args: argparse.Namespace) -> dict:
    """What a result may depend on besides the settings."""
    cpu = re.search("model name.*: (.*)", Path("/proc/cpuinfo").read_text()) if \
        Path("/proc/cpuinfo").exists() else None
    git = shutil.which("git") and subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        cwd=Path(__file__).parent, capture_output=True, text=True)
    return {"command": shlex.join(sys.argv), "ranks": world,
            "device_name": torch.cuda.get_device_name(args.device) if "cuda" in args.device
            else cpu[1] if cpu else platform.machine(),
            "versions": {"python": platform.python_version(), **{
                name: str(sys.modules[name].__version__) for name in (
                    "torch", "torchvision", "numpy", "scipy", "sklearn") if name in sys.modules}},
            "git": git.stdout.strip() if git and git.returncode == 0 else None}


# -------------------------------------------------------------------------- report and plots

def report_speed(run: Run) -> None:
    """Print the means over the log's epochs; nothing for a log from before they were kept."""
    lines = [line for line in read_log(run.folder) if "utilisation" in line]
    if not lines:
        return
    speed, utilisation = (mean(line[key] for line in lines)
                          for key in ("images_per_second", "utilisation"))
    print(f"\n{speed:.0f} images/s; utilisation {utilisation:.2f} direct-convolution equivalents "
          "(1: a direct convolution at the rate of a matrix product)")


def read_results(path: Path) -> list[dict]:
    """The rows of a results.csv: `config`, `seed` and `test_accuracy` (float, 0..1) at least; a
    `checksum` is verified."""
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file, strict=True))
        for row in rows:
            if row.get("checksum", "") != "":  # a table made by hand need not have any
                unseal(row)
            row["test_accuracy"] = float(row["test_accuracy"])
            row["seed"] = int(row["seed"])
            row["config"] = config_name(parse_config(row["config"]))
            if not 0 <= row["test_accuracy"] <= 1:
                raise ValueError(f"{row['test_accuracy']} is not in 0..1")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, csv.Error,
            UserError) as error:
        raise UserError(f"{path} is damaged, or no table with the columns config, seed, "
                        f"test_accuracy ({type(error).__name__}: {error})") from error
    return rows


def by_config(rows: list[dict]) -> dict[str, list[float]]:
    """Test accuracies of each configuration, one a seed."""
    values: dict[str, list[float]] = {}
    for row in rows:
        values.setdefault(row["config"], []).append(row["test_accuracy"])
    return values


def spread(values: list[float]) -> float:
    """Sample standard deviation; 0 of a single value."""
    return stdev(values) if len(values) > 1 else 0.0


def read_search(folder: Path) -> dict:
    """result.json of a finished search; UserError if there is none."""
    if not os.path.exists(folder / "result.json"):
        raise UserError(f"{folder} holds no finished search (no result.json)")
    result = read_file(folder / "result.json")
    if "pick" not in result:
        raise UserError(f"{folder}/result.json names no pick: it is not a search's folder")
    return result


def read_ground_truth(path: str | None, names: list[str]) -> dict[str, float] | None:
    """Test accuracy of these configurations, and others, from stage 1's results.csv; None without
    a path; UserError if it lacks one."""
    if path is None:
        return None
    truth = {name: mean(found) for name, found in by_config(read_results(Path(path))).items()}
    missing = [name for name in names if name not in truth]
    if missing:
        raise UserError(f"{path} lacks {len(missing)} of {len(names)} configurations "
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


def bootstrap(correct: torch.Tensor, resamples: int = 2000) -> torch.Tensor:
    """Accuracies in `resamples` random samples, with replacement, of the n images: float64
    (resamples,C). correct: bool (C,n), which images each configuration gets right. One sample
    serves all configurations, so that what they share cancels in comparisons."""
    rng, right, found = stream(0, "bootstrap"), correct.T.float(), []
    for _ in range(resamples):  # float32 holds counts up to 2^24 exactly
        drawn = torch.randint(len(right), (len(right),), generator=rng)
        found.append(torch.bincount(drawn, minlength=len(right)).float() @ right)
    return torch.stack(found).double() / len(right)


def interval(samples: torch.Tensor) -> torch.Tensor:
    """The middle 95 % of float64 (B,...): (2,...)."""
    return torch.quantile(samples, torch.tensor([0.025, 0.975], dtype=samples.dtype), 0)


def finish_search(run: Run, space: Space, correct: torch.Tensor, owners: list[int],
                  steps: torch.Tensor) -> None:
    """Rank 0 writes result.json, the ranking, best first (ties keep the paper's order), and
    correct.pt, `correct` in that order. steps: int64 (C,M), of training, by configuration and
    supernet."""
    if rank:
        return
    samples, accuracies = bootstrap(correct), correct.double().mean(1)
    best = (samples == samples.max(1, keepdim=True).values).double()
    p_best, between = (best / best.sum(1, keepdim=True)).mean(0), interval(samples).T
    order = accuracies.argsort(descending=True, stable=True).tolist()
    ranking = [{"config": config_name(space.configs[i]), "accuracy": accuracies[i].item(),
                "interval": between[i].tolist(), "p_best": p_best[i].item(), "supernet": owners[i],
                "steps": steps[i].tolist(), "macs": space.macs[space.configs[i]]} for i in order]
    run.save("correct.pt", {"correct": correct[order]})
    run.save("result.json", run.record | {
        "validation_images": correct.shape[1], "ranking": ranking, "pick": ranking[0]["config"],
        "default": config_name(space.default), "metrics": None})


def tau_interval(correct: torch.Tensor, true: list[float]) -> list[float] | None:
    """95 % bootstrap interval, over validation images, of Kendall tau. A resample is noisier than
    the sample, so that it lies a little low; the ground truth is taken as exact."""
    from scipy.stats import kendalltau
    if len(set(true)) == 1:
        return None
    taus = [kendalltau(row, true).statistic for row in bootstrap(correct, 1000).numpy()]
    return interval(torch.tensor(taus)).tolist() if all(map(math.isfinite, taus)) else None


def report_search(run: Run, args: argparse.Namespace, truth: dict[str, float] | None) -> bool:
    """Print the best ten, the default and the worst, draw the plots, say what comes next; False
    if the search is not finished."""
    result, correct = run.load("result.json"), run.load("correct.pt")
    if rank or not (result and correct):
        return bool(result and correct)
    ranking, default = result["ranking"], result["default"]
    scores = {entry["config"]: entry["accuracy"] for entry in ranking}
    if truth:
        result["metrics"] = rank_metrics(scores, truth) | {"kendall_tau_interval": tau_interval(
            correct["correct"], [truth[name] for name in scores])}
        run.save("result.json", result)
    metrics = {key: "undefined" if value is None else "{:.3f} to {:.3f}".format(*value)
               if isinstance(value, list) else f"{value:.4g}"
               for key, value in (result["metrics"] or {}).items()}
    plot_results(run.folder / "ranking.png", {k: [v] for k, v in scores.items()},
                 "validation accuracy", default, truth,
                 {entry["config"]: entry["interval"] for entry in ranking},
                 f"pick: {result['pick']}, P(best) {ranking[0]['p_best']:.2f}",
                 "Kendall tau {kendall_tau} (95 %: {kendall_tau_interval})".format_map(metrics)
                 if metrics else "")
    print(f"\n{'rank':>4}  {'configuration':13}  {'accuracy':>8}  {'95 % interval':>15}  "
          f"{'P(best)':>7}  supernet  Mmult-adds" + ("  ground truth" if truth else ""))
    for place, entry in enumerate(ranking, 1):
        if place <= 10 or place == len(ranking) or entry["config"] == default:
            low, high = entry["interval"]
            print(f"{place:4}  {entry['config']:13}  {entry['accuracy']:8.4f}  {low:.4f} - "
                  f"{high:.4f}  {entry['p_best']:7.3f}  {entry['supernet']:8}  "
                  f"{entry['macs'] / 1e6:10.1f}"
                  + (f"  {truth[entry['config']]:12.4f}" if truth else "")
                  + ("  default" if entry["config"] == default else ""))
    if metrics:
        print("against the ground truth: " + ", ".join(map(" ".join, metrics.items())))
    report_speed(run)
    print(f"pick: {result['pick']}   (all of it in {run.folder}/: result.json, *.png)")
    print(f"next: python retrain.py --from {run.folder}"
          + (f" --data-dir {args.data_dir}" if args.data_dir != "data" else ""))
    return True


def save_figure(figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, bbox_inches="tight")


def plot_results(path: Path, values: dict[str, list[float]], label: str, default: str,
                 truth: dict[str, float] | None = None,
                 intervals: dict[str, list[float]] | None = None, title: str = "",
                 truth_title: str = "") -> None:
    """Accuracies (one or more a configuration: seeds) as a ranking, for three resolutions over the
    triangle (n1, n2) and, with a ground truth, as a scatter plot against it (paper, figure 3).
    intervals: low and high of each accuracy."""
    from matplotlib.figure import Figure
    means = {name: mean(found) for name, found in values.items()}
    order = sorted(reversed(means), key=means.get)  # of equals the first is the best
    parts = 1 + (default.count(",") == 2) + (truth is not None)
    names = order if len(order) <= 60 else [  # of many, the best 30, the default and the worst
        name for i, name in enumerate(order) if i >= len(order) - 30 or not i or name == default]
    figure = Figure(figsize=(6 * parts, 1.5 + 0.15 * max(len(names), 24)), layout="constrained")
    ranking, *others = figure.subplots(1, parts, squeeze=False)[0]
    for row, name in enumerate(names):
        color = "tab:orange" if name == default else "tab:blue"
        ranking.plot(means[name], row, "o", color=color, markersize=7)
        ranking.plot(values[name], [row] * len(values[name]), "|", color=color, markersize=9)
        if intervals:
            ranking.hlines(row, *intervals[name], color=color)
    ranking.set_yticks(range(len(names)), names, fontsize=7)
    ranking.grid(alpha=0.3)
    marks = "lines: 95 % intervals" if intervals else "dot: mean; bars: seeds"
    ranking.set(xlabel=f"{label} ({marks}; orange: the default)", ylabel="pooling configuration",
                title=title)
    if default.count(",") == 2:
        triangle, configs = others.pop(0), {name: parse_config(name) for name in order}
        dots = triangle.scatter([configs[n][0] for n in order], [configs[n][1] for n in order],
                                c=[means[n] for n in order], marker="s", s=500)
        triangle.plot(*configs[order[-1]][:2], "r*", markersize=12, label=f"best: {order[-1]}")
        if default in configs:
            triangle.plot(*configs[default][:2], "wo", markeredgecolor="k",
                          label=f"default: {default}")
        triangle.set(xlabel="n1, layers at full resolution", ylabel="n2, layers at half resolution")
        triangle.legend()
        figure.colorbar(dots, label=label)
    for axes in others:
        axes.plot([truth[n] for n in order], [means[n] for n in order], "o")
        for name in names:
            axes.annotate(name, (truth[name], means[name]), fontsize=6)
        axes.vlines([truth[n] for n in order], *zip(*(intervals[n] for n in order)), alpha=0.3)
        axes.set(xlabel="ground truth: test accuracy trained alone", ylabel=label,
                 title=truth_title)
    save_figure(figure, path)
