"""How often each check fails on honest models (false alarms), and on which broken ones (detection).

    python -m benchmarks.checks --records FILE [--suite standard] [--seeds 15] [--samples 60] [--only honest|broken] [--names TEXT ...]

Every model is drawn from a family by its seed and trained in about a second on 8 x 8 digits (`benchmarks.honest_models`,
`benchmarks.broken_models`). Each evaluation is one JSON line of FILE; the same command goes on where a killed one was: after a change of
models or checks start another file. The tables hold what the file holds, with one-sided 95 % Clopper-Pearson bounds. Where a network
answers behind a trick, an attack with that network's gradients (BPDA) bounds the truth from above: a broken model counts as fooling an
evaluation where what is reported is above that bound by more than 5 points, or, where no one number is true, above 1 %. C19 is left out:
it looks at the installation, not at a model.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import stats
from torch import nn

from analysis.evaluate import evaluate
from analysis.evaluation.suites import AttackItem, Suite, load_suite
from benchmarks.broken_models import BROKEN, Around, BrokenModel, Detector, NegatedGradients, OneHot, QueryDetection, UnderAutograd
from benchmarks.honest_models import HONEST, HonestModel, Scaled, Subject
from models.errors import UserError

Line = dict[str, Any]
_TRUTH = Suite(name="truth", attacks=(AttackItem(name="apgd_margin", attack="apgd_margin", parameters={"steps": 50, "restarts": 2}),))
_LEVEL = 0.95
_SAME = (Scaled, OneHot, QueryDetection, UnderAutograd, Detector, NegatedGradients)  # tricks that leave the answers of the network behind
_FOOLED = 0.05
_NOTHING = 0.01


@dataclass(frozen=True)
class Case:
    """One evaluation."""

    family: str
    model: HonestModel | BrokenModel
    seed: int

    @property
    def key(self) -> tuple[str, str, int]:
        """What tells it from the others of a file."""
        return self.family, self.model.name, self.seed


def cases(num_seeds: int, only: str | None) -> Iterator[Case]:
    """Yield all evaluations, seed after seed."""
    for seed in range(num_seeds):
        for honest in HONEST if only != "broken" else ():
            yield Case("honest", honest, seed)
        for broken in BROKEN if only != "honest" else ():
            yield Case("broken", broken, seed)


def without_calibration(name: str) -> Suite:
    """Return a suite without the study that is the same for every model."""
    suite = load_suite(name)
    if suite.studies is None:
        return suite
    names = tuple(study for study in suite.studies.names if study != "calibration")
    return suite.model_copy(update={"studies": suite.studies.model_copy(update={"names": names})})


def run(case: Case, suite: str, num_samples: int) -> Line:
    """Train and evaluate one model; return what is kept of it."""
    started = time.perf_counter()
    subject = case.model.build(case.seed)
    line: Line = {"case": list(case.key), "suite": suite, "samples": num_samples, "radius": subject.threat_model.epsilon}
    asked: dict[str, Any] = {"threat_model": subject.threat_model, "num_samples": num_samples}
    try:
        result = evaluate(subject.model, subject.x, subject.y, without_calibration(suite), seed=case.seed, **asked)
    except (UserError, RuntimeError) as error:  # a model that cannot be evaluated is not believed either; the table says so
        return {**line, "error": str(error)[:200], "seconds": time.perf_counter() - started}
    line["reported"] = result.headline.value if result.headline is not None else None
    line["verdicts"] = {verdict.id: verdict.status.value for verdict in result.verdicts}
    line["said"] = {verdict.id: verdict.explanation for verdict in result.verdicts if verdict.status.value in ("FAIL", "WARN")}
    if isinstance(case.model, BrokenModel) and case.model.behind:
        line["truth"] = _truth(subject, asked)
    return {**line, "seconds": time.perf_counter() - started}


def _truth(subject: Subject, asked: dict[str, Any]) -> float | None:
    """Return what the gradients of the network behind a trick leave of it: on the model, and on that network alone, if it is the same."""
    assert isinstance(subject.model, Around | Scaled)
    network = subject.model.network
    model: nn.Module = network if isinstance(subject.model, _SAME) else subject.model
    backward = None if model is network else network
    result = evaluate(model, subject.x, subject.y, _TRUTH, backward=backward, **asked)
    return result.headline.value if result.headline is not None else None


def bounds(count: int, total: int) -> tuple[float, float]:
    """Return the lower and the upper one-sided Clopper-Pearson bound of a share."""
    low = float(stats.beta.ppf(1 - _LEVEL, count, total - count + 1)) if count else 0.0
    high = float(stats.beta.ppf(_LEVEL, count + 1, total - count)) if count < total else 1.0
    return low, high


def tables(lines: list[Line]) -> str:
    """Return the tables in Markdown."""
    by_family = {family: [line for line in lines if line["case"][0] == family] for family in ("honest", "broken")}
    honest, broken = ([line for line in by_family[family] if "verdicts" in line] for family in by_family)
    minutes = sum(line["seconds"] for line in lines) / 60
    text = [
        f"{len(honest)} evaluations of honest models, {len(broken)} of broken ones, {minutes:.0f} minutes.",
        "",
        "| check | honest: ran | failed | rate at most | warned | broken: ran | failed | rate at least | failed or warned |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for check in [f"C{number}" for number in range(1, 22)]:
        cells: list[str] = []
        for group, end in ((honest, 1), (broken, 0)):
            statuses = [line["verdicts"][check] for line in group]
            ran, failed, warned = (sum(test(s) for s in statuses) for test in (lambda s: s != "SKIPPED", "FAIL".__eq__, "WARN".__eq__))
            bound = f"{100 * bounds(failed, ran)[end]:.1f} %" if ran else "–"
            cells += [str(ran), str(failed), bound, str(warned if end else failed + warned)]
        text.append(f"| {check} | {' | '.join(cells)} |")
    alarms = sum(bool(_failed(line)) for line in honest)
    if honest:
        highest = 100 * bounds(alarms, len(honest))[1]
        text += ["", f"Honest models with any failed check: {alarms} of {len(honest)}, at most {highest:.1f} %."]
    fooled = [line for line in broken if is_fooled(line)]
    if fooled:
        found = sum(bool(_failed(line)) for line in fooled)
        lowest = 100 * bounds(found, len(fooled))[0]
        text += ["", f"Evaluations that a broken model fools, with a failed check: {found} of {len(fooled)}, at least {lowest:.1f} %."]
    text += ["", "| model | evaluations | reported | truth at most | fooled | of these found | failed (of evaluations) | warned |"]
    text.append("|---" * 8 + "|")
    for family, name in dict.fromkeys((line["case"][0], line["case"][1]) for line in lines):
        group = [line for line in by_family[family] if line["case"][1] == name]
        measured = [line for line in group if "verdicts" in line]
        seen = [_counts(measured, status) for status in ("FAIL", "WARN")]
        if not measured:
            seen = [f"cannot be evaluated: {group[0]['error'][:60]}", ""]
        numbers = [_mean(measured, "reported"), _mean(measured, "truth")]
        those = [line for line in measured if family == "broken" and is_fooled(line)]
        counts = [str(len(those)), str(sum(bool(_failed(line)) for line in those))] if family == "broken" else ["", ""]
        text.append(f"| {name} | {len(group)} | {' | '.join([*numbers, *counts, *seen])} |")
    return "\n".join(text) + "\n"


def is_fooled(line: Line) -> bool:
    """Return whether what was reported of a broken model must not be believed."""
    truth, reported = line.get("truth"), line.get("reported")
    if reported is None:
        return True
    return reported > (_NOTHING if truth is None else truth + _FOOLED)


def _failed(line: Line) -> list[str]:
    return [check for check, status in line.get("verdicts", {}).items() if status == "FAIL"]


def _mean(lines: list[Line], what: str) -> str:
    values = [line[what] for line in lines if line.get(what) is not None]
    return f"{100 * sum(values) / len(values):.0f} %" if values else ""


def _counts(lines: list[Line], status: str) -> str:
    found = [check for line in lines for check, verdict in line["verdicts"].items() if verdict == status]
    return ", ".join(f"{check} {found.count(check)}" for check in sorted(set(found), key=lambda check: int(check[1:])))


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing in the file and print the tables."""
    parser = argparse.ArgumentParser(prog="benchmarks.checks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--records", type=Path, help="file of JSON lines to continue")
    parser.add_argument("--suite", default="standard")
    parser.add_argument("--seeds", type=int, default=15)
    parser.add_argument("--samples", type=int, default=60)
    parser.add_argument("--only", choices=("honest", "broken"))
    parser.add_argument("--names", nargs="*", default=[], help="only models whose names contain one of these")
    parser.add_argument("--minutes", type=float, default=60.0, help="start no evaluation after so long")
    chosen = parser.parse_args(arguments)
    known: list[Line] = []
    if chosen.records is not None and chosen.records.exists():
        content = chosen.records.read_text()
        known = [json.loads(text) for text in content.splitlines() if text.endswith("}")]
        if content and not content.endswith("\n"):  # a line that was cut off by a kill must not swallow the next one
            chosen.records.write_text(content + "\n")
    known = [line for line in known if (line["suite"], line["samples"]) == (chosen.suite, chosen.samples)]
    done, started = {tuple(line["case"]) for line in known}, time.perf_counter()
    for case in cases(chosen.seeds, chosen.only):
        wanted = not chosen.names or any(name in case.model.name for name in chosen.names)
        if case.key in done or not wanted or time.perf_counter() - started > 60 * chosen.minutes:
            continue
        line = run(case, chosen.suite, chosen.samples)
        known.append(line)
        if chosen.records is not None:
            with chosen.records.open("a") as file:
                file.write(json.dumps(line) + "\n")
        seen = f"{line.get('reported')} (truth {line.get('truth')}) {' '.join(_failed(line))} {line.get('error', '')}"
        sys.stderr.write(f"{case.key}: {seen} {line['seconds']:.0f} s\n")
    sys.stdout.write(tables(known))
    return 0


if __name__ == "__main__":
    sys.exit(main())
