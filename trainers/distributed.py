"""The few collective operations of training. Without an initialized process group there is one worker and they do nothing.

Gradients are averaged by one flat all-reduce after the objective has left them in `.grad`, instead of by a wrapper around the model:
attacks, several forward passes, double backward and parameters that a random path left unused then need no special care, no draw
is ever broadcast, and there is exactly one all-reduce per training step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.randomness import draw_buffer_names


def world() -> tuple[int, int]:
    """Return (rank, number of workers)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average the gradients over the workers: one all-reduce. A gradient that is None on a worker counts as zero there.

    A gradient that is None on every worker stays None.
    """
    _, size = world()
    if size == 1:
        return
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    used = torch.tensor([parameter.grad is not None for parameter in trained], dtype=trained[0].dtype)
    pieces = [(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).reshape(-1) for parameter in trained]
    flat = torch.cat([*pieces, used.to(pieces[0].device)])
    dist.all_reduce(flat)
    gradients, counts = flat[: -len(trained)] / size, flat[-len(trained) :]
    offset = 0
    for parameter, count in zip(trained, counts.tolist(), strict=True):
        piece = gradients[offset : offset + parameter.numel()].view_as(parameter)
        offset += parameter.numel()
        if count:
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter).copy_(piece)  # in the parameter's own layout
            else:
                parameter.grad.copy_(piece)


def average_batch_statistics(model: nn.Module) -> None:
    """Average floating-point buffers that are part of the weights (running statistics) over the workers."""
    _, size = world()
    if size == 1:
        return
    draws = set(draw_buffer_names(model))
    persistent = model.state_dict().keys()
    buffers = [buffer for name, buffer in model.named_buffers() if name in persistent and name not in draws and buffer.is_floating_point()]
    if not buffers:
        return
    flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
    dist.all_reduce(flat)
    flat /= size
    offset = 0
    for buffer in buffers:
        buffer.copy_(flat[offset : offset + buffer.numel()].view_as(buffer))
        offset += buffer.numel()


def broadcast_weights(model: nn.Module) -> None:
    """Give every worker rank 0's parameters and persistent buffers; draws stay as they are."""
    _, size = world()
    if size == 1:
        return
    for tensor in model.state_dict().values():
        dist.broadcast(tensor, 0)


def sum_over_workers(values: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """Return the sums of named numbers over the workers."""
    _, size = world()
    if size == 1:
        return dict(values)
    names = sorted(values)
    total = torch.tensor([values[name] for name in names], dtype=torch.float64, device=_reduction_device(device))
    dist.all_reduce(total)
    return dict(zip(names, total.tolist(), strict=True))


def exclude_draws_from_ddp(model: nn.Module) -> None:
    """Tell PyTorch's DistributedDataParallel to leave draws alone, for users who wrap a model themselves.

    DDP broadcasts rank 0's buffers before each forward, which would give every rank one draw whatever its scope.
    """
    ignored = list(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    model._ddp_params_and_buffers_to_ignore = [*ignored, *draw_buffer_names(model)]


def _reduction_device(device: torch.device) -> torch.device:
    return device if dist.get_backend() == "nccl" else torch.device("cpu")


def to_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return detached CPU copies."""
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
