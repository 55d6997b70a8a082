"""Attacks as data: name, parameters, norms, cost. Found by scanning `analysis/attacks/`: a new attack is one new file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from analysis.attacked_model.model import AttackedModel
from models.configuration import Config
from models.errors import UserError, nearest, unknown_name
from models.plugins import once_for_plugins
from models.registry_files import broken_files, scan
from models.threat_model import Norm, ThreatModel


@dataclass(frozen=True)
class AttackProblem:
    """What an attack is given beside the model: images (B, C, H, W), labels (B,), ball, number of classes, seed of its own choices."""

    x: Tensor
    y: Tensor
    threat_model: ThreatModel
    num_classes: int
    seed: int


@dataclass(frozen=True)
class AttackOutput:
    """The perturbed images and what had to be mended in them.

    Attributes:
        x: detached images in [0,1].
        num_not_finite: images with NaN or infinite pixels, replaced by the clean image.
        num_out_of_range: images with pixels outside [0,1], which were cut.
    """

    x: Tensor
    num_not_finite: int = 0
    num_out_of_range: int = 0


@dataclass(frozen=True)
class Cost:
    """Passes per image, at most."""

    forward: float
    backward: float


@dataclass(frozen=True)
class AttackEntry:
    """One attack.

    Attributes:
        name: what suites write. description: one line.
        parameters: its `Config` class.
        norms: norms it can be bounded by.
        run: `(model, problem, parameters) -> AttackOutput`.
        cost: `(parameters, num_draws, num_classes, fixed_draws) -> Cost`.
        one_step: a single gradient step, which no iterative attack may be worse than.
        bounded: it respects the threat model's radius. Unbounded attacks (minimum norm, few pixels) never enter the headline.
        requires: importable package it needs, or None.
        is_transfer: points are made on another function. uses_gradients: of the attacked function; the others are black boxes.
        min_classes: fewest classes with which it works. instead: attack that takes its place below, None: there is none.
        ignores_scale: it does the same to logits that are all multiplied by one number.
        climbs_a_loss: step by step, so that it cannot be weaker than one such step; False for attacks that look for boundaries.
    """

    name: str
    description: str
    parameters: type[Config]
    norms: tuple[Norm, ...]
    run: Callable[[AttackedModel, AttackProblem, Any], AttackOutput]
    cost: Callable[[Any, int, int, bool], Cost]
    one_step: bool = False
    bounded: bool = True
    requires: str | None = None
    is_transfer: bool = False
    uses_gradients: bool = True
    climbs_a_loss: bool = True
    min_classes: int = 2
    instead: str | None = None
    ignores_scale: bool = False
    check_arguments: Callable[[Any, int], None] | None = field(default=None, compare=False)
    free_parameters: bool = False


@once_for_plugins
def attacks() -> dict[str, AttackEntry]:
    """Return all attacks by name."""
    return scan("analysis.attacks", "ATTACKS", AttackEntry)


def attack_entry(name: str) -> AttackEntry:
    """Return the entry of an attack; an unknown name is a `UserError` with the nearest ones."""
    entries = attacks()
    if name not in entries:
        raise unknown_name("attack", name, entries, broken_files("analysis.attacks"))
    return entries[name]


def parse_attack_parameters(name: str, parameters: Mapping[str, Any]) -> Config:
    """Validate the parameters of an attack; the error names the field, what is wrong and the nearest field."""
    entry = attack_entry(name)
    if entry.free_parameters:
        return entry.parameters.model_validate({"arguments": dict(parameters)})
    for key in parameters:
        if key not in entry.parameters.model_fields:
            close = nearest(key, entry.parameters.model_fields)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise UserError(
                f"attack {name!r} has no parameter {key!r}.{hint} It has: {', '.join(entry.parameters.model_fields) or 'none'}."
            )
    try:
        return entry.parameters(**parameters)
    except ValidationError as error:
        details = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or name}: {item['msg'].removeprefix('Value error, ')} (got {item['input']!r})"
            for item in error.errors()
        )
        raise UserError(f"attack {name!r}: {details}") from None


def check_attack(name: str, parameters: Mapping[str, Any], threat_model: ThreatModel, num_classes: int) -> None:
    """Raise a `UserError` if the attack cannot be run: unknown, wrong parameters, wrong norm, too few classes, missing package."""
    entry = attack_entry(name)
    parsed = parse_attack_parameters(name, parameters)
    if entry.bounded and threat_model.norm not in entry.norms:
        others = [other.name for other in attacks().values() if other.bounded and threat_model.norm in other.norms]
        raise UserError(
            f"attack {name!r} is for {' and '.join(entry.norms)}, the threat model is {threat_model.norm}. For it there are: "
            f"{', '.join(sorted(others))}."
        )
    if entry.check_arguments is not None:
        entry.check_arguments(parsed, num_classes)
