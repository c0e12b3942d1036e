"""The algorithm of search_mixture.py: balance, draws, scores, steps that never wait."""
import contextlib
import math

import numpy as np
import pytest
import torch
from conftest import make_learner
from scipy.stats import chisquare
from torch.utils._python_dispatch import TorchDispatchMode

import common
from search_mixture import balance, draw_rounds, search_step, update_score


def draws(kind, count):
    """pi(c): uniform, or one whose largest is several times its smallest."""
    pi = np.ones(count) if kind == "uniform" else np.random.default_rng(1).uniform(0.1, 1, count)
    return torch.from_numpy(pi / pi.sum())


both_draws = pytest.mark.parametrize("kind", ["uniform", "other"])


def brute_force(scores, temperature, pi, iterations=20000):
    p = np.exp(temperature * (scores - scores.max(1, keepdims=True)))
    p /= p.sum(1, keepdims=True)
    for _ in range(iterations):
        p /= pi @ p
        p /= p.sum(1, keepdims=True)
    return p


@both_draws
@pytest.mark.parametrize("supernets, temperature", [(2, 1), (4, 30), (8, 100), (36, 100), (1, 50)])
def test_balance_agrees_with_brute_force(supernets, temperature, kind):
    pi = draws(kind, 36)
    scores = np.random.default_rng(supernets).normal(0.7, 0.05, (36, supernets))
    found = balance(torch.from_numpy(scores), temperature, 1e-12, pi, 20000).numpy()
    assert np.allclose(found, brute_force(scores, temperature, pi.numpy()), atol=1e-5)
    found = balance(torch.from_numpy(scores), temperature, 1e-4, pi).numpy()
    marginal = pi.numpy() @ found
    assert np.allclose(found.sum(1), 1, atol=1e-12) and found.dtype == np.float64
    assert (marginal * np.log(marginal * supernets)).sum() <= 1e-4


@both_draws
@pytest.mark.parametrize("scores", [
    torch.tensor([[1.0, 0, 0, 0]]).repeat(36, 1),              # all mass on one supernet
    torch.linspace(0, 1, 4).repeat(36, 1),                     # equal rows
    torch.zeros(36, 4), torch.ones(36, 4),
    torch.cat([torch.tensor([[1.0, 0]]).repeat(35, 1), torch.tensor([[0, 1.0]])])])
def test_balance_is_stable_at_high_temperature(scores, kind):
    scores, pi = scores.double(), draws(kind, 36)
    found = balance(scores, 300.0, 1e-4, pi)
    marginal = pi @ found
    assert found.isfinite().all() and torch.allclose(found.sum(1), torch.ones(len(found)).double())
    assert torch.allclose(marginal, torch.full_like(marginal, 1 / scores.shape[1]), atol=0.02)
    as_it_is = balance(scores, 300.0, math.inf, pi)  # --no-balance
    assert torch.allclose(as_it_is, torch.softmax(300 * scores, 1))


def test_balance_ends_at_its_cap():
    scores = torch.tensor([[1.0, 0]] * 19 + [[0, 1.0]] * 17, dtype=torch.float64)
    found = balance(scores, 300.0, 1e-12, draws("uniform", 36), max_iterations=3)
    assert found.isfinite().all() and torch.allclose(found.sum(1), torch.ones(36).double())


def test_a_loose_tolerance_leaves_every_supernet_its_draws():
    scores = torch.tensor([[1.0, 0.0]] * 36, dtype=torch.float64)
    pi = draws("other", 36)
    assignment = balance(scores, 1e4, 1.0, pi)  # KL(P(m) || uniform) is log 2
    assert assignment[:, 1].sum() == 0
    generators = [common.generator(0, "draws", m) for m in range(2)]
    drawn = draw_rounds(assignment, pi, 500, True, generators)
    assert [m for _, m in drawn] == [0, 1] * 500 and len({c for c, m in drawn if m == 1}) > 30


