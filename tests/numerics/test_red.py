"""RED's regularizers and its training step (T1 to T7, T9 of the specification)."""

from __future__ import annotations

import copy

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from models import build_model
from models.ensemble import Ensemble
from models.errors import UserError
from tests.numerics.ensemble_cases import (
    NUM_CLASSES,
    TinyNet,
    batch,
    context,
    gradients,
    largest_difference,
    objective,
    tiny_ensemble,
)
from trainers.ensembles.examples import ensemble_examples, mean_member_loss
from trainers.ensembles.input_gradients import (
    InputSet,
    gradient_lengths,
    gram_matrix,
    input_gradient_of,
    pair_cosines,
    regularized_backward,
    regularized_loss,
)
from trainers.ensembles.placement import LocalMembers
from trainers.hardware import to_channels_last_
from trainers.objectives.gal import gradient_alignment_loss
from trainers.objectives.red import RedObjectiveConfig, lipschitz_regularizer, similarity_regularizer


def random_gradients(num_members: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(5, 12, dtype=torch.float64, generator=generator) for _ in range(num_members)]


class LinearSoftmax(nn.Module):
    """Logits W x of some pixels."""

    def __init__(self, pixels: slice, seed: int = 0) -> None:
        super().__init__()
        self.pixels = pixels
        count = len(range(*pixels.indices(192)))
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(NUM_CLASSES, count, dtype=torch.float64, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, self.pixels] @ self.weight.T


def grams_of(ensemble: Ensemble, *images: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
    return [gram_matrix([input_gradient_of(member, x, labels, create_graph=False)[1] for member in ensemble.members]) for x in images]


# T1, T2, T4, T3: the similarity regularizer.


@pytest.mark.parametrize("num_members", [2, 3, 8])
def test_identical_members_have_the_largest_similarity(num_members):
    ensemble = Ensemble([TinyNet(0).double().eval() for _ in range(num_members)])
    x, y = batch()
    for gram in grams_of(ensemble, x, (x + 0.03).clamp(0, 1), labels=y):
        assert similarity_regularizer(gram).item() == pytest.approx(2, abs=1e-9)
        assert similarity_regularizer(gram, "unordered").item() == pytest.approx(1, abs=1e-9)


def test_members_that_read_disjoint_pixels_have_no_similarity():
    ensemble = Ensemble([LinearSoftmax(slice(i, None, 3), seed=i) for i in range(3)])
    x, y = batch()
    (gram,) = grams_of(ensemble, x, labels=y)
    assert similarity_regularizer(gram).item() == 0


def test_similarity_equals_the_double_sum_of_the_paper():
    vectors = random_gradients(4)
    total = 0.0
    for b in range(5):
        for i in range(4):
            for j in range(4):
                if i != j:
                    a, c = vectors[i][b], vectors[j][b]
                    total += (a @ c).abs() / max(a.norm() * c.norm(), 1e-12) / 6 / 5
    assert similarity_regularizer(gram_matrix(vectors)).item() == pytest.approx(float(total), abs=1e-13)


def test_scaling_a_loss_changes_lengths_and_not_angles():
    vectors = random_gradients(3)
    scaled = [7.0 * vectors[0], vectors[1], 0.1 * vectors[2]]
    assert similarity_regularizer(gram_matrix(scaled)).item() == pytest.approx(
        similarity_regularizer(gram_matrix(vectors)).item(), abs=1e-13
    )
    all_scaled = gram_matrix([3.0 * vector for vector in vectors])
    assert lipschitz_regularizer(all_scaled).item() == pytest.approx(3 * lipschitz_regularizer(gram_matrix(vectors)).item())
    assert lipschitz_regularizer(all_scaled, 2).item() == pytest.approx(9 * lipschitz_regularizer(gram_matrix(vectors), 2).item())


def test_a_sign_flip_leaves_red_alone_and_changes_gal():
    vectors = random_gradients(3)
    flipped = [-vectors[0], *vectors[1:]]
    before, after = gram_matrix(vectors), gram_matrix(flipped)
    assert similarity_regularizer(after).item() == pytest.approx(similarity_regularizer(before).item(), abs=1e-14)
    assert abs(gradient_alignment_loss(after).item() - gradient_alignment_loss(before).item()) > 1e-3


def test_vanishing_gradients_give_zero_and_finite_slopes():
    vectors = [torch.zeros(2, 5, dtype=torch.float64), torch.ones(2, 5, dtype=torch.float64)]
    gram = gram_matrix(vectors).requires_grad_()
    value = similarity_regularizer(gram) + lipschitz_regularizer(gram)
    value.backward()
    assert value.item() == pytest.approx(5**0.5 / 2)
    assert gram.grad.isfinite().all()
    assert similarity_regularizer(gram_matrix(vectors[:1])).item() == 0, "one member has no pairs"


# T5, T9: the Lipschitz regularizer.


def test_linear_softmax_member_matches_the_closed_form():
    member = LinearSoftmax(slice(None))
    x, y = batch()
    loss, gradient = input_gradient_of(member, x, y, create_graph=False)
    residual = member(x).softmax(-1).detach() - nn.functional.one_hot(y, NUM_CLASSES)
    closed = residual @ member.weight.detach()
    torch.testing.assert_close(gradient, closed, rtol=1e-12, atol=1e-12)
    (gram,) = grams_of(Ensemble([member]), x, labels=y)
    assert lipschitz_regularizer(gram).item() == pytest.approx(closed.norm(dim=1).mean().item(), abs=1e-12)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(member(x), y, reduction="none").detach())


