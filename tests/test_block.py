"""Blocks and stems of kernels/ against the same modules in float64: by the CPU kernels, by the
source of the CUDA kernels run on the CPU, and where they must not be fused."""
import copy
from types import MethodType

import pytest
import test_kernels
import torch
import torch.nn as nn
import torch.nn.functional as F
from test_kernels import distance, emulated_only, run
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import kernels

pytestmark = test_kernels.pytestmark
ops = test_kernels.ops  # a fixture
# n, c_in, c_out, height, width, downsample, affine parameters and running statistics
CASES = [(3, 16, 16, 12, 12, "none", False), (3, 16, 16, 12, 12, "none", True),
         (2, 16, 32, 16, 16, "maxpool", False), (3, 20, 20, 9, 11, "maxpool", True),
         (2, 33, 40, 7, 5, "none", True), (5, 8, 8, 5, 6, "maxpool", False),
         (4, 64, 64, 2, 3, "none", False), (8, 9, 17, 5, 3, "maxpool", True),
         (2, 3, 8, 6, 4, "maxpool", True)]


def make_norm(channels, full):
    norm = nn.BatchNorm2d(channels, affine=full, track_running_stats=full)
    if full:
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            nn.init.normal_(tensor)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return norm


class Block(nn.Module):
    def __init__(self, c_in, c_out, full):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
        self.norm1 = make_norm(c_out, full)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.norm2 = make_norm(c_out, full)
        self.shortcut = nn.Sequential() if full else None
        if c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, bias=False),
                                          make_norm(c_out, full))

    def forward(self, x, downsample="none"):
        return kernels.basic_block(x, self.conv1, self.norm1, self.conv2, self.norm2,
                                   self.shortcut, downsample)

    def parts(self, x, downsample="none"):
        """The inputs of both ReLUs, by torch's operators."""
        if downsample == "maxpool":
            x = F.max_pool2d(x, 2)
        stride = 2 if downsample == "stride" else 1
        y = F.conv2d(x, self.conv1.weight, stride=2, padding=1) if stride == 2 else self.conv1(x)
        first = self.norm1(y)
        x = x[:, :, ::stride, ::stride]
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return first, self.norm2(self.conv2(first.relu())) + shortcut

    def native(self, x, downsample="none"):
        return self.parts(x, downsample)[1].relu()


def train(layer, forward, x, grad, *arguments):
    """Output, gradients of x and of the parameters, running statistics after the step."""
    x = x.detach().clone().requires_grad_()
    out = forward(x, *arguments)
    out.backward(grad.to(out.dtype))
    buffers = [buffer.double() for buffer in layer.buffers()]
    return [out, x.grad, *(p.grad for p in layer.parameters()), *buffers]


def in_float64(layer, x, grad, *arguments):
    exact = copy.deepcopy(layer).double()
    return train(exact, getattr(exact, "native", exact), x.double(), grad.double(), *arguments)


def assert_close(results, expected, tolerance):
    for one, exact in zip(results, expected, strict=True):
        assert one.shape == exact.shape
        assert distance(one, exact) < tolerance


def make_case(n, c_in, c_out, height, width, downsample, full, change=None):
    """Block, input, gradient of the output; where no ReLU is so near to 0 that rounding, which is
    another on another CPU, could open or close it."""
    for seed in range(100):
        torch.manual_seed(seed)
        block = Block(c_in, c_out, full)
        if change:
            change(block)
        x = torch.randn(n, c_in, height, width).relu()
        first, second = copy.deepcopy(block).double().parts(x.double(), downsample)
        if min(first.abs().min(), second.abs().min()) > 2e-5:
            return block, x, torch.randn(second.shape)
    raise AssertionError("no such case")


# ---------------------------------------------------------------------------------------- fused

@pytest.mark.parametrize("case", CASES)
def test_block_against_float64(ops, case):
    block, x, grad = make_case(*case)
    expected = in_float64(block, x, grad, case[5])
    results = train(block, block, x, grad, case[5])
    assert "BasicBlock" in results[0].grad_fn.name()
    assert_close(results, expected, 5e-5)
    with torch.no_grad():  # by the running statistics
        exact = copy.deepcopy(block).double().eval().native(x.double(), case[5])
        assert distance(block.eval()(x, case[5]), exact) < 2e-6


