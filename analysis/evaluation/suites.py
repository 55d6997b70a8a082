"""Suites: which attacks under which protocols, as data. A user's YAML file may extend one of them.

extends: quick
num_samples: 500
attacks:
  - {name: pgd_100, attack: pgd, parameters: {steps: 100}, protocols: [T1], num_draws: 20}
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from analysis.attacks.registry import attack_entry, parse_attack_parameters
from analysis.evaluation.protocols import ProtocolName, Scoring
from analysis.evaluation.studies import StudySettings
from models.configuration import Config
from models.errors import UserError, unknown_name
from models.plugins import files_of_plugins
from models.threat_model import Norm, PixelFraction, ThreatModel
from models.yaml_text import read_yaml

SUITE_FOLDER = Path(__file__).with_suffix("")
PAPER = "paper"
DEFAULT_NUM_DRAWS = 1
_LONGEST_NAME = 80
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_. =-]{0,78}[A-Za-z0-9])?")
_ROW_NAMES = ("clean",)  # rows that are no attacks


class AttackItem(Config):
    """One attack of a suite."""

    name: str = Field(description="Name of the row, unique in the suite: letters, digits, spaces and `_ - .`.")
    attack: str = Field(description="Name of the attack in the registry.")
    parameters: dict[str, Any] = Field(default_factory=dict, description="Its parameters.")
    deterministic_parameters: dict[str, Any] = Field(
        default_factory=dict, description="Parameters that replace those above where the model is deterministic."
    )
    l2_parameters: dict[str, Any] = Field(default_factory=dict, description="Parameters that replace those above under the norm l2.")
    models: Literal["all", "randomized", "deterministic", "finite"] = Field(
        "all", description="Which models the attack is meant for; `finite`: randomized ones whose draws are few enough to be enumerated."
    )
    protocols: tuple[ProtocolName, ...] = Field(("T1",), min_length=1, description="Protocols it is run under.")
    num_draws: int = Field(DEFAULT_NUM_DRAWS, ge=1, description="E, draws averaged in each gradient under T1.")
    num_samples: int | None = Field(None, ge=1, description="Use only the first n samples of the suite; none: all.")
    epsilon: PixelFraction | None = Field(None, ge=0, description="Radius, where it differs from the threat model's.")

    @model_validator(mode="before")
    @classmethod
    def _name_is_the_attack(cls, data: Any) -> Any:
        if isinstance(data, dict) and "name" not in data and "attack" in data:
            return {**data, "name": data["attack"]}
        return data

    @field_validator("name")
    @classmethod
    def _name_can_be_part_of_a_metric(cls, name: str) -> str:
        if not _NAME.fullmatch(name) or name in _ROW_NAMES:
            raise ValueError(
                f"an attack's name is at most {_LONGEST_NAME} letters, digits, spaces and _ - . = (it becomes part of metric names), "
                f"begins and ends with a letter or digit, and is not {' or '.join(map(repr, _ROW_NAMES))}"
            )
        return name

    @model_validator(mode="after")
    def _worst_draw_needs_unknown_draw(self) -> AttackItem:
        if "T3" in self.protocols and "T1" not in self.protocols:
            raise ValueError(f"{self.name}: T3 is computed from the scores of T1; list both")
        return self

    def parameters_for(self, randomized: bool, norm: Norm = "linf") -> dict[str, Any]:
        """Return the parameters for a randomized or a deterministic model under a norm."""
        parameters = dict(self.parameters)
        if not randomized:
            parameters |= self.deterministic_parameters
        return parameters | (self.l2_parameters if norm == "l2" else {})

    def is_for(self, randomized: bool, *, finite: bool = False) -> bool:
        """Return whether the attack is meant for a randomized, or a deterministic, model; `finite`: all of its draws are enumerated."""
        if self.models == "finite":
            return randomized and finite
        return self.models == "all" or (self.models == "randomized") == randomized

    def threat_model(self, base: ThreatModel) -> ThreatModel:
        """Return the threat model this attack works under."""
        return base if self.epsilon is None else ThreatModel(norm=base.norm, epsilon=self.epsilon)


class Suite(Config):
    """A named list of attacks and how they are scored."""

    name: str = Field(description="Name of the suite.")
    description: str = Field("", description="What it is for, in a sentence.")
    defences: tuple[str, ...] = Field((), description="Defences whose paper used these attacks; suite `paper` looks here.")
    num_samples: int | None = Field(None, ge=1, description="Test images used, class-balanced; none: all.")
    scoring: Scoring = Field(default_factory=Scoring, description="Draws.")
    attacks: tuple[AttackItem, ...] = Field(min_length=1, description="The attacks.")
    studies: StudySettings | None = Field(None, description="Extra blocks for the checks that need them; none: those checks are skipped.")

    @model_validator(mode="after")
    def _names_are_unique(self) -> Suite:
        names = [item.name for item in self.attacks]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"suite {self.name!r} has two attacks named {', '.join(sorted(twice))}")
        return self


def list_suites() -> list[str]:
    """Return the names of all suites that come with the package and with plug-ins."""
    return sorted({PAPER, *_suite_files()})


def _suite_files() -> dict[str, Path]:
    return {path.stem: path for path in (*files_of_plugins("suites"), *SUITE_FOLDER.glob("*.yaml"))}


def load_suite(suite: str | Path | Suite, defence: str | None = None) -> Suite:
    """Return a suite by name, by path of a YAML file, or as it is.

    Args:
        suite: `quick`, `standard`, `full`, `paper` (the suite of the paper that proposed `defence`), the name of any file in
            `analysis/evaluation/suites/` or of `suites/` in a plug-in, or a path that ends in `.yaml` or `.yml`.
        defence: name of the model's defence, for `paper`.

    Raises:
        UserError: no such suite or file, a file that does not describe one, or no paper for the defence.
    """
    if isinstance(suite, Suite):
        return suite
    if str(suite).endswith((".yaml", ".yml")):
        return _load_file(Path(suite))
    if suite == PAPER:
        return _paper_suite(defence)
    if suite not in list_suites():
        raise unknown_name("suite", str(suite), list_suites())
    return _load_file(_suite_files()[str(suite)])


def fitted_to_classes(items: Sequence[AttackItem], num_classes: int) -> tuple[list[AttackItem], list[str]]:
    """Return the attacks that work with K classes, others in the place of those that need more, and what was changed, in words.

    Targeted losses and ratios of logits need three or four classes; the margin does the same with two.
    """
    fitted: list[AttackItem] = []
    remarks = []
    for item in items:
        entry = attack_entry(item.attack)
        loss, plain_loss = ("dlr", "ce") if entry.free_parameters else ("difference_of_logits_ratio", "margin")
        if num_classes >= entry.min_classes and (num_classes >= 3 or item.parameters.get("loss") != loss):
            fitted.append(item)
            continue
        remark = f"attack {item.name!r} needs more than {num_classes} classes"
        if num_classes >= entry.min_classes:
            other = item.model_copy(update={"parameters": {**item.parameters, "loss": plain_loss}})
        elif entry.instead is not None:
            other = _by_another(item, entry.instead)
        else:
            remarks.append(f"{remark} and is left out")
            continue
        twins = [each for each in (*items, *fitted) if each.model_copy(update={"name": other.name}) == other]
        names = {each.name for each in (*items, *fitted) if each is not item}
        if twins:
            remarks.append(f"{remark}; {twins[0].name!r} does the same and stays")
        else:
            fitted.append(other if other.name not in names else other.model_copy(update={"name": item.name}))
            remarks.append(f"{remark}; {fitted[-1].name!r} ({other.attack}) takes its place")
    return fitted, remarks


def _by_another(item: AttackItem, attack: str) -> AttackItem:
    """Return the item with another attack, which takes over the parameters that it has."""
    known = attack_entry(attack).parameters.model_fields
    kept = {
        name: {key: value for key, value in getattr(item, name).items() if key in known}
        for name in ("parameters", "deterministic_parameters", "l2_parameters")
    }
    return item.model_copy(update={"attack": attack, "name": item.name.replace(item.attack, attack), **kept})


def with_surrogate(suite: Suite, folder: Path, weights: str) -> Suite:
    """Return the suite with a transfer attack from another exported model: under C10 no white-box attack may be weaker.

    Args:
        folder: of the surrogate. weights: its hash, so that records of a surrogate that was trained again are not mistaken for these.
    """
    parameters = {"surrogate": str(folder), "weights": weights, "steps": 50}
    item = AttackItem(name="transfer_surrogate", attack="transfer_surrogate", parameters=parameters)
    return suite.model_copy(update={"name": f"{suite.name}_with_surrogate", "attacks": (*suite.attacks, item)})


def _paper_suite(defence: str | None) -> Suite:
    papers = {path.stem: _load_file(path) for path in sorted(SUITE_FOLDER.glob("*.yaml"))}
    papers = {name: suite for name, suite in papers.items() if suite.defences}
    names = ", ".join(sorted(papers))
    if defence is None:
        raise UserError(f"suite 'paper' depends on the defence, which is not known here: pass `defence`, or one of {names}")
    fitting = [suite for suite in papers.values() if defence in suite.defences]
    if len(fitting) == 1:
        return fitting[0]
    if not fitting:
        known = {name for suite in papers.values() for name in suite.defences}
        raise UserError(
            f"{unknown_name('defence with a paper suite', defence, known)} A baseline has no paper of its own: choose one of {names}."
        )
    raise UserError(f"several papers evaluate {defence!r}: choose one of {', '.join(suite.name for suite in fitting)}")


def _load_file(path: Path, seen: tuple[Path, ...] = ()) -> Suite:
    path = path.resolve()
    if path in seen:
        raise UserError(f"suite {path} extends itself")
    data = read_yaml(path)
    data = {"name": path.stem, **data}
    parent = data.pop("extends", None)
    if parent is not None:
        data = _extended(_parent(str(parent), path, seen), data)
    try:
        suite = Suite(**data)
        for item in suite.attacks:
            for randomized in (True, False):
                for norm in ("linf", "l2"):
                    parse_attack_parameters(item.attack, item.parameters_for(randomized, norm))
        if suite.studies is not None:
            parse_attack_parameters(suite.studies.attack, {"steps": suite.studies.steps})
    except ValidationError as error:
        details = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or 'suite'}: {item['msg'].removeprefix('Value error, ')} (got {item['input']!r})"
            for item in error.errors()
        )
        raise UserError(f"the suite {path}: {details}") from None
    except UserError as error:
        raise UserError(f"the suite {path}: {error}") from None
    return suite


def _parent(name: str, path: Path, seen: tuple[Path, ...]) -> Suite:
    if name.endswith((".yaml", ".yml")):
        return _load_file(path.parent / name, (*seen, path))
    if name not in list_suites() or name == PAPER:
        raise UserError(f"the suite {path}: {unknown_name('suite', name, set(list_suites()) - {PAPER})}")
    return _load_file(SUITE_FOLDER / f"{name}.yaml", (*seen, path))


def _extended(parent: Suite, data: dict[str, Any]) -> dict[str, Any]:
    """Return the parent's data with the child's over it; attacks are added, and replaced where the name is the same."""
    merged = parent.model_dump(exclude={"defences"})
    own = {**data}
    items = {item["name"]: item for item in merged["attacks"]}
    for item in own.pop("attacks", []):
        if isinstance(item, dict):
            items[str(item.get("name", item.get("attack")))] = item
    scoring = {**merged.pop("scoring"), **(own.pop("scoring", None) or {})}
    return {**merged, **own, "scoring": scoring, "attacks": list(items.values())}
