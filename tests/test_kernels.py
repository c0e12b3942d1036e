"""kernels/: the operator against float64, its torch rules, its build; CUDA source on a CPU."""
import ctypes
import json
import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SMALL, shell

import kernels
from kernels import pool_conv2d

MODES = ("none", "maxpool", "stride")
pytestmark = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "c++")),
                                reason="no C++ compiler")


@pytest.fixture(scope="module", autouse=True)
def built():
    kernels.load()


def reference(x, weight, downsample, grad_y, grad_pooled):
    """y, pooled and both gradients by torch's own operators in float64."""
    x, weight = (t.detach().double().requires_grad_() for t in (x, weight))
    pooled = F.max_pool2d(x, 2) if downsample == "maxpool" else x
    y = F.conv2d(pooled, weight, stride=2 if downsample == "stride" else 1, padding=1)
    torch.autograd.backward((y, pooled * 1), (grad_y.double(), grad_pooled.double()))
    return y, pooled, x.grad, weight.grad


def distance(found, expected):
    """Relative Frobenius error."""
    return ((found.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def check(x, weight, downsample, tolerances):
    x, weight = x.requires_grad_(), weight.requires_grad_()
    y, pooled = pool_conv2d(x, weight, downsample)
    grad_y, grad_pooled = torch.randn_like(y), torch.randn_like(pooled)
    torch.autograd.backward((y, pooled * 1), (grad_y, grad_pooled))
    expected = reference(x, weight, downsample, grad_y, grad_pooled)
    assert torch.equal(pooled.double(), expected[1])
    for found, true, tolerance in zip((y, x.grad, weight.grad), (expected[0], *expected[2:]),
                                      tolerances):
        assert found.shape == true.shape
        assert distance(found, true) <= tolerance
    assert downsample != "none" or pooled is x


def test_random_shapes_against_float64():
    rng = np.random.default_rng(0)
    for case in range(150):
        torch.manual_seed(case)
        downsample, layout = MODES[case % 3], case // 3 % 3
        n, c, k = rng.integers(0, 6), *rng.integers(1, 71, 2)
        h, w = rng.integers(2 if downsample == "maxpool" else 1, 41, 2)
        dtype = torch.float64 if case % 10 == 9 else torch.float32
        x = torch.randn(n, c, h, w, dtype=dtype).relu()  # zeros tie in the pooling
        if layout == 1:
            x = x.to(memory_format=torch.channels_last)
        elif layout == 2:  # neither
            x = torch.cat([x, x], 3)[..., ::2] if w % 2 == 0 else x.mT.contiguous().mT
        weight = torch.randn(k, c, 3, 3, dtype=dtype)
        limits = (1e-12,) * 3 if dtype == torch.float64 else (3e-6, 3e-6, 2e-5)
        check(x.detach(), weight, downsample, limits)


@pytest.mark.parametrize("c, k, size", [(16, 16, 32), (16, 32, 16), (32, 32, 16), (32, 64, 8),
                                        (64, 64, 8)])
def test_resnet_layers_are_as_accurate_as_promised(c, k, size):
    torch.manual_seed(0)
    x, weight = torch.randn(16, c, size, size).relu(), torch.randn(k, c, 3, 3) / (9 * c) ** 0.5
    check(x, weight, "none", (2e-6, 2e-6, 2e-5))
    check(torch.randn(16, c, 2 * size, 2 * size), weight.detach(), "maxpool", (2e-6, 2e-6, 2e-5))


@pytest.mark.parametrize("downsample", MODES)
def test_gradients_by_finite_differences(downsample):
    torch.manual_seed(0)
    x = torch.randperm(2 * 3 * 5 * 6).view(2, 3, 5, 6).double().div(180).requires_grad_()  # no ties
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: pool_conv2d(x, w, downsample), (x, weight))


@pytest.mark.parametrize("part", [0, 1])
def test_gradient_through_one_output_only(part):
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    weight = torch.randn(8, 8, 3, 3, requires_grad=True)
    outputs = pool_conv2d(x, weight, "maxpool")
    outputs[part].sum().backward()
    zero = [torch.ones_like(o) if i == part else torch.zeros_like(o)
            for i, o in enumerate(outputs)]
    _, _, grad_x, grad_weight = reference(x, weight, "maxpool", *zero)
    assert distance(x.grad, grad_x) < 3e-6
    assert weight.grad is None or distance(weight.grad, grad_weight) < 2e-5


def test_pooling_treats_ties_nan_infinity_and_denormals_as_torch_does():
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, float("nan"), float("inf"), -float("inf"), 1e-42])
    for channels in (8, 3):
        torch.manual_seed(channels)
        x = values[torch.randint(0, 8, (2, channels, 15, 14))].requires_grad_()
        weight = torch.randn(8, channels, 3, 3)
        y, pooled = pool_conv2d(x, weight, "maxpool")
        expected = F.max_pool2d(x, 2)
        assert torch.equal(pooled.isnan(), expected.isnan())
        assert torch.equal(pooled.nan_to_num(), expected.nan_to_num())
        grad = torch.randn_like(pooled)
        found, = torch.autograd.grad(pooled, x, grad)
        true, = torch.autograd.grad(expected, x, grad)
        assert torch.equal(found, true)
        assert y[F.conv2d(expected, weight, padding=1).isnan()].isnan().all()
    x = torch.full((1, 8, 8, 8), 1e-41)
    y, _ = pool_conv2d(x, torch.ones(8, 8, 3, 3))
    assert torch.allclose(y, F.conv2d(x, torch.ones(8, 8, 3, 3), padding=1), rtol=0, atol=1e-40)


