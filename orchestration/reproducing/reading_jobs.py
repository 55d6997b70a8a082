"""Taking readings (quantities of the theory, times) on Ray workers; each is kept in a file of its own, whatever table asks for it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from analysis.fingerprints import weights_hash
from analysis.quantities.quantity import MOST_IMAGES, Subject
from analysis.reproduction.papers.measures import Theory
from analysis.reproduction.readings import Found, identity, read_test_set_seconds, read_theory
from models.accelerator import device_for
from models.errors import UserError
from models.files import write_text
from models.freed_memory import keep_freed_memory
from models.json_text import first_problem, read_json
from models.weights import load_pretrained
from orchestration import console
from orchestration.evaluating.evaluation_run import test_images
from orchestration.home import Home, Workplace
from orchestration.reproducing.cost import untrained_network
from orchestration.reproducing.plan import ReadingJob, Training, is_untrained, model_folder

SEED = 0
_FOUND = TypeAdapter(Found)


class KeptReadings:
    """The readings of a home, by what was read from which weights."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self._hashes: dict[str, str] = {}

    def path(self, job: ReadingJob) -> Path:
        """Return where a reading is kept; its networks must be trained."""
        untrained = is_untrained(job.measure)
        weights = [each.fingerprint if untrained else self._weights_hash(each) for each in job.trainings]
        experiment = job.training.experiment
        data = experiment.data.model_dump(mode="json", include={"name", "folder", "image_size", "limit_test"})
        images = f"{json.dumps(data, sort_keys=True)} {experiment.threat_model}"
        key = identity(job.measure, job.limit, SEED, weights, images)
        return self.home.root / "readings" / weights[0][:16] / f"{key}.json"

    def get(self, job: ReadingJob) -> Found | None:
        """Return what was found earlier, None if it has not been taken.

        Raises:
            UserError: the file is damaged.
        """
        path = self.path(job)
        if not os.path.lexists(path):
            return None
        try:
            return _FOUND.validate_python(read_json(path).get("found"))
        except ValidationError as error:
            raise UserError(f"{path} is damaged ({first_problem(error)}); delete it, `rayndom reproduce` measures it again") from None

    def keep(self, job: ReadingJob, found: dict[str, Any]) -> None:
        """Write what was found, whole or not at all."""
        what = {"title": job.title, "measure": asdict(job.measure)}
        write_text(self.path(job), json.dumps({**what, "found": found}, indent=1) + "\n")

    def _weights_hash(self, training: Training) -> str:
        """Return the hash of a trained network's weights, read once."""
        if training.fingerprint not in self._hashes:
            folder = model_folder(self.home, training)
            self._hashes[training.fingerprint] = weights_hash(load_pretrained(folder, resample_on_forward=False))
        return self._hashes[training.fingerprint]


def run_readings(
    jobs: Sequence[ReadingJob],
    workplace: Workplace,
    *,
    on_done: Callable[[ReadingJob, Found], None],
    on_failure: Callable[[ReadingJob, Exception], None],
) -> None:
    """Give all readings: those that are kept, and the others after they were taken, each on a Ray worker of one core.

    Args:
        on_done: called with each. on_failure: called when one cannot be taken; the others go on.
    """
    kept = KeptReadings(workplace.home)
    pending: dict[Path, list[ReadingJob]] = {}
    for job in jobs:
        if is_untrained(job.measure) and kept.get(job) is None:
            kept.keep(job, count(job))
        found = kept.get(job)
        if found is None:
            # Rows that rest on equal networks share the file of a reading.
            pending.setdefault(kept.path(job), []).append(job)
        else:
            on_done(job, found)
    if not pending:
        return
    import ray

    from orchestration.training import cluster

    cluster.connect(workplace.address)
    running: dict[Any, list[ReadingJob]] = {}
    for shared in pending.values():
        job = shared[0]
        gpus = job.training.experiment.resources.gpus_per_worker
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=3)(take_reading)
        folders = [model_folder(kept.home, each) for each in job.trainings]
        running[task.remote(job, folders, workplace.data_root)] = shared
    while running:
        (finished,), _ = ray.wait(list(running), num_returns=1)
        shared = running.pop(finished)
        try:
            kept.keep(shared[0], ray.get(finished))
        except ray.exceptions.RayError as error:
            for job in shared:
                on_failure(job, getattr(error, "cause", None) or error)
            continue
        console.say(f"reading {len(pending) - len(running)} of {len(pending)}: {shared[0].title}")
        found = kept.get(shared[0])
        assert found is not None
        for job in shared:
            on_done(job, found)


def count(job: ReadingJob) -> dict[str, Any]:
    """Return what a job finds on networks that nothing has trained, as JSON types."""
    assert isinstance(job.measure, Theory)
    first, *others = [untrained_network(each.experiment) for each in job.trainings]
    return asdict(read_theory(job.measure, Subject(first, _no_images, seed=SEED, other=others[0] if others else None)))


def _no_images() -> tuple[torch.Tensor, torch.Tensor]:
    raise UserError("what no training changes is not measured on images")


def take_reading(job: ReadingJob, folders: Sequence[Path], data_root: Path | None) -> dict[str, Any]:
    """Return what a job finds, as JSON types; on the GPU if the training asked for one. `folders`: of its exported networks."""
    torch.set_num_threads(1)
    keep_freed_memory()
    experiment = job.training.experiment
    device = device_for(experiment.resources.gpus_per_worker)
    measure = job.measure

    def load(folder: Path) -> torch.nn.Module:
        return load_pretrained(folder, resample_on_forward=False).to(device).to(memory_format=torch.channels_last)

    if not isinstance(measure, Theory):
        x_NCHW, _ = test_images(experiment.data, data_root, None)
        return asdict(read_test_set_seconds(load(folders[0]), x_NCHW))
    subject = Subject(
        load(folders[0]),
        lambda: test_images(experiment.data, data_root, min(MOST_IMAGES, job.limit or MOST_IMAGES)),
        experiment.threat_model,
        at_most=job.limit,
        seed=SEED,
        other=load(folders[1]) if len(folders) > 1 else None,
    )
    return asdict(read_theory(measure, subject))
