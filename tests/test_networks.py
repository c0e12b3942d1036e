"""Configurations, networks, their evaluation and learning against independent references."""
import copy
import itertools
import math
import pickle
import time
from functools import partial

import pytest
import torch
import torch.nn as nn
from conftest import arguments, make_learner
from sklearn.metrics import balanced_accuracy_score
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

import common

CONFIGS = common.enumerate_configs(10, 3)


def test_configurations_are_in_the_papers_order_and_read_as_they_are_written():
    assert CONFIGS == [(a, b, 10 - a - b) for a in range(1, 9) for b in range(1, 10 - a)]
    for number, config in ((1, (1, 1, 8)), (24, (4, 3, 3)), (34, (7, 1, 2)), (36, (8, 1, 1))):
        assert CONFIGS[number - 1] == config
        assert common.parse_config(common.config_name(config)) == config
    assert common.parse_config("[5, 3, 2]") == (5, 3, 2)
    for text in ("10,0,0", "12,-1,-1", "a,b,c", "", "5,3,1", "5,5", "5,3,1,1"):
        with pytest.raises(common.UserError, match="impossible configuration"):
            common.parse_config(text, (4, 3, 3))


# ResNet-20 and -18 count the stem as a layer; in ResNet-50 it belongs to the first block
@pytest.mark.parametrize("arch, count, first, default, last", [
    ("resnet20", 36, (1, 1, 8), (4, 3, 3), (8, 1, 1)),
    ("resnet18", 56, (1, 1, 1, 6), (3, 2, 2, 2), (6, 1, 1, 1)),
    ("resnet50", 455, (1, 1, 1, 13), (3, 4, 6, 3), (13, 1, 1, 1))])
