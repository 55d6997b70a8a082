"""The few collective operations of training. Without an initialized process group there is one worker and they do nothing.

Gradients are averaged by one flat all-reduce after the objective has left them in `.grad`, instead of by a wrapper around the model:
attacks, several forward passes, double backward and parameters that a random path left unused then need no special care, no draw
is ever broadcast, and there is exactly one all-reduce per training step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.errors import UserError
from models.layers.channel_statistics import pool_batch
from models.layers.explicit_batch_norm import make_batch_norm_explicit
from models.profiling import timed
from models.randomness import draw_buffer_names


def world() -> tuple[int, int]:
    """Return (rank, number of workers)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@timed("all-reduce")
@torch.no_grad()
def all_reduce_flat(tensors: Sequence[Tensor], op: Literal["sum", "mean"]) -> None:
    """Replace every tensor by its sum or mean over the workers, in place: one all-reduce of all of them in a row.

    Args:
        tensors: of one dtype, on one device, of the same shapes in the same order on every worker.
        op: `mean` divides the sum by the number of workers.
    """
    _, size = world()
    if size == 1 or not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    if op == "mean":
        flat /= size
    for tensor, averaged in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(averaged.view_as(tensor))


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average the gradients over the workers: one all-reduce. A gradient that is None on a worker counts as zero there.

    A gradient that is None on every worker stays None.
    """
    _, size = world()
    if size == 1:
        return
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    # Filled in the parameter's own layout where a path left it unused; whether any worker used it travels with the gradients.
    gradients = [torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in trained]
    used = torch.tensor([parameter.grad is not None for parameter in trained], dtype=trained[0].dtype, device=trained[0].device)
    all_reduce_flat([*gradients, used], "mean")
    for parameter, gradient, share in zip(trained, gradients, used.tolist(), strict=True):
        parameter.grad = gradient if share else None


def average_batch_statistics(model: nn.Module) -> None:
    """Average floating-point buffers that are part of the weights (running statistics) over the workers."""
    _, size = world()
    if size == 1:
        return
    draws = set(draw_buffer_names(model))
    persistent = model.state_dict().keys()
    buffers = [buffer for name, buffer in model.named_buffers() if name in persistent and name not in draws and buffer.is_floating_point()]
    all_reduce_flat(buffers, "mean")


def synchronize_batch_norm(model: nn.Module) -> None:
    """Let every normalization of `model` that pools over the batch take the statistics of the global batch, in place.

    Works on any backend; every worker must run the same layers in the same order, forward and backward. Batches of the workers may
    differ in size: each example counts once.

    Raises:
        UserError: a batch normalization is of another class than ours and PyTorch's BatchNorm2d.
    """
    make_batch_norm_explicit(model)
    for name, module in model.named_modules():
        if hasattr(module, "batch_reduction"):
            module.batch_reduction = pool_over_workers
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, nn.SyncBatchNorm):
            raise UserError(
                f"layer {name} is a {type(module).__name__}, whose statistics stay each worker's; use training.batch_norm: local"
            )


def pool_over_workers(mean_BG: Tensor, variance_BG: Tensor) -> tuple[Tensor, Tensor, int | Tensor]:
    """Return mean (G,), variance (G,) and number of examples of the batches of all workers: `pool_batch` over all of them."""
    if world()[1] == 1:
        return pool_batch(mean_BG, variance_BG)
    sums = _SumOverWorkers.apply(torch.cat([mean_BG.sum(dim=0), mean_BG.new_full((1,), mean_BG.shape[0])]))
    num_examples = sums[-1].detach()
    mean_G = sums[:-1] / num_examples
    deviation_G = _SumOverWorkers.apply((variance_BG + (mean_BG - mean_G).square()).sum(dim=0))
    return mean_G, deviation_G / num_examples, num_examples


class _SumOverWorkers(torch.autograd.Function):
    """The sum of a tensor over the workers, differentiable any number of times: its gradient is the sum of the workers' gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _SumOverWorkers.apply(gradient)


def gather_rows(rows: Tensor) -> Tensor:
    """Return the rows of all workers, of equal numbers, in the order of their ranks; gradients reach this worker's own."""
    rank, size = world()
    if size == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(size)]
    dist.all_gather(parts, rows.detach().contiguous())
    parts[rank] = rows
    return torch.cat(parts)


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
    all_reduce_flat([total], "sum")
    return dict(zip(names, total.tolist(), strict=True))


def exclude_draws_from_ddp(model: nn.Module) -> None:
    """Tell PyTorch's DistributedDataParallel to leave draws alone, for users who wrap a model themselves.

    DDP broadcasts rank 0's buffers before each forward, which would give every rank one draw whatever its scope.
    """
    ignored = list(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    model._ddp_params_and_buffers_to_ignore = [*ignored, *draw_buffer_names(model)]  # type: ignore[assignment] # a hook of PyTorch


def _reduction_device(device: torch.device) -> torch.device:
    return device if dist.get_backend() == "nccl" else torch.device("cpu")


def to_cpu(value: Any) -> Any:
    """Return a value of dictionaries and lists with every tensor in it replaced by a detached copy on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, Mapping):
        return {name: to_cpu(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_cpu(each) for each in value)
    return value
