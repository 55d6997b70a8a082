"""Sweeps as Ray jobs: the driver runs on the cluster's head, so that the computer that submits may go away.

What identifies a job's sweep is its command; the same command again goes on with it, because the sweep's state is in the home folder there.
"""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from models.errors import UserError
from models.plugins import VARIABLE, plugins, sent_plugins
from orchestration.recipes.library import METHODS, OWN_FOLDER, SETTINGS
from orchestration.training.cluster_token import HINT, MODE_VARIABLE, check_address, cluster_token

ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
SWEEP_KEY = "rayndom.sweep"
RESUMES_KEY = "rayndom.resumes"
OVER = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)
SUBMITTED_FOLDER = "submitted"  # in the job's working folder


def token_headers() -> dict[str, str]:
    """Return what shows the user's token to a cluster: Ray's own commands show one that is there, its client only with RAY_AUTH_MODE."""
    token = None if MODE_VARIABLE in os.environ else cluster_token()  # Ray's client obeys the variable
    return {"Authorization": f"Bearer {token}"} if token else {}


@dataclass(frozen=True)
class SweepJob:
    """A job that runs a sweep."""

    id: str
    sweep: str
    status: str
    command: str
    started_ms: int


class SweepJobs:
    """The jobs of a cluster that run sweeps.

    Args:
        address: of the cluster's dashboard, e.g. `http://127.0.0.1:8265`; None: RAY_API_SERVER_ADDRESS, else that.

    Raises:
        UserError: nothing answers there, or it wants another token.
    """

    def __init__(self, address: str | None = None) -> None:
        self.address = address or os.environ.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS
        check_address(self.address)
        headers = token_headers()
        try:
            self.client = JobSubmissionClient(self.address, headers=headers) if headers else JobSubmissionClient(self.address)
        except AuthenticationError as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")[:500]
            raise UserError(f"the Ray cluster at {self.address[:300]} refuses: {reason}. {HINT}") from None
        except Exception as error:  # each way in which Ray fails to reach a cluster has an error of its own
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")[:500]
            raise UserError(
                f"no Ray cluster takes jobs at {self.address[:300]}: {reason}. `--address` is the dashboard's, e.g. {DEFAULT_ADDRESS} "
                "on the head or through `ray dashboard ray_cluster.yaml`."
            ) from None

    def submit(
        self,
        sweep: str,
        flags: Sequence[str],
        program: Sequence[str] = ("rayndom",),
        environment: dict[str, str] | None = None,
        *,
        name: str,
        recipes: Path | None = None,
    ) -> str:
        """Start a sweep as a job and return the job's id. A YAML file, and settings and methods of the user's own, travel with the job.

        Args:
            sweep: name of a shipped sweep, a table or figure of a paper if the flags say so, or a YAML file on this computer.
            flags: of `rayndom sweep`.
            program: the command line on the cluster.
            environment: variables of the driver there.
            name: of the sweep, by which its jobs are found.
            recipes: folder of the user's own settings and methods.
        """
        sent = sent_plugins()
        if sent:
            # Found there without a flag, by all processes: they start in the job's folder.
            inner = [plugin.module for plugin in plugins() if "." in plugin.module and plugin.module.partition(".")[0] in sent]
            environment = {**(environment or {}), VARIABLE: os.pathsep.join([*(f"./{place.name}" for place in sent.values()), *inner])}
        runtime: dict[str, Any] = {"env_vars": environment} if environment else {}
        where = sweep
        with tempfile.TemporaryDirectory() as folder:
            if Path(sweep).suffix in (".yaml", ".yml"):
                where = f"{SUBMITTED_FOLDER}/{Path(sweep).name}"
                (Path(folder) / SUBMITTED_FOLDER).mkdir()
                shutil.copy(sweep, Path(folder) / where)
            if recipes is not None:
                # Found there without a flag: the job starts in this folder.
                for kind in (SETTINGS, METHODS):
                    if (recipes / kind).is_dir():
                        shutil.copytree(recipes / kind, Path(folder) / OWN_FOLDER / kind)
            for place in sent.values():
                if place.is_dir():
                    shutil.copytree(place, Path(folder) / place.name, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(place, Path(folder) / place.name)
            if any(Path(folder).iterdir()):
                runtime["working_dir"] = folder  # uploaded before this returns
            command = shlex.join([*program, "sweep", where, *flags])
            return self.client.submit_job(entrypoint=command, runtime_env=runtime, metadata={SWEEP_KEY: name})

    def resume(self, job_id: str) -> str:
        """Start a job's command again, with the files that it had, and return the new job's id.

        Raises:
            UserError: no such job, or it is still running.
        """
        job = self.find(job_id)
        if job.status not in {status.value for status in OVER}:
            raise UserError(f"job {job.id} is {job.status}: nothing to resume. `rayndom stop {job.id}` ends it.")
        details = self.client.get_job_info(job.id)
        return self.client.submit_job(
            entrypoint=details.entrypoint, runtime_env=details.runtime_env or {}, metadata={SWEEP_KEY: job.sweep, RESUMES_KEY: job.id}
        )

    def stop(self, job_id: str) -> None:
        """Ask a job to end. What is finished is kept.

        Raises:
            UserError: no such job.
        """
        self.client.stop_job(self.find(job_id).id)

    def logs(self, job_id: str) -> str:
        """Return what a job has printed so far."""
        return self.client.get_job_logs(self.find(job_id).id)

    def follow(self, job_id: str) -> AsyncIterator[str]:
        """Return a job's output as it comes, until the job is over."""
        return self.client.tail_job_logs(self.find(job_id).id)

    def status(self, job_id: str) -> str:
        """Return PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
        return self.find(job_id).status

    def list(self) -> list[SweepJob]:
        """Return the jobs that run sweeps, the newest last."""
        jobs = [
            SweepJob(
                str(details.submission_id),
                metadata[SWEEP_KEY],
                details.status.value,
                details.entrypoint,
                details.start_time or 0,
            )
            for details in self.client.list_jobs()
            if details.submission_id and SWEEP_KEY in (metadata := details.metadata or {})
        ]
        return sorted(jobs, key=lambda job: job.started_ms)

    def find(self, name: str) -> SweepJob:
        """Return a job by its id, or the newest one of a sweep by the sweep's name.

        Raises:
            UserError: there is none.
        """
        jobs = self.list()
        matching = [job for job in jobs if name in (job.id, job.sweep)]
        if not matching:
            known = ", ".join(f"{job.id} ({job.sweep})" for job in jobs[-5:]) or "none"
            raise UserError(f"no job {name!r} at {self.address}; the latest are: {known}")
        return matching[-1]