def test_search_spaces_and_their_multiply_adds(arch, count, first, default, last, digits):
    whole = common.search_space(arguments("--arch", arch), digits[0])
    assert len(set(whole.configs)) == len(whole.configs) == count
    assert whole.configs == sorted(whole.configs)
    assert (whole.configs[0], whole.default, whole.configs[-1]) == (first, default, last)
    network = common.ResNet(arch, 10, supernet=True).to("meta")
    for config in (first, default, whole.configs[count // 3], last):
        with FlopCounterMode(display=False) as counter:
            network(torch.zeros(1, 3, 32, 32, device="meta"), config)
        assert whole.macs[config] == counter.get_total_flops() // 2


def test_search_spaces_of_other_sizes(digits):
    def space(*argv):
        return common.search_space(arguments(*argv), digits[0])
    assert len(space("--num-resolutions", "4").configs) == math.comb(9, 3)
    assert space("--num-resolutions", "2").default == (5, 5)
    assert space("--num-resolutions", "1").configs == [(10,)]
    chosen = space("--configs", "5,3,2", "1,1,8", "5,3,2")
    assert chosen.configs == [(5, 3, 2), (1, 1, 8)]
    assert (4, 3, 3) in chosen.macs
    cheap = space("--max-macs", "1")
    assert cheap.configs == [c for c in CONFIGS if cheap.macs[c] <= cheap.macs[4, 3, 3]]
    assert (4, 3, 3) in cheap.configs and len(cheap.configs) < 36


def check_equal(ours, theirs, config, size):
    """Logits, in training and not, and gradients; the weights stand in the same order in both."""
    for p in theirs.parameters():
        if p.dim() == 1:
            nn.init.normal_(p, 1.0, 0.3)
    values = theirs.double().state_dict().values()
    ours.double().load_state_dict(dict(zip(ours.state_dict(), values, strict=True)))
    images = torch.randn(3, 3, size, size, dtype=torch.float64)
    weights = torch.randn(3, 5, dtype=torch.float64)
    for training in (True, False, True):
        logits = ours.train(training)(images, config)
        expected = theirs.train(training)(images)
        assert torch.allclose(logits, expected, rtol=0, atol=1e-9)
    gradients = torch.autograd.grad((logits * weights).sum(), list(ours.parameters()))
    expected = torch.autograd.grad((expected * weights).sum(), list(theirs.parameters()))
    for gradient, other in zip(gradients, expected):
        assert torch.allclose(gradient, other, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("arch, size", [("resnet50", 64), ("resnet18", 32)])
def test_default_with_stride_is_torchvisions_network(arch, size):
    torch.manual_seed(0)
    theirs = getattr(models, arch)(num_classes=5)
    if size < 64:
        theirs.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        theirs.maxpool = nn.Identity()
    ours = common.ResNet(arch, 5, image_size=size)
    check_equal(ours, theirs, ours.default_config, size)


SHAPES = {  # of networks an eighth as wide: torchvision's block, channels of the stem, the blocks
    "resnet20": (models.resnet.BasicBlock, 2, [2] * 3 + [4] * 3 + [8] * 3),
    "resnet18": (models.resnet.BasicBlock, 8, [8] * 2 + [16] * 2 + [32] * 2 + [64] * 2),
    "resnet50": (models.resnet.Bottleneck, 8, [8] * 3 + [16] * 4 + [32] * 6 + [64] * 3),
}


def reference(arch, config, downsample, large, supernet):
    """The network with one configuration, built of torchvision's blocks."""
    block, c_in, channels = SHAPES[arch]
    norm = partial(nn.BatchNorm2d, affine=not supernet, track_running_stats=not supernet)
    size, stride = (7, 2) if large else (3, 1)
    layers = [nn.Conv2d(3, c_in, size, stride, size // 2, bias=False), norm(c_in), nn.ReLU()]
    if large:
        layers.append(nn.MaxPool2d(3, 2, 1))
    cuts = set(itertools.accumulate(config[:-1]))
    for number, c in enumerate(channels, 0 if arch == "resnet50" else 1):
        stride = 1
        if number in cuts and downsample == "maxpool":
            layers.append(nn.MaxPool2d(2))
        elif number in cuts:
            stride = 2
        c_out = c * block.expansion
        shortcut = nn.MaxPool2d(1, stride)  # the identity, or every second pixel
        if c_in != c_out:
            shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), norm(c_out))
        layers.append(block(c_in, c, stride, shortcut, norm_layer=norm))
        c_in = c_out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c_in, 5))


@pytest.mark.parametrize("arch, downsample, configs, size, supernet", [
    ("resnet20", "maxpool", CONFIGS, 8, True),
    ("resnet20", "maxpool", CONFIGS[::7], 16, False),
    ("resnet20", "stride", [(3, 3, 4)], 64, True),
    ("resnet20", "stride", [(1, 1, 8)], 12, False),
    ("resnet18", "stride", [(3, 2, 2, 2), (2, 4, 3)], 64, True),
    ("resnet18", "maxpool", [(1, 1, 1, 6)], 16, False),
    ("resnet50", "stride", [(3, 4, 6, 3), (1, 1, 1, 13)], 20, True),
    ("resnet50", "maxpool", [(9, 4, 2, 1)], 64, False)])
def test_networks_equal_references_forward_and_backward(arch, downsample, configs, size, supernet):
    torch.manual_seed(0)
    ours = common.ResNet(arch, 5, supernet, 1 / 8, downsample, size)
    large = size >= 64 and arch != "resnet20"
    for config in configs:
        check_equal(ours, reference(arch, config, downsample, large, supernet), config, size)


@torch.inference_mode()
def test_tree_evaluation_equals_separate_passes_exactly(monkeypatch):
    _, images = common.load_dataset(arguments("--image-size", "16"))
    batches = list(images.subset(torch.arange(80)).evaluation_batches(40))
    labels = torch.cat([labels for _, labels in batches])
    network = make_learner(images).network
    separate = {config: [network(images, config) for images, _ in batches] for config in CONFIGS}
    shared = []
    head = network.head
    monkeypatch.setattr(network, "head", lambda x: shared.append(head(x)) or shared[-1])
    accuracies = common.evaluate_configs(network, CONFIGS, batches)
    assert accuracies.dtype == torch.float64
    assert len(accuracies.unique()) > 5
    for config, accuracy in zip(CONFIGS, accuracies.tolist()):
        hits = torch.cat(separate[config]).argmax(1) == labels
        assert accuracy == hits.sum().item() / 80
        for logits in separate[config]:
            assert any(torch.equal(logits, other) for other in shared)


@pytest.mark.parametrize("slow, factor, gradient, chosen, message", [
    ("native", 1.0, 1.0, "fused", "ms with native ops: fused"),
    ("fused", 1.0, 1.0, "native", "ms with native ops: native"),
    ("native", 1.0, 1.3, "fused", "ms with native ops: fused"),  # as after a tie in a pool
    ("native", 1.0, 1.6, "native", "do not work here (an output or a gradient is wrong)"),
    ("native", 1.1, 1.1, "native", "do not work here (an output or a gradient is wrong)"),
    ("native", None, 1.0, "native", "do not work here (CUDA error)")])
def test_kernels_are_measured_and_must_agree(slow, factor, gradient, chosen, message, digits,
                                             monkeypatch, capsys):
    """With kernels that are native ops but for a factor, another for the gradient, and one side
    that sleeps."""
    def use_kernel(kernel):
        monkeypatch.setattr(common, "fused_kernels", kernel if kernel == "fused" else None)

    def head(network, x, real=common.ResNet.head):
        time.sleep(0.3 * (slow == (common.fused_kernels or "native")))
        if common.fused_kernels and not factor:
            raise RuntimeError("CUDA error")
        network.unused = nn.Parameter(x.new_zeros(1))  # as in some networks of one's own
        if common.fused_kernels:
            x = gradient * x + (factor - gradient) * x.detach()
        return real(network, x)

    monkeypatch.setattr(common, "use_kernel", use_kernel)
    monkeypatch.setattr(common, "fused", lambda: False)
    monkeypatch.setattr(common.ResNet, "head", head)
    args = arguments("--width", "0.25", "--batch-size", "8")
    space = common.search_space(args, digits[0])
    assert common.compare_kernels(args, space, digits[0]) == chosen
    assert message in "".join(capsys.readouterr())


def test_balanced_accuracy_is_scikit_learns(small_images):
    images = small_images.subset(torch.arange(0, 250))  # 134, 116 and no images of three classes
    network = make_learner(images).network
    batches = list(images.evaluation_batches(64))
    accuracies = common.evaluate_configs(network, CONFIGS[:3], batches, metric="balanced")
    labels = torch.cat([labels for _, labels in batches])
    for config, accuracy in zip(CONFIGS, accuracies.tolist()):
        logits = torch.cat([network(images, config) for images, _ in batches])
        assert accuracy == pytest.approx(balanced_accuracy_score(labels, logits.argmax(1)))


def test_tree_evaluation_halves_the_work():
    network = common.ResNet("resnet20", 10, supernet=True)
    batch = (torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.int64))
    with FlopCounterMode(display=False) as counter:
        common.evaluate_configs(network, CONFIGS, [batch])
    separate = sum(common.count_macs(network.to("meta"), CONFIGS, 32).values())
    assert 4 * separate / counter.get_total_flops() == pytest.approx(2.03, abs=0.01)


