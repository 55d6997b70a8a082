"""Sweeps put together at random: each is refused by name, or proposes points of its space, start after start, whatever trials do."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import yaml

from orchestration.sweeping.config import SweepConfig
from orchestration.sweeping.loading import load_sweep
from orchestration.sweeping.proposals import StudySearch
from orchestration.sweeping.samplers import SAMPLERS
from orchestration.sweeping.schedulers import EarlyStopping
from orchestration.sweeping.study import open_study
from tests.fuzz.command_line import SEED, Hang, complaint, no_longer_than, rayndom

FEW, MANY = 40, 300
FIRST_S = 60
RATE = "training.optimizer.learning_rate"
OWN: dict[str, dict[str, Any]] = {
    "ctrw_digits": {
        "defence.lower_bound": (1, 2000, "float"),
        "defence.upper_bound": (1, 3000, "float"),
        "defence.constraint": ["project", "penalty", "none"],
    },
    "rna_digits": {"defence.choice": ["per_layer", "per_network"], "defence.pool": [["bn"], ["bn", "in"], ["gn", "in"]]},
    "dcs_digits": {"defence.kernel_size": (1, 9, "int"), "defence.num_taps": (1, 9, "int")},
    "trades_digits": {"training.objective.beta": (0, 10, "float")},
    "red_digits": {"defence.num_members": (1, 6, "int")},
}
SHARED: dict[str, Any] = {
    RATE: (1e-4, 0.5, "float"),
    "training.optimizer.momentum": (0, 0.99, "float"),
    "training.attack.steps": (1, 10, "int"),
    "training.epochs": (1, 4, "int"),
    "training.optimizer.name": ["sgd", "adamw", "adam"],
    "training.averaging.name": ["none", "ema", "swa"],
    "threat_model.epsilon": (0.01, 0.3, "float"),
    "data.mixing": ["none", "mixup", "cutmix"],
    "training.batch_size": [16, 32, 64],
    "training.attack.random_start": [True, False],
    "training.optimizer.gradient_clip_norm": [None, 1.0, 5.0],
}
METRICS = (
    "validation/robust_accuracy",
    "validation/clean_accuracy",
    "model/parameters",
    "model/latency_ms",
    "validation/robust_accuracy/T1",
)


def number(low: float, high: float, kind: str, rng: random.Random) -> dict[str, Any]:
    """Return a dimension of numbers: within the ends, now and then without a width, with steps, or logarithmic."""
    way = rng.random()
    if kind == "int":
        first = rng.choice([low, low, low + 1])
        last = rng.choice([high, high - 1, first, first + 1])
        more = {"step": rng.choice([1, 2, 3, last - first or 1])} if way < 0.3 else {"log": True} if way < 0.5 else {}
    else:
        first, last = sorted(rng.uniform(low, high) for _ in range(2))
        first = low if rng.random() < 0.2 else first
        steps = [(last - first) / 4, (last - first) / 3, 0.01, last - first]
        more = {"log": True} if way < 0.25 else {"step": rng.choice(steps)} if way < 0.4 else {}
        last = first + 1e-12 if rng.random() < 0.05 else last
    return {"type": kind, "low": first, "high": last, **more}


def dimension(values: Any, others: Mapping[str, Any], rng: random.Random) -> dict[str, Any]:
    if isinstance(values, list):
        made: dict[str, Any] = {"type": "choice", "choices": rng.sample(values, rng.randint(1, len(values)))}
    else:
        made = number(*values, rng)
    if others and rng.random() < 0.2:
        other = rng.choice(list(others))
        if others[other]["type"] == "choice":
            made["when"] = {other: rng.sample(others[other]["choices"], rng.randint(1, len(others[other]["choices"])))}
        else:
            made["above"] = other
    return made


def sweep(rng: random.Random) -> dict[str, Any]:
    """Return a sweep whose every part can be right."""
    recipe = rng.choice(list(OWN))
    known, space = {**SHARED, **OWN[recipe]}, {}
    for name in rng.sample(list(known), rng.randint(1, 4)):
        space[name] = dimension(known[name], space, rng)
    if {"defence.lower_bound", "defence.upper_bound"} <= space.keys() and rng.random() < 0.7:
        space["defence.upper_bound"] = {**number(1, 3000, "float", rng), "above": "defence.lower_bound"}
    tree: dict[str, Any] = {
        "recipe": recipe,
        "settings": {"data.image_size": 8, "data.limit_train": 128, "data.validation_size": 32},
        "space": space,
        "sampler": rng.choice(list(SAMPLERS)),
        "num_trials": rng.choice([1, 2, 3, 7, 12, 30, None]),
        "seed": rng.randrange(5),
    }
    if rng.random() < 0.2:
        del tree["recipe"]
        tree["recipes"] = rng.sample(list(OWN), 2)
        tree["space"] = {each: {name: dimension(values, {}, rng) for name, values in OWN[each].items()} for each in tree["recipes"]}
        tree["space"][RATE] = number(1e-4, 0.5, "float", rng)
    if rng.random() < 0.45:
        chosen = rng.sample(METRICS, rng.randint(1, 4))
        tree["objectives"] = [{"metric": metric, "mode": "min" if metric.startswith("model") else "max"} for metric in chosen]
    if rng.random() < 0.3:
        tree["constraints"] = [{"metric": "validation/clean_accuracy", "at_least": rng.random()}]
    way = rng.random()
    if way < 0.2:
        tree["stopping"] = None
    elif way < 0.8:
        tree["stopping"] = {
            "scheduler": rng.choice(["asha", "hyperband", "median"]),
            "grace_epochs": rng.choice([1, 1, 2, 5]),
            "reduction_factor": rng.choice([2, 3, 1.5, 4, 1.01]),
        }
    if rng.random() < 0.3 and "recipe" in tree:
        tree["points"] = [point(space, rng) for _ in range(rng.randint(1, 3))]
    if rng.random() < 0.2:
        tree["repeats"] = {"top": rng.choice([1, 2, 3]), "seeds": [1, 2]}
    if rng.random() < 0.1:
        tree["warm_start"] = rng.choice([{"runs": True}, {"sweep": "nowhere"}, {"sweep": "x", "top": 3}, {}])
    return tree


def point(space: Mapping[str, Any], rng: random.Random) -> dict[str, Any]:
    chosen = rng.sample(list(space.items()), rng.randint(1, len(space)))
    return {name: rng.choice(each["choices"] if each["type"] == "choice" else [each["low"], each["high"]]) for name, each in chosen}


def proposals(config: SweepConfig, folder: Path, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Yield what two starts of a sweep propose, while trials finish, break, diverge, are stopped or left amid their training."""
    for start in range(2):
        study = open_study(config, folder)
        search = StudySearch(config, study)
        epochs = max(experiment.training.epochs for experiment in config.base_experiments())
        early = EarlyStopping(config, epochs, study) if config.stopping else None
        for number in range(8):
            name = f"{start}_{number}"
            proposed = search.suggest(name)
            if isinstance(proposed, str):
                break
            yield proposed
            end = rng.choice(["finished", "finished", "error", "stopped", "failed", "nan", "left"])
            metrics = {each.metric: rng.choice([rng.random(), 0.0, 1.0]) for each in (*config.objectives, *config.constraints)}
            if config.stopping:
                metrics.setdefault(config.stopping.metric, rng.random())
            result = {**(dict.fromkeys(metrics, float("nan")) if end == "nan" else metrics), "metrics": metrics}
            for epoch in range(1, 1 + config.experiment(proposed["values"]).training.epochs):
                search.on_trial_result(name, {**result, "epoch": epoch})
                if early:
                    early.on_trial_result(None, SimpleNamespace(config=proposed), {**result, "epoch": epoch})  # type: ignore[arg-type]
            if end != "left":
                over = {**result, "epoch": epochs, "finished": end in ("finished", "nan")} | ({"failed": "x"} if end == "failed" else {})
                search.on_trial_complete(name, over, error=end == "error")


