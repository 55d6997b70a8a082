"""Quantities of ensembles: attacks carried from member to member, and what a random choice of the member makes of them.

References: RED, "Efficiently Boosting Ensemble Robustness via Random Sampling Inference"; Yang et al., "DVERGE", NeurIPS 2020; Yang et al.,
"TRS", NeurIPS 2021.
"""

from __future__ import annotations

from torch import nn

from analysis.quantities.quantity import (
    ATTACK_STEPS,
    MOST_IMAGES,
    Finding,
    NotComputable,
    Quantity,
    Requirement,
    Subject,
    has_layer,
    rounded,
)
from analysis.theory.ensemble_gradients import gradient_similarity, lipschitz_estimates, member_landscapes
from analysis.theory.ensembles import (
    MemberAttack,
    accuracy_matrix,
    candidate_answers,
    feature_diversity,
    rsi_bounds,
    transfer_matrix,
)
from models.ensemble import Ensemble, ensemble_in
from models.errors import UserError

RED = "RED, section 3"
BATCH = 128


def _has_several_members(model: nn.Module) -> bool:
    return any(isinstance(module, Ensemble) and module.num_members > 1 for module in model.modules())


ENSEMBLE = Requirement("an ensemble (red, ps_red, gal, adp, dverge, trs)", has_layer(Ensemble))
SEVERAL_MEMBERS = Requirement("an ensemble of at least two members (red, ps_red, gal, adp, dverge, trs)", _has_several_members)


def member_attack(subject: Subject) -> MemberAttack:
    """Return the attack on single members within the subject's threat model."""
    epsilon = subject.threat_model.epsilon
    return MemberAttack(
        epsilon=epsilon, num_steps=ATTACK_STEPS, step_size=epsilon / 4, num_restarts=1, norm=subject.threat_model.norm, seed=subject.seed
    )


def _accuracy_matrix(subject: Subject) -> Finding:
    x_BCHW, y_B = subject.images(256)
    count = ensemble_in(subject.model).num_members
    subject.progress(f"attacks on each of {count} members, {len(x_BCHW)} images")
    with subject.one_draw():
        found = accuracy_matrix(subject.model, x_BCHW, y_B, member_attack(subject), BATCH)
    whole_N = found.ensemble_correct_NB.double().mean(dim=-1)
    rows = [
        {"attacked": i} | {f"member {j}": found.accuracy[i, j].item() for j in range(count)} | {"mean probability": whole_N[i].item()}
        for i in range(count)
    ]
    same, other, whole = found.same_member_accuracy, found.other_member_accuracy, found.rsi_accuracy
    notes = (
        f"{subject.attack_name} on the member of the row, accuracy of the member of the column, {len(x_BCHW)} images.",
        f"RSI, attacker and defender choosing independently: {100 * whole:.1f} % = 1/{count} x {100 * same:.1f} % (same member) + "
        f"{count - 1}/{count} x {100 * other:.1f} % (another one).",
    )
    return Finding(rows, notes, {"rsi_accuracy": whole, "same_member_accuracy": same, "other_member_accuracy": other})


def _transfer_matrix(subject: Subject) -> Finding:
    x_BCHW, y_B = subject.images(MOST_IMAGES)
    attack = MemberAttack(seed=subject.seed)
    count = ensemble_in(subject.model).num_members
    subject.progress(f"PGD-{attack.num_steps} with {attack.num_restarts} restarts on each of {count} members, {len(x_BCHW)} images")
    try:
        with subject.one_draw():
            found = transfer_matrix(subject.model, x_BCHW, y_B, attack, BATCH)
    except UserError as error:
        raise NotComputable(str(error)) from error
    rows = [
        {"attacked": i}
        | {f"fools {j}": found.success_NN[i, j].item() for j in range(count)}
        | {"fools mean probability": found.ensemble_success_N[i].item()}
        for i in range(count)
    ]
    success = found.success_NN
    other = ((success.sum() - success.diagonal().sum()) / (count * (count - 1))).item()
    notes = (
        f"DVERGE's protocol: PGD-{attack.num_steps}, linf {attack.epsilon:g}, success if one of {attack.num_restarts} restarts fools; "
        f"{found.num_examples} of {len(x_BCHW)} images, those that every member classifies rightly. Between different members: "
        f"{100 * other:.1f} %.",
    )
    return Finding(rows, notes, {"transfer_rate": other, "num_examples": found.num_examples})


def _member_cosines(subject: Subject) -> Finding:
    x_BCHW, y_B = subject.images(128)
    with subject.one_draw():
        found = gradient_similarity(subject.model, x_BCHW, y_B, BATCH)
    count = len(found.signed_NN)
    rows = [
        {"first": i, "second": j, "mean |cosine|": found.absolute_NN[i, j].item(), "mean cosine": found.signed_NN[i, j].item()}
        for i in range(count)
        for j in range(i + 1, count)
    ]
    signed = sum(row["mean cosine"] for row in rows) / len(rows)
    notes = (f"{len(x_BCHW)} images. Mean over pairs: |cosine| {found.mean_absolute:.4g}, cosine {signed:.4g}.",)
    return Finding(rows, notes, {"mean_absolute_cosine": found.mean_absolute, "mean_cosine": signed})


