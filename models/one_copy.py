"""Many tensors from one device to another in one copy: a GPU, and whoever waits for it, pays for each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def in_one_copy(values: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return tensors of any types, all on one device, on `device`: detached, contiguous, parts of one tensor of bytes."""
    if len(values) < 2:
        return [value.detach().to(device, non_blocking=device.type != "cpu") for value in values]
    # The largest elements first, so that each value begins at a multiple of its elements' size.
    order = sorted(range(len(values)), key=lambda index: -values[index].dtype.itemsize)
    packed = [values[index].detach().contiguous().reshape(-1).view(torch.uint8) for index in order]
    parts = torch.cat(packed).to(device, non_blocking=device.type != "cpu").split([len(each) for each in packed])
    sent = {index: part.view(values[index].dtype).view(values[index].shape) for index, part in zip(order, parts, strict=True)}
    return [sent[index] for index in range(len(values))]
