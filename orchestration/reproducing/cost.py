"""What a reproduction costs before anything has run: forward passes of one image, counted, and the time they would take, estimated.

Unit F: the forward pass of one image; a backward pass to the pixels costs about one more (lean PGD-10 with its training step: 23 F).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from analysis.evaluation.block_task import BlockTask
from analysis.evaluation.cost import estimated_cost
from analysis.evaluation.suites import Suite
from analysis.theory.cost import count_macs
from models.randomness import is_randomized
from models.registry import build_model
from orchestration.experiment import ExperimentConfig
from orchestration.training.passes import training_passes
from trainers.data import DATASETS

GPU_FLOPS = 2e14
"""Floating-point operations a second in training: a quarter of the bf16 peak of an H100 or H200."""
GPU_EVALUATION_FLOPS = 5e13
"""In evaluations, which compute in fp32."""
CORE_FLOPS = 1e10
"""Of one CPU core."""

_STREAMED_SIDE = 224


@dataclass(frozen=True)
class Cost:
    """Work and time, estimated. `passes`: F. `gpu_hours`: where a GPU is asked for. `core_hours`: of a CPU core elsewhere."""

    passes: float = 0.0
    gpu_hours: float = 0.0
    core_hours: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.passes + other.passes, self.gpu_hours + other.gpu_hours, self.core_hours + other.core_hours)

    def __str__(self) -> str:
        parts = [f"{hours:.3g} {name} hours" for hours, name in ((self.gpu_hours, "GPU"), (self.core_hours, "CPU core")) if hours]
        return f"{self.passes:.2g} forward passes, about {' and '.join(parts) or '0 hours'}"


def training_cost(experiment: ExperimentConfig) -> Cost:
    """Return the estimate for a whole training, validation apart."""
    return _timed(training_passes(experiment) * _num_train(experiment), experiment, GPU_FLOPS)


def evaluation_cost(experiment: ExperimentConfig, suite: Suite) -> Cost:
    """Return the estimate for a suite of attacks and its studies apart."""
    info = DATASETS[experiment.data.name]
    # Of a folder of images nobody knows how many it holds before it is read.
    count = min((number for number in (experiment.data.limit_test, info.num_test, suite.num_samples) if number), default=0)
    randomized = _draws(experiment.defence.name)
    facts = {
        "threat_model": experiment.threat_model,
        "scoring": suite.scoring,
        "seed": 0,
        "num_classes": info.num_classes or 10,
        "num_configurations": None if randomized else 1,
        "block": 0,
        "checkpoint": "",
        "data": "",
    }
    passes = estimated_cost(BlockTask(kind="clean", ids=tuple(range(count)), **facts))
    for item in suite.attacks:
        if not item.is_for(randomized):
            continue
        ids = tuple(range(min(count, item.num_samples or count)))
        protocols = [each for each in item.protocols if each != "T3"] if randomized else ["T1"]
        for protocol in protocols:
            passes += estimated_cost(BlockTask(kind="attack", item=item, protocol=protocol, ids=ids, **facts))
    return _timed(passes, experiment, GPU_EVALUATION_FLOPS)


def total(costs: Sequence[Cost]) -> Cost:
    """Return the sum."""
    return sum(costs, Cost())


def image_shape(experiment: ExperimentConfig) -> tuple[int, int, int]:
    """Return (C, H, W) of an experiment's images, as far as it stands fast before they are read."""
    info = DATASETS[experiment.data.name]
    channels, *_ = info.image_shape or (3,)
    side = experiment.data.image_size or (_STREAMED_SIDE if experiment.data.streams else (info.image_shape or (3, _STREAMED_SIDE))[1])
    return channels, side, side


def untrained_network(experiment: ExperimentConfig) -> nn.Module:
    """Return the experiment's network with fresh weights, without reading its images."""
    return build_model(
        experiment.defence.name,
        backbone=experiment.backbone.name,
        num_classes=DATASETS[experiment.data.name].num_classes or 10,
        image_shape=image_shape(experiment),
        backbone_options=experiment.backbone.options,
        **experiment.defence.parameters.model_dump(),
    )


def _timed(passes: float, experiment: ExperimentConfig, gpu_flops: float) -> Cost:
    options = json.dumps(experiment.backbone.options, sort_keys=True)
    num_classes = DATASETS[experiment.data.name].num_classes or 10
    operations = passes * 2 * _macs(experiment.backbone.name, options, image_shape(experiment), num_classes)
    if experiment.resources.gpus_per_worker:
        return Cost(passes, gpu_hours=operations / gpu_flops / 3600)
    return Cost(passes, core_hours=operations / CORE_FLOPS / 3600)


def _num_train(experiment: ExperimentConfig) -> int:
    info, data = DATASETS[experiment.data.name], experiment.data
    everything = info.num_train
    if everything is None:
        return data.limit_train or 0
    held_out = min(everything // 10, 5000) if data.validation_size is None else data.validation_size
    return min(data.limit_train or everything, everything - held_out)


@functools.cache
def _macs(backbone: str, options: str, image_shape: tuple[int, int, int], num_classes: int) -> int:
    model = build_model(
        "natural", backbone=backbone, num_classes=num_classes, image_shape=image_shape, backbone_options=json.loads(options)
    )
    return count_macs(model, image_shape)


@functools.cache
def _draws(defence: str) -> bool:
    """Return whether a defence is randomized: its parameters change how much it draws, not whether."""
    return is_randomized(build_model(defence, backbone="resnet8", num_classes=10, image_shape=(1, 16, 16)))
