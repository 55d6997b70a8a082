"""Quantities of every randomized model: how alike two draws are, for gradients and for attacks.

References: Ma et al., CTRW, NeurIPS 2023, Eq. 6, 8; Dong et al., RNA, NeurIPS 2022, Fig. 3, 5c; Ma et al., DCS, ICML 2025, Eq. 6, Fig. 4.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from torch import nn

from analysis.attacked_model.draws import all_configurations, set_draw
from analysis.quantities.quantity import RANDOMIZED, Finding, Quantity, Subject
from analysis.theory.ctrw_bounds import pairs_at_correlation
from analysis.theory.dcs_gradients import pairs_with_overlap
from analysis.theory.rna_paths import pairs_at_difference
from analysis.theory.transferability import (
    DrawPair,
    current_draw,
    draw_distance,
    gradient_cosines,
    random_pairs,
    transfer,
    undisturbed,
)
from models.layers.random_normalization import RandomNormalization2d
from models.layers.random_weight import RandomFeatureWeight, RandomFilterConv2d
from models.layers.stochastic_convolution import StochasticConv2d
from models.randomness import random_sites

REFERENCE = "CTRW, Eq. 6, 8; RNA, Fig. 3, 5c; DCS, Eq. 6, Fig. 4"
CORRELATIONS = (1.0, 0.95, 0.75, 0.5, 0.0)
FEW_CONFIGURATIONS = 8
MOST_DISTANCES = 6


def _draw_cosines(subject: Subject) -> Finding:
    x_BCHW, y_B = subject.images(128)
    pairs = random_pairs(subject.model, subject.draws(10), subject.seed)
    found = gradient_cosines(subject.model, x_BCHW, y_B, pairs)
    counts, _ = found.histogram(20)
    share = (found.cosine_PB > 0.5).double().mean().item()
    row = {
        "pairs": len(pairs),
        "mean cosine": found.mean,
        "std": found.std,
        "share above 0.5": share,
        "mean distance": found.distance_P.mean().item(),
        "zero gradients": found.num_zero_gradients,
        "histogram -1 to 1": counts.tolist(),
    }
    total = 2 * found.cosine_PB.numel()
    notes = [f"{len(x_BCHW)} images; pairs of independent draws."]
    if found.num_zero_gradients:
        notes.append(f"{found.num_zero_gradients} of {total} gradients vanish exactly and count as cosine 0: they are masked, not diverse.")
    return Finding([row], tuple(notes), {"mean_cosine": found.mean, "zero_gradients": found.num_zero_gradients})


def _draw_transfer(subject: Subject) -> Finding:
    x_BCHW, y_B = subject.images(128)
    attack, rows = subject.attack(), []
    for distance, pairs in pairs_by_distance(subject.model, subject.draws(5), subject.seed):
        subject.progress(f"{len(pairs)} pairs of draws at distance {distance:.4g}")
        records = transfer(subject.model, x_BCHW, y_B, attack, pairs)
        accuracies = [record.accuracy for record in records]
        rows.append(
            {
                "distance": distance,
                "pairs": len(pairs),
                "gradient cosine": gradient_cosines(subject.model, x_BCHW, y_B, pairs).mean,
                "accuracy after transfer": sum(accuracies) / len(accuracies),
                "lowest": min(accuracies),
                "highest": max(accuracies),
                "on the attacked draw": sum(record.accuracy_on_attacked_draw for record in records) / len(records),
            }
        )
    notes = (
        f"{subject.attack_name} on one draw, accuracy on the other, {len(x_BCHW)} images. Distance: CTRW 1 - correlation of the noise; RNA "
        "layers that differ; DCS taps that differ; ensembles 1 for another member.",
    )
    gain = rows[-1]["accuracy after transfer"] - rows[0]["on the attacked draw"]
    return Finding(rows, notes, {"accuracy_farthest": rows[-1]["accuracy after transfer"], "gain_over_known_draw": gain})


def pairs_by_distance(model: nn.Module, count: int, seed: int) -> Iterator[tuple[float, list[DrawPair]]]:
    """Yield distances, ascending, with pairs of draws that far apart.

    Where all sites are of one kind whose distance can be chosen, it is; a small space of draws is enumerated; elsewhere pairs of
    independent draws are grouped by their distance.

    Args:
        count: pairs at each distance; for enumerated spaces all there are.
    """
    sites = [site for _, site in random_sites(model)]
    configurations = all_configurations(model, FEW_CONFIGURATIONS)
    if configurations is not None:
        draws = []
        with undisturbed(model):
            for configuration in configurations:
                set_draw(model, configuration)
                draws.append(current_draw(model))
        pairs = [DrawPair(a, b, draw_distance(model, a, b)) for a, b in itertools.product(draws, draws)]
        yield from _grouped(pairs)
    elif all(isinstance(site, RandomFeatureWeight | RandomFilterConv2d) and site.draw_scope != "per_example" for site in sites):
        for correlation in CORRELATIONS:
            yield 1 - correlation, pairs_at_correlation(model, correlation, count, seed)
    elif all(isinstance(site, RandomNormalization2d) and site.draw_scope != "per_example" for site in sites):
        for difference in _spread(sum(int(site.num_configurations) > 1 for site in sites)):
            yield difference, pairs_at_difference(model, difference, count, seed)
    elif all(isinstance(site, StochasticConv2d) and site.draw_scope != "per_example" for site in sites):
        yield from _by_overlap(model, [site for site in sites if isinstance(site, StochasticConv2d)], count, seed)
    else:
        yield from _grouped(random_pairs(model, MOST_DISTANCES * count, seed))


def _by_overlap(model: nn.Module, sites: list[StochasticConv2d], count: int, seed: int) -> Iterator[tuple[float, list[DrawPair]]]:
    for overlap in range(min(site.num_taps for site in sites), -1, -1):
        if all(2 * site.num_taps - overlap <= site.kernel_size**2 for site in sites):
            pairs = pairs_with_overlap(model, overlap, count, seed)
            yield pairs[0].distance, pairs


def _spread(largest: int) -> list[int]:
    """Return at most `MOST_DISTANCES` whole numbers from 0 to `largest`, evenly spread."""
    steps = min(largest, MOST_DISTANCES - 1)
    return sorted({round(index * largest / max(1, steps)) for index in range(steps + 1)})


def _grouped(pairs: list[DrawPair]) -> Iterator[tuple[float, list[DrawPair]]]:
    """Yield pairs by distance; where hardly two are alike, in equal groups at their mean distance."""
    ordered = sorted(pairs, key=lambda pair: pair.distance)
    groups = [list(group) for _, group in itertools.groupby(ordered, key=lambda pair: round(pair.distance, 6))]
    if len(groups) > MOST_DISTANCES:
        size = -(-len(ordered) // MOST_DISTANCES)
        groups = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    for group in groups:
        yield sum(pair.distance for pair in group) / len(group), group


QUANTITIES = (
    Quantity(
        "draw_cosines",
        "Gradient cosine between two draws",
        "near 1: an attack on one draw is an attack on all of them, whatever the draw is",
        REFERENCE,
        RANDOMIZED,
        _draw_cosines,
    ),
    Quantity(
        "draw_transfer",
        "Accuracy on one draw under attack on another, over their distance",
        "what not knowing the draw costs an attacker of a single draw (T0); one who averages over draws (T1) loses less",
        REFERENCE,
        RANDOMIZED,
        _draw_transfer,
        cheap=False,
    ),
)