def test_bits_do_not_change_from_run_to_run_or_between_threads():
    torch.manual_seed(0)
    x, weight = torch.randn(7, 20, 18, 18), torch.randn(24, 20, 3, 3)
    gradient = torch.randn(7, 24, 9, 9)

    def once():
        a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y, _ = pool_conv2d(a, w, "maxpool")
        y.backward(gradient)
        return y.detach(), a.grad, w.grad
    first, others = once(), []
    threads = [threading.Thread(target=lambda: others.extend(once() for _ in range(20)))
               for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(others) == 40
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other))


# -------------------------------------------------------------------------- as a torch operator

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("downsample", MODES)
def test_opcheck(downsample, dtype):
    x = torch.randn(2, 8, 6, 7, dtype=dtype, requires_grad=True)
    weight = torch.randn(9, 8, 3, 3, dtype=dtype, requires_grad=True)
    torch.library.opcheck(torch.ops.pool_conv.forward, (x, weight, kernels.MODES[downsample]))


def test_compiles_without_a_graph_break():
    def block(x, weight):
        y, pooled = pool_conv2d(x.relu(), weight, "maxpool")
        return y.relu().sum() + pooled.mean()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x, weight = torch.randn(2, 8, 8, 8, requires_grad=True), torch.randn(8, 8, 3, 3)
    expected, = torch.autograd.grad(block(x, weight), x)
    found, = torch.autograd.grad(compiled(x, weight), x)
    assert torch.equal(found, expected)


