"""Steps as CUDA graphs: GPU=0 python -m pytest tests/test_graphs.py tests them on GPU 0. Without
a GPU a list of operators stands for a graph."""
import io
from functools import partial
from weakref import WeakSet

import pytest
import torch
from conftest import arguments, make_learner
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
from common import Graphs

CONFIGS = [(4, 3, 3), (1, 1, 8)]
assert_equal = partial(assert_close, rtol=0, atol=0)


class FakeGraph(TorchDispatchMode):
    """While it is entered, it records operators, whose changes it takes back, and refuses to read a
    value. It replays them with the same tensors, into the same results."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.before = {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if "local_scalar" in operator.name():
            raise RuntimeError("not permitted when stream is capturing\nmore")
        for argument, value in zip(operator._schema.arguments, args):
            if argument.is_write:
                for tensor in filter(torch.is_tensor, tree_leaves(value)):
                    self.before.setdefault(tensor.data_ptr(), (tensor, tensor.clone()))
        result = operator(*args, **(kwargs or {}))
        self.calls.append((partial(operator, *args, **(kwargs or {})), result))
        return result

    @torch.no_grad()
    def __exit__(self, *error):
        super().__exit__(*error)
        for tensor, before in self.before.values():
            tensor.copy_(before)

    @torch.inference_mode()
    def replay(self):
        for operator, result in self.calls:
            for old, new in zip(tree_leaves(result), tree_leaves(operator())):
                if torch.is_tensor(old):
                    old.copy_(new)


@pytest.fixture
def images(small_images, monkeypatch):
    """Images on a device that has graphs, or seems to, but none yet."""
    for name, value in {"alive": WeakSet(), "inputs": {}, "usable": True}.items():
        monkeypatch.setattr(Graphs, name, value)
    if torch.cuda.is_available():
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
        moved = {name: value.cuda() for name, value in vars(small_images).items()
                 if torch.is_tensor(value)}
        with torch.cuda.stream(torch.cuda.Stream()):
            yield common.replace(small_images, **moved, device="cuda")
        return
    monkeypatch.setattr(Graphs, "device_type", "cpu")
    for name, value in {"CUDAGraph": FakeGraph, "graph": lambda graph, pool, stream: graph,
                        "graph_pool_handle": object, "current_stream": lambda: None}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    yield small_images


def saved(learner):
    file = io.BytesIO()
    torch.save(learner.state_dict(), file)
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


def train(images, *learners):
    """Results of steps and of validations in between, and the states at the end. Each kind of call
    occurs three times, and the training steps three times more after a checkpoint is loaded."""
    results = []
    for i in range(12):
        for learner in learners:
            if i == 6:
                learner.load_state_dict(saved(learner))
            training = images.batch(torch.arange(i, 320 + i, 20, device=images.device))
            other = images.batch(torch.arange(i, 320 + i, 20 if i < 6 else 16,
                                              device=images.device))
            results.append(learner.step(*training, CONFIGS[i % 2], 0.1 / (1 + i)))
            results.append(learner.validate(*other, CONFIGS[i % 2]))
    return results, list(map(saved, learners))


@pytest.mark.parametrize("amp, supernet, kernel, most", [
    ("bf16", True, "native", 9), ("off", False, "fused", 9), ("off", True, "fused", 3)])
def test_graphs_compute_what_operators_do(amp, supernet, kernel, most, images, monkeypatch):
    """To the bit, with the running statistics of a network alone, and beyond the most graphs."""
    common.use_kernel(kernel)
    monkeypatch.setattr(Graphs, "most", most)
    args = arguments("--width", "0.5", "--amp", amp, "--weight-decay", "0.01")
    networks = [common.make_network(args, images, supernet, seed, images.device)
                for seed in (0, 1, 0, 1)]
    for network in networks:  # a weight of one configuration: its first gradient comes late
        network.extra = torch.nn.Parameter(torch.ones(3, device=images.device))
        network.register_forward_hook(lambda network, inputs, logits: (
            logits * network.extra if inputs[1] == CONFIGS[1] else None))
    first, second, *others = [common.Learner(network, args) for network in networks]
    trained = train(images, first, second)
    assert len(Graphs.alive) == min(8, most) and len(Graphs.inputs) == 2
    assert len(first.graphs.captured) + len(second.graphs.captured) == min(8, most)
    monkeypatch.setattr(Graphs, "usable", False)
    assert_equal(trained, train(images, *others))
    assert len({result[0].item() for result in trained[0][::2]}) == 24


def test_what_cannot_be_captured_runs_as_it_is(images, capsys):
    """What follows the change of the weights waits for the device: one warning, same training."""
    learner, other = make_learner(images), make_learner(images)
    for each in (learner, other):
        each.optimizer.register_step_post_hook(lambda optimizer, *_: next(
            iter(optimizer.state.values()))["momentum_buffer"].sum().item())
    trained = train(images, learner)
    error = capsys.readouterr().err
    assert error.startswith("warning: no CUDA graphs") and error.count("\n") == 1
    assert_equal(trained, train(images, other))


def test_runs_on_cpu_and_gpu_continue_each_other(images, monkeypatch):
    learner = make_learner(images)
    results, [state] = train(images, learner)
    with monkeypatch.context() as patch:
        patch.setattr(Graphs, "device_type", "none")
        plain = make_learner(images)
        expected, [plain_state] = train(images, plain)
        plain.load_state_dict(state)
        assert saved(plain)["optimizer"]["param_groups"][0]["fused"] is None
        continued, _ = train(images, plain)
    assert_close(results, expected, rtol=0.01, atol=0.07)  # of 16 images one may differ
    learner.load_state_dict(plain_state)
    assert_close(train(images, learner)[0], continued, rtol=0.01, atol=0.07)
    assert type(state["optimizer"]["param_groups"][0]["lr"]) is float
    assert learner.graphs.captured and not plain.graphs.captured


def test_kernels_are_compared_by_replays_of_whole_batches(images, monkeypatch, capsys):
    monkeypatch.setattr(common, "use_kernel", lambda kernel: None)
    space = common.Space(CONFIGS, CONFIGS[0], {config: 1 for config in CONFIGS})
    common.compare_kernels(arguments("--width", "0.25", "--batch-size", "40"), space, images)
    assert "40 images, a training step" in capsys.readouterr().out
    assert [shapes[0][0] for shapes in Graphs.inputs] == [40] and not Graphs.alive
