"""A layer that holds several normalizations and uses one of them per draw.

Shapes: B batch, C channels, H and W pixels, n types in the pool.
Reference: Dong, Chen, Wang, Xu, "Random Normalization Aggregation for Adversarial Defense", NeurIPS 2022, section 4.
"""

from __future__ import annotations

import keyword
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from models.errors import UserError
from models.layers.channel_statistics import (
    Normalization2d,
    NormalizationType,
    channel_moments,
    is_synchronized,
    normalize,
    parse_normalization,
)
from models.randomness import DrawScope, RandomModule, per_example_rows, rows_held_by_both

Implementation = Literal["auto", "one_formula", "selected"]

_FIRST_ROWS = 64


class _Branches(nn.ModuleDict):
    """Modules by the name of their normalization.

    A name that is a word of Python (`in`) is registered with an underscore behind it: exported graphs are Python code. Weights that were
    saved under the bare word still load.
    """

    def __init__(self, modules: Mapping[str, Normalization2d]) -> None:
        super().__init__({_registered(name): module for name, module in modules.items()})

    def __getitem__(self, name: str) -> Normalization2d:
        module = super().__getitem__(_registered(name))
        assert isinstance(module, Normalization2d)
        return module

    def __contains__(self, name: str) -> bool:
        return super().__contains__(_registered(name))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for key in [key for key in state_dict if key.startswith(prefix)]:
            name, dot, rest = key.removeprefix(prefix).partition(".")
            if keyword.iskeyword(name):
                state_dict[f"{prefix}{_registered(name)}{dot}{rest}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _registered(name: str) -> str:
    return f"{name}_" if keyword.iskeyword(name) else name


class RandomNormalization2d(RandomModule):
    """One of n normalizations with affine parameters of their own, chosen by the draw.

    Two implementations, equal up to rounding. *Selected* runs the chosen normalization with PyTorch's kernels: fastest in eager
    mode, and unchosen parameters get no gradient at all. *One formula* computes per-(sample, channel) statistics once, derives
    every normalization's mean and variance from them and picks one by the value of a tensor: the choice is data, so there is one
    compiled graph for all draws, a captured CUDA graph may be replayed with another draw, and examples of a batch may choose
    differently; unchosen parameters get gradients of zero. `auto` takes the second where it is needed: compiled, captured, or
    per example, or per worker while batch statistics are those of all workers, which then must all compute the same statistics.

    Only the chosen normalization's running statistics move. With a choice per example, statistics over the batch are taken over
    all its examples, whatever they chose, and are recorded with momentum times the share of examples that chose them.

    Args:
        num_channels: C.
        pool: n different names for `parse_normalization`.
        eps, momentum: of every normalization.
        draw_scope: who shares a choice.
        stream_name: layers of equal name choose alike (the paper's layer-based variant); None: each for itself.

    Raises:
        UserError: an unknown or repeated normalization, or groups that do not divide C.
    """

    choice: Tensor
    choice_rows: Tensor

    def __init__(
        self,
        num_channels: int,
        pool: Sequence[str],
        eps: float = 1e-5,
        momentum: float = 0.1,
        draw_scope: DrawScope = "global",
        stream_name: str | None = None,
    ) -> None:
        super().__init__(draw_scope)
        self.num_channels = num_channels
        self.pool = check_pool(pool)
        self.eps = eps
        self.stream_name = stream_name
        self.implementation: Implementation = "auto"
        self.branches = _Branches({name: Normalization2d(num_channels, parse_normalization(name), eps, momentum) for name in self.pool})
        self.register_draw("choice", torch.zeros((), dtype=torch.int64))
        if draw_scope == "per_example":
            self.register_draw("choice_rows", torch.zeros(_FIRST_ROWS, dtype=torch.int64))
        self.take_first_draw()

    @property
    def num_configurations(self) -> int:
        """n."""
        return len(self.pool)

    def draw(self, generator: torch.Generator) -> None:
        self._set_choice(torch.randint(len(self.pool), (), generator=generator))
        if self.draw_scope == "per_example":
            self.set_draw("choice_rows", self._rows(self.choice_rows.shape[0]))

    def set_configuration(self, index: int) -> None:
        """Choose the normalization `pool[index]`, for all examples alike."""
        if not 0 <= index < len(self.pool):
            raise IndexError(f"configuration {index} is outside [0, {len(self.pool)})")
        self.draw_key = -1 - index  # keys of streams are not negative; rows of more examples are made from it
        self._set_choice(torch.tensor(index))
        if self.draw_scope == "per_example":
            self.set_draw("choice_rows", self._rows(self.choice_rows.shape[0]))

    def configuration_probability(self, index: int) -> float:
        """Return 1/n: every normalization is as likely."""
        del index
        return 1 / len(self.pool)

    def distance(self, first: dict[str, Any], second: dict[str, Any]) -> float:
        """Return 1 where the choices differ: summed over layers, the paper's path difference."""
        x, y = rows_held_by_both(first, second, "choice_rows", "choice")
        return (x != y).double().mean().item()

    @property
    def selected(self) -> int:
        """Index of the chosen normalization (scope per example: the choice that a single example would not have to follow)."""
        return self.draw_on_host("choice")

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self._choice_is_data(x_BCHW):
            return self._one_formula(x_BCHW)
        return self.branches[self.pool[self.selected]](x_BCHW)

    def _choice_is_data(self, x_BCHW: Tensor) -> bool:
        if self.draw_scope == "per_example" or torch.compiler.is_compiling():
            return True
        if self.draw_scope == "per_rank" and is_synchronized(self):
            return True
        if self.implementation != "auto":
            return self.implementation == "one_formula"
        return x_BCHW.is_cuda and torch.cuda.is_current_stream_capturing()

    def _one_formula(self, x_BCHW: Tensor) -> Tensor:
        mean_BC, variance_BC = channel_moments(x_BCHW)
        choice = self._example_choices(x_BCHW.shape[0]) if self.draw_scope == "per_example" else self.choice
        picked: list[Tensor] = []
        for index, branch in enumerate(map(self.branches.__getitem__, self.pool)):
            chosen = choice == index
            share = self._share(chosen.to(mean_BC.dtype), x_BCHW.shape[0], branch)
            mean, variance = branch.moments(x_BCHW, mean_BC, variance_BC, share)
            assert branch.weight is not None and branch.bias is not None
            values = [mean, variance, branch.weight, branch.bias]
            if not picked:
                picked = [value.to(mean_BC.dtype).expand_as(mean_BC) for value in values]
            else:
                where = chosen[:, None] if chosen.dim() else chosen
                picked = [torch.where(where, value, other) for value, other in zip(values, picked, strict=True)]
        mean, variance, weight, bias = picked
        return normalize(x_BCHW, mean, variance, weight, bias, self.eps)

    def _share(self, chosen: Tensor, num_examples: int, branch: Normalization2d) -> Tensor:
        """Return the share of the batch's examples that chose a branch: of all workers' where statistics are taken over them."""
        if self.draw_scope == "global" or not (self.training and is_synchronized(branch)):
            return chosen.mean()
        chosen_B1 = chosen.expand(num_examples)[:, None]
        return branch.batch_reduction(chosen_B1, torch.zeros_like(chosen_B1))[0][0]

    def _set_choice(self, choice: Tensor) -> None:
        self.set_draw("choice", choice, on_host=int(choice))

    def _rows(self, num_examples: int) -> Tensor:
        if self.draw_key < 0:
            return torch.full((num_examples,), -1 - self.draw_key, dtype=torch.int64)
        return per_example_rows(
            self.draw_key,
            num_examples,
            lambda generator, count: torch.randint(len(self.pool), (count,), generator=generator),
        )

    def _example_choices(self, num_examples: int) -> Tensor:
        if self.choice_rows.shape[0] < num_examples:
            # Row b does not depend on how many rows there are, so this draws nothing new.
            self.set_draw("choice_rows", self._rows(num_examples))
        return self.choice_rows[:num_examples]

    def extra_repr(self) -> str:
        return f"{self.num_channels}, pool={'+'.join(self.pool)}, draw_scope={self.draw_scope}"


def check_pool(pool: Sequence[str]) -> tuple[str, ...]:
    """Return `pool` as a tuple if every name is known and no normalization is in it twice, be it under two names.

    Raises:
        UserError: otherwise, or the pool is empty.
    """
    names = tuple(pool)
    if not names:
        raise UserError("the pool of normalizations is empty; the paper's for CIFAR is bn, in")
    first: dict[NormalizationType, str] = {}
    for name in names:
        other = first.setdefault(parse_normalization(name), name)
        if other == name and names.count(name) > 1:
            raise UserError(f"normalization {name!r} is in the pool twice")
        if other != name:
            raise UserError(f"normalizations {other!r} and {name!r} of the pool are the same one; keep one of them")
    return names
