"""`sweep`: a search from Python."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas

from orchestration.home import Home, Workplace
from orchestration.run_folder import RunFolder
from orchestration.sweeping.config import SweepConfig
from rayndom.notebook import as_html, as_overrides
from rayndom.runs import Run

if TYPE_CHECKING:
    import optuna


@dataclass(frozen=True)
class Swept:
    """A finished sweep.

    Attributes:
        config: what was searched. summary: what `rayndom sweep --json` prints. home: where it lies.
    """

    config: SweepConfig
    summary: dict[str, Any]
    home: Home

    @property
    def study(self) -> optuna.Study:
        """Optuna's study, for its own plots."""
        from orchestration.sweeping.config import sweep_key
        from orchestration.sweeping.study import open_study

        return open_study(self.config, self.home.sweep(sweep_key(self.config)))

    @property
    def trials(self) -> pandas.DataFrame:
        """A row for each trial: its values, how it ended, its objectives."""
        rows = []
        for trial in self.study.trials:
            row = {"trial": trial.number, "state": trial.state.name.lower()} | trial.user_attrs.get("values", {})
            values = trial.values or [None] * len(self.config.objectives)
            rows.append(row | dict(zip((objective.metric for objective in self.config.objectives), values, strict=True)))
        return pandas.DataFrame(rows)

    @property
    def winner(self) -> Run:
        """The training that won on validation images."""
        folder = RunFolder(self.home.run(self.summary["winner_fingerprint"]))
        return Run(folder.read_config(), folder)

    @property
    def plots(self) -> list[Path]:
        """Plots of the search, as PNG files."""
        return [Path(plot) for plot in self.summary["plots"]]

    def _repr_html_(self) -> str:
        facts = {"winner": f"trial {self.summary['winner']} ({self.summary['winner_fingerprint']})"}
        return as_html(f"sweep {self.config.name}", facts | self.summary.get("evaluation", {}), self.trials)


def sweep(
    name: str,
    fields: dict[str, Any] | None = None,
    *,
    evaluate: bool = True,
    home: str | Path | None = None,
    data_root: str | Path | None = None,
    address: str | None = None,
    wait: bool = False,
    **budget: Any,
) -> Swept:
    """Run a sweep to its end, or go on with it, as `rayndom sweep` does.

    Args:
        name: a shipped sweep, a recipe (the search space of its defence), or a YAML file.
        fields: of the sweep, e.g. `{"settings.training.epochs": 2}`. budget: fields that are words, e.g. `num_trials=4`.
        evaluate: also evaluate the winner and the baselines. home, data_root, address, wait: see `train`.

    Raises:
        UserError: a mistake, found before anything starts.
    """
    from orchestration.sweeping.loading import load_sweep
    from orchestration.sweeping.sweep import run_sweep

    config = load_sweep(name, as_overrides({**(fields or {}), **budget}))
    place = Workplace.locate(home, data_root, address)
    return Swept(config, run_sweep(config, place, evaluate=evaluate, wait=wait), place.home)
