"""Whether `rayndom simulate` says how long a real sweep takes.

    python -m benchmarks.plan [--trials 10] [--folder FOLDER]

A tiny sweep runs on this machine's Ray; its trials' times, and nothing else of it, are what a simulation of a second sweep, with twice the
trials and another seed, starts from. Then that one runs. The simulated time from its first trial to its last must be within 20 % of the
real one. Both take minutes; whatever else the machine does falls on both.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

MOST_DEVIATION = 0.2
SWEEP = """\
recipe: ctrw_digits
settings:
  defence.constraint: project
  data.image_size: 16
  data.limit_train: 512
  data.validation_size: 64
  training.epochs: 8
  training.precision: fp32
  training.attack.steps: 3
space:
  defence.lower_bound: {{type: float, low: 200, high: 2000, log: true}}
  training.optimizer.learning_rate: {{type: float, low: 0.003, high: 0.3, log: true}}
sampler: random
seed: {seed}
num_trials: {trials}
stopping: {{grace_epochs: 2, reduction_factor: 2}}
"""


def run(folder: Path, name: str, trials: int, seed: int) -> Path:
    """Run a sweep to the end of its search and return its file; a finished one is used again."""
    path = folder / f"{name}.yaml"
    path.write_text(SWEEP.format(trials=trials, seed=seed))
    command = [sys.executable, "-m", "orchestration.cli", "sweep", str(path), "--no-evaluation", "--home", str(folder / "home")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return path


def main() -> int:
    """Run, simulate, run, compare; return 1 if the simulation was off by more than a fifth."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--folder", type=Path, help="where the sweeps are kept (default: a temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        return _compare(arguments.folder or Path(temporary), arguments.trials)


def _compare(folder: Path, trials: int) -> int:
    from orchestration.home import Home
    from orchestration.sweeping.config import sweep_key
    from orchestration.sweeping.loading import load_sweep
    from orchestration.sweeping.simulation import REPEATS, Plan, compared_objectives, measured_times, middle_and_range, simulate
    from orchestration.sweeping.study_file import read_study

    def study(path: Path):  # type: ignore[no-untyped-def]  # of a script
        config = load_sweep(str(path))
        return read_study(Home.locate(folder / "home").sweep(sweep_key(config)) / "study.db", config.name)

    times = measured_times(study(run(folder, "measured", trials, seed=1)), "measured")
    assert times is not None
    path = run(folder, "predicted", 2 * trials, seed=2)
    config = load_sweep(str(path))
    cores = os.cpu_count() or 1
    plan = Plan(2 * trials, cores, 8, config.stopping, times, objectives=compared_objectives(config))
    simulated, low, high = middle_and_range([simulate(plan, seed).seconds for seed in range(REPEATS)])
    found = study(path).trials
    starts = [trial.datetime_start for trial in found if trial.datetime_start]
    ends = [trial.datetime_complete for trial in found if trial.datetime_complete]
    real = (max(ends) - min(starts)).total_seconds()
    deviation = simulated / real - 1
    print(f"an epoch takes {times.epoch:.2f} s, start and end of a trial {times.start:.2f} s, {cores} at a time")
    print(f"simulated {simulated:.0f} s [{low:.0f}, {high:.0f}], real {real:.0f} s: {100 * deviation:+.0f} %")
    return int(abs(deviation) > MOST_DEVIATION)


if __name__ == "__main__":
    sys.exit(main())