def test_regularizers_do_not_depend_on_order_or_split_of_the_batch():
    ensemble = tiny_ensemble(3).eval()
    x, y = batch(8)
    (whole,) = grams_of(ensemble, x, labels=y)
    order = torch.tensor([3, 0, 7, 5, 1, 2, 6, 4])
    (permuted,) = grams_of(ensemble, x[order], labels=y[order])
    halves = [grams_of(ensemble, x[part], labels=y[part])[0] for part in (slice(0, 4), slice(4, 8))]
    for regularizer in (similarity_regularizer, lipschitz_regularizer):
        value = regularizer(whole).item()
        assert regularizer(permuted).item() == pytest.approx(value, rel=1e-10)
        assert sum(regularizer(half).item() for half in halves) / 2 == pytest.approx(value, rel=1e-10)


def test_batch_mean_scaling_divides_gradients_by_the_papers_batch_size():
    x, y = batch()
    scalars = {}
    for scale in ("per_sample", "batch_mean"):
        ensemble = tiny_ensemble(2)
        method = objective("red", grad_scale=scale, example="mean_loss", warmup_epochs=0)
        scalars[scale] = method.training_step(ensemble, x, y, context(ensemble))
    assert scalars["batch_mean"]["lipschitz"].item() == pytest.approx(scalars["per_sample"]["lipschitz"].item() / 128)
    assert scalars["batch_mean"]["similarity"].item() == pytest.approx(scalars["per_sample"]["similarity"].item())


# T6, T7: gradients of the whole loss.


def problem(ensemble: Ensemble, x: torch.Tensor, y: torch.Tensor):
    sets = {
        "clean": InputSet(x, 1 / ensemble.num_members, regularized=True),
        "adv": InputSet((x + 0.05 * torch.sin(40 * x)).clamp(0, 1), 0.0, regularized=True),
    }

    def regularizer(grams):
        value = sum(10 * lipschitz_regularizer(gram) + 10 * similarity_regularizer(gram) for gram in grams.values()) / 2
        return {"regularization": value}

    return sets, regularizer


