"""Everything that trains, evaluates, resumes and loads, on the pretend accelerator and on the CPU, side by side; a line of JSON for each.

    python -m tests.devices.conformance training [NAME ...]
    python -m tests.devices.conformance evaluation [NAME ...]

It is a process of its own, because the pretend accelerator changes PyTorch for good. What is run is found in the registries.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from orchestration.experiment import ExperimentConfig
from orchestration.recipes.loading import load_recipe
from orchestration.recipes.names import listed_recipes
from orchestration.training.training_run import build_for
from tests.devices.pretend_accelerator import LEDGER, NAME, PretendDevice, register
from trainers.data import ArraySplit, Splits, load_data
from trainers.fit import TrainingLoop
from trainers.reporting import SilentReporter

TRAINING_IMAGES, OTHER_IMAGES = 16, 8
SMALL = (
    "--training.epochs=2",
    "--training.batch_size=8",
    "--training.attack.steps=2",
    "--training.validation.steps=2",
    "--training.validation.num_draws=2",
    "--training.precision=fp32",
)


def recipes() -> list[str]:
    """Return every recipe for the digits: each method, with each of its variants."""
    return [str(recipe) for recipe in listed_recipes() if recipe.setting == "digits"]


def small(recipe: str) -> ExperimentConfig:
    """Return the experiment of a recipe, for a training of four steps."""
    return load_recipe(recipe, SMALL).experiment


def few_images(experiment: ExperimentConfig) -> Splits:
    """Return a few images of the experiment's data, on the CPU."""
    splits = load_data(experiment.data, None, torch.device("cpu"))
    sizes = (TRAINING_IMAGES, OTHER_IMAGES, OTHER_IMAGES)
    return Splits(*(split.subset(range(size)) for split, size in zip((splits.train, splits.validation, splits.test), sizes, strict=True)))


def loop_on(device: str, experiment: ExperimentConfig, splits: Splits) -> TrainingLoop:
    """Return a training before its first step."""
    assert all(isinstance(split, ArraySplit) for split in (splits.train, splits.validation, splits.test))
    moved = Splits(*(split.to(device) for split in (splits.train, splits.validation, splits.test)))  # type: ignore[union-attr] # checked
    return TrainingLoop(
        build_for(experiment, splits),
        moved,
        experiment.threat_model,
        experiment.training,
        seed=experiment.seed,
        device=torch.device(device),
        augmentation=experiment.data.training_augmentation(),
        reporter=SilentReporter(),
    )


def train(device: str, experiment: ExperimentConfig, splits: Splits) -> dict[str, Any]:
    """Train an epoch step by step, a second one as `fit` does after a resume from the first; return numbers, and what it cost."""
    loop = loop_on(device, experiment, splits)
    losses: list[Tensor] = []
    reads: Counter[str] = Counter()
    copies: Counter[str] = Counter()
    for index, (x_BCHW, y_B) in enumerate(loop.batches(0)):
        LEDGER.clear()
        losses.append(loop.train_step(index, x_BCHW, y_B)["loss"])
        reads += LEDGER.reads
        copies += LEDGER.copies
    LEDGER.clear()
    metrics = loop.validate(loop.held_out)
    validation = {"reads": dict(LEDGER.reads), "copies": dict(LEDGER.copies)}
    loop.finished_epochs = 1
    loop.measure({})
    with TemporaryDirectory() as folder:
        loop.save(Path(folder))
        again = loop_on(device, experiment, splits)
        outcome = again.run(Path(folder))
    return {
        "losses": [loss.item() for loss in losses],
        "metrics": metrics,
        "resumed": {name: value for name, value in outcome.history[-1].items() if not name.startswith(("time/", "memory/"))},
        "weights": {name: value.cpu().clone() for name, value in again.model.state_dict().items()},
        "step": {"reads": dict(reads), "copies": dict(copies), "steps": len(losses)},
        "validation": validation,
    }


def compare_training(recipe: str) -> dict[str, Any]:
    """Train a recipe on both devices; return by how much they differ, and what the accelerator's training cost."""
    experiment = small(recipe)
    splits = few_images(experiment)
    expected = train("cpu", experiment, splits)
    with PretendDevice():
        found = train(NAME, experiment, splits)
    return {
        "case": recipe,
        "losses": [expected["losses"], found["losses"]],
        "metrics": [expected["metrics"], found["metrics"]],
        "resumed": [expected["resumed"], found["resumed"]],
        "weights": max(
            (expected["weights"][name].double() - value.double()).abs().max().item() for name, value in found["weights"].items()
        ),
        "step": found["step"],
        "validation": found["validation"],
    }


def main(arguments: list[str]) -> None:
    """Run what the arguments name and print a line for each."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    register()
    kind, *names = arguments
    for name in names or recipes():
        print(json.dumps(compare_training(name)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
