"""Landscapes of any network: its loss along directions in weight space and in the image, and how far its Taylor expansion carries."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from analysis.quantities.quantity import ANY_MODEL, Finding, NotComputable, Quantity, Requirement, Subject, has_layer, rounded
from analysis.theory.flatness import expansion_errors, weight_landscape
from analysis.theory.landscape import InputLandscape, input_landscape
from models.ensemble import Ensemble
from models.errors import UserError
from trainers.weight_noise import sample_weight_noise

SINGLE_NETWORK = Requirement("a single network, not an ensemble", lambda model: not has_layer(Ensemble)(model))
RADIUS, POSITIONS, DIRECTIONS = 1.0, 11, 5
NUM_LANDSCAPES, MOST_LANDSCAPES = 4, 16
SCALES = (("absolute", 1e-4), ("absolute", 1e-3), ("absolute", 1e-2), ("relative", 0.01), ("relative", 0.05))


def _weight_landscape(subject: Subject) -> Finding:
    rows: list[dict[str, Any]] = []
    rises: dict[str, float] = {}
    size = 0
    with subject.one_draw():
        x_BCHW, y_B = subject.images(128)
        size = len(x_BCHW)
        for images, x in (("clean", x_BCHW), ("adversarial", subject.attack()(subject.model, x_BCHW, y_B))):
            subject.progress(f"weight landscape on {images} images")
            positions_A, losses_RA = weight_landscape(
                subject.model,
                x,
                y_B,
                radius=RADIUS,
                num_positions=POSITIONS,
                num_directions=subject.draws(DIRECTIONS),
                generator=subject.generator("weight landscape"),  # the same directions for both
            )
            losses_RA = losses_RA.double()
            rows += [
                {
                    "images": images,
                    "position": round(position, 6),
                    "mean loss": column_R.mean().item(),
                    "lowest": column_R.min().item(),
                    "highest": column_R.max().item(),
                }
                for position, column_R in zip(positions_A.tolist(), losses_RA.T, strict=True)
            ]
            middle = POSITIONS // 2
            rises[images] = (losses_RA[:, [middle - 1, middle + 1]].mean() - losses_RA[:, middle].mean()).item()
    notes = (
        f"One draw, {size} images, cross-entropy in nats, {subject.draws(DIRECTIONS)} directions; adversarial images by "
        f"{subject.attack_name}, made at position 0.",
        "At position 1 each filter has moved by its own length. Biases and normalizations do not move; running statistics stay those of "
        "position 0.",
    )
    return Finding(rows, notes, {f"rise_{images}": rise for images, rise in rises.items()})


def _input_landscape(subject: Subject, radius: float | None = None, num_positions: int = 25, num_images: int = NUM_LANDSCAPES) -> Finding:
    x_BCHW, y_B = (images[:MOST_LANDSCAPES] for images in subject.images(num_images))
    if radius is None:
        radius = subject.threat_model.epsilon if subject.threat_model.norm == "linf" else 8 / 255
    rows: list[dict[str, Any]] = []
    surfaces: list[InputLandscape] = []
    with subject.one_draw():
        for index, (image, label) in enumerate(zip(x_BCHW, y_B.tolist(), strict=True)):
            generator = subject.generator("input landscape", index)
            found = input_landscape(subject.model, image, label, radius=radius, num_positions=num_positions, generator=generator)
            surfaces.append(found)
            middle = len(found.gradient_positions_A) // 2
            rows.append(
                {
                    "image": index,
                    "class": label,
                    "loss": found.loss_AA[middle, middle].item(),
                    "largest loss": found.loss_AA.max().item(),
                    "rise": found.rise,
                    "rise along the gradient": (found.loss_AA[-1, middle] - found.loss_AA[middle, middle]).item(),
                    "rise along random signs": (found.loss_AA[middle, -1] - found.loss_AA[middle, middle]).item(),
                    "roughness": found.roughness,
                }
            )
    notes = (
        f"x + a sign(gradient) + b r, a and b within {radius:.4g} of 0, r random signs, "
        f"{num_positions} x {num_positions} points, cross-entropy in nats, one draw.",
        "Roughness is the mean absolute second difference over the squared grid distance: 0 for a plane.",
        f"At most {MOST_LANDSCAPES} images. Figure rat.fig2 draws the surfaces.",
    )
    means = {name: statistics.fmean(row[name] for row in rows) for name in ("rise", "roughness")}
    # `grid` has a row for each y, `loss_AA` for each gradient position.
    series = {
        "x": rounded(surfaces[0].gradient_positions_A),
        "y": rounded(surfaces[0].random_positions_A),
        "grid": rounded(torch.stack([surface.loss_AA for surface in surfaces]).mean(dim=0).T),
    }
    return Finding(rows, notes, means, series, f"mean over {len(surfaces)} images, one draw", len(surfaces))


def _expansion(subject: Subject) -> Finding:
    x_BCHW, _ = subject.images(64)
    rows: list[dict[str, Any]] = []
    with subject.one_draw():
        for scale, sigma in SCALES:
            u = sample_weight_noise(
                subject.model,
                subject.generator("expansion", scale, f"{sigma:g}"),
                sigma=sigma,
                sigma_mode=scale,  # type: ignore[arg-type]
            )
            try:
                found = expansion_errors(subject.model, x_BCHW, u)
            except UserError as error:
                raise NotComputable(str(error)) from error
            rows.append({"noise": scale, "sigma": sigma, "first order": found.first, "first and second": found.second})
    notes = (
        f"Relative error of d1, and of d1 + d2/2, as the change of the logits under one u on the convolutions; {len(x_BCHW)} images, eval "
        "mode, one draw.",
        "An error near 1 or above says that the network is not near its expansion at that sigma. Derivatives do not see the kinks of "
        "ReLU, so the second term need not help.",
    )
    metrics = {f"first_{row['noise']}_{row['sigma']:g}": row["first order"] for row in rows}
    return Finding(rows, notes, metrics)


QUANTITIES = (
    Quantity(
        "weight_landscape",
        "Loss along random filter-normalized directions in weight space",
        "a slow rise away from position 0: the minimum is flat",
        "Li et al., NeurIPS 2018, section 4; Wu et al., AWP, NeurIPS 2020, section 3",
        ANY_MODEL,
        _weight_landscape,
        cheap=False,
    ),
    Quantity(
        "input_landscape",
        "Loss around single images, along the gradient's sign and random signs",
        "a smooth surface of small rise: attacks gain little and gradients show the way; a rugged one may hide it from them",
        "Jin et al., RAT, CVPR 2023, Fig. 2",
        ANY_MODEL,
        _input_landscape,
        cheap=False,
    ),
    Quantity(
        "expansion",
        "How well Taylor terms predict what weight noise does to the logits",
        "an error far below 1: the network is near its expansion at that sigma, which is what rat_taylor's terms presume",
        "Jin et al., RAT, CVPR 2023, Eq. 6",
        SINGLE_NETWORK,
        _expansion,
        cheap=False,
    ),
)
