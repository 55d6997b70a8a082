"""What a trained model costs, as metrics of its run."""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

from analysis.theory.cost import count_parameters
from models.modes import mode
from models.randomness import resample

LATENCY_BATCH_SIZE = 32
_ROUNDS = 5


def cost_metrics(model: nn.Module, image_shape: tuple[int, int, int]) -> dict[str, float]:
    """Return `model/parameters` and `model/latency_ms`.

    The latency is the median time in milliseconds of one batch of 32 images with a new draw, in eval mode, on the device and with the
    threads that the model was trained with. Other trials on the same machine disturb it.
    """
    device = next(model.parameters()).device
    x_BCHW = torch.full((LATENCY_BATCH_SIZE, *image_shape), 0.5, device=device)
    generator = torch.Generator().manual_seed(0)
    seconds = []
    with mode(model, "eval"), torch.no_grad():
        for _ in range(_ROUNDS + 1):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            started = time.perf_counter()
            resample(model, generator)
            model(x_BCHW)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - started)
    return {
        "model/parameters": float(count_parameters(model)),
        "model/latency_ms": 1000 * statistics.median(seconds[1:]),  # the first call warms up
    }
