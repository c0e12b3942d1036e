"""A CNN's 3x3 convolutions and ResNet blocks as fused PyTorch operators; built on first use.

    from kernels import basic_block, pool_conv2d, stem
    y, pooled = pool_conv2d(x, weight, downsample="maxpool")   # "none", "maxpool" or "stride"

This folder works alone: copy it into any project. README.md says what it needs. Call `load()` to
build at a moment of your choice, and always before you trace with torch.compile.
"""
from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

__all__ = ["BuildError", "basic_block", "load", "pool_conv", "pool_conv2d", "stem"]
MODES = {"none": 0, "maxpool": 1, "stride": 2}
_loaded = False
_lock = threading.Lock()


class BuildError(RuntimeError):
    """The extension cannot be built; the message says, in one line, what is missing."""


def pool_conv2d(x: torch.Tensor, weight: torch.Tensor,
                downsample: str = "none") -> tuple[torch.Tensor, torch.Tensor]:
    """3x3 convolution, padding 1, no bias, that may downsample: (y, pooled).

    x: (N,C_in,H,W), any strides, best channels_last; weight: (C_out,C_in,3,3); both of one floating
    dtype (on CUDA not float64) and on one device. "none": y = conv(x), pooled is x. "maxpool":
    pooled = maxpool2x2(x), y = conv(pooled). "stride": y = conv(x) with stride 2, pooled is x.
    Gradients flow into x through both outputs, and into weight. The results are channels_last.
    On a CPU a NaN or infinity in x spoils the outputs that it spoils in torch, and may spoil a tile
    of 4x4 around them.
    Raises TypeError, ValueError, BuildError.
    """
    check_arguments(x, weight, downsample)
    # FlopCounterMode counts torch's operators, and forward mode can differentiate them
    if x.is_meta or forward_ad._current_level >= 0 or not has_kernels(x.device):
        return native_pool_conv2d(x, weight, downsample)

    given = x
    device = x.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in (x.dtype, weight.dtype):
        dtype = torch.get_autocast_dtype(device)
        x = x.to(dtype)
        weight = weight.to(dtype)
    if x.dtype != weight.dtype:
        raise TypeError(f"x is {x.dtype}, weight {weight.dtype}")

    if not _loaded:
        load()
    y, pooled, _ = torch.ops.pool_conv.forward(x, weight, MODES[downsample], allows_tf32())
    return y, pooled if downsample == "maxpool" else given


def native_pool_conv2d(x: torch.Tensor, weight: torch.Tensor,
                       downsample: str = "none") -> tuple[torch.Tensor, torch.Tensor]:
    """What `pool_conv2d` computes, by torch's operators."""
    pooled = F.max_pool2d(x, 2) if downsample == "maxpool" else x
    stride = 2 if downsample == "stride" else 1
    return F.conv2d(pooled, weight, stride=stride, padding=1), pooled


@torch.compiler.assume_constant_result
def has_kernels(device: torch.device) -> bool:
    """Whether there are kernels for it: on a GPU they need the tensor cores of sm_80 or newer."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


@torch.compiler.assume_constant_result
def allows_tf32() -> bool:
    """Whether torch's convolutions may round float32 to TF32 on a GPU. Ours then do, too."""
    return (torch.backends.cudnn.conv.fp32_precision == "tf32"
            and os.environ.get("NVIDIA_TF32_OVERRIDE") != "0")


def check_mode(downsample: str) -> None:
    """ValueError if there is no such mode."""
    if downsample not in MODES:
        raise ValueError(f"downsample {downsample!r}: none, maxpool or stride")


