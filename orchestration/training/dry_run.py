"""What a run would do and cost, found out by doing a few steps of it: nothing is written."""

from __future__ import annotations

import itertools
import resource
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.accelerator import counts_memory
from models.randomness import num_configurations
from orchestration import console
from orchestration.experiment import ExperimentConfig
from orchestration.home import Workplace
from orchestration.training.job import TrainingJob
from orchestration.training.preparation import PreparedTraining
from trainers.data import ArraySplit, StreamedSplit
from trainers.fit import TrainingLoop
from trainers.validation import limited

TIMED_STEPS = 3
TIMED_VALIDATION_IMAGES = 64
PATIENCE_S = 60.0


@dataclass(frozen=True)
class DryRun:
    """What a run would need. Times in seconds, by this machine, beside whatever else it does at this moment.

    Attributes:
        recipe, fingerprint: of the experiment.
        state: `new`, `interrupted` (it would go on) or `finished` (it would be reused).
        folder, store: where it would be written; the MLflow store without a password.
        training_images, validation_images, test_images, image_shape, num_classes: of the data.
        num_parameters, num_configurations: of the model; configurations of its randomness, `inf` for a continuum.
        precision, device, workers, threads: of the run; threads of one worker.
        first_loss: of the first step, mean over the batch of one worker.
        step_seconds: median of a few steps of one worker, what workers wait for each other apart.
        steps_per_epoch, epochs: of the run.
        batch_size: images of a step, all workers together.
        validation_seconds: of one validation; number_of_validations: of the run.
        peak_memory_gib: of the GPU, or of this process.
        initial_weights: what becomes of given ones.
    """

    recipe: str
    fingerprint: str
    state: str
    folder: Path
    store: str
    training_images: int
    validation_images: int
    test_images: int
    image_shape: tuple[int, ...]
    num_classes: int
    num_parameters: int
    num_configurations: float
    precision: str
    device: str
    workers: int
    threads: int
    first_loss: float
    step_seconds: float
    steps_per_epoch: int
    epochs: int
    batch_size: int
    validation_seconds: float
    number_of_validations: int
    peak_memory_gib: float
    initial_weights: str = "fresh"

    @property
    def images_per_second(self) -> float:
        """While training."""
        return self.batch_size / self.step_seconds

    @property
    def epoch_seconds(self) -> float:
        """Without validation."""
        return self.step_seconds * self.steps_per_epoch

    @property
    def total_seconds(self) -> float:
        """Of the whole run, with validation."""
        return self.epoch_seconds * self.epochs + self.validation_seconds * self.number_of_validations

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON types; keys are names."""
        derived = {name: getattr(self, name) for name in ("images_per_second", "epoch_seconds", "total_seconds")}
        return vars(self) | derived | {"folder": str(self.folder), "num_configurations": str(self.num_configurations)}

    def rows(self) -> list[tuple[str, str]]:
        """Return what a person reads, as pairs of a word and a value."""
        return [
            ("recipe", self.recipe),
            ("fingerprint", self.fingerprint),
            ("run", {"interrupted": "interrupted, would be resumed"}.get(self.state, self.state)),
            ("folder", str(self.folder)),
            ("MLflow store", self.store),
            ("training / validation / test images", f"{self.training_images} / {self.validation_images} / {self.test_images}"),
            ("image", "x".join(map(str, self.image_shape)) + f", {self.num_classes} classes"),
            ("parameters", f"{self.num_parameters:,}"),
            ("initial weights", self.initial_weights),
            ("configurations of the randomness", str(self.num_configurations)),
            ("arithmetic", self.precision),
            ("device", f"{self.device}, {self._workers()}"),
            ("loss of the first step", f"{self.first_loss:.4f}"),
            ("memory", f"{self.peak_memory_gib:.2f} GiB {'of this process' if self.device == 'cpu' else 'of the device'} at the peak"),
            ("one step", f"{self.step_seconds:.3f} s ({two_digits(self.images_per_second)} images/s)"),
            ("one epoch", f"{console.duration(self.epoch_seconds)} ({self.steps_per_epoch} steps)"),
            ("validation", f"{console.duration(self.validation_seconds)}, {self.number_of_validations} times"),
            ("whole run", f"{console.duration(self.total_seconds)} ({two_digits(self.total_seconds / 3600)} hours)"),
        ]

    def _workers(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return threads if self.workers == 1 else f"{self.workers} workers of {threads}, their waiting for each other not counted"


def dry_run(experiment: ExperimentConfig, workplace: Workplace) -> DryRun:
    """Build the model, train a few batches as one worker of the run would, validate a few images, and return what a run would need.

    Raises:
        UserError: the run could not start.
    """
    home, training, job = workplace.home, experiment.training, TrainingJob.at(workplace, experiment)
    prepared = PreparedTraining(experiment, job.data_root)
    begun = None if job.initial is None else job.initial.begin(prepared.model)
    loop, splits, model = prepared.loop_of_one_worker(), prepared.splits, prepared.model
    step_seconds, loss = _time_steps(loop)
    validated = limited(loop.held_out, training.validation.num_examples)
    return DryRun(
        recipe=experiment.name,
        fingerprint=experiment.fingerprint,
        state="finished" if job.folder.result() else "interrupted" if job.folder.has_state else "new",
        folder=job.folder.path,
        store=home.tracking_uri if home.tracking_uri.startswith("sqlite") else home.tracking_uri.split("@")[-1],
        training_images=len(splits.train),
        validation_images=len(splits.validation),
        test_images=len(splits.test),
        image_shape=splits.image_shape,
        num_classes=splits.num_classes,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_configurations=num_configurations(model),
        precision=loop.context.precision.name,
        device=str(prepared.device),
        workers=loop.world_size,
        threads=torch.get_num_threads(),
        first_loss=loss,
        step_seconds=step_seconds,
        steps_per_epoch=loop.steps_per_epoch,
        epochs=training.epochs,
        batch_size=training.batch_size,
        validation_seconds=_time_validation(loop, validated) * len(validated) * (1 if loop.average is None else 2),
        number_of_validations=-(-training.epochs // training.validation.every),
        peak_memory_gib=_peak_memory(prepared.device),
        initial_weights="fresh" if begun is None else begun.sentence(),
    )


def _time_steps(loop: TrainingLoop) -> tuple[float, float]:
    """Return the median seconds of a step, and the loss of the first one.

    The steps are those of the middle of the run: terms that join later are counted.
    """
    seconds: list[float] = []
    first_loss = float("nan")
    began = time.perf_counter()
    for number, (x_BCHW, y_B) in enumerate(itertools.islice(_batches(loop), 1 + TIMED_STEPS)):
        started = time.perf_counter()
        loss = loop.train_batch(0, x_BCHW, y_B)["loss"].item()
        seconds.append(time.perf_counter() - started)
        if number == 0:
            first_loss = loss
        elif time.perf_counter() - began > PATIENCE_S:
            break
    return statistics.median(seconds[1:]), first_loss  # the first one pays for lazy initialization


def _batches(loop: TrainingLoop) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the first batch of the run, then those of the epoch in its middle, again and again."""
    yield next(iter(loop.batches(0)))
    while True:
        yield from loop.batches(loop.config.epochs // 2)


def _time_validation(loop: TrainingLoop, held_out: ArraySplit | StreamedSplit) -> float:
    """Return the seconds that one image of a validation takes, workers sharing the images."""
    few = limited(held_out, TIMED_VALIDATION_IMAGES)
    started = time.perf_counter()
    loop.validate(few)
    return (time.perf_counter() - started) / len(few) / loop.world_size


def _peak_memory(device: torch.device) -> float:
    if counts_memory(device):
        return torch.accelerator.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def two_digits(value: float) -> str:
    """Return a positive number with at least two digits that count: `0.043`, `1.2`, `480`."""
    return f"{value:.0f}" if value >= 9.95 else f"{value:.2g}"
