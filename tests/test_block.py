"""kernels/block.py: layers with their norms against float64, by the CPU kernels and by the very
source of the CUDA kernels, run on the CPU."""
import copy
import math
import os
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import arguments
from test_kernels import Emulated, distance, emulated, nhwc  # noqa: F401  a fixture

import common
import kernels
import kernels.block

pytestmark = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "c++")),
                                reason="no C++ compiler")
# n, c_in, c_out, height, width, downsample, supernet
CASES = [(3, 16, 16, 12, 12, "none", True), (3, 16, 16, 12, 12, "none", False),
         (2, 16, 32, 16, 16, "maxpool", True), (3, 20, 20, 9, 11, "maxpool", False),
         (2, 33, 40, 7, 5, "none", False), (5, 8, 8, 5, 6, "maxpool", True),
         (4, 64, 64, 2, 3, "none", True), (8, 9, 17, 5, 3, "maxpool", False)]


@pytest.fixture(params=["cpu", "emulated"])
def fused(request, monkeypatch):
    """Blocks by the CPU kernels, then by the CUDA kernels' source."""
    kernels.load()
    if request.param == "emulated":
        library = request.getfixturevalue("emulated")
        monkeypatch.setattr(kernels.block, "ops", Emulated(library))
    monkeypatch.setattr(common, "fused", kernels)
    return request.param


def make_block(c_in, c_out, supernet, seed=0):
    torch.manual_seed(seed)
    block = common.BasicBlock(c_in, c_out, supernet)
    for module in block.modules():
        if isinstance(module, torch.nn.BatchNorm2d) and not supernet:
            for tensor in (module.weight, module.bias, module.running_mean):
                torch.nn.init.normal_(tensor)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    return block


def train(layer, x, grad, *arguments):
    """Output, gradients of x and of the parameters, buffers after the step."""
    x = x.detach().clone().requires_grad_()
    out = layer(x, *arguments)
    out.backward(grad.to(out.dtype))
    return [out.detach(), x.grad, *(p.grad for p in layer.parameters()),
            *(b for b in layer.buffers() if b.is_floating_point())]


def reference(layer, x, grad, *arguments):
    kept, common.fused = common.fused, None
    try:
        return train(copy.deepcopy(layer).double(), x.double(), grad, *arguments)
    finally:
        common.fused = kept


def make_case(n, c_in, c_out, height, width, downsample, supernet, seed):
    """Block, input, gradient of the output; where no ReLU is so near to 0 that rounding, which is
    another on another CPU, could open or close it."""
    for attempt in range(100):
        block = make_block(c_in, c_out, supernet, 100 * seed + attempt)
        x = torch.randn(n, c_in, height, width).relu()
        exact = copy.deepcopy(block).double()
        p = F.max_pool2d(x.double(), 2) if downsample == "maxpool" else x.double()
        first = exact.norm1(exact.conv1(p))
        second = exact.norm2(exact.conv2(first.relu())) + exact.shortcut(p)
        if min(first.abs().min(), second.abs().min()) > 2e-5:
            return block, x, torch.randn(second.shape)
    raise AssertionError("no such case")


@pytest.mark.parametrize("case", CASES)
def test_block_against_float64(fused, monkeypatch, case):
    downsample = case[5]
    for seed in range(3):
        monkeypatch.setenv("EMULATION_ORDER", str(seed))
        block, x, grad = make_case(*case, seed)
        expected = reference(block, x, grad, downsample)
        untouched = copy.deepcopy(block)
        found = train(block, x, grad, downsample)
        assert len(found) == len(expected)
        for one, true in zip(found, expected):
            assert one.shape == true.shape and distance(one, true) < 5e-5
        if seed == 0:  # bit for bit the same again
            again = train(untouched, x, grad, downsample)
            assert all(torch.equal(a, b) for a, b in zip(found, again))


def test_a_stride_goes_to_the_operator(fused):
    x, weight = torch.randn(3, 16, 9, 8), torch.randn(16, 16, 3, 3)
    y, _ = common.pool_conv2d(x, weight, "stride")
    assert distance(y, F.conv2d(x.double(), weight.double(), stride=2, padding=1)) < 2e-6


def test_stem_against_float64(fused):
    for supernet in (True, False):
        torch.manual_seed(0)
        stem = common.Stem(16, supernet)
        x, grad = torch.randn(3, 3, 9, 10), torch.randn(3, 16, 9, 10)
        expected = reference(stem, x, grad, "none")
        for one, true in zip(train(stem, x, grad, "none"), expected):
            assert distance(one, true) < 2e-5


