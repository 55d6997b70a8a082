"""Batch normalization folded into the convolution before it: the same function in eval mode, with fewer passes over memory.

In eval mode normalization is an affine map per channel. If nothing else reads the convolution's output, its weights can take that map
over. It holds for plain convolutions, and for layers that say so themselves (`models.layers.channel_map`): DCS, whose mask multiplies the
folded weight, and CTRW's random filters, whose mean and deviation are scaled alike. Layers that choose a normalization at random (RNA) are
left alone.

Which layers follow each other is seen in one forward, not guessed from names, and the folded copy is used only if it computes the same.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from analysis.attacked_model.draws import Draw, all_configurations, set_draw
from models.layers.channel_map import GivesChannelMap, TakesChannelMap, batch_norm_map, scale_filters
from models.randomness import frozen, load_randomness_state, randomness_state, set_configuration

_MAX_TRACED_DRAWS = 64
_TOLERANCE = 1e-4  # of the largest logit; float32 rounding through a deep network is well below

_logger = logging.getLogger(__name__)


@dataclass
class _Seen:
    """What one forward showed of a module: how often it ran, and the identity of its input or output."""

    calls: int = 0
    tensors: list[Tensor] = field(default_factory=list)


def folded_for_evaluation(model: nn.Module, x: Tensor) -> tuple[nn.Module, int]:
    """Return a copy of `model` for eval mode with batch normalizations folded, and their number.

    Args:
        model: in eval mode; it is not changed, its draw is the copy's draw.
        x: images (B, C, H, W) on which layers are traced and the copy is compared.

    Where nothing can be folded, or the copy would compute something else, the model itself is returned with 0.
    """
    # Members of an ensemble run one at a time: each is traced.
    draws = all_configurations(model, _MAX_TRACED_DRAWS) or (None,)
    with frozen(model):
        pairs = _pairs_under(model, x, draws)
        if not pairs:
            return model, 0
        try:
            folded = copy.deepcopy(model)
        except (TypeError, RuntimeError) as error:  # e.g. it holds a generator, a lock or a tensor inside a graph
            _logger.warning("batch normalization is not folded: the model cannot be copied (%s)", error)
            return model, 0
        modules = dict(folded.named_modules())
        for convolution, normalization in pairs:
            _fold(modules[convolution], modules[normalization])
            _replace(folded, normalization)
        same = all(_agree(model, folded, x, draw) for draw in draws)
    if not same:
        _logger.warning("batch normalization is not folded: the folded copy computes something else")
        return model, 0
    load_randomness_state(folded, randomness_state(model))
    return folded, len(pairs)


def _pairs_under(model: nn.Module, x: Tensor, draws: Sequence[Draw | None]) -> list[tuple[str, str]]:
    """Return the pairs seen under any of the draws whose members are in no other pair."""
    found: set[tuple[str, str]] = set()
    for draw in draws:
        _configure(model, draw)
        found.update(_pairs(model, x))
    uses = Counter(name for pair in found for name in pair)
    return sorted(pair for pair in found if uses[pair[0]] == uses[pair[1]] == 1)


def computes_the_same(model: nn.Module, folded: nn.Module, points: Sequence[Tensor], draws: Sequence[Draw]) -> bool:
    """Return whether a folded copy answers like the model on batches of images (B, C, H, W) under each of the draws.

    Two images say little: a network may take another way on images that are attacked. Draws in place are not restored.
    """
    for draw in draws:
        for each in (model, folded):
            set_draw(each, draw)
        if not all(_close(model, folded, x) for x in points):
            return False
    return True


def _agree(model: nn.Module, folded: nn.Module, x: Tensor, draw: Draw | None) -> bool:
    for each in (model, folded):
        _configure(each, draw)
    return _close(model, folded, x)


@torch.no_grad()
def _close(model: nn.Module, folded: nn.Module, x: Tensor) -> bool:
    expected_BK, found_BK = model(x), folded(x)
    scale = expected_BK.abs().max().clamp_min(1e-12)
    return bool(((found_BK - expected_BK).abs().max() <= _TOLERANCE * scale).item())


def _configure(model: nn.Module, draw: Draw | None) -> None:
    if draw is not None and draw.kind == "configuration":
        set_configuration(model, draw.value)


@torch.no_grad()
def _pairs(model: nn.Module, x: Tensor) -> list[tuple[str, str]]:
    """Return names of (convolution, normalization) where the second is fed by the first and by nothing else."""
    outputs: dict[str, _Seen] = {}
    inputs: dict[str, _Seen] = {}
    handles = []
    for name, module in model.named_modules():
        if _takes_channel_map(module) and not _has_hooks(module):
            seen = outputs.setdefault(name, _Seen())
            handles.append(module.register_forward_hook(lambda _m, _i, output, seen=seen: _note(seen, output)))
        elif not _has_hooks(module) and _channel_map(module) is not None:
            seen = inputs.setdefault(name, _Seen())
            handles.append(module.register_forward_pre_hook(lambda _m, arguments, seen=seen: _note(seen, arguments[0])))
    readers_of = _Readers()
    try:
        with readers_of:
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    shared = _shared_parameters(model)
    found = []
    for convolution, made in outputs.items():
        if made.calls != 1 or convolution in shared or readers_of.counts[id(made.tensors[0])] != 1:
            continue
        readers = [name for name, read in inputs.items() if read.calls == 1 and read.tensors[0] is made.tensors[0]]
        if len(readers) == 1:
            found.append((convolution, readers[0]))
    return found


class _Readers(TorchFunctionMode):
    """Counts, per tensor, the operations that compute something from it."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[int] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):  # a shape or a dtype is not read from values
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor):
                    self.counts[id(leaf)] += 1
        given = {id(leaf) for leaf in tree_leaves((args, kwargs))}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and id(leaf) not in given:
                self.counts[id(leaf)] = 0  # a new tensor may have the identity of one that is gone
        return result


def _note(seen: _Seen, tensor: Tensor) -> None:
    seen.calls += 1
    seen.tensors.append(tensor)  # kept alive, so that identities are not reused


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or getattr(module, "parametrizations", None))


def _shared_parameters(model: nn.Module) -> set[str]:
    """Return the names of modules whose parameters other modules hold as well."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    return {name for names in owners.values() if len(names) > 1 for name in names}


def _takes_channel_map(module: nn.Module) -> bool:
    """Not every subclass of `nn.Conv2d`: what one adds of its own would not be folded."""
    return type(module) is nn.Conv2d or isinstance(module, TakesChannelMap)


def _channel_map(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    if type(module) is nn.BatchNorm2d:
        return batch_norm_map(module)
    return module.channel_map() if isinstance(module, GivesChannelMap) else None


def _fold(convolution: nn.Module, normalization: nn.Module) -> None:
    channel_map = _channel_map(normalization)
    assert channel_map is not None, "only such normalizations are in pairs"
    if isinstance(convolution, TakesChannelMap):
        convolution.take_channel_map(*channel_map)
    else:
        assert isinstance(convolution, nn.Conv2d)
        convolution.bias = scale_filters((convolution.weight,), convolution.bias, *channel_map)


def _replace(model: nn.Module, name: str) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Identity().eval())


__all__ = ["folded_for_evaluation"]
