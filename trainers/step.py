"""The inner attack, the redraw policy, and what else an objective sees of the run: threat model, streams, precision, progress."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from models.configuration import Config
from models.modes import AttackMode, mode
from models.profiling import timed
from models.randomness import frozen, resample, resample_after_attack
from models.threat_model import PixelFraction, ThreatModel
from trainers.attacks import AttackLoss, cross_entropy, pgd
from trainers.attacks.balls import Shard
from trainers.attacks.single_step import SingleStep, early_stopped_pgd, n_fgsm, single_step
from trainers.distributed import world
from trainers.hardware import Precision
from trainers.streams import Streams
from trainers.warm_start import ShownImages, WarmStart

Redraw = Literal["attack_then_step", "each_attack_step", "each_batch", "each_epoch"]


class InnerAttackConfig(Config):
    """The attack inside training. With `n_fgsm` and by objectives that bring a step of their own, `steps` is 1; `step_size` then is that of
    validation's attack."""

    name: Literal["pgd", "n_fgsm"] = Field(
        "pgd",
        description="`pgd`: projected gradient descent; `n_fgsm`: one step of epsilon from noise beyond the ball (de Jorge et al. 2022).",
    )
    noise_radius: float = Field(2.0, ge=0, le=100, description="n_fgsm: radius of the noise in epsilons (paper: 2).")
    stop_after: int | None = Field(
        None,
        ge=0,
        le=1000,
        description="pgd: an image stays where it is once it was misclassified at more than so many steps (tau of friendly adversarial "
        "training, Zhang et al. 2020); none: it takes all steps.",
    )
    warm_start: int | None = Field(
        None,
        ge=1,
        le=100_000,
        description="pgd: begin where the epoch before left the image, and forget everything every so many epochs (ATTA, Zheng et al. "
        "2020: 10); none: each attack begins anew.",
    )
    steps: int = Field(10, ge=0, le=1000, description="Number of gradient steps K; 0 trains on clean images.")
    step_size: PixelFraction = Field(2 / 255, gt=0, description="Step size in pixels of [0,1], e.g. 2/255.")
    random_start: bool = Field(True, description="Start uniformly in the ball instead of at the image.")
    mode: AttackMode = Field(
        "train_without_update",
        description="Mode of the model during the attack: `train` (what the official codes of CTRW, RNA and DCS do; moves running "
        "statistics at each attack step), `eval`, `train_without_update`.",
    )

    @model_validator(mode="before")
    @classmethod
    def _has_one_step(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and value.get("name") == "n_fgsm" and "steps" not in value:
            return {**value, "steps": 1}
        return value

    @model_validator(mode="after")
    def _is_one_attack(self) -> InnerAttackConfig:
        if self.name == "n_fgsm" and self.steps > 1:
            raise ValueError(f"n_fgsm takes one step, not steps {self.steps}")
        if self.name == "n_fgsm" and self.stop_after is not None:
            raise ValueError("stop_after is for pgd: n_fgsm takes one step")
        if self.warm_start is not None and (self.name != "pgd" or self.stop_after is not None):
            raise ValueError("warm_start is for pgd without stop_after")
        return self


@dataclass
class StepContext:
    """One per run; `epoch` and `step` move on.

    Attributes:
        epoch: 0-based epoch. step: 0-based step since the beginning of the run. num_epochs, steps_per_epoch: of the run.
        redraw: when a randomized model redraws.
        part: which part of how many of this worker's rows is being computed, where gradients are accumulated.
        replay: how often this batch was trained on before, for objectives that do so several times.
        warm_start: perturbations of the epoch before. shown: which images this batch shows, for them.
    """

    threat_model: ThreatModel
    attack: InnerAttackConfig
    redraw: Redraw
    streams: Streams
    precision: Precision
    num_epochs: int
    steps_per_epoch: int
    epoch: int = 0
    step: int = 0
    part: tuple[int, int] = (0, 1)
    replay: int = 0
    warm_start: WarmStart | None = None
    shown: ShownImages | None = None

    @property
    def shard(self) -> Shard:
        """Which part of how many equal ones of the step's batch is being computed: by this worker, and of its rows now."""
        (rank, size), (part, parts) = world(), self.part
        return rank * parts + part, size * parts

    def adversarial_examples(
        self,
        model: nn.Module,
        x_BCHW: Tensor,
        y_B: Tensor,
        *,
        loss: AttackLoss = cross_entropy,
        gaussian_start: float | None = None,
        kind: SingleStep | None = None,
    ) -> Tensor:
        """Take the attack's draw, attack, take the training step's draw; return the detached adversarial examples.

        Args:
            model: the bare module (never a distributed wrapper: its hooks would communicate at each attack step).
            loss: what the attack maximizes, `(logits_BK, y_B) -> loss_B`.
            gaussian_start: start at x plus Gaussian noise of this standard deviation (TRADES: 0.001) instead of the configured start.
            kind: the single step that the objective takes instead of the configured attack.

        The mode of the model is the configured attack mode inside, and as before afterwards.
        """
        self.redraw_for_attack(model)
        if kind is None and self.attack.name == "n_fgsm" and self.attack.steps:
            kind = n_fgsm(self.threat_model.epsilon, self.attack.noise_radius)
        if (kind is None and self.attack.steps == 0) or self.threat_model.epsilon == 0:
            adversarial_BCHW = x_BCHW
        else:
            with mode(model, self.attack.mode):
                adversarial_BCHW = self._attack(model, x_BCHW, y_B, loss, gaussian_start, kind)
        if self.redraw in ("attack_then_step", "each_attack_step"):
            resample_after_attack(model)
        return adversarial_BCHW

    def redraw_for_attack(self, model: nn.Module) -> None:
        """Take the draw that a step begins with, where the policy has one here."""
        if self.redraw not in ("each_epoch",) or (self.step % self.steps_per_epoch == 0 and self.replay == 0):
            resample(model)

    @timed("attack")
    def _attack(
        self, model: nn.Module, x_BCHW: Tensor, y_B: Tensor, loss: AttackLoss, gaussian_start: float | None, kind: SingleStep | None
    ) -> Tensor:
        common: dict[str, Any] = {
            "epsilon": self.threat_model.epsilon,
            "norm": self.threat_model.norm,
            "generator": self.streams.attack,
            "loss": loss,
            "shard": self.shard,
            "precision": self.precision,
        }
        if kind is not None:
            with frozen(model):
                return single_step(model, x_BCHW, y_B, kind, **common)
        steps, size, random = self.attack.steps, self.attack.step_size, self.attack.random_start
        each_step = self.redraw == "each_attack_step"
        if self.attack.stop_after is not None:
            start_BCHW = self._start(model, x_BCHW, y_B, gaussian_start, common)
            with self._held(model):
                return early_stopped_pgd(
                    model,
                    x_BCHW,
                    y_B,
                    start_BCHW,
                    epsilon=self.threat_model.epsilon,
                    step_size=size,
                    steps=steps,
                    stop_after=self.attack.stop_after,
                    norm=self.threat_model.norm,
                    resample_each_step=each_step,
                    loss=loss,
                    precision=self.precision,
                )
        if self.warm_start is not None and self.shown is not None:
            return self._attack_from_before(model, x_BCHW, y_B, gaussian_start, common)

        def attack(redraw: bool) -> Tensor:
            return pgd(
                model,
                x_BCHW,
                y_B,
                step_size=size,
                steps=steps,
                random_start=random,
                gaussian_start=gaussian_start,
                resample_each_step=redraw,
                **common,
            )

        if self.redraw == "each_attack_step":
            return attack(redraw=True)
        with frozen(model):
            return attack(redraw=False)

    def _held(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Hold the draw during the attack, unless the policy redraws at each of its steps."""
        return contextlib.nullcontext() if self.redraw == "each_attack_step" else frozen(model)

    def _start(self, model: nn.Module, x_BCHW: Tensor, y_B: Tensor, gaussian_start: float | None, common: dict[str, Any]) -> Tensor:
        """Return where the configured attack begins."""
        return pgd(model, x_BCHW, y_B, steps=0, random_start=self.attack.random_start, gaussian_start=gaussian_start, **common)

    def _attack_from_before(
        self, model: nn.Module, x_BCHW: Tensor, y_B: Tensor, gaussian_start: float | None, common: dict[str, Any]
    ) -> Tensor:
        """Go on from the perturbations of the epoch before, and leave the new ones to the next."""
        assert self.warm_start is not None and self.shown is not None
        shown = self.shown.part(*self.part)
        # Drawn in any case, so that the streams do not depend on which images were seen before.
        fresh_BCHW = self._start(model, x_BCHW, y_B, gaussian_start, common)
        start_BCHW = self.warm_start.starts(shown, x_BCHW, fresh_BCHW)
        each_step = self.redraw == "each_attack_step"
        with self._held(model):
            adversarial_BCHW = pgd(
                model,
                x_BCHW,
                y_B,
                step_size=self.attack.step_size,
                steps=self.attack.steps,
                start=start_BCHW,
                resample_each_step=each_step,
                **common,
            )
        self.warm_start.keep(shown, adversarial_BCHW - x_BCHW)
        return adversarial_BCHW