@pytest.mark.parametrize("training", [True, False])
def test_weight_gradient_matches_central_differences(training):
    ensemble = tiny_ensemble(2, activation=nn.Softplus).train(training)
    x, y = batch(4)
    sets, regularizer = problem(ensemble, x, y)
    regularized_loss(ensemble.members, sets, y, regularizer)["loss"].backward()
    parameters = list(ensemble.parameters())
    generator = torch.Generator().manual_seed(2)
    direction = [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in parameters]
    slope = sum((p.grad * d).sum() for p, d in zip(parameters, direction, strict=True)).item()
    step = 1e-5
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=sign * step)
        values.append(regularized_loss(ensemble.members, sets, y, regularizer)["loss"].item())
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.sub_(d, alpha=sign * step)
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("num_members", [1, 2, 4])
def test_member_by_member_gradient_equals_the_joint_one(num_members, training):
    joint = tiny_ensemble(num_members).train(training)
    cached = copy.deepcopy(joint)
    x, y = batch()
    sets, regularizer = problem(joint, x, y)
    terms = regularized_loss(joint.members, sets, y, regularizer)
    terms["loss"].backward()
    scalars = regularized_backward(cached.members, sets, y, regularizer, LocalMembers(num_members))
    assert largest_difference(gradients(joint), gradients(cached)) < 1e-12
    for name, value in terms.items():
        assert scalars[name].item() == pytest.approx(value.item(), abs=1e-12)
    assert largest_difference(list(joint.buffers()), list(cached.buffers())) == 0, "running statistics move alike"


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"ce_on": "adv"},
        {"ce_on": "both", "pair_norm": "unordered", "lip_power": 2},
        {"sim_on": "clean", "lip_on": "adv"},
        {"sim_on": "adv", "lip_on": "adv", "ce_on": "adv"},
        {"grad_scale": "batch_mean"},
    ],
)
def test_both_computations_of_the_objective_agree(parameters):
    x, y = batch()
    results = []
    for computation in ("cached", "joint"):
        ensemble = tiny_ensemble(3)
        method = objective("red", computation=computation, warmup_epochs=0, **parameters)
        method.prepare(ensemble)
        scalars = method.training_step(ensemble, x, y, context(ensemble))
        results.append((gradients(ensemble), {name: value.item() for name, value in scalars.items()}))
    assert largest_difference(results[0][0], results[1][0]) < 1e-10
    assert results[0][1] == pytest.approx(results[1][1], abs=1e-10)


@pytest.mark.parametrize("member", ["ctrw", "rna", "dcs"])
def test_members_with_random_layers_keep_their_draw_between_the_two_passes(member):
    x, y = batch()
    results = []
    for computation in ("cached", "joint"):
        model = build_model(
            "red", backbone="resnet8", num_classes=NUM_CLASSES, image_shape=(3, 8, 8), num_members=2, member={"name": member}
        )
        model = to_channels_last_(model.double().train())
        for part in model.members:
            part.backbone.classifier.weight.data.mul_(300)
        method = objective("red", computation=computation, warmup_epochs=0)
        method.training_step(model, x, y, context(model, redraw="each_attack_step"))
        results.append(gradients(model))
    assert largest_difference(*results) < 1e-10 * max(slope.abs().max().item() for slope in results[0])


def test_the_layout_of_the_weights_changes_no_gradient():
    x, y = batch()
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        ensemble = tiny_ensemble(2).to(memory_format=layout)
        objective("red", warmup_epochs=0).training_step(ensemble, x.contiguous(memory_format=layout), y, context(ensemble))
        results.append(gradients(ensemble))
    assert largest_difference(*results) < 1e-10


@pytest.mark.parametrize(("scale", "lipschitz_factor"), [("per_sample", 1), ("batch_mean", 1 / 128)])
def test_the_loss_is_that_of_equation_13(scale, lipschitz_factor):
    ensemble = tiny_ensemble(3)
    reference = copy.deepcopy(ensemble)
    x, y = batch()
    step = context(ensemble)
    method = objective("red", warmup_epochs=0, example="mean_loss", lambda_a=3, lambda_b=5, grad_scale=scale)
    scalars = method.training_step(ensemble, x, y, step)
    adversarial = ensemble_examples(reference, x, y, context(reference), "mean_loss")
    clean, perturbed = grams_of(reference, x, adversarial, labels=y)
    cross_entropy = torch.stack([nn.functional.cross_entropy(member(x), y) for member in reference.members]).mean()
    lipschitz = lipschitz_factor * torch.stack([gradient_lengths(gram).mean() for gram in (clean, perturbed)]).mean()
    similarity = torch.stack([2 * pair_cosines(gram).abs().mean() for gram in (clean, perturbed)]).mean()
    assert scalars["loss"].item() == pytest.approx((cross_entropy + 3 * lipschitz + 5 * similarity).item(), abs=1e-12)


