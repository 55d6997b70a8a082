"""The one training loop: epochs, objective, averaging over workers, schedule, validation, best checkpoint, resume."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.constraints import apply_constraints
from models.errors import UserError
from models.network_parts import freeze
from models.randomness import derive_seed, load_randomness_state, randomness_state
from models.threat_model import ThreatModel
from trainers.accumulation import accumulate
from trainers.averaging import WeightAverage, recompute_batch_statistics
from trainers.checkpoint import START_AGAIN, STATE_FILE, read_state, write_state
from trainers.compilation import compiled_steps
from trainers.complaints import CATASTROPHIC_OVERFITTING, CLIPPED_STEPS
from trainers.config import TrainingConfig
from trainers.data import ArraySplit, Augmentation, DeviceBatches, Splits, StreamedSplit, training_batches
from trainers.data.sharding import check_batch_size
from trainers.distributed import (
    average_batch_statistics,
    average_gradients,
    broadcast_weights,
    sum_over_workers,
    synchronize_batch_norm,
    to_cpu,
    world,
)
from trainers.hardware import PeakMemory, choose_precision, to_channels_last_
from trainers.objective import build_objective
from trainers.optimizer import build_optimizer
from trainers.reporting import EpochReport, Reporter, SilentReporter, StopTraining
from trainers.schedule import learning_rate_factor, plateau_reductions
from trainers.selection import Selection
from trainers.signs import catastrophic_overfitting, gradient_ratios, most_common_answer, single_step_accuracy
from trainers.step import StepContext
from trainers.streams import Streams
from trainers.validation import BATCH_SIZE, validate
from trainers.validation_beside import Beside, Measured, can_validate_beside, with_weights
from trainers.warm_start import ShownImages, WarmStart
from trainers.within_epoch import read_within_epoch, write_within_epoch

STEP_GENERATORS = ("attack", "noise")
"""Streams that steps draw from; those of order and augmentation are drawn from at an epoch's start alone."""


class TrainingDiverged(RuntimeError):
    """The loss is no longer finite."""


@dataclass
class FitResult:
    """What training ended with; the model holds the selected weights.

    Attributes:
        metrics: of the selected epoch.
        selected_epoch: number of the selected epoch, from 1.
        num_epochs: epochs trained in all, those before a resume included.
        history: metrics of every epoch.
        stopped_early: whether patience or a reporter ended training.
    """

    metrics: dict[str, float]
    selected_epoch: int
    num_epochs: int
    history: list[dict[str, float]] = field(default_factory=list)
    stopped_early: bool = False


def fit(
    model: nn.Module,
    splits: Splits,
    threat_model: ThreatModel,
    config: TrainingConfig,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    augmentation: Augmentation | None = None,
    reporter: Reporter | None = None,
    resume_from: Path | None = None,
) -> FitResult:
    """Train `model` and leave the selected weights in it.

    In a process group every worker calls this with the same arguments; each takes its rows of the global batch.

    Args:
        model: from `models.build_model`.
        splits: training, validation and test images, on `device` or streaming.
        threat_model: norm and radius of the inner attack and of validation.
        config: everything else.
        seed: root seed of the run's streams.
        device: where to train.
        augmentation: of training images; None: none.
        reporter: told of every epoch; may write the resumable state, may stop the run.
        resume_from: a folder with a state written by an earlier call with the same arguments: goes on after its last epoch, or amid one
            where such a state was written, and ends bit-identically to an uninterrupted run on a CPU.

    Raises:
        UserError: the configuration does not fit the data or the number of workers.
        TrainingDiverged: the loss became infinite or not a number.
        OSError: the checkpoint could not be written; the previous one is intact.
    """
    loop = TrainingLoop(
        model,
        splits,
        threat_model,
        config,
        seed=seed,
        device=torch.device(device),
        augmentation=augmentation or Augmentation(),
        reporter=reporter or SilentReporter(),
    )
    return loop.run(resume_from)


