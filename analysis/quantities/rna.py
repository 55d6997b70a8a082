"""Quantities of random normalizations (RNA): paths, transfer between them, gradients and smoothness at normalizations, Theorem 3.1.

Reference: Dong, Chen, Wang, Xu, "Random Normalization Aggregation for Adversarial Defense", NeurIPS 2022.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from analysis.quantities.pairs import Pairs, PairsByDistance, evenly_spread
from analysis.quantities.quantity import Finding, NotComputable, Quantity, Requirement, Subject, has_layer
from analysis.theory.rna_paths import (
    cosines_between_types,
    pairs_at_difference,
    path_statistics,
    random_normalizations,
    set_path,
)
from analysis.theory.smoothness import effective_smoothness, normalization_gradients, transfer_bound
from analysis.theory.transferability import transfer, transfer_by_distance, undisturbed
from models.layers.channel_statistics import Normalization2d
from models.layers.random_normalization import RandomNormalization2d
from models.randomness import random_sites

PAPER = "Dong et al., RNA, NeurIPS 2022"
TINY = 1e-30  # below any gradient of a network that is worth measuring

RANDOM_NORMALIZATIONS = Requirement("random normalizations (rna)", has_layer(RandomNormalization2d))
NORMALIZATION_FAMILY = Requirement("normalizations of the RNA family (rna, single_normalization)", has_layer(Normalization2d))


def _one_pool(model: nn.Module) -> bool:
    pools = {site.pool for _, site in random_sites(model) if isinstance(site, RandomNormalization2d)}
    return len(pools) == 1 and len(next(iter(pools))) > 1


def _draws_are_shared(model: nn.Module) -> bool:
    sites = [site for _, site in random_sites(model) if isinstance(site, RandomNormalization2d)]
    return NORMALIZATION_FAMILY.fits(model) and all(site.draw_scope != "per_example" for site in sites)


COMMON_POOL = Requirement("random normalizations that all choose from the same types (rna)", _one_pool)
SHARED_DRAWS = Requirement("normalizations of the RNA family, shared by the batch (rna, single_normalization)", _draws_are_shared)


def _paths(subject: Subject) -> Finding:
    found = path_statistics(subject.model)
    row = {
        "layers L": found.num_layers,
        "types n": ", ".join(map(str, sorted(set(found.num_types)))),
        "paths": found.num_paths,
        "P(same path)": found.probability_of_same_path,
        "mean difference": found.mean,
        "std of difference": math.sqrt(found.variance),
    }
    notes = ("The difference of two paths is the number of layers in which they differ; layers that choose together differ together.",)
    return Finding([row], notes, {"num_paths_log2": math.log2(found.num_paths), "mean_difference": found.mean})


def _path_transfer(subject: Subject, difference: int | None = None, num_pairs: int = 10, num_images: int = 256) -> Finding:
    x_BCHW, y_B = subject.images(num_images)
    probabilities = path_statistics(subject.model).probability_D
    attack, rows = subject.attack(), []
    movable = sum(site.num_configurations > 1 for site in random_normalizations(subject.model))
    if difference is not None and difference > movable:
        raise NotComputable(f"{movable} layers can differ, not {difference}")
    for moved in range(movable + 1) if difference is None else (difference,):
        subject.progress(f"paths that differ in {moved} of {movable} layers")
        pairs = pairs_at_difference(subject.model, moved, subject.draws(num_pairs), subject.seed)
        (point,) = transfer_by_distance(transfer(subject.model, x_BCHW, y_B, attack, pairs))
        rows.append(
            {
                "difference": moved,
                "P(difference)": probabilities[moved],
                "pairs": point.num_pairs,
                "mean accuracy": point.mean,
                "lowest": point.minimum,
                "highest": point.maximum,
            }
        )
    how, drawn = f"{subject.attack_name} on one path, {len(x_BCHW)} images", int(rows[0]["pairs"])
    if difference is not None:
        (row,) = rows
        numbers = {"mean": row["mean accuracy"], "minimum": row["lowest"], "maximum": row["highest"]}
        return Finding(rows, (), numbers, how=how, num_samples=len(x_BCHW), num_draws=drawn)
    expected = sum(row["P(difference)"] * row["mean accuracy"] for row in rows)
    notes = (
        f"{subject.attack_name} on one path, accuracy on the other, {len(x_BCHW)} images. Weighted with P(difference), how often two draws "
        f"differ so much, the mean is {100 * expected:.1f} %; the attacker who guesses the path gets difference 0.",
    )
    metrics = {"accuracy_same_path": rows[0]["mean accuracy"], "accuracy_two_draws": expected}
    return Finding(rows, notes, metrics, how=how, num_samples=len(x_BCHW), num_draws=drawn)


def _type_cosines(subject: Subject) -> Finding:
    x_BCHW, y_B = subject.images(256)
    rows: list[dict[str, Any]] = []
    for (first, second), found in cosines_between_types(subject.model, x_BCHW, y_B).items():
        counts, _ = found.histogram(20)
        rows.append(
            {
                "first": first,
                "second": second,
                "mean cosine": found.mean,
                "std": found.std,
                "zero gradients": found.num_zero_gradients,
                "histogram -1 to 1": counts.tolist(),
            }
        )
    notes = (f"Paths of one type everywhere, weights shared (as Theorem 3.1 assumes), {len(x_BCHW)} images.",)
    return Finding(rows, notes, {f"cosine_{row['first']}_{row['second']}": row["mean cosine"] for row in rows})


def _norm_gradients(subject: Subject) -> Finding:
    x_BCHW, y_B = subject.images(32)
    rows: list[dict[str, Any]] = []
    with subject.one_draw():
        model = copy.deepcopy(subject.model).double()
    for found in normalization_gradients(model, x_BCHW.double(), y_B):
        error_B = (found.predicted_B - found.input_B).abs() / found.input_B.clamp_min(TINY)
        rows.append(
            {
                "layer": found.name,
                "type": found.kind,
                "norm at output": found.output_B.mean().item(),
                "norm at input": found.input_B.mean().item(),
                "by Eq. 5": found.predicted_B.mean().item(),
                "largest relative error": torch.where(found.input_B > TINY, error_B, 0.0).max().item(),
            }
        )
    worst = max(row["largest relative error"] for row in rows)
    notes = (f"Means over {len(x_BCHW)} images, in float64, at one draw. The identities hold to a relative error of {worst:.1g}.",)
    return Finding(rows, notes, {"largest_relative_error": worst})


def _uniform_paths(subject: Subject) -> Iterator[tuple[str, int]]:
    """Put the paths of one type in place, one after the other."""
    sites = random_normalizations(subject.model)
    with undisturbed(subject.model):
        for index, name in enumerate(sites[0].pool):
            set_path(subject.model, (index,) * len(sites))
            yield name, index


def _smoothness(subject: Subject) -> Finding:
    x_BCHW, y_B = subject.images(32)
    layers = [name for name, site in random_sites(subject.model) if isinstance(site, RandomNormalization2d)]
    rows: list[dict[str, Any]] = []
    for kind, _ in _uniform_paths(subject):
        for layer in (None, *layers):
            subject.progress(f"path of {kind} everywhere, at {layer or 'the image'}")
            values_B = effective_smoothness(subject.model, x_BCHW, y_B, layer)
            rows.append({"path": kind, "at the input of": layer or "the image"} | _spread(values_B))
    notes = (f"v' H v per image, v the normalized gradient, {len(x_BCHW)} images; the paper's beta is its largest value.",)
    return Finding(rows, notes, {f"mean_{row['path']}": row["mean"] for row in rows if row["at the input of"] == "the image"})


def _spread(values_B: Tensor) -> dict[str, float]:
    return {"mean": values_B.mean().item(), "largest": values_B.max().item(), "smallest": values_B.min().item()}


def _theorem(subject: Subject) -> Finding:
    x_BCHW, y_B = subject.images(64)
    target_B = (y_B + 1) % subject.spec.num_classes
    radius = subject.threat_model.epsilon
    if subject.threat_model.norm == "linf":
        radius *= math.sqrt(x_BCHW[0].numel())
    networks = {kind: copy.deepcopy(subject.model) for kind, _ in _uniform_paths(subject)}
    rows: list[dict[str, Any]] = []
    kinds = list(networks)
    for number, first in enumerate(kinds):
        for second in kinds[number + 1 :]:
            found = transfer_bound(networks[first], networks[second], x_BCHW, y_B, target_B, radius)
            rows.append(
                {
                    "first": first,
                    "second": second,
                    "bound of T": found.bound,
                    "denominator": found.denominator,
                    "risks": found.risk_a + found.risk_b,
                    "smallest target loss": found.smallest_target_loss,
                    "largest gradient": found.largest_gradient,
                    "largest cosine S": found.largest_similarity,
                    "beta": found.smoothness,
                }
            )
    says_nothing = sum(row["bound of T"] is None for row in rows)
    notes = (
        f"|delta|_2 <= {radius:.4g}, the smallest ball around that of {subject.threat_model}; targets are the next class; maxima over "
        f"{len(x_BCHW)} images. For {says_nothing} of {len(rows)} pairs the denominator is not positive: there the theorem says nothing.",
    )
    return Finding(rows, notes, {"denominator": rows[0]["denominator"], "largest_cosine": rows[0]["largest cosine S"]})


def _pairs_at_differences(model: nn.Module, sites: Sequence[RandomNormalization2d], count: int, seed: int) -> Pairs:
    for difference in evenly_spread(sum(site.num_configurations > 1 for site in sites)):
        yield difference, pairs_at_difference(model, difference, count, seed)


PAIRS_BY_DISTANCE = (PairsByDistance("random normalizations", (RandomNormalization2d,), _pairs_at_differences),)

QUANTITIES = (
    Quantity(
        "rna_paths",
        "Number of paths and how far apart two of them lie",
        "how many networks the draw chooses among, and in how many layers two draws differ",
        f"{PAPER}, section 4",
        RANDOM_NORMALIZATIONS,
        _paths,
    ),
    Quantity(
        "rna_path_transfer",
        "Accuracy on one path under attack on another, over their difference",
        "it should rise with the difference: then an attack on a guessed path loses its force",
        f"{PAPER}, Fig. 5c",
        RANDOM_NORMALIZATIONS,
        _path_transfer,
        cheap=False,
    ),
    Quantity(
        "rna_type_cosines",
        "Gradient cosine between paths of one type each",
        "the smaller, the less an attack carries from one type to the other",
        f"{PAPER}, Fig. 3",
        COMMON_POOL,
        _type_cosines,
    ),
    Quantity(
        "rna_norm_gradients",
        "Gradient norms at normalizations, by autograd and by the closed form",
        "normalizations of small groups shrink gradients, by as much as Eq. 5 says",
        f"{PAPER}, Eq. 4, 5",
        SHARED_DRAWS,
        _norm_gradients,
    ),
    Quantity(
        "rna_smoothness",
        "Effective smoothness of the loss along the gradient",
        "the smaller, the flatter the loss in the direction that attacks take",
        f"{PAPER}, Eq. 6",
        COMMON_POOL,
        _smoothness,
        cheap=False,
    ),
    Quantity(
        "rna_theorem",
        "Ingredients of the bound of the transfer rate",
        "T, the rate at which an attack carries from one type to the other, is below the bound where there is one",
        f"{PAPER}, Theorem 3.1, Eq. 7",
        COMMON_POOL,
        _theorem,
    ),
)
