"""Sweeps as people mistype them: one error, or a sweep; nothing else."""

from __future__ import annotations

import random

import pytest
import yaml

from models.errors import UserError
from orchestration.sweeping.loading import load_sweep

DIMENSION = {"type": "float", "low": 1, "high": 5}
VALUES = [
    None, True, -1, 0, 3, 1e308, float("inf"), float("nan"), 10**30, "", "x", "a: b", [], [1], [[None]], {}, {"name": None}, DIMENSION,
    {"type": "choice", "choices": [1, 1]}, {"type": "int", "low": 0, "high": 10**9}, "ctrw_digits", "grid", ["ctrw_digits"],
    [{"metric": "x"}], {"defence.lower_bound": DIMENSION}, {"defence.lower_bound": None}, {"x" * 150: 1},
]  # fmt: skip
KEYS = [
    "recipe", "recipes", "settings", "space", "points", "prior", "objectives", "constraints", "measure", "sampler", "num_trials",
    "stopping", "seed", "repeats", "suite", "baselines", "max_concurrent_trials", "num_test_examples", "name", "description", "extends",
]  # fmt: skip
FLAGS = ["settings.x", "space.y", "settings", "num_trials", "space", "a.b", "settings.training.epochs", "stopping.metric", "space.x.low"]


@pytest.mark.parametrize("seed", range(10))
def test_any_sweep_is_one_or_one_error(seed, tmp_path):
    rng = random.Random(seed)
    path = tmp_path / "generated.yaml"
    for _ in range(15):
        tree = {"recipe": "ctrw_digits", "num_trials": 3, "space": {"defence.lower_bound": DIMENSION}}
        tree |= {key: rng.choice(VALUES) for key in rng.sample(KEYS, rng.randrange(1, 4))}
        path.write_text(yaml.safe_dump(tree))
        flags = {rng.choice(FLAGS): rng.choice(VALUES)} if rng.random() < 0.5 else None
        message = ""
        try:
            config = load_sweep(str(path), flags)
        except UserError as error:
            message = str(error)
        assert 0 < len(message) < 4000 or config.space, (tree, flags)
