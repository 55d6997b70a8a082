"""Models whose answer depends on more than the image and the draw are found; honest ones are not suspected."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from analysis.evaluate import evaluate
from analysis.evaluation.suites import AttackItem, Suite
from models import build_model

SUITE = Suite(
    name="one attack",
    scoring={"num_selection_draws": 1, "num_evaluation_draws": 2, "enumerate_up_to": 0},
    attacks=(AttackItem(attack="fgsm"),),
)
SMALL = {"backbone": "resnet8", "image_shape": (3, 8, 8), "num_classes": 4}


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(192, 4)

    def forward(self, x):
        return self.linear(x.flatten(1))


class Switching(Linear):
    """Turns its answers round after so many calls.

    Args:
        period: number of calls.
    """

    def __init__(self, period):
        super().__init__()
        self.period, self.calls = period, 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * (1 if self.calls // self.period % 2 == 0 else -1)


class OnBatchStatistics(Linear):
    def forward(self, x):
        return super().forward((x - x.mean(0)) / (x.std(0, correction=0) + 0.1))


class Ranked(Linear):
    """Adds something to the first image of a batch."""

    def forward(self, x):
        return super().forward(x) + torch.arange(len(x)).eq(0).unsqueeze(1) * torch.tensor([3.0, 0, 0, 0])


class KnowsItsBatchSize(Linear):
    def forward(self, x):
        return super().forward(x) * (1 if len(x) > 4 else -1)


class Remembering(Linear):
    """Answers by the mean of the batch before."""

    def __init__(self):
        super().__init__()
        self.before = None

    def forward(self, x):
        shift = 0 if self.before is None else self.before
        self.before = x.detach().mean()
        return super().forward(x + shift)


def verdict_of(model, count=40):
    x = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    result = evaluate(model.eval(), x, torch.arange(count) % 4, SUITE)
    return next(each for each in result.verdicts if each.id == "C1")


@pytest.mark.parametrize(
    "build",
    [lambda period=period: Switching(period) for period in (2, 7, 50, 100)] + [OnBatchStatistics, Ranked, KnowsItsBatchSize, Remembering],
)
def test_what_an_answer_must_not_depend_on_is_found(build):
    torch.manual_seed(0)
    assert verdict_of(build()).status == "FAIL"


@pytest.mark.parametrize("count", [1, 2, 7, 40])
@pytest.mark.parametrize(
    ("defence", "options"),
    [
        ("at", {}),
        ("ctrw", {}),
        ("rna", {}),
        ("rna", {"draw_scope": "per_example"}),
        ("dcs", {"draw_scope": "per_example"}),
        ("red", {"num_members": 3}),
    ],
)
def test_honest_models_are_not_suspected(defence, options, count):
    finding = verdict_of(build_model(defence, **options, **SMALL), count)
    assert "depend" not in finding.explanation


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_rounding_of_other_precisions_is_no_dependence(dtype):
    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = build_model("at", **SMALL).to(dtype)

        def forward(self, x):
            return self.model(x.to(dtype)).float()

    assert "depend" not in verdict_of(Cast()).explanation
