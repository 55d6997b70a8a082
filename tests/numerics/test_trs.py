"""TRS: magnitude and search radius (T43 of the specification), the search for large gradients, the training step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.numerics.ensemble_cases import batch, context, gradients, largest_difference, objective, tiny_ensemble
from trainers.ensembles.input_gradients import gram_matrix, input_gradient_of
from trainers.objectives.trs import magnitude, search_epsilon, steepest_images


def squared_lengths(ensemble, x, y) -> torch.Tensor:
    return torch.stack([input_gradient_of(member, x, y, create_graph=False)[1].square().sum(dim=1) for member in ensemble.members])


def test_magnitude_is_twice_the_mean_squared_length():
    ensemble = tiny_ensemble(3).eval()
    x, y = batch()
    gram = gram_matrix([input_gradient_of(member, x, y, create_graph=False)[1] for member in ensemble.members])
    assert magnitude(gram).item() == pytest.approx(2 * squared_lengths(ensemble, x, y).mean().item(), rel=1e-12)


def test_search_radius_goes_linearly_from_the_first_to_the_last_value():
    assert search_epsilon(0.1, 0.2, 0, 120) == 0.1
    assert search_epsilon(0.1, 0.2, 60, 120) == pytest.approx(0.15)
    assert search_epsilon(0.1, 0.2, 120, 120) == pytest.approx(0.2)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_searched_images_have_larger_gradients_and_stay_in_the_ball(norm):
    ensemble = tiny_ensemble(3, activation=nn.Softplus).eval()
    x, y = batch()
    found = steepest_images(ensemble.members, x, y, epsilon=0.2, norm=norm, steps=6, generator=torch.Generator().manual_seed(0))
    start = steepest_images(ensemble.members, x, y, epsilon=0.2, norm=norm, steps=0, generator=torch.Generator().manual_seed(0))
    assert squared_lengths(ensemble, found, y).sum() > squared_lengths(ensemble, start, y).sum()
    distance = (found - x).flatten(1)
    assert (distance.abs().amax(1) if norm == "linf" else distance.norm(dim=1)).max() <= 0.2 + 1e-12
    assert 0 <= found.min() <= found.max() <= 1


@pytest.mark.parametrize("parameters", [{}, {"smooth_on": "clean"}, {"gradient_scale": "per_sample"}])
def test_both_computations_agree_and_the_loss_is_the_codes(parameters):
    x, y = batch()
    results = []
    for computation in ("cached", "joint"):
        ensemble = tiny_ensemble(3)
        method = objective("trs", computation=computation, **parameters)
        scalars = method.training_step(ensemble, x, y, context(ensemble))
        expected = 3 * scalars["cross_entropy"] + 40 * scalars["similarity"] + 2.5 * scalars["smoothness"]
        assert scalars["loss"].item() == pytest.approx(expected.item(), abs=1e-12)
        results.append(gradients(ensemble))
    assert largest_difference(*results) < 1e-10


def test_smoothness_follows_the_definition_of_the_official_code():
    # Gradients of the batch's mean loss, twice the mean over examples of the squared length, mean over members; its batch has 128 images.
    ensemble = tiny_ensemble(3, normalized=False)
    x, y = batch(128)
    scalars = objective("trs", smooth_on="clean").training_step(ensemble, x, y, context(ensemble))
    total = 0.0
    for member in ensemble.members:
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(member(leaf), y), leaf)
        total += 2 * gradient.flatten(1).square().sum(dim=1).mean().item() / 3
    assert scalars["smoothness"].item() == pytest.approx(total, rel=1e-10)


def test_the_first_half_of_the_smooth_batch_is_clean():
    ensemble = tiny_ensemble(2)
    x, y = batch()
    sets = objective("trs").problem(ensemble, x, y, context(ensemble)).sets
    assert torch.equal(sets["smooth"].x_BCHW[:3], x[:3])
    moved = (sets["smooth"].x_BCHW[3:] - x[3:]).abs()
    assert 0.009 < moved.max() <= 0.01 + 1e-12, "the first epoch searches the author's first radius"


def test_radii_can_follow_the_threat_model():
    ensemble = tiny_ensemble(2)
    x, y = batch()
    following = objective("trs", initial_epsilon=None, final_epsilon=None)
    moved = (following.problem(ensemble, x, y, context(ensemble)).sets["smooth"].x_BCHW[3:] - x[3:]).abs().max()
    assert 0.9 * 8 / 255 / 3 < moved <= 8 / 255 / 3 + 1e-12


@pytest.mark.parametrize("name", ["trs", "red"])
def test_the_weight_of_a_gradient_s_length_does_not_depend_on_the_batch(name):
    # A batch twice over is the same loss and the same regularizers: a smaller share of a worker must not count for more.
    settings = {
        "trs": {"smooth_on": "clean"},
        "red": {"warmup_epochs": 0, "sim_on": "clean", "lip_on": "clean"},
    }
    ensemble = tiny_ensemble(3, normalized=False)
    x, y = batch(8)
    results = []
    for images, labels in ((x, y), (torch.cat([x, x]), torch.cat([y, y]))):
        scalars = objective(name, **settings[name]).training_step(ensemble, images, labels, context(ensemble))
        results.append((scalars, gradients(ensemble)))
    assert results[0][0]["loss"].item() == pytest.approx(results[1][0]["loss"].item(), rel=1e-12)
    assert largest_difference(results[0][1], results[1][1]) < 1e-12
