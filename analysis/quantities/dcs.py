"""Quantities of stochastic convolutions (DCS): probabilities of points, bounds of n, gradient cosines of designed mask pairs.

Reference: Ma, Huang, Dong, You, Xu, "Adversarial Robustness via Deformable Convolution with Stochasticity", ICML 2025.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from analysis.quantities.pairs import Pairs, PairsByDistance, cosines_of_pairs, how_cosines
from analysis.quantities.quantity import Finding, NotComputable, Quantity, Requirement, Subject, rounded
from analysis.theory.dcs_bounds import (
    PairKind,
    feasibility,
    paper_gap_bounds,
    paper_unhit_lower_bound,
    paper_unhit_upper_bound,
    point_probabilities,
    unhit_extremes,
)
from analysis.theory.dcs_gradients import designed_pairs, input_gradient_cosines, pairs_with_overlap
from analysis.theory.transferability import DrawPair, gradient_cosines, transfer, undisturbed
from models.layers.stochastic_convolution import StochasticConv2d
from models.randomness import random_sites

PAPER = "Ma et al., DCS, ICML 2025"
MOST_MASKS = 4096
EPSILONS_C = (0.5, 0.9, 1.0)
SHARES_OF_EPSILON_L = (0.0, 0.5, 0.95)
KINDS: dict[PairKind, str] = {"same": "same (C_s)", "gap": "gap (C_g): disjoint, same classes", "unhit": "unhit (C_u): other classes"}


def _layers(model: nn.Module) -> Iterator[tuple[str, StochasticConv2d]]:
    for name, site in random_sites(model):
        if isinstance(site, StochasticConv2d):
            yield name, site


def _fits_the_bounds(model: nn.Module) -> bool:
    layers = [layer for _, layer in _layers(model)]
    return bool(layers) and all(layer.stride[0] == layer.stride[1] <= layer.kernel_size for layer in layers)


BOUNDED = Requirement("stochastic convolutions with one stride of at most the kernel size (dcs)", _fits_the_bounds)
FEW_MASKS = Requirement(
    f"stochastic convolutions with at most {MOST_MASKS} masks each (dcs, e.g. k=5 and n up to 3)",
    lambda model: _fits_the_bounds(model) and all(layer.num_configurations <= MOST_MASKS for _, layer in _layers(model)),
)


def _shape(name: str, layer: StochasticConv2d) -> dict[str, Any]:
    return {"layer": name, "k": layer.kernel_size, "n": layer.num_taps, "S": layer.stride[0]}


def _points(subject: Subject) -> Finding:
    rows: list[dict[str, Any]] = []
    for name, layer in _layers(subject.model):
        k, n, s = layer.kernel_size, layer.num_taps, layer.stride[0]
        for masks, disjoint in (("independent", False), ("disjoint (GSAT)", True)):
            if disjoint and 2 * n > k**2:
                continue
            found = point_probabilities(k, n, s, disjoint=disjoint)
            row = {**_shape(name, layer), "masks": masks, "p_s": found.same, "p_g": found.gap, "p_u": found.unhit}
            if not disjoint:
                row["p_u exact range"] = _range(unhit_extremes(k, n, s))
                row["p_u Eq. 16, 24"] = _range((paper_unhit_lower_bound(k, n, s), paper_unhit_upper_bound(k, n, s)))
                # With at least as many taps as classes the upper bound leaves [0, 1]: the equation counts classes that are not hit.
                row["p_g Eq. 28"] = _range(paper_gap_bounds(k, n, s)) if n < s**2 else "only for n < S^2"
            rows.append(row)
    notes = [
        "p_s = n / k^2, as in the paper's appendix. Eq. 24 presumes that a mask fills the largest classes first: masks can lie above it."
    ]
    if any(layer.space.sampling != "uniform" for _, layer in _layers(subject.model)):
        notes.append("The probabilities are those of uniform masks; this model draws stratified ones.")
    return Finding(rows, tuple(notes), {"p_s": rows[0]["p_s"], "p_g": rows[0]["p_g"], "p_u": rows[0]["p_u"]})


def _range(bounds: tuple[float, float]) -> str:
    return f"{bounds[0]:.4g} to {bounds[1]:.4g}"


def _input_sizes(subject: Subject) -> dict[str, int]:
    """Return N of each layer: pixels of its input feature map with the padding."""
    sizes: dict[str, int] = {}
    model = subject.model

    def note(name: str, layer: StochasticConv2d, height: int, width: int) -> None:
        sizes[name] = (height + 2 * layer.padding) * (width + 2 * layer.padding)

    handles = [
        layer.register_forward_pre_hook(lambda module, inputs, name=name: note(name, module, *inputs[0].shape[-2:]))
        for name, layer in _layers(model)
    ]
    like = next(model.parameters())
    try:
        with undisturbed(model), torch.no_grad():
            model(torch.full((64, *subject.spec.image_shape), 0.5).to(like))  # enough images that every member of an ensemble answers
    finally:
        for handle in handles:
            handle.remove()
    return sizes


def _bounds(subject: Subject) -> Finding:
    sizes = _input_sizes(subject)
    rows, notes, needed = [], [], 0.0
    for name, layer in _layers(subject.model):
        if name not in sizes:
            raise NotComputable(f"layer {name} took no part in a forward pass, so the size of its input is not known")
        k, n, s, size = layer.kernel_size, layer.num_taps, layer.stride[0], sizes[name]
        found = None
        for epsilon_c in EPSILONS_C:
            for share in SHARES_OF_EPSILON_L:
                found = feasibility(k, n, s, epsilon_c, share * size / s**2, size)
                rows.append(
                    {
                        **_shape(name, layer),
                        "epsilon_c": epsilon_c,
                        "epsilon_l": found.epsilon_l,
                        "n_min (Eq. 11)": found.lower,
                        "n_max (Eq. 20)": found.upper,
                        "n_max (Eq. 8)": found.upper_loose,
                        "feasible": found.feasible,
                        "some n is": found.some_n_is_feasible,
                    }
                )
        assert found is not None
        impossible = ", which no cosine can make binding: this n has no guarantee" if found.needed_epsilon_c >= 1 else ""
        notes.append(
            f"{name}: n={n} satisfies Eq. 20 only for epsilon_c >= {found.needed_epsilon_c:.4g}{impossible}; it satisfies Eq. 11 for "
            f"epsilon_l >= {found.needed_epsilon_l:.4g} (N = {size} points)."
        )
        needed = max(needed, found.needed_epsilon_c)
    notes.append("Eq. 8 is looser than Eq. 20: necessary, not sufficient.")
    return Finding(rows, tuple(notes), {"needed_epsilon_c": needed, "feasible_rows": sum(row["feasible"] for row in rows)})


def _layer_cosines(subject: Subject) -> Finding:
    x_BCHW, y_B = subject.images(32)
    rows: list[dict[str, Any]] = []
    with subject.one_draw():
        for index, (name, layer) in enumerate(_layers(subject.model)):
            subject.progress(f"layer {name}: all pairs of {layer.num_configurations} masks")
            found = input_gradient_cosines(subject.model, x_BCHW, y_B, index, seed=subject.seed)
            row = {
                **_shape(name, layer),
                "E cos, exact": found.expected,
                "E cos, Eq. 7": found.predicted,
                "C_g": found.by_kind.get("gap"),
                "C_u": found.by_kind.get("unhit"),
            }
            rows.append(row | {f"{overlap} shared": value for overlap, value in enumerate(found.by_overlap)})
    notes = (f"At the layer's input under the upstream gradient of one draw, {len(x_BCHW)} images. C_s is 1 by definition.",)
    return Finding(rows, notes, {"cosine": rows[0]["E cos, exact"], "predicted": rows[0]["E cos, Eq. 7"]})


def _kind_cosines(subject: Subject, kind: PairKind | None = None, num_pairs: int = 10, num_images: int = 128) -> Finding:
    kinds = [kind] if kind is not None else list(KINDS)
    rows: list[dict[str, Any]] = []
    last = None
    for each in kinds:
        try:
            pairs = designed_pairs(subject.model, each, subject.draws(num_pairs), subject.seed)
        except ValueError as error:  # a stride of 1 leaves no point unhit
            if kind is not None:
                raise NotComputable(f"there are no such pairs: {error}") from None
            continue
        last = cosines_of_pairs(subject, pairs, num_images)
        rows.append({"masks": KINDS[each], "pairs": len(pairs), "mean cosine": last.mean, "std": last.std})
    if last is None:
        raise NotComputable("there are no such pairs of masks")
    pairs_of_kind, count = last.cosine_PB.shape
    series = {"values": rounded(last.cosine_PB.flatten())} if kind is not None else {}
    metrics = {f"cosine_{row['masks'].split()[0]}": row["mean cosine"] for row in rows}
    notes = (f"Gradients at the image, {count} images. Layers are all of the kind named.",)
    return Finding(rows, notes, metrics, series, how_cosines(last), count, pairs_of_kind)


def _mask_pairs(subject: Subject) -> Finding:
    x_BCHW, y_B = subject.images(128)
    count, attack = subject.draws(10), subject.attack()
    rows: list[dict[str, Any]] = []
    for label, pairs in _designed(subject, count):
        cosines = gradient_cosines(subject.model, x_BCHW, y_B, pairs)
        records = []
        for number, pair in enumerate(pairs, start=1):
            subject.progress(f"masks {label}: pair {number} of {len(pairs)}")
            records += transfer(subject.model, x_BCHW, y_B, attack, [pair])
        rows.append(
            {
                "masks": label,
                "pairs": len(pairs),
                "cosine": cosines.mean,
                "std": cosines.std,
                "accuracy after transfer": sum(record.accuracy for record in records) / len(records),
                "on the attacked masks": sum(record.accuracy_on_attacked_draw for record in records) / len(records),
            }
        )
    notes = (f"Gradients at the image, {len(x_BCHW)} images; {subject.attack_name} on the first masks. Layers are all of the kind named.",)
    return Finding(rows, notes, {f"cosine_{row['masks'].split()[0]}": row["cosine"] for row in rows[:3]})


def _designed(subject: Subject, count: int) -> Iterator[tuple[str, list[DrawPair]]]:
    """Yield the kinds of pairs that exist for these kernels, then those by overlap."""
    layers = [layer for _, layer in _layers(subject.model)]
    for kind, label in KINDS.items():
        try:
            pairs = designed_pairs(subject.model, kind, count, subject.seed)
        except ValueError as error:  # a stride of 1 leaves no point unhit
            subject.progress(str(error))
            continue
        yield label, pairs
    for overlap in range(min(layer.num_taps for layer in layers) + 1):
        if all(2 * layer.num_taps - overlap <= layer.kernel_size**2 for layer in layers):
            yield f"{overlap} shared taps", pairs_with_overlap(subject.model, overlap, count, subject.seed)


def _pairs_at_overlaps(model: nn.Module, sites: Sequence[StochasticConv2d], count: int, seed: int) -> Pairs:
    for overlap in range(min(site.num_taps for site in sites), -1, -1):
        if all(2 * site.num_taps - overlap <= site.kernel_size**2 for site in sites):
            pairs = pairs_with_overlap(model, overlap, count, seed)
            yield pairs[0].distance, pairs


PAIRS_BY_DISTANCE = (PairsByDistance("stochastic convolutions", (StochasticConv2d,), _pairs_at_overlaps),)

QUANTITIES = (
    Quantity(
        "dcs_points",
        "Points that a second mask selects again, shares or does not reach",
        "p_s: same tap; p_g: reached by the first mask from another location; p_u: reached from nowhere; exact",
        f"{PAPER}, section 4.2, Eq. 16, 24, 28",
        BOUNDED,
        _points,
    ),
    Quantity(
        "dcs_bounds",
        "Bounds of the number of taps n, and whether any n satisfies both",
        "n must be at most n_max for a small gradient cosine and at least n_min for stable outputs",
        f"{PAPER}, Eq. 8, 11, 12, 20",
        BOUNDED,
        _bounds,
    ),
    Quantity(
        "dcs_layer_cosines",
        "Gradient cosine of two draws at the layer's input",
        "the exact mean over all pairs of masks beside what Eq. 7 predicts from C_g",
        f"{PAPER}, Eq. 6, 7, Fig. 4b",
        FEW_MASKS,
        _layer_cosines,
    ),
    Quantity(
        "dcs_kind_cosines",
        "Designed pairs of masks: gradient cosine at the image",
        "C_g and C_u of the paper, measured at the image instead of at the layer",
        f"{PAPER}, Fig. 4b",
        BOUNDED,
        _kind_cosines,
        cheap=False,
    ),
    Quantity(
        "dcs_mask_pairs",
        "Designed pairs of masks: gradient cosine and transfer at the image",
        "the fewer taps two masks share, the smaller the cosine and the less an attack on one carries to the other",
        f"{PAPER}, Fig. 4b, 5",
        BOUNDED,
        _mask_pairs,
        cheap=False,
    ),
)
