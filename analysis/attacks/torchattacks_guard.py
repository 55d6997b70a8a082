"""Attacks of the torchattacks library behind a guard: as the papers ran them, without their side effects.

The library's attacks switch modes, reseed global generators, leave gradients behind, and some return NaN or images with a graph. The
guard undoes all that. Its AutoAttack runs 10 steps where the official one runs 100, so it is called `torchattacks_autoattack` and
nothing else. The library is imported when an attack of it is first used.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import random
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from analysis.attacked_model.model import AttackedModel
from analysis.attacked_model.state_guard import restored_state
from analysis.attacks.registry import AttackEntry, AttackOutput, AttackProblem, Cost
from models.configuration import Config
from models.errors import UserError, nearest
from models.randomness import resample
from models.threat_model import Norm, parse_pixel_fraction

_BOX_MARGIN = 1e-6


class TorchattacksParameters(Config):
    """Arguments of the library's constructor. Radius, norm, number of classes and seed are filled in by the guard."""

    arguments: dict[str, Any] = Field(default_factory=dict, description="Constructor arguments; `2/255` may be written so.")

    @field_validator("arguments")
    @classmethod
    def _read_fractions(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        return {
            name: parse_pixel_fraction(value) if isinstance(value, str) and "/" in value else value for name, value in arguments.items()
        }


@dataclass(frozen=True)
class _LibraryAttack:
    """What the guard must know of one attack of the library.

    Attributes:
        class_name: in the library.
        radius: constructor argument that takes epsilon; None: the attack has no radius (minimum norm, few pixels).
        norms: norms it can be bounded by; for attacks without a radius, empty.
        min_classes: fewest classes with which it works. one_step: a single gradient step.
        forward, backward: passes per image: a number, or the name of the argument that counts steps.
        defaults: arguments that differ from the library's unless they are given.
        remark: what a reader of its numbers must know.
    """

    class_name: str
    radius: str | None
    norms: tuple[Norm, ...]
    forward: str | float
    backward: str | float
    min_classes: int = 2
    one_step: bool = False
    defaults: dict[str, Any] = field(default_factory=dict)
    remark: str = ""


def _linf(class_name: str, *, per_step: str | float = "steps", **facts: Any) -> _LibraryAttack:
    return _LibraryAttack(class_name, "eps", ("linf",), per_step, per_step, **facts)


_BOTH: tuple[Norm, ...] = ("linf", "l2")
_LIBRARY = (
    _linf("FGSM", per_step=1, one_step=True),
    _linf("FFGSM", per_step=1, one_step=True),
    _linf("BIM"),
    _linf("RFGSM"),
    _linf("PGD"),
    _linf("EOTPGD", per_step="steps*eot_iter"),
    _linf("TPGD", remark="labels are not looked at"),
    _linf("MIFGSM"),
    _linf("NIFGSM"),
    _linf("SINIFGSM", per_step="steps*m"),
    _linf("VMIFGSM", per_step="steps*N"),
    _linf("VNIFGSM", per_step="steps*N"),
    _linf("UPGD", per_step="steps*eot_iter"),
    _linf("DIFGSM"),
    _linf("TIFGSM"),
    _linf("Jitter"),
    _LibraryAttack("PIFGSM", "max_epsilon", ("linf",), "num_iter_set", "num_iter_set"),
    _LibraryAttack("PIFGSMPP", "max_epsilon", ("linf",), "num_iter_set", "num_iter_set"),
    # The library's single iteration moves no pixel by more than 0.01, and 64 perturbations of each image at once exhaust memory.
    _LibraryAttack("SPSA", "eps", ("linf",), "nb_iter*nb_sample*2", 0, defaults={"nb_iter": 100, "max_batch_size": 8}),
    _LibraryAttack("PGDL2", "eps", ("l2",), "steps", "steps"),
    _LibraryAttack("APGD", "eps", _BOTH, "steps*eot_iter", "steps*eot_iter"),
    _LibraryAttack("APGDT", "eps", _BOTH, 109, 100, min_classes=4),
    _LibraryAttack("FAB", "eps", _BOTH, 208, 190),
    _LibraryAttack("Square", "eps", _BOTH, "n_queries", 0),
    _LibraryAttack("AutoAttack", "eps", _BOTH, 5336, 300, min_classes=4, remark="its parts run 10 steps, the official one's 100"),
    _LibraryAttack("CW", None, (), "steps", "steps", remark="it minimizes the distance and has no radius"),
    _LibraryAttack("DeepFool", None, (), "steps", 500),
    _LibraryAttack("EADL1", None, (), 900, 900),
    _LibraryAttack("EADEN", None, (), 900, 900),
    _LibraryAttack("SparseFool", None, (), 520, 520),
    _LibraryAttack("OnePixel", None, (), "steps*popsize", 0),
    _LibraryAttack("Pixle", None, (), "restarts*max_iterations", 0),
    # Its target is (label + 1) modulo 10, whatever the number of classes.
    _LibraryAttack("JSMA", None, (), 154, 1540, min_classes=10),
    _LibraryAttack("GN", None, (), 0, 0),
)


@functools.cache
def _library() -> ModuleType:
    try:
        return importlib.import_module("torchattacks")
    except ImportError as error:
        raise UserError(
            f"the attacks named `torchattacks_...` need the package torchattacks, which cannot be imported: {error}. "
            "Install it (`make setup`, or `pip install --no-deps torchattacks`), or choose a suite without them, e.g. `quick`."
        ) from error


class ExposedModel(nn.Module):
    """The attacked model as an ordinary module: modes, parameters and device are found where libraries look for them.

    Each forward moves to the protocol's next draw, and averages the probabilities of as many draws as the protocol averages.
    """

    def __init__(self, attacked: AttackedModel, *, positive_logits: bool = False) -> None:
        super().__init__()
        self.network = attacked.predictor.model
        # A list hides the attacked model from the module tree: its network is registered above, once.
        self._attacked = [attacked]
        self.positive_logits = positive_logits

    def forward(self, x: Tensor) -> Tensor:
        attacked = self._attacked[0]
        outputs = []
        for _ in range(attacked.source.count):
            resample(attacked)
            outputs.append(attacked(x))
        if len(outputs) > 1:
            logits = torch.stack(outputs).log_softmax(-1).logsumexp(0)
        else:
            logits = outputs[0]
        if self.positive_logits:
            logits = logits - logits.detach().amin(dim=1, keepdim=True) + 1
        return logits


def run_torchattacks(
    model: AttackedModel,
    x: Tensor,
    y: Tensor,
    *,
    class_name: str,
    arguments: dict[str, Any],
    norm: Norm = "linf",
    epsilon: float = 8 / 255,
    num_classes: int,
    seed: int = 0,
) -> AttackOutput:
    """Run an attack of the library and return detached images in [0,1]; modes, buffers, gradients, generators are as before.

    Args:
        model: the model and the draws that the protocol allows.
        x, y: images in [0,1] (B, C, H, W) and labels (B,).
        class_name: the library's class, e.g. `MIFGSM`. arguments: of its constructor.
        norm, epsilon: the ball, for attacks that have one. num_classes: K.
        seed: of everything random in the attack.

    Raises:
        UserError: the library is missing, or an argument, the norm or the number of classes does not fit.

    Deviation: for CW, logits are shifted so that the smallest is 1 (the library masks logits with 0, which must be below all of them: a
    smallest logit of 0 ties with the mask, and the order of the classes decides which of the two gets the gradient), pixels are kept
    1e-6 away from 0 and 1 (its change of variables cannot move them), and on draws that change it runs all its steps (it would stop as
    soon as one noisy cost of the whole batch is higher than an earlier one). SPSA runs 100 iterations unless stated.
    """
    facts = _facts(class_name)
    settings = _constructor_arguments(facts, arguments, norm, epsilon, num_classes, seed)
    is_cw = class_name == "CW"
    exposed = ExposedModel(model, positive_logits=is_cw)
    with restored_state(model.predictor.model):
        exposed.eval()
        # 31 bits: what NumPy accepts.
        random.seed(seed)
        np.random.seed(seed & 0x7FFFFFFF)  # noqa: NPY002 - the library draws from the global generators
        torch.manual_seed(seed)
        attack = getattr(_library(), class_name)(exposed, **settings)
        attack.set_device(x.device)
        if is_cw and not model.source.is_fixed:
            attack.steps = _AllSteps(attack.steps)
        with torch.enable_grad():
            start = x.clamp(_BOX_MARGIN, 1 - _BOX_MARGIN) if is_cw else x
            output = attack(start.clone(), y.clone())
    return mended(output.detach().to(x), x)


class _AllSteps(int):
    """A number of steps whose tenth part is itself: CW looks every tenth part of its steps whether to stop, and now never does."""

    def __floordiv__(self, other: int) -> int:
        del other
        return int(self)


def mended(output: Tensor, x: Tensor) -> AttackOutput:
    """Return what a library returned as images in [0,1]: the clean image in the place of one that is not finite.

    Raises:
        RuntimeError: another shape than the images had.
    """
    if output.shape != x.shape:
        raise RuntimeError(f"the attack returned images of shape {tuple(output.shape)} for {tuple(x.shape)}")
    dims = tuple(range(1, x.dim()))
    broken_B = ~output.isfinite().all(dim=dims) if x.dim() == 2 else ~output.isfinite().flatten(1).all(1)
    output = torch.where(broken_B.view(-1, *(1,) * (x.dim() - 1)), x, output)
    outside_B = ((output < 0) | (output > 1)).flatten(1).any(1)
    return AttackOutput(output.clamp(0, 1), int(broken_B.sum()), int(outside_B.sum()))


def _facts(class_name: str) -> _LibraryAttack:
    for facts in _LIBRARY:
        if facts.class_name == class_name:
            return facts
    names = [facts.class_name for facts in _LIBRARY]
    close = nearest(class_name, names)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise UserError(f"torchattacks has no attack {class_name!r} that the guard knows.{hint} Known: {', '.join(sorted(names))}.")


def _check_arguments(facts: _LibraryAttack, arguments: dict[str, Any], num_classes: int) -> None:
    if num_classes < facts.min_classes:
        raise UserError(f"torchattacks' {facts.class_name} needs at least {facts.min_classes} classes, the model has {num_classes}")
    if facts.class_name in ("APGD", "UPGD") and arguments.get("loss") == "dlr" and num_classes < 3:
        raise UserError(f"torchattacks' {facts.class_name} with loss `dlr` needs at least 3 classes, the model has {num_classes}")
    known = list(inspect.signature(getattr(_library(), facts.class_name).__init__).parameters)[2:]
    for name in arguments:
        if name not in known:
            close = nearest(name, known)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise UserError(f"torchattacks' {facts.class_name} has no argument {name!r}.{hint} It has: {', '.join(known)}.")


def _constructor_arguments(
    facts: _LibraryAttack, arguments: dict[str, Any], norm: Norm, epsilon: float, num_classes: int, seed: int
) -> dict[str, Any]:
    _check_arguments(facts, arguments, num_classes)
    if facts.radius is not None and norm not in facts.norms:
        raise UserError(f"torchattacks' {facts.class_name} is for {' and '.join(facts.norms)}, the threat model is {norm}")
    known = inspect.signature(getattr(_library(), facts.class_name).__init__).parameters
    settings = {**facts.defaults, **arguments}
    if facts.radius is not None:
        settings.setdefault(facts.radius, epsilon)
    if "norm" in known:
        settings.setdefault("norm", {"linf": "Linf", "l2": "L2"}[norm])
    if "n_classes" in known:
        settings.setdefault("n_classes", num_classes)
    if "seed" in known:
        settings.setdefault("seed", seed & 0x7FFFFFFF)
    return settings


def _entry(facts: _LibraryAttack) -> AttackEntry:
    def run(model: AttackedModel, problem: AttackProblem, parameters: TorchattacksParameters) -> AttackOutput:
        return run_torchattacks(
            model,
            problem.x,
            problem.y,
            class_name=facts.class_name,
            arguments=parameters.arguments,
            norm=problem.threat_model.norm,
            epsilon=problem.threat_model.epsilon,
            num_classes=problem.num_classes,
            seed=problem.seed,
        )

    def cost(parameters: TorchattacksParameters, num_draws: int, num_classes: int, fixed_draws: bool) -> Cost:
        del num_classes, fixed_draws
        arguments = {**facts.defaults, **parameters.arguments}
        passes = [_passes(facts.class_name, formula, arguments) for formula in (facts.forward, facts.backward)]
        return Cost(*(count * num_draws for count in passes))

    return AttackEntry(
        name=f"torchattacks_{facts.class_name.lower()}",
        description=f"torchattacks' {facts.class_name}, with that library's defaults unless stated"
        + (f"; {facts.remark}" if facts.remark else ""),
        parameters=TorchattacksParameters,
        norms=facts.norms,
        run=run,
        cost=cost,
        one_step=facts.one_step,
        bounded=facts.radius is not None,
        requires="torchattacks",
        uses_gradients=facts.backward != 0,
        min_classes=facts.min_classes,
        check_arguments=lambda parameters, num_classes: _check_arguments(facts, parameters.arguments, num_classes),
        free_parameters=True,
    )


def _passes(class_name: str, formula: str | float, arguments: dict[str, Any]) -> float:
    """Return the product that `formula` names, from the arguments or the constructor's defaults."""
    if not isinstance(formula, str):
        return formula
    defaults = inspect.signature(getattr(_library(), class_name).__init__).parameters
    total = 1.0
    for factor in formula.split("*"):
        total *= float(factor) if factor.isdigit() else float(arguments.get(factor, defaults[factor].default))
    return total


ATTACKS = tuple(_entry(facts) for facts in _LIBRARY)
