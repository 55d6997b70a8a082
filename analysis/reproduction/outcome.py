"""What was found for an item at one scale: a value per cell and reading, why cells are empty, and which training each row rests on.

It is what a reproduction stores and all that rendering reads: tables, figures and pages are functions of it and of the item. Everything
in it is plain, so that it survives as JSON.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from analysis.reproduction.scale import Scale
from models.errors import UserError
from models.json_text import first_problem

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Reading:
    """One measured number or series.

    Attributes:
        value: in the unit of the column (percent for `%`), None for a series. low, high: its 95 % interval, where it has one.
        how: attack, radius, draws and samples in words. protocol: T0 to T4, or empty.
        num_samples, num_draws: what it was measured on.
        series: what a figure draws, by name, as nested lists of numbers. `values`: of a distribution or histogram. `grid`, `x`, `y`: of a
            landscape, `grid[i][j]` at `y[i]` and `x[j]` (several: `grids`, a list, with `labels`).
            `ids` and `correct`: of an accuracy, the images and the share of draws on which each is right; rows are then compared in pairs.
        failed_checks: keys of failed checks of the evaluation, e.g. `C7`: a number with any must not be believed.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    how: str = ""
    protocol: str = ""
    num_samples: int | None = None
    num_draws: int | None = None
    series: Mapping[str, Any] = field(default_factory=dict)
    failed_checks: tuple[str, ...] = ()


@dataclass(frozen=True)
class CellOutcome:
    """What was found for one cell.

    Attributes:
        row, column: keys. paper: the number under the paper's protocol. honest: its honest counterpart; None where there is none, and
            where the paper's number is the honest one.
        run: key of its training in `ItemOutcome.runs`, empty for quoted cells.
        reason: why there is no number, in words; empty if there is one.
        expected: False where no number can exist, e.g. the averaged answer of a deterministic network; `reason` says why.
    """

    row: str
    column: str
    paper: Reading | None = None
    honest: Reading | None = None
    run: str = ""
    reason: str = ""
    expected: bool = True


@dataclass(frozen=True)
class CheckOutcome:
    """One check of an evaluation: its key (`C1` to `C21`), title, verdict (`PASS`, `WARN`, `FAIL`, ...), what was seen, what to do."""

    key: str
    title: str
    verdict: str
    seen: str
    advice: str = ""


@dataclass(frozen=True)
class RunOutcome:
    """One training that cells rest on.

    Attributes:
        fingerprint: of its experiment. recipe, overrides: what it is. row, group: where it stands in the item.
        state: `finished`, or why not, e.g. `not run`, `failed: ...`.
        epochs: trained. seconds: of training, where known.
        mlflow_run: id. environment: commit, hardware and packages as recorded when it was trained.
        checks: of its evaluations, by suite. conclusion: one sentence per suite.
        configuration: the whole experiment, flat. evaluation_seconds: of all blocks, by suite.
    """

    fingerprint: str
    recipe: str
    overrides: tuple[str, ...] = ()
    row: str = ""
    group: str = ""
    state: str = "not run"
    epochs: int | None = None
    seconds: float | None = None
    mlflow_run: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)
    checks: Mapping[str, tuple[CheckOutcome, ...]] = field(default_factory=dict)
    conclusion: Mapping[str, str] = field(default_factory=dict)
    configuration: Mapping[str, Any] = field(default_factory=dict)
    evaluation_seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def check_titles(self) -> dict[str, str]:
        """Titles of the checks of its evaluations, by key."""
        return {check.key: check.title for found in self.checks.values() for check in found}

    @property
    def verdict_counts(self) -> dict[str, dict[str, int]]:
        """Per suite, how many checks passed, warned, failed."""
        return {suite: dict(Counter(check.verdict for check in found)) for suite, found in self.checks.items()}


@dataclass(frozen=True)
class ItemOutcome:
    """What was found for a table or figure at one scale.

    Attributes:
        item: its name. scale: at which it was run. cells: by (row, column), in the item's order. runs: trainings by key `row` or
            `row|group`.
    """

    item: str
    scale: Scale
    cells: tuple[CellOutcome, ...]
    runs: Mapping[str, RunOutcome] = field(default_factory=dict)

    def cell(self, row: str, column: str) -> CellOutcome | None:
        """Return what was found for a cell; None if the item has no such cell."""
        return next((cell for cell in self.cells if (cell.row, cell.column) == (row, column)), None)

    @property
    def complete(self) -> bool:
        """Whether every cell that is to be measured has a number, those apart that cannot have one."""
        return all(cell.paper is not None or not cell.run or not cell.expected for cell in self.cells)

    def to_json(self) -> str:
        """Return it as JSON."""
        return json.dumps({"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str | Path = "outcome") -> ItemOutcome:
        """Read what `to_json` wrote.

        Raises:
            UserError: it is damaged, or of another version.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _damaged(source, str(error) or "nested too deeply") from None
        if not isinstance(data, dict):
            raise _damaged(source, "it should hold an object of named values")
        return cls.from_content(data, source)

    @classmethod
    def from_content(cls, content: Mapping[str, Any], source: str | Path = "outcome") -> ItemOutcome:
        """Read the object that `to_json` wrote; raises as `from_json`."""
        if content.get("format_version") != FORMAT_VERSION:
            version = content.get("format_version")
            if type(version) is int:
                raise UserError(f"{source} was written by another version of Rayndom; run `rayndom reproduce` again")
            raise _damaged(source, f"'format_version' is {version!r:.50}")
        try:
            return _ADAPTER.validate_python({name: value for name, value in content.items() if name != "format_version"})
        except ValidationError as error:
            raise _damaged(source, first_problem(error)) from None


def _damaged(source: str | Path, problem: str) -> UserError:
    return UserError(f"{source} is damaged ({problem}); delete it, `rayndom reproduce` writes it again")


_ADAPTER = TypeAdapter(ItemOutcome)
