"""How a number of a paper is measured: accuracy under an attack of a suite, a quantity of the theory, a time."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from analysis.attacks.registry import attack_entry
from analysis.evaluation.protocols import ProtocolName
from analysis.evaluation.suites import AttackItem, Suite, load_suite
from models.errors import unknown_name
from models.threat_model import parse_pixel_fraction

HONEST_DRAWS = 20
"""E, draws averaged in each gradient of the honest counterpart (T1) of a published number."""

HONEST_SUITE = "standard"
"""Whose worst case stands beside a number of torchattacks' AutoAttack, which drops samples on a single lucky draw."""


class _Described:
    """What a measure says of itself, as far as it stands fast before anything was run."""

    @property
    def protocol(self) -> str:
        """`T0` to `T4`, `worst` for the worst attack per image, or empty: it is the same under every protocol."""
        return ""

    @property
    def why_no_honest(self) -> str:
        """Why it has no honest counterpart; empty if it has one, or is one."""
        return ""


@dataclass(frozen=True)
class Clean(_Described):
    """Expected accuracy on clean images, mean over draws: the same under every protocol."""

    @property
    def words(self) -> str:
        """What is measured."""
        return "clean images"

    @property
    def honest(self) -> Measure | None:
        """The same number."""
        return self


@dataclass(frozen=True)
class Accuracy(_Described):
    """Accuracy under one attack of a suite, with changed parameters where a figure sweeps them.

    Attributes:
        suite, attack: a shipped suite and the name of its row. parameters: replace those of the row. epsilon: replaces the radius.
        protocol: T0 is what the papers' scripts do. num_draws: E, draws averaged per gradient under T1.
        num_repetitions: of T0; None: the suite's.
    """

    suite: str
    attack: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    epsilon: str | None = None
    protocol: ProtocolName = "T0"
    num_draws: int = 1
    num_repetitions: int | None = None

    @property
    def row_name(self) -> str:
        """Name of the row in an evaluation's result; equal for all protocols."""
        changes = {**self.parameters, **({"epsilon": self.epsilon} if self.epsilon else {})}
        return self.attack + (f" {' '.join(f'{name}={value}' for name, value in changes.items())}" if changes else "")

    @property
    def item(self) -> AttackItem:
        """The attack as suites describe it."""
        base = suite_row(self.suite, self.attack)
        return base.model_copy(
            update={
                "name": self.row_name,
                "parameters": {**base.parameters, **self.parameters},
                "protocols": ("T1", "T3") if self.protocol == "T3" else (self.protocol,),
                "num_draws": self.num_draws,
                "epsilon": base.epsilon if self.epsilon is None else parse_pixel_fraction(self.epsilon),
            }
        )

    @property
    def words(self) -> str:
        """What is measured."""
        return self.row_name.replace("_", " ")

    @property
    def why_no_honest(self) -> str:
        """Of attacks without a radius."""
        if self.honest is not None:
            return ""
        return "an attack without a radius stops at the boundary of the draw it sees: no honest reading exists"

    @property
    def honest(self) -> Measure | None:
        """T1 with gradients averaged over draws; the worst case for AutoAttack; None for attacks without a radius.

        Attacks without a radius stop at the nearest boundary of the draw they see, so that on another draw they measure little more than
        clean accuracy, whatever the protocol: there is no honest reading of them.
        """
        if self.protocol != "T0":
            return self
        base = suite_row(self.suite, self.attack)
        entry = attack_entry(base.attack)
        if entry.name == "torchattacks_autoattack":
            return WorstCase(HONEST_SUITE)
        if not entry.bounded:
            return None
        if "T1" in base.protocols:
            return replace(self, protocol="T1", num_draws=base.num_draws)
        # EOT-PGD averages by itself, once its forwards see different draws.
        return replace(self, protocol="T1", num_draws=1 if entry.name == "torchattacks_eotpgd" else HONEST_DRAWS)


@dataclass(frozen=True)
class WorstCase(_Described):
    """Expected accuracy under the worst attack of each sample, unknown draw (T1): the headline of a suite."""

    suite: str

    @property
    def words(self) -> str:
        """What is measured."""
        return f"worst attack per image of suite {self.suite}"

    @property
    def protocol(self) -> str:
        """T1, for each image under its own worst attack."""
        return "worst"

    @property
    def honest(self) -> Measure | None:
        """It is the honest number."""
        return self


@dataclass(frozen=True)
class TransferAccuracy(_Described):
    """Accuracy of one network on examples that were made against another one.

    Attributes:
        attack: how the examples are made.
        other: key of the row whose network is the second one; `{row}` in it stands for the row's own key.
        made_on: `row`: examples of the row's network, scored on the other; `other`: the reverse.
    """

    attack: Accuracy
    other: str
    made_on: Literal["row", "other"] = "other"

    @property
    def row_name(self) -> str:
        """Name of the row in an evaluation's result."""
        return f"{self.attack.row_name} {'from' if self.made_on == 'other' else 'to'} {self.other.removeprefix('{row}/')}"

    @property
    def words(self) -> str:
        """What is measured."""
        return self.row_name.replace("_", " ")

    @property
    def protocol(self) -> str:
        """Of its attack."""
        return self.attack.protocol

    @property
    def why_no_honest(self) -> str:
        """The examples are another network's."""
        return "the attacker does not have the network that answers, so draws are not the question"

    @property
    def honest(self) -> Measure | None:
        """None: the attacker does not have the network that answers, so draws are not the question."""
        return None


@dataclass(frozen=True)
class Theory(_Described):
    """A quantity of `analysis.quantities`, as `rayndom analyse` measures it on a trained network.

    Attributes:
        name: of the quantity. parameters: that the item sets; its own elsewhere; sizes may be written as `8/255`.
        field: the number among its metrics, or empty for its series. other: key of the row with the second network, for quantities of two.
    """

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    field: str = ""
    other: str = ""

    @property
    def words(self) -> str:
        """What is measured."""
        return self.name.replace("_", " ")

    @property
    def title(self) -> str:
        """What is measured, with its parameters."""
        details = ", ".join(f"{name} {value}" for name, value in self.parameters.items())
        return f"{self.name} ({details})" if details else self.name

    @property
    def whole(self) -> Theory:
        """The measurement that its field is read from: cells of one quantity share it."""
        return replace(self, field="", other="")

    @property
    def honest(self) -> Measure | None:
        """The same quantity."""
        return self


@dataclass(frozen=True)
class Timing(_Described):
    """Time or memory of training or inference; it depends on the machine."""

    quantity: Literal["training_minutes", "epoch_seconds", "peak_memory_megabytes", "test_set_seconds"]

    @property
    def words(self) -> str:
        """What is measured."""
        return self.quantity.replace("_", " ")

    @property
    def title(self) -> str:
        """What is measured, by its name."""
        return self.quantity

    @property
    def whole(self) -> Timing:
        """Itself."""
        return self

    @property
    def honest(self) -> Measure | None:
        """The same quantity."""
        return self


Measure = Clean | Accuracy | WorstCase | TransferAccuracy | Theory | Timing


@functools.cache
def shipped_suite(name: str) -> Suite:
    """Return a shipped suite, read once."""
    return load_suite(name)


def suite_row(suite: str, attack: str) -> AttackItem:
    """Return one row of a shipped suite; an unknown name is a `UserError`."""
    rows = {item.name: item for item in shipped_suite(suite).attacks}
    if attack not in rows:
        raise unknown_name(f"attack of suite {suite!r}:", attack, rows)
    return rows[attack]
