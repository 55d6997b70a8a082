"""`rayndom sweep SWEEP`: search, train, evaluate the winner beside the baselines, export."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from models.errors import UserError
from orchestration import console
from orchestration.commands.command import Command, add_data_root, add_study, add_wait, use_study, workplace_of

if TYPE_CHECKING:
    from orchestration.home import Workplace
    from orchestration.sweeping.config import SweepConfig


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sweep", nargs="?", help="name of a sweep (`rayndom list sweeps`) or of a recipe (its defence's own search space), or a YAML file"
    )
    add_item(parser)
    parser.add_argument("--dry-run", action="store_true", help="check everything and say what would run")
    parser.add_argument("--address", help="Ray cluster (default: RAY_ADDRESS, else a local Ray)")
    parser.add_argument("--no-evaluation", action="store_true", help="end after the search")
    add_study(parser)
    add_wait(parser)
    add_data_root(parser)


def add_item(parser: argparse.ArgumentParser) -> None:
    """Add `--item`."""
    parser.add_argument("--item", action="store_true", help="SWEEP is a table or figure of a paper, as dcs.table4: its rows are the grid")


def _run(arguments: argparse.Namespace) -> int:
    if arguments.help:
        return show_help(arguments)
    config = named_sweep(arguments)

    use_study(arguments)
    workplace = workplace_of(arguments)
    if arguments.dry_run:
        return _dry_run(config, workplace)
    from orchestration.sweeping.sweep import run_sweep

    console.result(run_sweep(config, workplace, evaluate=not arguments.no_evaluation, wait=arguments.wait))
    return 0


def show_help(arguments: argparse.Namespace) -> int:
    """Print the help of a command that takes fields of a sweep."""
    from orchestration.sweeping.config import SweepConfig

    arguments.parser.print_help()
    rows = [(f"--{name}", info.description or "") for name, info in SweepConfig.model_fields.items()]
    console.table("fields of a sweep", ["flag", "what it is"], rows)
    return 0


def named_sweep(arguments: argparse.Namespace) -> SweepConfig:
    """Return the sweep that arguments name, with their fields.

    Raises:
        UserError: none is named, or a mistake in it.
    """
    from orchestration.recipes import parse_overrides
    from orchestration.sweeping.item_grid import item_tree
    from orchestration.sweeping.loading import check_sweep, load_sweep

    fields = parse_overrides(arguments.fields)
    if not arguments.sweep:
        names = "`rayndom reproduce --list` names them" if arguments.item else "`rayndom list sweeps` names them"
        raise UserError(f"{arguments.command} needs the name of {'an item' if arguments.item else 'a sweep'}; {names}")
    return check_sweep(*item_tree(arguments.sweep), fields) if arguments.item else load_sweep(arguments.sweep, fields)


def _dry_run(config: SweepConfig, workplace: Workplace) -> int:
    from orchestration.sweeping.config import sweep_key
    from orchestration.sweeping.study import check_study_address, num_wanted
    from orchestration.training.dry_run import dry_run

    check_study_address()
    experiment = config.experiment({})
    # As a trial trains: with the cores that Ray gives one, not with all that this process sees.
    report = dry_run(experiment.model_copy(update={"resources": experiment.resources.with_own_cores()}), workplace)
    trials = num_wanted(config)
    repeats = 0 if config.repeats is None else min(config.repeats.top, trials) * len(config.repeats.seeds)
    at_most = (trials + repeats + len(config.baselines)) * report.total_seconds
    console.result(
        {"sweep": sweep_key(config), "trials": trials, "repeats": repeats, "baselines": len(config.baselines), "at_most_seconds": at_most}
        | report.to_json()
    )
    heading = [
        ("sweep", sweep_key(config)),
        ("trials", str(trials)),
        *([("repeats with further seeds", f"at most {repeats}")] if repeats else []),
        *([("baselines", str(len(config.baselines)))] if config.baselines else []),
        ("at most", f"{console.duration(at_most)}, one training after the other"),
    ]
    console.table(f"dry run of {config.name}", ["what", "value"], heading + report.rows())
    rows = [
        (name, d.type, d.low, d.high, ", ".join(map(str, d.choices)), "log" if d.log else "") for name, d in (config.space or {}).items()
    ]
    console.table("search space", ["field", "type", "low", "high", "choices", "scale"], rows)
    for remark in config.remarks:
        console.say(remark)
    if config.points:
        fields = list(dict.fromkeys(field for point in config.points for field in point))
        console.table("points tried first", fields, [tuple(str(point.get(field, "")) for field in fields) for point in config.points])
    return 0


SWEEP = Command(
    "sweep",
    "search a defence's parameters; the same command goes on after an interruption",
    (
        "rayndom sweep ctrw_bounds_digits",
        "rayndom sweep ctrw_bounds_digits --num_trials 40 --settings.training.epochs 30",
        "rayndom sweep rna_fashion_mnist --num_trials 12    (a recipe: the search space of its defence)",
        "rayndom sweep --item dcs.table4 --dry-run          (the rows of a paper's table)",
        "rayndom sweep my_sweep.yaml --dry-run",
    ),
    _add,
    _run,
    takes_fields=True,
)
