"""How far attacks on one member of an ensemble carry to the others, and what that means for random sampling inference (RSI).

Shapes: B batch, N members, P candidate perturbations. Index i is the member attacked, j the member that answers.

References: Yang et al., "DVERGE", section 4 (transfer matrix and its protocol); RED, section 3.1 (an attacked and an answering member
that are drawn independently).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.ensemble import Ensemble, ensemble_in
from models.errors import UserError
from models.modes import mode
from models.randomness import derive_seed
from models.threat_model import Norm
from trainers.attacks import pgd
from trainers.attacks.projected_gradient import Model
from trainers.ensembles.distilled_features import distilled_examples, feature_layers
from trainers.ensembles.examples import mean_member_loss


@dataclasses.dataclass(frozen=True)
class MemberAttack:
    """Projected gradient descent against one member. The defaults are DVERGE's transfer protocol.

    Attributes:
        epsilon: radius in pixels of [0,1]. num_steps: gradient steps. step_size: of one step; None: a fifth of the radius.
        num_restarts: random starts; a member counts as right only if it is right on the result of each.
        norm: of the ball. seed: of the random starts.
    """

    epsilon: float = 0.03
    num_steps: int = 50
    step_size: float | None = None
    num_restarts: int = 5
    norm: Norm = "linf"
    seed: int = 0

    def examples(self, network: Model, x_BCHW: Tensor, y_B: Tensor, restart: int, **options: Any) -> Tensor:
        """Return adversarial images of one restart, (B, C, H, W)."""
        return pgd(
            network,
            x_BCHW,
            y_B,
            epsilon=self.epsilon,
            step_size=self.epsilon / 5 if self.step_size is None else self.step_size,
            steps=self.num_steps,
            norm=self.norm,
            generator=torch.Generator().manual_seed(derive_seed(self.seed, "restart", restart)),
            **options,
        )


@dataclasses.dataclass(frozen=True)
class AccuracyMatrix:
    """Which members are right on examples made against which.

    Attributes:
        correct_NNB: [i, j, b]: member j is right on example b made against member i (all restarts), bool.
        ensemble_correct_NB: [i, b]: the mean probability of all members is right there, bool.
    """

    correct_NNB: Tensor
    ensemble_correct_NB: Tensor

    @property
    def accuracy(self) -> Tensor:
        """A_ij, the accuracy of member j on examples made against member i, in [0,1]."""
        return self.correct_NNB.double().mean(dim=-1)

    @property
    def rsi_accuracy(self) -> float:
        """Expected accuracy of RSI if attacker and defender draw their members independently: the mean of all A_ij."""
        return self.accuracy.mean().item()

    @property
    def same_member_accuracy(self) -> float:
        """Mean of the diagonal: the attacker guessed the member."""
        return self.accuracy.diagonal().mean().item()

    @property
    def other_member_accuracy(self) -> float:
        """Mean off the diagonal: the attacker guessed wrong. NaN for one member.

        `rsi_accuracy` is 1/N of `same_member_accuracy` plus (N - 1)/N of this.
        """
        count = len(self.accuracy)
        if count == 1:
            return float("nan")
        return ((self.accuracy.sum() - self.accuracy.diagonal().sum()) / (count * (count - 1))).item()


@dataclasses.dataclass(frozen=True)
class TransferMatrix:
    """How often examples made against a member fool the others.

    Attributes:
        success_NN: [i, j]: share of examples made against member i that fool member j, in [0,1].
        ensemble_success_N: share of them that fool the mean probability of all members.
        num_examples: images that every member classifies rightly; only they count.
    """

    success_NN: Tensor
    ensemble_success_N: Tensor
    num_examples: int


def accuracy_matrix(
    model: nn.Module, x_BCHW: Tensor, y_B: Tensor, attack: MemberAttack | None = None, batch_size: int = 128
) -> AccuracyMatrix:
    """Return which members are right on examples made against each. Eval mode; draws inside members stay as they are."""
    attack = attack or MemberAttack()
    ensemble = ensemble_in(model)
    with mode(model, "eval"):
        parts = [_cross_correct(ensemble, x, y, attack) for x, y in zip(x_BCHW.split(batch_size), y_B.split(batch_size), strict=True)]
    return AccuracyMatrix(torch.cat([members for members, _ in parts], dim=-1), torch.cat([whole for _, whole in parts], dim=-1))


def transfer_matrix(
    model: nn.Module, x_BCHW: Tensor, y_B: Tensor, attack: MemberAttack | None = None, batch_size: int = 128
) -> TransferMatrix:
    """Return attack success rates between members, over the images that all of them classify rightly.

    Raises:
        UserError: there is no such image.
    """
    ensemble = ensemble_in(model)
    with mode(model, "eval"), torch.no_grad():
        right_B = torch.cat(
            [
                (ensemble.member_logits(x).argmax(-1) == y).all(dim=0)
                for x, y in zip(x_BCHW.split(batch_size), y_B.split(batch_size), strict=True)
            ]
        )
    if not right_B.any():
        raise UserError("no image is classified rightly by all members: a transfer matrix needs some")
    matrix = accuracy_matrix(model, x_BCHW[right_B], y_B[right_B], attack, batch_size)
    return TransferMatrix(1 - matrix.accuracy, 1 - matrix.ensemble_correct_NB.double().mean(dim=-1), int(right_B.sum()))


def _cross_correct(ensemble: Ensemble, x_BCHW: Tensor, y_B: Tensor, attack: MemberAttack) -> tuple[Tensor, Tensor]:
    members: list[Tensor] = []
    whole: list[Tensor] = []
    for attacked in ensemble.members:
        member_correct_NB = torch.ones(ensemble.num_members, len(y_B), dtype=torch.bool, device=y_B.device)
        ensemble_correct_B = torch.ones(len(y_B), dtype=torch.bool, device=y_B.device)
        for restart in range(attack.num_restarts):
            adversarial_BCHW = attack.examples(attacked, x_BCHW, y_B, restart)
            with torch.no_grad():
                logits_NBK = ensemble.member_logits(adversarial_BCHW)
            member_correct_NB &= logits_NBK.argmax(-1) == y_B
            ensemble_correct_B &= logits_NBK.softmax(-1).mean(0).argmax(-1) == y_B
        members.append(member_correct_NB)
        whole.append(ensemble_correct_B)
    return torch.stack(members), torch.stack(whole)


@dataclasses.dataclass(frozen=True)
class RsiBounds:
    """What a random choice of the answering member can gain at best, over a set of candidate perturbations; all in [0,1].

    lower <= attacked <= upper holds for every table of answers. RSI is never below the average member under its own worst perturbation
    (`lower`), and no better than it when one perturbation fools all members: what RED can gain lies between.

    Attributes:
        lower: mean over members of the accuracy under the perturbation that is worst for that member.
        attacked: expected accuracy under the perturbation that is worst for the expectation over members: RSI against an exact adversary.
        upper: expected accuracy under the best single candidate strategy, e.g. always attacking member i.
    """

    lower: float
    attacked: float
    upper: float


def rsi_bounds(correct_PNB: Tensor) -> RsiBounds:
    """Return the bounds over P candidate perturbations per image.

    Args:
        correct_PNB: [p, i, b]: member i is right on image b under candidate p, bool.
    """
    correct = correct_PNB.double()
    expected_PB = correct.mean(dim=1)
    return RsiBounds(
        lower=correct.amin(dim=0).mean().item(),
        attacked=expected_PB.amin(dim=0).mean().item(),
        upper=expected_PB.mean(dim=-1).amin().item(),
    )


def candidate_answers(model: nn.Module, x_BCHW: Tensor, y_B: Tensor, attack: MemberAttack | None = None, batch_size: int = 128) -> Tensor:
    """Return the table for `rsi_bounds`: the clean images, attacks on each member, and attacks on the mean loss of all members.

    The latter climb the exact expectation of the loss over the draw.

    Returns:
        correct_PNB, bool, with P = 1 + (N + 1) * restarts.
    """
    attack = attack or MemberAttack()
    members = ensemble_in(model).members
    parts = []
    with mode(model, "eval"):
        for x, y in zip(x_BCHW.split(batch_size), y_B.split(batch_size), strict=True):
            candidates = [x]
            for restart in range(attack.num_restarts):
                candidates += [attack.examples(member, x, y, restart) for member in members]
                candidates.append(attack_on_expectation(members, x, y, attack, restart))
            with torch.no_grad():
                answers = [ensemble_in(model).member_logits(candidate).argmax(-1) == y for candidate in candidates]
            parts.append(torch.stack(answers))
    return torch.cat(parts, dim=-1)


def attack_on_expectation(members: Iterable[nn.Module], x_BCHW: Tensor, y_B: Tensor, attack: MemberAttack, restart: int = 0) -> Tensor:
    """Return adversarial images that climb the mean of the members' cross-entropies, the exact expectation under RSI."""

    def loss_of(images_BCHW: Tensor) -> Tensor:
        return mean_member_loss(members, images_BCHW, y_B).unsqueeze(1)

    return attack.examples(loss_of, x_BCHW, y_B, restart, loss=lambda loss_B1, _: loss_B1.squeeze(1))


