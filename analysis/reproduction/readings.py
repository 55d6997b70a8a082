"""Reading what no attack fills: a quantity of the theory, or a time, from a trained network, as the plain numbers that a cell shows."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from analysis.fingerprints import json_hash
from analysis.quantities.quantity import NotComputable, Subject, quantity
from analysis.reproduction.outcome import Reading
from analysis.reproduction.papers.measures import Theory, Timing
from analysis.theory.transferability import undisturbed
from models.accelerator import wait_for
from models.randomness import resample
from models.threat_model import parse_pixel_fraction


@dataclass(frozen=True)
class Found:
    """What one function or clock said, as plain values.

    Attributes:
        numbers: by name; `value` where there is but one. series: as in `Reading`. how: in words.
        num_samples, num_draws: what it was measured on. reason: why there is nothing, or empty.
    """

    numbers: Mapping[str, float] = field(default_factory=dict)
    series: Mapping[str, Any] = field(default_factory=dict)
    how: str = ""
    num_samples: int | None = None
    num_draws: int | None = None
    reason: str = ""

    def reading(self, name: str, unit: str) -> Reading | None:
        """Return the number of that name; the series, if none has it and there is one; None if there is neither.

        Shares become percent in columns of unit `%`.
        """
        value = self.numbers.get(name or "value")
        if name in self.numbers or not self.series:
            if value is None or not math.isfinite(value):
                return None
            return Reading(100 * value if unit == "%" else value, how=self.how, num_samples=self.num_samples, num_draws=self.num_draws)
        return Reading(None, how=self.how, num_samples=self.num_samples, num_draws=self.num_draws, series=self.series)


def identity(measure: Theory | Timing, num_samples: int | None, seed: int, weights: Sequence[str], images: str) -> str:
    """Return the key under which a measurement is kept: equal for equal work, whatever cell asks for it.

    Args:
        num_samples: at most so many test images. weights: hashes of the networks. images: what the test images are.
    """
    # Several cells read different fields of one result.
    return json_hash({**asdict(measure.whole), "num_samples": num_samples, "seed": seed, "weights": list(weights), "images": images})


def read_theory(measure: Theory, subject: Subject) -> Found:
    """Measure a quantity; `subject` gives the networks, images, threat model and seed.

    What cannot exist for this network (pairs of draws of a deterministic one) is said in `Found.reason`.
    """
    entry = quantity(measure.name)
    if not entry.requirement.fits(subject.model):
        return Found(reason=f"it needs {entry.requirement.text}")
    try:
        found = entry.compute(subject, **{name: _number(value) for name, value in measure.parameters.items()})
    except NotComputable as error:
        return Found(reason=str(error))
    said = [f"{name.replace('_', ' ')} {value}" for name, value in measure.parameters.items() if name != "num_images"]
    how = ", ".join(filter(None, (*said, found.how)))
    numbers = {name: float(value) for name, value in found.metrics.items()}
    return Found(numbers, found.series, how, found.num_samples, found.num_draws)


def read_test_set_seconds(model: nn.Module, x_NCHW: Tensor, batch_size: int = 128) -> Found:
    """Return the seconds of one pass over the test images, a new draw for each batch, after one batch to warm up."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    with undisturbed(model), torch.no_grad():
        model(x_NCHW[:batch_size].to(device))
        wait_for(device)
        started = time.perf_counter()
        for x_BCHW in x_NCHW.split(batch_size):
            resample(model, generator)
            model(x_BCHW.to(device))
        wait_for(device)
        seconds = time.perf_counter() - started
    return Found({"value": seconds}, how=f"{len(x_NCHW)} images in batches of {batch_size}, fp32", num_samples=len(x_NCHW))


def _number(value: Any) -> Any:
    """Return `8/255` as a number, and anything else as it is."""
    return parse_pixel_fraction(value) if isinstance(value, str) and "/" in value else value
