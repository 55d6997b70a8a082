"""AutoAttack by others: the authors' own code as the package `pyautoattack` carries it, for a second opinion on our numbers.

It is no part of any suite: it returns images that it did not break unchanged, which our checks rightly call skipped. `rayndom evaluate
--against autoattack` runs it beside an evaluation. The package is imported when one of its attacks is first used.

pyautoattack_standard   the standard version, whole, for deterministic models
pyautoattack_rand       APGD-CE and APGD-DLR of the version for randomized models, 20 draws per gradient, each image's point of highest
                        loss: what is scored on fresh draws must not depend on a success under one

Reference: Croce and Hein, Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks, ICML 2020.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import logging
import random
from types import ModuleType
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from analysis.attacked_model.model import AttackedModel, BestPoint
from analysis.attacked_model.state_guard import restored_state
from analysis.attacks.registry import AttackEntry, AttackOutput, AttackProblem, Cost
from analysis.attacks.torchattacks_guard import ExposedModel, mended
from models.configuration import Config
from models.errors import UserError
from trainers.attacks import margin

PACKAGE = "pyautoattack"
_NORMS = {"linf": "Linf", "l2": "L2"}
_OFFICIAL_TARGETS = 9
_RAND_DRAWS = 20


class StandardSizes(Config):
    """Sizes; the defaults are the authors'."""

    steps: int = Field(100, ge=1, description="Steps of APGD and FAB.")
    num_queries: int = Field(5000, ge=1, description="Queries of Square.")


class RandSizes(Config):
    """Sizes; the defaults are the authors'."""

    steps: int = Field(100, ge=1, description="Steps of APGD.")


class _SinglePrecision(nn.Module):
    """The exposed model for a library that casts all images to float32."""

    def __init__(self, exposed: ExposedModel, dtype: torch.dtype) -> None:
        super().__init__()
        self.exposed, self.dtype = exposed, dtype

    def forward(self, x: Tensor) -> Tensor:
        logits_BK: Tensor = self.exposed(x.to(self.dtype))
        return logits_BK.float()


@functools.cache
def _library() -> ModuleType:
    try:
        return importlib.import_module(PACKAGE)
    except ImportError as error:
        raise UserError(
            f"an independent AutoAttack needs the package {PACKAGE}, which cannot be imported ({error}). "
            f"`pip install --no-deps {PACKAGE}` installs it, or this package's extra `autoattack`."
        ) from None


def version() -> str:
    """Return the package with its version.

    Raises:
        UserError: it is not installed.
    """
    _library()
    try:
        return f"{PACKAGE} {importlib.metadata.version(PACKAGE)}"
    except importlib.metadata.PackageNotFoundError:
        return PACKAGE


def _check(parameters: Config, num_classes: int) -> None:
    del parameters, num_classes
    _library()


def _attack(model: AttackedModel, problem: AttackProblem, kind: str) -> Any:
    exposed = _SinglePrecision(ExposedModel(model), problem.x.dtype).eval()
    attack = _library().AutoAttack(
        exposed,
        norm=_NORMS[problem.threat_model.norm],
        eps=problem.threat_model.epsilon,
        version=kind,
        seed=problem.seed & 0x7FFFFFFF,
        device=problem.x.device,
    )
    # Nine targets are those of ten classes.
    targets = min(_OFFICIAL_TARGETS, problem.num_classes - 1)
    attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = targets
    attack.logger.setLevel(logging.ERROR)  # what it suspects of the model our own checks say
    return attack


def _seed(problem: AttackProblem) -> None:
    """Seed what the library seeds by itself only in part."""
    random.seed(problem.seed)
    np.random.seed(problem.seed & 0x7FFFFFFF)  # noqa: NPY002 - the library draws from the global generators
    torch.manual_seed(problem.seed)


def _standard(model: AttackedModel, problem: AttackProblem, parameters: StandardSizes) -> AttackOutput:
    with restored_state(model.predictor.model):
        attack = _attack(model, problem, "standard")
        for part in (attack.apgd, attack.apgd_targeted, attack.fab):
            part.n_iter = parameters.steps
        attack.square.n_queries = parameters.num_queries
        _seed(problem)
        with torch.enable_grad():
            found = attack.run_standard_evaluation(problem.x.clone(), problem.y.clone(), batch_size=len(problem.x))
    return mended(found[0].detach().to(problem.x), problem.x)


def _rand(model: AttackedModel, problem: AttackProblem, parameters: RandSizes) -> AttackOutput:
    best = BestPoint(exact=True)  # shares of errors are comparable between losses, the losses are not
    every = torch.arange(len(problem.x), device=problem.x.device)
    broken = outside = 0
    for loss in ("ce", "dlr"):
        with restored_state(model.predictor.model):
            apgd = _attack(model, problem, "rand").apgd
            apgd.n_iter, apgd.loss, apgd.eot_iter, apgd.seed = parameters.steps, loss, _RAND_DRAWS, problem.seed & 0x7FFFFFFF
            _seed(problem)
            with torch.enable_grad():
                points = apgd.perturb(problem.x.clone(), problem.y.clone(), best_loss=True)
        output = mended(points.detach().to(problem.x), problem.x)
        broken, outside = broken + output.num_not_finite, outside + output.num_out_of_range
        best.update_rows_(every, output.x, *model.score(output.x, problem.y, margin))
    return AttackOutput(best.result()[0], broken, outside)


def _standard_cost(parameters: StandardSizes, num_draws: int, num_classes: int, fixed_draws: bool) -> Cost:
    del num_draws, fixed_draws
    targets = min(_OFFICIAL_TARGETS, num_classes - 1)
    steps = parameters.steps * (1 + 2 * targets)
    return Cost(steps + parameters.num_queries, steps)


def _rand_cost(parameters: RandSizes, num_draws: int, num_classes: int, fixed_draws: bool) -> Cost:
    del num_classes, fixed_draws
    passes = 2.0 * parameters.steps * _RAND_DRAWS * num_draws
    return Cost(passes, passes)


ATTACKS = (
    AttackEntry(
        "pyautoattack_standard",
        "AutoAttack's standard version as its authors wrote it (package pyautoattack), for deterministic models",
        StandardSizes,
        ("linf", "l2"),
        _standard,
        _standard_cost,
        requires=PACKAGE,
        min_classes=4,
        check_arguments=_check,
    ),
    AttackEntry(
        "pyautoattack_rand",
        "AutoAttack's APGD for randomized models as its authors wrote it (package pyautoattack)",
        RandSizes,
        ("linf", "l2"),
        _rand,
        _rand_cost,
        requires=PACKAGE,
        min_classes=3,
        check_arguments=_check,
    ),
)
