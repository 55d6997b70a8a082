"""Reading what no attack fills: a quantity of the theory, or a time, from a trained network.

A function of `analysis.theory` is called with what its arguments' names say (`model`, `x_BCHW`, `pairs`, ...), and what it returns becomes
plain numbers by its type, so that another measure of a paper needs no code here unless it returns something new.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from analysis.fingerprints import json_hash
from analysis.quantities.quantity import NotComputable, Subject
from analysis.reproduction.outcome import Reading
from analysis.reproduction.papers.measures import Theory, Timing
from analysis.theory.cost import InferenceCost
from analysis.theory.ctrw_bounds import CosineStatistic, random_weights
from analysis.theory.ensemble_gradients import MemberLandscapes
from analysis.theory.landscape import InputLandscape, input_landscape
from analysis.theory.transferability import GradientCosines, TransferAtDistance, undisturbed
from models.ensemble import Ensemble
from models.layers.random_weight import RandomFeatureWeight, RandomFilterConv2d
from models.randomness import is_randomized, resample
from models.threat_model import parse_pixel_fraction

NUM_IMAGES = 1000
FEWER_IMAGES = {
    "landscape.input_landscape": 8,
    "ensemble_gradients.member_landscapes": 64,
    "rna_paths.path_difference_transfer": 256,
}
"""Test images of each class in turn, where a function does not take `NUM_IMAGES`; the papers give none of these numbers."""

_CHUNK = 250
_DIGITS = 6
_LATENCY_IMAGES = 1


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


def num_images(measure: Theory, limit: int | None) -> int:
    """Return on how many test images a measure is taken, at most `limit`."""
    wanted = FEWER_IMAGES.get(measure.function, NUM_IMAGES)
    return wanted if limit is None else min(wanted, limit)


def read_theory(measure: Theory, subject: Subject, other: nn.Module | None = None) -> Found:
    """Compute a measure on a network; `subject` gives images, threat model and seed.

    Args:
        other: the second network, for functions of two.

    What cannot exist for this network (pairs of draws of a deterministic one) is said in `Found.reason`.
    """
    count = num_images(measure, subject.num_samples)
    subject = replace(subject, num_samples=count)
    try:
        if measure.function == "landscape.input_landscape":
            return _landscape(measure, subject)
        if measure.function == "transferability.gradient_cosines":
            return _cosines(measure, subject)
        function = _function(measure.function)
        call = _Call(measure, subject, other)
        with subject.one_draw():
            result = function(**call.arguments(function))
    except NotComputable as error:
        return Found(reason=str(error))
    numbers, series = _plain(result)
    return Found(numbers, series, _how(measure, call.num_images), call.num_images)


def read_test_set_seconds(model: nn.Module, x_NCHW: Tensor, batch_size: int = 128) -> Found:
    """Return the seconds of one pass over the test images, a new draw for each batch, after one batch to warm up."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    with undisturbed(model), torch.no_grad():
        model(x_NCHW[:batch_size].to(device))
        _wait(device)
        started = time.perf_counter()
        for x_BCHW in x_NCHW.split(batch_size):
            resample(model, generator)
            model(x_BCHW.to(device))
        _wait(device)
        seconds = time.perf_counter() - started
    return Found({"value": seconds}, how=f"{len(x_NCHW)} images in batches of {batch_size}, fp32", num_samples=len(x_NCHW))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@functools.cache
