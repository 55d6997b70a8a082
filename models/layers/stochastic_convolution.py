"""Deformable convolution with stochasticity: a convolution that keeps n of its k*k taps, drawn at random.

Shapes: B batch, C input channels, O output channels, H and W pixels, T = k*k taps, n kept taps.
Reference: Ma, Huang, Dong, You, Xu, "Adversarial Robustness via Deformable Convolution with Stochasticity", ICML 2025, Eq. 5, Alg. 1.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.errors import UserError
from models.layers.channel_map import scale_filters
from models.layers.tap_masks import Gsat, Sampling, TapMaskSpace
from models.randomness import DrawScope, RandomModule, Stream, per_example_rows, rows_held_by_both

Implementation = Literal["auto", "masked", "crop", "gather"]

_FIRST_ROWS = 64
_NO_KEY = -(2**63)


class StochasticConv2d(RandomModule):
    """A k x k convolution with zero padding (k - 1) / 2 of which each draw keeps n taps, the same for all channels and pixels.

    GSAT: the training step's taps are drawn from those that the attack did not use (`gsat="attack"`); with `chain`, the next
    attack's taps also avoid those of the training step before, as in the official code. Draws that do not belong to such a sequence
    (another stream, an evaluation) are independent.

    Implementations, equal up to rounding, measured in benchmarks/layers.py: *masked* multiplies the weight (any case, compiled code
    and GPUs: the mask is data); *crop* convolves with the smallest dilated grid that holds the taps (few taps close to a grid: always so
    for n = 2); *gather* lays n shifted maps side by side under a 1x1 convolution (n small against k*k). `auto` takes the cheapest on
    the CPU and *masked* elsewhere.

    Args:
        in_channels, out_channels: C, O.
        kernel_size: k, odd.
        num_taps: n.
        stride, groups, bias: as of nn.Conv2d.
        sampling: see `TapMaskSpace`.
        gsat: see above.
        draw_scope: who shares a mask.

    Raises:
        UserError: k even, n out of range, no disjoint masks for GSAT, or `chain` with a mask per example.
    """

    taps: Tensor
    mask: Tensor
    previous: Tensor
    tap_rows: Tensor
    excluded_key: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        num_taps: int,
        stride: tuple[int, int] = (1, 1),
        groups: int = 1,
        bias: bool = False,
        sampling: Sampling = "uniform",
        gsat: Gsat = "off",
        draw_scope: DrawScope = "global",
    ) -> None:
        super().__init__(draw_scope)
        self.space = TapMaskSpace(kernel_size, num_taps, sampling)
        if gsat != "off":
            self.space.check_disjoint()
        if gsat == "chain" and draw_scope == "per_example":
            raise UserError("gsat `chain` needs a mask that the batch shares; draw_scope `per_example` works with `attack`")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.num_taps = kernel_size, num_taps
        self.stride, self.groups, self.padding = stride, groups, kernel_size // 2
        self.gsat: Gsat = gsat
        self.implementation: Implementation = "auto"
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, kernel_size, kernel_size))
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.register_draw("taps", torch.zeros(num_taps, dtype=torch.int64))
        self.register_draw("mask", torch.zeros(kernel_size, kernel_size))
        if gsat == "chain":
            self.register_draw("previous", torch.full((num_taps,), -1))
        if draw_scope == "per_example":
            self.register_draw("tap_rows", torch.zeros(_FIRST_ROWS, num_taps, dtype=torch.int64))
            self.register_draw("excluded_key", torch.tensor(_NO_KEY))
        self.take_first_draw()

    @property
    def num_configurations(self) -> int:
        """Number of masks: C(k*k, n) for uniform sampling."""
        return self.space.size

    def configuration_probability(self, index: int) -> float:
        """Return the probability of configuration `index` when one mask is drawn for itself."""
        return self.space.probability(index)

    def distance(self, first: dict[str, Any], second: dict[str, Any]) -> float:
        """Return the number of taps that two draws do not share."""
        x, y = rows_held_by_both(first, second, "tap_rows", "taps")
        return self.num_taps - (x[..., :, None] == y[..., None, :]).sum(dim=(-2, -1)).double().mean().item()

    @property
    def selected_taps(self) -> tuple[int, ...]:
        """The taps of the current draw, ascending; tap t is row t // k, column t % k."""
        return tuple(self.draw_on_host("taps"))

    def draw(self, generator: torch.Generator) -> None:
        excluded: tuple[int, ...] = ()
        if self.gsat == "chain":
            if self._continues_own_stream():
                excluded = tuple(tap for tap in self.draw_on_host("previous") if tap >= 0)
            self._set_previous((-1,) * self.num_taps)
        self._set_taps(self._choose(generator, excluded))
        if self.draw_scope == "per_example":
            self._set_rows(_NO_KEY)

    def draw_after_attack(self, generator: torch.Generator) -> None:
        if self.gsat == "off":
            self.draw(generator)
            return
        if self.draw_scope == "per_example" and self.draw_on_host("excluded_key") != _NO_KEY:
            raise RuntimeError("two draws after an attack in a row: gsat per example needs an attack's draw between them")
        attacked_key = self._attacked_key
        self._set_taps(self._choose(generator, self.selected_taps))
        if self.gsat == "chain":
            self._set_previous(self.selected_taps)
        if self.draw_scope == "per_example":
            self._set_rows(attacked_key)

    def _draw_from_key(self, key: int, *, after_attack: bool) -> None:
        self._attacked_key = self.draw_key
        super()._draw_from_key(key, after_attack=after_attack)

    def set_configuration(self, index: int) -> None:
        """Keep the taps of mask number `index`, for all examples alike."""
        taps = self.space.taps(index)
        self.draw_key = -1 - index  # keys of streams are not negative; rows of more examples are made from it
        self._set_taps(taps)
        if self.draw_scope == "per_example":
            self._set_rows(_NO_KEY)

    def set_taps(self, taps: tuple[int, ...]) -> None:
        """Keep these n different taps; they need not be in the space of draws.

        Raises:
            ValueError: not n different taps of [0, k*k), or the scope is per example.
        """
        if self.draw_scope == "per_example":
            raise ValueError("each example has taps of its own; use set_configuration to make them alike")
        chosen = tuple(sorted(set(taps)))
        if len(chosen) != self.num_taps or not all(0 <= tap < self.kernel_size**2 for tap in chosen):
            raise ValueError(f"{taps} are not {self.num_taps} different taps of [0, {self.kernel_size**2})")
        self._set_taps(chosen)

    @torch.no_grad()
    def embed(self, conv: nn.Conv2d) -> None:
        """Take over the weight of a smaller convolution: in the middle of the kernel, zeros around.

        With the taps of the middle, the two compute the same.

        Raises:
            UserError: the kernel is larger than this one.
        """
        height, width = conv.kernel_size
        if height > self.kernel_size or width > self.kernel_size:
            raise UserError(f"a {height}x{width} kernel does not fit into {self.kernel_size}x{self.kernel_size}")
        top, left = (self.kernel_size - height) // 2, (self.kernel_size - width) // 2
        self.weight.zero_()
        self.weight[:, :, top : top + height, left : left + width] = conv.weight
        if self.bias is not None and conv.bias is not None:
            self.bias.copy_(conv.bias)

    def take_channel_map(self, scale_O: Tensor, shift_O: Tensor) -> None:
        """Be followed by y * scale_O + shift_O: the mask multiplies the scaled weight as it did the weight."""
        self.bias = scale_filters((self.weight,), self.bias, scale_O, shift_O)

    def macs_for(self, output: Tensor) -> int:
        """Return the multiply-accumulates of the n kept taps for an output (B, O, H, W), whatever the implementation computes."""
        return self.num_taps * (self.in_channels // self.groups) * output.numel()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.draw_scope == "per_example":
            return self._per_example(x_BCHW)
        if torch.compiler.is_compiling():
            return self._masked(x_BCHW)
        implementation = self.implementation
        if implementation == "auto":
            # A mask that came without its taps (functional_call) can only be multiplied.
            by_taps = x_BCHW.device.type == "cpu" and self.knows_on_host("mask")
            implementation = self._cheapest() if by_taps else "masked"
        if implementation == "crop":
            return self._crop(x_BCHW)
        if implementation == "gather":
            return self._gather(x_BCHW)
        return self._masked(x_BCHW)

    def _masked(self, x_BCHW: Tensor) -> Tensor:
        weight = self.weight * self.mask
        return functional.conv2d(x_BCHW, weight, self.bias, self.stride, self.padding, 1, self.groups)

    def _crop(self, x_BCHW: Tensor) -> Tensor:
        rows, columns = self._grid()
        weight = (self.weight * self.mask)[:, :, rows.start : rows.stop : rows.step, columns.start : columns.stop : columns.step]
        height, width = self._output_size(x_BCHW)
        top, left = self.padding - rows[0], self.padding - columns[0]
        bottom = self.stride[0] * (height - 1) + rows[-1] - self.padding - (x_BCHW.shape[2] - 1)
        right = self.stride[1] * (width - 1) + columns[-1] - self.padding - (x_BCHW.shape[3] - 1)
        # Padding first: a tap beyond the far side of a small map lies where a negative padding would have cut more than there is.
        padded = functional.pad(x_BCHW, tuple(max(0, width) for width in (left, right, top, bottom)))
        padded = padded[:, :, max(0, -top) : padded.shape[2] + min(0, bottom), max(0, -left) : padded.shape[3] + min(0, right)]
        dilation = (rows.step, columns.step)
        return functional.conv2d(padded, weight, self.bias, self.stride, 0, dilation, self.groups)

    def _gather(self, x_BCHW: Tensor) -> Tensor:
        height, width = self._output_size(x_BCHW)
        down, across = self.stride
        padded = functional.pad(x_BCHW, (self.padding,) * 4)
        maps, weights = [], []
        for tap in self.selected_taps:
            row, column = divmod(tap, self.kernel_size)
            rows = slice(row, row + down * (height - 1) + 1, down)
            columns = slice(column, column + across * (width - 1) + 1, across)
            maps.append(padded[:, :, rows, columns])
            weights.append(self.weight[:, :, row, column])
        if self.groups == 1:
            stacked = torch.cat(maps, dim=1)
            weight = torch.cat(weights, dim=1)
        else:  # the maps of one group must lie side by side
            stacked = torch.stack(maps, dim=2).flatten(1, 2)
            weight = torch.stack(weights, dim=2).flatten(1)
        return functional.conv2d(stacked, weight[:, :, None, None], self.bias, groups=self.groups)

    def _per_example(self, x_BCHW: Tensor) -> Tensor:
        batch, _, height, width = x_BCHW.shape
        if self.tap_rows.shape[0] < batch:
            # Row b does not depend on how many rows there are, so this draws nothing new.
            self.set_draw("tap_rows", self._rows(batch))
        k = self.kernel_size
        mask_BT = self.weight.new_zeros(batch, k * k).scatter(1, self.tap_rows[:batch], 1.0)
        weight = self.weight * mask_BT.view(batch, 1, 1, k, k)
        out = functional.conv2d(
            x_BCHW.reshape(1, -1, height, width),
            weight.flatten(0, 1),
            None,
            self.stride,
            self.padding,
            groups=batch * self.groups,
        )
        out_BOHW = out.view(batch, self.out_channels, *out.shape[2:])
        return out_BOHW if self.bias is None else out_BOHW + self.bias[:, None, None]

    def _cheapest(self) -> Implementation:
        """Return the implementation of least cost for the current taps; unit: a tap of a dense convolution, on a CPU."""
        if self.groups > 1:
            return "masked"
        rows, columns = self._grid()
        cost: dict[Implementation, float] = {
            "masked": 1.15 * self.kernel_size**2,
            "crop": 2.0 + 1.4 * len(rows) * len(columns),
            # Laying maps side by side costs as much for few output channels as for many.
            "gather": (2.5 + 128 / self.out_channels) * self.num_taps,
        }
        return min(cost, key=lambda name: cost[name])

    def _grid(self) -> tuple[range, range]:
        """Return the rows and the columns of the smallest regular grid that holds the taps."""
        rows, columns = zip(*(divmod(tap, self.kernel_size) for tap in self.selected_taps), strict=True)
        return _regular(rows), _regular(columns)

    def _output_size(self, x_BCHW: Tensor) -> tuple[int, int]:
        return (x_BCHW.shape[2] - 1) // self.stride[0] + 1, (x_BCHW.shape[3] - 1) // self.stride[1] + 1

    def _choose(self, generator: torch.Generator, excluded: tuple[int, ...]) -> tuple[int, ...]:
        available = torch.ones(1, self.kernel_size**2, dtype=torch.bool)
        available[0, list(excluded)] = False
        scores = torch.rand((1, self.space.num_scores), generator=generator, dtype=torch.float64)
        return tuple(self.space.choose(scores, available)[0].tolist())

    def _set_taps(self, taps: tuple[int, ...]) -> None:
        indices = torch.tensor(taps)
        mask = torch.zeros(self.kernel_size**2).index_fill(0, indices, 1.0)
        self.set_draw("mask", mask.view(self.kernel_size, self.kernel_size), on_host=None)
        self.set_draw("taps", indices, on_host=list(taps))

    def _set_previous(self, taps: tuple[int, ...]) -> None:
        self.set_draw("previous", torch.tensor(taps), on_host=list(taps))

    def _continues_own_stream(self) -> bool:
        """Return whether the draw being taken follows another one of this site's own stream."""
        if self.stream.position < 2:
            return False
        return self.draw_key == Stream(self.stream.seed, self.stream.position - 1).next_key()

    def _set_rows(self, excluded_key: int) -> None:
        self.set_draw("excluded_key", torch.tensor(excluded_key), on_host=excluded_key)
        self.set_draw("tap_rows", self._rows(self.tap_rows.shape[0]))

    def _rows(self, num_examples: int) -> Tensor:
        """Return the taps of each example, (num_examples, n), from the draw's key and, after an attack, the attack's key."""
        everything = torch.ones(num_examples, self.kernel_size**2, dtype=torch.bool)
        excluded_key = self.draw_on_host("excluded_key")
        if excluded_key == _NO_KEY:
            return self._rows_of(self.draw_key, num_examples, everything)
        attacked = self._rows_of(excluded_key, num_examples, everything)
        return self._rows_of(self.draw_key, num_examples, everything.scatter(1, attacked, False))

    def _rows_of(self, key: int, num_examples: int, available: Tensor) -> Tensor:
        if key < 0:
            return torch.tensor(self.space.taps(-1 - key)).expand(num_examples, -1)
        scores = per_example_rows(
            key,
            num_examples,
            lambda generator, count: torch.rand((count, self.space.num_scores), generator=generator, dtype=torch.float64),
        )
        return self.space.choose(scores, available)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, num_taps={self.num_taps}, stride={self.stride}, "
            f"sampling={self.space.sampling}, gsat={self.gsat}, draw_scope={self.draw_scope}"
        )


def _regular(positions: tuple[int, ...]) -> range:
    """Return the coarsest range that holds all `positions`."""
    first, last = min(positions), max(positions)
    step = math.gcd(*(position - first for position in positions)) or 1
    return range(first, last + 1, step)