def _lipschitz(subject: Subject) -> Finding:
    x_BCHW, y_B = subject.images(64)
    threat_model = subject.threat_model
    with subject.one_draw():
        found = lipschitz_estimates(
            subject.model,
            x_BCHW,
            y_B,
            epsilon=threat_model.epsilon,
            norm=threat_model.norm,
            seed=subject.seed,
            batch_size=BATCH,
        )
    rows = [
        {
            "member": member,
            "risk": found.risk[member].item(),
            "gradient l2, mean": found.mean_gradient_l2[member].item(),
            "largest": found.max_gradient_l2[member].item(),
            "gradient l1, mean": found.mean_gradient_l1[member].item(),
            "local Lipschitz, mean": found.mean_local_lipschitz[member].item(),
            "largest Lipschitz": found.local_lipschitz[member].item(),
            "smoothness, mean": found.mean_smoothness[member].item(),
            "largest smoothness": found.smoothness[member].item(),
        }
        for member in range(len(found.risk))
    ]
    notes = (f"Lower bounds of the constants, from 10 points of an attack path within {threat_model} around each of {len(x_BCHW)} images.",)
    metrics = {
        "mean_gradient_l2": found.mean_gradient_l2.mean().item(),
        "local_lipschitz": found.local_lipschitz.max().item(),
        "smoothness": found.smoothness.max().item(),
    }
    return Finding(rows, notes, metrics)


def _member_landscapes(subject: Subject, half_width: float = 16 / 255, num_points: int = 41, num_images: int = 64) -> Finding:
    x_BCHW, y_B = subject.images(num_images)
    with subject.one_draw():
        found = member_landscapes(subject.model, x_BCHW, y_B, half_width=half_width, num_points=num_points, seed=subject.seed)
    middle = num_points // 2
    rows = [
        {"member": member, "loss": loss_GG[middle, middle].item(), "largest loss": loss_GG.max().item()}
        for member, loss_GG in enumerate(found.loss_NGG)
    ]
    notes = (
        f"x + a sign(gradient of the members' mean loss) + b r, a and b within {half_width:.4g} of 0, r random signs, "
        f"{num_points} x {num_points} points, {len(x_BCHW)} images. Figure red.fig2 draws the surfaces.",
    )
    offsets = rounded(found.offsets_G)
    series = {
        "x": offsets,
        "y": offsets,
        "grids": [rounded(loss_GG.T) for loss_GG in found.loss_NGG],
        "labels": [f"member {index + 1}" for index in range(len(rows))],
    }
    rise = sum(row["largest loss"] - row["loss"] for row in rows) / len(rows)
    return Finding(rows, notes, {"mean_rise": rise}, series, f"{len(x_BCHW)} images", len(x_BCHW))


def _rsi_bounds(subject: Subject) -> Finding:
    x_BCHW, y_B = subject.images(256)
    subject.progress("attacks on each member and on their mean loss")
    with subject.one_draw():
        table_PNB = candidate_answers(subject.model, x_BCHW, y_B, member_attack(subject), BATCH)
    found = rsi_bounds(table_PNB)
    row = {"lower": found.lower, "RSI, attacked": found.attacked, "upper": found.upper, "candidates": len(table_PNB), "images": len(x_BCHW)}
    notes = (f"Candidates are the clean image, {subject.attack_name} on each member, and on the mean of their losses.",)
    return Finding([row], notes, {"lower": found.lower, "attacked": found.attacked, "upper": found.upper})


def _feature_diversity(subject: Subject) -> Finding:
    x_BCHW, y_B = subject.images(64)
    subject.progress("distilling features of every layer of every member")
    with subject.one_draw():
        value = feature_diversity(subject.model, x_BCHW, y_B, seed=subject.seed)
    notes = ("Cross-entropy in nats, mean over layers and ordered pairs of members, radius 0.07.",)
    return Finding([{"diversity": value, "images": len(x_BCHW)}], notes, {"diversity": value})


QUANTITIES = (
    Quantity(
        "accuracy_matrix",
        "Accuracy of each member under attack on each",
        "the mean of the whole matrix is what RSI answers rightly if the attacker does not know the member",
        f"{RED}.1",
        SEVERAL_MEMBERS,
        _accuracy_matrix,
        cheap=False,
    ),
    Quantity(
        "transfer_matrix",
        "Share of attacks that carry from member to member",
        "small between different members: they fail on different images",
        "Yang et al., DVERGE, section 4",
        SEVERAL_MEMBERS,
        _transfer_matrix,
        cheap=False,
    ),
    Quantity(
        "member_cosines",
        "Cosine between the members' input gradients",
        "what RED and TRS make small",
        f"{RED}.2; Yang et al., TRS, Theorem 1",
        SEVERAL_MEMBERS,
        _member_cosines,
    ),
    Quantity(
        "lipschitz",
        "Slope and curvature of each member's loss",
        "small values with a small cosine bound how far attacks carry",
        f"{RED}.2; Yang et al., TRS, Theorem 1",
        ENSEMBLE,
        _lipschitz,
    ),
    Quantity(
        "member_landscapes",
        "Losses of the members around the images, on common axes",
        "surfaces that rise in different directions: an attack on one member is none on another",
        f"{RED}, Fig. 1, 2",
        ENSEMBLE,
        _member_landscapes,
        cheap=False,
    ),
    Quantity(
        "rsi_bounds",
        "What a random choice of the member can gain at best",
        "RSI against an adversary who picks the best of the candidates lies between the lower and the upper value",
        f"{RED}.1",
        ENSEMBLE,
        _rsi_bounds,
        cheap=False,
    ),
    Quantity(
        "feature_diversity",
        "Loss of a member on images that hold another member's features",
        "large: members rely on different features",
        "Yang et al., DVERGE, Eq. 2",
        SEVERAL_MEMBERS,
        _feature_diversity,
        cheap=False,
    ),
)
