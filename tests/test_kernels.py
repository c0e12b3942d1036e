"""kernels/: the operator against float64, its torch rules, its build; CUDA source on a CPU."""
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, shell
from torch.utils import cpp_extension

import kernels
from kernels import benchmark, pool_conv2d

MODES = ("none", "maxpool", "stride")
compiler = shutil.which(os.environ.get("CXX", "c++"))
pytestmark = pytest.mark.skipif(not compiler, reason="no C++ compiler")


def distance(result, exact):
    """Relative Frobenius error."""
    return ((result.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def reference(x, weight, downsample, grad_y, grad_pooled):
    """y, pooled and both gradients by torch's own operators in float64."""
    x = x.detach().double().requires_grad_()
    weight = weight.detach().double().requires_grad_()
    pooled = F.max_pool2d(x, 2) if downsample == "maxpool" else x
    y = F.conv2d(pooled, weight, stride=2 if downsample == "stride" else 1, padding=1)
    torch.autograd.backward((y, pooled * 1), (grad_y.double(), grad_pooled.double()))
    return y, pooled, x.grad, weight.grad


@cache
def build_emulation():
    """torch.ops.emulated: the CUDA half of binding.cpp and the very source of the CUDA kernels,
    compiled for the CPU and registered as its operators."""
    text = (ROOT / "kernels" / "binding.cpp").read_text()
    text = re.sub("#include <c10/cuda/.*", "", text)
    text = re.sub(r"TORCH_LIBRARY_IMPL\(pool_conv, CPU.*?\n}", "", text, flags=re.DOTALL)
    text = text.replace("TORCH_LIBRARY_IMPL(pool_conv, CUDA", "TORCH_LIBRARY_IMPL(emulated, CPU")
    text = text.replace("TORCH_LIBRARY(pool_conv", "TORCH_LIBRARY(emulated")
    with tempfile.TemporaryDirectory() as folder:
        binding = Path(folder, "binding.cpp")
        binding.write_text("""
            #include <ATen/ATen.h>
            namespace c10::cuda {
            inline void* getCurrentCUDAStream() { return nullptr; }
            }
            """ + text)
        cuda = Path(folder, "cuda.cpp")
        cuda.write_text('#include "cuda_emulation.h"\n#include "pool_conv.cu"\n')
        cpp_extension.load("emulated", [str(binding), str(cuda)], build_directory=folder,
                           extra_cflags=["-O1", "-DWITH_CUDA", "-Wno-unknown-pragmas"],
                           extra_include_paths=[str(ROOT / "tests"), str(ROOT / "kernels")],
                           is_python_module=False)


@pytest.fixture(params=["cpu", "emulated"])
def ops(request, monkeypatch):
    """The operators by the CPU kernels, then by the CUDA kernels' source."""
    kernels.load()
    if request.param == "cpu":
        yield torch.ops.pool_conv
        return
    build_emulation()
    monkeypatch.setattr(kernels.block, "ops", torch.ops.emulated)
    torch.use_deterministic_algorithms(True)  # fills what is not initialised with NaN
    yield torch.ops.emulated
    torch.use_deterministic_algorithms(False)


emulated_only = pytest.mark.parametrize("ops", ["emulated"], indirect=True)


def run(ops, x, weight, downsample, grad_y, grad_pooled, tf32=False):
    """As `reference`, by the operators without autograd."""
    mode = kernels.MODES[downsample]
    y, pooled, argmax = ops.forward(x, weight, mode, tf32)
    if downsample != "maxpool":
        pooled, grad_pooled = x, None
    grad_x, grad_weight = ops.backward(grad_y, grad_pooled, pooled, weight, argmax, mode,
                                       *x.shape[2:], True, True, tf32)
    return y, pooled, grad_x, grad_weight


@pytest.mark.parametrize("device", ["cpu"] + ["cuda"] * torch.cuda.is_available())
def test_random_shapes_against_float64(device):
    rng = np.random.default_rng(0)
    for case in range(90):
        torch.manual_seed(case)
        downsample = MODES[case % 3]
        n, c, k = rng.integers(0, 6), *rng.integers(1, 71, 2)
        h, w = rng.integers(2 if downsample == "maxpool" else 1, 34, 2)
        dtype = torch.float64 if case % 10 == 9 and device == "cpu" else torch.float32
        x = torch.randn(n, c, h, w, dtype=dtype, device=device).relu()  # zeros tie in the pooling
        if case // 3 % 3 == 1:
            x = x.to(memory_format=torch.channels_last)
        if case // 3 % 3 == 2:  # neither this nor contiguous
            x = torch.cat([x, x], 3)[..., ::2] if w % 2 == 0 else x.mT.contiguous().mT
        weight = torch.randn(k, c, 3, 3, dtype=dtype, device=device)
        x = x.detach().requires_grad_()
        weight.requires_grad_()

        y, pooled = pool_conv2d(x, weight, downsample)
        grad_y = torch.randn_like(y)
        grad_pooled = torch.randn_like(pooled)
        torch.autograd.backward((y, pooled * 1), (grad_y, grad_pooled))
        exact = reference(x, weight, downsample, grad_y, grad_pooled)
        tolerance = 1e-12 if dtype == torch.float64 else 3e-6
        assert torch.equal(pooled.double(), exact[1])
        assert distance(y, exact[0]) <= tolerance
        assert distance(x.grad, exact[2]) <= tolerance
        assert distance(weight.grad, exact[3]) <= 7 * tolerance


def test_pooling_treats_ties_nan_and_infinity_as_torch_does(ops):
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, math.nan, math.inf, -math.inf])
    torch.manual_seed(0)
    x = values[torch.randint(0, 7, (2, 8, 15, 14))].requires_grad_()
    weight = torch.randn(8, 8, 3, 3)
    expected = F.max_pool2d(x, 2)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    zero = torch.zeros(2, 8, 7, 7)
    y, pooled, grad_x, _ = run(ops, x.detach(), weight, "maxpool", zero, grad)
    assert torch.allclose(pooled, expected, 0, 0, equal_nan=True)
    assert torch.equal(grad_x, x.grad)
    assert y[F.conv2d(expected, weight, padding=1).isnan()].isnan().all()


