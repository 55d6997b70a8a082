"""DCS with GSAT, and its baseline DCN: what their sweeps search, what Eq. 12 says of a search, and where the code knowingly differs from
the paper."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from models.configuration import Config
from models.errors import UserError
from orchestration.catalogue import Defence, Informed, Paper, Prior
from orchestration.search_space import Dimension

KERNEL, TAPS = "defence.kernel_size", "defence.num_taps"

PAPER = Paper(
    title="Adversarial Robustness via Deformable Convolution with Stochasticity",
    authors="Ma, Huang, Dong, You, Xu",
    venue="ICML 2025",
)


class DcsPrior(Config):
    """Eq. 12 of DCS: n_min(epsilon_l) <= n <= n_max(epsilon_c).

    The two sides exclude each other in most of the space, the paper's own k=5, n=2, S=1 included.
    """

    epsilon_c: float = Field(gt=0, description="Largest expected cosine of gradients under two masks.")
    epsilon_l: float = Field(gt=0, description="Largest expected L1 distance of outputs under two masks.")
    num_points: int = Field(ge=1, description="N: size of the input feature map with its padding.")
    stride: int = Field(1, ge=1, description="S: stride of the convolution.")
    use: Literal["bound", "seed"] = Field("seed", description="`bound`: search only feasible n and k; `seed`: try feasible ones first.")


def inform(prior: DcsPrior, parameters: Any, space: Mapping[str, Dimension]) -> Informed:
    """Return the space after Eq. 12 was asked for k and n.

    Raises:
        UserError: the equation leaves nothing of the space.
    """
    from analysis.theory.dcs_bounds import feasibility

    del parameters
    if KERNEL not in space or TAPS not in space:
        return Informed(space)
    possible: list[tuple[int, int]] = []
    remarks = []
    kernels, taps = _values(KERNEL, space[KERNEL]), _values(TAPS, space[TAPS])
    for kernel in kernels:
        if prior.stride > kernel:
            remarks.append(f"Eq. 12 does not hold for k={kernel} below the stride {prior.stride}")
            continue
        allowed = [n for n in taps if n <= kernel**2]
        verdicts = [feasibility(kernel, n, prior.stride, prior.epsilon_c, prior.epsilon_l, prior.num_points) for n in allowed]
        inside = [(kernel, each.num_taps) for each in verdicts if each.feasible]
        possible += inside
        if verdicts:
            first = verdicts[0]
            whole = "" if first.some_n_is_feasible else "; no n at all is"
            found = f"n in {{{', '.join(str(n) for _, n in inside)}}} feasible" if inside else f"no searched n is feasible{whole}"
            remarks.append(f"Eq. 12 for k={kernel}: {found} ({first.lower:.4g} <= n <= {first.upper:.4g})")
    if prior.use == "seed":
        return Informed(space, tuple({KERNEL: kernel, TAPS: n} for kernel, n in possible), tuple(remarks))
    if not possible:
        raise UserError("DCS's Eq. 12 leaves nothing of the space:\n" + "\n".join(remarks) + "\nRaise epsilon_c or epsilon_l.")
    bounded = {KERNEL: _choice(kernels, {kernel for kernel, _ in possible}), TAPS: _choice(taps, {n for _, n in possible})}
    return Informed({**space, **bounded}, remarks=tuple(remarks))


def _choice(values: list[int], kept: set[int]) -> Dimension:
    return Dimension(type="choice", choices=tuple(value for value in values if value in kept))


def _values(name: str, dimension: Dimension) -> list[int]:
    if dimension.type == "choice":
        return [int(choice) for choice in dimension.choices]
    if dimension.type != "int" or dimension.low is None or dimension.high is None:
        raise UserError(f"the prior `dcs` needs {name} as an int or a choice")
    return list(range(math.ceil(dimension.low), math.floor(dimension.high) + 1, int(dimension.step or 1)))


DEFENCES = (
    Defence(
        name="dcs",
        summary="a convolution keeps n of its k*k taps per draw; GSAT trains on taps that the attack did not use",
        paper=PAPER,
        search_space={
            "defence.kernel_size": Dimension(type="choice", choices=(3, 5, 7, 9)),
            "defence.num_taps": Dimension(type="int", low=1, high=4),
            "defence.gsat": Dimension(type="choice", choices=("off", "attack", "chain")),
            # Those that every convolutional backbone has (Fig. 7, Table 9).
            "defence.positions": Dimension(type="choice", choices=((2,), (3,), (4,), (5,))),
        },
        deviations=(
            "p_s = n / k^2: the n / k of sections 4.2 and A.3 holds only if k means the area",
            "the attack sees batch statistics and leaves the running ones alone (`attack.mode: train_without_update`); the official code "
            "attacks in training mode, so that each attack step moves them",
            "evaluation draws are independent of the attack's, never forced to be disjoint",
            "the training mask is drawn from the complement of the attack's mask; `gsat: chain` is the official code's chain of exclusions",
        ),
        prior=Prior(DcsPrior, inform),
    ),
    Defence(
        name="dcn",
        summary="deformable convolution with learned offsets, deterministic: the baseline of DCS",
        paper=PAPER,
        search_space={"training.optimizer.learning_rate": Dimension(type="float", low=0.01, high=0.3, log=True)},
    ),
)
