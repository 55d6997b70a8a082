"""Quantities of trainable random weights (CTRW): bounds of the sum of sigma, probabilities and counts of small cosines.

Reference: Ma, Dong, Xu, "Adversarial Robustness through Random Weight Sampling", NeurIPS 2023.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from analysis.quantities.pairs import Pairs, PairsByDistance
from analysis.quantities.quantity import Finding, Quantity, Requirement, Subject, has_layer, rounded
from analysis.theory.ctrw_bounds import (
    conditional_probability,
    cosine_statistic,
    diagnostics,
    estimate_upper_bound,
    lemma1_lower_bound,
    normal_distribution,
    normal_probability,
    pairs_at_correlation,
    random_weights,
    unconditional_probability,
)
from analysis.theory.transferability import undisturbed
from models.layers.random_weight import RandomFeatureWeight, RandomFilterConv2d
from models.randomness import random_sites, resample

PAPER = "Ma et al., CTRW, NeurIPS 2023"
ALPHA, BETA, EPSILON_Y = -1e-3, 1e-2, 1.0
EPSILONS = (0.0, 0.01, 0.05)
TABLE_6_PAIRS = 10_000
CORRELATIONS = (1.0, 0.95, 0.75, 0.5, 0.0)

Site = RandomFeatureWeight | RandomFilterConv2d
RANDOM_WEIGHTS = Requirement("trainable random weights (ctrw)", has_layer(RandomFeatureWeight, RandomFilterConv2d))


def _sites(subject: Subject) -> Iterator[tuple[str, Site]]:
    for name, site in random_sites(subject.model):
        if isinstance(site, Site):
            yield name, site


def _first_weights(subject: Subject, site: Site, count: int) -> list[Tensor]:
    """Return weights W1 of `count` draws."""
    generator = subject.generator("first weights")
    weights = []
    with undisturbed(subject.model):
        for _ in range(count):
            resample(subject.model, generator)
            weights.append(site.sample_weight().detach())
    return weights


def _lemma1(subject: Subject) -> Finding:
    rows: list[dict[str, Any]] = []
    for name, site in _sites(subject):
        bounds = [lemma1_lower_bound(site.mu, weight, ALPHA) for weight in _first_weights(subject, site, subject.draws(32))]
        total = site.sigma.detach().double().sum().item()
        exact = unconditional_probability(site.mu, site.sigma)
        rows.append(
            {
                "site": name,
                "m": site.sigma.numel(),
                "sum sigma": total,
                "A of Lemma 1": sum(bounds) / len(bounds),
                "lowest A": min(bounds),
                "highest A": max(bounds),
                "sum sigma >= A": total >= sum(bounds) / len(bounds),
                "P claimed": normal_distribution(ALPHA),
                "P exact": exact,
                "configured A": site.bounds.lower,
                "configured B": site.bounds.upper,
            }
        )
    notes = (
        f"alpha = {ALPHA:g}; A depends on the attacked draw W1: mean, lowest and highest over {subject.draws(32)} draws; the paper's short "
        f"form is 1/|alpha| = {1 / abs(ALPHA):g}.",
        "The condition is necessary and not sufficient: compare P claimed with P exact.",
    )
    return Finding(rows, notes, {"lower_bound": rows[0]["A of Lemma 1"], "sum_sigma": rows[0]["sum sigma"]})


def _probability(subject: Subject) -> Finding:
    rows: list[dict[str, Any]] = []
    for name, site in _sites(subject):
        weights = _first_weights(subject, site, subject.draws(32))
        for epsilon in EPSILONS:
            given = [conditional_probability(site.mu, site.sigma, weight, epsilon) for weight in weights]
            rows.append(
                {
                    "site": name,
                    "epsilon_r": epsilon,
                    "P unconditional": unconditional_probability(site.mu, site.sigma, epsilon),
                    "P normal approximation": normal_probability(site.mu, site.sigma, epsilon),
                    "P given W1, mean": sum(given) / len(given),
                    "lowest": min(given),
                    "highest": max(given),
                }
            )
    notes = (f"P given W1 over {subject.draws(32)} draws of W1. Exact for epsilon_r = 0, else accurate for large m.",)
    return Finding(rows, notes, {"probability": rows[0]["P unconditional"]})


def _cosines(subject: Subject, num_pairs: int = TABLE_6_PAIRS) -> Finding:
    rows: list[dict[str, Any]] = []
    for name, site in _sites(subject):
        found = cosine_statistic(site.mu, site.sigma, num_pairs=max(num_pairs, subject.draws(0)), seed=subject.seed)
        rows.append(
            {
                "site": name,
                "pairs": found.num_pairs,
                "positive": found.num_positive,
                "ratio": found.ratio,
                "low": found.interval[0],
                "high": found.interval[1],
                "smallest cosine": found.minimum,
                "mean cosine": found.mean,
            }
        )
    notes = ("Positive pairs have cos(W1, W2) <= 0. The paper's text says 1e5 pairs, its table fits 1e4, the default here.",)
    metrics = {"positive": rows[0]["positive"], "ratio": rows[0]["ratio"], "minimum": rows[0]["smallest cosine"]}
    return Finding(rows, notes, metrics, num_draws=rows[0]["pairs"])


def _upper_bound(subject: Subject) -> Finding:
    x_BCHW, y_B = subject.images(128)
    found = estimate_upper_bound(subject.model, x_BCHW, y_B, epsilon_y=EPSILON_Y, beta=BETA, num_draws=subject.draws(64), seed=subject.seed)
    (site,) = random_weights(subject.model)
    row = {
        "B, estimate": found.value,
        "sum sigma": site.sigma.detach().double().sum().item(),
        "gain": found.gain,
        "epsilon_y": found.epsilon_y,
        "beta": found.beta,
        "P claimed": found.probability,
        "draws": found.num_draws,
        "images": len(x_BCHW),
    }
    return Finding([row], (f"B is an {found.label}.",), {"upper_bound_estimate": found.value})


def _diagnostics(subject: Subject) -> Finding:
    rows: list[dict[str, Any]] = []
    for name, site in _sites(subject):
        found = diagnostics(site.mu, site.sigma)
        rows.append(
            {
                "site": name,
                "m": found.num_elements,
                "mean |mu|": found.mean_absolute_mu,
                "sum mu": found.sum_mu,
                "sum mu^2 / R": found.mean_cosine,
                "sum sigma": found.sum_sigma,
                "smallest sigma": found.min_sigma,
                "largest sigma": found.max_sigma,
            }
        )
    notes = ("Lemma 1 presumes sum mu >> 0, while weight decay drives mu to 0; sum mu^2 / R is the mean cosine of two draws.",)
    metrics = {"mean_absolute_mu": rows[0]["mean |mu|"], "sum_mu": rows[0]["sum mu"], "mean_cosine": rows[0]["sum mu^2 / R"]}
    sigma = torch.cat([site.sigma.detach().flatten() for _, site in _sites(subject)])
    return Finding(rows, notes, metrics, {"values": rounded(sigma)})


def _is_one_trained_weight(model: object) -> bool:
    sites = random_weights(model)  # type: ignore[arg-type]
    return len(sites) == 1 and bool((sites[0].sigma != 0).any())


ONE_RANDOM_WEIGHT = Requirement(
    "exactly one trainable random weight with sigma above 0 (ctrw, variants in, out, filter)", _is_one_trained_weight
)


def _pairs_at_correlations(model: nn.Module, sites: Sequence[Site], count: int, seed: int) -> Pairs:
    del sites
    for correlation in CORRELATIONS:
        yield 1 - correlation, pairs_at_correlation(model, correlation, count, seed)


PAIRS_BY_DISTANCE = (PairsByDistance("random weights", (RandomFeatureWeight, RandomFilterConv2d), _pairs_at_correlations),)

QUANTITIES = (
    Quantity(
        "ctrw_lemma1",
        "Lower bound A of the sum of sigma",
        "Lemma 1 asks for sum sigma >= A so that a second draw has at least the claimed chance of a cosine below 0",
        f"{PAPER}, Lemma 1",
        RANDOM_WEIGHTS,
        _lemma1,
    ),
    Quantity(
        "ctrw_probability",
        "Probability that two drawn weights have a small cosine",
        "near 0: the weights of two draws always point the same way; 0.5: they are as good as unrelated",
        f"{PAPER}, Lemma 1, computed exactly",
        RANDOM_WEIGHTS,
        _probability,
    ),
    Quantity(
        "ctrw_cosines",
        "Cosines of pairs of drawn weights",
        "how many of the pairs have a cosine of at most 0, counted",
        f"{PAPER}, Table 6",
        RANDOM_WEIGHTS,
        _cosines,
    ),
    Quantity(
        "ctrw_upper_bound",
        "Upper bound B of the sum of sigma, an estimate",
        "above B the logit margin of clean images varies by more than epsilon_y from draw to draw",
        f"{PAPER}, Lemma 2",
        ONE_RANDOM_WEIGHT,
        _upper_bound,
    ),
    Quantity(
        "ctrw_diagnostics",
        "What Lemma 1 assumes, measured",
        "small mean |mu| and sum mu^2 / R: the noise, not the mean, is the weight",
        f"{PAPER}, Lemma 1",
        RANDOM_WEIGHTS,
        _diagnostics,
    ),
)
