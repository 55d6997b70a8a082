"""`rayndom evaluate TARGET`: how robust is it, under which protocol, and may the number be believed."""

from __future__ import annotations

import argparse
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
    from models.threat_model import ThreatModel
    from orchestration.evaluating.evaluation_run import Job
    from orchestration.experiment import ExperimentConfig


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target",
        help="trained recipe, run (16 digits), MLflow run id (32 digits), exported folder, models:/NAME@ALIAS; or a model of your own: "
        "FILE.py:CALLABLE, MODULE:CALLABLE, timm:NAME, a TorchScript file (.pt), a file of torch.export (.pt2)",
    )
    parser.add_argument("--weights", metavar="FILE", help="of a model of your own: safetensors or a state_dict; no code in it is executed")
    parser.add_argument("--data", metavar="NAME", help="of a model of your own: the data set whose test images it sees, e.g. cifar10")
    parser.add_argument("--data-folder", metavar="FOLDER", help="of --data image_folder: the folder that holds train/ and test/")
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
    from analysis.evaluation.suites import load_suite, with_surrogate
    from models.errors import UserError
    from orchestration.evaluating.adding_images import begin, forecast, grow
    from orchestration.evaluating.block_names import keys_named, what_changed
    from orchestration.evaluating.evaluation_cost import cost_of
    from orchestration.evaluating.evaluation_report import finish, show, suite_name
    from orchestration.evaluating.evaluation_run import EvaluationSettings, prepare, run_jobs
    from orchestration.evaluating.external_targets import external_from_flags, named_data
    from orchestration.evaluating.second_opinion import check_opinion, compare_opinions, prepare_opinion, show_opinion, suite_against
    from orchestration.trained_models.targets import refuse_external, resolve_target

    workplace = workplace_of(arguments)
    home = workplace.home
    data = named_data(arguments.data, arguments.data_folder, arguments.image_size)
    target = external_from_flags(arguments.target, arguments.weights, data, workplace) or resolve_target(arguments.target, home)
    if target.experiment is not None and data is not None:
        raise UserError(
            f"{arguments.target} is evaluated on the test images of {target.experiment.data.name}, on which it was trained; "
            "--data is for models that do not say"
        )
    if arguments.against:
        check_opinion(arguments.against)
        if arguments.until is not None:
            raise UserError("--against compares two attacks on the same images, --until adds images for one: use one of them")
    suite = arguments.suite or (suite_against(target) if arguments.against else "quick")
    name_of_suite = suite_name(suite)
    if arguments.surrogate:
        refuse_external(
            arguments.surrogate, home, "a surrogate is a trained run or an exported folder, which workers load without other code"
        )
        other = resolve_target(arguments.surrogate, home)
        suite = with_surrogate(load_suite(suite, target.defence), other.folder.absolute(), other.checkpoint())
        name_of_suite = suite.name
    settings = EvaluationSettings(
        suite=suite,
        threat_model=_threat_model(arguments, target.experiment),
        num_samples=arguments.samples,
        num_draws=arguments.draws,
        data=data,
        seed=arguments.seed,
    )
    name = target.name
    if target.external is not None:
        console.say(f"{target.external.model.executes}; results are kept as {target.external.name}")
    broken: list[tuple[BlockTask, Exception]] = []

    def run(*jobs: Job) -> None:
        if target.external is not None:
            target.external.keep(home)
        run_jobs(
            jobs,
            workers=arguments.workers,
            gpus_per_worker=arguments.gpus_per_worker,
            address=workplace.address,
            on_broken_block=lambda _, task, error: broken.append((task, error)),
            wait=arguments.wait,
        )

    before: dict[str, Record] = {}
    others: list[Job] = []
    if arguments.until is not None:
        if arguments.again:
            raise UserError("--again measures blocks of an evaluation that is there, --until makes one: use one of them")
        growing = begin(name, target, settings, workplace, arguments.until, keep=arguments.keep_points)
        if arguments.dry_run:
            facts, rows = forecast(growing, arguments.workers, arguments.gpus_per_worker)
            return _dry_run(facts, rows)
        job = grow(growing, run, arguments.workers, arguments.gpus_per_worker)
    else:
        job = prepare(name, target, settings, workplace, points="keep" if arguments.keep_points else None)
        if arguments.again:
            before = {key: job.done[key] for key in keys_named(job.plan, arguments.again) if key in job.done}
            job = replace(job, again=frozenset(before))
        others = [prepare_opinion(job, target, workplace)] if arguments.against else []
        if arguments.dry_run:
            cost, *more = (cost_of(each, arguments.workers, arguments.gpus_per_worker) for each in (job, *others))
            rows = cost.rows() + [(f"independent: {what}", value) for other in more for what, value in other.rows() if "left" in what]
            return _dry_run(cost.to_json() | {"second_opinion": [other.to_json() for other in more]}, rows)
        run(job, *others)
    for task in job.plan:
        if task.key in before and task.key in job.done:
            console.say(f"{task.title}, measured again: {what_changed(before[task.key], job.done[task.key])}")
    if broken and not job.done:
        raise broken[0][1]
    result = show(job)
    opinion = compare_opinions(result, others[0].result()) if others and others[0].done else None
    if opinion is not None:
        show_opinion(opinion)
    finish(job, result, name_of_suite, workplace, {} if opinion is None else {"second_opinion": opinion.to_json()})
    for task, error in broken:
        console.error(f"{task.title} could not be measured: {type(error).__name__}: {error}")
    if broken:
        console.error(f"{len(broken)} of {len(job.plan)} blocks are missing; the same command measures them, and no others")
    return 1 if broken else 0


def _dry_run(facts: dict[str, Any], rows: list[tuple[str, str]]) -> int:
    console.result(facts)
    console.table("dry run: nothing was measured or written", ["what", "value"], rows)
    return 0


def _threat_model(arguments: argparse.Namespace, experiment: ExperimentConfig | None) -> ThreatModel | None:
    from pydantic import ValidationError

    from models.errors import UserError
    from models.threat_model import ThreatModel

    if arguments.epsilon is None and arguments.norm is None:
        return None
    trained = experiment.threat_model if experiment else ThreatModel()
    names = ("norm", "epsilon")
    asked = {name: getattr(trained if getattr(arguments, name) is None else arguments, name) for name in names}
    try:
        return ThreatModel.model_validate(asked)
    except ValidationError as error:
        said = (f"--{''.join(map(str, item['loc'])) or 'epsilon'}: {item['msg'].removeprefix('Value error, ')}" for item in error.errors())
        raise UserError("; ".join(said)) from None


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
