"""Attacks against closed forms: linear models, whose worst points are known."""

import math

import pytest
import torch
from evaluation_toys import AdditiveNoise, Choice, classifier, labelled_by, pattern, two_classes
from torch import nn

from analysis.attacked_model.draws import ONLY_DRAW, FixedDraws, FreshDraws, all_configurations
from analysis.attacked_model.model import AttackedModel, Predictor
from analysis.attacks.apgd import apgd
from analysis.attacks.losses import TargetedDifferenceOfLogitsRatio, difference_of_logits_ratio
from analysis.attacks.registry import (
    AttackProblem,
    attack_entry,
    attacks,
    check_attack,
    parse_attack_parameters,
)
from models.errors import UserError
from models.threat_model import ThreatModel
from trainers.attacks import cross_entropy, margin, pgd

OWN = ["pgd", "fgsm", "apgd_ce", "apgd_dlr", "apgd_margin", "apgd_targeted", "square"]


def attacked(model, source=None):
    return AttackedModel(Predictor(model), source or FixedDraws((ONLY_DRAW,)))


def run(name, model, x, y, *, norm="linf", epsilon=0.05, num_classes=5, source=None, seed=0, **parameters):
    entry = attack_entry(name)
    threat_model = ThreatModel(norm=norm, epsilon=epsilon)
    target = attacked(model, source)
    problem = AttackProblem(x, y, threat_model, num_classes, seed)
    return entry.run(target, problem, parse_attack_parameters(name, parameters)).x, target


