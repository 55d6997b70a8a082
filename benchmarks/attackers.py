"""Which attack on noisy gradients is the strongest at equal passes: accuracy left under T1, model by model.

    python -m benchmarks.attackers MODEL_FOLDER [MODEL_FOLDER ...] [--samples N] [--seeds N]

Each folder is an exported model (`rayndom export`, or `model/` of a run) of a random defence on digits of 16 x 16 pixels. Every attack
spends 400 forward and 400 backward passes an image, gives its last point (APGD: its best on common draws), and is scored on the same
100 other draws. Strength, not speed: nothing is timed and there is no bar.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from analysis.attacked_model.draws import FreshDraws, seeded_draws
from analysis.attacked_model.model import AttackedModel, Predictor
from analysis.attacks.registry import AttackProblem, attack_entry, parse_attack_parameters
from analysis.evaluation.protocols import score_draws
from models.threat_model import ThreatModel
from models.weights import load_pretrained
from trainers.data import DataConfig, load_data

EPSILON = 0.1
SCORING_DRAWS = 100

ATTACKS: tuple[tuple[str, str, dict[str, Any], int], ...] = (
    ("EOT-PGD, cross-entropy", "pgd", {"steps": 40}, 10),
    ("PGD, margin, one draw a step", "pgd", {"steps": 400, "loss": "margin"}, 1),
    ("APGD, margin", "apgd_margin", {"steps": 20}, 10),
    ("APGD, margin, more steps", "apgd_margin", {"steps": 50}, 4),
    ("momenta, margin, fresh draws", "aggregated_momentum", {"steps": 100}, 4),
    ("momenta, cross-entropy, fresh draws", "aggregated_momentum", {"steps": 100, "loss": "cross_entropy"}, 4),
    ("momenta, margin, held draws", "aggregated_momentum", {"steps": 40, "draws": "held"}, 10),
)
"""Title, attack, parameters, draws per gradient."""


def accuracy_left(
    model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, attack: str, parameters: dict, num_draws: int, seed: int
) -> float:
    """Return the accuracy under T1 of one attack on one model."""
    predictor = Predictor(model)
    attacked = AttackedModel(predictor, FreshDraws(num_draws, seed, "attack"))
    problem = AttackProblem(x, y, ThreatModel(norm="linf", epsilon=EPSILON), 10, seed)
    points = attack_entry(attack).run(attacked, problem, parse_attack_parameters(attack, parameters)).x
    correct_SR, _ = score_draws(predictor, points, y, seeded_draws(SCORING_DRAWS, "scoring"))
    return float(correct_SR.double().mean())


def main(arguments: list[str] | None = None) -> int:
    """Print a line per attack and model, and the mean over models."""
    parser = argparse.ArgumentParser(prog="benchmarks.attackers", description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, metavar="MODEL_FOLDER")
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args(arguments)
    if not options.folders:
        sys.stdout.write("name exported models of random defences on digits: python -m benchmarks.attackers FOLDER ...\n")
        return 0
    test = load_data(DataConfig(name="digits", image_size=16)).test
    x, y = test.images_NCHW[: options.samples].float() / 255, test.labels[: options.samples]
    models = [load_pretrained(folder, resample_on_forward=False) for folder in options.folders]
    for title, attack, parameters, num_draws in ATTACKS:
        cells = []
        for model in models:
            left = [accuracy_left(model, x, y, attack, parameters, num_draws, seed) for seed in range(options.seeds)]
            cells.append(100 * sum(left) / len(left))
        row = "  ".join(f"{cell:5.1f}" for cell in cells)
        sys.stdout.write(f"{title:38s} {row}   mean {sum(cells) / len(cells):.2f}\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
