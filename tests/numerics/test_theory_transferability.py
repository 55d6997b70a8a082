"""Gradient cosines and transfer accuracy between draws, for every randomized defence."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from analysis.theory.ctrw_bounds import pairs_at_correlation
from analysis.theory.dcs_gradients import pairs_with_overlap
from analysis.theory.rna_paths import pairs_at_difference
from analysis.theory.transferability import (
    accuracy_of_every_configuration,
    cosine_per_example,
    gradient_cosines,
    gradient_cosines_between_models,
    random_pairs,
    transfer,
    transfer_by_distance,
)
from models import build_model
from models.randomness import num_configurations, randomness_state, resample
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
    assert set(same.by_distance()) == {0.0}


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


def test_exact_accuracy_over_a_finite_space():
    model = build_model("dcs", kernel_size=3, gsat="off", sampling="stratified2", **SMALL)
    x, y = images(8)
    result = accuracy_of_every_configuration(model, x, y)
    assert len(result.accuracy_S) == num_configurations(model)
    assert result.probability_S.sum().item() == pytest.approx(1)
    model.eval()
    draws = 400
    total = 0.0
    with torch.no_grad():
        for _ in range(draws):
            resample(model)
            total += (model(x).argmax(1) == y).double().mean().item()
    deviation = (result.probability_S @ (result.accuracy_S - result.expected) ** 2).sqrt().item()
    assert abs(total / draws - result.expected) <= 4 * deviation / draws**0.5 + 1e-9
    with pytest.raises(ValueError, match="sample draws instead"):
        accuracy_of_every_configuration(build_model("ctrw", **SMALL), x, y)
