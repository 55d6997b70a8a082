"""Signs that a training does not learn: measured once per epoch on a few images. `complaints` says them in words.

Shapes: B batch, C channels, H and W pixels, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from models.ensemble import Ensemble
from models.modes import mode
from models.randomness import derive_seed, is_randomized, load_randomness_state, randomness_state, resample, seeded
from models.threat_model import ThreatModel
from trainers.attacks import pgd
from trainers.complaints import GRADIENT_RATIO, MOST_COMMON_ANSWER, SINGLE_STEP_ACCURACY
from trainers.data import ArraySplit, StreamedSplit, evaluation_batches
from trainers.objective import Objective
from trainers.schedule import watched_accuracy
from trainers.step import StepContext
from trainers.validation import limited

ANSWERED_IMAGES = 256
DIFFERENTIATED_IMAGES = 16
"""So few that all members' graphs are no more than one member's on a batch."""


@torch.no_grad()
def most_common_answer(model: nn.Module, split: ArraySplit | StreamedSplit, seed: int) -> dict[str, float]:
    """Return `MOST_COMMON_ANSWER` on the first images of each class, members of an ensemble one by one; nothing for images of one class.

    Normalizations use the statistics of these images: the running ones lag behind in the first epochs, and a network that learns
    may answer one class with them. Modes, draws and streams are as before afterwards.
    """
    split = limited(split, ANSWERED_IMAGES)
    if len(split.labels.unique()) < 2:
        return {}
    networks = list(model.members) if isinstance(model, Ensemble) else [model]
    with mode(model, "train_without_update"), seeded(model, derive_seed(seed, "signs")):
        shares = []
        for network in networks:
            answers = torch.cat([network(x_BCHW).argmax(1) for x_BCHW, _ in evaluation_batches(split, ANSWERED_IMAGES, 0, 1)])
            shares.append((answers == answers.mode().values).float().mean().item())
    return {MOST_COMMON_ANSWER: max(shares)}


def gradient_ratios(objective: Objective, model: nn.Module, x_BCHW: Tensor, y_B: Tensor, context: StepContext) -> dict[str, float]:
    """Return `GRADIENT_RATIO` of every term that the loss is made of beside cross-entropy; nothing for a loss without further terms.

    A term's weight is the slope of the loss along it, so objectives state nothing but their loss. Parameters, their `.grad`, running
    statistics, modes and draws are as before afterwards; the context's streams are not.
    """
    if not objective.is_settled(context):
        return {}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    state = randomness_state(model)
    try:
        with mode(model, "train_without_update"), torch.enable_grad():
            few = slice(DIFFERENTIATED_IMAGES)
            terms = objective.terms(model, x_BCHW[few], y_B[few], context)
            lengths = _gradient_lengths(terms, parameters)
    finally:
        load_randomness_state(model, state)
    cross_entropy = lengths.pop("cross_entropy", None)
    if cross_entropy is None:
        return {}
    smallest = torch.finfo(torch.float32).tiny
    return {GRADIENT_RATIO + name: length / max(cross_entropy, smallest) for name, length in lengths.items()}


def _gradient_lengths(terms: Mapping[str, Tensor], parameters: list[nn.Parameter]) -> dict[str, float]:
    parts = {name: value for name, value in terms.items() if name != "loss" and value.requires_grad}
    if "cross_entropy" not in parts or len(parts) < 2:
        return {}
    weights = torch.autograd.grad(terms["loss"], list(parts.values()), retain_graph=True, allow_unused=True)
    lengths = {}
    for (name, part), weight in zip(parts.items(), weights, strict=True):
        if weight is not None:
            slopes = torch.autograd.grad(part, parameters, weight, retain_graph=True, allow_unused=True)
            lengths[name] = torch.stack([slope.float().norm() for slope in slopes if slope is not None]).norm().item()
    return lengths


def single_step_accuracy(
    model: nn.Module, split: ArraySplit | StreamedSplit, threat_model: ThreatModel, num_draws: int, seed: int
) -> dict[str, float]:
    """Return `SINGLE_STEP_ACCURACY` on the first images of each class. Modes, draws and streams are as before afterwards."""
    split, draws = limited(split, ANSWERED_IMAGES), num_draws if is_randomized(model) else 1
    right = 0.0
    with mode(model, "eval"), seeded(model, derive_seed(seed, "single step")):
        for x_BCHW, y_B in evaluation_batches(split, ANSWERED_IMAGES, 0, 1):
            epsilon, norm = threat_model.epsilon, threat_model.norm
            moved_BCHW = pgd(
                model, x_BCHW, y_B, epsilon=epsilon, step_size=epsilon, steps=1, norm=norm, random_start=False, num_draws=draws
            )
            with torch.no_grad():
                for _ in range(draws):
                    resample(model)
                    right += (model(moved_BCHW).argmax(1) == y_B).sum().item() / draws
    return {SINGLE_STEP_ACCURACY: right / len(split)}


def catastrophic_overfitting(history: Sequence[Mapping[str, float]]) -> bool:
    """Return whether the last epoch shows it, see `CATASTROPHIC_OVERFITTING`; epochs without a validation are passed over.

    Reference: Wong et al., Fast is Better than Free, ICLR 2020, section 5.4.
    """
    pairs = [(watched_accuracy(epoch), epoch[SINGLE_STEP_ACCURACY]) for epoch in history if SINGLE_STEP_ACCURACY in epoch]
    known = [(several, single) for several, single in pairs if several is not None]
    if len(known) < 2:
        return False
    (best, single_then), (several, single) = max(known), known[-1]
    return several < best / 2 and single >= single_then