def linear(num_inputs=64, num_classes=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    network = nn.Sequential(nn.Flatten(), nn.Linear(num_inputs, num_classes, bias=False)).double()
    network[1].weight.data = torch.randn(num_classes, num_inputs, generator=generator, dtype=torch.float64)
    return network


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_apgd_reaches_the_worst_point_of_a_linear_model(norm):
    network = linear()
    x = torch.full((6, 1, 8, 8), 0.5, dtype=torch.float64)
    y = torch.arange(6) % 2
    direction = network[1].weight[1 - y] - network[1].weight[y]  # of the margin's gradient
    epsilon = 0.05 if norm == "linf" else 0.4
    dual = direction.abs().sum(1) if norm == "linf" else direction.norm(dim=1)
    worst = margin(network(x), y) + epsilon * dual
    for loss in (cross_entropy, margin):
        x_adv, _, _ = apgd(attacked(network), x, y, epsilon=epsilon, norm=norm, steps=60, loss=loss)
        assert torch.allclose(margin(network(x_adv), y), worst, rtol=2e-3)
        distance = (x_adv - x).flatten(1).abs().amax(1) if norm == "linf" else (x_adv - x).flatten(1).norm(dim=1)
        assert distance.max() <= epsilon * (1 + 1e-9)


def test_square_reaches_the_worst_corner_of_a_linear_model():
    network = linear().float()
    x, y = torch.full((3, 1, 8, 8), 0.5), torch.zeros(3, dtype=torch.long)
    network[1].weight.data[0] += 100 * network[1].weight.data[1].abs()  # never misclassified: the search goes on to the end
    x_adv, _ = run("square", network, x, y, num_classes=2, num_queries=2500)
    weight = (network[1].weight[1] - network[1].weight[0]).abs().sum()
    reached = margin(network(x_adv), y) - margin(network(x), y)
    assert (reached > 0.97 * 0.05 * weight).all()


def test_eot_on_gaussian_weight_noise_gives_the_known_expected_accuracy():
    # m = (w + s n).(x - 1/2) is normal over draws, so the expected accuracy of any point is Phi(mean / (s |x - 1/2|)).
    spread, epsilon = 1.0, 0.05
    model = AdditiveNoise(pattern(), spread)
    x, y = two_classes(40)
    x_adv, _ = run("apgd_margin", model, x, y, epsilon=epsilon, num_classes=2, source=FreshDraws(40, "eot"), steps=25)
    signs = (2 * y - 1).float()

    def expected(points):
        offset = points.flatten(1) - 0.5
        return torch.special.ndtr(signs * (offset @ pattern()) / (spread * offset.norm(dim=1)))

    corner = x - epsilon * (signs[:, None] * pattern()).view_as(x)
    assert expected(x).mean() > 0.99
    assert expected(x_adv).mean() == pytest.approx(expected(corner).mean().item(), abs=0.03)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(9)
        right = []
        for _ in range(300):
            model.draw(generator)
            right.append((model(x_adv).argmax(1) == y).float().mean())
    assert torch.stack(right).mean() == pytest.approx(expected(x_adv).mean().item(), abs=0.05)


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("source", ["fixed", "fresh"])
def test_no_attack_returns_the_clean_image_or_leaves_the_ball(name, source):
    model = AdditiveNoise(pattern(), 3.0)  # so noisy that many single draws err on clean images
    five = nn.Sequential(model, nn.Linear(2, 5))
    x, _ = two_classes(12)
    y = torch.arange(12) % 5
    draws = FreshDraws(2, "x") if source == "fresh" else FixedDraws((ONLY_DRAW,))
    small = {"pgd": {"steps": 3}, "square": {"num_queries": 20}, "fgsm": {}}.get(name, {"steps": 4})
    x_adv, _ = run(name, five, x, y, source=draws, epsilon=0.03, **small)
    distance = (x_adv - x).flatten(1).abs().amax(1)
    assert (distance > 1e-3).all()
    assert distance.max() <= 0.03 + 1e-6
    assert 0 <= x_adv.min()
    assert x_adv.max() <= 1
    assert not x_adv.requires_grad


@pytest.mark.parametrize("name", OWN)
def test_equal_seeds_give_equal_images_and_costs_are_what_was_spent(name):
    network = classifier()
    x, y = labelled_by(network, 8)
    small = {"pgd": {"steps": 5, "restarts": 2}, "square": {"num_queries": 30}, "fgsm": {}}.get(name, {"steps": 6})
    first, target = run(name, network, x, y, **small)
    torch.manual_seed(99)
    second, _ = run(name, network, x, y, **small)
    assert torch.equal(first, second)
    parameters = parse_attack_parameters(name, small)
    cost = attack_entry(name).cost(parameters, 1, 5, True)
    assert target.num_backward / 8 == cost.backward
    if name != "square":  # stops at success: the cost is an upper bound
        assert target.num_forward / 8 == cost.forward
    fresh = FreshDraws(3, "cost")
    _, target = run(name, network, x, y, source=fresh, **small)
    cost = attack_entry(name).cost(parameters, 3, 5, False)
    assert target.num_backward / 8 == cost.backward
    assert target.num_forward / 8 == cost.forward


def test_apgd_is_at_least_as_strong_as_pgd_on_a_network():
    network = classifier()
    x, y = labelled_by(network, 60)
    weak, _ = run("pgd", network, x, y, epsilon=0.06, steps=20)
    strong, _ = run("apgd_ce", network, x, y, epsilon=0.06, steps=20)
    accuracy = [(network(points).argmax(1) == y).float().mean().item() for points in (weak, strong)]
    assert accuracy[1] <= accuracy[0] + 0.02
    assert accuracy[0] < 1


def test_harness_pgd_is_the_trainers_pgd():
    network = classifier()
    x, y = labelled_by(network, 8)
    ours, _ = run("pgd", network, x, y, epsilon=8 / 255, steps=7, step_size="2/255", seed=5)
    direct = pgd(network, x, y, steps=7, generator=torch.Generator().manual_seed(5))
    assert torch.equal(ours, direct)


def test_enumerated_gradient_is_the_mean_over_all_configurations():
    members = torch.randn((3, 4, 64), generator=torch.Generator().manual_seed(1))
    model = Choice(members)
    x, y = labelled_by(model, 5)
    target = attacked(model, FixedDraws(all_configurations(model, 10)))
    gradient, loss, wrong = target.gradient(x, y, cross_entropy)
    leaf = x.clone().requires_grad_()
    losses = torch.stack([cross_entropy((leaf.flatten(1) - 0.5) @ member.T, y) for member in members]).mean(0)
    (expected,) = torch.autograd.grad(losses.sum(), leaf)
    assert torch.allclose(gradient, expected, atol=1e-6)
    assert torch.allclose(loss, losses.detach(), atol=1e-6)
    predictions = torch.stack([((x.flatten(1) - 0.5) @ member.T).argmax(1) != y for member in members])
    assert torch.allclose(wrong, predictions.float().mean(0))


def test_averaged_predictor_is_the_mean_probability():
    members = torch.randn((3, 4, 64), generator=torch.Generator().manual_seed(1))
    model = Choice(members)
    x = torch.rand((5, 1, 8, 8), generator=torch.Generator().manual_seed(2))
    predictor = Predictor(model, averaged_draws=all_configurations(model, 10))
    mean = torch.stack([((x.flatten(1) - 0.5) @ member.T).softmax(1) for member in members]).mean(0)
    assert torch.allclose(predictor.logits(x, ONLY_DRAW).exp(), mean, atol=1e-6)


def test_logits_ratio_losses_ignore_shift_and_scale():
    logits = torch.tensor([[3.0, 1.0, 0.0, -1.0]], dtype=torch.float64)
    y, target = torch.tensor([0]), torch.tensor([2])
    assert difference_of_logits_ratio(logits, y).item() == pytest.approx(-2 / 3)
    assert TargetedDifferenceOfLogitsRatio(target)(logits, y).item() == pytest.approx(-3 / 3.5)
    assert difference_of_logits_ratio(7 * logits - 40, y).item() == pytest.approx(-2 / 3)


def test_mistakes_are_explained():
    threat_model = ThreatModel()
    with pytest.raises(UserError, match="apgd_ce"):
        attack_entry("apgd_cee")
    with pytest.raises(UserError, match=r"no parameter 'step'.*steps"):
        check_attack("pgd", {"step": 3}, threat_model, 10)
    with pytest.raises(UserError, match=r"steps: .*greater than or equal to 1"):
        check_attack("pgd", {"steps": 0}, threat_model, 10)
    with pytest.raises(UserError, match="at least 3 classes"):
        check_attack("apgd_dlr", {}, threat_model, 2)
    with pytest.raises(UserError, match="at least 4 classes"):
        check_attack("apgd_targeted", {}, threat_model, 3)
    with pytest.raises(UserError, match=r"is for linf.*apgd_ce"):
        check_attack("torchattacks_pgd", {}, ThreatModel(norm="l2", epsilon=0.5), 10)
    assert not any(name.lower() == "autoattack" for name in attacks())
    assert math.isfinite(attack_entry("apgd_ce").cost(parse_attack_parameters("apgd_ce", {}), 20, 10, False).forward)