def check_arguments(x: torch.Tensor, weight: torch.Tensor, downsample: str) -> None:
    """TypeError or ValueError for what `pool_conv2d` does not take."""
    check_mode(downsample)
    for name, tensor in (("x", x), ("weight", weight)):
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor")
        if tensor.dim() != 4:
            raise ValueError(f"{name} has {tensor.dim()} dimensions, not 4")
    if weight.shape[1:] != (x.shape[1], 3, 3) or 0 in weight.shape:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, not (C_out, {x.shape[1]}, 3, 3)")
    smallest = 2 if downsample == "maxpool" else 1
    if min(x.shape[2:]) < smallest:
        raise ValueError(f"x is {x.shape[2]}x{x.shape[3]}: {downsample} needs {smallest} or more")
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device}, weight on {weight.device}")


# ------------------------------------------------------------------------------------ the build

def load() -> None:
    """Build (once for these sources, this torch, compiler and machine) and load the operators."""
    global _loaded
    with _lock:
        if not _loaded and not _is_registered():
            try:
                _build_and_load()
            except Exception as error:  # a missing tool, a failed compiler: many kinds
                raise BuildError(f"the kernels cannot be built: {_reason(error)}") from error
            _register()
        _loaded = True


def _is_registered() -> bool:
    """Whether this folder, imported by another name, has registered the operators. Doing it twice
    would end the process."""
    name = "pool_conv::forward"
    return (torch._C._dispatch_has_kernel(name)
            and torch._C._dispatch_has_kernel_for_dispatch_key(name, "Autograd"))


def _build_and_load() -> None:
    here = Path(__file__).parent
    gpus = _gpus()
    sources = [here / "binding.cpp", here / "pool_conv_cpu.cpp"]
    if gpus:
        sources.append(here / "pool_conv.cu")
    folder, name = _place([*sources, here / "pool_conv.h"], gpus)
    if _loads_finished(folder, name):  # before the lock: the folder may be read-only
        return
    with _locked(folder / "lock"):
        if not _loads_finished(folder, name):  # another process may have built it meanwhile
            _build(folder, name, sources, cuda=bool(gpus))


def _place(files: list[Path], gpus: list) -> tuple[Path, str]:
    """The folder and the name of the finished library. They change with whatever changes the
    library, so that machines can share a home directory. Without a compiler the name is "*": the
    library of any compiler will do."""
    machine = (torch.__version__, sys.version, platform.machine(), _cpu_features(), gpus)
    state = b"|".join([file.read_bytes() for file in files] + [str(machine).encode()])
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or "~/.cache/torch_extensions"
    folder = Path(root).expanduser() / f"pool_conv_{hashlib.sha256(state).hexdigest()[:12]}"
    compiler = _compiler()
    return folder, hashlib.sha256(compiler.encode()).hexdigest()[:12] if compiler else "*"


def _loads_finished(folder: Path, name: str) -> bool:
    """Load a finished library; False if there is none that can be loaded. A library's name ends
    with its size, because loading one that was cut off would end the process."""
    for library in sorted(folder.glob(f"{name}-*.so")):
        if library.stem.endswith(f"-{library.stat().st_size}"):
            with contextlib.suppress(OSError):
                torch.ops.load_library(str(library))
                return True
    return False


def _build(folder: Path, name: str, sources: list[Path], cuda: bool) -> None:
    """Compile and load the library, then move it to its place in one step."""
    # torch would warn that there is no CUDA
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from unittest import mock

    from torch.utils import cpp_extension  # slow to import, and only for building
    print(f"building the kernels (once, about {60 if cuda else 15} s) ...", file=sys.stderr,
          flush=True)

    flags = ["-O3", "-fno-math-errno", "-fno-trapping-math"]
    link_flags = []
    if platform.system() != "Darwin":
        flags += ["-march=native", "-fopenmp"]
        if "clang" in _compiler():  # has its own OpenMP; that of g++ comes with torch
            link_flags.append("-fopenmp")
    if cuda:
        flags.append("-DWITH_CUDA")
    with (tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as scratch,
          mock.patch.dict(os.environ, _environment(scratch)),
          # torch's lock is not needed here, and fails on file systems without locks
          mock.patch.object(cpp_extension, "FileLock", contextlib.nullcontext, create=True),
          mock.patch.object(cpp_extension, "_write_ninja_file",
                            _for_any_path(cpp_extension._write_ninja_file))):
        cpp_extension.load("pool_conv", [str(file) for file in sources], build_directory=scratch,
                           extra_cflags=flags, extra_cuda_cflags=["-O3"],
                           extra_ldflags=link_flags, with_cuda=cuda, is_python_module=False)
        built = next(Path(scratch).glob(f"pool_conv*{cpp_extension.LIB_EXT}"))
        os.replace(built, folder / f"{name}-{built.stat().st_size}.so")


