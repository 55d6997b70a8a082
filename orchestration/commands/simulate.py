"""`rayndom simulate SWEEP`: schedule, hours and cost of a sweep on a cluster, from measured times, before money is spent."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from orchestration import console
from orchestration.commands.command import Command, add_data_root, number, whole_number, workplace_to_read
from orchestration.commands.sweep import add_item, named_sweep, show_help

if TYPE_CHECKING:
    from orchestration.home import Workplace
    from orchestration.sweeping.config import SweepConfig
    from orchestration.sweeping.simulation import TrialTimes


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sweep", nargs="?", help="name of a sweep, of a recipe, or a YAML file, as for `rayndom sweep`")
    add_item(parser)
    parser.add_argument("--trials", type=whole_number(1, 1_000_000), help="trials (default: the sweep's)")
    parser.add_argument("--gpus", type=whole_number(0, 100_000), default=0, help="GPUs of the cluster")
    parser.add_argument("--cpus", type=whole_number(1, 1_000_000), help="CPU cores of the cluster (default: enough for its GPUs)")
    parser.add_argument("--price", type=number(0, 1e6), help="of one GPU for an hour; with --cpus alone of one core")
    parser.add_argument("--losses-per-hour", type=number(0, 60), default=0, help="how often a spot GPU is taken away (default 0)")
    parser.add_argument("--replacement-minutes", type=number(0, 1e4), default=10, help="until another one is there (default 10)")
    parser.add_argument("--epoch-seconds", type=number(0, 1e6, above=True), help="one epoch (default: as this sweep measured in this home)")
    parser.add_argument("--start-seconds", type=number(0, 1e6), help="start and end of a trial (default: as measured, else 20)")
    add_data_root(parser)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.help:
        return show_help(arguments)
    from orchestration.sweeping.simulation import REPEATS, Plan, compared_objectives, middle_and_range, places, simulate
    from orchestration.sweeping.study import num_wanted

    config = named_sweep(arguments)
    at_once = places(config, arguments.gpus, arguments.cpus)
    times = _times(config, workplace_to_read(arguments), arguments.epoch_seconds, arguments.start_seconds)
    epochs = max(experiment.training.epochs for experiment in config.base_experiments())
    plan = Plan(
        arguments.trials or num_wanted(config),
        at_once,
        epochs,
        config.stopping,
        times,
        arguments.losses_per_hour,
        60 * arguments.replacement_minutes,
        compared_objectives(config),
    )
    outcomes = [simulate(plan, seed) for seed in range(REPEATS)]
    paid = arguments.gpus or arguments.cpus
    hours = middle_and_range([outcome.seconds / 3600 for outcome in outcomes])
    held = middle_and_range([outcome.busy / 3600 / at_once * paid for outcome in outcomes])
    typical = min(outcomes, key=lambda outcome: abs(outcome.seconds / 3600 - hours[0]))
    unit = "GPU" if arguments.gpus else "core"
    rows = [
        ("trials", f"{plan.trials:,}, {at_once} at a time"),
        ("one epoch, start and end of a trial", f"{times.epoch:.3g} s, {times.start:.3g} s ({times.source})"),
        ("epochs trained", f"{typical.epochs:,} of {plan.trials * epochs:,}; {typical.full:,} trials reach their end"),
        ("hours", _between(hours)),
        (f"{unit} hours, all {paid} kept until the end", _between(middle_and_range([each * paid for each in hours]))),
        (f"{unit} hours in use", _between(held)),
    ]
    if arguments.losses_per_hour:
        rows.append(("places taken away", f"{typical.losses:,}"))
    cost = None
    if arguments.price is not None:
        cost = tuple(each * paid * arguments.price for each in hours)
        rows.append(("cost, all kept until the end", _between(cost)))
        rows.append(("cost, only what is in use", _between(tuple(each * arguments.price for each in held))))
    console.table(f"{config.name} in simulated time", ["what", "value"], rows)
    console.table("schedule", ["hours", "trials over"], [(f"{seconds / 3600:.2f}", f"{count:,}") for seconds, count in typical.over])
    console.say("assumed: trials keep their order from the first epoch on; evaluation and baselines after the search are not in it")
    console.result(
        {
            "sweep": config.name,
            "trials": plan.trials,
            "at_once": at_once,
            "epoch_seconds": times.epoch,
            "start_seconds": times.start,
            "source": times.source,
            "hours": hours,
            "unit_hours_in_use": held,
            "cost": cost,
            "epochs": typical.epochs,
            "full_trials": typical.full,
            "schedule": [{"hours": seconds / 3600, "over": count} for seconds, count in typical.over],
        }
    )
    return 0


def _between(values: tuple[float, ...]) -> str:
    middle, low, high = values
    return f"{middle:,.3g}  [{low:,.3g}, {high:,.3g}]" if high > low * 1.001 else f"{middle:,.3g}"


def _times(config: SweepConfig, workplace: Workplace, epoch: float | None, start: float | None) -> TrialTimes:
    """Return how long trials take: as said, else as this sweep's trials took, else as a few steps here take."""
    from orchestration.sweeping.config import SWEEP_FILE, sweep_key
    from orchestration.sweeping.simulation import TrialTimes, measured_times
    from orchestration.sweeping.study import study_to_look_at

    if epoch is not None:
        return TrialTimes(20.0 if start is None else start, epoch, (1.0,), "as given")
    folder = workplace.home.sweep(sweep_key(config))
    begun = (folder / SWEEP_FILE).is_file()
    measured = measured_times(study_to_look_at(config, folder), "measured by this sweep's trials") if begun else None
    if measured is not None:
        return measured if start is None else TrialTimes(start, measured.epoch, measured.ratios, measured.source)
    from orchestration.training.dry_run import dry_run

    experiment = config.experiment({})
    report = dry_run(experiment.model_copy(update={"resources": experiment.resources.with_own_cores()}), workplace)
    seconds = report.total_seconds / report.epochs
    return TrialTimes(20.0 if start is None else start, seconds, (1.0,), f"a few steps on this machine's {report.device}")


SIMULATE = Command(
    "simulate",
    "schedule, hours and cost of a sweep on a cluster, from measured times, before it runs",
    (
        "rayndom simulate ctrw_bounds_digits --cpus 64 --trials 1000",
        "rayndom simulate my_sweep.yaml --trials 1000 --gpus 64 --price 1.5 --losses-per-hour 0.05",
        "rayndom simulate my_sweep.yaml --gpus 8 --epoch-seconds 45 --stopping.scheduler hyperband",
    ),
    _add,
    _run,
    takes_fields=True,
)
