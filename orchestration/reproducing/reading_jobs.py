"""Quantities of the theory and times of trained networks on Ray workers; each is kept in a file of its own, whatever table asks for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from analysis.fingerprints import weights_hash
from analysis.quantities.quantity import MOST_IMAGES, Subject
from analysis.reproduction.papers.measures import Theory
from analysis.reproduction.readings import Found, identity, num_images, read_test_set_seconds, read_theory
from analysis.reproduction.scale import BUDGETS, Scale
from models.errors import UserError
from models.files import write_text
from models.weights import load_pretrained
from orchestration import console
from orchestration.evaluating.evaluation_run import test_images
from orchestration.home import Home
from orchestration.reproducing.plan import Training, WantedReading, model_folder

SEED = 0


@dataclass(frozen=True)
class ReadingJob:
    """One reading to take.

    Attributes:
        title: in words. wanted: what. folder, other: of the networks. limit: at most so many test images, None: the function's own number.
        path: where it is kept.
    """

    title: str
    wanted: WantedReading
    folder: Path
    other: Path | None
    limit: int | None
    path: Path

    def kept(self) -> Found | None:
        """Return what was found earlier, None if it has not been taken.

        Raises:
            UserError: the file is damaged.
        """
        if not self.path.is_file():
            return None
        try:
            return Found(**json.loads(self.path.read_text())["found"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{self.path} is damaged ({error}); delete it, `rayndom reproduce` measures it again") from None

    def keep(self, found: dict[str, Any]) -> None:
        """Write what was found, whole or not at all."""
        what = {"title": self.title, "measure": asdict(self.wanted.measure)}
        write_text(self.path, json.dumps({**what, "found": found}, indent=1) + "\n")


class HashedWeights:
    """Hashes of the networks of trainings, each read once."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self._hashes: dict[str, str] = {}

    def of(self, training: Training) -> str:
        """Return the hash of a trained network's weights."""
        if training.fingerprint not in self._hashes:
            folder = model_folder(self.home, training)
            self._hashes[training.fingerprint] = weights_hash(load_pretrained(folder, resample_on_forward=False))
        return self._hashes[training.fingerprint]


def reading_job(wanted: WantedReading, scale: Scale, home: Home, hashes: HashedWeights) -> ReadingJob:
    """Return the job of a reading; its networks must be trained."""
    limit = BUDGETS[scale].num_samples
    weights = [hashes.of(each) for each in (wanted.training, wanted.other) if each is not None]
    data = wanted.training.experiment.data
    images = json.dumps(data.model_dump(mode="json", include={"name", "folder", "image_size", "limit_test"}), sort_keys=True)
    threat_model = str(wanted.training.experiment.threat_model)
    key = identity(wanted.measure, limit, SEED, weights, f"{images} {threat_model}")
    measure = wanted.measure
    name = measure.function if isinstance(measure, Theory) else measure.quantity
    details = ", ".join(f"{key} {value}" for key, value in measure.parameters.items()) if isinstance(measure, Theory) else ""
    return ReadingJob(
        f"{wanted.training.key}: {name}{f' ({details})' if details else ''}",
        wanted,
        model_folder(home, wanted.training),
        model_folder(home, wanted.other) if wanted.other is not None else None,
        limit,
        home.root / "readings" / weights[0][:16] / f"{key}.json",
    )


def run_readings(
    jobs: Sequence[ReadingJob],
    data_root: Path | None,
    *,
    address: str | None = None,
    on_done: Callable[[ReadingJob], None] = lambda job: None,
    on_failure: Callable[[ReadingJob, Exception], None],
) -> None:
    """Take all readings that are not kept yet, each on a Ray worker of one core.

    Args:
        on_done: called after each. on_failure: called when one cannot be taken; the others go on.
    """
    pending = {job.path: job for job in jobs if job.kept() is None}
    if not pending:
        return
    import ray

    from orchestration.training import cluster

    cluster.connect(address)
    running: dict[Any, ReadingJob] = {}
    for job in pending.values():
        gpus = job.wanted.training.experiment.resources.gpus_per_worker
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=3)(take_reading)
        running[task.remote(job, data_root)] = job
    count = 0
    while running:
        (finished,), _ = ray.wait(list(running), num_returns=1)
        job = running.pop(finished)
        count += 1
        try:
            job.keep(ray.get(finished))
        except ray.exceptions.RayError as error:
            on_failure(job, getattr(error, "cause", None) or error)
            continue
        console.say(f"reading {count} of {len(pending)}: {job.title}")
        on_done(job)


def take_reading(job: ReadingJob, data_root: Path | None) -> dict[str, Any]:
    """Return what a job finds, as JSON types; on the GPU if the training asked for one."""
    torch.set_num_threads(1)
    experiment = job.wanted.training.experiment
    device = "cuda" if experiment.resources.gpus_per_worker and torch.cuda.is_available() else "cpu"
    measure = job.wanted.measure

    def load(folder: Path) -> torch.nn.Module:
        return load_pretrained(folder, resample_on_forward=False).to(device, memory_format=torch.channels_last)

    if not isinstance(measure, Theory):
        x_NCHW, _ = test_images(experiment.data, data_root, None)
        return asdict(read_test_set_seconds(load(job.folder), x_NCHW))
    subject = Subject(
        load(job.folder),
        lambda: test_images(experiment.data, data_root, min(MOST_IMAGES, num_images(measure, job.limit))),
        experiment.threat_model,
        job.limit,
        seed=SEED,
    )
    return asdict(read_theory(measure, subject, load(job.other) if job.other is not None else None))
