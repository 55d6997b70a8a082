"""Clean and robust accuracy on held-out images during training: cheap, in fp32, with seeds of its own."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import nn

from models.configuration import MOST_IMAGES, Config
from models.modes import mode
from models.randomness import derive_seed, is_randomized, resample, seeded
from models.threat_model import ThreatModel
from trainers.attacks import pgd
from trainers.data import ArraySplit, StreamedSplit, evaluation_batches
from trainers.data.split import class_balanced_prefix
from trainers.distributed import sum_over_workers, world
from trainers.step import InnerAttackConfig

BATCH_SIZE = 256
"""Images that are attacked together, whatever the training's batch is: it decides the noise of their starting points."""


class ValidationConfig(Config):
    """What is measured on held-out images during training, and how a checkpoint is chosen by it."""

    every: int = Field(1, ge=1, le=100_000, description="Epochs between two validations; the last epoch always has one.")
    num_examples: int | None = Field(None, ge=1, le=MOST_IMAGES, description="Use this many validation images; none: all.")
    steps: int = Field(10, ge=1, le=10_000, description="Steps of the validation attack.")
    num_draws: int = Field(
        4, ge=1, le=10_000, description="Draws averaged per attack gradient (EOT) and at scoring, for randomized models."
    )
    select_on: Literal["validation", "test"] = Field(
        "validation",
        description="`test` reproduces the papers' selection of the best checkpoint on test images, and marks the result as such.",
    )
    select: Literal["best", "last"] = Field(
        "best",
        description="Keep the best checkpoint by robust accuracy, or the last. Where none is named, the objective's: `natural` "
        "keeps the last.",
    )
    patience: int | None = Field(
        None, ge=1, le=100_000, description="Stop after this many validations without a better robust accuracy; none: never."
    )


def attack_name(config: ValidationConfig, *, randomized: bool) -> str:
    """Return the field's name of the validation attack, e.g. `pgd_10` or `eot_pgd_10x4` (steps x draws)."""
    return f"eot_pgd_{config.steps}x{config.num_draws}" if randomized and config.num_draws > 1 else f"pgd_{config.steps}"


def validate(
    model: nn.Module,
    split: ArraySplit | StreamedSplit,
    threat_model: ThreatModel,
    attack: InnerAttackConfig,
    config: ValidationConfig,
    *,
    seed: int,
    batch_size: int,
    prefix: str = "validation",
) -> dict[str, float]:
    """Measure accuracies in [0,1] of `model` in eval mode; modes, draws and streams are as before afterwards.

    A randomized model is attacked with gradients averaged over `num_draws` fresh draws per step and scored on `num_draws` other
    draws: an estimate of the expected accuracy against an attacker who does not know the draw (protocol T1 at small strength).

    Returns:
        `<prefix>/clean_accuracy`, `<prefix>/robust_accuracy` and the same under the attack's name.
    """
    rank, size = world()
    randomized = is_randomized(model)
    draws = config.num_draws if randomized else 1
    split = limited(split, config.num_examples)
    device = next(model.parameters()).device
    # Correct answers over all draws stay on the device until the end: a GPU is never waited for between two batches.
    correct_2 = torch.zeros(2, dtype=torch.int64, device=device)
    count = 0
    generator = torch.Generator(device=device)
    with mode(model, "eval"), seeded(model, derive_seed(seed, "validation draws")):
        for index, (x_BCHW, y_B) in enumerate(evaluation_batches(split, batch_size, rank, size)):
            generator.manual_seed(derive_seed(seed, "validation attack", rank, index))
            adversarial_BCHW = pgd(
                model,
                x_BCHW,
                y_B,
                epsilon=threat_model.epsilon,
                step_size=attack.step_size,
                steps=config.steps,
                norm=threat_model.norm,
                random_start=True,
                generator=generator,
                num_draws=draws,
                resample_each_step=randomized,
            )
            with torch.no_grad():
                for _ in range(draws):
                    resample(model)
                    answers = (model(images_BCHW).argmax(1) == y_B for images_BCHW in (x_BCHW, adversarial_BCHW))
                    correct_2 += torch.stack([answer.sum() for answer in answers])
            count += len(y_B)
    clean, robust = (number / draws for number in correct_2.tolist())
    totals = sum_over_workers({"clean": clean, "robust": robust, "count": float(count)}, device)
    robust = totals["robust"] / totals["count"]
    return {
        f"{prefix}/clean_accuracy": totals["clean"] / totals["count"],
        f"{prefix}/robust_accuracy": robust,
        f"{prefix}/robust_accuracy/{attack_name(config, randomized=randomized)}": robust,
    }


def limited(split: ArraySplit | StreamedSplit, num_examples: int | None) -> ArraySplit | StreamedSplit:
    """Return the first images of each class, `num_examples` in all, or the whole split."""
    if num_examples is None or num_examples >= len(split):
        return split
    return split.subset(class_balanced_prefix(split.labels, num_examples))
