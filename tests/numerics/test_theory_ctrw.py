"""CTRW's numbers against hand values and Monte Carlo."""

from __future__ import annotations

import math

import pytest
import torch

from analysis.theory.ctrw_bounds import (
    conditional_probability,
    cosine_statistic,
    diagnostics,
    estimate_upper_bound,
    expected_cosine,
    lemma1_lower_bound,
    normal_distribution,
    normal_probability,
    pairs_at_correlation,
    random_weights,
    unconditional_probability,
)
from models import build_model
from models.randomness import random_sites

SMALL = {"backbone": "resnet8", "image_shape": (3, 8, 8), "num_classes": 4}


def test_hand_values():
    assert normal_distribution(-1e-3) == pytest.approx(0.49960, abs=5e-6)
    assert normal_distribution(math.sqrt(2) * 1e-2 / 2) == pytest.approx(0.5028, abs=5e-5)
    ones = torch.ones(3072)
    assert lemma1_lower_bound(ones, ones, alpha=-1e-3) == pytest.approx(1000)
    with pytest.raises(ValueError, match="negative"):
        lemma1_lower_bound(ones, ones, alpha=1e-3)


@pytest.mark.parametrize(("sigma", "cosine"), [(1.0, 0.5), (0.667, 0.69), (1000 / 3072, 0.90)])
def test_expected_cosines_of_the_initial_weights(sigma, cosine):
    mu, sigma = torch.ones(3072), torch.full((3072,), sigma)
    assert expected_cosine(mu, sigma) == pytest.approx(cosine, abs=0.006)
    assert cosine_statistic(mu, sigma, 200).mean == pytest.approx(cosine, abs=0.01)


def test_the_sufficient_condition_of_lemma_1_is_not_sufficient():
    mu, sigma = torch.ones(3072), torch.full((3072,), 0.667)
    assert sigma.sum() >= lemma1_lower_bound(mu, mu, alpha=-1e-3)
    assert conditional_probability(mu, sigma, mu) == 0
    assert unconditional_probability(mu, sigma) == pytest.approx(0, abs=1e-9)


def random_parameters(m, mean):
    generator = torch.Generator().manual_seed(m)
    mu = mean + 0.1 * torch.randn(m, generator=generator)
    return mu, 0.3 + torch.rand(m, generator=generator)


@pytest.mark.parametrize(("m", "mean", "epsilon"), [(1, 0.4, 0.0), (8, 0.3, 0.0), (300, 0.1, 0.0), (300, 0.1, 0.05)])
def test_probabilities_against_monte_carlo(m, mean, epsilon):
    mu, sigma = random_parameters(m, mean)
    statistic = cosine_statistic(mu, sigma, 10_000, epsilon)
    assert unconditional_probability(mu, sigma, epsilon) == pytest.approx(statistic.ratio, abs=0.02)
    if m == 300:
        assert normal_probability(mu, sigma, epsilon) == pytest.approx(statistic.ratio, abs=0.02)
    generator = torch.Generator().manual_seed(0)
    first = mu + sigma * torch.randn(m, generator=generator)
    second = mu + sigma * torch.randn(10_000, m, generator=generator)
    below = torch.cosine_similarity(first[None], second, dim=1) <= epsilon
    assert conditional_probability(mu, sigma, first, epsilon) == pytest.approx(below.double().mean().item(), abs=0.02)


def test_the_exact_probability_is_symmetric_without_a_mean_and_corrects_the_normal_one_for_few_elements():
    sigma = torch.rand(5) + 0.1
    assert unconditional_probability(torch.zeros(5), sigma) == pytest.approx(0.5, abs=1e-10)
    mu, one = torch.tensor([1.0]), torch.tensor([1.0])
    # One element: the product of two N(1, 1) is negative if exactly one factor is.
    negative = normal_distribution(-1.0)
    exact = 2 * negative * (1 - negative)
    assert unconditional_probability(mu, one) == pytest.approx(exact, abs=1e-4)
    assert abs(normal_probability(mu, one) - exact) > 0.005


def test_degenerate_weights():
    assert unconditional_probability(torch.ones(3), torch.zeros(3)) == 0
    assert unconditional_probability(torch.zeros(3), torch.zeros(3)) == 1
    assert conditional_probability(torch.ones(3), torch.zeros(3), torch.ones(3)) == 0


def test_table_6_of_a_mean_free_weight():
    # With mu = 0 and m = 3072 a cosine has standard deviation 1/sqrt(m), so the least of 1e4 is near -3.7 of them.
    statistic = cosine_statistic(torch.zeros(3072), torch.ones(3072), 2000)
    assert statistic.ratio == pytest.approx(0.5, abs=0.045)
    assert statistic.interval[0] < statistic.ratio < statistic.interval[1]
    assert -0.09 < statistic.minimum < -0.045


def test_diagnostics_of_a_model():
    model = build_model("ctrw", **SMALL)
    (site,) = random_weights(model)
    values = diagnostics(site.mu, site.sigma)
    assert values.num_elements == 192
    assert values.mean_absolute_mu == 1
    assert values.sum_mu == 192
    assert values.mean_cosine == pytest.approx(0.5)
    assert values.sum_sigma == 192


def test_the_estimated_upper_bound_is_labelled_and_scales_as_it_should():
    model = build_model("ctrw", constraint="none", **SMALL)
    x = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    y = torch.arange(6) % 4
    before = model.training
    draw = random_weights(model)[0].delta.clone()
    estimate = estimate_upper_bound(model, x, y, epsilon_y=1.0, beta=1e-2, num_draws=16)
    assert estimate.value == pytest.approx(192 / (1e-2 * estimate.gain))
    assert estimate_upper_bound(model, x, y, epsilon_y=2.0, num_draws=16).value == pytest.approx(2 * estimate.value)
    assert "not the paper's B" in estimate.label
    assert model.training == before
    assert torch.equal(random_weights(model)[0].delta, draw)
    # Draws behave as Lemma 2 has it: the spread of margins grows with sigma.
    with torch.no_grad():
        random_weights(model)[0].sigma.mul_(0.1)
    smaller = estimate_upper_bound(model, x, y, num_draws=16)
    assert smaller.gain * 0.1 < estimate.gain


@pytest.mark.parametrize("correlation", [1.0, 0.5, 0.0, -1.0])
def test_pairs_of_given_correlation(correlation):
    model = build_model("ctrw", backbone="resnet8", image_shape=(3, 32, 32))
    for pair in pairs_at_correlation(model, correlation, num_pairs=3):
        assert pair.distance == pytest.approx(1 - correlation, abs=0.08)
        for draw in (pair.attacked, pair.scored):
            (delta,) = (state["buffers"]["delta"] for state in draw.values())
            assert delta.std().item() == pytest.approx(1, abs=0.06)
    assert len(list(random_sites(model))) == 1