@both_draws
@pytest.mark.parametrize("balanced", [True, False])
def test_draws_have_the_papers_joint_distribution(balanced, kind):
    pi = draws(kind, 12)
    scores = torch.from_numpy(np.random.default_rng(3).random((12, 3)))
    p = balance(scores, 8.0, 1e-10, pi) if balanced else torch.softmax(8 * scores, 1)
    assert p.max() > 0.8 and p.min() < 0.01  # strongly non-uniform
    generators = [common.generator(0, "draws", m) for m in range(3)]
    counts = np.zeros((12, 3))
    for _ in range(60):
        drawn = draw_rounds(p, pi, 1000, balanced, generators)
        assert not balanced or [m for _, m in drawn] == [0, 1, 2] * 1000
        for c, m in drawn:
            counts[c, m] += 1
    expected = (pi[:, None] * p).numpy() * counts.sum()
    assert expected.min() > 5  # enough for a chi-square test
    # stratified draws vary less than independent ones, so the test only errs on the safe side
    assert chisquare(counts.ravel(), expected.ravel()).pvalue > 1e-3


def test_draw_probabilities():
    configs = common.enumerate_configs(10, 3)
    space = common.Space(configs, (4, 3, 3), {config: 5 + i for i, config in enumerate(configs)})
    uniform = common.draw_probabilities(space, "uniform")
    assert uniform.tolist() == [1 / 36] * 36
    by_cost = common.draw_probabilities(space, "cost")
    assert by_cost.sum() == pytest.approx(1)
    assert by_cost[35] / by_cost[0] == pytest.approx(40 / 5)


def test_scores_are_a_moving_average():
    scores = torch.ones(3, 2, dtype=torch.float64)
    values = [0.2, 0.5, 0.4]
    for value in values:
        update_score(scores, 1, 0, value, 0.9)
    expected = 0.9 ** 3 + sum(0.1 * 0.9 ** (2 - i) * v for i, v in enumerate(values))
    assert scores[1, 0].item() == pytest.approx(expected, abs=1e-15)
    assert scores.sum().item() == pytest.approx(5 + expected)


class NoWaiting(TorchDispatchMode):
    """Fails on whatever reads a value of the device or copies between it and the host."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        for waiting in ("local_scalar", "nonzero", "item", "masked_sel", "unique", "equal"):
            assert waiting not in name, name
        result = function(*args, **(kwargs or {}))
        if "copy" in name and isinstance(result, torch.Tensor):
            sources = {a.device for a in args if isinstance(a, torch.Tensor) and a.dim()}
            assert sources <= {result.device}, name
        return result


@pytest.mark.parametrize("device, amp, dtype, crop", [
    ("meta", "off", torch.float32, "pad"), ("meta", "off", torch.float32, "resized"),
    ("cpu", "bf16", torch.bfloat16, "pad")])
def test_no_step_waits_for_the_device(device, amp, dtype, crop, small_images, monkeypatch):
    """On the meta device reading a value or copying to the host is impossible; on the CPU bfloat16
    is watched as well. A pass's first batch may copy indices."""
    if device == "meta":
        monkeypatch.setattr(common, "autocast", lambda *args: contextlib.nullcontext())
    moved = {name: getattr(small_images, name).to(device)
             for name in ("images", "labels", "rows", "mean", "std")}
    images = common.replace(small_images, **moved, device=device, crop=crop)
    learner = make_learner(images, "--amp", amp)
    dtypes = set()
    learner.network.layers[5].register_forward_hook(lambda *call: dtypes.add(call[2].dtype))
    training = images.passes(50, common.generator(0), common.generator(1))
    checking = images.passes(50, common.generator(2))
    scores = torch.ones(36, 2, dtype=torch.float64, device=device)
    for step in range(6):
        with NoWaiting() if step else contextlib.nullcontext():
            numbers = search_step(learner, training, checking, (5, 3, 2), 0.1)
            update_score(scores, 7, 1, numbers[2], 0.9)
    assert numbers.device.type == device
    assert numbers.dtype == torch.float64
    assert dtypes == {dtype}
    with pytest.raises((AssertionError, RuntimeError)), NoWaiting():
        numbers[0].item()
