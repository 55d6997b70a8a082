"""Models through which no gradient passes are judged all the same, and it is said why and how."""

import itertools
import random

import pytest
import torch
from evaluation_toys import Choice, classifier
from torch import nn
from torch.nn import functional

from analysis.attacked_model.backward import WithBackward
from analysis.attacked_model.straight_through import StraightThroughModel
from analysis.evaluate import evaluate
from analysis.evaluation.suites import AttackItem, Suite
from models.errors import UserError
from models.threat_model import ThreatModel

NUM_CLASSES, SIDE = 5, 8
THREAT = ThreatModel(epsilon=0.25)
QUICK = Suite(
    name="look",
    attacks=(AttackItem(attack="fgsm"), AttackItem(attack="apgd_margin", parameters={"steps": 20})),
    scoring={"num_evaluation_draws": 4, "num_selection_draws": 2},
)


class Answering(nn.Module):
    def __init__(self, answer, seed=2):
        super().__init__()
        self.network = classifier(NUM_CLASSES, seed=seed)
        self.answer = answer

    def forward(self, x):
        return self.answer(self.network, x)


def thermometer(network, x):
    return network((x.unsqueeze(-1) > torch.linspace(0.05, 0.95, 10)).float().mean(-1))


def answers_again(network, x):
    with torch.no_grad():
        return network(x)


HARD_OUTPUTS = {
    "one_hot": lambda network, x: functional.one_hot(network(x).argmax(1), NUM_CLASSES).float(),
    "whole numbers": lambda network, x: functional.one_hot(network(x).max(dim=1).indices, NUM_CLASSES),
    "scatter": lambda network, x: torch.zeros(len(x), NUM_CLASSES).scatter_(1, network(x).argmax(1, keepdim=True), 1.0),
    "table": lambda network, x: 10 * torch.eye(NUM_CLASSES)[network(x).argmax(-1)],
    "equal to the largest": lambda network, x: (network(x) == network(x).amax(1, keepdim=True)).float(),
    "without autograd": answers_again,
    "detached": lambda network, x: network(x.detach()),
    "data": lambda network, x: network(x.data),
}
HARD_INPUTS = {
    "thermometer": thermometer,
    "rounding": lambda network, x: network((x * 16).round() / 16),
    "sign": lambda network, x: network(((x - 0.5).sign() + 1) / 2),
    "where": lambda network, x: network(torch.where(x >= 0.5, torch.tensor(1.0), torch.tensor(0.0))),
}
OPAQUE = {
    "numpy": lambda network, x: network(torch.from_numpy(x.numpy() + 0)),
    "list": lambda network, x: torch.tensor(network(x).tolist()),
}


def images(count=24):
    return torch.rand((count, 1, SIDE, SIDE), generator=torch.Generator().manual_seed(3))


def labelled(model, count=24):
    x = images(count)
    with torch.no_grad():
        return x, model(x).float().argmax(1)


def verdict(result, name):
    return next(each for each in result.verdicts if each.id == name)


@pytest.fixture(scope="module")
def true_accuracy():
    model = classifier(NUM_CLASSES)
    return evaluate(model, *labelled(model), QUICK, threat_model=THREAT).headline.value


@pytest.mark.parametrize("kind", HARD_OUTPUTS)
def test_a_hard_answer_is_no_defence(kind, true_accuracy):
    model = Answering(HARD_OUTPUTS[kind]).eval()
    result = evaluate(model, *labelled(model), QUICK, threat_model=THREAT)
    assert true_accuracy <= 0.3
    assert result.clean.value == 1 and result.headline.value <= true_accuracy + 0.05
    said = verdict(result, "C12")
    assert said.status == "FAIL" and "no gradient leads" in said.explanation and "straight_through" in said.explanation
    assert "backward=" in said.advice
    assert {row.attack for row in result.rows}.isdisjoint({"fgsm", "apgd_margin"})


