"""`rayndom submit`, `logs`, `stop` and `resume`: sweeps as jobs of a Ray cluster."""

from __future__ import annotations

import argparse
import asyncio
import shlex
from typing import TYPE_CHECKING

from models.errors import UserError
from orchestration import console
from orchestration.commands.command import Command
from orchestration.commands.sweep import add_item, named_sweep

if TYPE_CHECKING:
    from orchestration.sweeping.jobs import SweepJobs


def _add_address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", help="the cluster's dashboard (default: RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265)")


def _add_submit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sweep", nargs="?", help="name of a sweep, or a YAML file here, which travels with the job")
    add_item(parser)
    _add_address(parser)
    parser.add_argument("--no-evaluation", action="store_true", help="end after the search")
    parser.add_argument("--data-root", help="folder of the data sets on the cluster (default: RAYNDOM_DATA there)")
    parser.add_argument("--program", default="rayndom", help="the command line on the cluster (default rayndom)")
    parser.add_argument("--wait", action="store_true", help="show the job's lines until it is over")


def _add_job(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", nargs="?", help="id of a job, or name of a sweep: its newest job (default: the newest job of all)")
    _add_address(parser)


def _add_logs(parser: argparse.ArgumentParser) -> None:
    _add_job(parser)
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the job is over")


def _submit(arguments: argparse.Namespace) -> int:
    if arguments.help:
        arguments.parser.print_help()
        return 0
    from orchestration.recipes.library import own_folder
    from orchestration.sweeping.jobs import SweepJobs

    config = named_sweep(arguments)  # a mistake is found here, not on the cluster
    flags = list(arguments.fields)
    flags += ["--no-evaluation"] if arguments.no_evaluation else []
    for name, value in (("--home", arguments.home), ("--data-root", arguments.data_root)):
        flags += [name, value] if value else []
    jobs = SweepJobs(arguments.address)
    flags += ["--item"] if arguments.item else []
    job = jobs.submit(arguments.sweep, flags, shlex.split(arguments.program), name=config.name, recipes=own_folder())
    return _started(jobs, job, arguments.wait)


def _started(jobs: SweepJobs, job: str, wait: bool) -> int:
    console.result({"job": job, "address": jobs.address})
    console.say(f"job {job} at {jobs.address}")
    if wait:
        return _follow(jobs, job)
    for verb in ("logs -f", "stop", "resume"):
        console.say(f"  rayndom {verb} {job} --address {jobs.address}")
    return 0


def _logs(arguments: argparse.Namespace) -> int:
    jobs, job = _find(arguments)
    if arguments.follow:
        return _follow(jobs, job)
    console.say(jobs.logs(job).rstrip("\n"))
    console.say(f"job {job} is {jobs.status(job)}")
    return 0


def _follow(jobs: SweepJobs, job: str) -> int:
    async def lines() -> None:
        async for text in jobs.follow(job):
            console.say(text.rstrip("\n"))

    asyncio.run(lines())
    status = jobs.status(job)
    console.say(f"job {job} is {status}")
    return 0 if status == "SUCCEEDED" else 1


def _stop(arguments: argparse.Namespace) -> int:
    jobs, job = _find(arguments)
    jobs.stop(job)
    console.result({"job": job, "stopped": True})
    console.say(f"job {job} was asked to end; finished epochs are kept:  rayndom resume {job} --address {jobs.address}")
    return 0


def _resume(arguments: argparse.Namespace) -> int:
    jobs, job = _find(arguments)
    return _started(jobs, jobs.resume(job), wait=False)


def _find(arguments: argparse.Namespace) -> tuple[SweepJobs, str]:
    from orchestration.sweeping.jobs import SweepJobs

    jobs = SweepJobs(arguments.address)
    if arguments.job:
        return jobs, jobs.find(arguments.job).id
    known = jobs.list()
    if not known:
        raise UserError(f"no sweep was submitted to {jobs.address}")
    return jobs, known[-1].id


SUBMIT = Command(
    "submit",
    "run a sweep as a job of a Ray cluster; this computer may go away",
    (
        "rayndom submit ctrw_bounds_digits --address http://127.0.0.1:8265",
        "rayndom submit my_sweep.yaml --num_trials 40 --wait",
    ),
    _add_submit,
    _submit,
    takes_fields=True,
)
LOGS = Command("logs", "show what a submitted sweep prints", ("rayndom logs", "rayndom logs -f ctrw_bounds_digits"), _add_logs, _logs)
STOP = Command("stop", "end a submitted sweep; what is finished is kept", ("rayndom stop ctrw_bounds_digits",), _add_job, _stop)
RESUME = Command(
    "resume", "go on with a submitted sweep that was stopped or failed", ("rayndom resume ctrw_bounds_digits",), _add_job, _resume
)
