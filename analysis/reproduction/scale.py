"""How the rows of a table are trained and evaluated at four scales: a check of the plumbing, small pictures, a short schedule, as printed.

* `paper`: the recipe with the row's changes, nothing else.
* `short`: the same experiment on a one-cycle schedule of at most 30 epochs, evaluated on 1,000 images.
* `small`: the same defence parameters with ResNet-8 on a part of Fashion-MNIST, where the item has it, else of JPEG pictures of CIFAR-10
  (the settings `fashion_mnist_resnet8` and `cifar10_jpeg_resnet8`), 12 epochs, evaluated on 500 images: minutes of a core per row. Items
  may have a part of their rows at this scale. Gradients are averaged over 5 draws, attacks have at most 50 steps, whatever their names
  say; studies take 50 images. What the small network does not have is moved as at `smoke`.
* `smoke`: the same defence parameters on `digits` at 16x16 with ResNet-8, radius 0.1, 3 epochs of 640 images in batches of 32, evaluated
  on 32 images.
  Rows that differ in data set or network alone become one experiment. What the small network does not have is moved to what it has:
  CTRW's position to at most 4 (before the pooling), DCS's to at most the 7th convolution, RNA's path differences to at most its 9 layers;
  normalizations over groups of more channels than it has leave RNA's pools, and the cells say so. Steps and radii of attacks grow with
  the radius; attacks have at most 10 steps or 50 queries, whatever their names say, and AutoAttack, which cannot be cut short, runs its
  two gradient attacks on 4 images.
  Theory takes at most 3 pairs of draws at a path difference, and landscapes 11 points a side.

Numbers of `smoke` say that everything runs and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from models.errors import unknown_name

Scale = Literal["smoke", "small", "short", "paper"]
SCALES: tuple[Scale, ...] = get_args(Scale)

EPOCHS: dict[Scale, int] = {"short": 30, "small": 12, "smoke": 3}
"""Epochs at most; a shorter recipe keeps its own."""

STAND_IN_SCALES: frozenset[Scale] = frozenset({"smoke", "small"})
"""Whose network and data stand in for those of the paper."""

SMOKE_EPSILON = 0.1
"""Radius of L-infinity attacks on the small pictures of `smoke`."""


@dataclass(frozen=True)
class EvaluationBudget:
    """Upper limits of an evaluation; None: no limit.

    `scoring` has limits by field of `Scoring`, `study_sizes` by field of `StudySettings`; `studies`: with a suite's own checks;
    `autoattack_*`: of torchattacks' AutoAttack, whose steps and queries are no parameters.
    """

    num_samples: int | None = None
    num_draws: int | None = None
    max_steps: int | None = None
    max_queries: int | None = None
    autoattack_version: str | None = None
    autoattack_samples: int | None = None
    studies: bool = True
    scoring: Mapping[str, int] | None = None
    study_sizes: Mapping[str, int] | None = None


BUDGETS: dict[Scale, EvaluationBudget] = {
    "paper": EvaluationBudget(),
    "short": EvaluationBudget(
        num_samples=1000,
        num_draws=10,
        scoring={"num_selection_draws": 10, "num_evaluation_draws": 50, "num_repetitions": 5},
    ),
    "small": EvaluationBudget(
        num_samples=500,
        num_draws=5,
        max_steps=50,
        scoring={"num_selection_draws": 5, "num_evaluation_draws": 20, "num_known_draws": 3, "num_averaged_draws": 5, "num_retries": 3},
        study_sizes={"num_samples": 50, "num_draws": 5, "max_steps": 100, "max_draws": 10, "num_searched": 20, "num_random_points": 50},
    ),
    "smoke": EvaluationBudget(
        num_samples=32,
        num_draws=2,
        max_steps=10,
        max_queries=50,
        autoattack_version="rand",
        autoattack_samples=4,
        studies=False,
        scoring={
            "num_selection_draws": 2,
            "num_evaluation_draws": 5,
            "num_known_draws": 2,
            "num_averaged_draws": 2,
            "num_averaged_groups": 2,
            "num_retries": 3,
            "num_repetitions": 2,
            "enumerate_up_to": 16,
        },
    ),
}


SCALE_MARKS: Mapping[Scale, str] = {"smoke": "smoke", "small": "small", "short": "short", "paper": ""}
"""Stands behind every number of a reduced scale."""

SCALE_SENTENCES: Mapping[Scale, str] = {
    "smoke": f"Smoke scale: digits at 16x16, ResNet-8, at most {EPOCHS['smoke']} epochs and {BUDGETS['smoke'].num_samples} test images. "
    "These numbers say that everything runs and nothing about the defence; they must not be compared with the printed ones.",
    "small": f"Small scale: ResNet-8, {EPOCHS['small']} epochs of 10,000 images of Fashion-MNIST or 15,000 JPEG-compressed pictures of "
    f"CIFAR-10, {BUDGETS['small'].num_samples} test images. What a defence is worth there; not to be set against printed numbers of other "
    "networks.",
    "short": f"Short scale: the paper's data and network on one cycle of at most {EPOCHS['short']} epochs, at most "
    f"{BUDGETS['short'].num_samples} test images. A first impression, not a reproduction; agreement with printed numbers is not judged.",
    "paper": "Paper scale: trained and evaluated as printed.",
}


def parse_scale(text: str) -> Scale:
    """Return a scale by name; an unknown one is a `UserError` with the nearest."""
    if text not in SCALES:
        raise unknown_name("scale", text, SCALES)
    return text  # type: ignore[return-value]
