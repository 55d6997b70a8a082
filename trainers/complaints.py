"""What the signs of a training that does not learn say in words. Who shows records of trainings needs no PyTorch for it."""

from __future__ import annotations

from collections.abc import Mapping

from trainers.schedule import watched_accuracy

MOST_COMMON_ANSWER = "signs/most_common_answer"
"""Share of validation images that get the same answer, the largest over all networks; 1: one class for all of them."""

GRADIENT_RATIO = "signs/gradient_ratio/"
"""Followed by a term's name: length of that term's gradient by the weights over cross-entropy's, both as they are weighted in the loss."""

CLIPPED_STEPS = "signs/clipped_steps"
"""Share of the epoch's steps in which clipping shortened the gradient."""

SINGLE_STEP_ACCURACY = "signs/single_step_accuracy"
"""Accuracy on validation images moved by one step of epsilon without a random start; for trainings that take one step."""

CATASTROPHIC_OVERFITTING = "signs/catastrophic_overfitting"
"""1 where accuracy under several steps fell below half of its best while that under one step did not: the network fights one step."""

LARGEST_RATIO = 20.0
LARGEST_CLIPPED_SHARE = 0.9


def complaints(metrics: Mapping[str, float]) -> dict[str, str]:
    """Return what the signs among an epoch's metrics say: name of the sign -> one sentence; nothing for a training that learns."""
    found = {}
    if metrics.get(MOST_COMMON_ANSWER, 0.0) >= 1.0:
        found[MOST_COMMON_ANSWER] = (
            "a network answers one class for all images: weaker regularizers (the weights under training.objective), a lower "
            "training.optimizer.learning_rate or more epochs may help"
        )
    for name, value in metrics.items():
        if name.startswith(GRADIENT_RATIO) and value > LARGEST_RATIO:
            found[name] = (
                f"the gradient of `{name.removeprefix(GRADIENT_RATIO)}` is {value:.0f} times that of cross-entropy (more than "
                f"{LARGEST_RATIO:.0f}): its weight under training.objective leaves little to learn from labels"
            )
    if metrics.get(CATASTROPHIC_OVERFITTING):
        found[CATASTROPHIC_OVERFITTING] = (
            f"catastrophic overfitting: {100 * metrics[SINGLE_STEP_ACCURACY]:.0f} % of the images withstand one step, "
            f"{100 * (watched_accuracy(metrics) or 0):.0f} % several, less than half of before; more noise (training.attack.noise_radius), "
            "fewer epochs or an attack of several steps may help, and the best epoch is kept"
        )
    if metrics.get(CLIPPED_STEPS, 0.0) > LARGEST_CLIPPED_SHARE:
        found[CLIPPED_STEPS] = (
            f"{100 * metrics[CLIPPED_STEPS]:.0f} % of the steps were clipped: training.optimizer.gradient_clip_norm, not the loss, sets "
            "their length"
        )
    return found
