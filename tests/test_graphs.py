"""Steps as CUDA graphs: GPU=0 python -m pytest tests/test_graphs.py tests them on GPU 0. Without a
GPU a list of operators stands for a graph."""
import io
import weakref

import pytest
import torch
from conftest import arguments, make_learner
from torch.utils._pytree import tree_leaves
from torch.utils._python_dispatch import TorchDispatchMode

import common
from common import Graphs

CONFIGS = [(4, 3, 3), (1, 1, 8)]
GPU = torch.cuda.is_available()


class FakeGraph(TorchDispatchMode):
    """While it is entered, it records operators, which then seem not to have run, and refuses to
    read a value. It replays them on the same tensors, and into the same results."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.changed = {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if "local_scalar" in operator.name():
            raise RuntimeError("not permitted when stream is capturing\nmore")
        for argument, value in zip(operator._schema.arguments, args):
            if argument.is_write or "running" in argument.name:  # native_batch_norm hides it
                for tensor in filter(torch.is_tensor, tree_leaves(value)):
                    self.changed.setdefault(tensor.data_ptr(), (tensor, tensor.clone()))
        result = operator(*args, **(kwargs or {}))
        self.calls.append((operator, args, kwargs or {}, result))
        return result

    def __exit__(self, *error):
        super().__exit__(*error)
        with torch.no_grad():
            for tensor, before in self.changed.values():
                tensor.copy_(before)

    @torch.inference_mode()
    def replay(self):
        for operator, args, kwargs, result in self.calls:
            again = operator(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again)):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)


@pytest.fixture
def images(small_images, monkeypatch):
    """Images on a device that has graphs, or seems to, and no graph yet."""
    for name, value in {"alive": weakref.WeakSet(), "inputs": {}, "usable": True}.items():
        monkeypatch.setattr(Graphs, name, value)
    if GPU:
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
        moved = {name: getattr(small_images, name).cuda()
                 for name in ("images", "labels", "rows", "mean", "std")}
        with torch.cuda.stream(torch.cuda.Stream()):
            yield common.replace(small_images, **moved, device="cuda")
        return
    monkeypatch.setattr(Graphs, "device_type", "cpu")
    for name, value in {"CUDAGraph": FakeGraph, "graph": lambda graph, pool, stream: graph,
                        "graph_pool_handle": object, "current_stream": lambda: None}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    yield small_images


def train(images, learners, steps=range(8)):
    """Every result of the steps, and, in between, of a validation."""
    results = []
    for i in steps:
        for learner in learners:
            training = images.batch(torch.arange(i, 320 + i, 20, device=images.device))
            every = 20 if i < 4 else 16
            validation = images.batch(torch.arange(i, 320 + i, every, device=images.device))
            results += [learner.step(*training, CONFIGS[i % 2], 0.1 / (1 + i)),
                        learner.validate(*validation, CONFIGS[i % 2])]
    return results


def through_file(learner):
    file = io.BytesIO()
    torch.save(learner.state_dict(), file)
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


def assert_equal(learner, other):
    state, others = (tree_leaves(through_file(one)) for one in (learner, other))
    for value, other in zip(state, others, strict=True):
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


@pytest.mark.parametrize("amp, supernet, kernel", [
    ("bf16", True, "native"), ("off", False, "native"), ("off", True, "fused"),
    ("off", False, "fused")])
def test_graphs_compute_what_operators_do(amp, supernet, kernel, images, monkeypatch):
    """To the bit, with the running statistics of a network alone, too, and on from a checkpoint."""
    common.use_kernel(kernel)
    learners = []
    for seed in range(4):
        args = arguments("--width", "0.5", "--amp", amp, "--weight-decay", "0.01")
        network = common.make_network(args, images, supernet, seed % 2, images.device)
        learners.append(common.Learner(network, args))
    by_graphs, by_operators = learners[:2], learners[2:]

    results = train(images, by_graphs)
    assert [len(learner.graphs.captured) for learner in by_graphs] == [6, 6]
    assert len(Graphs.inputs) == 2 and len(Graphs.alive) == 12
    for learner in by_graphs:
        learner.load_state_dict(through_file(learner))
        assert not learner.graphs.captured
    results += train(images, by_graphs, range(8, 12))
    assert all(learner.graphs.captured for learner in by_graphs)

    monkeypatch.setattr(Graphs, "usable", False)
    expected = train(images, by_operators, range(12))
    assert not any(learner.graphs.captured for learner in by_operators)
    assert all(map(torch.equal, results, expected))
    assert len({result[0].item() for result in expected[::2]}) == 24
    for learner, other in zip(by_graphs, by_operators):
        assert_equal(learner, other)


def test_late_kinds_run_as_they_are(images, monkeypatch):
    learner, other = make_learner(images), make_learner(images)
    monkeypatch.setattr(Graphs, "most", 3)
    results = train(images, [learner])
    assert len(learner.graphs.captured) == len(Graphs.alive) == 3
    monkeypatch.setattr(Graphs, "usable", False)
    assert all(map(torch.equal, results, train(images, [other])))
    assert_equal(learner, other)


def test_what_cannot_be_captured_runs_as_it_is(images, monkeypatch, capsys):
    """A layer, after some of the step, waits for the device: one warning, and the same training."""
    learners = [make_learner(images) for _ in range(4)]
    for learner in learners:
        learner.network.layers[5].register_forward_hook(lambda *call: print(call[2].sum().item()))
    results = train(images, learners[:2])
    assert not Graphs.alive
    assert all(p.grad is None for p in learners[0].network.parameters())
    err = capsys.readouterr().err
    assert err.startswith("warning: no CUDA graphs (") and err.count("\n") == 1
    assert all(map(torch.equal, results, train(images, learners[2:])))
    assert_equal(learners[0], learners[2])


def test_checkpoints_of_a_cpu_and_a_gpu_continue_each_other(images, monkeypatch):
    learner = make_learner(images)
    train(images, [learner])
    with monkeypatch.context() as patch:
        patch.setattr(Graphs, "device_type", "none")
        plain = make_learner(images)
        train(images, [plain])
        state, plain_state = through_file(learner), through_file(plain)
        torch.testing.assert_close(state["optimizer"]["state"], plain_state["optimizer"]["state"],
                                   rtol=1e-3, atol=1e-4)
        plain.load_state_dict(state)
        results = train(images, [plain])
        assert plain.state_dict()["optimizer"]["param_groups"] == (
            plain_state["optimizer"]["param_groups"])
    learner.load_state_dict(plain_state)
    torch.testing.assert_close(train(images, [learner]), results, rtol=0.01, atol=0.02)
    assert len(learner.graphs.captured) == 6 and not plain.graphs.captured


def test_kernels_are_compared_by_replays(images, monkeypatch, capsys):
    monkeypatch.setattr(common, "use_kernel", lambda kernel: None)
    args = arguments("--width", "0.25", "--batch-size", "12")
    space = common.Space(CONFIGS, CONFIGS[0], {config: 1 for config in CONFIGS})
    assert common.compare_kernels(args, space, images) in ("native", "fused")
    assert "12 images, a training step" in capsys.readouterr().out
    assert [shapes[0][0] for shapes in Graphs.inputs] == [12] and not Graphs.alive
