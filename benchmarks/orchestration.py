"""What orchestration costs, and what a second worker gains: bars, each with its verdict.

    python -m benchmarks.orchestration [--pairs 12] [--json FILE]

* overhead: a trial of a sweep under Ray Tune, with Optuna's SQLite study and MLflow's SQLite store, takes at most 3 % longer than the same
  training bare (`train_here`: fit loop and checkpoint), start-up apart. For trials of 60 s and more: a trial here has epochs of 5 s, as one
  of 12 epochs and 60 s has. Both wall time and the CPU time of the training process are compared.
* blocked: a trial waits at most 20 ms per epoch for what the driver's listener does with it (MLflow, the board).
* second worker: two gloo workers on two idle cores train at least 1.7 times the images per second of one, at the same global batch: 128,
  that of the papers. Halves of smaller batches keep a core less busy: with 64 the same network gains about 1.6.

* start: a trial with one worker, and one with two, spends at most 5 s on anything but its epochs, from when Tune starts it to when it is
  over. The first trial of a start, which imports everything, is printed and not judged.

Trial and bare training take turns epoch by epoch, as do one worker and two: each ratio is that of neighbouring epochs. A bar is met or
missed if the 95 % interval of the median ratio lies on one side of it, else undecided: then the machine is too busy, or more `--pairs` are
needed. The last bar is undecided without two idle cores; the CPU time of the busier worker then tells what they would gain. Exit code 1 if
a bar is missed.
"""

from __future__ import annotations

import os

# Ray starts its workers with a lower priority than the driver; on a machine that others use they would wait where the bare training runs.
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import ray
import yaml

from benchmarks.timing import describe_hardware, hardware
from benchmarks.turns import Epoch, Ratios, Turns
from orchestration.experiment import ExperimentConfig
from orchestration.home import Home, Workplace
from orchestration.sweeping.config import SweepConfig, sweep_key
from orchestration.sweeping.listener import TrialListener
from orchestration.sweeping.loading import load_sweep
from orchestration.sweeping.plan import SweepPlan, plan_sweep
from orchestration.sweeping.search import run_search
from orchestration.tracking.tracker import Tracker

MAX_OVERHEAD = 1.03
MAX_BLOCKED_MS = 20.0
MAX_START_SECONDS = 5.0
STARTED_TRIALS = 5
MIN_GAIN = 1.7
EPOCH_SECONDS = 5.0  # a twelfth of the shortest trial that the first bar is about
IDLE_CORES = 1.8
GLOBAL_BATCH = 128
TRIAL_IMAGES = 600  # of the epochs that find out how many images make such an epoch


def sweep_of(folder: Path, epochs: int, images: int) -> SweepConfig:
    """Return a sweep with one trial of `at_digits`, whose epochs have so many images."""
    path = folder / "overhead.yaml"
    tree = {
        "recipe": "at_digits",
        "settings": {
            "training.epochs": epochs,
            "training.precision": "fp32",
            "training.validation.num_examples": 32,
            "data.limit_train": images + 64,
            "data.validation_size": 64,
        },
        "space": {"training.optimizer.weight_decay": {"type": "choice", "choices": [5e-4]}},
        "sampler": "grid",
        "stopping": None,
    }
    path.write_text(yaml.safe_dump(tree))
    return load_sweep(str(path))


class TakingTurns:
    """Runs one bare epoch after each epoch of the trial, while the trial waits for the driver."""

    def __init__(self, bare: Turns) -> None:
        self.bare = bare
        self.pairs: list[tuple[Epoch, Epoch]] = []
        self.blocked: list[float] = []
        self._released: float | None = None
        self._cpu = 0.0

    def hear(self, listener: TrialListener, *arguments: Any, result: dict[str, Any], **info: Any) -> None:
        """Stand in for the listener's `on_trial_result`."""
        arrived = time.perf_counter()
        if result.get("finished"):
            self.heard(listener, *arguments, result=result, **info)
            return
        used = sum(psutil.Process(result["pid"]).cpu_times()[:2])
        epoch = None if self._released is None else Epoch(arrived - self._released, used - self._cpu)
        other = self.bare.run_epoch()
        if epoch is not None:  # the first one pays for start-up, on both sides
            self.pairs.append((epoch, other))
        self._cpu = used
        # From here on the trial's next interval runs: what the listener does now holds it up.
        self._released = time.perf_counter()
        self.heard(listener, *arguments, result=result, **info)
        self.blocked.append(time.perf_counter() - self._released)

    def __enter__(self) -> TakingTurns:
        self.heard = TrialListener.on_trial_result
        turns = self

        def hear(listener: TrialListener, *arguments: Any, result: dict[str, Any], **info: Any) -> None:
            turns.hear(listener, *arguments, result=result, **info)

        TrialListener.on_trial_result = hear
        return self

    def __exit__(self, *_: object) -> None:
        TrialListener.on_trial_result = self.heard