@pytest.mark.parametrize("kind", HARD_INPUTS)
def test_a_hard_encoding_is_no_defence(kind):
    model = Answering(HARD_INPUTS[kind]).eval()
    result = evaluate(model, *labelled(model), QUICK, threat_model=THREAT)
    assert result.clean.value == 1 and result.headline.value <= 0.35
    assert verdict(result, "C12").status in ("WARN", "FAIL")  # a warning where the number is too low to be too high
    straight = next(row for row in result.rows if row.attack == "straight_through")
    assert straight.estimate.value <= 0.35


@pytest.mark.parametrize("kind", OPAQUE)
def test_where_nothing_can_be_recognized_answers_alone_give_a_number(kind):
    model = Answering(OPAQUE[kind]).eval()
    result = evaluate(model, *labelled(model), QUICK, threat_model=THREAT)
    assert {row.attack for row in result.rows} == {"clean", "square", "smoothed_gradient", "substitute"}
    assert result.headline.value <= 0.5 < result.clean.value


def test_the_callers_own_backward_pass_gives_the_white_box_attacks_back(true_accuracy):
    model = Answering(HARD_OUTPUTS["one_hot"]).eval()
    x, y = labelled(model)
    result = evaluate(model, x, y, QUICK, threat_model=THREAT, backward=model.network)
    assert {row.attack for row in result.rows} == {"clean", "fgsm", "apgd_margin"}
    assert verdict(result, "C12").status == "PASS" and not result.marked
    assert result.headline.value <= true_accuracy + 0.2  # the margin of a one-hot answer is the same for all wrong classes
    plain = evaluate(model, x, y, QUICK, threat_model=THREAT)
    assert result.header["model"] != plain.header["model"]


@pytest.mark.parametrize(
    ("backward", "said"),
    [
        (lambda network: network.forward, "torch.nn.Module"),
        (lambda network: nn.Sequential(network, nn.Linear(NUM_CLASSES, 3)), r"shape \(2, 3\) where the model gives \(2, 5\)"),
        (lambda network: nn.Sequential(nn.Conv2d(3, 1, 1), network), "backward: the model cannot be run"),
        (lambda network: Answering(HARD_OUTPUTS["detached"]), "no gradient leads"),
        (lambda network: Answering(HARD_OUTPUTS["whole numbers"]), "no gradient leads"),
    ],
)
def test_a_backward_pass_that_cannot_serve_is_refused_before_anything_runs(backward, said):
    model = Answering(HARD_OUTPUTS["one_hot"]).eval()
    with pytest.raises(UserError, match=said):
        evaluate(model, *labelled(model), QUICK, threat_model=THREAT, backward=backward(model.network))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_model_and_its_backward_pass_may_compute_in_other_precisions(dtype):
    network = classifier(NUM_CLASSES)
    model = Answering(lambda inner, x: functional.one_hot(inner(x).argmax(1), NUM_CLASSES).to(dtype)).eval()
    model.network.to(dtype)
    x = images()
    y = network(x).argmax(1)
    result = evaluate(model, x, y, QUICK, threat_model=THREAT, backward=network)
    assert {row.attack for row in result.rows} == {"clean", "fgsm", "apgd_margin"}
    assert result.headline.value <= 0.5


def test_values_are_the_models_and_gradients_are_the_stand_ins():
    model, stand_in = Answering(thermometer).eval(), classifier(NUM_CLASSES, seed=9)
    x = images(3).requires_grad_()
    joined = WithBackward(model, stand_in)
    assert torch.equal(joined(x), model(x))
    (gradient,) = torch.autograd.grad(joined(x).square().sum(), x)
    (expected,) = torch.autograd.grad(stand_in(x), x, grad_outputs=2 * model(x).detach())
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("kind", [*HARD_INPUTS, "detached", "data", "without autograd"])
def test_straight_through_computes_what_the_model_does(kind):
    model = Answering({**HARD_INPUTS, **HARD_OUTPUTS}[kind]).eval()
    x = images(4).requires_grad_()
    logits = StraightThroughModel(model)(x)
    torch.testing.assert_close(logits, model(x), atol=1e-6, rtol=1e-6)
    (gradient,) = torch.autograd.grad(logits.square().sum(), x)
    assert (gradient != 0).flatten(1).any(1).all()


