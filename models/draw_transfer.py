"""New values of draw buffers on their way to the device: all of one redraw in one copy, for a GPU waits for each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from models.one_copy import in_one_copy

Arrived = Callable[[Tensor], None]
"""Told of a value once it is on its device."""

_Waiting = dict[tuple[int, str], tuple[Tensor, torch.device, Arrived]]
_waiting: _Waiting | None = None


@contextlib.contextmanager
def sent_together() -> Iterator[None]:
    """Within, `send` keeps values on the host; they arrive when the outermost of these ends."""
    global _waiting
    if _waiting is not None:
        yield
        return
    _waiting = {}
    try:
        yield
    finally:
        values, _waiting = list(_waiting.values()), None
        for device in {device for _, device, _ in values}:
            chosen = [(value, arrived) for value, target, arrived in values if target == device]
            for sent, (_, arrived) in zip(in_one_copy([value for value, _ in chosen], device), chosen, strict=True):
                arrived(sent)


def send(key: tuple[int, str], value: Tensor, device: torch.device, arrived: Arrived) -> Tensor:
    """Return `value` (a tensor on the host) on its way to `device`: itself if it waits for others, else what arrived.

    Args:
        key: whose value it is; a later value of the same key takes the place of one that still waits.
        arrived: told of the value on the device if it waits; not called otherwise.
    """
    if _waiting is None or value.device == device:
        return value.to(device, non_blocking=True)
    _waiting[key] = value, device, arrived
    return value


def destination(key: tuple[int, str], held: Tensor) -> torch.device:
    """Return where the value of a key belongs: the device of the tensor held now, unless this one waits to be sent elsewhere."""
    return held.device if _waiting is None or key not in _waiting else _waiting[key][1]
