"""What two or more trained models differ in: their parameters, their metrics, and whether their robustness can be told apart."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.checks.evidence import Status
from analysis.evaluation.protocols import ProtocolName
from analysis.reporting.comparison import compare
from analysis.result import EvaluationResult, is_number_of
from analysis.statistics import Estimate
from models.errors import UserError
from orchestration.evaluating.evaluation_report import suite_name
from orchestration.evaluating.stored_evaluation import read_kept, result_of, search_result
from orchestration.experiment import flatten
from orchestration.home import Home, Workplace
from orchestration.trained_models.targets import Target, resolve_target

PROTOCOLS: tuple[ProtocolName, ...] = ("T0", "T1", "T2")
SEEDS = " + "
"""Joins the labels of the training seeds of one method."""

_SEEN_FROM_BELOW = {
    "first is better": "below {reference}",
    "second is better": "above {reference}",
    "first seems better": "seems below {reference}",
    "second seems better": "seems above {reference}",
}
_UNTOLD = ("name", "description")

Row = dict[str, Any]


@dataclass(frozen=True)
class StoredRun:
    """A finished run with what is known of it.

    Attributes:
        label: how tables name it, different for each. target: the model. evaluations: stored results by suite.
        records_folder: of its evaluations in this home.
    """

    label: str
    target: Target
    evaluations: dict[str, dict[str, Any]]
    records_folder: Path

    @property
    def parameters(self) -> dict[str, Any]:
        """All fields of the experiment by dotted name; of a model that was saved by hand, how its network is built."""
        if self.target.experiment is None:
            return flatten({"model": self.target.config["model"]})
        return {name: value for name, value in self.target.experiment.flatten().items() if name not in _UNTOLD}

    @property
    def training(self) -> dict[str, Any]:
        """Metrics of the selected epoch, that epoch, and the number of epochs."""
        details = self.target.config["details"].get("training", {})
        return {key: value for key, value in details.items() if key != "metrics"} | details.get("metrics", {})


def find_runs(names: Sequence[str], home: Home) -> list[StoredRun]:
    """Return the runs that `names` name: fingerprints, MLflow run ids, exported folders, or recipes with one finished run.

    Raises:
        UserError: fewer than two, one named twice, none of that name, or a recipe with several finished runs.
    """
    if len(names) < 2:
        raise UserError("compare needs at least two runs")
    targets = [resolve_target(name, home) for name in names]
    hashes = [target.checkpoint() for target in targets]
    for (i, first), (j, second) in itertools.combinations(enumerate(hashes), 2):
        if first == second:
            raise UserError(f"{names[i]} and {names[j]} are the same model")
    titles = [_title(name, target) for name, target in zip(names, targets, strict=True)]
    runs = []
    for name, target, title, checkpoint in zip(names, targets, titles, hashes, strict=True):
        if titles.count(title) > 1 or not title:
            title = f"{title} {target.experiment.fingerprint[:6] if target.experiment else name}".strip()
        folder = target.records_folder(home, checkpoint)
        runs.append(StoredRun(title, target, _stored_evaluations(folder, target), folder))
    return runs


def _title(name: str, target: Target) -> str:
    if target.external is not None:
        return target.external.name
    return target.experiment.name if target.experiment else Path(name).name


def _stored_evaluations(folder: Path, target: Target) -> dict[str, dict[str, Any]]:
    found = read_kept(folder)
    kept = target.config["details"].get("evaluation")
    if kept is not None:
        found.setdefault(suite_name(kept["suite"]), kept)
    return found


def parameter_rows(runs: Sequence[StoredRun], *, everything: bool) -> list[Row]:
    """Return one row per parameter with its value in each run; only those that differ unless `everything` is asked for."""
    known = [run.parameters for run in runs]
    rows = []
    for name in dict.fromkeys(itertools.chain(*known)):
        values = [parameters.get(name) for parameters in known]
        if everything or any(value != values[0] for value in values):
            rows.append({"parameter": name} | {run.label: value for run, value in zip(runs, values, strict=True)})
    return rows


def metric_rows(runs: Sequence[StoredRun], *, everything: bool) -> list[Row]:
    """Return one row per metric: on validation images at the selected epoch, then on test images per suite with 95 % intervals.

    Test accuracies are `Estimate`s, on clean images and under the worst attack of the suite for each protocol; `everything` adds the
    other metrics of the selected epoch and each attack for itself.
    """
    rows = []
    names = ["selected_epoch", "validation/clean_accuracy", "validation/robust_accuracy"]
    if everything:
        names = list(dict.fromkeys([*names, *itertools.chain(*(run.training for run in runs))]))
    for name in names:
        rows.append({"metric": name} | {run.label: run.training.get(name) for run in runs})
    for suite in dict.fromkeys(itertools.chain(*(run.evaluations for run in runs))):
        bases = {run.label: run.evaluations[suite].get("basis") for run in runs if suite in run.evaluations}
        if any(bases.values()):  # earlier versions did not keep it
            rows.append({"metric": f"test/{suite}/basis"} | {run.label: bases.get(run.label) for run in runs})
        accuracies = [_accuracies(run.evaluations.get(suite), everything=everything) for run in runs]
        for name in dict.fromkeys(itertools.chain(*accuracies)):
            values = [known.get(name) for known in accuracies]
            rows.append({"metric": f"test/{suite}/{name}"} | {run.label: value for run, value in zip(runs, values, strict=True)})
    return rows


def standing_rows(runs: Sequence[StoredRun], pairs: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """Return one row per run and suite: its accuracies, and whether it can be told apart from the first run.

    Args:
        pairs: what `paired_rows` returned.

    Returns:
        The rows, and sentences on why each answer is what it is.
    """
    rows: list[Row] = []
    reasons: dict[str, list[str]] = {}
    reference = runs[0].label
    suites: list[str | None] = list(dict.fromkeys(itertools.chain(*(run.evaluations for run in runs))))
    for suite in suites or [None]:
        for run in runs:
            accuracies = _accuracies(run.evaluations.get(suite) if suite else None, everything=False)
            row: Row = {"run": run.label, "suite": suite}
            row |= {"clean": accuracies.get("clean"), "worst attack per sample T1": accuracies.get("worst attack per sample T1")}
            row |= {f"{reference} minus it": None, "p (Holm)": None, "answer": "the reference" if run is runs[0] else None}
            pair = next((pair for pair in pairs if pair["suite"] == suite and _is_pair(pair, reference, run.label)), None)
            if pair is not None:
                row |= {f"{reference} minus it": pair["difference"], "p (Holm)": pair["p (Holm)"]}
                row["answer"] = _SEEN_FROM_BELOW.get(pair["answer"], "{answer}").format(reference=reference, answer=pair["answer"])
                reasons.setdefault(f"{row['answer']}: {pair['reason']}", []).append(run.label)
            row["basis"] = run.evaluations[suite].get("basis") if suite in run.evaluations else None
            rows.append(row)
    return rows, [f"{', '.join(dict.fromkeys(labels))}: {reason}" for reason, labels in reasons.items()]


def _is_pair(pair: Row, first: str, second: str) -> bool:
    return first in pair["first"].split(SEEDS) and second in pair["second"].split(SEEDS)


def marks(runs: Sequence[StoredRun]) -> list[str]:
    """Return a sentence for each stored evaluation that must not be believed or is not finished."""
    said = []
    for run in runs:
        for suite, summary in run.evaluations.items():
            failed = [f"{verdict['id']} ({verdict['title']})" for verdict in summary["verdicts"] if verdict["verdict"] == Status.FAIL.value]
            if summary["marked"]:
                said.append(f"{run.label}, suite {suite}: do not quote these numbers, {', '.join(failed)} failed")
            if not summary["finished"]:
                said.append(f"{run.label}, suite {suite}: not finished")
    return said


def _accuracies(summary: dict[str, Any] | None, *, everything: bool) -> dict[str, Estimate]:
    if summary is None:
        return {}
    rows, marked = summary["rows"], summary["marked"]
    found: dict[str, Estimate] = {}
    clean = [row for row in rows if row["attack"] == "clean" and is_number_of(row["protocol"], "T1")]
    if clean:
        found["clean"] = _estimate(clean[0], marked)
    for protocol in PROTOCOLS:
        attacked = [row for row in rows if row["attack"] != "clean" and row["in_threat_model"] and is_number_of(row["protocol"], protocol)]
        if attacked:
            found[f"worst attack {protocol}"] = _estimate(min(attacked, key=lambda row: row["accuracy"]), marked)
    headline = summary["headline"]
    if headline is not None:
        found["worst attack per sample T1"] = _estimate(headline, marked)
    if everything:
        found |= {f"{row['attack']} {row['protocol']}": _estimate(row, marked) for row in rows if row["attack"] != "clean"}
    return found


def _estimate(row: dict[str, Any], marked: bool) -> Estimate:
    return Estimate(
        value=row["accuracy"],
        low=row["low"],
        high=row["high"],
        standard_error=row.get("standard_error", float("nan")),
        num_samples=row["num_samples"],
        num_draws=row["num_draws"],
        exact=row.get("exact", False),
        method=row.get("interval", ""),
        shortage=row.get("shortage") or "",
        needed_draws=row.get("needed_draws"),
        needed_samples=row.get("needed_samples"),
        marked=marked,
    )


def paired_rows(runs: Sequence[StoredRun], workplace: Workplace) -> tuple[list[Row], list[str]]:
    """Compare the runs pair by pair on the samples that their stored evaluations share, suite by suite.

    Runs that differ in nothing but the seed are one method with several training seeds.

    Returns:
        One row per pair and suite, and sentences on what could not be compared.
    """
    rows: list[Row] = []
    notes: list[str] = []
    suites = [suite for suite in runs[0].evaluations if all(suite in run.evaluations for run in runs)]
    if not suites:
        without = [run.label for run in runs if not run.evaluations]
        which = f" ({', '.join(without)}: none at all)" if without else ""
        return [], [f"no suite has been run on all of them{which}: `rayndom evaluate RUN --suite quick` does"]
    for suite in suites:
        try:
            results = {run.label: _result(run, suite, workplace, notes) for run in runs}
            rows += [{"suite": suite} | pair.row() for pair in compare(_by_method(runs, results))]
        except UserError as error:
            notes.append(f"suite {suite}: no paired comparison: {error}")
    return rows, notes


def _by_method(runs: Sequence[StoredRun], results: dict[str, EvaluationResult]) -> dict[str, list[EvaluationResult]]:
    methods: dict[str, list[StoredRun]] = {}
    for run in runs:
        experiment = run.target.experiment
        seedless = {} if experiment is None else {name: value for name, value in experiment.scientific().items() if name != "seed"}
        methods.setdefault(json.dumps(seedless, sort_keys=True) if seedless else run.label, []).append(run)
    if len(methods) == 1:  # seeds of one method: there is nothing but checkpoints to compare
        return {label: [result] for label, result in results.items()}
    return {SEEDS.join(run.label for run in group): [results[run.label] for run in group] for group in methods.values()}


def _result(run: StoredRun, suite: str, workplace: Workplace, notes: list[str]) -> EvaluationResult:
    """Return the stored evaluation of a suite from its records; a guess at which are its own is noted.

    Raises:
        UserError: its records are not in this home, or, for one of an earlier version, the data set is missing.
    """
    summary = run.evaluations[suite]
    if "records" in summary:
        return result_of(run.label, summary, run.records_folder)
    result = search_result(run.label, run.target, summary, run.records_folder, workplace)
    notes.append(
        f"{run.label}, suite {suite}: evaluated by an earlier version, which did not keep what was asked; taken for seed "
        f"{result.header['seed']}, {result.header['threat_model']['norm']} {result.header['threat_model']['epsilon']:.4g} by its headline. "
        "`rayndom evaluate` keeps it, from the same records"
    )
    return result
