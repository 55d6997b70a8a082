"""Gradient cosines and transfer accuracy between draws, for every randomized defence."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from analysis.theory.ctrw_bounds import pairs_at_correlation
from analysis.theory.dcs_gradients import pairs_with_overlap
from analysis.theory.rna_paths import pairs_at_difference
from analysis.theory.transferability import (
    cosine_per_example,
    gradient_cosines,
    gradient_cosines_between_models,
    random_pairs,
    transfer,
    transfer_by_distance,
)
from models import build_model
from models.randomness import RandomModule, random_sites, randomness_state, resample
from trainers.attacks import pgd

SMALL = {"backbone": "resnet8", "image_shape": (3, 8, 8), "num_classes": 4}


def images(batch=6):
    return torch.rand(batch, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(batch) % 4


def attack(model, x, y):
    return pgd(model, x, y, epsilon=0.1, step_size=0.05, steps=2, random_start=False)


def state_of(model: nn.Module) -> list[torch.Tensor]:
    return [value.clone() for value in model.state_dict().values()]


@pytest.mark.parametrize(
    ("defence", "options"),
    [
        *((name, {"draw_scope": scope}) for name in ("ctrw", "rna", "dcs") for scope in ("global", "per_example")),
        ("red", {"num_members": 3}),
    ],
)
def test_random_pairs_leave_no_trace(defence, options):
    model = build_model(defence, **options, **SMALL).train()
    before, weights = randomness_state(model), state_of(model)
    pairs = random_pairs(model, 3, seed=2)
    cosines = gradient_cosines(model, *images(), pairs)
    records = transfer(model, *images(), attack, pairs)
    assert cosines.cosine_PB.shape == (3, 6)
    assert (cosines.cosine_PB.abs() <= 1 + 1e-9).all()
    assert [record.distance for record in records] == cosines.distance_P.tolist()
    assert all(0 <= record.accuracy <= 1 for record in records)
    assert any(pair.distance > 0 for pair in pairs)
    counts, edges = cosines.histogram(10)
    assert counts.sum() == 18
    assert len(edges) == 11
    after = randomness_state(model)
    for name in before:
        assert before[name]["position"] == after[name]["position"]
        assert torch.equal(*(next(iter(state[name]["draw"]["buffers"].values())) for state in (before, after)))
    assert all(torch.equal(a, b) for a, b in zip(state_of(model), weights, strict=True))
    assert model.training
    again = gradient_cosines(model, *images(), random_pairs(model, 3, seed=2))
    torch.testing.assert_close(again.cosine_PB, cosines.cosine_PB)


@pytest.mark.parametrize(
    ("defence", "pairs_at", "near", "far"),
    [
        ("rna", pairs_at_difference, 0, 9),
        ("dcs", lambda model, overlap, count: pairs_with_overlap(model, overlap, count), 2, 0),
        ("ctrw", lambda model, c, count: pairs_at_correlation(model, c, count), 1.0, 0.0),
    ],
)
def test_cosines_fall_with_the_distance(defence, pairs_at, near, far):
    model = build_model(defence, **SMALL).train()
    x, y = images(16)
    for _ in range(10):  # running statistics of the inputs
        resample(model)
        model(x)
    same = gradient_cosines(model, x, y, pairs_at(model, near, 4))
    apart = gradient_cosines(model, x, y, pairs_at(model, far, 4))
    assert same.mean == pytest.approx(1, abs=1e-5)
    assert apart.mean < 0.97
    records = transfer(model, x, y, attack, pairs_at(model, near, 2))
    assert all(record.accuracy == record.accuracy_on_attacked_draw for record in records)
    assert len(transfer_by_distance(records)) == 1
    assert same.distance_P.tolist() == pytest.approx([0.0] * 4, abs=1e-12)


def test_gradients_of_two_models():
    first, second = build_model("at", seed=0, **SMALL), build_model("at", seed=1, **SMALL)
    assert gradient_cosines_between_models(first, first, *images()).mean == pytest.approx(1)
    assert gradient_cosines_between_models(first, second, *images()).mean < 0.9


def test_vanishing_and_tiny_gradients():
    a = torch.zeros(3, 4)
    b = torch.ones(3, 4)
    a[1] = 1e-30
    a[2] = -1
    cosine, zeros = cosine_per_example(a, b)
    torch.testing.assert_close(cosine, torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64))
    assert zeros == 1


@pytest.mark.parametrize(
    ("defence", "options"),
    [
        ("dcs", {"kernel_size": 3, "gsat": "off", "sampling": "stratified2"}),
        ("dcs", {"kernel_size": 3, "num_taps": 2, "gsat": "off"}),
        ("rna", {"pool": ("bn", "in", "ln")}),
        ("red", {"num_members": 3}),
    ],
)
def test_probabilities_of_configurations_are_those_of_draws(defence, options):
    model = build_model(defence, **options, **SMALL)
    _, site = next(random_sites(model))
    total = int(site.num_configurations)
    probabilities = [site.configuration_probability(index) for index in range(total)]
    assert sum(probabilities) == pytest.approx(1)
    states = []
    for index in range(total):
        site.set_configuration(index)
        states.append(site.draw_state())
    counts = [0] * total
    draws, generator = 60 * total, torch.Generator().manual_seed(0)
    for _ in range(draws):
        site.draw(generator)
        if defence == "red":  # each example of a batch has a member of its own: the first one's
            counts[int(site.member_indices(1)[0])] += 1
        else:
            now = site.draw_state()
            counts[next(index for index, state in enumerate(states) if site.distance(now, state) == 0)] += 1
    statistic = sum((count - draws * p) ** 2 / (draws * p) for count, p in zip(counts, probabilities, strict=True))
    assert statistic < total + 6 * (2 * total) ** 0.5


def test_a_site_without_a_measure_of_its_own_is_at_0_or_1():
    class Coin(RandomModule):
        num_configurations = 2

        def __init__(self):
            super().__init__()
            self.register_draw("side", torch.zeros(()))
            self.take_first_draw()

        def draw(self, generator):
            self.set_draw("side", torch.randint(2, (), generator=generator).float())

        def set_configuration(self, index):
            self.set_draw("side", torch.tensor(float(index)))

    coin = Coin()
    states = []
    for index in range(2):
        coin.set_configuration(index)
        states.append(coin.draw_state())
    assert [coin.distance(states[0], state) for state in states] == [0.0, 1.0]
    assert coin.configuration_probability(0) is None
