"""ADP: entropy and log determinant (T41 of the specification), the limit on the number of members."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

from models import build_model
from tests.numerics.ensemble_cases import batch, context, objective, tiny_ensemble
from trainers.objectives.adp import DegenerateDiversityWarning, check_rank, ensemble_entropy, log_determinant_diversity


def random_logits(num_members: int, num_classes: int = 10, num_examples: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(num_members, num_examples, num_classes, dtype=torch.float64, generator=generator)


def test_log_determinant_equals_the_definition():
    logits, y = random_logits(4), torch.arange(6)
    total = 0.0
    for b in range(6):
        rows = torch.stack([torch.cat([p[: y[b]], p[y[b] + 1 :]]) for p in logits[:, b].softmax(-1)])
        rows = rows / rows.norm(dim=1, keepdim=True)
        total += torch.logdet(rows @ rows.T + 1e-6 * torch.eye(4, dtype=torch.float64)).item() / 6
    assert log_determinant_diversity(logits, y).item() == pytest.approx(total, abs=1e-9)


def test_log_determinant_does_not_depend_on_the_size_of_non_true_probabilities():
    logits, y = random_logits(3), torch.arange(6)
    moved = logits.clone()
    for member, shift in enumerate((5.0, -2.0, 9.0)):
        moved[member, torch.arange(6), y] += shift  # the true class takes more or less, the others keep their ratios
    assert log_determinant_diversity(moved, y).item() == pytest.approx(log_determinant_diversity(logits, y).item(), abs=1e-8)


@pytest.mark.parametrize("num_members", [2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identical_members(num_members, dtype):
    logits = random_logits(1).expand(num_members, -1, -1).to(dtype)
    expected = (num_members - 1) * math.log(1e-6) + math.log(num_members + 1e-6)
    assert log_determinant_diversity(logits, torch.arange(6)).item() == pytest.approx(expected, abs=1e-6)


def test_confident_members_give_finite_values_and_gradients():
    logits = (random_logits(3).float() * 200).requires_grad_()
    value = log_determinant_diversity(logits, torch.arange(6)) + ensemble_entropy(logits)
    value.backward()
    assert value.isfinite()
    assert logits.grad.isfinite().all()


def test_entropy_of_the_mean_prediction():
    logits = random_logits(3)
    mean = logits.softmax(-1).mean(0)
    assert ensemble_entropy(logits).item() == pytest.approx(-(mean * mean.log()).sum(-1).mean().item(), abs=1e-13)
    assert ensemble_entropy(torch.zeros(2, 5, 10)).item() == pytest.approx(math.log(10))


def test_the_loss_sums_cross_entropies_and_rewards_entropy_and_volume():
    ensemble = tiny_ensemble(3)
    x, y = batch()
    terms = objective("adp").loss(ensemble, x, y, context(ensemble))
    logits = ensemble.member_logits(x)
    cross_entropy = sum(nn.functional.cross_entropy(row, y) for row in logits)
    expected = cross_entropy - 2 * ensemble_entropy(logits) - 0.5 * log_determinant_diversity(logits, y)
    assert terms["loss"].item() == pytest.approx(expected.item(), abs=1e-10)


def test_more_members_than_directions_is_reported():
    x = {"backbone": "resnet8", "image_shape": (3, 8, 8)}
    with pytest.warns(DegenerateDiversityWarning, match="12 members and 10 classes"):
        objective("adp").prepare(build_model("adp", num_members=12, num_classes=10, **x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for num_members in (3, 5, 8, 9):
            check_rank(num_members, 10)
        objective("adp").prepare(build_model("adp", num_members=8, num_classes=10, **x))
    singular = log_determinant_diversity(random_logits(12), torch.arange(6)).item()
    assert singular < 2.5 * math.log(1e-6), "three of twelve directions are missing"
