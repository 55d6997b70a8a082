"""How the work around a sweep grows with its trials: status, start, suggestion, what follows the search, store, memory.

    python -m benchmarks.growth [--sizes 100 1000 5000] [--folder FOLDER] [--json FILE]

A sweep of six dimensions is fabricated through the product's own searcher and tracker, without Ray and without training: each trial
proposes, reports its epochs, and ends as ASHA would end it (two of three stopped early). Each measurement is a process of its own, in CPU
seconds. Imports are part of `status`, which a person waits for; of the others they would hide what grows: what a start imports is printed
below the table. The exponent is that of the last two sizes, what the smallest sweep costs taken off; a bar
is missed if it is above 1.05, or if the last size is 5,000 and its goal is missed. With another last size, or fewer than three, nothing is
judged as met. Fabricated sweeps are kept in `--folder` and used again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

EPOCHS = 12
GOALS = {"status": 2.0, "start": 5.0, "suggestion": 0.1, "conclusion": 5.0, "store_mb": 200.0, "memory_gb": 1.2}
MOST_EXPONENT = 1.05
UNITS = {"status": "s", "start": "s", "suggestion": "s", "conclusion": "s", "store_mb": "MB", "memory_gb": "GB"}
SWEEP = """\
recipe: ctrw_digits
settings: {defence.constraint: project, training.epochs: 12}
space:
  defence.lower_bound: {type: float, low: 200, high: 2000, log: true}
  defence.upper_bound: {type: float, low: 800, high: 4000, log: true, above: defence.lower_bound}
  training.optimizer.learning_rate: {type: float, low: 0.001, high: 0.3, log: true}
  training.optimizer.weight_decay: {type: float, low: 0.00001, high: 0.01, log: true}
  training.attack.step_size: {type: float, low: 0.01, high: 0.1}
  training.attack.steps: {type: int, low: 2, high: 12}
num_trials: 1000000
stopping: {grace_epochs: 3, reduction_factor: 2}
"""


def sweep_file(folder: Path, sampler: str) -> Path:
    """Write the sweep's definition and return its path."""
    path = folder / "growth.yaml"
    path.write_text(SWEEP + f"sampler: {sampler}\n")
    return path


def score_of(values: dict[str, Any], epoch: int, noise: random.Random) -> float:
    """Return a robust accuracy that depends on the values, grows with the epochs and is noisy."""
    distance = sum((math.log(value) - 1) ** 2 for value in values.values() if isinstance(value, float) and value > 0)
    return 0.7 * (1 - math.exp(-epoch / 4)) / (1 + distance / 200) + noise.gauss(0, 0.01)


def fabricate(folder: Path, size: int) -> None:
    """Fill a home with a sweep of `size` trials that are over; goes on where an earlier call stopped."""
    from orchestration.home import Home
    from orchestration.sweeping.config import SWEEP_FILE, sweep_key
    from orchestration.sweeping.loading import load_sweep
    from orchestration.sweeping.proposals import StudySearch
    from orchestration.sweeping.study import open_study, remember, spent
    from orchestration.sweeping.trial_runs import shared_parameters, trial_run
    from orchestration.tracking.experiment_run import FINISHED, STOPPED_EARLY, ParentRun
    from orchestration.tracking.tracker import SWEEP_TAG, Tracker
    from orchestration.training.job import TrialReport

    home = Home.locate(folder)
    config = load_sweep(str(sweep_file(folder, "random")))
    key = sweep_key(load_sweep(str(sweep_file(folder, "tpe"))))
    study = open_study(config, home.sweep(key))
    (home.sweep(key) / SWEEP_FILE).write_text(json.dumps(load_sweep(str(folder / "growth.yaml")).model_dump(mode="json")))
    tracker = Tracker(home, "rayndom")
    parent = ParentRun(tracker, tracker.run("sweep", {SWEEP_TAG: key}, config.name), shared_parameters(config.base_experiments()))
    remember(study, home.sweep(key), EPOCHS, tracker.link(parent.run_id))
    search = StudySearch(config, study)
    for index in range(spent(study), size):
        noise = random.Random(index)
        suggestion = search.suggest(f"fabricated-{index}")
        assert isinstance(suggestion, dict)
        run = trial_run(parent, home.sweep(key), suggestion["number"], config, suggestion["values"])
        last = EPOCHS if index % 3 == 0 else 3
        metrics: dict[str, float] = {}
        for epoch in range(1, last + 1):
            robust = score_of(suggestion["values"], epoch, noise)
            metrics = {
                "train/loss": 2 / epoch,
                "train/cross_entropy": 2 / epoch,
                "train/learning_rate": 0.1,
                "time/epoch_seconds": 5.0,
                "time/examples_per_second": 300.0,
                "memory/peak_gib": 0.9,
                "train/most_common_answer": 0.1,
                "validation/clean_accuracy": robust + 0.2,
                "validation/robust_accuracy": robust,
                "validation/robust_accuracy/eot_pgd_10x4": robust,
            }
            search.on_trial_result(f"fabricated-{index}", TrialReport(epoch, metrics, run.experiment.fingerprint).to_result())
            run.log_epoch(epoch, metrics)
        finished = last == EPOCHS
        if finished:
            run.log_selected(metrics)
        result = TrialReport(last, metrics, run.experiment.fingerprint, finished=finished).to_result()
        search.on_trial_complete(f"fabricated-{index}", result)
        run.end(FINISHED if finished else STOPPED_EARLY)
        if index % 100 == 99:
            print(f"{folder.name}: {index + 1}/{size} trials", file=sys.stderr, flush=True)


