"""The algorithm of search_mixture.py: balance, draws, scores."""
import numpy as np
import pytest
import torch
from scipy.stats import chisquare

import common
from search_mixture import balance, draw_rounds, update_score


def brute_force(scores, temperature, iterations=20000):
    p = np.exp(temperature * (scores - scores.max(1, keepdims=True)))
    p /= p.sum(1, keepdims=True)
    for _ in range(iterations):
        p /= p.mean(0)
        p /= p.sum(1, keepdims=True)
    return p


@pytest.mark.parametrize("supernets, temperature", [(2, 1), (4, 30), (8, 100), (36, 100), (1, 50)])
def test_balance_agrees_with_brute_force(supernets, temperature):
    scores = np.random.default_rng(supernets).normal(0.7, 0.05, (36, supernets))
    found = balance(torch.from_numpy(scores), temperature, 1e-12, 20000).numpy()
    assert np.allclose(found, brute_force(scores, temperature), atol=1e-5)
    found = balance(torch.from_numpy(scores), temperature, 1e-4).numpy()
    marginal = found.mean(0)
    assert np.allclose(found.sum(1), 1, atol=1e-12) and found.dtype == np.float64
    assert (marginal * np.log(marginal * supernets)).sum() <= 1e-4


def test_balance_leaves_a_balanced_assignment_alone():
    scores = torch.zeros(36, 4, dtype=torch.float64)
    scores[torch.arange(36), torch.arange(36) % 4] = 0.3
    assert torch.allclose(balance(scores, 20.0, 1e-4), torch.softmax(20 * scores, 1), atol=1e-15)


@pytest.mark.parametrize("scores", [
    torch.tensor([[1.0, 0, 0, 0]]).repeat(36, 1),              # all mass on one supernet
    torch.linspace(0, 1, 4).repeat(36, 1),                     # equal rows
    torch.zeros(36, 4), torch.ones(36, 4),
    torch.cat([torch.tensor([[1.0, 0]]).repeat(35, 1), torch.tensor([[0, 1.0]])])])
def test_balance_is_stable_at_high_temperature(scores):
    scores = scores.double()
    found = balance(scores, 300.0, 1e-4)
    marginal = found.mean(0)
    assert found.isfinite().all() and torch.allclose(found.sum(1), torch.ones(len(found)).double())
    assert torch.allclose(marginal, torch.full_like(marginal, 1 / scores.shape[1]), atol=0.02)


def test_balance_ends_at_its_cap():
    scores = torch.tensor([[1.0, 0]] * 19 + [[0, 1.0]] * 17, dtype=torch.float64)
    found = balance(scores, 300.0, 1e-12, max_iterations=3)
    assert found.isfinite().all() and torch.allclose(found.sum(1), torch.ones(36).double())


@pytest.mark.parametrize("balanced", [True, False])
def test_draws_have_the_papers_joint_distribution(balanced):
    scores = torch.from_numpy(np.random.default_rng(3).random((12, 3)))
    p = balance(scores, 8.0, 1e-10) if balanced else torch.softmax(8 * scores, 1)
    assert p.max() > 0.8 and p.min() < 0.01  # strongly non-uniform
    rngs = [common.stream(0, "draws", m) for m in range(3)]
    counts = np.zeros((12, 3))
    for _ in range(20):
        draws = draw_rounds(p, 1000, balanced, rngs)
        assert not balanced or [m for _, m in draws] == [0, 1, 2] * 1000
        for c, m in draws:
            counts[c, m] += 1
    expected = (p / 12).numpy() * counts.sum()
    assert expected.min() > 5  # enough for a chi-square test
    # stratified draws vary less than independent ones, so the test only errs on the safe side
    assert chisquare(counts.ravel(), expected.ravel()).pvalue > 1e-3


def test_scores_are_a_moving_average():
    scores = torch.ones(3, 2, dtype=torch.float64)
    values = [0.2, 0.5, 0.4]
    for value in values:
        update_score(scores, 1, 0, value, 0.9)
    expected = 0.9 ** 3 + sum(0.1 * 0.9 ** (2 - i) * v for i, v in enumerate(values))
    assert scores[1, 0].item() == pytest.approx(expected, abs=1e-15)
    assert scores.sum().item() == pytest.approx(5 + expected)
