"""What the public Taylor code computes, in two passes, and its control (T34 to T37)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from benchmarks.taylor import public_attack, public_loss
from models.errors import UserError
from tests.numerics.taylor_cases import NUM_CLASSES, batch, context, gradients, nearby, objective, tiny_network
from trainers.attacks import pgd
from trainers.soft_labels import default_smoothing, divergence_from_labels, gap_label_matrix, last_layer_gradient_sums, uniform_label_matrix
from trainers.trades_terms import divergence_from_clean


def test_gradient_sums_of_the_last_layer_in_closed_form() -> None:
    model = tiny_network(nn.ReLU)
    x, y = batch()
    features = model.forward_features(x)
    logits = model.backbone.classifier(features)
    (gradient,) = torch.autograd.grad(functional.cross_entropy(logits, y), model.backbone.classifier.weight)
    sums = last_layer_gradient_sums(features, logits, y)
    torch.testing.assert_close(sums, gradient.sum(1), rtol=1e-10, atol=1e-14)
    assert abs(sums.sum().item()) < 1e-12
    assert not sums.requires_grad


def test_workers_share_the_sums_of_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    features = torch.rand(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits, y = features[:, :4] * 3, torch.arange(6) % 4
    first, second = (last_layer_gradient_sums(features[part], logits[part], y[part]) for part in (slice(3), slice(3, 6)))
    monkeypatch.setattr("trainers.distributed.world", lambda: (0, 2))
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor: tensor.add_(second))
    together = last_layer_gradient_sums(features[:3], logits[:3], y[:3])
    monkeypatch.undo()
    torch.testing.assert_close(together, (first + second) / 2)
    torch.testing.assert_close(together, last_layer_gradient_sums(features, logits, y))


@pytest.mark.parametrize("num_classes", [3, 10, 100])
def test_label_matrix(num_classes: int) -> None:
    gap = torch.randn(num_classes, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    smoothing = default_smoothing(num_classes)
    labels = gap_label_matrix(gap, smoothing)
    torch.testing.assert_close(labels.sum(1), torch.ones(num_classes, dtype=torch.float64))
    torch.testing.assert_close(labels.diagonal(), torch.full((num_classes,), 1 - smoothing, dtype=torch.float64))
    least = gap.argmin()
    off = torch.arange(num_classes) != least
    assert torch.equal(labels[off, least], torch.zeros(num_classes - 1, dtype=torch.float64))
    row = labels[least, off] / (gap - gap.min())[off]
    torch.testing.assert_close(row, row[:1].expand_as(row))


def test_smoothing_of_the_public_code() -> None:
    assert default_smoothing(10) == pytest.approx(0.8)
    assert default_smoothing(100) == pytest.approx(0.98)


@pytest.mark.parametrize("gap", [torch.zeros(4), torch.tensor([0.0, 0.0, 0.0, 1.0])])
def test_degenerate_gaps_fall_back_to_uniform(gap: torch.Tensor) -> None:
    labels = gap_label_matrix(gap, 0.6)
    assert torch.isfinite(labels).all()
    torch.testing.assert_close(labels.sum(1), torch.ones(4))
    torch.testing.assert_close(labels[3], torch.tensor([0.2, 0.2, 0.2, 0.4]))


def test_labels_are_constants() -> None:
    """The gradient is that of the loss with the label matrices put in as numbers."""
    model = tiny_network(nn.ReLU)
    by_hand = copy.deepcopy(model)
    x, y = batch()
    x_adv = nearby(x)
    objective("rat_surrogate", second_slip=False).outer_loss(model, x, x_adv, y, context())["loss"].backward()
    features, adversarial_features = by_hand.forward_features(x), by_hand.forward_features(x_adv)
    clean, adversarial = by_hand.backbone.classifier(features), by_hand.backbone.classifier(adversarial_features)
    r, r_adv = last_layer_gradient_sums(features, clean, y), last_layer_gradient_sums(adversarial_features, adversarial, y)
    c = default_smoothing(NUM_CLASSES)
    p, q = clean.log_softmax(1), adversarial.log_softmax(1)
    loss = 0.8 * functional.cross_entropy(clean, y) + 6 * functional.kl_div(q, p.exp(), reduction="batchmean")
    for weight, gap in ((0.2, r.abs() - r_adv.abs()), (0.1, r**2 - r_adv**2)):
        for logits, labels in ((adversarial, gap_label_matrix(gap, c)), (clean, gap_label_matrix(-gap, c))):
            loss = loss + weight / 2 * divergence_from_labels(labels.detach(), y, logits)
    loss.backward()
    for name, value in gradients(model).items():
        torch.testing.assert_close(value, by_hand.get_parameter(name).grad, rtol=1e-9, atol=1e-13, msg=name)


def test_equals_the_public_structure_given_the_same_noise() -> None:
    """Eight forward and nine backward passes of the public script compute what two and one do here."""
    model = tiny_network(nn.ReLU)
    public = copy.deepcopy(model)
    x, y = batch()
    start = (x + 0.001 * torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    theirs = public_attack(public.eval(), x, start, 3)
    # The same start: PGD from `start` as if it were the image would project around it, so inject the noise by the generator instead.
    ours = pgd(
        model.eval(),
        x,
        y,
        steps=3,
        gaussian_start=0.001,
        generator=torch.Generator().manual_seed(0),
        loss=divergence_from_clean(model, x),
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    model.train()
    public.train()
    terms = objective("rat_surrogate").outer_loss(model, x, ours, y, context())
    terms["loss"].backward()
    expected = public_loss(public, x, theirs, y, 0.2, 6.0)
    expected.backward()
    torch.testing.assert_close(terms["loss"], expected, rtol=1e-11, atol=0)
    for name, value in gradients(model).items():
        torch.testing.assert_close(value, public.get_parameter(name).grad, rtol=1e-9, atol=1e-13, msg=name)
    assert public.backbone.bn1.num_batches_tracked.item() == 8
    assert model.backbone.bn1.num_batches_tracked.item() == 2


def test_the_slip_changes_the_target_of_the_adversarial_batch_alone() -> None:
    x, y = batch()
    values = {}
    for slip in (True, False):
        model = tiny_network(nn.ReLU)
        values[slip] = objective("rat_surrogate", second_slip=slip).outer_loss(model, x, nearby(x), y, context())
    assert values[True]["surrogate_first"] == values[False]["surrogate_first"]
    assert values[True]["surrogate_second"] != values[False]["surrogate_second"]


def test_alpha_zero_is_trades() -> None:
    x, y = batch()
    results = {}
    for name, parameters in (("trades", {}), ("rat_surrogate", {"alpha": 0, "attack_noise": False}), ("label_smoothing", {"alpha": 0})):
        model = tiny_network(nn.ReLU)
        loss = objective(name, **parameters).training_step(model, x, y, context())["loss"]
        results[name] = (loss, gradients(model))
    for name in ("rat_surrogate", "label_smoothing"):
        torch.testing.assert_close(results[name][0], results["trades"][0], rtol=1e-12, atol=0)
        for key, value in results["trades"][1].items():
            torch.testing.assert_close(results[name][1][key], value, rtol=1e-9, atol=1e-13)


def test_first_order_only_drops_the_second_term() -> None:
    model = tiny_network(nn.ReLU)
    x, y = batch()
    terms = objective("rat_surrogate", order=1, alpha=0.3).outer_loss(model, x, nearby(x), y, context())
    assert "surrogate_second" not in terms
    expected = 0.7 * terms["cross_entropy"] + 6 * terms["divergence"] + 0.3 * terms["surrogate_first"]
    torch.testing.assert_close(terms["loss"], expected)


def test_label_smoothing_is_the_surrogate_with_uniform_labels() -> None:
    model = tiny_network(nn.ReLU)
    x, y = batch()
    x_adv = nearby(x)
    terms = objective("label_smoothing").outer_loss(model, x, x_adv, y, context())
    labels = uniform_label_matrix(NUM_CLASSES, default_smoothing(NUM_CLASSES), x)
    torch.testing.assert_close(labels, torch.full((4, 4), 1 / 6, dtype=torch.float64).fill_diagonal_(0.5))
    smoothed = 0.5 * (divergence_from_labels(labels, y, model(x)) + divergence_from_labels(labels, y, model(x_adv)))
    torch.testing.assert_close(terms["smoothed"], smoothed)
    torch.testing.assert_close(terms["loss"], 0.8 * terms["cross_entropy"] + 6 * terms["divergence"] + 0.3 * smoothed)
    # The public code's match: both of its terms with uniform labels weigh alpha + alpha/2.
    target = labels[y]
    torch.testing.assert_close(
        divergence_from_labels(labels, y, model(x)), functional.kl_div(model(x).log_softmax(1), target, reduction="batchmean")
    )


def test_a_network_without_visible_features_is_an_error() -> None:
    with pytest.raises(UserError, match="one linear layer"):
        objective("rat_surrogate").prepare(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)))
