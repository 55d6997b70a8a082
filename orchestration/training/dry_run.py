"""What a run would do and cost, found out by doing one step of it: nothing is written."""

from __future__ import annotations

import resource
import time
from typing import Any

import torch

from models.randomness import num_configurations
from orchestration import console
from orchestration.experiment import ExperimentConfig
from orchestration.home import Workplace
from orchestration.run_folder import RunFolder
from orchestration.training.training_run import build_for, device_for
from trainers.config import TrainingConfig
from trainers.data import Splits, load_data, training_batches
from trainers.hardware import choose_precision
from trainers.objective import build_objective
from trainers.optimizer import build_optimizer
from trainers.step import StepContext
from trainers.streams import Streams


def dry_run(experiment: ExperimentConfig, workplace: Workplace) -> dict[str, Any]:
    """Build the model, train two batches, and return what a run would need.

    Raises:
        UserError: the run could not start.
    """
    home, device = workplace.home, device_for(experiment)
    splits = load_data(experiment.data, workplace.data_root, device)
    model = build_for(experiment, splits).to(device).to(memory_format=torch.channels_last)
    training = experiment.training
    seconds, loss = _time_step(experiment, training, splits, model, device)
    steps = len(splits.train) // training.batch_size
    parameters = sum(parameter.numel() for parameter in model.parameters())
    total = seconds * steps * training.epochs
    folder = RunFolder(home.run(experiment.fingerprint))
    state = "finished" if folder.result() else "interrupted, would be resumed" if folder.has_state else "new"
    return {
        "recipe": experiment.name,
        "fingerprint": experiment.fingerprint,
        "run": state,
        "folder": str(folder.path),
        "MLflow store": home.tracking_uri if home.tracking_uri.startswith("sqlite") else home.tracking_uri.split("@")[-1],
        "training / validation / test images": f"{len(splits.train)} / {len(splits.validation)} / {len(splits.test)}",
        "image": "x".join(map(str, splits.image_shape)) + f", {splits.num_classes} classes",
        "parameters": f"{parameters:,}",
        "configurations of the randomness": str(num_configurations(model)),
        "arithmetic": choose_precision(training.precision, device).name,
        "device": str(device),
        "loss of the first step": f"{loss:.4f}",
        "memory": _memory(device),
        "one step": f"{seconds:.3f} s ({training.batch_size / seconds:.0f} images/s)",
        "one epoch": f"{console.duration(seconds * steps)} ({steps} steps), validation apart",
        "whole run": f"{console.duration(total)}, validation apart ({total / 3600:.2f} {device.type} hours)",
    }


def _time_step(
    experiment: ExperimentConfig, training: TrainingConfig, splits: Splits, model: torch.nn.Module, device: torch.device
) -> tuple[float, float]:
    objective = build_objective(training.objective)
    objective.prepare(model)
    optimizer = build_optimizer(model, training.optimizer)
    context = StepContext(
        threat_model=experiment.threat_model,
        attack=training.attack,
        redraw=training.redraw,
        streams=Streams(experiment.seed, 0, device),
        precision=choose_precision(training.precision, device),
        num_epochs=training.epochs,
        steps_per_epoch=len(splits.train) // training.batch_size,
    )
    context.streams.begin_epoch(model, 0)
    batches = iter(
        training_batches(
            splits.train,
            training.batch_size,
            experiment.data.training_augmentation(),
            order_generator=context.streams.data_order,
            augmentation_generator=context.streams.augmentation,
        )
    )
    model.train()
    seconds, loss = 0.0, float("nan")
    # The second step is timed: the first one pays for lazy initialization.
    for index in range(2):
        try:
            x_BCHW, y_B = next(batches)
        except StopIteration:
            break
        started = time.perf_counter()
        optimizer.zero_grad()
        terms = objective.training_step(model, x_BCHW, y_B, context)
        optimizer.step()
        value = terms["loss"].item()
        seconds = time.perf_counter() - started
        loss = value if index == 0 else loss
    return seconds, loss


def _memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on the GPU at the peak"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB of this process at the peak"
