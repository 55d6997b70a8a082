"""Spaces of draws whose probabilities are not those of an enumeration: they are sampled, or the enumeration is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from analysis.attacked_model.draws import all_configurations
from analysis.evaluate import evaluate
from analysis.evaluation.protocols import Scoring
from analysis.evaluation.suites import AttackItem, Suite
from models.randomness import RandomModule
from models.threat_model import ThreatModel

NUM_IMAGES = 60
SUITE = Suite(name="one attack", attacks=(AttackItem(attack="pgd", parameters={"steps": 2}),))


class Members(RandomModule):
    """One of several fixed answers per draw: the true class, or the next one.

    Args:
        probabilities: of the members in truth. right: which members answer with the true class.
        claimed: what the layer says of its probabilities; None: nothing.
    """

    def __init__(self, probabilities, right, claimed=None):
        super().__init__()
        self.probabilities, self.right, self.claimed = torch.tensor(probabilities), right, claimed
        self.gain = nn.Parameter(torch.ones(()))
        self.register_draw("member", torch.zeros((), dtype=torch.int64))
        self.take_first_draw()

    @property
    def num_configurations(self):
        return len(self.right)

    def configuration_probability(self, index):
        return None if self.claimed is None else self.claimed[index]

    def draw(self, generator):
        self.set_draw("member", torch.multinomial(self.probabilities, 1, generator=generator)[0])

    def set_configuration(self, index):
        self.set_draw("member", torch.tensor(index))

    def forward(self, x):
        classes = (x.flatten(1).mean(1) * 3).round().long() % 3
        shift = 0 if self.right[int(self.member)] else 1
        logits = torch.nn.functional.one_hot((classes + shift) % 3, 3).to(x)
        return self.gain * (5 * logits + 0.01 * x.flatten(1)[:, :3] * (1 + self.member))


def data():
    y = torch.arange(NUM_IMAGES) % 3
    return (y.float() / 3).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous(), y


def evaluated(model, seed=0):
    return evaluate(model.eval(), *data(), SUITE, threat_model=ThreatModel(epsilon=0.01), seed=seed)


def verdict(result, number):
    return next(each for each in result.verdicts if each.id == number)


def cases():
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        count = int(torch.randint(2, 5, (), generator=generator))
        likely = 0.75 + 0.2 * torch.rand((), generator=generator).item()
        right = torch.zeros(count, dtype=torch.bool)
        right[0] = True  # the likely member alone is right
        rest = torch.rand(count - 1, generator=generator) + 0.1
        yield [likely, *((1 - likely) * rest / rest.sum()).tolist()], right.tolist()


@pytest.mark.parametrize(("probabilities", "right"), cases())
def test_unknown_probabilities_are_sampled(probabilities, right):
    model = Members(probabilities, right)
    assert all_configurations(model, 512) is None
    result = evaluated(model)
    assert not result.clean.exact
    truth = sum(p for p, good in zip(probabilities, right, strict=True) if good)
    assert abs(result.clean.value - truth) < 4 * (truth * (1 - truth) / result.clean.num_draws) ** 0.5
    assert verdict(result, "C17").status == "PASS"


@pytest.mark.parametrize(("probabilities", "right"), cases())
def test_an_enumeration_of_a_space_that_is_not_uniform_is_found(probabilities, right):
    size = len(right)
    result = evaluated(Members(probabilities, right, claimed=[1 / size] * size))
    assert result.clean.exact
    finding = verdict(result, "C17")
    assert finding.status == "FAIL"
    assert "not equally likely" in finding.explanation
    assert result.marked


@pytest.mark.parametrize(("probabilities", "right"), [([0.9, 0.1], [True, False]), ([0.85, 0.15], [False, True])])
def test_a_first_look_with_few_draws_finds_an_enumeration_that_is_not_uniform_too(probabilities, right):
    few = SUITE.model_copy(update={"scoring": Scoring(num_selection_draws=2, num_evaluation_draws=2)})
    model = Members(probabilities, right, claimed=[0.5, 0.5])
    result = evaluate(model.eval(), *data(), few, threat_model=ThreatModel(epsilon=0.01))
    assert result.clean.exact and verdict(result, "C17").status == "FAIL"


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("size", [2, 3, 5])
def test_an_enumeration_that_is_right_is_not_suspected(size, seed):
    result = evaluated(Members([1 / size] * size, [True] + [False] * (size - 1), claimed=[1 / size] * size), seed)
    assert result.clean.exact
    assert result.clean.value == pytest.approx(1 / size)
    assert verdict(result, "C17").status == "PASS"


class MembersOfImages(RandomModule):
    """Two members, one of which answers each image; each is right on a half of the images, so that both have the same accuracy."""

    def __init__(self, num_images):
        super().__init__("per_example")
        self.gain = nn.Parameter(torch.ones(()))
        self.num_images = num_images
        self.register_draw("member_B", torch.zeros(num_images, dtype=torch.int64))
        self.take_first_draw()

    @property
    def num_configurations(self):
        return 2

    def configuration_probability(self, index):
        return 0.5

    def draw(self, generator):
        self.set_draw("member_B", torch.randint(0, 2, (self.num_images,), generator=generator))

    def set_configuration(self, index):
        self.set_draw("member_B", torch.full((self.num_images,), index))

    def forward(self, x):
        member_B = self.member_B[torch.arange(len(x)) % self.num_images]
        pixel = x.flatten(1).mean(1) * 3
        classes, half = pixel.round().long() % 3, (x.flatten(1)[:, -1] * 1e4).round().long() % 2
        logits = torch.nn.functional.one_hot((classes + (half == member_B)) % 3, 3).to(x)
        return self.gain * (5 * logits + 0.01 * x.flatten(1)[:, :3] * (1 + member_B[:, None]))


@pytest.mark.parametrize("seed", range(6))
def test_draws_of_each_image_are_not_suspected(seed):
    """Sampled draws then differ from each configuration, although all configurations have one accuracy."""
    x, y = data()
    x[:, :, -1, -1] = (x[:, :, -1, -1] * 1e4).round().div(2).floor().mul(2).add((torch.arange(len(x)) // 3 % 2)[:, None]) / 1e4
    x = x.clamp(0, 1)
    result = evaluate(MembersOfImages(256).eval(), x, y, SUITE, threat_model=ThreatModel(epsilon=1e-6), seed=seed)
    assert result.clean.exact and 0.4 < result.clean.value < 0.6
    assert verdict(result, "C17").status == "PASS", verdict(result, "C17").explanation
    assert verdict(result, "C1").status == "PASS", verdict(result, "C1").explanation


@pytest.mark.parametrize("seed", range(4))
def test_a_likely_member_is_no_dead_randomness(seed):
    result = evaluated(Members([0.9, 0.1], [True, False]), seed)
    assert verdict(result, "C1").status == "PASS", verdict(result, "C1").explanation
