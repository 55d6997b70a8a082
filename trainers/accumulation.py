"""Gradient accumulation: the gradients of one batch, computed part by part, as workers share a batch.

A part has the rows, the random starts and the noise that it has in the whole batch, and the draw of the whole step; draws per example go
on, so that each example has its own. Batch statistics are those of each part, as they are those of each worker.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.randomness import Stream, random_sites, randomness_state
from trainers.objective import Objective
from trainers.step import StepContext


def accumulate(objective: Objective, model: nn.Module, x_BCHW: Tensor, y_B: Tensor, context: StepContext, parts: int) -> dict[str, Tensor]:
    """Add the gradients of a batch to the parameters' `.grad` and return the objective's scalars, as `Objective.training_step` does.

    Args:
        parts: in how many equal parts; B is a multiple of it. Gradients that are there before are taken for none.
    """
    if parts == 1:
        return objective.training_step(model, x_BCHW, y_B, context)
    streams, draws = context.streams.state(), randomness_state(model)
    totals: dict[str, Tensor] = {}
    try:
        for part, (part_BCHW, labels_B) in enumerate(zip(x_BCHW.chunk(parts), y_B.chunk(parts), strict=True)):
            if part:
                context.streams.load_state(streams)
                for name, site in random_sites(model):
                    if site.draw_scope != "per_example":
                        site.stream = Stream(draws[name]["seed"], draws[name]["position"])
                        site.load_draw_state(draws[name]["draw"])
            context.part = (part, parts)
            for name, value in objective.training_step(model, part_BCHW, labels_B, context).items():
                totals[name] = totals[name] + value if part else value.clone()
    finally:
        context.part = (0, 1)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if gradients:
        torch._foreach_div_(gradients, float(parts))
    return {name: value / parts for name, value in totals.items()}
