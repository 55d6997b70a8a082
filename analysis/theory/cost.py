"""What a model costs: parameters, bytes on disk, multiply-accumulates and latency, for ensembles per inference mode."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.accelerator import wait_for
from models.ensemble import INFERENCE_MODES, Ensemble, inference_mode_of
from models.errors import UserError
from models.layers.cost import CountsMacs, GeneratesWeights
from models.modes import mode

ImageShape = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class InferenceCost:
    """The cost of one way to use a model.

    Attributes:
        inference: an inference mode of an ensemble, or `forward`.
        num_parameters: trained numbers, shared ones once. num_bytes: size of the weights on disk, running statistics included.
        macs_per_image: multiply-accumulates of convolutions and linear layers for one image, generated weights at hand.
        generation_macs: multiply-accumulates to generate the weights of all members once; 0 without hypernetworks.
        latency: seconds of one call by batch size, median of the rounds.
    """

    inference: str
    num_parameters: int
    num_bytes: int
    macs_per_image: int
    generation_macs: int
    latency: dict[int, float]


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def saved_share(model: nn.Module, reference: nn.Module | int) -> float:
    """Return the share of parameters that `model` saves against `reference` (a model or a number), in (-inf, 1]."""
    total = reference if isinstance(reference, int) else count_parameters(reference)
    return 1 - count_parameters(model) / total


def count_bytes(model: nn.Module) -> int:
    """Return the size of the saved weights in bytes: parameters and persistent buffers, shared storages once."""
    tensors = {(tensor.untyped_storage()._cdata, tensor.storage_offset()): tensor for tensor in model.state_dict().values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


@torch.no_grad()
def count_macs(model: nn.Module, image_shape: ImageShape) -> int:
    """Return the multiply-accumulates of convolutions and matrix products for one image, in eval mode.

    Weights that a hypernetwork generates are generated beforehand and not counted: see `count_generation_macs`. A layer that says what it
    needs counts with that (a stochastic convolution: its n kept taps), whatever else a form of it computes on this device or for this draw.
    """
    x_BCHW = _images(model, image_shape, 1)
    with mode(model, "eval"):
        model(x_BCHW)
        with FlopCounterMode(display=False) as counter, _counting_surplus(model, counter) as surplus:
            model(x_BCHW)
    return counter.get_total_flops() // 2 - sum(surplus)


@contextlib.contextmanager
def _counting_surplus(model: nn.Module, counter: FlopCounterMode) -> Iterator[list[int]]:
    """Within, collect by how many multiply-accumulates each call of a layer exceeds those that it says it needs."""
    surplus: list[int] = []
    before: list[int] = []

    def enter(layer: nn.Module, inputs: object) -> None:
        before.append(counter.get_total_flops())

    def leave(layer: nn.Module, inputs: object, output: torch.Tensor) -> None:
        assert isinstance(layer, CountsMacs)
        surplus.append((counter.get_total_flops() - before.pop()) // 2 - layer.macs_for(output))

    layers = [module for module in model.modules() if isinstance(module, CountsMacs)]
    handles = [handle for each in layers for handle in (each.register_forward_pre_hook(enter), each.register_forward_hook(leave))]
    try:
        yield surplus
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def count_generation_macs(model: nn.Module) -> int:
    """Return the multiply-accumulates that generate all hypernetwork weights of a model once."""
    with FlopCounterMode(display=False) as counter:
        for module in model.modules():
            if isinstance(module, GeneratesWeights):
                module.generate_now()
    return counter.get_total_flops() // 2


def measure_costs(
    model: nn.Module,
    image_shape: ImageShape,
    *,
    inferences: Sequence[str] | None = None,
    batch_sizes: Sequence[int] = (1, 128),
    num_rounds: int = 5,
) -> list[InferenceCost]:
    """Return the cost of each inference mode of an ensemble, or the one row `forward` of another model.

    Args:
        image_shape: (C, H, W).
        inferences: modes to measure; None: all. Other models have none.
        batch_sizes: of the latency. num_rounds: timings per mode and batch size, taken in turns so that a busy machine hits all alike.

    Eval mode, no gradients, generated weights at hand. On a GPU each timing waits for the device.

    Raises:
        UserError: inference modes were named for a model that is no ensemble.
    """
    is_ensemble = any(isinstance(module, Ensemble) for module in model.modules())
    if not is_ensemble and inferences is not None:
        raise UserError("only ensembles have inference modes")
    names: Sequence[str] = (inferences or INFERENCE_MODES) if is_ensemble else ("forward",)
    seconds: dict[tuple[str, int], list[float]] = {(name, size): [] for name in names for size in batch_sizes}
    macs: dict[str, int] = {}
    with mode(model, "eval"), torch.no_grad():
        inputs = {size: _images(model, image_shape, size) for size in batch_sizes}
        for round_ in range(num_rounds + 1):
            for name in names:
                with inference_mode_of(model, name) if is_ensemble else contextlib.nullcontext():
                    if round_ == 0:
                        macs[name] = count_macs(model, image_shape)
                    for size in batch_sizes:
                        elapsed = _time(model, inputs[size])
                        if round_ > 0:  # the first round warms up
                            seconds[name, size].append(elapsed)
    parameters, size_on_disk, generation = count_parameters(model), count_bytes(model), count_generation_macs(model)
    return [
        InferenceCost(
            inference=name,
            num_parameters=parameters,
            num_bytes=size_on_disk,
            macs_per_image=macs[name],
            generation_macs=generation,
            latency={size: statistics.median(seconds[name, size]) for size in batch_sizes},
        )
        for name in names
    ]


def _time(model: nn.Module, x_BCHW: torch.Tensor) -> float:
    wait_for(x_BCHW.device)
    started = time.perf_counter()
    model(x_BCHW)
    wait_for(x_BCHW.device)
    return time.perf_counter() - started


def _images(model: nn.Module, image_shape: ImageShape, count: int) -> torch.Tensor:
    like = next(model.parameters())
    return torch.full((count, *image_shape), 0.5, dtype=like.dtype, device=like.device)
