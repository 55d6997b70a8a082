"""The inner attack, the redraw policy, and what else an objective sees of the run: threat model, streams, precision, progress."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from models.configuration import Config
from models.modes import AttackMode, mode
from models.randomness import frozen, resample, resample_after_attack
from models.threat_model import PixelFraction, ThreatModel
from trainers.attacks import AttackLoss, cross_entropy, pgd
from trainers.distributed import world
from trainers.hardware import Precision
from trainers.streams import Streams

Redraw = Literal["attack_then_step", "each_attack_step", "each_batch", "each_epoch"]


class InnerAttackConfig(Config):
    """The attack inside training (projected gradient descent)."""

    steps: int = Field(10, ge=0, le=1000, description="Number of gradient steps K; 0 trains on clean images.")
    step_size: PixelFraction = Field(2 / 255, gt=0, description="Step size in pixels of [0,1], e.g. 2/255.")
    random_start: bool = Field(True, description="Start uniformly in the ball instead of at the image.")
    mode: AttackMode = Field(
        "train_without_update",
        description="Mode of the model during the attack: `train` (what the official codes of CTRW, RNA and DCS do; moves running "
        "statistics at each attack step), `eval`, `train_without_update`.",
    )


@dataclass
class StepContext:
    """One per run; `epoch` and `step` move on.

    Attributes:
        epoch: 0-based epoch. step: 0-based step since the beginning of the run. num_epochs, steps_per_epoch: of the run.
        redraw: when a randomized model redraws.
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

    def adversarial_examples(
        self,
        model: nn.Module,
        x_BCHW: Tensor,
        y_B: Tensor,
        *,
        loss: AttackLoss = cross_entropy,
        gaussian_start: float | None = None,
    ) -> Tensor:
        """Take the attack's draw, attack, take the training step's draw; return the detached adversarial examples.

        Args:
            model: the bare module (never a distributed wrapper: its hooks would communicate at each attack step).
            loss: what the attack maximizes, `(logits_BK, y_B) -> loss_B`.
            gaussian_start: start at x plus Gaussian noise of this standard deviation (TRADES: 0.001) instead of the configured start.

        The mode of the model is the configured attack mode inside, and as before afterwards.
        """
        if self.redraw not in ("each_epoch",) or self.step % self.steps_per_epoch == 0:
            resample(model)
        if self.attack.steps == 0 or self.threat_model.epsilon == 0:
            adversarial_BCHW = x_BCHW
        else:
            with mode(model, self.attack.mode):
                adversarial_BCHW = self._attack(model, x_BCHW, y_B, loss, gaussian_start)
        if self.redraw in ("attack_then_step", "each_attack_step"):
            resample_after_attack(model)
        return adversarial_BCHW

    def _attack(self, model: nn.Module, x_BCHW: Tensor, y_B: Tensor, loss: AttackLoss, gaussian_start: float | None) -> Tensor:
        def attack(redraw: bool) -> Tensor:
            return pgd(
                model,
                x_BCHW,
                y_B,
                epsilon=self.threat_model.epsilon,
                step_size=self.attack.step_size,
                steps=self.attack.steps,
                norm=self.threat_model.norm,
                random_start=self.attack.random_start,
                gaussian_start=gaussian_start,
                generator=self.streams.attack,
                loss=loss,
                resample_each_step=redraw,
                shard=world(),
                precision=self.precision,
            )

        if self.redraw == "each_attack_step":
            return attack(redraw=True)
        with frozen(model):
            return attack(redraw=False)
