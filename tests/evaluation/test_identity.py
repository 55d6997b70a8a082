"""Records of one model never answer for another: identity is what a model computes, not its weights."""

from __future__ import annotations

import copy
import itertools
import json

import pytest
import torch
from torch import nn

from analysis.attacked_model.identity import identity_hash
from analysis.evaluate import evaluate, plan_blocks
from analysis.evaluation.records import read_records
from analysis.evaluation.suites import AttackItem, Suite
from models import build_model
from models.randomness import randomness_state
from models.threat_model import ThreatModel

SHAPE = (1, 4, 4)
SUITE = Suite(name="one attack", attacks=(AttackItem(attack="fgsm"),))


class Quantized(nn.Module):
    """A linear network behind an input function that no state dict holds."""

    def __init__(self, levels=4, function=None, mask=None, _private=1.0, name=None):
        super().__init__()
        self.levels, self.function, self._private, self.name = levels, function, _private, name
        self.register_buffer("mask", torch.ones(SHAPE) if mask is None else mask, persistent=False)
        self.calls = 0
        self.linear = nn.Linear(16, 3)
        with torch.no_grad():
            self.linear.weight.copy_(torch.randn(3, 16, generator=torch.Generator().manual_seed(0)))
            self.linear.bias.zero_()

    def forward(self, x):
        self.calls += 1
        x = (x * self.mask * self.levels).round() / self.levels
        if self.function is not None:
            x = self.function(x)
        return self.linear(x.flatten(1)) * self._private


class Mirrored(Quantized):
    """Other code, the same weights."""

    def forward(self, x):
        return super().forward(1 - x)


def halved():
    mask = torch.ones(SHAPE)
    mask[..., :2] = 0
    return mask


OTHERS = {
    "as it is": Quantized(),
    "levels": Quantized(levels=2),
    "many levels": Quantized(levels=255),
    "nearly as many": Quantized(levels=256),
    "function": Quantized(function=torch.sqrt),
    "another function": Quantized(function=lambda x: x**2),
    "a function that differs in a constant": Quantized(function=lambda x: x**2.001),
    "non-persistent buffer": Quantized(mask=halved()),
    "private attribute": Quantized(_private=-1.0),
    "class": Mirrored(),
}


def images():
    return torch.rand(30, *SHAPE, generator=torch.Generator().manual_seed(3)), torch.arange(30) % 3


def evaluated(model, path, progress=None):
    return evaluate(model.eval(), *images(), SUITE, threat_model=ThreatModel(epsilon=0.1), records=path, progress=progress)


@pytest.mark.parametrize(("first", "second"), itertools.combinations(OTHERS, 2))
def test_models_that_differ_in_anything_have_other_identities(first, second):
    assert identity_hash(OTHERS[first], SHAPE) != identity_hash(OTHERS[second], SHAPE)


def test_every_model_gets_its_own_numbers_from_one_file(tmp_path):
    path = tmp_path / "records.jsonl"
    for model in OTHERS.values():
        alone, shared = evaluated(model, None), evaluated(model, path)
        assert [row.estimate for row in alone.rows] == [row.estimate for row in shared.rows]
        seen = []
        evaluated(copy.deepcopy(model), path, seen.append)
        assert seen[0].num_resumed == seen[0].num_total, "a copy is the same model, however often it was called"


@pytest.mark.parametrize("defence", ["ctrw", "rna", "dcs", "red", "at"])
def test_a_built_model_is_the_same_when_it_is_built_again_and_left_as_it_was(defence):
    options = {"backbone": "resnet8", "image_shape": (3, 8, 8), "num_classes": 4}
    model = build_model(defence, seed=1, **options).train()
    state, before = torch.get_rng_state(), str(randomness_state(model))
    identity = identity_hash(model, (3, 8, 8))
    assert torch.equal(torch.get_rng_state(), state)
    assert str(randomness_state(model)) == before
    assert model.training
    torch.manual_seed(7)
    again = build_model(defence, seed=1, **options).eval()
    assert identity_hash(again, (3, 8, 8)) == identity
    again.load_state_dict(build_model(defence, seed=2, **options).state_dict())
    assert identity_hash(again, (3, 8, 8)) != identity


def evaluation_of(model, size, path=None):
    """Return the result on images of this size, and how many blocks were found in the records."""
    x = torch.rand(8, size[0], *size[1:], generator=torch.Generator().manual_seed(3))
    y, seen = torch.arange(8) % 3, []
    result = evaluate(model.eval(), x, y, SUITE, records=path, progress=seen.append)
    return result, seen[0].num_resumed


@pytest.mark.parametrize(
    ("model", "size", "taken_over"),
    [
        (build_model("at", backbone="resnet8", image_shape=(3, 8, 8), num_classes=4), (3, 8, 8), True),
        (build_model("rna", backbone="resnet8", image_shape=(3, 8, 8), num_classes=4), (3, 8, 8), True),
        (Quantized(), SHAPE, False),
    ],
)
def test_records_of_an_earlier_version_are_taken_over_for_built_models_alone(model, size, taken_over, tmp_path, caplog):
    x = torch.rand(8, size[0], *size[1:], generator=torch.Generator().manual_seed(3))
    path = tmp_path / "records.jsonl"
    first, _ = evaluation_of(model, size, path)
    keys = {task.key: task.key_without_model for task in plan_blocks(model, x, torch.arange(8) % 3, SUITE)}
    lines = []
    for record in read_records(path).values():
        record["key"] = keys[record["key"]]
        del record["header"]["model"]  # as a version left them for which a model was its weights
        lines.append(json.dumps(record) + "\n")
    path.write_text("".join(lines))
    again, num_resumed = evaluation_of(model, size, path)
    assert num_resumed == (len(lines) if taken_over else 0)
    assert ("earlier version" in caplog.text) == taken_over
    assert [row.estimate for row in again.rows] == [row.estimate for row in first.rows]
    assert evaluation_of(model, size, path)[1] == len(lines)
