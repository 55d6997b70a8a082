"""Quantities of any network: how flat its loss is in weight space, how smooth in the image, and what it costs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from analysis.quantities.quantity import ANY_MODEL, Finding, Quantity, Subject
from analysis.theory.cost import count_parameters, measure_costs, saved_share
from analysis.theory.flatness import loss_under_weight_noise, sharpness, top_hessian_eigenvalue
from analysis.theory.smoothness import effective_smoothness
from models.ensemble import Ensemble

NOISES = (("absolute", 0.01), ("relative", 0.01), ("relative", 0.05))
RADII = (0.01, 0.05, 0.1)


def _clean_and_adversarial(subject: Subject, count: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield the clean images, then adversarial ones for the draw in place."""
    x_BCHW, y_B = subject.images(count)
    yield "clean", x_BCHW, y_B
    yield "adversarial", subject.attack()(subject.model, x_BCHW, y_B), y_B


def _setting(subject: Subject, num_images: int) -> str:
    return f"One draw, {num_images} images, cross-entropy in nats; adversarial images by {subject.attack_name}."


def _weight_noise(subject: Subject) -> Finding:
    rows: list[dict[str, Any]] = []
    size = 0
    with subject.one_draw():
        for images, x_BCHW, y_B in _clean_and_adversarial(subject, 128):
            size = len(x_BCHW)
            (at_rest,) = loss_under_weight_noise(
                subject.model, x_BCHW, y_B, sigma=0.0, num_samples=1, generator=subject.generator("no noise")
            ).tolist()
            for scale, sigma in NOISES:
                losses_R = loss_under_weight_noise(
                    subject.model,
                    x_BCHW,
                    y_B,
                    sigma=sigma,
                    sigma_mode=scale,  # type: ignore[arg-type]
                    num_samples=subject.draws(10),
                    generator=subject.generator("noise", scale, f"{sigma:g}"),
                ).double()
                rows.append(
                    {
                        "images": images,
                        "noise": scale,
                        "sigma": sigma,
                        "loss": at_rest,
                        "loss under noise": losses_R.mean().item(),
                        "rise": losses_R.mean().item() - at_rest,
                        "std over noise": losses_R.std(correction=0).item(),
                    }
                )
    metrics = {f"rise_{row['images']}": row["rise"] for row in rows if (row["noise"], row["sigma"]) == NOISES[1]}
    return Finding(rows, (_setting(subject, size), f"{subject.draws(10)} samples of the noise on all weights."), metrics)


def _sharpness(subject: Subject) -> Finding:
    rows: list[dict[str, Any]] = []
    size = 0
    with subject.one_draw():
        for images, x_BCHW, y_B in _clean_and_adversarial(subject, 128):
            size = len(x_BCHW)
            rows += [
                {"images": images, "radius rho": rho, "rise of the loss": sharpness(subject.model, x_BCHW, y_B, rho=rho)} for rho in RADII
            ]
    metrics = {f"rise_{row['images']}": row["rise of the loss"] for row in rows if row["radius rho"] == RADII[1]}
    return Finding(rows, (_setting(subject, size),), metrics)


def _hessian(subject: Subject) -> Finding:
    rows: list[dict[str, Any]] = []
    size = 0
    with subject.one_draw():
        for images, x_BCHW, y_B in _clean_and_adversarial(subject, 64):
            size = len(x_BCHW)
            subject.progress(f"power iteration on {images} images")
            found = top_hessian_eigenvalue(subject.model, x_BCHW, y_B, generator=subject.generator("hessian"))
            rows.append(
                {
                    "images": images,
                    "top eigenvalue": found.value,
                    "residual": found.residual,
                    "products": found.iterations,
                    "converged": found.converged,
                }
            )
    notes = (_setting(subject, size), "Some eigenvalue lies within the residual of the one shown.")
    return Finding(rows, notes, {f"top_eigenvalue_{row['images']}": row["top eigenvalue"] for row in rows})


def _smoothness(subject: Subject) -> Finding:
    x_BCHW, y_B = subject.images(64)
    with subject.one_draw():
        values_B = effective_smoothness(subject.model, x_BCHW, y_B)
    row = {
        "mean": values_B.mean().item(),
        "largest": values_B.max().item(),
        "smallest": values_B.min().item(),
        "images": len(values_B),
    }
    notes = ("v' H v per image, v the normalized gradient at the image, one draw.",)
    return Finding([row], notes, {"mean": row["mean"], "largest": row["largest"]})


def _cost(subject: Subject) -> Finding:
    rows: list[dict[str, Any]] = []
    costs = measure_costs(subject.model, subject.spec.image_shape, num_rounds=3)
    for cost in costs:
        row = {
            "inference": cost.inference,
            "parameters": cost.num_parameters,
            "bytes": cost.num_bytes,
            "MACs per image": cost.macs_per_image,
        }
        if cost.generation_macs:
            row["MACs of generation"] = cost.generation_macs
        rows.append(row | {f"ms, batch {size}": 1000 * seconds for size, seconds in cost.latency.items()})
    used = [module.inference for module in subject.model.modules() if isinstance(module, Ensemble)]
    own = next((cost for cost in costs if cost.inference in used), costs[0])
    device = next(subject.model.parameters()).device.type
    notes = (f"Latency is the median of 3 calls on this machine ({device}) in eval mode; it is not comparable between machines.",)
    metrics = {"parameters": own.num_parameters, "bytes": own.num_bytes, "macs_per_image": own.macs_per_image, "latency": own.latency[1]}
    return Finding(rows, notes, metrics, how="latency: one image, median of 3")


def _parameters(subject: Subject) -> Finding:
    row: dict[str, Any] = {"parameters": count_parameters(subject.model)}
    if subject.other is not None:
        row["saved"] = saved_share(subject.model, subject.other)
    return Finding([row], ("Shared ones are counted once.",), dict(row))


QUANTITIES = (
    Quantity(
        "weight_noise",
        "Loss under Gaussian noise on the weights",
        "a small rise: the minimum is flat",
        "Jin et al., RAT, CVPR 2023, Eq. 2",
        ANY_MODEL,
        _weight_noise,
    ),
    Quantity(
        "sharpness",
        "Rise of the loss along the gradient in weight space",
        "a small rise within the radius rho, over all weights together: the minimum is flat",
        "Foret et al., SAM, ICLR 2021, Eq. 2, 3",
        ANY_MODEL,
        _sharpness,
    ),
    Quantity(
        "hessian",
        "Top eigenvalue of the Hessian in weight space",
        "the curvature of the loss in its most curved direction",
        "power iteration",
        ANY_MODEL,
        _hessian,
        cheap=False,
    ),
    Quantity(
        "smoothness",
        "Effective smoothness of the loss at the image",
        "the curvature of the loss in the direction that attacks take",
        "Dong et al., RNA, NeurIPS 2022, Eq. 6",
        ANY_MODEL,
        _smoothness,
    ),
    Quantity(
        "parameters",
        "Number of parameters",
        "beside a second network, in a table: the share of that network's parameters which this one saves",
        "RED, section 4",
        ANY_MODEL,
        _parameters,
        cheap=False,
        trained=False,
    ),
    Quantity(
        "cost",
        "Parameters, bytes, multiply-accumulates and latency",
        "what the defence costs, for ensembles in each way of answering",
        "RED, section 4",
        ANY_MODEL,
        _cost,
    ),
)
