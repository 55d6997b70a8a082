"""Quantities of every randomized model: how alike two draws are, for gradients and for attacks.

References: Ma et al., CTRW, NeurIPS 2023, Eq. 6, 8; Dong et al., RNA, NeurIPS 2022, Fig. 3, 5c; Ma et al., DCS, ICML 2025, Eq. 6, Fig. 4.
"""

from __future__ import annotations

from analysis.quantities.pairs import pairs_by_distance
from analysis.quantities.quantity import RANDOMIZED, Finding, Quantity, Subject
from analysis.theory.transferability import gradient_cosines, random_pairs, transfer

REFERENCE = "CTRW, Eq. 6, 8; RNA, Fig. 3, 5c; DCS, Eq. 6, Fig. 4"


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