def test_a_step_is_sgd_with_momentum_and_weight_decay(small_images):
    learner = make_learner(small_images, "--weight-decay", "0.01", "--momentum", "0.8")
    network = copy.deepcopy(learner.network)
    images, labels = small_images.batch(torch.arange(0, 400, 5))
    momenta = [0.0] * len(list(network.parameters()))
    for lr in (0.1, 0.02):
        metrics = learner.step(images, labels, (4, 3, 3), lr)
        logits = network(images, (4, 3, 3))
        loss = nn.functional.cross_entropy(logits, labels)
        assert metrics.tolist() == pytest.approx(
            [loss.item(), (logits.argmax(1) == labels).double().mean().item()])
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        with torch.no_grad():
            for i, (weight, gradient) in enumerate(zip(network.parameters(), gradients)):
                momenta[i] = 0.8 * momenta[i] + gradient + 0.01 * weight
                weight -= lr * momenta[i]
    for weight, expected in zip(learner.network.parameters(), network.parameters()):
        assert torch.allclose(weight, expected, atol=1e-6)


def test_a_loaded_network_is_traced_copied_and_pickled():
    torch.manual_seed(0)
    network = common.ResNet("resnet20", 5, width=1 / 8).eval()
    images = torch.randn(2, 3, 16, 16)
    expected = network(images, (5, 3, 2))
    names = list(network.state_dict())
    fixed = common.fix_pooling(network, (5, 3, 2))
    with pytest.raises(TypeError):
        fixed(images, (4, 3, 3))
    traced = torch.fx.symbolic_trace(fixed)
    for other in (fixed, traced, copy.deepcopy(fixed), pickle.loads(pickle.dumps(fixed))):
        assert torch.equal(other(images), expected)
    assert list(fixed.state_dict()) == names and isinstance(fixed, common.ResNet)


def test_a_mistake_in_a_network_of_ones_own_is_named(monkeypatch):
    def space(*argv):
        return common.search_space(arguments("--image-size", "8", *argv), small)

    small, _ = common.load_dataset(arguments("--image-size", "8"))
    with pytest.raises(common.UserError, match="8x8 images are too small for 6 resolutions"):
        space("--num-resolutions", "6")
    monkeypatch.setattr(common.ResNet, "head", lambda self, x: x.missing())
    with pytest.raises(common.UserError, match="--arch resnet20 fails: AttributeError: .*missing"):
        space()
