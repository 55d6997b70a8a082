"""CTRW: what its sweeps search, what Lemma 1 says of a search, and where the code knowingly differs from the paper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from models.configuration import Config
from models.errors import UserError
from orchestration.catalogue import Defence, Informed, Paper, Prior
from orchestration.search_space import Dimension

if TYPE_CHECKING:
    from models.defences.ctrw import CtrwConfig

CIFAR_ELEMENTS = 3 * 32 * 32
A, B = "defence.lower_bound", "defence.upper_bound"


class CtrwPrior(Config):
    """Lemma 1 of CTRW at the start of training: A = sum mu / (-alpha sum |W1|). It is necessary and not sufficient."""

    alpha: float = Field(-1e-3, lt=0, description="alpha of Lemma 1; the paper's 1e-3 stands for -1e-3.")
    use: Literal["bound", "seed"] = Field("seed", description="`bound`: search A only above the lemma's; `seed`: try it first.")


def initial_lower_bound(prior: CtrwPrior, initial_mu: float) -> float:
    """Return Lemma 1's A for a weight of a CIFAR image's size before training: mu = initial_mu and sigma = 1 everywhere."""
    import torch

    from analysis.theory.ctrw_bounds import lemma1_lower_bound

    mu = torch.full((CIFAR_ELEMENTS,), initial_mu, dtype=torch.float64)
    first_weight = mu + torch.randn(mu.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return lemma1_lower_bound(mu, first_weight, prior.alpha)


def inform(prior: CtrwPrior, parameters: CtrwConfig, space: Mapping[str, Dimension]) -> Informed:
    """Return the space after Lemma 1 was asked for A.

    Raises:
        UserError: the bound leaves nothing of the space, or does not apply to it.
    """
    if A not in space:
        return Informed(space)
    if parameters.bounds_refer_to != "cifar_image":
        raise UserError("the prior `ctrw` is for bounds of a CIFAR image's size; set defence.bounds_refer_to to cifar_image")
    bound = initial_lower_bound(prior, parameters.initial_mu)
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
        return Informed(space, remarks=(message,))
    if prior.use == "bound":
        return Informed({**space, A: dimension.model_copy(update={"low": max(low, bound)})}, remarks=(remark,))
    if bound < low:
        return Informed(space, remarks=(f"{remark}, below the range that starts at {low:g}",))
    return Informed(space, ({A: bound},), (remark,))


DEFENCES = (
    Defence(
        name="ctrw",
        summary="constrained trainable random weights on a feature map",
        paper=Paper(title="Adversarial Robustness through Random Weight Sampling", authors="Ma, Dong, Xu", venue="NeurIPS 2023"),
        search_space={
            # The official floor is not searched: sigma starts at 1, far above most floors, so that most of them train the same network.
            "defence.constraint": Dimension(type="choice", choices=("project", "fixed")),
            # A = 1000 and B = 2400 are the paper's; its Fig. 3b goes up to 6144.
            "defence.lower_bound": Dimension(type="float", low=64, high=3072, log=True),
            "defence.upper_bound": Dimension(
                type="float", low=1024, high=6144, log=True, above="defence.lower_bound", when={"defence.constraint": ("project",)}
            ),
            # Positions that every convolutional backbone has (Fig. 3d).
            "defence.position": Dimension(type="int", low=0, high=3),
        },
        deviations=(
            "alpha of Lemma 1 is taken as -1e-3: the stated 1e-3 gives no positive lower bound",
            "two draws per iteration, as in the official code; Algorithm 1 draws once",
            "A and B are kept per element when the feature map is not of a CIFAR image's size",
            "attacks in training use batch statistics without moving the running ones; `attack.mode: train` gives the official behaviour",
        ),
        prior=Prior(CtrwPrior, inform),
    ),
)