class TrainingLoop:
    """A training before its first step: `fit` runs it to its end, a dry run takes a few steps of it.

    Args:
        model, splits, threat_model, config, seed, device, augmentation, reporter: see `fit`.
        num_workers: take one worker's rows of batches that so many share, without a process group; None: as the process group says.
        beside: where epochs may be validated while the next one trains; None: nowhere.
    """

    def __init__(
        self,
        model: nn.Module,
        splits: Splits,
        threat_model: ThreatModel,
        config: TrainingConfig,
        *,
        seed: int,
        device: torch.device,
        augmentation: Augmentation,
        reporter: Reporter,
        num_workers: int | None = None,
        beside: Beside | None = None,
    ) -> None:
        self.rank, processes = world()
        self.world_size = num_workers or processes
        check_batch_size(config.batch_size, len(splits.train), self.world_size, config.accumulation)
        self.model = to_channels_last_(model.to(device))
        if config.batch_norm == "synchronized" and processes > 1:
            synchronize_batch_norm(self.model)
        self.splits, self.config, self.seed, self.device = splits, config, seed, device
        self.augmentation, self.reporter = augmentation, reporter
        self.objective = build_objective(config.objective)
        self.objective.prepare(self.model)
        apply_constraints(self.model)
        broadcast_weights(self.model)
        freeze(self.model, config.freeze)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        if augmentation.mixing != "none" and not config.objective.takes_soft_labels:
            raise UserError(f"objective {config.objective.name} takes no labels of two classes, which mixing {augmentation.mixing} makes")
        self.steps_per_epoch = splits.train.epoch_length // config.batch_size
        self.context = StepContext(
            threat_model=threat_model,
            attack=config.attack,
            redraw=config.redraw,
            streams=Streams(seed, self.rank, device),
            precision=choose_precision(config.precision, device),
            num_epochs=config.epochs,
            steps_per_epoch=self.steps_per_epoch,
        )
        self.compiled = compiled_steps(self.model, config.compile, device, config.objective)
        self.average = None if config.averaging.name == "none" else WeightAverage(self.model, config.averaging, config.epochs)
        if config.attack.warm_start is not None:
            self.context.warm_start = WarmStart(splits.train, augmentation, config.attack.warm_start)
        self.clipped_steps = torch.zeros((), device=device)
        self.finished_epochs = 0
        self.reductions = 0
        self.history: list[dict[str, float]] = []
        self.selection = Selection(config.validation)
        self.ended = False
        self.beside = beside if can_validate_beside(config, processes) else None
        self.begun: tuple[int, dict[str, Any]] | None = None
        """Finished steps of the next epoch, and the state after them; None: it begins at its first step."""

    def run(self, resume_from: Path | None) -> FitResult:
        """Train to the end, or go on after the state in a folder; leave the selected weights in the model. Raises what `fit` raises."""
        if resume_from is not None:
            if (resume_from / STATE_FILE).is_file():
                self.load_state_dict(read_state(resume_from))
            self.begun = read_within_epoch(resume_from, self.finished_epochs, self.rank, self.world_size)
        before: Measured | None = None
        while self.finished_epochs < self.config.epochs and not self.ended:
            try:
                metrics = self.train_epoch(self.finished_epochs)
            except TrainingDiverged:
                self._take(before)
                if self.ended:
                    break
                raise
            self._take(before)
            if self.ended:  # with the epoch before: this one is not trained
                break
            self.finished_epochs += 1
            if self.average is not None:
                self.average.after_epoch(self.finished_epochs)
            before = self._measured_beside(metrics)
            if before is None:
                self.measure(metrics)
                self._report(EpochReport(self.finished_epochs, metrics), self.save)
        best = self.selection.best
        assert best is not None
        self.model.load_state_dict(best["weights"])
        return FitResult(
            metrics=best["metrics"],
            selected_epoch=best["epoch"],
            num_epochs=self.finished_epochs,
            history=self.history,
            stopped_early=self.finished_epochs < self.config.epochs,
        )

    def _report(self, report: EpochReport, save: Callable[[Path], None]) -> None:
        try:
            self.reporter.epoch_finished(report, save)
        except StopTraining:
            self.ended = True

    def _measured_beside(self, metrics: dict[str, float]) -> Measured | None:
        """Begin the validation of the epoch that was trained last beside the next one; None: it is to be done here, if at all."""
        last = self.finished_epochs == self.config.epochs
        if self.beside is None or last or self.finished_epochs % self.config.validation.every:
            return None
        state = self.state_dict()
        pending = self.beside.begin(state["weights"])
        return None if pending is None else Measured(self.finished_epochs, metrics, state, pending)

    def _take(self, measured: Measured | None) -> None:
        """Measure and report the epoch before the one that was just trained, with its weights in the model."""
        if measured is None:
            return
        found = measured.pending.result()
        trained, self.finished_epochs = self.finished_epochs, measured.epoch
        with with_weights(self.model, measured.state["weights"]):
            self.measure(measured.metrics, found)
            state = measured.state | {"history": self.history, **self.selection.state_dict(), "ended": self.ended}

            def save(folder: Path) -> None:
                write_state(state, folder)

            self._report(EpochReport(measured.epoch, measured.metrics), save)
        self.finished_epochs = trained

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """Take all steps of an epoch (from 0) and return its metrics, those of a validation apart.

        Raises:
            TrainingDiverged: the mean loss is not finite.
        """
        started, memory = time.perf_counter(), PeakMemory(self.device)
        totals: dict[str, Tensor] = {}
        self.clipped_steps.zero_()
        batches, done = self.batches(epoch), 0
        if self.begun is not None:
            done, state = self.begun
            totals, seconds_before = self._load_within_epoch(state)
            started, self.begun = started - seconds_before, None
        for index, (x_BCHW, y_B) in enumerate(batches):
            if index < done:
                continue
            if self.context.warm_start is not None and isinstance(batches, DeviceBatches) and batches.shown is not None:
                self.context.shown = ShownImages(*batches.shown)
            scalars = self.train_batch(index, x_BCHW, y_B)
            for name, value in scalars.items():
                totals[name] = totals[name] + value if name in totals else value.clone()
            save = functools.partial(self._save_within_epoch, epoch, index + 1, totals, started)
            self.reporter.step_finished(index + 1, self.steps_per_epoch, save)
        average_batch_statistics(self.model)
        self.context.shown = None  # what looks at the last batch again leaves no perturbation
        if self.context.warm_start is not None:
            self.context.warm_start.end_epoch()
        means = {f"train/{name}": value.item() / self.steps_per_epoch for name, value in totals.items()}
        means = {name: value / self.world_size for name, value in sum_over_workers(means, self.device).items()}
        if not math.isfinite(means["train/loss"]):
            raise TrainingDiverged(
                f"the loss is {means['train/loss']} in epoch {epoch + 1}: lower training.optimizer.learning_rate, or set "
                "training.optimizer.gradient_clip_norm"
            )
        signs = self.signs(x_BCHW, y_B)
        if self.config.optimizer.gradient_clip_norm is not None:
            signs[CLIPPED_STEPS] = self.clipped_steps.item() / (self.steps_per_epoch * self.objective.replays)
        seconds = time.perf_counter() - started
        return {
            **means,
            **signs,
            "train/learning_rate": self.optimizer.param_groups[0]["lr"],
            "time/epoch_seconds": seconds,
            "time/examples_per_second": self.steps_per_epoch * self.config.batch_size / seconds,
            **memory.metrics(),
        }

    def batches(self, epoch: int) -> Iterable[tuple[Tensor, Tensor]]:
        """Begin an epoch (from 0) and return this worker's rows of its batches."""
        self.reductions = plateau_reductions(self.config.schedule, self.history)
        self.context.epoch = epoch
        self.context.streams.begin_epoch(self.model, epoch)
        if self.context.warm_start is not None:
            self.context.warm_start.begin_epoch(epoch)
        self.model.train()
        return training_batches(
            self.splits.train,
            self.config.batch_size // self.world_size,
            self.augmentation,
            order_generator=self.context.streams.data_order,
            augmentation_generator=self.context.streams.augmentation,
            rank=self.rank,
            world_size=self.world_size,
        )

    def train_batch(self, index: int, x_BCHW: Tensor, y_B: Tensor) -> dict[str, Tensor]:
        """Take the steps on batch `index` of the epoch that was begun last, most often one; return the mean of their scalars."""
        replays = self.objective.replays
        totals: dict[str, Tensor] = {}
        for self.context.replay in range(replays):
            for name, value in self.train_step(index, x_BCHW, y_B).items():
                totals[name] = totals[name] + value / replays if name in totals else value / replays
        return totals

    def train_step(self, index: int, x_BCHW: Tensor, y_B: Tensor) -> dict[str, Tensor]:
        """Take step `index` of the epoch that was begun last; return the objective's scalars, `loss` among them."""
        context, optimizer, limit = self.context, self.optimizer, self.config.optimizer.gradient_clip_norm
        context.step = context.epoch * self.steps_per_epoch + index
        progress = context.epoch + index / self.steps_per_epoch
        # One-cycle schedules start at 0; the middle of the step is the rate that the step stands for.
        middle = progress + 0.5 / self.steps_per_epoch
        factor = learning_rate_factor(self.config.schedule, middle, self.config.epochs, self.reductions)
        for group in optimizer.param_groups:
            group["lr"] = self.config.optimizer.learning_rate * factor
        optimizer.zero_grad(set_to_none=self.config.optimizer.gradients_when_unused == "none")
        if self.average is not None:
            y_B = self.average.labels(self.model, x_BCHW, y_B)
        with self.compiled():
            scalars = accumulate(self.objective, self.model, x_BCHW, y_B, context, self.config.accumulation)
        average_gradients(self.model.parameters())
        if limit is not None:
            self.clipped_steps += nn.utils.clip_grad_norm_(self.model.parameters(), limit) > limit
        optimizer.step()
        self.objective.after_optimizer_step(self.model, context)
        apply_constraints(self.model)
        if self.average is not None:
            self.average.after_step(context.epoch + (index + 1) / self.steps_per_epoch)
        return scalars

    def signs(self, x_BCHW: Tensor, y_B: Tensor) -> dict[str, float]:
        """Return the signs of whether this epoch learned, the same on every worker; `x_BCHW, y_B` are the last images of it."""
        measured = gradient_ratios(self.objective, self.model, x_BCHW, y_B, self.context)
        measured |= most_common_answer(self.model, self.splits.validation, self.seed)
        return {name: value / self.world_size for name, value in sum_over_workers(measured, self.device).items()}

    def measure(self, metrics: dict[str, float], found: dict[str, float] | None = None) -> None:
        """Add validation metrics where this epoch has them, keep the best weights, and note when patience has run out.

        Args:
            metrics: of the epoch. found: by a validation elsewhere; None: it is done here.
        """
        validation = self.config.validation
        last = self.finished_epochs == self.config.epochs
        self.history.append(metrics)
        if not last and self.finished_epochs % validation.every:
            return
        measured, weights = self.validate(self.held_out) if found is None else found, None
        if self.average is not None:
            measured, weights = self.selection.better_copy(measured, self.average, self.model, self._validate_average)
        metrics |= measured
        if self.config.single_step:
            draws, threat_model = validation.num_draws, self.context.threat_model
            metrics |= single_step_accuracy(self.model, self.held_out, threat_model, draws, self.seed)
            metrics[CATASTROPHIC_OVERFITTING] = float(catastrophic_overfitting(self.history))
        self.selection.consider(self.finished_epochs, measured, metrics, lambda: weights or to_cpu(self.model.state_dict()))
        if self.selection.is_out_of_patience:
            self.ended = True

    def _validate_average(self) -> dict[str, float]:
        self.recompute_batch_statistics()
        return self.validate(self.held_out)

    def recompute_batch_statistics(self) -> None:
        """Take the model's batch statistics anew from some training images, augmented as in training; this worker's rows of them."""
        order, augmentation = (
            torch.Generator().manual_seed(derive_seed(self.seed, f"{name} of the average", self.finished_epochs))
            for name in ("order", "augmentation")
        )
        size = self.config.batch_size
        rows = size // self.world_size
        batches = training_batches(self.splits.train, rows, self.augmentation, order, augmentation, self.rank, self.world_size)
        images = (x_BCHW for x_BCHW, _ in itertools.islice(batches, max(1, self.config.averaging.statistics_images // size)))
        recompute_batch_statistics(self.model, images, derive_seed(self.seed, "draws of the average", self.finished_epochs, self.rank))
        average_batch_statistics(self.model)

    @property
    def held_out(self) -> ArraySplit | StreamedSplit:
        """The images on which the checkpoint is selected."""
        return self.splits.validation if self.config.validation.select_on == "validation" else self.splits.test

    def validate(self, split: ArraySplit | StreamedSplit) -> dict[str, float]:
        """Return the metrics of a validation on `split`."""
        return validate(
            self.model,
            split,
            self.context.threat_model,
            self.config.attack,
            self.config.validation,
            seed=self.seed,
            batch_size=BATCH_SIZE,
        )

    def save(self, folder: Path) -> None:
        """Write the resumable state."""
        write_state(self.state_dict(), folder)

    def _save_within_epoch(self, epoch: int, step: int, totals: Mapping[str, Tensor], started: float, folder: Path) -> None:
        """Write this worker's state after `step` steps of an epoch; after the last one the epoch's own state comes at once."""
        # Perturbations that an epoch leaves to the next are as large as the images: with them the epoch begins again.
        if step == self.steps_per_epoch or self.context.warm_start is not None:
            return
        state = {
            "seed": self.seed,
            "weights": to_cpu(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "generators": {name: getattr(self.context.streams, name).get_state() for name in STEP_GENERATORS},
            "randomness": randomness_state(self.model),
            "totals": to_cpu(totals),
            "clipped_steps": self.clipped_steps,
            "objective": to_cpu(self.objective.step_state()),
            "average": None if self.average is None else self.average.state_dict(),
            "seconds": time.perf_counter() - started,
        }
        write_within_epoch(state, folder, epoch, step, self.rank, self.world_size)

    def _load_within_epoch(self, state: Mapping[str, Any]) -> tuple[dict[str, Tensor], float]:
        """Go on amid an epoch that `batches` has begun; return the sums and the seconds so far."""
        if state["seed"] != self.seed:
            raise UserError(f"the checkpoint is of a run with seed {state['seed']}, this one has seed {self.seed}")
        self.model.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, generator in state["generators"].items():
            getattr(self.context.streams, name).set_state(generator)
        load_randomness_state(self.model, state["randomness"])
        self.clipped_steps.copy_(state["clipped_steps"])
        self.objective.load_step_state({name: value.to(self.device) for name, value in state["objective"].items()})
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        return {name: value.to(self.device) for name, value in state["totals"].items()}, state["seconds"]

    def state_dict(self) -> dict[str, Any]:
        """Return the resumable state between two epochs; tensors are copies on the CPU, so that any device goes on from it."""
        return {
            "finished_epochs": self.finished_epochs,
            "seed": self.seed,
            "weights": to_cpu(self.model.state_dict()),
            "optimizer": to_cpu(self.optimizer.state_dict()),
            "history": self.history,
            **self.selection.state_dict(),
            "ended": self.ended,
            **({} if self.average is None else {"average": self.average.state_dict()}),
            **({} if self.context.warm_start is None else {"warm_start": self.context.warm_start.state_dict()}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            UserError: it is of another model, another seed, or of more epochs than this run is to have.
        """
        if state["seed"] != self.seed:
            raise UserError(f"the checkpoint is of a run with seed {state['seed']}, this one has seed {self.seed}")
        if state["finished_epochs"] > self.config.epochs:
            raise UserError(f"the checkpoint has {state['finished_epochs']} finished epochs, the run is to have {self.config.epochs}")
        try:
            if state["best"] is not None:
                self.model.load_state_dict(state["best"]["weights"])
            self.model.load_state_dict(state["weights"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            if self.context.warm_start is not None:
                self.context.warm_start.load_state_dict(state["warm_start"])
        # PyTorch says by several kinds of error that tensors or groups are not those of this model.
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"the checkpoint is of another model: {str(error)[:300]}. {START_AGAIN}") from None
        self.finished_epochs = state["finished_epochs"]
        self.history = state["history"]
        self.selection.load_state_dict(state)
        self.ended = state["ended"]