def test_vmap_autocast_and_second_derivative():
    x, weight = torch.randn(3, 2, 8, 6, 6), torch.randn(8, 8, 3, 3)
    found, _ = torch.func.vmap(lambda x: pool_conv2d(x, weight, "maxpool"))(x)
    assert all(torch.equal(a, pool_conv2d(b, weight, "maxpool")[0]) for a, b in zip(found, x))
    with torch.autocast("cpu", torch.bfloat16):
        y, pooled = pool_conv2d(x[0], weight, "maxpool")
    assert y.dtype == pooled.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.float16):
        assert pool_conv2d(x[0], weight)[0].dtype == torch.float16
    assert distance(y, F.conv2d(F.max_pool2d(x[0], 2), weight, padding=1).double()) < 0.02
    x = x[0].requires_grad_()
    gradient, = torch.autograd.grad(pool_conv2d(x, weight)[0].square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("x, weight, downsample, error", [
    (torch.ones(2, 3, 4), torch.ones(4, 3, 3, 3), "none", ValueError),
    (torch.ones(2, 3, 4, 4), torch.ones(4, 3, 5, 5), "none", ValueError),
    (torch.ones(2, 3, 4, 4), torch.ones(4, 2, 3, 3), "none", ValueError),
    (torch.ones(2, 3, 1, 4), torch.ones(4, 3, 3, 3), "maxpool", ValueError),
    (torch.ones(2, 3, 4, 4), torch.ones(4, 3, 3, 3), "average", ValueError),
    (torch.ones(2, 3, 4, 4), torch.ones(4, 3, 3, 3, device="meta"), "none", ValueError),
    (torch.ones(2, 3, 4, 4), torch.ones(4, 3, 3, 3).double(), "none", TypeError),
    (torch.ones(2, 3, 4, 4).int(), torch.ones(4, 3, 3, 3).int(), "none", TypeError),
    ([[1.0]], torch.ones(4, 3, 3, 3), "none", TypeError)])
def test_wrong_arguments(x, weight, downsample, error):
    with pytest.raises(error):
        pool_conv2d(x, weight, downsample)


# ---------------------------------------------------------------------------------------- build

def run_without(tmp_path, *argv, **environment):
    """A tiny search in a fresh build folder, with a changed environment."""
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path / "build")} | environment
    return subprocess.run([sys.executable, str(ROOT / "search_single.py"), *SMALL, "--epochs", "1",
                           *argv], cwd=tmp_path, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("environment", [{"PATH": ""}, {"CXX": "/bin/false"},
                                         {"CXX": "no-such-compiler"}])
def test_what_cannot_be_built(environment, tmp_path):
    done = run_without(tmp_path, "--kernel", "fused", **environment)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error: --kernel fused: the kernels cannot")
    assert "Traceback" not in done.stderr
    done = run_without(tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("native ops are used") == 1
    assert '"kernel": "native"' in (tmp_path / "runs/single-digits/config.json").read_text()


def test_the_folder_works_alone_is_built_once_and_again_when_it_changes(tmp_path):
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    code = ("import torch; from kernels import pool_conv2d; "
            "print(pool_conv2d(torch.ones(1, 8, 4, 4), torch.ones(8, 8, 3, 3))[0].sum().item())")
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path / "build")}

    def start():
        return subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, text=True,
                                env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    outputs = [process.communicate() for process in (start(), start())]  # the second one waits
    assert [float(out) for out, _ in outputs] == [pytest.approx(8 * 8 * 100)] * 2
    assert sum("building the kernels" in err for _, err in outputs) == 1
    with open(tmp_path / "kernels" / "pool_conv.h", "a") as file:
        file.write("// changed\n")
    out, err = start().communicate()
    assert float(out) == pytest.approx(6400) and "building the kernels" in err


def test_stages_run_without_the_folder(tmp_path):
    for file in ("common.py", "search_single.py"):
        shutil.copy(ROOT / file, tmp_path)
    done = shell("search_single.py", *SMALL, "--epochs", "1", cwd=tmp_path, root=tmp_path)
    assert done.returncode == 0 and "native ops are used" in done.stderr, done.stderr


def test_benchmark_writes_its_table(tmp_path):
    done = shell("kernels/benchmark.py", "--layers", "8,8,8", "--batch", "4", "--repeats", "1",
                 cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.count("training step") == 3, done.stderr
    result = json.loads((tmp_path / "runs/benchmark/benchmark.json").read_text())
    assert [row["downsample"] for row in result["layers"]] == list(MODES)
    for row in result["layers"]:
        assert max(row["error"].values()) < 2e-5
        for found in row["passes"].values():
            assert found["ratio"] == pytest.approx(found["native_ms"][1] / found["fused_ms"][1])
    assert (tmp_path / "runs/benchmark/benchmark.png").stat().st_size > 10000


def test_benchmark_of_the_loop_writes_its_table(tmp_path):
    done = shell("kernels/benchmark.py", "--loop", "--batch", "4", "--repeats", "1", cwd=tmp_path)
    assert done.returncode == 0 and "direct-convolution equivalents" in done.stdout, done.stderr
    result = json.loads((tmp_path / "runs/benchmark/loop.json").read_text())
    assert list(result["loop"]) == ["fused", "native", "plain 0 workers", "plain 2 workers"]
    for row in result["loop"].values():
        assert row["hours_per_100_epochs"] == pytest.approx(row["mean_ms"] * 25000 / 4 / 36000)
        assert row["evaluation_minutes, M = 4"] > 0 and 0.2 < row["peak_gb"] < 4
    for who in ("fused", "native"):
        row = result["loop"][who]
        assert 0 < row["outside_the_network"] < 1
        assert row["utilisation"] == pytest.approx(
            2 * row["macs"] / 40 / row["mean_ms"] / 1e6 / result["probe_gflops"])


# ----------------------------------------------------------------------------------------- CUDA

@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("downsample", MODES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 3e-6), (torch.float16, 2e-3),
                                              (torch.bfloat16, 1e-2)])