def test_bits_do_not_change_from_run_to_run_or_between_threads():
    torch.manual_seed(0)
    x = torch.randn(7, 20, 18, 18)
    weight = torch.randn(24, 20, 3, 3)
    grad = torch.randn(7, 24, 9, 9)
    kernels.load()

    def once(_):
        return run(torch.ops.pool_conv, x, weight, "maxpool", grad, None)

    expected = once(0)
    with ThreadPoolExecutor(2) as pool:
        for result in pool.map(once, range(12)):
            assert all(torch.equal(a, b) for a, b in zip(result, expected))


# -------------------------------------------------------------------------- as a torch operator

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("downsample", MODES)
def test_opcheck(downsample, dtype):
    kernels.load()
    x = torch.randn(2, 8, 6, 7, dtype=dtype, requires_grad=True)
    weight = torch.randn(9, 8, 3, 3, dtype=dtype, requires_grad=True)
    torch.library.opcheck(torch.ops.pool_conv.forward, (x, weight, kernels.MODES[downsample]))


def test_vmap_forward_mode_autocast_and_second_derivative():
    x, weight = torch.randn(3, 2, 8, 6, 6), torch.randn(8, 8, 3, 3)
    results, _ = torch.func.vmap(lambda one: pool_conv2d(one, weight, "maxpool"))(x)
    assert all(torch.equal(a, pool_conv2d(b, weight, "maxpool")[0]) for a, b in zip(results, x))

    tangents = [torch.func.jvp(lambda x: conv(x, weight, "maxpool"), (x[0],), (x[1],))[1]
                for conv in (pool_conv2d, kernels.native_pool_conv2d)]
    assert all(map(torch.equal, *tangents)) and tangents[0][0].norm() > 1

    with torch.autocast("cpu", torch.bfloat16):
        y, pooled = pool_conv2d(x[0], weight, "maxpool")
    assert y.dtype == pooled.dtype == torch.bfloat16
    assert distance(y, F.conv2d(F.max_pool2d(x[0], 2), weight, padding=1).double()) < 0.02

    x.requires_grad_()
    y, _ = pool_conv2d(x[0], weight)
    gradient, = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.sum().backward()


def test_wrong_arguments():
    x = torch.ones(2, 3, 4, 4)
    weight = torch.ones(4, 3, 3, 3)
    for error, arguments in ((ValueError, (x[0], weight)),
                             (ValueError, (x, torch.ones(4, 3, 5, 5))),
                             (ValueError, (x[:, :, :1], weight, "maxpool")),
                             (ValueError, (x, weight, "average")),
                             (ValueError, (x, weight.to("meta"))),
                             (TypeError, (x, weight.double())),
                             (TypeError, ([[1.0]], weight))):
        with pytest.raises(error):
            pool_conv2d(*arguments)


