"""Members of an ensemble spread over the workers of a process group: member i is computed by worker i mod W.

Each worker sees the whole batch and trains its own members; input gradients are the only activations exchanged. Weight gradients meet
in the training loop's one all-reduce, so every worker goes on holding the whole ensemble and can attack with any member of it.
Shapes: B batch, D pixels, N members, W workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainers.distributed import all_reduce_flat, world


class MemberPlacement(Protocol):
    """Which members this worker computes, and how workers tell one another their input gradients."""

    own: Sequence[int]
    gradient_factor: float
    """Factor of this worker's weight gradients, given that the loop averages over workers."""

    def exchange(self, own_gradients_BD: list[Tensor], like: Tensor) -> list[Tensor]:
        """Return the gradients of all N members, given those of this worker's."""
        ...

    def share_buffers(self, members: Sequence[nn.Module]) -> None:
        """Give every worker the running statistics that the owners have."""
        ...


class LocalMembers:
    """All members in this process."""

    def __init__(self, num_members: int) -> None:
        self.own: Sequence[int] = range(num_members)
        self.gradient_factor = 1.0

    def exchange(self, own_gradients_BD: list[Tensor], like: Tensor) -> list[Tensor]:
        return own_gradients_BD

    def share_buffers(self, members: Sequence[nn.Module]) -> None:
        return None


class SpreadMembers:
    """Members 'rank', 'rank + W', ... in this process; some workers may have none."""

    def __init__(self, num_members: int) -> None:
        self.rank, self.size = world()
        self.num_members = num_members
        self.own: Sequence[int] = range(self.rank, num_members, self.size)
        self.gradient_factor = float(self.size)

    def exchange(self, own_gradients_BD: list[Tensor], like: Tensor) -> list[Tensor]:
        slots = -(-self.num_members // self.size)
        mine = like.new_zeros((slots, len(like), like[0].numel()))
        for slot, gradient_BD in enumerate(own_gradients_BD):
            mine[slot] = gradient_BD
        everybody = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everybody, mine)
        return [everybody[index % self.size][index // self.size] for index in range(self.num_members)]

    @torch.no_grad()
    def share_buffers(self, members: Sequence[nn.Module]) -> None:
        owned: dict[torch.dtype, list[Tensor]] = {}
        for index, member in enumerate(members):
            persistent = member.state_dict().keys()
            for name, buffer in member.named_buffers():
                if name in persistent:
                    if index not in self.own:
                        buffer.zero_()
                    owned.setdefault(buffer.dtype, []).append(buffer)
        for buffers in owned.values():  # one sum per dtype in which each buffer is its owner's plus zeros
            all_reduce_flat(buffers, "sum")


def dealt_rows(tensor: Tensor) -> Tensor:
    """Return this worker's share of rows that all workers hold: every W-th one, so that shares differ by one row at most."""
    rank, size = world()
    return tensor[rank::size]


def collected_rows(share: Tensor, num_rows: int) -> Tensor:
    """Return all `num_rows` rows in their order, given what each worker made of its `dealt_rows`."""
    _, size = world()
    if size == 1:
        return share
    slots = -(-num_rows // size)
    mine = share.new_zeros((slots, *share.shape[1:]))
    mine[: len(share)] = share
    parts = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(parts, mine)
    return torch.stack(parts, dim=1).flatten(0, 1)[:num_rows]


def gather_batch(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the rows of all workers, in the order of ranks: every worker's part must have the same number of rows."""
    _, size = world()
    if size == 1:
        return tensors
    gathered = []
    for tensor in tensors:
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(size)]
        dist.all_gather(parts, tensor)
        gathered.append(torch.cat(parts))
    return tuple(gathered)
