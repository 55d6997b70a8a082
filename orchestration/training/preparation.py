"""What a training needs before its first step: the threads and the device of this process, the data, the network with fresh weights."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from models.accelerator import accelerator
from models.errors import UserError
from models.freed_memory import give_back_freed_memory, keep_freed_memory
from models.network_parts import freeze
from models.registry import build_model
from orchestration.experiment import ExperimentConfig, ResourcesConfig
from orchestration.training.resources import workers_that_share
from trainers.data import Splits, load_data
from trainers.fit import FitResult, TrainingLoop
from trainers.reporting import Reporter, SilentReporter
from trainers.validation_beside import Beside


class PreparedTraining:
    """An experiment that is ready to be trained in this process: `fit` trains it, `loop` is the same training before its first step.

    Args:
        experiment: what is trained; this process gets its threads.
        data_root: folder of the data sets; None: the default.

    Attributes:
        device: where it is trained. splits: its data, loaded. model: its network, with fresh weights.

    Raises:
        UserError: something is not there, or does not fit.
    """

    def __init__(self, experiment: ExperimentConfig, data_root: Path | None) -> None:
        torch.set_num_threads(_num_threads(experiment.resources))
        keep_freed_memory()
        self.experiment = experiment
        self.device = _device_for(experiment.resources)
        self.splits = load_data(experiment.data, data_root, self.device)
        self.model = build_for(experiment, self.splits)

    def loop(self, reporter: Reporter, num_workers: int | None = None, beside: Beside | None = None) -> TrainingLoop:
        """Return the training before its first step; `reporter`, `num_workers`, `beside`: see `TrainingLoop`."""
        return TrainingLoop(
            self.model,
            self.splits,
            self.experiment.threat_model,
            self.experiment.training,
            seed=self.experiment.seed,
            device=self.device,
            augmentation=self.experiment.data.training_augmentation(),
            reporter=reporter,
            num_workers=num_workers,
            beside=beside,
        )

    def loop_of_one_worker(self) -> TrainingLoop:
        """Return the training as one worker of the run takes it, before its first step: who measures steps needs neither the others nor
        anybody who listens."""
        return self.loop(SilentReporter(), workers_that_share(self.experiment.resources.most_workers, self.experiment.training))

    def fit(self, reporter: Reporter, resume_from: Path | None, beside: Beside | None = None) -> FitResult:
        """Train to the end and leave the selected weights in the network; what it takes and raises: see `trainers.fit.fit` and
        `TrainingLoop`."""
        try:
            return self.loop(reporter, beside=beside).run(resume_from)
        finally:
            give_back_freed_memory()


def build_for(experiment: ExperimentConfig, splits: Splits) -> nn.Module:
    """Return the experiment's model with fresh weights.

    Raises:
        UserError: a part that is to be frozen is none of the network, or the network cannot be built.
    """
    network = build_model(
        experiment.defence.name,
        backbone=experiment.backbone.name,
        num_classes=splits.num_classes,
        image_shape=splits.image_shape,
        mean=experiment.data.pixel_mean or splits.mean,
        std=experiment.data.pixel_std or splits.std,
        seed=experiment.seed,
        backbone_options=experiment.backbone.options,
        **experiment.defence.parameters.model_dump(),
    )
    freeze(network, experiment.training.freeze)  # as the training itself will, but before any worker starts
    return network


def _num_threads(resources: ResourcesConfig) -> int:
    """Return the threads of one worker: those of the recipe, else one where several workers share the machine, else all there are."""
    if resources.cpus_per_worker is None and resources.most_workers > 1:
        return 1
    return max(1, int(resources.cpus_per_worker or os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))


def _device_for(resources: ResourcesConfig) -> torch.device:
    """Return where this process trains: the GPU it was given, or the CPU if none is asked for.

    Raises:
        UserError: a GPU is asked for and this machine has none.
    """
    if not resources.gpus_per_worker:
        return torch.device("cpu")
    found = accelerator()
    if found is None:
        raise UserError(
            f"resources.gpus_per_worker is {resources.gpus_per_worker:g}, but no GPU is usable here. "
            "`--resources.gpus_per_worker 0` trains on the CPU."
        )
    return found
