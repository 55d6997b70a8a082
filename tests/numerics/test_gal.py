"""GAL: the gradient alignment loss (T40 of the specification) and its training step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from models import build_model
from models.ensemble import Ensemble
from tests.numerics.ensemble_cases import TinyNet, batch, context, gradients, largest_difference, objective, tiny_ensemble
from trainers.ensembles.input_gradients import gram_matrix, input_gradient_of
from trainers.objectives.gal import gradient_alignment_loss


@pytest.mark.parametrize("num_members", [2, 3, 8, 12])
def test_identical_members_give_one_plus_the_log_of_the_number_of_pairs(num_members):
    ensemble = Ensemble([TinyNet(0).double().eval() for _ in range(num_members)])
    x, y = batch()
    gram = gram_matrix([input_gradient_of(member, x, y, create_graph=False)[1] for member in ensemble.members])
    assert gradient_alignment_loss(gram).item() == pytest.approx(1 + math.log(math.comb(num_members, 2)), abs=1e-9)


def test_alignment_equals_a_naive_loop_over_pairs():
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.randn(5, 7, dtype=torch.float64, generator=generator) for _ in range(4)]
    total = 0.0
    for b in range(5):
        cosines = [nn.functional.cosine_similarity(vectors[i][b], vectors[j][b], dim=0) for i in range(4) for j in range(i + 1, 4)]
        total += torch.stack(cosines).exp().sum().log().item() / 5
    assert gradient_alignment_loss(gram_matrix(vectors)).item() == pytest.approx(total, abs=1e-12)


def test_both_computations_agree_and_the_loss_is_the_papers():
    x, y = batch()
    results = []
    for computation in ("cached", "joint"):
        ensemble = tiny_ensemble(3)
        method = objective("gal", computation=computation, noise_std=0)
        scalars = method.training_step(ensemble, x, y, context(ensemble))
        expected = scalars["cross_entropy"] + 0.5 * scalars["alignment"]
        assert scalars["loss"].item() == pytest.approx(expected.item(), abs=1e-13)
        results.append(gradients(ensemble))
    assert largest_difference(*results) < 1e-10
    ensemble = tiny_ensemble(3)
    scalars = objective("gal", cross_entropy="sum", noise_std=0).training_step(ensemble, x, y, context(ensemble))
    assert scalars["loss"].item() == pytest.approx((3 * scalars["cross_entropy"] + 0.5 * scalars["alignment"]).item(), abs=1e-13)


def test_noise_falls_on_about_half_of_the_images():
    method = objective("gal")
    x = torch.full((4000, 3, 2, 2), 0.5)
    generator = torch.Generator().manual_seed(0)
    noise = method.noisy(x, generator) - x
    touched = (noise != 0).flatten(1).any(dim=1)
    assert touched.float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert noise[touched].std().item() == pytest.approx(0.045, rel=0.05)


def test_gal_networks_have_leaky_activations():
    model = build_model("gal", backbone="resnet8", image_shape=(3, 8, 8))
    slopes = [module.negative_slope for module in model.modules() if isinstance(module, nn.LeakyReLU)]
    assert len(slopes) == 3 * 7
    assert set(slopes) == {0.1}
    assert not any(isinstance(module, nn.ReLU) for module in model.modules())
    assert model.inference == "mean_prob"
    kept = build_model("gal", backbone="resnet8", image_shape=(3, 8, 8), leaky_relu_slope=None)
    assert any(isinstance(module, nn.ReLU) for module in kept.modules())


@pytest.mark.parametrize("num_members", [3, 5, 8, 12])
@pytest.mark.parametrize("name", ["red", "gal", "adp", "dverge", "trs"])
@pytest.mark.filterwarnings("ignore::trainers.objectives.adp.DegenerateDiversityWarning", "ignore:DVERGE begins")
def test_every_method_takes_a_step_with_any_number_of_members(name, num_members):
    model = build_model(name, backbone="resnet8", num_classes=10, image_shape=(3, 8, 8), num_members=num_members).train()
    x, y = batch(4, dtype=torch.float32)
    method = objective(name)
    method.prepare(model)
    scalars = method.training_step(model, x, y, context(model, steps=1))
    assert scalars["loss"].isfinite()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
