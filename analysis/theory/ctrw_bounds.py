"""Numbers of the CTRW paper: the bound A, probabilities of a small cosine between weights, Table 6, an estimate of B.

Notation: m elements; W = mu + delta sigma; R = sum(mu^2 + sigma^2); F the standard normal distribution function. mu, sigma and W are
tensors of any equal shape, computed with in float64.
Reference: Ma, Dong, Xu, "Adversarial Robustness through Random Weight Sampling", NeurIPS 2023, Lemmas 1 and 2, Table 6.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from analysis.statistics import wilson_interval
from analysis.theory.transferability import DrawPair, current_draw, draw_distance, undisturbed
from models.layers.random_weight import RandomFeatureWeight, RandomFilterConv2d
from models.randomness import derive_seed, random_sites, resample

_LOG_RANGE, _LOG_STEP = (-25.0, 30.0), 0.01
_NEGLIGIBLE = 45.0  # exp(-45) of the modulus
_FAR = 40.0  # standard deviations: the tails of S fall exponentially
_CHUNK = 2**21


def normal_distribution(value: float) -> float:
    """Return F(value), the standard normal distribution function."""
    return 0.5 * math.erfc(-value / math.sqrt(2))


def lemma1_lower_bound(mu: Tensor, first_weight: Tensor, alpha: float, scaled_epsilon: float = 0.0) -> float:
    """Return A = (eps' - sum mu) / (alpha sum |W1|), Lemma 1's lower bound of sum sigma.

    Args:
        mu: means. first_weight: W1, the attacked draw's weight.
        alpha: negative; the paper writes 1e-3 and means -1e-3.
        scaled_epsilon: eps' = eps_r |W1| |W2|.

    Raises:
        ValueError: alpha is not negative.

    The paper says that sum sigma >= A makes P(cos <= eps_r) at least F(alpha). Its proof replaces a 2-norm by a larger sum and <mu, W1> by
    sum mu, so the condition is necessary and not sufficient: compare `conditional_probability`.
    """
    if not alpha < 0:
        raise ValueError(f"alpha is {alpha:g}; Lemma 1 needs a negative one (the paper's 1e-3 stands for -1e-3)")
    return (scaled_epsilon - _sum(mu)) / (alpha * _sum(first_weight.abs()))


def conditional_probability(mu: Tensor, sigma: Tensor, first_weight: Tensor, epsilon: float = 0.0) -> float:
    """Return P(cos(W1, W2) <= epsilon) over W2, for a given W1: F((eps' - <mu, W1>) / |sigma W1|).

    Exact for epsilon = 0. Otherwise eps' = epsilon |W1| |W2| uses sqrt(R) for |W2|, which is accurate for large m.
    """
    m, s, w = (value.detach().double().flatten() for value in (mu, sigma, first_weight))
    threshold = epsilon * w.norm().item() * math.sqrt(_second_moment(m, s))
    mean, deviation = (m @ w).item(), (s * w).norm().item()
    if deviation == 0:
        return float(mean <= threshold)
    return normal_distribution((threshold - mean) / deviation)


def unconditional_probability(mu: Tensor, sigma: Tensor, epsilon: float = 0.0) -> float:
    """Return P(cos(W1, W2) <= epsilon) over both weights, from the exact distribution of S = <W1, W2>.

    The probability P(S <= epsilon R) is computed by inverting the characteristic function of S,
    prod_i (1 + sigma_i^4 t^2)^(-1/2) exp(i t mu_i^2 / (1 - i sigma_i^2 t)) (Gil-Pelaez). Exact for epsilon = 0; otherwise |W1| |W2| is
    replaced by its mean square R, which is accurate for large m.
    """
    m, s = (value.detach().double().flatten().numpy(force=True) for value in (mu, sigma))
    threshold = epsilon * float(np.sum(m**2 + s**2))
    deviation = math.sqrt(float(np.sum(2 * m**2 * s**2 + s**4)))
    if deviation == 0:
        return float(np.sum(m**2) <= threshold)
    distance = (threshold - float(np.sum(m**2))) / deviation
    if abs(distance) > _FAR:
        return float(distance > 0)
    # The integral over log t of exp(log modulus) sin(phase), by the trapezoidal rule, which converges fast: the integrand is smooth
    # and vanishes at both ends, like t where t is small and with the modulus where it is large.
    coarse = np.exp(np.linspace(*_LOG_RANGE, 200)) / deviation
    log_modulus, _ = _characteristic(m, s, coarse)
    needed = int(np.searchsorted(-log_modulus, _NEGLIGIBLE))
    last = math.log(coarse[min(needed, len(coarse) - 1)] * deviation)
    t = np.exp(np.arange(_LOG_RANGE[0], last, _LOG_STEP)) / deviation
    log_modulus, phase = _characteristic(m, s, t)
    integral = _LOG_STEP * np.sum(np.exp(log_modulus) * np.sin(phase - threshold * t))
    return float(min(1.0, max(0.0, 0.5 - integral / math.pi)))


def _characteristic(m: np.ndarray, s: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return log modulus and phase of the characteristic function of S at each t."""
    log_modulus, phase = np.zeros_like(t), np.zeros_like(t)
    step = max(1, _CHUNK // len(t))
    for start in range(0, len(m), step):
        m2 = m[start : start + step, None] ** 2
        s2 = s[start : start + step, None] ** 2
        spread = 1 + (s2 * t) ** 2
        log_modulus -= np.sum(0.5 * np.log(spread) + m2 * s2 * t**2 / spread, axis=0)
        phase += np.sum(m2 * t / spread, axis=0)
    return log_modulus, phase


def normal_probability(mu: Tensor, sigma: Tensor, epsilon: float = 0.0) -> float:
    """Return the normal approximation F((eps R - sum mu^2) / sqrt(sum(2 mu^2 sigma^2 + sigma^4))) of P(cos <= epsilon)."""
    m, s = (value.detach().double().flatten() for value in (mu, sigma))
    deviation = (2 * m**2 * s**2 + s**4).sum().sqrt().item()
    excess = epsilon * _second_moment(m, s) - (m**2).sum().item()
    return normal_distribution(excess / deviation) if deviation > 0 else float(excess >= 0)


def expected_cosine(mu: Tensor, sigma: Tensor) -> float:
    """Return sum mu^2 / R, to which the cosine of two draws concentrates for large m."""
    m, s = (value.detach().double().flatten() for value in (mu, sigma))
    return ((m**2).sum() / _second_moment(m, s)).item()


@dataclass(frozen=True)
class WeightDiagnostics:
    """What Lemma 1 assumes, measured. It presumes sum mu >> 0, while training with weight decay drives mu to 0."""

    num_elements: int
    mean_absolute_mu: float
    sum_mu: float
    mean_cosine: float
    sum_sigma: float
    min_sigma: float
    max_sigma: float


def diagnostics(mu: Tensor, sigma: Tensor) -> WeightDiagnostics:
    """Return the diagnostics that belong in every report on CTRW."""
    return WeightDiagnostics(
        num_elements=mu.numel(),
        mean_absolute_mu=_sum(mu.abs()) / mu.numel(),
        sum_mu=_sum(mu),
        mean_cosine=expected_cosine(mu, sigma),
        sum_sigma=_sum(sigma),
        min_sigma=sigma.min().item(),
        max_sigma=sigma.max().item(),
    )


@dataclass(frozen=True)
class CosineStatistic:
    """Cosines of pairs of drawn weights (Table 6).

    Attributes:
        num_pairs: N. num_positive: pairs with cos <= epsilon (the paper's "positive pairs"). ratio: their share, with a 95 % interval.
        minimum, mean: of the cosines.
    """

    num_pairs: int
    num_positive: int
    ratio: float
    interval: tuple[float, float]
    minimum: float
    mean: float


def cosine_statistic(mu: Tensor, sigma: Tensor, num_pairs: int = 10_000, epsilon: float = 0.0, seed: int = 0) -> CosineStatistic:
    """Draw pairs of weights and count small cosines.

    Deviation: the paper's text says 1e5 samples, its table fits 1e4, which is the default here; it says eps_r -> 0+, here 0.
    """
    m, s = mu.detach().cpu().float().flatten(), sigma.detach().cpu().float().flatten()
    generator = torch.Generator().manual_seed(derive_seed(seed, "table6"))
    cosines = []
    step = max(1, _CHUNK // len(m))
    for start in range(0, num_pairs, step):
        count = min(step, num_pairs - start)
        first, second = (m + torch.randn((count, len(m)), generator=generator) * s for _ in range(2))
        cosines.append(torch.nn.functional.cosine_similarity(first.double(), second.double(), dim=1))
    cosine_P = torch.cat(cosines)
    positive = int((cosine_P <= epsilon).sum())
    return CosineStatistic(
        num_pairs,
        positive,
        positive / num_pairs,
        wilson_interval(positive, num_pairs),
        cosine_P.min().item(),
        cosine_P.mean().item(),
    )


@dataclass(frozen=True)
class UpperBoundEstimate:
    """An estimate of the upper bound of sum sigma in the sense of Lemma 2.

    Attributes:
        value: m epsilon_y / (beta gain). gain: standard deviation of the logit margin over draws, per unit of mean sigma.
        probability: F(sqrt(2) beta / 2), what Lemma 2 claims for P(Y1 - Y2 < epsilon_y).
        label: says what it is, and what it is not.
    """

    value: float
    gain: float
    epsilon_y: float
    beta: float
    probability: float
    num_draws: int
    label: str = "estimate by Monte Carlo; not the paper's B (2400), whose recipe and epsilon_y are not published"


def estimate_upper_bound(
    model: nn.Module,
    x_BCHW: Tensor,
    y_B: Tensor,
    epsilon_y: float = 1.0,
    beta: float = 1e-2,
    num_draws: int = 64,
    seed: int = 0,
) -> UpperBoundEstimate:
    """Estimate how large sum sigma may be before the logit margin of clean images varies by epsilon_y (in logits).

    Args:
        model: has exactly one random weight on a feature map.
        epsilon_y, beta: of Lemma 2; the paper gives beta = 1e-2 and no epsilon_y.

    Raises:
        ValueError: not exactly one random weight, or sigma is 0.
    """
    sites = random_weights(model)
    if len(sites) != 1:
        raise ValueError(f"the bound is for one random weight; the model has {len(sites)}")
    site = sites[0]
    mean_sigma = site.sigma.detach().double().mean().item()
    if mean_sigma == 0:
        raise ValueError("sigma is 0: nothing varies, so there is no gain to measure")
    generator = torch.Generator().manual_seed(derive_seed(seed, "upper bound"))
    margins = []
    with undisturbed(model), torch.no_grad():
        for _ in range(num_draws):
            resample(model, generator)
            logits_BK = model(x_BCHW).double()
            true_B1 = logits_BK.gather(1, y_B[:, None])
            rest_BK = logits_BK.scatter(1, y_B[:, None], -math.inf)
            margins.append(true_B1[:, 0] - rest_BK.amax(dim=1))
    gain = torch.stack(margins).std(dim=0).mean().item() / mean_sigma
    return UpperBoundEstimate(
        value=site.sigma.numel() * epsilon_y / (beta * gain),
        gain=gain,
        epsilon_y=epsilon_y,
        beta=beta,
        probability=normal_distribution(math.sqrt(2) * beta / 2),
        num_draws=num_draws,
    )


def random_weights(model: nn.Module) -> list[RandomFeatureWeight | RandomFilterConv2d]:
    """Return the random weights of `model`, in module order."""
    return [site for _, site in random_sites(model) if isinstance(site, RandomFeatureWeight | RandomFilterConv2d)]


def pairs_at_correlation(model: nn.Module, correlation: float, num_pairs: int = 10, seed: int = 0) -> list[DrawPair]:
    """Return pairs of draws delta_1, delta_2 = c delta_1 + sqrt(1 - c^2) delta', each standard normal for itself.

    Args:
        correlation: c in [-1,1]; 1: the same draw, 0: independent ones.

    Raises:
        ValueError: c is outside [-1,1], or the model has no random weight.
    """
    if not -1 <= correlation <= 1:
        raise ValueError(f"correlation is {correlation:g}; it lies in [-1, 1]")
    sites = random_weights(model)
    if not sites:
        raise ValueError("the model has no random weight")
    generator = torch.Generator().manual_seed(derive_seed(seed, "correlated"))
    pairs = []
    with undisturbed(model):
        for _ in range(num_pairs):
            resample(model, generator)
            first = current_draw(model)
            for site in sites:
                fresh = torch.randn(site.delta.shape, generator=generator).to(site.delta)
                site.set_draw("delta", correlation * site.delta + math.sqrt(1 - correlation**2) * fresh)
            second = current_draw(model)
            pairs.append(DrawPair(first, second, draw_distance(model, first, second)))
    return pairs


def _sum(values: Tensor) -> float:
    return values.detach().double().sum().item()


def _second_moment(mu: Tensor, sigma: Tensor) -> float:
    return (mu**2 + sigma**2).sum().item()
