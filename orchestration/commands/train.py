"""`rayndom train RECIPE`: train one experiment, or go on with it, or reuse it."""

from __future__ import annotations

import argparse
import shlex
import time
from typing import TYPE_CHECKING

from models.errors import UserError
from orchestration import console
from orchestration.commands.command import Command, add_data_root, add_wait, whole_number, workplace_of

if TYPE_CHECKING:
    from orchestration.experiment import ExperimentConfig
    from orchestration.home import Workplace


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", help="name of a recipe (`rayndom list recipes`), or a YAML file")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="build the model, run a few batches, say what it would cost and where it goes",
    )
    parser.add_argument(
        "--profile",
        type=whole_number(1, 10_000),
        metavar="N",
        help="take N steps, then measure one: a Chrome trace, where its time goes, its share of the hardware's peak; nothing is trained",
    )
    add_wait(parser)
    parser.add_argument("--restart", action="store_true", help="forget an earlier run of the same configuration")
    parser.add_argument("--retrain", action="store_true", help="the same, if the code of its defence or objective has changed since")
    parser.add_argument("--address", help="Ray cluster, for runs with several workers (default: RAY_ADDRESS, else local)")
    add_data_root(parser)


def _run(arguments: argparse.Namespace) -> int | None:
    from orchestration.recipes import load_recipe

    if arguments.help:
        arguments.parser.print_help()
        if arguments.recipe:
            _print_fields(load_recipe(arguments.recipe).experiment)
        return 0
    if not arguments.recipe:
        raise UserError("train needs a recipe; `rayndom list recipes` names them")
    experiment = load_recipe(arguments.recipe, arguments.fields).experiment
    console.say(f"{experiment.name}: {experiment.description}" if experiment.description else experiment.name)

    workplace = workplace_of(arguments)
    if arguments.dry_run:
        from orchestration.training.dry_run import dry_run

        report = dry_run(experiment, workplace)
        console.result(report.to_json())
        console.table(f"dry run of {experiment.name}", ["what", "value"], report.rows())
        return 0
    if arguments.profile:
        _profile(experiment, workplace, arguments.profile)
        return 0

    from orchestration.training.single_run import run_single

    started = time.monotonic()
    result, run_id = run_single(experiment, workplace, restart=arguments.restart, retrain=arguments.retrain, wait=arguments.wait)
    console.result(
        {
            "fingerprint": experiment.fingerprint,
            "folder": str(result.folder.model),
            "mlflow_run": run_id,
            "metrics": result.metrics,
            "selected_epoch": result.selected_epoch,
            "reused": result.reused,
        }
    )
    what = "was already trained" if result.reused else f"trained in {console.duration(time.monotonic() - started)}"
    console.say(
        f"{experiment.name} {what}; epoch {result.selected_epoch} selected: clean "
        f"{100 * result.metrics['validation/clean_accuracy']:.1f} %, robust {100 * result.metrics['validation/robust_accuracy']:.1f} % "
        f"(on {experiment.training.validation.select_on} images, cheap attack)"
    )
    console.say(f"model {result.folder.model}")
    # What a person copies goes on with what was named here.
    flag = "".join(f" --plugin {shlex.quote(each)}" for each in arguments.plugin) + (f" --home {arguments.home}" if arguments.home else "")
    # Not to a folder of the recipe's name here: commands that name the recipe would find that folder first.
    exports = workplace.home.shown / "exports" / (experiment.name or experiment.defence.name)
    console.say(f"next:  rayndom evaluate {run_id} --suite quick{flag}")
    console.say(f"       rayndom export {run_id} --to {exports}{flag}")
    return 0


def _profile(experiment: ExperimentConfig, workplace: Workplace, skipped: int) -> None:
    from orchestration.training.profile import COLUMNS, profile_training

    written = profile_training(experiment, workplace, skipped)
    console.result(written.step.metrics() | {"folder": str(written.folder), "mlflow_run": written.run_id})
    console.table(f"a step of {experiment.name}", COLUMNS, written.step.rows())
    console.say(written.step.sentence())
    console.say(f"trace {written.folder / 'trace.json'} (ui.perfetto.dev or chrome://tracing shows it); MLflow run {written.run_id}")


def _print_fields(experiment: ExperimentConfig) -> None:
    from orchestration.commands.command import field_rows

    console.table("fields", ["flag", "value", "what it is"], field_rows(experiment))


TRAIN = Command(
    "train",
    "train a recipe; the same command resumes an interrupted run and reuses a finished one",
    (
        "rayndom train ctrw_digits",
        "rayndom train at_digits --training.epochs 5 --seed 1",
        "rayndom train ctrw_cifar10_resnet18 --dry-run",
        "rayndom train rna_digits --profile 5        where the time of a step goes",
        "rayndom train ctrw_digits --help            all fields of this recipe",
    ),
    _add,
    _run,
    takes_fields=True,
)
