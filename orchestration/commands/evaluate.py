"""`rayndom evaluate TARGET`: how robust is it, under which protocol, and may the number be believed."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from orchestration import console
from orchestration.commands.command import (
    DRAWS,
    SAMPLES,
    SEED,
    Command,
    add_block_workers,
    add_data_root,
    add_wait,
    number,
    whole_number,
    workplace_of,
)

if TYPE_CHECKING:
    from analysis.evaluation.block_task import BlockTask
    from analysis.evaluation.records import Record
    from analysis.evaluation.suites import Suite
    from orchestration.evaluating.evaluation_run import EvaluationSettings, Job
    from orchestration.home import Home, Workplace
    from orchestration.trained_models.targets import Target
    from trainers.data import DataConfig


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target",
        help="trained recipe, run (16 digits), MLflow run id (32 digits), exported folder, models:/NAME@ALIAS; or a model of your own: "
        "FILE.py:CALLABLE, MODULE:CALLABLE, timm:NAME, a TorchScript file (.pt), a file of torch.export (.pt2)",
    )
    parser.add_argument("--weights", metavar="FILE", help="of a model of your own: safetensors or a state_dict; no code in it is executed")
    parser.add_argument("--data", metavar="NAME", help="of a model of your own: the data set whose test images it sees, e.g. cifar10")
    parser.add_argument(
        "--data-folder", metavar="FOLDER", help="of --data image_folder, hugging_face and webdataset: the folder that holds it"
    )
    parser.add_argument(
        "--image-size", type=whole_number(4, 1024), metavar="PIXELS", help="side that images of --data are resized to (default: their own)"
    )
    parser.add_argument("--suite", help="quick, paper, standard, full, or a YAML file (default quick)")
    parser.add_argument("--surrogate", metavar="TARGET", help="another model: also attack with points made on it, e.g. an AT baseline")
    parser.add_argument(
        "--against",
        metavar="IMPLEMENTATION",
        help="autoattack: also run an independent implementation, both numbers side by side (default suite then: autoattack_standard, or "
        "autoattack_rand for a random model)",
    )
    parser.add_argument("--samples", type=SAMPLES, help="test images (default: the suite's)")
    parser.add_argument("--draws", type=DRAWS, help="draws that score (default: the suite's)")
    parser.add_argument("--epsilon", help="radius, e.g. 8/255 (default: the one the model was trained for, else 8/255)")
    parser.add_argument("--norm", help="linf or l2 (default: the one the model was trained for, else linf)")
    parser.add_argument("--seed", type=SEED, default=0, help="root of all seeds (default 0)")
    parser.add_argument(
        "--until",
        type=number(0, 100, above=True),
        metavar="POINTS",
        help="add images (or draws, where they are cheaper) until the interval of T1 is so wide, or the data or --samples ends",
    )
    parser.add_argument(
        "--keep-points", action="store_true", help="keep the perturbed images, bit by bit: `rayndom rescore` scores them again"
    )
    parser.add_argument(
        "--again", metavar="BLOCK", help="measure this block once more, e.g. 'pgd_20 T1 block 2/4', 'pgd_20 T1' or 'pgd_20', and no other"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be measured, how long it takes and how large kept points are"
    )
    add_block_workers(parser)
    add_wait(parser)
    add_data_root(parser)


def _run(arguments: argparse.Namespace) -> int:
    from orchestration.evaluating.adding_images import begin, forecast, grow
    from orchestration.evaluating.block_names import what_changed
    from orchestration.evaluating.evaluation_report import finish, show
    from orchestration.evaluating.evaluation_run import EvaluationSettings, threat_model_of
    from orchestration.evaluating.external_targets import named_data
    from orchestration.evaluating.second_opinion import compare_opinions, prepare_opinion, show_opinion

    workplace = workplace_of(arguments)
    data = named_data(arguments.data, arguments.data_folder, arguments.image_size)
    target = _target(arguments, data, workplace)
    suite, name_of_suite = _suite(arguments, target, workplace.home)
    settings = EvaluationSettings(
        suite=suite,
        threat_model=threat_model_of(target, arguments.norm, arguments.epsilon, flag="--"),
        num_samples=arguments.samples,
        num_draws=arguments.draws,
        data=data,
        seed=arguments.seed,
    )
    if target.external is not None:
        console.say(f"{target.external.model.executes}; results are kept as {target.external.name}")
    measuring = _Measuring(arguments, target, workplace)
    before: Mapping[str, Record] = {}
    opinions: list[Job] = []
    if arguments.until is not None:
        growing = begin(target.name, target, settings, workplace, arguments.until, keep=arguments.keep_points)
        if arguments.dry_run:
            return _dry_run(*forecast(growing, arguments.workers, arguments.gpus_per_worker))
        job = grow(growing, measuring.run, arguments.workers, arguments.gpus_per_worker)
    else:
        job, before = _prepared(arguments, target, settings, workplace)
        opinions = [prepare_opinion(job, target, workplace)] if arguments.against else []
        if arguments.dry_run:
            return _dry_run(*_costs(arguments, job, opinions))
        measuring.run(job, *opinions)
    for task in job.plan:
        if task.key in before and task.key in job.done:
            console.say(f"{task.title}, measured again: {what_changed(before[task.key], job.done[task.key])}")
    measuring.check_any(job)
    result = show(job)
    opinion = compare_opinions(result, opinions[0].result()) if opinions and opinions[0].done else None
    if opinion is not None:
        show_opinion(opinion)
    finish(job, result, name_of_suite, workplace, {} if opinion is None else {"second_opinion": opinion.to_json()})
    return measuring.conclude(job)


def _target(arguments: argparse.Namespace, data: DataConfig | None, workplace: Workplace) -> Target:
    """Return the model that is evaluated, after a look at flags that do not go together."""
    from models.errors import UserError
    from orchestration.evaluating.external_targets import external_from_flags
    from orchestration.evaluating.second_opinion import check_opinion
    from orchestration.trained_models.targets import resolve_target

    target = external_from_flags(arguments.target, arguments.weights, data, workplace) or resolve_target(arguments.target, workplace.home)
    if target.experiment is not None and data is not None:
        raise UserError(
            f"{arguments.target} is evaluated on the test images of {target.experiment.data.name}, on which it was trained; "
            "--data is for models that do not say"
        )
    if arguments.against:
        check_opinion(arguments.against)
        if arguments.until is not None:
            raise UserError("--against compares two attacks on the same images, --until adds images for one: use one of them")
    if arguments.again and arguments.until is not None:
        raise UserError("--again measures blocks of an evaluation that is there, --until makes one: use one of them")
    return target


def _suite(arguments: argparse.Namespace, target: Target, home: Home) -> tuple[str | Suite, str]:
    """Return the suite, with transfer attacks where another model is named for them, and what its results are called."""
    from analysis.evaluation.suites import load_suite, with_surrogate
    from orchestration.evaluating.evaluation_report import suite_name
    from orchestration.evaluating.second_opinion import suite_against
    from orchestration.trained_models.targets import refuse_external, resolve_target

    suite = arguments.suite or (suite_against(target) if arguments.against else "quick")
    if not arguments.surrogate:
        return suite, suite_name(suite)
    refuse_external(arguments.surrogate, home, "a surrogate is a trained run or an exported folder, which workers load without other code")
    other = resolve_target(arguments.surrogate, home)
    transferred = with_surrogate(load_suite(suite, target.defence), other.folder.absolute(), other.checkpoint())
    return transferred, transferred.name


def _prepared(
    arguments: argparse.Namespace, target: Target, settings: EvaluationSettings, workplace: Workplace
) -> tuple[Job, Mapping[str, Record]]:
    """Return an evaluation of the images that are asked for, and the records of those blocks that are to be measured again."""
    from orchestration.evaluating.block_names import keys_named
    from orchestration.evaluating.evaluation_run import prepare

    job = prepare(target.name, target, settings, workplace, points="keep" if arguments.keep_points else None)
    if not arguments.again:
        return job, {}
    before = {key: job.done[key] for key in keys_named(job.plan, arguments.again) if key in job.done}
    return replace(job, again=frozenset(before)), before


class _Measuring:
    """Runs the blocks of evaluations as the flags say, and remembers those that could not be run."""

    def __init__(self, arguments: argparse.Namespace, target: Target, workplace: Workplace) -> None:
        self.arguments, self.target, self.workplace = arguments, target, workplace
        self.broken: list[tuple[BlockTask, Exception]] = []

    def run(self, *jobs: Job) -> None:
        """Run what is missing of them."""
        from orchestration.evaluating.evaluation_run import run_jobs

        if self.target.external is not None:
            self.target.external.keep(self.workplace.home)
        run_jobs(
            jobs,
            workers=self.arguments.workers,
            gpus_per_worker=self.arguments.gpus_per_worker,
            address=self.workplace.address,
            on_broken_block=lambda _, task, error: self.broken.append((task, error)),
            wait=self.arguments.wait,
        )

    def check_any(self, job: Job) -> None:
        """Raise what broke the first block where none is done."""
        if self.broken and not job.done:
            raise self.broken[0][1]

    def conclude(self, job: Job) -> int:
        """Say which blocks are missing; return the command's exit code."""
        for task, error in self.broken:
            console.error(f"{task.title} could not be measured: {type(error).__name__}: {error}")
        if self.broken:
            console.error(f"{len(self.broken)} of {len(job.plan)} blocks are missing; the same command measures them, and no others")
        return 1 if self.broken else 0


