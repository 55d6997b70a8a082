"""A finished evaluation as it is kept beside its records: what was found, with what was asked and the keys of the records it rests on.

`result-<suite>.json` has the summary, `settings` (the suite itself, threat model, data, numbers of samples and draws, seed) and `records`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from analysis.evaluate import EvaluationResult, collect
from analysis.evaluation.records import Record, at_places_of, read_records
from analysis.evaluation.suites import Suite, list_suites
from analysis.statistics.stopping import Looks
from models.errors import UserError
from models.files import write_text
from models.json_text import read_json
from models.threat_model import ThreatModel
from orchestration.evaluating.evaluation_run import RECORDS_FILE, EvaluationSettings, Job, Until, prepare
from orchestration.home import Workplace, readable
from orchestration.trained_models.details import check_summary
from orchestration.trained_models.targets import Target

Summary = dict[str, Any]
_RESULT = "result-"


def as_kept(job: Job, summary: Summary) -> Summary:
    """Return the summary of a job with what the evaluation was: its settings and the keys of its records."""
    settings = job.settings
    asked = {
        "suite": settings.suite.model_dump(mode="json") if isinstance(settings.suite, Suite) else settings.suite,
        "threat_model": None if settings.threat_model is None else settings.threat_model.model_dump(mode="json"),
        "data": None if settings.data is None else settings.data.model_dump(mode="json"),
        "num_samples": settings.num_samples,
        "num_draws": settings.num_draws,
        "seed": settings.seed,
        "until": None if settings.until is None else settings.until.to_json(),
    }
    return {**summary, "settings": asked, "records": job.keys}


def write_kept(folder: Path, summary: Summary) -> Path:
    """Write a summary from `as_kept` beside the records; return the file."""
    path = folder / f"{_RESULT}{summary['suite']}.json"
    write_text(path, json.dumps(summary, indent=2, default=str))
    return path


def read_kept(folder: Path) -> dict[str, Summary]:
    """Return the summaries in a folder of records, by suite; one that cannot be read is skipped with a warning."""
    return dict(readable(_read_summary, sorted(folder.glob(f"{_RESULT}*.json"))))


def _read_summary(path: Path) -> tuple[str, Summary]:
    summary = read_json(path)
    check_summary(summary, str(path))
    return path.stem.removeprefix(_RESULT), summary


def result_of(name: str, summary: Summary, folder: Path) -> EvaluationResult:
    """Return a kept evaluation from its records.

    Args:
        name: of the model, for the error. summary: with `settings` and `records`. folder: of the records.

    Raises:
        UserError: some of its records are not there.
    """
    known = read_records(folder / RECORDS_FILE)
    missing = sum(key not in known for key in summary["records"])
    if missing:
        raise UserError(
            f"the records of {name} are not all in {folder}: {missing} of {len(summary['records'])} are missing; "
            "`rayndom evaluate` makes them"
        )
    records = at_places_of([known[key] for key in summary["records"]], summary["settings"]["suite"]["name"])
    return collect(records, looks=looks_of(summary))


def looks_of(summary: Summary) -> Looks | None:
    """Return where a kept evaluation could be looked at while images were added; None: nothing was added."""
    until = summary["settings"].get("until")  # earlier versions do not have it
    return None if until is None else Until.from_json(until).looks


def search_result(name: str, target: Target, summary: Summary, folder: Path, workplace: Workplace) -> EvaluationResult:
    """Return an evaluation whose summary does not say which records are its own, as those of earlier versions do not.

    It is planned again under all conditions that occur in the records, until the headline is the one that was kept: of two evaluations
    with equal headlines the first is found.

    Raises:
        UserError: its records are not in this home, or the data set is missing.
    """
    suite = summary["suite"]
    if suite not in list_suites():
        raise UserError(f"suite {suite} was given by a file; only suites of `rayndom list suites` can be planned again")
    num_samples = max((row["num_samples"] for row in summary["rows"]), default=0)
    for conditions in _conditions(read_records(folder / RECORDS_FILE)):
        for samples, draws in itertools.product((None, num_samples), (None, conditions["num_draws"])):
            settings = EvaluationSettings(suite, ThreatModel(**conditions["threat_model"]), samples, draws, seed=conditions["seed"])
            job = prepare(name, target, settings, workplace)
            if not job.pending and _is_kept(job.result(), summary):
                return job.result()
    raise UserError(f"the records of {name} are not all in {folder}; `rayndom evaluate` makes them")


def _conditions(records: Mapping[str, Record]) -> list[dict[str, Any]]:
    """Return the seeds, threat models and numbers of draws that occur in records."""
    found: dict[str, dict[str, Any]] = {}
    for record in records.values():
        header = record["header"]
        conditions = {
            "seed": header["seed"],
            "threat_model": header["threat_model"],
            "num_draws": header["scoring"]["num_evaluation_draws"],
        }
        found.setdefault(json.dumps(conditions, sort_keys=True), conditions)
    return list(found.values())


def _is_kept(result: EvaluationResult, summary: Summary) -> bool:
    """Return whether a result has the headline that was kept."""
    if result.headline is None or summary["headline"] is None:
        return result.headline is None and summary["headline"] is None
    return result.headline.value == summary["headline"]["accuracy"] and result.headline.num_samples == summary["headline"]["num_samples"]