# ---------------------------------------------------------------------------------------- build

@pytest.mark.parametrize("variable, value, cause", [
    ("PATH", "/no/such/folder", "c++"), ("CXX", "/bin/false", "/bin/false"),
    ("CXX", "no-such-wrapper g++", "no-such-wrap"),
    ("TORCH_EXTENSIONS_DIR", __file__, "choose another folder by TORCH_EXTENSIONS_DIR")])
def test_what_cannot_be_built_is_one_line(monkeypatch, tmp_path, variable, value, cause):
    monkeypatch.setattr(kernels, "_loaded", False)
    monkeypatch.setattr(kernels, "_is_registered", lambda: False)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv(variable, value)
    with pytest.raises(kernels.BuildError) as caught:
        kernels.load()
    assert str(caught.value).startswith("the kernels cannot be built: ")
    assert cause in str(caught.value) and "\n" not in str(caught.value)


def test_what_a_finished_library_is_for(monkeypatch, tmp_path):
    """A compiler and a CPU; if it cannot be loaded it is built anew. No file system needs locks."""
    builds = []

    def build(folder, name, *_, **__):
        builds.append((folder, name))
        (folder / f"{name}-13.so").write_text("not a library")

    monkeypatch.setattr(kernels, "_build", build)
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError("No locks available")))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    kernels._build_and_load()
    kernels._build_and_load()
    assert builds[0] == builds[1]
    monkeypatch.setenv("CXX", "echo another compiler")
    kernels._build_and_load()
    for features in ("flags : avx2", "flags : avx2 avx512f", "Features : asimd",
                     "Features : asimd sve"):
        monkeypatch.setattr(Path, "read_text", lambda self, text=features: f"processor : 0\n{text}")
        kernels._build_and_load()
    assert len(builds) == 7 and len(set(builds)) == 6


def test_the_build_finds_ninja_where_pip_puts_it(monkeypatch, tmp_path):
    ninja = tmp_path / "ninja"
    ninja.touch(0o700)
    monkeypatch.setitem(sys.modules, "ninja", SimpleNamespace(BIN_DIR=str(tmp_path)))
    monkeypatch.setenv("PATH", "/nowhere")
    assert shutil.which("ninja", path=kernels._environment(tmp_path)["PATH"]) == str(ninja)


def test_a_path_may_hold_any_character_and_the_compiler_be_several_words(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "env " + (os.environ.get("CXX") or "c++"))
    folder = tmp_path / """a $b:c'd"e%f"""
    folder.mkdir()
    (folder / "some.h").write_text("#define ANSWER 42")
    source = folder / "source.cpp"
    source.write_text('#include "some.h"\nint answer() { return ANSWER; }')
    kernels._build(folder, "name", [source], cuda=False)
    assert len(list(folder.glob("name-*.so"))) == 1


def test_the_folder_works_alone(monkeypatch, tmp_path):
    """Also with nothing but a finished library, to which it adds nothing: in a container."""
    kernels.load()
    places = []
    monkeypatch.setattr(kernels, "_loads_finished", lambda *place: not places.append(place))
    kernels._build_and_load()
    monkeypatch.undo()
    folder, name = places[0]
    finished, = folder.glob(f"{name}-*.so")
    cache = tmp_path / "cache" / folder.name
    cache.mkdir(parents=True)
    shutil.copy(finished, cache)
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    code = ("import torch; from kernels import pool_conv2d; "
            "print(pool_conv2d(torch.ones(1, 8, 4, 4), torch.ones(8, 8, 3, 3))[0].sum().item())")
    out = subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "cache"), "PATH": ""})
    assert float(out) == pytest.approx(6400)
    assert list(cache.iterdir()) == [cache / finished.name]
    os.truncate(cache / finished.name, 200_000)  # to load what was cut would end this process
    assert not kernels._loads_finished(cache, name)


def test_two_imports_of_the_folder_share_the_operators(monkeypatch):
    kernels.load()
    spec = importlib.util.spec_from_file_location("other_name", kernels.__file__)
    other = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, other)
    spec.loader.exec_module(other)
    x = torch.ones(1, 8, 4, 4, requires_grad=True)
    other.pool_conv2d(x, torch.ones(8, 8, 3, 3))[0].sum().backward()
    assert x.grad.sum() == pytest.approx(6400)


