"""DCS's numbers against hand values and brute force over all masks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch.nn import functional

from analysis.theory.dcs_bounds import (
    class_of,
    class_sizes,
    feasibility,
    mask_pair,
    mask_pair_with_overlap,
    paper_gap_bounds,
    paper_unhit_lower_bound,
    paper_unhit_upper_bound,
    point_probabilities,
    taps_lower_bound,
    taps_upper_bound,
    unhit_extremes,
)
from analysis.theory.dcs_gradients import (
    designed_pairs,
    input_gradient_cosines,
    mask_cosines,
    mask_matrix,
    pairs_with_overlap,
    tap_gradient_gram,
)
from models import build_model
from models.errors import UserError
from models.layers.stochastic_convolution import StochasticConv2d
from models.randomness import random_sites

SMALL = {"backbone": "resnet8", "image_shape": (3, 8, 8), "num_classes": 4}


def unhit_share(taps: Sequence[int], kernel_size: int, stride: int) -> float:
    """Return p_u for a given first mask: the share of taps in residue classes that the mask does not hit."""
    sizes = class_sizes(kernel_size, stride)
    hit = {class_of(tap, kernel_size, stride) for tap in taps}
    return sum(size for index, size in enumerate(sizes) if index not in hit) / kernel_size**2


def overlap_distribution(kernel_size: int, num_taps: int) -> tuple[float, ...]:
    """Return P(two independent uniform masks share j taps), j = 0..n."""
    total, n = kernel_size**2, num_taps
    return tuple(math.comb(n, j) * math.comb(total - n, n - j) / math.comb(total, n) for j in range(n + 1))


def test_classes():
    assert sorted(class_sizes(5, 2)) == [4, 6, 6, 9]
    assert class_sizes(5, 1) == (25,)
    assert sum(class_sizes(7, 3)) == 49


@pytest.mark.parametrize(
    ("stride", "n", "unhit", "same", "gap"),
    [
        (1, 2, 0.0, 0.08, 0.92),
        (2, 1, 0.7296, 0.04, 0.2304),
        (2, 2, 0.5296, 0.08, 0.3904),
        (2, 4, 0.2746, 0.16, 0.5654),
        (3, 2, 0.7547, 0.08, 0.1653),
    ],
)
def test_probabilities_of_the_specification(stride, n, unhit, same, gap):
    values = point_probabilities(5, n, stride)
    assert (values.unhit, values.same, values.gap) == pytest.approx((unhit, same, gap), abs=1e-4)
    assert values.same + values.gap + values.unhit == pytest.approx(1, abs=1e-12)
    selective = point_probabilities(5, n, stride, disjoint=True)
    assert selective.same == 0
    assert selective.unhit == pytest.approx(values.unhit * 25 / (25 - n))
    assert selective.gap + selective.unhit == pytest.approx(1)


@pytest.mark.parametrize(("k", "n", "stride"), [(3, 2, 2), (5, 2, 2), (5, 3, 3), (5, 2, 1)])
def test_probabilities_by_brute_force(k, n, stride):
    masks = list(itertools.combinations(range(k * k), n))
    shares = [unhit_share(mask, k, stride) for mask in masks]
    assert sum(shares) / len(shares) == pytest.approx(point_probabilities(k, n, stride).unhit, abs=1e-12)
    assert unhit_extremes(k, n, stride) == pytest.approx((min(shares), max(shares)))
    assert paper_unhit_lower_bound(k, n, stride) == pytest.approx(min(shares))


def test_the_papers_upper_bound_of_p_u_is_exceeded_by_real_masks():
    assert unhit_extremes(5, 4, 2)[1] == pytest.approx(0.84)
    assert paper_unhit_upper_bound(5, 4, 2) == pytest.approx(0.75)


def test_gap_bounds_hold_where_the_bounds_of_p_u_do():
    lower, upper = paper_gap_bounds(4, 2, 2)  # classes of equal size
    values = point_probabilities(4, 2, 2)
    assert lower <= values.gap <= upper


def test_bounds_of_n():
    assert taps_lower_bound(5, 1, 0, 36**2) == pytest.approx(32.05)
    assert taps_lower_bound(5, 2, 0, 36**2) == pytest.approx(15.85)
    assert taps_upper_bound(5, 2, 0.5, loose=True) == 2
    assert taps_upper_bound(5, 2, 0.5) == pytest.approx(4 + 25 * -0.5 / 4)
    assert taps_upper_bound(5, 2, 0.5, gap_cosine=1.0) == pytest.approx(taps_upper_bound(5, 2, 0.5))
    assert taps_upper_bound(5, 2, 0.5, gap_cosine=0.3) > taps_upper_bound(5, 2, 0.5)
    with pytest.raises(UserError, match="strides of 1 to the kernel size 3"):
        taps_upper_bound(3, 4, 0.5)


@pytest.mark.parametrize(("points", "needed"), [(36**2, 1246), (32**2, 985)])
def test_the_papers_own_configuration_is_infeasible(points, needed):
    for epsilon_c in (0.1, 0.5, 0.99):
        result = feasibility(5, 2, 1, epsilon_c, needed, points)
        assert not result.feasible
        assert not result.some_n_is_feasible
        assert str(result).startswith("feasible: no")
    assert result.needed_epsilon_l == pytest.approx(needed, abs=1)
    assert result.needed_epsilon_c > 1
    at_needed = feasibility(5, 2, 2, 0.0, 0.0, points)
    enough = feasibility(5, 2, 2, at_needed.needed_epsilon_c + 1e-9, at_needed.needed_epsilon_l + 1e-9, points)
    assert enough.feasible
    assert enough.some_n_is_feasible


@pytest.mark.parametrize(
    ("n", "probabilities"),
    [
        (1, (0.96, 0.04)),
        (2, (0.8433, 0.1533, 0.0033)),
        (3, (0.6696, 0.3013, 0.0287, 0.0004)),
        (4, (0.4731, 0.4206, 0.0996, 0.0066, 0.0001)),
    ],
)
def test_overlaps(n, probabilities):
    assert overlap_distribution(5, n) == pytest.approx(probabilities, abs=5e-5)
    assert sum(overlap_distribution(5, n)) == pytest.approx(1)


def test_designed_masks():
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        first, second = mask_pair("gap", 5, 4, 2, generator)
        assert not set(first) & set(second)
        assert sorted(class_of(t, 5, 2) for t in first) == sorted(class_of(t, 5, 2) for t in second)
        first, second = mask_pair("unhit", 5, 4, 2, generator)
        assert not {class_of(t, 5, 2) for t in first} & {class_of(t, 5, 2) for t in second}
        first, second = mask_pair("same", 5, 4, 2, generator)
        assert first == second
        for overlap in range(3):
            first, second = mask_pair_with_overlap(overlap, 5, 2, generator)
            assert len(set(first) & set(second)) == overlap
    with pytest.raises(ValueError, match="no pair of kind 'unhit'"):
        mask_pair("unhit", 3, 1, 1, generator)
    with pytest.raises(ValueError, match="cannot share exactly 0"):
        mask_pair_with_overlap(0, 3, 5, generator)


@pytest.mark.parametrize("stride", [1, 2])
def test_the_tap_bank_gives_the_cosine_of_any_two_masks(stride):
    torch.manual_seed(0)
    layer = StochasticConv2d(3, 4, 3, 2, (stride, stride)).double()
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(layer(x)).detach()
    masks = [layer.space.taps(index) for index in range(36)]
    gradients = []
    for index in range(36):
        layer.set_configuration(index)
        gradients.append(torch.autograd.grad(layer(x), x, upstream)[0].flatten(1))
    expected = torch.stack([torch.stack([torch.cosine_similarity(a, b) for b in gradients], 1) for a in gradients], 1)
    gram = tap_gradient_gram(layer, x.shape, upstream)
    matrix = mask_matrix(masks, 3)
    torch.testing.assert_close(mask_cosines(gram, matrix, matrix), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("position", [2, 4])
def test_input_gradient_cosines_of_a_network(position):
    model = build_model("dcs", kernel_size=3, positions=(position,), **SMALL)
    x = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1, 2])
    ((_, site),) = random_sites(model)
    taps = site.selected_taps
    result = input_gradient_cosines(model, x, y, num_designed=50)
    assert site.selected_taps == taps
    overlaps = overlap_distribution(3, 2)
    assert result.by_overlap[2] == pytest.approx(1)
    assert result.expected == pytest.approx(sum(p * c for p, c in zip(overlaps, result.by_overlap, strict=True)), abs=1e-9)
    assert result.by_kind["same"] == pytest.approx(1)
    if site.stride == (2, 2):
        assert result.by_kind["unhit"] == pytest.approx(0, abs=1e-12)  # disjoint points: exactly orthogonal
    else:
        assert "unhit" not in result.by_kind
    assert -1 <= result.predicted <= 1


def test_pairs_of_draws():
    model = build_model("dcs", positions=(2, 3), **SMALL)
    for overlap in range(3):
        assert {pair.distance for pair in pairs_with_overlap(model, overlap, 4)} == {2.0 * (2 - overlap)}
    assert {pair.distance for pair in designed_pairs(model, "same", 3)} == {0.0}
    assert {pair.distance for pair in designed_pairs(model, "gap", 3)} == {4.0}


def test_reached_points_are_the_hit_classes():
    # The definition behind p_u, on a map: which input pixels get a gradient under one mask.
    k, stride = 5, 2
    taps = (1, 7)
    weight = torch.zeros(1, 1, k, k)
    for tap in taps:
        weight[0, 0, tap // k, tap % k] = 1
    x = torch.zeros(1, 1, 40, 40, requires_grad=True)
    functional.conv2d(x, weight, stride=stride).sum().backward()
    inner = x.grad[0, 0, 10:20, 10:20] != 0
    reached = inner.double().mean().item()
    hit = {class_of(tap, k, stride) for tap in taps}
    assert reached == len(hit) / stride**2