def test_on_a_gpu(dtype, tolerance, downsample):
    for n, c, k, height, width in ((8, 16, 32, 32, 32), (3, 20, 40, 7, 6), (0, 4, 4, 4, 4)):
        x = torch.randn(n, c, height, width, device="cuda").relu().to(dtype)
        weight = (torch.randn(k, c, 3, 3, device="cuda") / (9 * c) ** 0.5).to(dtype)
        check(x, weight, downsample, (tolerance,) * 3)


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
def test_nvcc_accepts_the_kernels(tmp_path):
    targets = [flag for n in (80, 90) for flag in ("-gencode", f"arch=compute_{n},code=sm_{n}")]
    done = subprocess.run(["nvcc", "-std=c++17", "-O3", *targets, "--threads", "2", "-Werror",
                           "all-warnings", "-c", str(ROOT / "kernels" / "pool_conv.cu"), "-o",
                           str(tmp_path / "out.o")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


WRAPPER = """
#include "cuda_emulation.h"
#include "pool_conv.cu"
using namespace pool_conv;
#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT int64_t partial(Layer* g) { return partial_floats(*g); }
EXPORT void forward(int t, Layer* g, bool plain, Source* x, void* w, void* y, void* pooled,
                    uint8_t* argmax, Affine* affine, float* partial, float* norm_y) {
  launch_forward(Type(t), *g, plain, *x, w, y, pooled, argmax, *affine, partial, norm_y, nullptr);
}
EXPORT void grad_input(int t, Layer* g, Source* gy, void* w, uint8_t* argmax, Source* extra,
                       void* gx, Source* x, float* gamma, float* partial, float* back_x) {
  launch_grad_input(Type(t), *g, *gy, w, argmax, *extra, gx, *x, gamma, partial, back_x, nullptr);
}
EXPORT void grad_weight(int t, Layer* g, Source* x, Source* gy, float* partial, void* result) {
  launch_grad_weight(Type(t), *g, *x, *gy, partial, result, nullptr);
}
EXPORT void moments(int t, int64_t n, int c, void* y, Affine* affine, float* partial, float* norm) {
  launch_moments(Type(t), n, c, y, *affine, partial, norm, nullptr);
}
EXPORT void finish(int t, int64_t n, int c, void* y, float* norm, void* r, float* norm_r,
                   void* out) {
  launch_finish(Type(t), n, c, y, norm, r, norm_r, out, nullptr);
}
EXPORT void finish_backward(int t, int64_t n, int c, Source* g, void* y, float* norm, float* gamma,
                            float* partial, float* back) {
  launch_finish_backward(Type(t), n, c, *g, y, norm, gamma, partial, back, nullptr);
}
EXPORT void apply_backward(int t, int64_t n, int c, Source* g, void* to) {
  launch_apply_backward(Type(t), n, c, *g, to, nullptr);
}
"""
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The very source of the CUDA kernels, compiled for the CPU."""
    library = tmp_path_factory.mktemp("cuda") / "emulated.so"
    subprocess.run(["g++", "-std=c++17", "-O2", "-fPIC", "-shared", "-x", "c++", "-", "-I",
                    str(ROOT / "tests"), "-I", str(ROOT / "kernels"), "-Wno-unknown-pragmas", "-o",
                    str(library)], input=WRAPPER, text=True, check=True)
    return ctypes.CDLL(str(library))


def pointer(tensor):
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


def guarded(shape, dtype):
    """A tensor, NHWC, amid values that nothing may change; and the check that none did."""
    count = int(np.prod(shape))
    memory = torch.full((count + 64,), 7.0).to(dtype)
    n, c, h, w = shape
    tensor = memory[32:32 + count].view(n, h, w, c).permute(0, 3, 1, 2)
    return tensor, lambda: bool((memory[:32] == 7).all() and (memory[32 + count:] == 7).all())


def source(*tensors):
    """A pointer to a Source: x, norm, out, y, back."""
    return (ctypes.c_void_p * 5)(*(pointer(t) for t in tensors))


class Affine(ctypes.Structure):
    _fields_ = [("gamma", ctypes.c_void_p), ("beta", ctypes.c_void_p), ("eps", ctypes.c_double)]


def affine(gamma, beta, eps):
    return ctypes.byref(Affine(pointer(gamma), pointer(beta), eps))


class Emulated:
    """The operators of torch.ops.pool_conv by the emulated kernels, as binding.cpp calls them."""

    def __init__(self, library, plain=False):
        self.library, self.plain = library, plain
        library.partial.restype = ctypes.c_int64

    def layer(self, x, weight, mode, x_height, x_width):
        stride, (n, c, height, width) = (2 if mode == 2 else 1), x.shape
        sizes = [n, x_height, x_width, height, width, (height - 1) // stride + 1,
                 (width - 1) // stride + 1, c, len(weight), stride]
        layer = (ctypes.c_int * 10)(*sizes)
        return layer, sizes[5:7], torch.full((self.library.partial(layer),), torch.nan)

    def norm_conv(self, x, norm, weight, gamma, beta, eps, mode, normalise):
        x = nhwc(x)
        n, c, height, width = x.shape
        size = (height // 2, width // 2) if mode == 1 else (height, width)
        pooled, untouched_p = guarded((n, c, *size), x.dtype)
        argmax, untouched_a = guarded((n, c, *size), torch.uint8)
        layer, out_size, partial = self.layer(pooled, weight, mode, height, width)
        y, untouched_y = guarded((n, len(weight), *out_size), x.dtype)
        norm_y = torch.full((6, len(weight)), torch.nan) if normalise else None
        self.library.forward(
            TYPES[x.dtype], layer, self.plain, source(x, norm), pointer(weight), pointer(y),
            pointer(pooled if mode == 1 else None), pointer(argmax if mode == 1 else None),
            affine(gamma, beta, eps), pointer(partial), pointer(norm_y))
        assert untouched_y() and untouched_p() and untouched_a()
        return y, norm_y, pooled, argmax

    def norm_conv_backward(self, grad, out, y, back, x, norm, gamma, weight, argmax, extra,
                           extra_out, mode, height, width, want_x, want_weight):
        x, grad, extra = nhwc(x), nhwc(grad), nhwc(extra)
        if mode != 1:
            height, width, argmax = *x.shape[2:], None
        layer, _, partial = self.layer(x, weight, mode, height, width)
        grad_x, untouched = guarded((*x.shape[:2], height, width), x.dtype)
        if mode == 1:
            grad_x.zero_()
        back_x = torch.full((6, x.shape[1]), torch.nan) if norm is not None else None
        of_x, of_grad = source(x, norm), source(grad, None, out, y, back)
        self.library.grad_input(
            TYPES[x.dtype], layer, of_grad, pointer(weight), pointer(argmax),
            source(extra, None, extra_out), pointer(grad_x), of_x, pointer(gamma),
            pointer(partial), pointer(back_x))
        grad_weight = torch.empty_like(weight)
        self.library.grad_weight(TYPES[x.dtype], layer, of_x, of_grad, pointer(partial),
                                 pointer(grad_weight))
        assert untouched()
        return grad_x, grad_weight, back_x

    def by_pixel(self, name, y, *arguments):
        n, c, height, width = y.shape
        getattr(self.library, name)(TYPES[y.dtype], ctypes.c_int64(n * height * width), c,
                                    *arguments)

    def moments(self, y, gamma, beta, eps):
        norm, partial = torch.empty(6, y.shape[1]), torch.full((1024, y.shape[1]), torch.nan)
        self.by_pixel("moments", y, pointer(y), affine(gamma, beta, eps),
                      pointer(partial), pointer(norm))
        return norm

    def finish(self, y, norm, r, norm_r):
        out, untouched = guarded(y.shape, y.dtype)
        self.by_pixel("finish", y, pointer(y), pointer(norm), pointer(r), pointer(norm_r),
                      pointer(out))
        assert untouched()
        return out

    def finish_backward(self, grad, out, y, norm, gamma, r, norm_r, gamma_r):
        grad, backs = nhwc(grad), []
        for y, norm, gamma in ((y, norm, gamma), (r, norm_r, gamma_r)):
            backs.append(torch.empty(6, out.shape[1]))
            partial = torch.full((1024, out.shape[1]), torch.nan)
            if norm is not None:
                self.by_pixel("finish_backward", y, source(grad, None, out), pointer(y),
                              pointer(norm), pointer(gamma), pointer(partial), pointer(backs[-1]))
        return backs

    def apply_backward(self, grad, out, y, back):
        grad = nhwc(grad)
        grad_y, untouched = guarded(y.shape, y.dtype)
        self.by_pixel("apply_backward", y, source(grad, None, out, y, back), pointer(grad_y))
        assert untouched()
        return grad_y


def nhwc(tensor):
    return tensor if tensor is None else tensor.contiguous(memory_format=torch.channels_last)


def run_emulated(library, x, weight, downsample, grad_y, grad_pooled, plain):
    ops, mode = Emulated(library, plain), kernels.MODES[downsample]
    y, _, pooled, argmax = ops.norm_conv(x, None, weight, None, None, 0, mode, False)
    x_in = pooled if downsample == "maxpool" else x
    grad_x, grad_weight, _ = ops.norm_conv_backward(
        grad_y, None, None, None, x_in, None, None, weight, argmax,
        grad_pooled if downsample == "maxpool" else None, None, mode, *x.shape[2:], True, True)
    return y, x_in, grad_x, grad_weight


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 3e-6), (torch.float16, 2e-3),
                                              (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("downsample", MODES)
@pytest.mark.parametrize("plain", [True, False])
def test_cuda_kernels_on_a_cpu_against_float64(emulated, plain, downsample, dtype, tolerance,
                                               monkeypatch):
    shapes = [(2, 16, 16, 16, 16), (1, 3, 17, 9, 21), (3, 20, 40, 7, 6), (1, 33, 5, 11, 2),
              (2, 1, 1, 2, 3), (75, 2, 3, 17, 4)]  # the last: more tiles than shares of a gradient
    for i, (n, c, k, height, width) in enumerate(shapes):
        monkeypatch.setenv("EMULATION_ORDER", str(i % 3))
        torch.manual_seed(i)
        x = torch.randn(n, c, height, width).relu().to(dtype)
        weight = (torch.randn(k, c, 3, 3) / (9 * c) ** 0.5).to(dtype)
        size = F.max_pool2d(x.float(), 2).shape[2:] if downsample == "maxpool" else x.shape[2:]
        grad_pooled = torch.randn(n, c, *size).to(dtype)
        grad_y = torch.randn_like(F.conv2d(grad_pooled.float(), weight.float(), padding=1,
                                           stride=2 if downsample == "stride" else 1)).to(dtype)
        if downsample != "maxpool":
            grad_pooled.zero_()
        found = run_emulated(emulated, x, weight, downsample, grad_y, grad_pooled, plain)
        expected = reference(x, weight, downsample, grad_y, grad_pooled)
        assert torch.equal(found[1].double(), expected[1])
        for one, true in zip((found[0], *found[2:]), (expected[0], *expected[2:])):
            assert distance(one, true) <= tolerance


def test_cuda_results_do_not_depend_on_the_order_of_threads(emulated, monkeypatch):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 20, 18, 18), torch.randn(24, 20, 3, 3)
    grad_y, grad_pooled = torch.randn(2, 24, 9, 9), torch.randn(2, 20, 9, 9)
    results = []
    for order in "012":
        monkeypatch.setenv("EMULATION_ORDER", order)
        results.append(run_emulated(emulated, x, weight, "maxpool", grad_y, grad_pooled, False))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


def test_cuda_pooling_treats_ties_and_nan_as_torch_does(emulated):
    values = torch.tensor([0.0, -0.0, 1.0, float("nan"), float("inf"), -float("inf")])
    torch.manual_seed(0)
    x, weight = values[torch.randint(0, 6, (2, 5, 9, 8))].requires_grad_(), torch.zeros(3, 5, 3, 3)
    expected = F.max_pool2d(x, 2)
    gradient = torch.randn_like(expected)
    expected.backward(gradient)
    for plain in (True, False):
        _, pooled, grad_x, _ = run_emulated(emulated, x.detach(), weight, "maxpool",
                                            torch.zeros(2, 3, 4, 4), gradient, plain)
        assert torch.equal(pooled.nan_to_num(), expected.detach().nan_to_num())
        assert torch.equal(pooled.isnan(), expected.isnan()) and torch.equal(grad_x, x.grad)
