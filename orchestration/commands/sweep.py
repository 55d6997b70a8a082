"""`rayndom sweep SWEEP`: search, train, evaluate the winner beside the baselines, export."""

from __future__ import annotations

import argparse
from pathlib import Path

from models.errors import UserError
from orchestration import console
from orchestration.commands.command import Command, add_data_root


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sweep", nargs="?", help="name of a sweep (`rayndom list sweeps`) or of a recipe (its defence's own search space), or a YAML file"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything and say what would run")
    parser.add_argument("--address", help="Ray cluster (default: RAY_ADDRESS, else a local Ray)")
    parser.add_argument("--no-evaluation", action="store_true", help="end after the search")
    add_data_root(parser)


def _run(arguments: argparse.Namespace) -> int:
    from orchestration.recipes import parse_overrides
    from orchestration.sweeping.config import SweepConfig, load_sweep

    if arguments.help:
        arguments.parser.print_help()
        rows = [(f"--{name}", info.description or "") for name, info in SweepConfig.model_fields.items()]
        console.table("fields of a sweep", ["flag", "what it is"], rows)
        return 0
    if not arguments.sweep:
        raise UserError("sweep needs the name of one; `rayndom list sweeps` names them")
    config = load_sweep(arguments.sweep, parse_overrides(arguments.fields))

    from orchestration.home import Home

    home = Home.locate(arguments.home)
    data_root = Path(arguments.data_root).absolute() if arguments.data_root else None
    if arguments.dry_run:
        return _dry_run(config, home, data_root)
    from orchestration.sweeping.sweep import run_sweep

    outcome = run_sweep(config, home, data_root, address=arguments.address, evaluate=not arguments.no_evaluation)
    console.result(outcome)
    return 0 if outcome["complete"] else 1


def _dry_run(config: object, home: object, data_root: Path | None) -> int:
    from orchestration.sweeping.config import sweep_key
    from orchestration.sweeping.study import target
    from orchestration.training.dry_run import dry_run

    experiment = config.experiment({})
    report = dry_run(experiment, home, data_root)
    report = {"sweep": sweep_key(config), "trials": target(config), "at most": f"{target(config)} x {report['whole run']}"} | report
    console.result(report)
    console.table(f"dry run of {config.name}", ["what", "value"], list(report.items()))
    rows = [
        (name, d.type, d.low, d.high, ", ".join(map(str, d.choices)), "log" if d.log else "") for name, d in (config.space or {}).items()
    ]
    console.table("search space", ["field", "type", "low", "high", "choices", "scale"], rows)
    for remark in config.remarks:
        console.say(remark)
    if config.points:
        console.say(f"points tried first: {'; '.join(map(str, config.points))}")
    return 0


SWEEP = Command(
    "sweep",
    "search a defence's parameters; the same command goes on after an interruption",
    (
        "rayndom sweep ctrw_bounds_digits",
        "rayndom sweep ctrw_bounds_digits --num_trials 40 --settings.training.epochs 30",
        "rayndom sweep rna_fashion_mnist --num_trials 12    (a recipe: the search space of its defence)",
        "rayndom sweep my_sweep.yaml --dry-run",
    ),
    _add,
    _run,
    takes_fields=True,
)
