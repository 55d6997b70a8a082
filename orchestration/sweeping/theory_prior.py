"""Theory as a prior of a search: CTRW's Lemma 1 for A, DCS's Eq. 12 for n. Each can bound the space or seed it with points tried first.

Neither is a guarantee: Lemma 1 is necessary and not sufficient, and the two sides of Eq. 12 exclude each other in most of the space,
the paper's own k=5, n=2, S=1 included. What is infeasible is said before anything is trained.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import Field

from analysis.theory.ctrw_bounds import lemma1_lower_bound
from analysis.theory.dcs_bounds import feasibility
from models.configuration import Config
from models.errors import UserError
from orchestration.experiment import ExperimentConfig
from orchestration.search_space import Dimension

CIFAR_ELEMENTS = 3 * 32 * 32
A, B = "defence.lower_bound", "defence.upper_bound"
KERNEL, TAPS = "defence.kernel_size", "defence.num_taps"


class CtrwPrior(Config):
    """Lemma 1 of CTRW at the start of training: A = sum mu / (-alpha sum |W1|)."""

    alpha: float = Field(-1e-3, lt=0, description="alpha of Lemma 1; the paper's 1e-3 stands for -1e-3.")
    use: Literal["bound", "seed"] = Field("seed", description="`bound`: search A only above the lemma's; `seed`: try it first.")


class DcsPrior(Config):
    """Eq. 12 of DCS: n_min(epsilon_l) <= n <= n_max(epsilon_c)."""

    epsilon_c: float = Field(gt=0, description="Largest expected cosine of gradients under two masks.")
    epsilon_l: float = Field(gt=0, description="Largest expected L1 distance of outputs under two masks.")
    num_points: int = Field(ge=1, description="N: size of the input feature map with its padding.")
    stride: int = Field(1, ge=1, description="S: stride of the convolution.")
    use: Literal["bound", "seed"] = Field("seed", description="`bound`: search only feasible n and k; `seed`: try feasible ones first.")


class PriorConfig(Config):
    """What theory says of a search before it starts."""

    ctrw: CtrwPrior | None = Field(None, description="CTRW's lower bound A.")
    dcs: DcsPrior | None = Field(None, description="DCS's bounds of n.")


def applies(prior: PriorConfig) -> list[str]:
    """Return the defences that a prior says something of."""
    return [name for name in type(prior).model_fields if getattr(prior, name) is not None]


@dataclass
class Informed:
    """A space that theory has bounded, points to try first, and what it says."""

    space: dict[str, Dimension]
    points: list[dict[str, Any]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def inform(prior: PriorConfig, experiment: ExperimentConfig, space: dict[str, Dimension]) -> Informed:
    """Return the space of one recipe after theory has been asked.

    Raises:
        UserError: a bound leaves nothing of the space, or does not apply to it.
    """
    if prior.ctrw is not None and experiment.defence.name == "ctrw" and A in space:
        return _ctrw(prior.ctrw, experiment, space)
    if prior.dcs is not None and experiment.defence.name == "dcs" and KERNEL in space and TAPS in space:
        return _dcs(prior.dcs, space)
    return Informed(dict(space))


def ctrw_lower_bound(prior: CtrwPrior, initial_mu: float) -> float:
    """Return Lemma 1's A for a weight of a CIFAR image's size before training: mu = initial_mu and sigma = 1 everywhere."""
    mu = torch.full((CIFAR_ELEMENTS,), initial_mu, dtype=torch.float64)
    first_weight = mu + torch.randn(mu.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return lemma1_lower_bound(mu, first_weight, prior.alpha)


def _ctrw(prior: CtrwPrior, experiment: ExperimentConfig, space: dict[str, Dimension]) -> Informed:
    parameters: Any = experiment.defence.parameters
    if parameters.bounds_refer_to != "cifar_image":
        raise UserError("the prior `ctrw` is for bounds of a CIFAR image's size; set defence.bounds_refer_to to cifar_image")
    bound = ctrw_lower_bound(prior, parameters.initial_mu)
    dimension = space[A]
    low, high = dimension.low, dimension.high
    if low is None or high is None:
        raise UserError(f"the prior `ctrw` needs {A} as a range with `low` and `high`")
    remark = f"Lemma 1 at the start of training (mu {parameters.initial_mu:g}, sigma 1, alpha {prior.alpha:g}): A >= {bound:.4g}"
    reaches = [f"{A} ends at {high:g}"] if bound >= high else []
    above = space[B].high if B in space else None
    if above is not None and bound >= above:
        reaches.append(f"{B} ends at {above:g}")
    if reaches:
        message = f"infeasible: {remark}, but {' and '.join(reaches)}"
        if prior.use == "bound":
            raise UserError(f"{message}. Widen the range, or take a more negative alpha.")
        return Informed(dict(space), [], [message])
    if prior.use == "seed":
        if bound < low:
            return Informed(dict(space), [], [f"{remark}, below the range that starts at {low:g}"])
        return Informed(dict(space), [{A: bound}], [remark])
    return Informed(space | {A: dimension.model_copy(update={"low": max(low, bound)})}, [], [remark])


def _dcs(prior: DcsPrior, space: dict[str, Dimension]) -> Informed:
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
        return Informed(dict(space), [{KERNEL: kernel, TAPS: n} for kernel, n in possible], remarks)
    if not possible:
        raise UserError("DCS's Eq. 12 leaves nothing of the space:\n" + "\n".join(remarks) + "\nRaise epsilon_c or epsilon_l.")
    return Informed(
        space | {KERNEL: _choice(kernels, {kernel for kernel, _ in possible}), TAPS: _choice(taps, {n for _, n in possible})}, [], remarks
    )


def _choice(values: list[int], kept: set[int]) -> Dimension:
    return Dimension(type="choice", choices=tuple(value for value in values if value in kept))


def _values(name: str, dimension: Dimension) -> list[int]:
    if dimension.type == "choice":
        return [int(choice) for choice in dimension.choices]
    if dimension.type != "int" or dimension.low is None or dimension.high is None:
        raise UserError(f"the prior `dcs` needs {name} as an int or a choice")
    return list(range(math.ceil(dimension.low), math.floor(dimension.high) + 1, int(dimension.step or 1)))
