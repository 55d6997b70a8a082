"""Hashes that say which weights and which images a number belongs to."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn


def tensor_bytes(tensor: Tensor) -> bytes:
    """Return the tensor's values as bytes, whatever its dtype and device."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def weights_hash(model: nn.Module) -> str:
    """Return a hash of all parameters and persistent buffers, and of the record of how the model was built if it has one.

    Draws are no part of it: they are not weights.
    """
    digest = hashlib.blake2b(digest_size=16)
    spec = getattr(model, "spec", None)
    if spec is not None:
        digest.update(spec.model_dump_json().encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


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
