"""The space of masks of a stochastic convolution: enumeration, stratified masks, probabilities, what GSAT needs."""

from __future__ import annotations

import itertools

import pytest
from torch import nn

from models.errors import UserError
from models.layers.stochastic_convolution import StochasticConv2d
from models.layers.tap_masks import TapMaskSpace
from models.randomness import num_configurations, resample


def layer(k=5, n=2, **options) -> StochasticConv2d:
    return StochasticConv2d(4, 6, k, n, **options)


@pytest.mark.parametrize(("k", "n", "size"), [(5, 1, 25), (5, 2, 300), (5, 3, 2300), (5, 4, 12650), (3, 9, 1)])
def test_enumeration_is_complete(k, n, size):
    space = TapMaskSpace(k, n)
    assert space.size == size
    if size < 3000:
        assert [space.taps(index) for index in range(size)] == list(itertools.combinations(range(k * k), n))
    assert space.taps(size - 1) == tuple(range(k * k - n, k * k))
    with pytest.raises(IndexError):
        space.taps(size)


@pytest.mark.parametrize(("n", "size"), [(1, 9), (2, 54), (3, 324), (4, 1296)])
def test_stratified_masks_take_one_tap_of_each_of_the_first_classes(n, size):
    """Counts of the official code's stratified blocks for a 5x5 kernel; it has none for n = 2 (our reading: classes 1 and 2)."""
    parities = [(0, 0), (0, 1), (1, 0), (1, 1)][:n]
    expected = {mask for mask in itertools.combinations(range(25), n) if sorted((tap // 5 % 2, tap % 5 % 2) for tap in mask) == parities}
    assert len(expected) == size
    site = layer(5, n, sampling="stratified2")
    space = site.space
    assert {space.taps(index) for index in range(size)} == expected
    assert space.size == site.num_configurations == num_configurations(nn.Sequential(site)) == size
    assert all(space.probability(index) == 1 / size for index in range(size))
    with pytest.raises(IndexError):
        space.taps(size)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_a_second_stratified_mask_uses_no_class_that_the_first_missed(n):
    """ "Cancel X^u": with the first n classes fixed, the share of taps in other classes is 0 for every n."""
    site = layer(5, n, sampling="stratified2")
    used = set()
    for _ in range(60):
        resample(site)
        used |= {(tap // 5 % 2, tap % 5 % 2) for tap in site.selected_taps}
    assert len(used) == n


@pytest.mark.parametrize("scope", ["global", "per_example"])
@pytest.mark.parametrize(("k", "n", "sampling"), [(3, 2, "stratified2"), (3, 4, "stratified2"), (3, 2, "uniform")])
def test_draws_are_uniform_over_the_masks(k, n, sampling, scope):
    site = layer(k, n, sampling=sampling, draw_scope=scope)
    draws = 4000
    counts: dict[tuple[int, ...], int] = {}
    if scope == "per_example":
        rows = site._rows(draws).tolist()
    else:
        rows = []
        for _ in range(draws):
            resample(site)
            rows.append(site.selected_taps)
    for row in rows:
        counts[tuple(row)] = counts.get(tuple(row), 0) + 1
    probability = 1 / site.num_configurations
    spread = (draws * probability * (1 - probability)) ** 0.5
    assert len(counts) == site.num_configurations
    for index in range(site.num_configurations):
        assert abs(counts[site.space.taps(index)] - draws * probability) < 4.5 * spread


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 2), "odd"),
        ((3, 10), "1 to 9 taps"),
        ((5, 5, "stratified2"), "parity classes"),
        ((5, 2, "stratified"), "unknown sampling"),
    ],
)
def test_impossible_spaces(arguments, message):
    with pytest.raises(UserError, match=message):
        TapMaskSpace(*arguments)


def test_gsat_needs_disjoint_masks():
    with pytest.raises(UserError, match="2 n <= k k"):
        layer(3, 5, gsat="attack")
    with pytest.raises(UserError, match="class 4 of a 3x3 kernel has one"):
        layer(3, 4, gsat="attack", sampling="stratified2")
    layer(3, 3, gsat="attack", sampling="stratified2")
    with pytest.raises(UserError, match="chain"):
        layer(gsat="chain", draw_scope="per_example")