def outside(config: SweepConfig, values: Mapping[str, Any]) -> str | None:
    """Return what is wrong with proposed values, None if nothing is."""
    for name, value in values.items():
        own = (config.space or {})[name]
        if not own.takes(value):
            return f"{name} does not take {value!r}"
        if own.above in values and value < values[own.above] - 1e-12:
            return f"{name} {value!r} lies below {own.above}"
    return None


def try_sweeps(folder: Path, seed: int, number: int) -> int:
    """Return how many of so many sweeps were taken; they propose."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rng, problems, taken = random.Random(seed), [], 0
    for index in range(number):
        tree, path = sweep(rng), folder / "mine.yaml"
        path.write_text(yaml.safe_dump(tree))
        words = rng.choice([["sweep", str(path), "--dry-run"], ["simulate", str(path), "--gpus=1", "--epoch-seconds=3"]])
        outcome = rayndom([*words, "--home", str(folder / "home")], FIRST_S)
        problem = complaint(outcome, ["mine"], refused=None)
        if problem is None and outcome.code == 0:
            taken += 1
            config = load_sweep(str(path))
            try:
                with no_longer_than(FIRST_S):
                    for proposed in proposals(config, folder / f"study{index}", rng):
                        problem = problem or outside(config, proposed["values"])
            except (Exception, Hang) as error:
                problem = f"{type(error).__name__}: {error}"
        if problem:
            problems.append(f"{problem[:300]}: {json.dumps(tree)[:700]}: {outcome.error[:300]!r}")
    assert not problems, f"{len(problems)} with seed {seed}:\n" + "\n".join(problems)
    return taken


@pytest.fixture(autouse=True)
def nothing_is_trained(monkeypatch):
    report = SimpleNamespace(total_seconds=0.0, to_json=dict, rows=list)
    monkeypatch.setattr("orchestration.training.dry_run.dry_run", lambda experiment, workplace: report)


def test_proposals(tmp_path):
    try_sweeps(tmp_path, SEED + 100, FEW)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_many_proposals(tmp_path):
    assert try_sweeps(tmp_path, SEED + 101, MANY) > MANY // 20
