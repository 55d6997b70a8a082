"""The rule that adds images and draws until an interval is narrow: its levels, its looks, its choices, and that it covers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import special

from analysis.statistics import accuracy_interval
from analysis.statistics.stopping import (
    Position,
    Prices,
    Widths,
    expected_end,
    level_of_each_look,
    next_position,
    planned_looks,
    widths_of,
)


@pytest.mark.parametrize(("looks", "constant"), [(1, 1.960), (2, 2.178), (3, 2.289), (4, 2.361), (5, 2.413), (8, 2.512), (10, 2.555)])
def test_levels_of_equal_steps_are_pocock_s(looks, constant):
    """Constants: Jennison and Turnbull, Group Sequential Methods (2000), Table 2.1, alpha = 0.05."""
    level = level_of_each_look(tuple(k / (k + 1) for k in range(1, looks)))
    assert -special.ndtri((1 - level) / 2) == pytest.approx(constant, abs=6e-4)


def test_more_looks_that_have_less_in_common_need_more():
    rng = np.random.default_rng(0)
    for _ in range(20):
        ratios = tuple(rng.uniform(0.05, 0.95, rng.integers(1, 9)))
        level = level_of_each_look(ratios)
        assert 0.95 < level <= 1 - 0.05 / (len(ratios) + 1) + 1e-9, "between no correction and Bonferroni's"
        assert level_of_each_look((*ratios, 0.5)) > level
        assert level_of_each_look((*ratios[:-1], ratios[-1] / 2)) > level
    simulated = rng.standard_normal((200_000, 4))
    ratios = (0.3, 0.8, 0.5)
    for place, ratio in enumerate(ratios):
        simulated[:, place + 1] = math.sqrt(ratio) * simulated[:, place] + math.sqrt(1 - ratio) * simulated[:, place + 1]
    boundary = -special.ndtri((1 - level_of_each_look(ratios)) / 2)
    assert (np.abs(simulated) < boundary).all(1).mean() == pytest.approx(0.95, abs=0.003)


@pytest.mark.parametrize(("images", "block", "width"), [(10_000, 256, 0.01), (360, 48, 0.1), (10_000, 256, 0.0001), (7, 256, 0.2)])
def test_looks_are_at_ends_of_blocks_and_where_a_narrow_interval_is_possible(images, block, width):
    looks = planned_looks(images, block, width, doublings=3)
    assert looks.images[-1] == images
    assert list(looks.images) == sorted(set(looks.images))
    assert all(count % block == 0 for count in looks.images[:-1])
    assert looks.count == len(looks.images) + 3
    for count in range(block, looks.images[0], block):
        assert accuracy_interval(np.ones((count, 1)), 1).width > width, "no look is left out that could have stopped"


def test_widths_are_those_of_the_interval_and_shrink_with_the_root():
    rng = np.random.default_rng(1)
    correct = rng.random((300, 20)) < rng.random((300, 1))
    for exact in (False, True):
        widths = widths_of(correct, exact=exact, level=0.99)
        assert widths.total == pytest.approx(accuracy_interval(correct, 20 if exact else None, level=0.99).width)
        assert (widths.draws == 0) == exact
        assert widths.at(1200, 80 if not exact else 0).total == pytest.approx(widths.total / 2)


def test_the_cheaper_of_images_and_draws_is_added():
    looks = planned_looks(10_000, 256, 0.01, doublings=2)
    here = Position(images=512, draws=20, doublings=2)
    prices = Prices(attack=1000, score=5)
    by_draws = Widths(0.1, 0.02, 0.09, 512, 20)
    assert next_position(here, by_draws, looks, prices) == Position(512, 40, 1)
    by_images = Widths(0.1, 0.099, 0.01, 512, 20)
    assert next_position(here, by_images, looks, prices) == Position(768, 20, 2)
    # Equal parts: images cost an attack, draws do not, unless attacks are cheap.
    equal = Widths(0.1, 0.07, 0.07, 512, 20)
    assert next_position(here, equal, looks, prices).draws == 40
    assert next_position(here, equal, looks, Prices(attack=1, score=5)).images == 768
    # Where nothing is left of one, the other; of both, none.
    assert next_position(Position(512, 80, 0), by_draws, looks, prices).images == 768
    assert next_position(Position(10_000, 20, 1), by_images, looks, prices).draws == 40
    assert next_position(Position(10_000, 80, 0), by_images, looks, prices) is None
    exact = Widths(0.1, 0.1, 0.0, 512, 0)
    assert next_position(here, exact, looks, prices).images == 768


def test_the_expected_end_is_where_the_rule_goes():
    looks = planned_looks(10_000, 256, 0.05)
    at = Position(256, 20, 0)
    seen = Widths(0.2, 0.2, 0.0, 256, 0)
    end, reached = expected_end(at, seen, looks, Prices(1, 1), 0.0501)
    assert reached and end.images == 256 * 16
    end, reached = expected_end(at, seen, looks, Prices(1, 1), 0.01)
    assert not reached and end.images == 10_000


@pytest.mark.parametrize("accuracy", [0.5, 0.95])
def test_the_interval_at_the_stop_covers(accuracy):
    """Independent images, one draw: 95 % at the end of the rule (1,000 repetitions), and less without the correction."""
    rng = np.random.default_rng(2)
    looks = planned_looks(1024, 16, 0.12)
    covered = []
    for _ in range(1000):
        correct = rng.random((1024, 1)) < accuracy
        for count in looks.images:
            estimate = accuracy_interval(correct[:count], 1, level=looks.level_of_each)
            if estimate.width <= 0.12:
                break
        covered.append(estimate.low <= accuracy <= estimate.high)
    assert np.mean(covered) >= 0.94
