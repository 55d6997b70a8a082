"""Quantities of every randomized model: how alike two draws are, for gradients and for attacks.

References: Ma et al., CTRW, NeurIPS 2023, Eq. 6, 8; Dong et al., RNA, NeurIPS 2022, Fig. 3, 5c; Ma et al., DCS, ICML 2025, Eq. 6, Fig. 4.
"""

from __future__ import annotations

import torch

from analysis.quantities.pairs import CHUNK, cosines_of_pairs, how_cosines, pairs_by_distance
from analysis.quantities.quantity import RANDOMIZED, Finding, NotComputable, Quantity, Requirement, Subject, rounded
from analysis.theory.transferability import gradient_cosines, gradient_cosines_between_models, random_pairs, transfer

REFERENCE = "CTRW, Eq. 6, 8; RNA, Fig. 3, 5c; DCS, Eq. 6, Fig. 4"
TWO_MODELS = Requirement("two networks beside one another, in a table of `rayndom reproduce`", lambda model: True)


def _draw_cosines(subject: Subject, num_pairs: int = 10, num_images: int = 128) -> Finding:
    pairs = random_pairs(subject.model, subject.draws(num_pairs), subject.seed)
    found = cosines_of_pairs(subject, pairs, num_images)
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
    total, count = 2 * found.cosine_PB.numel(), found.cosine_PB.shape[1]
    notes = [f"{count} images; pairs of independent draws."]
    if found.num_zero_gradients:
        notes.append(f"{found.num_zero_gradients} of {total} gradients vanish exactly and count as cosine 0: they are masked, not diverse.")
    metrics = {"mean_cosine": found.mean, "zero_gradients": found.num_zero_gradients}
    return Finding([row], tuple(notes), metrics, {"values": rounded(found.cosine_PB.flatten())}, how_cosines(found), count, len(pairs))


def _network_cosines(subject: Subject, num_images: int = 1000) -> Finding:
    if subject.other is None:
        raise NotComputable("it needs a second network")
    x_BCHW, y_B = subject.images(num_images)
    with subject.one_draw():
        parts = [
            gradient_cosines_between_models(subject.model, subject.other, x, y)
            for x, y in zip(x_BCHW.split(CHUNK), y_B.split(CHUNK), strict=True)
        ]
    cosine_B = torch.cat([part.cosine_PB[0] for part in parts])
    row = {"mean cosine": cosine_B.mean().item(), "std": cosine_B.std(correction=0).item(), "images": len(cosine_B)}
    metrics = {"mean_cosine": row["mean cosine"]}
    return Finding([row], (), metrics, {"values": rounded(cosine_B)}, f"{len(cosine_B)} images", len(cosine_B))


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
    Quantity(
        "network_cosines",
        "Gradient cosine between two networks",
        "near 1: an attack on one network is an attack on the other",
        "RNA, Fig. 3",
        TWO_MODELS,
        _network_cosines,
        cheap=False,
        of_two=True,
    ),
)