def test_a_network_without_such_steps_has_its_own_gradient():
    network, x = classifier(NUM_CLASSES), images(4).requires_grad_()
    gradients = [torch.autograd.grad(model(x).square().sum(), x)[0] for model in (network, StraightThroughModel(network))]
    assert torch.equal(*gradients)


class HardChoice(Choice):
    """A randomized ensemble with hard answers."""

    def forward(self, x):
        return functional.one_hot(super().forward(x).argmax(1), 3).float()


def test_a_randomized_model_with_hard_answers_is_judged_on_its_draws():
    model = HardChoice(torch.randn(4, 3, SIDE * SIDE, generator=torch.Generator().manual_seed(0)))
    x = images(16)
    y = (torch.einsum("nkd,bd->bk", model.members, x.flatten(1) - 0.5)).argmax(1)
    result = evaluate(model, x, y, QUICK, threat_model=THREAT)
    assert result.headline.value < result.clean.value
    assert verdict(result, "C17").status != "FAIL"


def _odd_combination(seed):
    """Return a model, images and labels that are odd in several ways at once."""
    choice = random.Random(seed)
    answer = choice.choice([*HARD_OUTPUTS.values(), *HARD_INPUTS.values(), *OPAQUE.values(), lambda network, x: network(x)])
    wrap = choice.choice(
        [
            lambda logits: logits,
            lambda logits: (logits, None),
            lambda logits: {"logits": logits},
            lambda logits: [logits],
            lambda logits: logits[:, :2],
            lambda logits: logits[:, :1],
            lambda logits: logits * float("nan"),
            lambda logits: {"a": logits, "b": logits},
            lambda logits: logits.double(),
            lambda logits: logits.numpy(force=True),
            lambda logits: None,
        ]
    )
    model = Answering(lambda network, x: wrap(answer(network, x)), seed=seed).eval()
    model = choice.choice([model, model, model.double(), model.bfloat16(), model.half()])
    x, y = images(6), torch.arange(6) % choice.choice([2, 5, 7])
    x = choice.choice([x, x.numpy(), x.tolist(), list(x), x.double(), x.half(), x + 1e-7, x * 255, x[:, 0], x[:0], x * float("nan")])
    y = choice.choice([y, y.numpy(), y.tolist(), y > 0, y.float(), y[:3], y - 1, y.to(torch.int8), None])
    norm = choice.choice(["linf", "l2"])
    return model, x, y, norm


ODD_SUITES = (
    QUICK,
    Suite(name="ratio", attacks=(AttackItem(attack="apgd_dlr", parameters={"steps": 2}),)),
    Suite(name="targeted", attacks=(AttackItem(attack="apgd_targeted", parameters={"steps": 2}), AttackItem(attack="arc"))),
    Suite(name="boundaries", attacks=(AttackItem(attack="fab_targeted", parameters={"steps": 2}),)),
)


@pytest.mark.parametrize(("seed", "suite"), itertools.product(range(12), ODD_SUITES), ids=lambda value: getattr(value, "name", value))
def test_odd_things_together_end_in_a_result_or_in_one_sentence(seed, suite):
    model, x, y, norm = _odd_combination(seed)
    inside = torch.inference_mode() if seed % 3 == 0 else torch.no_grad()
    with inside:
        try:
            result = evaluate(model, x, y, suite, threat_model=ThreatModel(norm=norm, epsilon=0.1))
        except UserError:
            return
    assert result.finished and result.headline is not None
    assert 0 <= result.headline.low <= result.headline.high <= 1
