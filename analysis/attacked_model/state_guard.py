"""What an attack may leave behind: nothing. Restores a model and the global generators, and says what had been changed."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from models.randomness import load_randomness_state, randomness_state


@dataclass
class StateReport:
    """What differed on leaving a guard, before it was restored.

    Attributes:
        modes, buffers, gradients: dotted names of modules whose mode, of buffers that, and of parameters whose `.grad` changed.
        generators: which of `python`, `numpy`, `torch`, `cuda` moved.
    """

    modes: list[str] = field(default_factory=list)
    buffers: list[str] = field(default_factory=list)
    gradients: list[str] = field(default_factory=list)
    generators: list[str] = field(default_factory=list)

    @property
    def changed(self) -> list[str]:
        """Return everything that changed as readable items."""
        items = [f"mode of {name or 'the model'}" for name in self.modes]
        items += [f"buffer {name}" for name in self.buffers]
        items += [f"gradient of {name}" for name in self.gradients]
        return items + [f"global {name} generator" for name in self.generators]


@contextlib.contextmanager
def restored_state(model: nn.Module) -> Iterator[StateReport]:
    """Restore modes, persistent buffers, draws, `requires_grad`, `.grad` and all global generators on exit, also after an exception.

    Inside, parameters do not require gradients: attacks differentiate with respect to pixels alone. The report is filled on exit.
    """
    report = StateReport()
    training = {name: module.training for name, module in model.named_modules()}
    persistent = set(model.state_dict(keep_vars=True))
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers() if name in persistent}
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    gradients = {
        name: (parameter.grad, None if parameter.grad is None else parameter.grad.clone()) for name, parameter in model.named_parameters()
    }
    draws = randomness_state(model)
    generators = _generator_states()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    try:
        yield report
    finally:
        _restore_generators(generators, report)
        for name, module in model.named_modules():
            if name in training and module.training != training[name]:
                report.modes.append(name)
                module.training = training[name]
        current = dict(model.named_buffers())
        for name in _changed({name: (current[name], values) for name, values in buffers.items()}):
            report.buffers.append(name)
            current[name].copy_(buffers[name])
        moved = _changed({name: pair for name, pair in gradients.items() if pair[0] is not None})
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])
            before, value = gradients[name]
            if parameter.grad is not before or name in moved:
                report.gradients.append(name)
                parameter.grad = before
                if before is not None and value is not None:
                    before.copy_(value)
        load_randomness_state(model, draws)


def _changed(pairs: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """Return the names of tensors that are no longer what their copy is; of all tensors on a device one answer is read."""
    found = {name for name, (now, before) in pairs.items() if now.shape != before.shape or now.dtype != before.dtype}
    rest = {name: pair for name, pair in pairs.items() if name not in found}
    for device in {now.device for now, _ in rest.values()}:
        names = [name for name, (now, _) in rest.items() if now.device == device]
        differ = torch.stack([_differs(*rest[name]) for name in names]).tolist()
        found |= {name for name, is_other in zip(names, differ, strict=True) if is_other}
    return [name for name in pairs if name in found]


def _differs(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    if first.is_floating_point():
        first, second = first.nan_to_num(), second.nan_to_num()
    return (first != second).any()


_DEVICES: dict[str, Any] = {"cuda": torch.cuda, "xpu": torch.xpu}


def _generator_states() -> dict[str, Any]:
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002 - attack libraries move the global generator
        "torch": torch.get_rng_state(),
    }
    for name, module in _DEVICES.items():
        if module.is_available() and module.is_initialized():
            states[name] = module.get_rng_state_all()
    return states


def _restore_generators(states: dict[str, Any], report: StateReport) -> None:
    now = _generator_states()
    if now["python"] != states["python"]:
        report.generators.append("python")
        random.setstate(states["python"])
    numpy_moved = not all(np.array_equal(a, b) for a, b in zip(now["numpy"], states["numpy"], strict=True))
    if numpy_moved:
        report.generators.append("numpy")
        np.random.set_state(states["numpy"])  # noqa: NPY002
    if not torch.equal(now["torch"], states["torch"]):
        report.generators.append("torch")
        torch.set_rng_state(states["torch"])
    for name in _DEVICES.keys() & states.keys():
        if not all(torch.equal(a, b) for a, b in zip(now[name], states[name], strict=True)):
            report.generators.append(name)
            _DEVICES[name].set_rng_state_all(states[name])