def images_of_an_epoch(folder: Path) -> int:
    """Return how many images make an epoch of `EPOCH_SECONDS` of CPU time, a multiple of the batch size that the set has."""
    turns = Turns(sweep_of(folder, 3, TRIAL_IMAGES).experiment({}), folder / "calibration")
    try:
        turns.run_epoch()
        seconds = turns.run_epoch().cpu
    finally:
        turns.close()
    return max(128, min(1280, round(TRIAL_IMAGES * EPOCH_SECONDS / seconds / 64) * 64))


def planned(config: SweepConfig, home: Home) -> SweepPlan:
    """Return the plan of a sweep in a home of its own."""
    return plan_sweep(config, home.sweep(sweep_key(config)), home)


def measure_overhead(folder: Path, pairs: int, images: int) -> dict[str, Any]:
    """Train the same bare and as a trial, in turns."""
    config = sweep_of(folder, pairs + 1, images)
    bare = Turns(config.experiment({}), folder / "bare")
    try:
        with TakingTurns(bare) as turns:
            home = Home.locate(folder / "home")
            run_search(planned(config, home), Workplace(home), Tracker(home, "overhead"))
    finally:
        bare.close()
    return {
        "epoch_seconds": statistics.median(other.wall for _, other in turns.pairs),
        "wall": [trial.wall / other.wall for trial, other in turns.pairs],
        "cpu": [trial.cpu / other.cpu for trial, other in turns.pairs],
        "blocked_ms": [1000 * seconds for seconds in turns.blocked],
    }


def measure_gain(folder: Path, pairs: int, images: int) -> dict[str, Any]:
    """Train with one worker and with two, in turns."""
    tree = sweep_of(folder, pairs + 2, images).experiment({}).model_dump(mode="json")
    tree["training"]["batch_size"] = GLOBAL_BATCH
    experiment = ExperimentConfig(**tree)
    idle = psutil.cpu_count() * (1 - psutil.cpu_percent(interval=2) / 100)
    one, two = Turns(experiment, folder / "one"), Turns(experiment, folder / "two", workers=2)
    try:
        one.run_epoch(), two.run_epoch()
        epochs = [(one.run_epoch(), two.run_epoch()) for _ in range(pairs)]
    finally:
        one.close()
        two.close()
    return {
        "idle_cores": idle,
        "wall": [alone.wall / both.wall for alone, both in epochs],
        "cpu": [alone.cpu / both.cpu for alone, both in epochs],
    }