def _costs(arguments: argparse.Namespace, job: Job, opinions: Sequence[Job]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    from orchestration.evaluating.evaluation_cost import cost_of

    cost, *more = (cost_of(each, arguments.workers, arguments.gpus_per_worker) for each in (job, *opinions))
    rows = cost.rows() + [(f"independent: {what}", value) for other in more for what, value in other.rows() if "left" in what]
    return cost.to_json() | {"second_opinion": [other.to_json() for other in more]}, rows


def _dry_run(facts: dict[str, Any], rows: list[tuple[str, str]]) -> int:
    console.result(facts)
    console.table("dry run: nothing was measured or written", ["what", "value"], rows)
    return 0


EVALUATE = Command(
    "evaluate",
    "attack a trained model under named protocols and check whether the numbers can be believed",
    (
        "rayndom evaluate rayndom_home/exports/ctrw_bounds_digits --suite quick",
        "rayndom evaluate 5a632dea00def935 --suite standard --workers 2",
        "rayndom evaluate RUN_ID --suite paper --samples 200 --epsilon 8/255",
        "rayndom evaluate RUN_ID --suite full --surrogate AT_RUN_ID --workers 8",
        "rayndom evaluate RUN_ID --suite standard --keep-points --dry-run",
        "rayndom evaluate RUN_ID --suite standard --until 2",
        "rayndom evaluate RUN_ID --against autoattack --samples 500",
        "rayndom evaluate my_model.py:build --weights w.safetensors --data cifar10 --epsilon 8/255",
        "rayndom evaluate RUN_ID --suite standard --again 'pgd_20 T1 block 2/4'",
    ),
    _add,
    _run,
)