def test_evaluation_uses_the_running_statistics(fused):
    block, x = make_block(16, 32, False).eval(), torch.randn(4, 16, 8, 8)
    expected = reference(block, x, torch.zeros(4, 32, 8, 8), "none")[0]
    with torch.no_grad():
        assert distance(block(x, "none"), expected) < 2e-6
    grad = torch.randn(4, 32, 8, 8)  # with gradients the block without kernels runs
    for one, true in zip(train(block, x, grad, "none"), reference(block, x, grad, "none")):
        assert distance(one, true) < 2e-5


def test_statistics_do_not_cancel(fused):
    torch.manual_seed(0)
    y = nhwc(1000 + 0.01 * torch.randn(4, 20, 17, 19))
    y[:, 3] = 7.0  # constant
    center, offset, scale, shift, invstd, variance = kernels.block.ops.moments(y, None, None, 1e-5)
    exact = y.double()
    mean, true = exact.mean((0, 2, 3)), exact.var((0, 2, 3), correction=0)
    assert ((center.double() + offset.double() - mean).abs() < 1e-7).all()
    assert torch.allclose(variance.double(), true, rtol=1e-4, atol=1e-12)
    out = kernels.block.ops.finish(y, torch.stack([center, offset, scale, shift, invstd, variance]),
                                   None, None)
    normal = F.batch_norm(exact, None, None, training=True, eps=1e-5).relu()
    assert (out - normal).abs().max() < 1e-4  # native float32 is off by 1e-2
    # the same out of the convolution's output pass
    weight = torch.zeros(20, 20, 3, 3)
    weight[range(20), range(20), 1, 1] = 1
    y, rows, _, _ = kernels.block.ops.norm_conv(y, None, weight, None, None, 1e-5, 0, True)
    exact = y.double()
    assert ((rows[0].double() + rows[1].double() - exact.mean((0, 2, 3))).abs() < 1e-7).all()
    assert torch.allclose(rows[5].double(), exact.var((0, 2, 3), correction=0), rtol=1e-4,
                          atol=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_go_where_they_go_in_torch(fused, value):
    block, x, grad = make_block(16, 16, True), torch.randn(2, 16, 8, 8), torch.randn(2, 16, 8, 8)
    x[1, 3, 4, 4] = value
    expected = reference(block, x, grad, "none")
    for one, true in zip(train(block, x, grad, "none"), expected):
        assert one.isnan().logical_or(true.isfinite()).all()
    block, x = make_block(16, 16, False).eval(), torch.randn(2, 16, 8, 8)
    x[1, 3, 4, 4] = value
    with torch.no_grad():
        found = block(x, "none")
    expected = reference(block, x, grad, "none")[0]
    assert (found.isfinite() <= expected.isfinite()).all()
    assert found[0].isfinite().all()  # the other image


def test_gradients_of_a_step_are_as_good_as_native(digits):
    """Over a whole step, at initialisation and after an epoch: errors against float64, most of them
    from ReLUs whose input is nearly 0, as geometric means over seeds and configurations."""
    train, _ = digits
    errors = {kernel: [] for kernel in ("native", "fused")}
    configs = ((4, 3, 3), (1, 1, 8), (7, 1, 2))
    for seed in range(2):
        torch.manual_seed(seed)
        network = common.ResNet("resnet20", 10, supernet=seed == 0)
        learner = common.Learner(network, arguments())
        for trained in (False, True):
            images, labels = train.batch(torch.arange(seed, len(train), 24))
            for config in configs:
                exact = copy.deepcopy(network).double()
                common.choose_kernel("native", "cpu")
                F.cross_entropy(exact(images.double(), config), labels).backward()
                for kernel in errors:
                    assert common.choose_kernel(kernel, "cpu") == kernel
                    network.zero_grad()
                    F.cross_entropy(network(images, config), labels).backward()
                    found, true = (torch.cat([p.grad.flatten().double() for p in net.parameters()])
                                   for net in (network, exact))
                    errors[kernel].append(distance(found, true))
            if not trained:
                for i, part in enumerate(torch.arange(len(train)).split(64)):
                    learner.step(*train.batch(part), configs[i % 3], 0.05)
    means = {kernel: math.exp(sum(map(math.log, found)) / len(found))
             for kernel, found in errors.items()}
    assert len(errors["fused"]) == 12 and means["fused"] < 1.5 * means["native"], errors


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("case", CASES)
def test_block_on_a_gpu(monkeypatch, case):
    monkeypatch.setattr(common, "fused", kernels)
    block, x, grad = make_case(*case, 0)
    expected = reference(block, x, grad, case[5])
    for one, true in zip(train(block.cuda(), x.cuda(), grad.cuda(), case[5]), expected):
        assert distance(one.cpu(), true) < 5e-5