def _for_any_path(write_ninja_file: Callable) -> Callable:
    """torch's function, which escapes only spaces for ninja, with paths that are escaped before."""
    from unittest import mock
    special = "[$]" if os.name == "nt" else "[$:]"  # torch escapes the colon of C:, too

    def write(*, sources, **others):
        sources = [re.sub(special, r"$\g<0>", source) for source in sources]
        compiler = {"CXX": os.environ["CXX"].replace("$", "$$")} if "CXX" in os.environ else {}
        with mock.patch.dict(os.environ, compiler):
            write_ninja_file(sources=sources, **others)
    return write


def _environment(scratch: str) -> dict[str, str]:
    """Changes of the environment for the build: ninja is found where pip has put it, and CXX may
    have several words, as in "ccache g++", which torch would take for the name of one program."""
    changes = {}
    if not shutil.which("ninja"):
        with contextlib.suppress(ImportError):
            from ninja import BIN_DIR
            changes["PATH"] = os.pathsep.join(filter(None, [os.environ.get("PATH"), BIN_DIR]))
    words = shlex.split(os.environ.get("CXX", ""))
    if len(words) > 1:
        script = Path(scratch, "cxx")
        script.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        script.chmod(0o700)
        changes |= {"CXX": str(script), "TORCH_NO_COMPILER_WRAPPER": "1"}
    return changes


