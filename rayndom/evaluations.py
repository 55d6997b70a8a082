"""`evaluate`: how robust a model is, from Python."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas
from torch import nn

from analysis.reporting.conclusion import conclusion
from analysis.result import EvaluationResult
from rayndom.notebook import as_html
from rayndom.runs import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from orchestration.evaluating.evaluation_run import EvaluationSettings


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation found.

    Attributes:
        name: of the model. result: everything that was found. page: folder with `report.html`; None: nothing was kept.
    """

    name: str
    result: EvaluationResult
    page: Path | None = None

    @property
    def conclusion(self) -> str:
        """One sentence: what the numbers say, and what they license."""
        return conclusion(self.name, self.result)

    @property
    def frame(self) -> pandas.DataFrame:
        """A row for each attack and protocol."""
        return pandas.DataFrame(self.result.frame())

    @property
    def checks(self) -> pandas.DataFrame:
        """A row for each check: its verdict, what was seen, what to do."""
        rows = [(each.id, each.title, each.status.value, each.explanation, each.advice) for each in self.result.verdicts]
        return pandas.DataFrame(rows, columns=["check", "title", "verdict", "seen", "advice"])

    @property
    def figures(self) -> dict[str, Figure]:
        """The figures of the page, by name."""
        from analysis.reporting.figures import figures_of

        return figures_of(self.result)

    def _repr_html_(self) -> str:
        shown = self.frame[["attack", "protocol", "accuracy", "low", "high"]]
        facts = {"conclusion": self.conclusion} | ({} if self.page is None else {"page": self.page / "report.html"})
        return as_html(self.name, facts, shown)


def evaluate(
    target: str | Path | Run | nn.Module,
    *,
    suite: str = "quick",
    data: str | None = None,
    weights: str | Path | None = None,
    epsilon: float | str | None = None,
    norm: str | None = None,
    num_samples: int | None = None,
    num_draws: int | None = None,
    seed: int = 0,
    home: str | Path | None = None,
    data_root: str | Path | None = None,
    workers: int | None = 1,
    address: str | None = None,
) -> Evaluated:
    """Attack a model under named protocols and check whether the numbers can be believed, as `rayndom evaluate` does.

    Args:
        target: a `Run`, what the command takes, or a module of yours that takes pixels in [0,1] and answers with logits: its evaluation
            stays in memory, that of everything else is kept in the home and in MLflow.
        suite: a name of `rayndom list suites`, or a YAML file. data: data set of test images, for models that do not say.
        weights: of a model that Rayndom did not train and that is named. epsilon, norm: another threat model, e.g. "8/255".
        num_samples: test images. num_draws: draws that score; None: the suite's. seed: root of all seeds.
        home, data_root, address: see `train`. workers: Ray workers; 1: this process, None: as many as pay.

    Raises:
        UserError: a mistake, found before anything starts.
    """
    from analysis.evaluation.tasks import check_counts
    from orchestration.evaluating.evaluation_report import keep_at_its_run, suite_name
    from orchestration.evaluating.evaluation_run import EvaluationSettings, prepare, run_jobs, threat_model_of
    from orchestration.evaluating.external_targets import external_from_flags, named_data
    from orchestration.home import Workplace
    from orchestration.trained_models.targets import resolve_target

    check_counts(workers=workers)
    named = named_data(data, None, None)
    place = Workplace.locate(home, data_root, address)
    if isinstance(target, nn.Module):
        settings = EvaluationSettings(suite, threat_model_of(None, norm, epsilon), num_samples, num_draws, named, seed)
        return _of_module(target, settings, place.data_root)
    words = str(target.folder.model if isinstance(target, Run) else target)
    found = external_from_flags(words, None if weights is None else str(weights), named, place) or resolve_target(words, place.home)
    settings = EvaluationSettings(suite, threat_model_of(found, norm, epsilon), num_samples, num_draws, named, seed)
    job = prepare(found.name, found, settings, place)
    if found.external is not None:
        found.external.keep(place.home)
    run_jobs([job], workers=workers, address=address)
    _, page = keep_at_its_run(job, job.result(), suite_name(suite), place.home)
    return Evaluated(found.name, job.result(), page)


def _of_module(model: nn.Module, settings: EvaluationSettings, data_root: Path | None) -> Evaluated:
    from analysis.evaluate import evaluate as evaluate_module
    from models.errors import UserError
    from orchestration.evaluating.evaluation_run import test_images

    if settings.data is None:
        raise UserError('a module does not say what its images are; name the data set, e.g. data="cifar10"')
    x, y = test_images(settings.data, data_root, settings.num_samples)
    found = evaluate_module(
        model, x, y, suite=settings.suite, threat_model=settings.threat_model, num_draws=settings.num_draws, seed=settings.seed
    )
    return Evaluated(type(model).__name__, found)
