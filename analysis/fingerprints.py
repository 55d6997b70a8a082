"""Hashes that say which weights and which images a number belongs to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.one_copy import in_one_copy


def tensor_bytes(tensor: Tensor) -> bytes:
    """Return the tensor's values as bytes, whatever its dtype and device."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def on_host(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return named values with the tensors among them on the host: those of one device are read in one go."""
    found = dict(values)
    devices = {value.device for value in values.values() if isinstance(value, Tensor) and value.device.type != "cpu"}
    for device in devices:
        names = [name for name, value in values.items() if isinstance(value, Tensor) and value.device == device]
        found |= dict(zip(names, in_one_copy([values[name] for name in names], torch.device("cpu")), strict=True))
    return found


def weights_hash(model: nn.Module) -> str:
    """Return a hash of all parameters, persistent buffers and extra state, and of the record of how the model was built if it has one.

    Draws are no part of it: they are not weights.
    """
    digest = hashlib.blake2b(digest_size=16)
    spec = getattr(model, "spec", None)
    if spec is not None:
        digest.update(spec.model_dump_json().encode())
    for name, value in sorted(on_host(model.state_dict()).items()):
        if not isinstance(value, Tensor):  # what `get_extra_state` returned
            digest.update(f"{name}|{value_text(value)}|".encode())
            continue
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(tensor_bytes(value))
    return digest.hexdigest()


def value_text(value: Any, other: Callable[[Any], str] = lambda value: type(value).__qualname__) -> str:
    """Return a value as text that equal values share, without addresses; `other` gives that of what is no plain value or container."""
    if value is None or isinstance(value, bool | int | float | str | bytes | torch.dtype | torch.device):
        return repr(value)
    if isinstance(value, Tensor | np.ndarray):
        tensor = torch.as_tensor(value)
        return f"{tensor.dtype}{tuple(tensor.shape)}{hashlib.blake2b(tensor_bytes(tensor), digest_size=16).hexdigest()}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(sorted(f"{value_text(key, other)}: {value_text(item, other)}" for key, item in value.items())) + "}"
    if isinstance(value, set | frozenset):
        return "{" + ", ".join(sorted(value_text(item, other) for item in value)) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(value_text(item, other) for item in value) + "]"
    return other(value)


def data_hash(x: Tensor, y: Tensor) -> str:
    """Return a hash of images and labels."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{x.dtype}|{tuple(x.shape)}|".encode())
    digest.update(tensor_bytes(x))
    digest.update(tensor_bytes(y.long()))
    return digest.hexdigest()


def json_hash(value: Any) -> str:
    """Return a hash of a JSON-able value that does not depend on the order of keys."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()