def test_benchmark_writes_its_table(tmp_path):
    done = shell("kernels/benchmark.py", "--layers", "8,8,8", "--batch", "4", "--repeats", "1",
                 "--no-compile", cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr  # and no bar in a file
    result = json.loads((tmp_path / "runs/benchmark/benchmark.json").read_text())
    assert len(result["layers"]) == 2 and len(result["steps"]) == 3
    for row in result["layers"]:
        assert max(row["error"].values()) < 2e-5
    assert (tmp_path / "runs/benchmark/benchmark.png").stat().st_size > 10000


def test_benchmark_times_kernels_without_launches_and_flushes():
    """By a clock for which a call is the microseconds that it takes."""
    clock = SimpleNamespace(flush=85, graph=lambda calls: Mock(kernels=sum(calls)),
                            by_events=lambda graph: 20 + graph.kernels)  # 20: its launch
    times = benchmark.kernel_times(clock, {"native": 12, "fused": 3}, repeats=3)
    assert times == {"native": [12] * 3, "fused": [3] * 3}


# ----------------------------------------------------------------------------------------- CUDA

@emulated_only
def test_scratch_memory_stays_small(ops):
    """The forward pass copies no weight. The gradient of a weight takes as much as the weight for
    each share of the images, of which there are three, not five."""
    x = torch.ones(5, 256, 1, 1, dtype=torch.float16)
    weight = x.new_ones(256, 256, 3, 3).to(memory_format=torch.channels_last)
    for limit, function, *args in (
            (1e6, ops.norm_conv, x[:1], None, weight, None, None, 1e-5, 0, True),
            (10e6, ops.backward, x, None, x, weight, x[:0], 0, 1, 1, False, True)):
        with torch.profiler.profile(profile_memory=True) as profile:
            function(*args)
        assert max(event.cpu_memory_usage for event in profile.events()) < limit


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
def test_nvcc_accepts_the_kernels(tmp_path):
    command = ("nvcc -std=c++17 -gencode arch=compute_75,code=sm_75 -gencode "
               "arch=compute_80,code=[sm_80,sm_90] -Werror all-warnings -c")
    faster = ["-Xcicc", "-O1", "-Xptxas", "-O1"]
    subprocess.run([*command.split(), *faster, ROOT / "kernels" / "pool_conv.cu", "-o",
                    tmp_path / "out.o"], check=True)


@emulated_only
@pytest.mark.parametrize("dtype, tf32, tolerance", [
    (torch.float32, False, 3e-6), (torch.float32, True, 6e-4),  # cut off, not rounded: 8e-4
    (torch.float16, False, 2e-3), (torch.bfloat16, False, 1e-2)])
@pytest.mark.parametrize("downsample", ["none", "maxpool"])
def test_cuda_kernels_against_float64(ops, downsample, dtype, tf32, tolerance):
    shapes = [(2, 16, 16, 16, 16), (1, 3, 17, 9, 21), (3, 20, 40, 7, 6), (1, 33, 5, 11, 2),
              (2, 1, 1, 2, 3), (540, 2, 3, 3, 2),  # more tiles than shares of a gradient
              (0, 8, 8, 4, 4)]
    for i, (n, c, k, height, width) in enumerate(shapes):
        torch.manual_seed(i)
        x = torch.randn(n, c, height, width).relu().to(dtype)
        weight = (torch.randn(k, c, 3, 3) / (9 * c) ** 0.5).to(dtype)
        if i % 2:
            weight = weight.to(memory_format=torch.channels_last)
        y, pooled = kernels.native_pool_conv2d(x.float(), weight.float(), downsample)
        grad_y = torch.randn_like(y).to(dtype)
        grad_pooled = torch.randn_like(pooled).to(dtype) * (downsample == "maxpool")
        results = run(ops, x, weight, downsample, grad_y, grad_pooled, tf32)
        for one, exact in zip(results, reference(x, weight, downsample, grad_y, grad_pooled)):
            assert distance(one, exact) <= tolerance


@pytest.mark.parametrize("precision, override, expected", [
    ("tf32", "", True), ("ieee", "", False), ("tf32", "0", False)])
def test_torchs_precision_of_convolutions_decides(monkeypatch, precision, override, expected):
    conv = SimpleNamespace(fp32_precision=precision)
    monkeypatch.setattr(torch.backends.cudnn, "conv", conv)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", override)
    assert kernels.allows_tf32() == expected
