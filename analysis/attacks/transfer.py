"""Transfer attacks: points made on another model, or on frozen draws, and scored on the defence. No white-box attack may be weaker.

transfer_static         on the model with all randomness at its mean; where a mean does not exist, on the mean probability over draws
transfer_frozen_draws   on a few frozen draws jointly
transfer_surrogate      on another trained model (an exported folder): the black-box attack of the papers, `fgsm` for their FGSM-base
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from analysis.attacked_model.draws import ONLY_DRAW, FixedDraws, FreshDraws
from analysis.attacked_model.mean_draw import MeanDrawPredictor, has_mean_draw
from analysis.attacked_model.model import AttackedModel, Predictor
from analysis.attacks.apgd import apgd
from analysis.attacks.losses import LossName, attack_loss
from analysis.attacks.registry import AttackEntry, AttackOutput, AttackProblem, Cost
from analysis.fingerprints import weights_hash
from models.configuration import Config
from models.errors import UserError
from models.randomness import is_randomized
from models.threat_model import Norm, PixelFraction
from models.weights import load_pretrained
from trainers.attacks import pgd

Method = Literal["apgd", "pgd", "fgsm"]
_NUM_AVERAGED = 20


class TransferParameters(Config):
    """How points are made on the surrogate."""

    method: Method = Field("apgd", description="`apgd`; `pgd`: last iterate, as in the papers; `fgsm`: one step.")
    steps: int = Field(50, ge=1, description="Number of gradient steps; `fgsm` takes one.")
    step_size: PixelFraction | None = Field(None, gt=0, description="Step size of `pgd`; none: a quarter of epsilon.")
    loss: LossName = Field("cross_entropy", description="What is maximized on the surrogate; `margin` is the papers' CW loss.")


class FrozenDrawsParameters(TransferParameters):
    """Frozen draws attacked jointly."""

    num_frozen: int = Field(5, ge=1, description="Draws that are frozen and attacked together.")


class SurrogateParameters(TransferParameters):
    """Another model as the surrogate."""

    surrogate: str = Field(description="Folder of an exported model: model.safetensors and config.json.")
    weights: str | None = Field(None, description="Hash that its weights must have; none: any.")


def _static(model: AttackedModel, problem: AttackProblem, parameters: TransferParameters) -> AttackOutput:
    network = model.predictor.model
    if not is_randomized(network):
        raise UserError("transfer_static needs a randomized model; a deterministic one is its own static model")
    if has_mean_draw(network):
        predictor: Predictor = MeanDrawPredictor(network, problem.seed)
    else:
        predictor = Predictor(network, averaged_draws=model.frozen_draws(_NUM_AVERAGED))
    return AttackOutput(_made_on(model.on(FixedDraws((ONLY_DRAW,)), predictor), problem, parameters))


def _frozen_draws(model: AttackedModel, problem: AttackProblem, parameters: FrozenDrawsParameters) -> AttackOutput:
    draws = model.frozen_draws(parameters.num_frozen)[: parameters.num_frozen]
    return AttackOutput(_made_on(model.on(FixedDraws(draws)), problem, parameters))


def _surrogate(model: AttackedModel, problem: AttackProblem, parameters: SurrogateParameters) -> AttackOutput:
    network = _loaded(parameters.surrogate, _stamp(parameters.surrogate)).to(problem.x.device)
    source = FreshDraws(1, problem.seed, "surrogate") if is_randomized(network) else FixedDraws((ONLY_DRAW,))
    return AttackOutput(_made_on(model.on(source, Predictor(network)), problem, parameters))


def _made_on(surrogate: AttackedModel, problem: AttackProblem, parameters: TransferParameters) -> Tensor:
    epsilon, norm = problem.threat_model.epsilon, problem.threat_model.norm
    loss = attack_loss(parameters.loss, problem.num_classes)
    if parameters.method == "apgd":
        x_adv, _, _ = apgd(
            surrogate, problem.x, problem.y, epsilon=epsilon, norm=norm, steps=parameters.steps, loss=loss, seed=problem.seed
        )
        return x_adv
    one_step = parameters.method == "fgsm"
    step_size = epsilon if one_step else (parameters.step_size or epsilon / 4)
    return pgd(
        surrogate,
        problem.x,
        problem.y,
        epsilon=epsilon,
        step_size=step_size,
        steps=1 if one_step else parameters.steps,
        norm=norm,
        random_start=not one_step,
        generator=torch.Generator().manual_seed(problem.seed),
        loss=loss,
        num_draws=surrogate.source.count,
        resample_each_step=True,
    )


@functools.lru_cache(maxsize=2)
def _loaded(folder: str, stamp: float) -> nn.Module:
    del stamp
    return load_pretrained(folder, resample_on_forward=False).eval().requires_grad_(False)


def _stamp(folder: str) -> float:
    try:
        return (Path(folder) / "model.safetensors").stat().st_mtime
    except OSError as error:
        raise UserError(f"the surrogate {folder} cannot be read: {error.strerror}") from None


def _check_surrogate(parameters: SurrogateParameters, num_classes: int) -> None:
    network = _loaded(parameters.surrogate, _stamp(parameters.surrogate))
    found = weights_hash(network)
    if parameters.weights not in (None, found):
        raise UserError(f"the weights of the surrogate {parameters.surrogate} are {found}, not {parameters.weights}: it was trained again")
    spec = getattr(network, "spec", None)
    if spec is not None and spec.num_classes != num_classes:
        raise UserError(f"the surrogate {parameters.surrogate} has {spec.num_classes} classes, the model has {num_classes}")


def _cost(parameters: TransferParameters, num_draws: int, num_classes: int, fixed_draws: bool) -> Cost:
    del num_classes, fixed_draws
    # A mean probability over frozen draws costs `_NUM_AVERAGED` passes where a mean draw costs one; the plan cannot know which.
    draws = min(parameters.num_frozen, num_draws) if isinstance(parameters, FrozenDrawsParameters) else 1
    steps = 1 if parameters.method == "fgsm" else parameters.steps
    return Cost(draws * (steps + (parameters.method == "apgd")), draws * steps)


_NORMS: tuple[Norm, ...] = ("linf", "l2")
ATTACKS = (
    AttackEntry(
        "transfer_static",
        "transfer from the static model: all randomness at its mean",
        TransferParameters,
        _NORMS,
        _static,
        _cost,
        is_transfer=True,
    ),
    AttackEntry(
        "transfer_frozen_draws",
        "transfer from frozen draws, attacked jointly",
        FrozenDrawsParameters,
        _NORMS,
        _frozen_draws,
        _cost,
        is_transfer=True,
    ),
    AttackEntry(
        "transfer_surrogate",
        "transfer from another trained model",
        SurrogateParameters,
        _NORMS,
        _surrogate,
        _cost,
        check_arguments=_check_surrogate,
        is_transfer=True,
    ),
)