class Starts:
    """Notes of each trial how long it took beside its epochs, which it tells itself; trials run one after another."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = self._epochs = 0.0

    def __enter__(self) -> Starts:
        self.heard = TrialListener.on_trial_start, TrialListener.on_trial_result, TrialListener.on_trial_complete
        start, result, complete, notes = *self.heard, self

        def on_start(listener: TrialListener, *arguments: Any, **info: Any) -> None:
            notes._began, notes._epochs = time.perf_counter(), 0.0
            start(listener, *arguments, **info)

        def on_result(listener: TrialListener, *arguments: Any, **info: Any) -> None:
            notes._epochs += 0 if info["result"].get("finished") else info["result"]["time/epoch_seconds"]
            result(listener, *arguments, **info)

        def on_complete(listener: TrialListener, *arguments: Any, **info: Any) -> None:
            complete(listener, *arguments, **info)
            notes.seconds.append(time.perf_counter() - notes._began - notes._epochs)

        TrialListener.on_trial_start, TrialListener.on_trial_result = on_start, on_result
        TrialListener.on_trial_complete = on_complete
        return self

    def __exit__(self, *_: object) -> None:
        TrialListener.on_trial_start, TrialListener.on_trial_result, TrialListener.on_trial_complete = self.heard


def measure_start(folder: Path, workers: int) -> dict[str, Any]:
    """Run trials of one epoch one after another."""
    folder.mkdir()
    config = sweep_of(folder, 1, TRIAL_IMAGES)
    decays = tuple(5e-4 * (1 + index) for index in range(STARTED_TRIALS))
    tree = config.model_dump(mode="json") | {"max_concurrent_trials": 1}
    tree["space"]["training.optimizer.weight_decay"]["choices"] = decays
    tree["settings"] |= {"resources.workers": workers}
    config = SweepConfig(**tree)
    home = Home.locate(folder / "home")
    with Starts() as starts:
        run_search(planned(config, home), Workplace(home), Tracker(home, "start"))
    ray.shutdown()
    return {"first": starts.seconds[0], "later": starts.seconds[1:]}


def bars(record: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return (name, figures, verdict) of each bar."""
    overhead, gain = record["overhead"], record["second_worker"]
    blocked = overhead["blocked_ms"]
    wall, cpu = Ratios(tuple(overhead["wall"])), Ratios(tuple(overhead["cpu"]))
    gained = Ratios(tuple(gain["wall"]))
    verdict = gained.verdict(at_least=MIN_GAIN)
    if verdict == "missed" and gain["idle_cores"] < IDLE_CORES:
        verdict = "undecided"
    spread = f"median {statistics.median(blocked):.1f} ms, highest {max(blocked):.1f} ms"
    return [
        ("trial / bare, wall time, at most 1.03", wall.shown(), wall.verdict(at_most=MAX_OVERHEAD)),
        ("trial / bare, CPU time of the training process, at most 1.03", cpu.shown(), cpu.verdict(at_most=MAX_OVERHEAD)),
        ("blocked per epoch, at most 20 ms", spread, "met" if statistics.median(blocked) <= MAX_BLOCKED_MS else "missed"),
        *(
            (f"beside its epochs a trial with {workers} takes at most 5 s", *_start_bar(record["start"][workers]))
            for workers in record["start"]
        ),
        ("two workers / one, images per second, at least 1.7", gained.shown(), verdict),
    ]


def _start_bar(found: dict[str, Any]) -> tuple[str, str]:
    later = statistics.median(found["later"])
    return f"median {later:.1f} s, the first one {found['first']:.1f} s", "met" if later <= MAX_START_SECONDS else "missed"


def main() -> int:
    """Print the measurements; return 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=12, help="epochs of each kind that are compared (default 12)")
    parser.add_argument("--json", type=Path, help="write the record here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = images_of_an_epoch(folder)
        record = {
            "hardware": hardware(),
            "cores": psutil.cpu_count(),
            "load": psutil.getloadavg()[0],
            "images": images,
            "overhead": measure_overhead(folder, arguments.pairs, images),
            "start": {name: measure_start(folder / name, workers) for name, workers in (("one worker", 1), ("two workers", 2))},
            "second_worker": measure_gain(folder, arguments.pairs, images),
        }
    out = sys.stdout.write
    out(f"{describe_hardware(record['hardware'])}, {record['cores']} cores, load {record['load']:.1f} at the start\n")
    seconds = record["overhead"]["epoch_seconds"]
    out(f"epochs of {images} images, {seconds:.1f} s bare: a trial of 60 s has {60 / seconds:.0f} of them\n")
    missed = False
    for title, figures, verdict in bars(record):
        out(f"{verdict:9} {title}: {figures}\n")
        missed |= verdict == "missed"
    gain = record["second_worker"]
    out(f"          {gain['idle_cores']:.1f} cores were idle; by CPU time of the busier worker: {Ratios(tuple(gain['cpu'])).shown()}\n")
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=2))
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