def _function(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(".")
    return getattr(importlib.import_module(f"analysis.theory.{module}"), attribute)


class _Call:
    """The arguments of a function of the theory, by their names."""

    def __init__(self, measure: Theory, subject: Subject, other: nn.Module | None) -> None:
        self.measure, self.subject, self.other = measure, subject, other
        self.num_images: int | None = None
        self.suppliers: dict[str, Callable[[], Any]] = {
            "model": lambda: subject.model,
            "first": lambda: subject.model,
            "second": self._second,
            "reference": self._second,
            "x_BCHW": lambda: self._images()[0],
            "y_B": lambda: self._images()[1],
            "seed": lambda: subject.seed,
            "attack": subject.attack,
            "image_shape": lambda: subject.model.spec.image_shape,
            "batch_sizes": lambda: (_LATENCY_IMAGES,),
            "inferences": self._inferences,
            "mu": lambda: self._weight().mu,
            "sigma": lambda: self._weight().sigma,
        }

    def arguments(self, function: Callable[..., Any]) -> dict[str, Any]:
        """Return what the item gives, and what can be made for the rest."""
        given = {name: _number(value) for name, value in self.measure.parameters.items()}
        made = {}
        for name, parameter in inspect.signature(function).parameters.items():
            if name in given:
                continue
            if name in self.suppliers:
                made[name] = self.suppliers[name]()
            elif parameter.default is inspect.Parameter.empty:
                raise TypeError(f"{self.measure.function} needs {name}, which nothing here makes")
        return given | made

    def _second(self) -> nn.Module:
        assert self.other is not None, f"{self.measure.function} needs a second network"
        return self.other

    def _images(self) -> tuple[Tensor, Tensor]:
        x_BCHW, y_B = self.subject.images(NUM_IMAGES)
        self.num_images = len(x_BCHW)
        return x_BCHW, y_B

    def _inferences(self) -> tuple[str, ...] | None:
        ensembles = [module for module in self.subject.model.modules() if isinstance(module, Ensemble)]
        return (ensembles[0].inference,) if ensembles else None

    def _weight(self) -> RandomFeatureWeight | RandomFilterConv2d:
        sites = random_weights(self.subject.model)
        if len(sites) != 1:
            raise NotComputable(f"it is about one random weight; the network has {len(sites)}")
        return sites[0]


def _cosines(measure: Theory, subject: Subject) -> Found:
    """Return the cosines between draws of each pair, images in chunks."""
    assert measure.pairs is not None
    if not is_randomized(subject.model):
        raise NotComputable("a deterministic network has one draw, so there are no pairs of draws")
    name, parameters = measure.pairs
    try:
        pairs = _function(name)(subject.model, **parameters, seed=subject.seed)
    except ValueError as error:
        raise NotComputable(f"there are no such pairs: {error}") from None
    x_BCHW, y_B = subject.images(NUM_IMAGES)
    function = _function(measure.function)
    parts = [function(subject.model, x, y, pairs) for x, y in zip(x_BCHW.split(_CHUNK), y_B.split(_CHUNK), strict=True)]
    found = GradientCosines(
        torch.cat([part.cosine_PB for part in parts], dim=1), parts[0].distance_P, sum(part.num_zero_gradients for part in parts)
    )
    numbers, series = _plain(found)
    kind = f" of kind {parameters['kind']}" if "kind" in parameters else ""
    how = f"{len(pairs)} pairs of draws{kind}, {len(x_BCHW)} images"
    if found.num_zero_gradients:
        how += f", {found.num_zero_gradients} gradients vanish and count as 0"
    return Found(numbers, series, how, len(x_BCHW), len(pairs))


def _landscape(measure: Theory, subject: Subject) -> Found:
    """Return the mean of the landscapes around several images, each along its own gradient."""
    x_BCHW, y_B = subject.images(NUM_IMAGES)
    parameters = {name: _number(value) for name, value in measure.parameters.items()}
    with subject.one_draw():
        surfaces = [
            input_landscape(subject.model, image, int(label), generator=subject.generator("landscape", index), **parameters)
            for index, (image, label) in enumerate(zip(x_BCHW, y_B, strict=True))
        ]
    mean = replace(surfaces[0], loss_AA=torch.stack([surface.loss_AA for surface in surfaces]).mean(dim=0))
    numbers, series = _plain(mean)
    return Found(numbers, series, f"mean over {len(surfaces)} images, one draw", len(surfaces))


def _plain(result: Any) -> tuple[dict[str, float], dict[str, Any]]:
    """Return the numbers and the series of what a function returned."""
    if isinstance(result, bool | int | float):
        return {"value": float(result)}, {}
    if isinstance(result, GradientCosines):
        return {"mean": result.mean, "std": result.std}, {"values": _rounded(result.cosine_PB.flatten())}
    if isinstance(result, CosineStatistic):
        return {name: float(value) for name, value in asdict(result).items() if isinstance(value, int | float)}, {}
    if isinstance(result, InputLandscape):
        axes = {"x": _rounded(result.gradient_positions_A), "y": _rounded(result.random_positions_A)}
        # `grid` has a row for each y, `loss_AA` for each gradient position.
        return {"rise": result.rise, "roughness": result.roughness}, {**axes, "grid": _rounded(result.loss_AA.T)}
    if isinstance(result, MemberLandscapes):
        offsets = _rounded(result.offsets_G)
        grids = [_rounded(loss_GG.T) for loss_GG in result.loss_NGG]
        return {}, {"x": offsets, "y": offsets, "grids": grids, "labels": [f"member {index + 1}" for index in range(len(grids))]}
    if isinstance(result, Sequence) and len(result) == 1:
        return _plain_entry(result[0])
    if isinstance(result, Sequence) and result and all(isinstance(each, RandomFeatureWeight | RandomFilterConv2d) for each in result):
        return _plain_entry(*result)
    raise TypeError(f"nothing is known of how to read a {type(result).__name__}")


def _plain_entry(*entries: Any) -> tuple[dict[str, float], dict[str, Any]]:
    first = entries[0]
    if isinstance(first, TransferAtDistance):
        return {"mean": first.mean, "minimum": first.minimum, "maximum": first.maximum, "num_pairs": float(first.num_pairs)}, {}
    if isinstance(first, InferenceCost):
        counts = {name: float(getattr(first, name)) for name in ("num_parameters", "num_bytes", "macs_per_image", "generation_macs")}
        return {**counts, "latency": first.latency[_LATENCY_IMAGES]}, {}
    if isinstance(first, RandomFeatureWeight | RandomFilterConv2d):
        sigma = torch.cat([site.sigma.detach().flatten() for site in entries])
        return {"sum": float(sigma.double().sum())}, {"values": _rounded(sigma)}
    raise TypeError(f"nothing is known of how to read a {type(first).__name__}")


def _rounded(values: Tensor) -> Any:
    def short(value: Any) -> Any:
        return [short(each) for each in value] if isinstance(value, list) else float(f"{value:.{_DIGITS}g}")

    return short(values.detach().double().cpu().tolist())


def _number(value: Any) -> Any:
    """Return `8/255` as a number, and anything else as it is."""
    return parse_pixel_fraction(value) if isinstance(value, str) and "/" in value else value


def _how(measure: Theory, images: int | None) -> str:
    parts = [f"{name.replace('_', ' ')} {value}" for name, value in measure.parameters.items()]
    if images is not None:
        parts.append(f"{images} images")
    if measure.field == "latency":
        parts.append("one image, median of 5")
    return ", ".join(parts)
