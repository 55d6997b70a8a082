"""Models that mislead whoever attacks them, or break when they are: each is marked, or refused in one sentence that says what it does."""

from __future__ import annotations

import copy

import pytest
import torch
from evaluation_toys import NUM_CLASSES, NUM_IMAGES, SMALL_SUITE, Wrapped, classifier, labelled_by
from torch import Tensor

from analysis.evaluate import evaluate
from models.errors import UserError
from models.threat_model import ThreatModel


class RaisesBackwards(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ValueError("no way back")


def on_grid(x: Tensor) -> Tensor:
    return ((x * 255).round() / 255 - x).abs().flatten(1).amax(1) < 1e-6


def detects(network, x):
    if not bool(on_grid(x).all()):
        raise RuntimeError("an attack was detected")
    return network(x)


def overwrites(network, x):
    with torch.no_grad():
        x.mul_(0.5)
    return network(x)


def learns(network, x):
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1e-3)
    return network(x)


def exits(network, x):
    raise SystemExit(3)


def turns_autograd_off(network, x):
    torch.set_grad_enabled(False)
    return network(x)


def turns_autograd_off_at_last(network, x):
    logits = network(x)
    torch.set_grad_enabled(False)
    return logits


def differs_under_autograd(network, x):
    return -network(x) if torch.is_grad_enabled() else network(x)


def differs_for_leaves(network, x):
    return network(1 - x) if x.requires_grad else network(x)


def data():
    x, _ = labelled_by(classifier(NUM_CLASSES), NUM_IMAGES)
    x = (x * 255).round() / 255
    return x, classifier(NUM_CLASSES)(x).argmax(1).detach()


def evaluated(answer):
    try:
        return evaluate(Wrapped(answer).eval(), *data(), SMALL_SUITE, threat_model=ThreatModel(epsilon=0.1))
    finally:
        assert torch.is_grad_enabled(), "an evaluation leaves autograd as it was"


REFUSED = {
    "detects": (detects, "an attack was detected"),
    "overwrites its images": (overwrites, "in place"),
    "overwrites them without autograd's knowledge": (lambda network, x: network(x.mul_(0.5)), "in place"),
    "learns": (learns, "weights"),
    "exits": (exits, "SystemExit"),
    "complex": (lambda network, x: network(x).to(torch.complex64), "complex"),
    "a list": (lambda network, x: network(x).tolist(), "list"),
    "a tuple that begins otherwise": (lambda network, x: (x, network(x)), "begins with"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_cannot_be_judged_is_refused_in_one_sentence(kind):
    answer, said = REFUSED[kind]
    with pytest.raises(UserError, match=said) as refused:
        evaluated(answer)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("answer", [differs_under_autograd, differs_for_leaves])
def test_a_model_that_knows_when_it_is_attacked_is_found(answer):
    result = evaluated(answer)
    finding = next(each for each in result.verdicts if each.id == "C1")
    assert finding.status == "FAIL" and "gradients are recorded" in finding.explanation
    assert result.marked


@pytest.mark.parametrize("answer", [turns_autograd_off, lambda network, x: network(RaisesBackwards.apply(x))])
def test_gradients_that_cannot_be_had_are_replaced(answer):
    result = evaluated(answer)
    assert "smoothed_gradient" in {record["header"]["item"]["name"] for record in result.records if record["header"]["item"]}
    assert next(each for each in result.verdicts if each.id == "C12").status == "FAIL"


def test_who_turns_autograd_off_behind_an_answer_is_attacked_along_its_gradients():
    plain, odd = evaluated(lambda network, x: network(x)), evaluated(turns_autograd_off_at_last)
    assert odd.headline.value == plain.headline.value < odd.clean.value


def test_a_sparse_answer_is_its_dense_one():
    plain, sparse = evaluated(lambda network, x: network(x)), evaluated(lambda network, x: network(x).to_sparse())
    assert sparse.headline.value == plain.headline.value


def test_an_honest_model_is_not_suspected():
    result = evaluated(copy.copy(lambda network, x: network(x)))
    assert next(each for each in result.verdicts if each.id == "C1").status == "PASS"