def _compiler() -> str:
    """The compiler's version, in its own words; empty if there is no compiler."""
    command = [*shlex.split(os.environ.get("CXX") or "c++"), "--version"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def _cpu_features() -> list[str]:
    """The features of the CPU, on which the result of -march=native depends."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return [platform.processor()]
    lines = cpuinfo.read_text().splitlines()
    return sorted({line for line in lines if line.startswith(("flags", "Features", "isa"))})


def _gpus() -> list:
    """The GPUs that nvcc compiles for; empty without a GPU."""
    if not torch.cuda.is_available():
        return []
    gpus = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return [*sorted(gpus), os.environ.get("TORCH_CUDA_ARCH_LIST")]


def _reason(error: BaseException) -> str:
    """The one line of a failed build's output that says most."""
    while error.__cause__:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    if isinstance(error, subprocess.CalledProcessError):
        output = (error.output or b"").decode(errors="replace").splitlines()
        telling = re.compile("error|not found|cannot find|undefined", re.I)
        lines = [*filter(telling.search, output), *lines]
    return lines[0].strip() if lines else type(error).__name__


@contextlib.contextmanager
def _locked(path: Path):
    """Hold a lock, so that one process builds and the others wait. If a process dies the system
    releases its lock. Where there are no locks, each process builds."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")
    except OSError as error:
        raise RuntimeError(f"{path.parent} cannot be written ({error.strerror}): choose another "
                           "folder by TORCH_EXTENSIONS_DIR") from None
    with file:
        with contextlib.suppress(ImportError, OSError):  # Windows; a network's file system
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# ------------------------------------------------------------------------ the operators' rules

def _check_fake(mode: int, x: torch.Tensor, *others: torch.Tensor | None) -> None:
    """ValueError for an unknown mode, or if not all tensors are on x's device. torch calls a fake
    kernel as soon as one tensor is on "meta", and would return memory that nothing has written."""
    if mode not in MODES.values():
        raise ValueError(f"no mode {mode}")
    for other in others:
        if other is not None and other.device != x.device:
            raise ValueError(f"a tensor is on {other.device}, not on {x.device}")


def _register() -> None:
    """Register fake kernels, autograd and vmap of the operators."""
    forward = torch.ops.pool_conv.forward
    backward = torch.ops.pool_conv.backward

    @torch.library.register_fake("pool_conv::forward")
    def _(x, weight, mode, tf32=False):
        _check_fake(mode, x, weight)

        def empty(channels, dtype=None):
            out = x.new_empty((x.shape[0], channels, height, width), dtype=dtype)
            return out.to(memory_format=torch.channels_last)

        height, width = x.shape[2:]
        pooled = x.new_empty(0)
        argmax = x.new_empty(0, dtype=torch.uint8)
        if mode == MODES["maxpool"]:
            height, width = height // 2, width // 2
            # as is_ours in binding.cpp decides; opcheck compares
            ours = x.is_cuda or x.dtype == torch.float32 and min(weight.shape[:2]) >= 8
            pooled = empty(x.shape[1])
            argmax = empty(x.shape[1], torch.uint8 if ours else torch.int64)
        if mode == MODES["stride"]:
            height, width = (height + 1) // 2, (width + 1) // 2
        return empty(weight.shape[0]), pooled, argmax

    @torch.library.register_fake("pool_conv::backward")
    def _(grad_y, grad_pooled, x, weight, argmax, mode, height, width, want_x, want_weight,
          tf32=False):
        _check_fake(mode, x, weight, grad_y, grad_pooled, argmax)
        grad_x = x.new_empty(0)
        if want_x:
            grad_x = x.new_empty((*x.shape[:2], height, width))
            grad_x = grad_x.to(memory_format=torch.channels_last)
        if not want_weight:
            return grad_x, x.new_empty(0)
        lies_last = weight.is_contiguous(memory_format=torch.channels_last)
        layout = (torch.channels_last if lies_last and not weight.is_contiguous()
                  else torch.contiguous_format)  # as `layout` in binding.cpp
        return grad_x, torch.empty_like(weight, memory_format=layout)

    def setup(ctx, inputs, output):
        x, weight, ctx.mode, ctx.tf32 = inputs
        _, pooled, argmax = output
        ctx.size = x.shape[2:]
        ctx.mark_non_differentiable(argmax)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(pooled if ctx.mode == MODES["maxpool"] else x, weight, argmax)

    def gradients(ctx, grad_y, grad_pooled, _):
        x, weight, argmax = ctx.saved_tensors
        if grad_y is None:  # nothing but pooled was used
            stride = 2 if ctx.mode == MODES["stride"] else 1
            height, width = ((size - 1) // stride + 1 for size in x.shape[2:])
            grad_y = x.new_zeros((x.shape[0], weight.shape[0], height, width))
        if ctx.mode != MODES["maxpool"]:
            grad_pooled = None
        want_x, want_weight = ctx.needs_input_grad[:2]
        grad_x, grad_weight = backward(grad_y, grad_pooled, x, weight, argmax, ctx.mode, *ctx.size,
                                       want_x, want_weight, ctx.tf32)
        return grad_x if want_x else None, grad_weight if want_weight else None, None, None

    def twice(ctx, *grads):
        raise NotImplementedError("pool_conv2d has no second derivative: use native ops for it")

    torch.library.register_autograd("pool_conv::forward", gradients, setup_context=setup)
    torch.library.register_autograd("pool_conv::backward", twice)

    @torch.library.register_vmap("pool_conv::forward")
    def _(info, dims, x, weight, mode, tf32=False):
        outputs = []
        for i in range(info.batch_size):
            one_x = x if dims[0] is None else x.select(dims[0], i)
            one_weight = weight if dims[1] is None else weight.select(dims[1], i)
            outputs.append(forward(one_x, one_weight, mode, tf32))
        return tuple(torch.stack(part) for part in zip(*outputs)), (0, 0, 0)


from .block import basic_block, pool_conv, stem  # noqa: E402  needs `load`
