"""DVERGE: feature layers, distilled examples (T42 of the specification), the training step, trained members to begin with."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from models import build_model
from models.errors import UserError
from models.weights import save_pretrained
from tests.numerics.ensemble_cases import TinyNet, batch, context, gradients, largest_difference, objective, tiny_ensemble
from trainers.ensembles.distilled_features import distilled_examples, feature_layers, features_at
from trainers.ensembles.objective import member_cross_entropy


def test_resnet18_has_the_papers_eighteen_layers():
    layers = feature_layers(build_model("natural"))
    assert len(layers) == 18
    assert layers[0] == "backbone.relu"
    assert layers[-1] == "logits"
    assert len(feature_layers(build_model("natural", backbone="resnet8", image_shape=(3, 8, 8)))) == 8


def test_features_are_what_enters_the_activation_and_the_rest_is_not_run():
    network = TinyNet(0).double().eval()
    x, _ = batch()
    torch.testing.assert_close(features_at(network, x, "act"), network.norm(network.conv(x - 0.5)))
    later = []
    network.conv2.register_forward_hook(lambda *_: later.append(1))
    features_at(network, x, "act")
    assert not later
    assert torch.equal(features_at(network, x, "logits"), network(x))
    assert all(not module._forward_pre_hooks for module in network.modules()), "no hook stays behind"
    with pytest.raises(UserError, match="Did you mean 'act'"):
        features_at(network, x, "act3")


@pytest.mark.parametrize("layer", ["act", "act2", "logits"])
def test_distilled_examples_stay_in_the_ball_and_approach_the_target(layer):
    network = TinyNet(0, activation=nn.Softplus).double().eval()
    x, _ = batch()
    target = x.flip(0)
    distilled = distilled_examples(network, x, target, layer, epsilon=0.07)
    assert (distilled - x).abs().max() <= 0.07 + 1e-12
    assert 0 <= distilled.min() <= distilled.max() <= 1
    distance = [
        (features_at(network, images, layer) - features_at(network, target, layer)).flatten(1).norm(dim=1) for images in (x, distilled)
    ]
    assert (distance[1] < distance[0]).all()


def test_an_image_that_looks_like_the_target_already_does_not_move():
    network = TinyNet(0).double().eval()
    x, _ = batch()
    assert torch.equal(distilled_examples(network, x, x.clone(), "act2", epsilon=0.07), x)


def test_momentum_adds_up_normalized_gradients():
    network = TinyNet(0, activation=nn.Softplus).double().eval()
    x, _ = batch(2)
    target = x.flip(0)
    image, velocity = x.clone(), torch.zeros_like(x)
    goal = features_at(network, target, "act").detach()
    for _ in range(4):
        leaf = image.clone().requires_grad_()
        distance = nn.functional.mse_loss(features_at(network, leaf, "act"), goal)
        (gradient,) = torch.autograd.grad(distance, leaf)
        velocity = 0.5 * velocity + gradient / gradient.abs().sum(dim=(1, 2, 3), keepdim=True)
        image = torch.min(torch.max(image - 0.01 * velocity.sign(), x - 0.03), x + 0.03).clamp(0, 1)
    distilled = distilled_examples(network, x, target, "act", epsilon=0.03, steps=4, step_size=0.01, momentum=0.5)
    torch.testing.assert_close(distilled, image, rtol=0, atol=1e-15)


def test_no_member_sees_the_examples_distilled_from_itself():
    ensemble = tiny_ensemble(3)
    x, y = batch()
    method = objective("dverge", layer=1)
    distilled = method.distil(ensemble, x, context(ensemble))
    passes = method._passes(ensemble, x, y, context(ensemble))
    assert len(passes) == 3 * 2
    for index, member in enumerate(ensemble.members):
        own = [images for owner, images, _ in passes if owner is member]
        others = [distilled[other] for other in range(3) if other != index]
        assert all(torch.equal(a, b) for a, b in zip(own, others, strict=True))


@pytest.mark.parametrize("parameters", [{}, {"adversarial_training": True, "distillation_weight": 0.5}, {"pretraining_epochs": 1}])
def test_member_by_member_gradient_equals_that_of_the_sum(parameters):
    x, y = batch()
    results = []
    for way in ("training_step", "the sum"):
        ensemble = tiny_ensemble(3)
        method = objective("dverge", **parameters)
        if way == "training_step":
            value = method.training_step(ensemble, x, y, context(ensemble))["loss"]
        else:
            passes = method._passes(ensemble, x, y, context(ensemble))
            losses = [weight * member_cross_entropy(member, images, y, context(ensemble)) for member, images, weight in passes]
            value = torch.stack(losses).sum()
            value.backward()
        results.append((gradients(ensemble), value.item()))
    assert largest_difference(results[0][0], results[1][0]) < 1e-12
    assert results[0][1] == pytest.approx(results[1][1])


def test_the_layer_is_drawn_per_epoch_and_is_the_same_on_every_worker():
    ensemble = tiny_ensemble(2)
    method = objective("dverge")
    first = [method.layer_of_epoch(ensemble.members[0], context(ensemble, epoch=epoch)) for epoch in range(40)]
    again = [method.layer_of_epoch(ensemble.members[1], context(ensemble, epoch=epoch, step=3)) for epoch in range(40)]
    assert first == again
    assert set(first) == {"act", "act2", "logits"}


def test_pretraining_is_natural_training_of_each_member():
    ensemble = tiny_ensemble(2)
    x, y = batch()
    reference = copy.deepcopy(ensemble)
    objective("dverge", pretraining_epochs=2).training_step(ensemble, x, y, context(ensemble, epoch=1))
    sum(nn.functional.cross_entropy(member(x), y) for member in reference.members).backward()
    assert largest_difference(gradients(ensemble), gradients(reference)) < 1e-13


def test_trained_members_are_loaded_from_an_ensemble_or_from_single_models(tmp_path):
    options = {"backbone": "resnet8", "num_classes": 4, "image_shape": (3, 8, 8)}
    trained = build_model("red", num_members=2, seed=5, **options)
    save_pretrained(trained, tmp_path / "ensemble")
    for index in range(2):
        single = build_model("natural", **options)
        single.load_state_dict(trained.members[index].state_dict())
        save_pretrained(single, tmp_path / str(index))
    folders = [(str(tmp_path / "ensemble"),), (str(tmp_path / "0"), str(tmp_path / "1"))]
    x, _ = batch(dtype=torch.float32)
    for pretrained in folders:
        model = build_model("dverge", num_members=2, seed=9, **options).eval()
        objective("dverge", pretrained=pretrained).prepare(model)
        torch.testing.assert_close(model.member_logits(x), trained.eval().member_logits(x))
    with pytest.raises(UserError, match="has 2 trained networks, the ensemble 3 members"):
        objective("dverge", pretrained=folders[0]).prepare(build_model("dverge", num_members=3, **options))
    other = build_model("dverge", num_members=2, **{**options, "backbone": "resnet20"})
    with pytest.raises(UserError, match="does not fit member 0"):
        objective("dverge", pretrained=folders[1]).prepare(other)


def test_mistakes_are_explained():
    with pytest.raises(UserError, match="at least 2"):
        objective("dverge").prepare(tiny_ensemble(1))
    with pytest.raises(UserError, match="3 feature layers"):
        objective("dverge", layer=4).prepare(tiny_ensemble(2))
    with pytest.warns(UserWarning, match="trained ensemble"):
        objective("dverge").prepare(tiny_ensemble(2))