def test_weights_of_the_regularizers_warm_up_linearly():
    x, y = batch()
    regularizations = []
    for step in (0, 1, 3, 20):
        ensemble = tiny_ensemble(2)
        method = objective("red", warmup_epochs=2, example="mean_loss")
        scalars = method.training_step(ensemble, x, y, context(ensemble, step=step, steps_per_epoch=2))
        regularizations.append(scalars["regularization"].item())
    full = regularizations[-1]
    assert [value / full for value in regularizations] == pytest.approx([0.25, 0.5, 1, 1])


# Adversarial examples.


@pytest.mark.parametrize("example", ["random_member_per_step", "random_member", "mean_loss", "mean_prob"])
def test_examples_stay_in_the_ball_and_leave_modes_and_mode_of_inference_alone(example):
    ensemble = tiny_ensemble(3)
    x, y = batch()
    adversarial = ensemble_examples(ensemble, x, y, context(ensemble, steps=3), example)
    assert (adversarial - x).abs().max() <= 8 / 255 + 1e-12
    assert 0 <= adversarial.min()
    assert adversarial.max() <= 1
    assert not adversarial.requires_grad
    assert not torch.equal(adversarial, x)
    assert ensemble.inference == "rsi_sample"
    assert all(module.training for module in ensemble.modules())
    assert all(parameter.grad is None for parameter in ensemble.parameters())


def count_calls(ensemble: Ensemble) -> list[int]:
    calls = [0] * ensemble.num_members
    for index, member in enumerate(ensemble.members):
        member.register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    return calls


def test_random_member_attacks_cost_one_member_per_step():
    x, y = batch()
    ensemble = tiny_ensemble(3)
    calls = count_calls(ensemble)
    ensemble_examples(ensemble, x, y, context(ensemble, steps=12), "random_member_per_step")
    assert sum(calls) == 12
    assert sum(call > 0 for call in calls) > 1, "a new member at each step"
    ensemble = tiny_ensemble(3)
    calls = count_calls(ensemble)
    ensemble_examples(ensemble, x, y, context(ensemble, steps=12, redraw="each_attack_step"), "random_member")
    assert sorted(calls) == [0, 0, 12]


def test_mean_loss_and_its_input_gradient_are_exact():
    ensemble = tiny_ensemble(3).eval()
    x, y = batch()
    leaf = x.clone().requires_grad_()
    value = mean_member_loss(ensemble.members, leaf, y)
    (slope,) = torch.autograd.grad((value * torch.arange(6)).sum(), leaf)
    reference = torch.stack([nn.functional.cross_entropy(member(leaf), y, reduction="none") for member in ensemble.members]).mean(0)
    (expected,) = torch.autograd.grad((reference * torch.arange(6)).sum(), leaf)
    torch.testing.assert_close(value, reference, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(slope, expected, rtol=1e-12, atol=1e-14)


# Configuration and models that do not fit.


def test_mistakes_are_explained():
    with pytest.raises(UserError, match="not an ensemble"):
        objective("red").prepare(TinyNet(0))
    with pytest.raises(ValidationError, match="computation"):
        RedObjectiveConfig(members="spread", computation="joint")
    with pytest.raises(ValidationError):
        RedObjectiveConfig(lambda_a=-1)


def test_training_lowers_similarity_and_slope():
    # A smoke test of direction: with the regularizers alone both terms fall.
    ensemble = tiny_ensemble(2)
    x, y = batch(12)
    method = objective("red", warmup_epochs=0, example="mean_loss")
    optimizer = torch.optim.SGD(ensemble.parameters(), lr=2e-3)
    history = []
    for _ in range(15):
        optimizer.zero_grad()
        scalars = method.training_step(ensemble, x, y, context(ensemble))
        optimizer.step()
        history.append(scalars["regularization"].item())
    assert history[-1] < 0.9 * history[0]