def feature_diversity(
    model: nn.Module,
    x_BCHW: Tensor,
    y_B: Tensor,
    *,
    epsilon: float = 0.07,
    layers: Sequence[str] | None = None,
    seed: int = 0,
) -> float:
    """Return DVERGE's diversity: mean over pairs i != j and layers of member j's cross-entropy on examples distilled from member i.

    Args:
        epsilon: radius of the distillation. layers: of `feature_layers`; None: all.
        seed: of the order in which images serve as targets.

    Raises:
        UserError: there is only one member.
    """
    members = ensemble_in(model).members
    if len(members) < 2:
        raise UserError("the diversity of features compares members: there must be at least two")
    order_B = torch.randperm(len(x_BCHW), generator=torch.Generator().manual_seed(derive_seed(seed, "targets")))
    losses = []
    with mode(model, "eval"):
        for layer in feature_layers(members[0]) if layers is None else layers:
            for attacked in members:
                distilled_BCHW = distilled_examples(attacked, x_BCHW, x_BCHW[order_B.to(x_BCHW.device)], layer, epsilon=epsilon)
                with torch.no_grad():
                    losses += [
                        nn.functional.cross_entropy(member(distilled_BCHW), y_B).double() for member in members if member is not attacked
                    ]
    return torch.stack(losses).mean().item()