@emulated_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_block_of_fewer_bits_on_a_gpu(ops, monkeypatch, dtype):
    """By the CUDA kernels' source in TF32 and under autocast, against the modules in half types."""
    monkeypatch.setattr(kernels.block, "allows_tf32", lambda: True)
    monkeypatch.setattr(kernels.block, "_has_type", lambda x: True)
    block, x, grad = make_case(*CASES[3])
    block.to(memory_format=torch.channels_last)
    other = copy.deepcopy(block)
    expected = in_float64(block, x, grad, "maxpool")
    with torch.autocast("cpu", torch.bfloat16):  # three bits less than TF32 and float16
        native = train(other, other.native, x, grad, "maxpool")
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        results = train(block, block, x, grad, "maxpool")
    assert "BasicBlock" in results[0].grad_fn.name() and results[0].dtype == dtype
    assert block.conv1.weight.grad.stride() == block.conv1.weight.stride()
    allowed = 1.5 if dtype == torch.bfloat16 else 0.5
    for one, by_native, exact in zip(results, native, expected, strict=True):
        assert distance(one, exact) < allowed * distance(by_native, exact) + 1e-6
    assert distance(results[0], expected[0]) > 1e-5


def make_stem(full):
    """As a chain of torch's modules, and its fused forward pass."""
    conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
    layers = nn.Sequential(conv, make_norm(16, full), nn.ReLU())
    return layers, lambda x: kernels.stem(x, layers[0], layers[1])


@pytest.mark.parametrize("full", [False, True])
def test_stem_against_float64(ops, full):
    torch.manual_seed(0)
    layers, stem = make_stem(full)
    x = torch.randn(3, 3, 9, 10)
    grad = torch.randn(3, 16, 9, 10)
    expected = in_float64(layers, x, grad)
    results = train(layers, stem, x, grad)
    assert "NormReLU" in results[0].grad_fn.name()
    assert_close(results, expected, 2e-5)