def measure(what: str, folder: Path) -> dict[str, float]:
    """Do one thing with a fabricated sweep, in this process, and return what it took."""
    return {"status": _status, "start": _start, "conclusion": _conclusion}[what](folder)


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _status(folder: Path) -> dict[str, float]:
    from orchestration.cli import main

    with Path(os.devnull).open("w") as nothing:
        sys.stdout, sys.stderr = nothing, nothing
        main(["status", "growth", "--home", str(folder)])
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    return {"status": _cpu()}


def _opened(folder: Path) -> Any:
    """Return the search as a start of the sweep opens it, without Ray."""
    from orchestration.home import Home
    from orchestration.sweeping.config import sweep_key
    from orchestration.sweeping.loading import load_sweep
    from orchestration.sweeping.plan import plan_sweep
    from orchestration.sweeping.search import Search
    from orchestration.sweeping.study import open_study
    from orchestration.tracking.experiment_run import ParentRun
    from orchestration.tracking.tracker import SWEEP_TAG, Tracker

    home, config = Home.locate(folder), load_sweep(str(sweep_file(folder, "tpe")))
    plan = plan_sweep(config, home.sweep(sweep_key(config)), home)
    tracker = Tracker(home, "rayndom")
    parent = ParentRun(tracker, tracker.run("sweep", {SWEEP_TAG: plan.key}, config.name))
    return home, Search(plan, open_study(config, plan.folder), parent)


def _start(folder: Path) -> dict[str, float]:
    from orchestration.sweeping.proposals import StudySearch
    from orchestration.sweeping.schedulers import EarlyStopping
    from orchestration.sweeping.study import spent
    from orchestration.sweeping.trial_runs import complete_trial_runs

    imported = _cpu()
    home, search = _opened(folder)
    complete_trial_runs(search.config, search.folder, search.study, home, search.run)
    spent(search.study)
    EarlyStopping(search.config, EPOCHS, search.study)
    searcher = StudySearch(search.config, search.study)
    started = _cpu() - imported
    times = []
    for index in range(5):
        before = _cpu()
        searcher.suggest(f"measured-{index}")
        times.append(_cpu() - before)
    return {
        "start": started,
        "imports": imported,
        "suggestion": sorted(times)[2],
        "memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "store_mb": (folder / "mlflow.db").stat().st_size / 1e6,
    }


def _conclusion(folder: Path) -> dict[str, float]:
    from orchestration.sweeping.findings import conclude_search, show_trials

    _, search = _opened(folder)
    before = _cpu()
    with Path(os.devnull).open("w") as nothing:
        sys.stdout, sys.stderr = nothing, nothing
        show_trials(search, search.best[0])
        conclude_search(search, search.best[0])
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    return {"conclusion": _cpu() - before}


def main() -> int:
    """Fabricate, measure, print; return 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 1000, 5000])
    parser.add_argument("--folder", type=Path, help="where fabricated sweeps are kept (default: a temporary folder)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--in-process", nargs=2, metavar=("WHAT", "HOME"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.in_process:
        what, home = arguments.in_process[0], Path(arguments.in_process[1])
        if what.isdigit():
            fabricate(home, int(what))
        else:
            print(json.dumps(measure(what, home)))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        return _report(arguments.folder or Path(temporary), arguments.sizes, arguments.json)


def _report(folder: Path, sizes: list[int], file: Path | None) -> int:
    found: dict[int, dict[str, float]] = {}
    for size in sizes:
        home = folder / f"trials-{size}"
        home.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        _process(str(size), home)
        print(f"{size} trials fabricated in {time.monotonic() - started:.0f} s", file=sys.stderr)
        found[size] = {}
        for what in ("status", "start", "conclusion"):
            found[size] |= json.loads(_process(what, home).splitlines()[-1])
    missed = _print_table(found, sizes)
    print(f"A start imports for {found[sizes[-1]]['imports']:.1f} s.")
    if file:
        file.write_text(json.dumps(found, indent=2))
    return int(missed)


def _process(what: str, home: Path) -> str:
    command = [sys.executable, "-m", "benchmarks.growth", "--in-process", what, str(home)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def _print_table(found: dict[int, dict[str, float]], sizes: list[int]) -> bool:
    missed = False
    print("| what | " + " | ".join(f"{size:,} trials" for size in sizes) + " | exponent | goal at 5,000 | |")
    print("|---" * (len(sizes) + 4) + "|")
    for what, goal in GOALS.items():
        values = [found[size][what] for size in sizes]
        exponent = 0.0 if what == "memory_gb" else _exponent(values, sizes)  # of memory the goal alone is judged
        verdict = "met" if sizes[-1] == 5000 and not math.isnan(exponent) else "not judged"
        if (sizes[-1] == 5000 and values[-1] > goal) or exponent > MOST_EXPONENT:
            verdict, missed = "MISSED", True
        cells = " | ".join(f"{value:.3g}" for value in values)
        print(f"| {what.partition('_')[0]}, {UNITS[what]} | {cells} | {exponent:.2f} | {goal:g} | {verdict} |")
    return missed


def _exponent(values: list[float], sizes: list[int]) -> float:
    """Return the exponent between the last two sizes, after the first size's value is taken off as what every sweep costs."""
    if len(values) < 3:
        return float("nan")
    if values[-2] <= values[0] or values[-1] <= values[0]:  # constant within noise, or too noisy to say
        return 0.0 if values[-1] <= 1.5 * values[0] else float("nan")
    (first, middle, last), (small, medium, large) = values[-3:], sizes[-3:]
    return math.log((last - first) / (middle - first)) / math.log((large - small) / (medium - small))


if __name__ == "__main__":
    sys.exit(main())