def test_statistics_do_not_cancel(ops):
    """A mean of 1000 beside a standard deviation of 0.01, which float32 sums would lose."""
    torch.manual_seed(0)
    y = 1000 + 0.01 * torch.randn(4, 20, 17, 19).to(memory_format=torch.channels_last)
    y[:, 3] = 7.0  # constant
    identity = torch.zeros(20, 20, 3, 3)
    identity[range(20), range(20), 1, 1] = 1
    convolved, rows, _, _ = ops.norm_conv(y, None, identity, None, None, 1e-5, 0, True)
    for tensor, norm in ((y, ops.moments(y, None, None, 1e-5)), (convolved, rows)):
        exact = tensor.double()
        center, offset, _, _, _, variance = norm.double()
        assert (center + offset - exact.mean((0, 2, 3))).abs().max() < 1e-7
        assert torch.allclose(variance, exact.var((0, 2, 3), correction=0), rtol=1e-4, atol=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU, or not asked for: GPU=0")
@pytest.mark.parametrize("case", CASES)
def test_block_on_a_gpu(case):
    block, x, grad = make_case(*case)
    expected = in_float64(block, x, grad, case[5])
    results = train(block.cuda(), block, x.cuda(), grad.cuda(), case[5])
    assert_close([result.cpu() for result in results], expected, 5e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU, or not asked for: GPU=0")
def test_a_norm_on_another_device_is_refused():
    block = Block(16, 16, True).cuda()
    block.norm2.cpu()
    with pytest.raises(ValueError, match="is on cpu, not on cuda:0"):
        block(torch.ones(2, 16, 4, 4, device="cuda"))


# --------------------------------------------------------------------- operators called directly

class Recorder(TorchDispatchMode):
    """Keeps every call of our operators: function and arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in ("pool_conv", "emulated"):
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


@pytest.fixture
def calls(ops):
    """Calls of all operators, by a block with all that a block can have and a convolution alone."""
    block, x, grad = make_case(2, 8, 12, 5, 6, "maxpool", True)
    with Recorder() as recorder:
        train(block, block, x, grad, "maxpool")
        with torch.no_grad():
            run(ops, x, block.conv1.weight, "maxpool", grad, x[:, :, :2, :3])
    assert len({function for function, _ in recorder.calls}) == 8
    return recorder.calls


def wrong_versions(argument):
    """What no operator takes in place of an argument, and the errors."""
    if type(argument) is int:  # a mode or a size
        return [(argument + 5, ValueError), (-1, ValueError)]
    if not isinstance(argument, torch.Tensor) or argument.numel() == 0:
        return []
    fewer = argument[:, 1:] if argument.dim() > 1 else argument[1:]
    freed = argument.clone()
    freed.untyped_storage().resize_(0)
    wrong = [(fewer, ValueError), (argument.int(), TypeError), (freed, ValueError),
             (argument.to("meta"), (ValueError, NotImplementedError))]
    if argument.is_floating_point():
        wrong.append((forward_ad.make_dual(argument, argument), NotImplementedError))
    return wrong


@torch.no_grad()
def test_operators_check_every_tensor(calls):
    """And every mode and size: instead of reading, or writing, where nothing is."""
    with forward_ad.dual_level():
        for function, args in calls:
            for i, argument in enumerate(args):
                for wrong, errors in wrong_versions(argument):
                    with pytest.raises(errors):
                        function(*args[:i], wrong, *args[i + 1:])


def test_operators_refuse_what_has_no_kernel(ops):
    x = torch.ones(2, 8, 4, 4)
    weight = torch.ones(8, 8, 3, 3)
    norm = torch.ones(6, 8)
    with pytest.raises(ValueError, match="not both"):
        ops.norm_conv(x, norm, weight, None, None, 0, kernels.MODES["maxpool"], False)
    with pytest.raises(ValueError, match="too small"):
        ops.forward(x[:, :, :1], weight, kernels.MODES["maxpool"])
    with pytest.raises(ValueError, match="is empty"):
        ops.moments(x[:0], None, None, 0)


def test_a_wild_argmax_is_refused():
    """ATen's max-pool, which runs in float64, would write wherever it says."""
    kernels.load()
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    weight = torch.randn(3, 3, 3, 3, dtype=torch.float64)
    for index in (-1, 16, 1 << 40):
        argmax = torch.full(x.shape, index)
        with pytest.raises(ValueError, match="argmax"):
            torch.ops.pool_conv.backward(x, None, x, weight, argmax, 1, 4, 4, True, True)


# ------------------------------------------------------------------------------------ not fused

@pytest.mark.parametrize("c_in, c_out, downsample, dtype, in_evaluation", [
    (16, 24, "stride", torch.float32, ""), (4, 4, "maxpool", torch.float32, ""),
    (16, 16, "maxpool", torch.float64, ""),
    (16, 24, "maxpool", torch.float32, "norm1 norm2 shortcut"),
    (16, 16, "none", torch.float32, "norm2")])
def test_unfused_block_against_float64(c_in, c_out, downsample, dtype, in_evaluation):
    block, x, grad = make_case(3, c_in, c_out, 7, 8, downsample, True)
    block.to(dtype)
    for name in in_evaluation.split():
        getattr(block, name).eval()
    expected = in_float64(block, x.to(dtype), grad, downsample)
    assert_close(train(block, block, x.to(dtype), grad, downsample), expected, 5e-5)


def test_block_under_autocast():
    block, x, grad = make_case(3, 16, 24, 8, 8, "maxpool", True)
    exact = copy.deepcopy(block).double().native(x.double(), "maxpool")
    with torch.autocast("cpu", torch.bfloat16):
        out = block(x, "maxpool")
        of_stem = make_stem(True)[1](x[:, :3])
    assert out.dtype == of_stem.dtype == torch.bfloat16
    assert distance(out, exact) < 0.02


def test_block_compiles_without_a_graph_break():
    kernels.load()
    block, x, grad = make_case(*CASES[2])
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    expected = in_float64(block, x, grad, "maxpool")
    assert_close(train(block, compiled, x, grad, "maxpool"), expected, 5e-5)


@pytest.mark.parametrize("downsample", ["maxpool", "stride"])
def test_operations_are_counted_on_meta_tensors(downsample):
    with torch.device("meta"):
        layers, stem = make_stem(True)
        block = Block(16, 32, True)
        x = torch.zeros(2, 3, 8, 8)
    counts = []
    for first, second in ((stem, block), (layers, block.native)):
        with FlopCounterMode(display=False) as counter:
            out = second(first(x), downsample)
        counts.append((out.shape, counter.get_total_flops()))
    assert counts[0] == counts[1] and counts[0][1] > 0


@pytest.mark.parametrize("training", [True, False])
def test_an_empty_batch_is_torchs(training):
    block = Block(16, 16, True).train(training)
    native = copy.deepcopy(block)
    x = torch.zeros(0, 16, 8, 8)
    grad = torch.zeros(0, 16, 4, 4)
    expected = train(native, native.native, x, grad, "maxpool")
    results = train(block, block, x, grad, "maxpool")
    assert all(map(torch.equal, results, expected))
    with torch.no_grad():
        assert block(x, "maxpool").shape == grad.shape


def test_no_second_derivative_and_no_transform_is_fused():
    """torch's once_differentiable would let the former pass, with zeros."""
    block = Block(16, 16, False)
    x = torch.randn(2, 16, 6, 6, requires_grad=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.functional.hvp(lambda x: block(x, "none").square().sum(), x, x)

    def loss(forward):
        return lambda x: forward(x, "none").square().sum()
    with torch.no_grad():
        expected = torch.func.grad(loss(block.native))(x)
        assert_close([torch.func.grad(loss(block))(x)], [expected], 1e-5)
        _, tangent = torch.func.jvp(loss(block), (x,), (x,))
        assert tangent == pytest.approx((expected * x).sum().item(), rel=1e-4)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert block(mode.from_tensor(x), "maxpool").shape == (2, 16, 3, 3)
    traced = torch.jit.trace(block, x.detach(), check_trace=False)
    assert torch.allclose(traced(x), block(x), atol=1e-4)


# ------------------------------------------------------------------------- modules of any kind

class Shifted(nn.BatchNorm2d):
    def forward(self, x):
        return nn.BatchNorm2d.forward(self, x) + 1


def prune_half(block):
    with torch.no_grad():  # else the block could not be copied
        prune.random_unstructured(block.conv1, "weight", 0.5)


CHANGES = [
    lambda block: block.conv1.register_forward_hook(lambda module, inputs, y: 2 * y),
    lambda block: block.shortcut.register_forward_hook(lambda module, inputs, y: 2 * y),
    lambda block: block.conv2.register_full_backward_hook(lambda module, grads, _: (2 * grads[0],)),
    lambda block: setattr(block, "conv1", nn.Conv2d(16, 24, 3, padding=2, dilation=2, bias=False)),
    lambda block: setattr(block, "conv2", nn.Conv2d(24, 24, 3, padding=1)),
    lambda block: setattr(block, "conv2", nn.Conv2d(24, 24, 3, padding=1, groups=4, bias=False)),
    lambda block: setattr(block, "norm2", Shifted(24)),
    lambda block: setattr(block.norm2, "forward", MethodType(Shifted.forward, block.norm2)),
    lambda block: setattr(block.norm1, "track_running_stats", False),
    lambda block: setattr(block.norm2, "bias", None),
    lambda block: setattr(block, "shortcut", nn.Conv2d(16, 24, 1)),
    lambda block: parametrizations.spectral_norm(block.conv1),
    prune_half]


@pytest.mark.parametrize("change", CHANGES)
def test_other_modules_compute_what_they_say(change):
    block, x, grad = make_case(2, 16, 24, 8, 8, "maxpool", True, change)
    with torch.no_grad():
        exact = copy.deepcopy(block).double().eval().native(x.double(), "maxpool")
        assert distance(block.eval()(x, "maxpool"), exact) < 5e-6
    block.train()
    expected = in_float64(block, x, grad, "maxpool")
    results = train(block, block, x, grad, "maxpool")
    # a bias before a normalisation has no gradient
    told = [i for i, exact in enumerate(expected) if exact.norm() > 1e-9]
    assert_close([results[i] for i in told], [expected[i] for i in told], 5e-5)


def test_a_hook_of_all_modules_sees_each():
    layers, stem = make_stem(True)
    block = Block(16, 24, True)
    called = set()
    with nn.modules.module.register_module_forward_hook(lambda module, *_: called.add(module)):
        block(stem(torch.ones(2, 3, 8, 8)), "maxpool")
    assert {*layers[:2], *list(block.modules())[1:]} <= called


def test_a_stride_of_other_modules():
    block, x, grad = make_case(3, 16, 24, 7, 8, "stride", True)
    block.conv1.register_forward_hook(lambda *_: None)
    expected = in_float64(block, x, grad, "stride")
    assert_close(train(block, block, x, grad, "stride"), expected, 5e-5)
    assert block.conv1.stride == (1, 1)


def test_what_a_block_does_not_take():
    for shape, downsample in (((2, 16, 4, 4), "average"), ((2, 16, 1, 4), "maxpool"),
                              ((16, 4, 4), "none"), ((2, 15, 4, 4), "none"),
                              ((1, 16, 1, 1), "none")):  # torch wants two values a channel
        with pytest.raises(ValueError):
            Block(16, 16, False)(torch.ones(shape), downsample)
    with pytest.raises(RuntimeError):
        block = Block(16, 24, False)
        block.shortcut = None
        block(torch.ones(2, 16, 4, 4))
