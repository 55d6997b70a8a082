"""Does what we ship learn? Trains every recipe of a setting as it is and holds what it reached against a floor.

    python -m benchmarks.learning [--settings digits fashion_mnist] [--recipes NAME ...] [--seeds 3] [--results FOLDER]

Each training is one JSON line in FOLDER; a restart goes on with what is missing, and a line counts only for the experiment that it names.
Test images; accuracies in percent. `PGD-20`: gradients of one draw per step; `T1`: averaged over four draws, scored on four others (for a
network without draws the same).

Floors, on the mean over seeds, with two standard errors of grace:
* digits: clean 95 %, each member 90 %; an ensemble's T1 at least that of the same ensemble without what couples its members,
  within what so few test images can tell.
* Fashion-MNIST: clean at least that of AT less 5 points.

Exit code 1 if a floor is missed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.ensemble import Ensemble
from models.modes import mode
from orchestration.experiment import ExperimentConfig
from orchestration.recipes import list_recipes, listed_recipes, load_recipe
from orchestration.training.preparation import build_for
from trainers.complaints import complaints
from trainers.data import ArraySplit, StreamedSplit, evaluation_batches, load_data
from trainers.fit import TrainingDiverged, fit
from trainers.validation import ValidationConfig, validate

RESULTS = "learning.jsonl"
SETTINGS = ("digits", "fashion_mnist")
CLEAN_FLOOR, MEMBER_FLOOR, BELOW_AT = 95.0, 90.0, 5.0
DIGITS_TEST_IMAGES = 360

# What couples the members, switched off: what is left trains N members alone.
APART = ("--training.objective=ensemble_adversarial", "--training.attack.steps=0", "--training.validation.select=last")
UNCOUPLED: dict[str, tuple[str, ...]] = {
    "red": ("--training.objective.lambda_a=0", "--training.objective.lambda_b=0"),
    "gal": APART,
    "adp": APART,
    "trs": APART,
    "dverge": APART,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is missing, print the table, return the exit code."""
    parser = argparse.ArgumentParser(description="Trains every recipe of a setting and holds it against a floor.")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--recipes", nargs="+", help="these only")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... of each recipe")
    parser.add_argument(
        "--results", type=Path, default=Path("rayndom_home/learning"), metavar="FOLDER", help="where finished trainings are kept"
    )
    parser.add_argument("--data-root", type=Path, help="folder of the data sets")
    parser.add_argument("--table", action="store_true", help="train nothing, print what is there")
    options = parser.parse_args(arguments)
    names = options.recipes or [name for setting in options.settings for name in recipes_of(setting)]
    unknown = set(names) - set(list_recipes())
    if unknown:
        parser.error(f"no recipe {', '.join(sorted(unknown))}")
    if not options.table:
        for seed, name in itertools.product(range(options.seeds), names):
            for coupled in (True, False):
                run(name, seed, coupled, options.results, options.data_root)
    rows = table(names, read(options.results), range(options.seeds))
    print(markdown(rows))
    return int(any(row["missed"] for row in rows))


def recipes_of(setting: str) -> list[str]:
    """Return the names of the recipes that are listed for a setting, AT first because others are held against it."""
    names = [str(recipe) for recipe in listed_recipes() if recipe.setting == setting]
    return sorted(names, key=lambda name: (name != f"at_{setting}", name))


def experiment_of(name: str, seed: int, coupled: bool) -> ExperimentConfig | None:
    """Return the experiment of a recipe and seed; without coupling, None for what is no ensemble."""
    experiment = load_recipe(name, [f"--seed={seed}"]).experiment
    if coupled:
        return experiment
    flags = UNCOUPLED.get(experiment.training.objective.name)
    return None if flags is None else load_recipe(name, [*flags, f"--seed={seed}"]).experiment


def run(name: str, seed: int, coupled: bool, folder: Path, data_root: Path | None = None) -> None:
    """Train and measure one experiment unless its line is there already."""
    experiment = experiment_of(name, seed, coupled)
    if experiment is None or experiment.fingerprint in read(folder):
        return
    started = time.monotonic()
    splits = load_data(experiment.data, data_root)
    model = build_for(experiment, splits)
    record: dict[str, Any] = {"recipe": name, "seed": seed, "coupled": coupled, "fingerprint": experiment.fingerprint}
    try:
        outcome = fit(
            model, splits, experiment.threat_model, experiment.training, seed=seed, augmentation=experiment.data.training_augmentation()
        )
        said = {sentence for metrics in outcome.history for sentence in complaints(metrics).values()}
        record |= measured(model, splits.test, experiment) | {"said": sorted(said)}
    except TrainingDiverged as error:
        record |= {"clean": 0.0, "pgd_20": 0.0, "t1": 0.0, "members": [], "said": [str(error)]}
    record["seconds"] = round(time.monotonic() - started)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / RESULTS
    begun = path.exists() and not path.read_bytes().endswith(b"\n")  # a killed process left half a line
    with path.open("a") as file:
        file.write("\n" * begun + json.dumps(record) + "\n")
    print(f"{name}{'' if coupled else ' uncoupled'}, seed {seed}: clean {record['clean']:.1f}, T1 {record['t1']:.1f}", file=sys.stderr)


def measured(model: nn.Module, split: ArraySplit | StreamedSplit, experiment: ExperimentConfig) -> dict[str, Any]:
    """Return accuracies in percent of a trained model on test images."""
    accuracies: dict[str, Any] = {}
    for column, draws in (("pgd_20", 1), ("t1", 4)):
        settings = ValidationConfig(steps=20, num_draws=draws)
        result = validate(model, split, experiment.threat_model, experiment.training.attack, settings, seed=experiment.seed, batch_size=256)
        accuracies |= {"clean": 100 * result["validation/clean_accuracy"], column: 100 * result["validation/robust_accuracy"]}
    accuracies["members"] = [100 * accuracy(member, split) for member in model.members] if isinstance(model, Ensemble) else []
    return accuracies


@torch.no_grad()
def accuracy(network: nn.Module, split: ArraySplit | StreamedSplit) -> float:
    """Return the clean accuracy of one network at its draw, in [0,1]."""
    with mode(network, "eval"):
        correct = sum((network(x_BCHW).argmax(1) == y_B).sum().item() for x_BCHW, y_B in evaluation_batches(split, 256, 0, 1))
    return correct / len(split)


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the finished trainings by fingerprint; a line that a killed process left half written does not count."""
    found: dict[str, dict[str, Any]] = {}
    path = folder / RESULTS
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[record["fingerprint"]] = record
    return found


def table(names: Iterable[str], known: Mapping[str, dict[str, Any]], seeds: Iterable[int]) -> list[dict[str, Any]]:
    """Return a row per recipe that has been trained: means over its seeds, its floors, and which it missed."""
    seeds = list(seeds)

    def records(name: str, coupled: bool = True) -> list[dict[str, Any]]:
        experiments = [experiment_of(name, seed, coupled) for seed in seeds]
        return [known[each.fingerprint] for each in experiments if each is not None and each.fingerprint in known]

    rows = []
    for name in names:
        found = records(name)
        if not found:
            continue
        row: dict[str, Any] = {"recipe": name, "seeds": len(found), "said": sorted({text for each in found for text in each["said"]})}
        row |= {column: mean_and_error([each[column] for each in found]) for column in ("clean", "pgd_20", "t1", "seconds")}
        if all(each["members"] for each in found):
            row["members"] = [mean_and_error(values) for values in zip(*(each["members"] for each in found), strict=True)]
        row["floors"] = floors(
            name, row, [each["t1"] for each in records(name, coupled=False)], [each["clean"] for each in records(at(name))]
        )
        row["missed"] = [text for text, (value, error), floor in row["floors"] if value < floor - 2 * error]
        rows.append(row)
    return rows


def at(name: str) -> str:
    """Return the name of adversarial training in a recipe's setting."""
    return f"at_{next(setting for setting in SETTINGS if setting in name)}"


def floors(name: str, row: Mapping[str, Any], uncoupled_t1: list[float], at_clean: list[float]) -> list[tuple[str, Any, float]]:
    """Return (what, (mean, standard error), floor) of all floors of a row for which there is a measurement."""
    found: list[tuple[str, Any, float]] = []
    if "fashion_mnist" in name:
        if at_clean:
            found.append(("clean", row["clean"], statistics.mean(at_clean) - BELOW_AT))
        return found
    found.append(("clean", row["clean"], CLEAN_FLOOR))
    found += [(f"member {index}", member, MEMBER_FLOOR) for index, member in enumerate(row.get("members", ()))]
    if uncoupled_t1:
        (value, error), (without, error_without) = row["t1"], mean_and_error(uncoupled_t1)
        share = (value + without) / 200
        of_images = 100 * math.sqrt(2 * share * (1 - share) / DIGITS_TEST_IMAGES)
        found.append(("T1", (value, math.hypot(error, error_without, of_images)), without))
    return found


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error; that of one value is taken as 0."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return statistics.mean(values), error


def markdown(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return rows as a table."""
    lines = ["| recipe | seeds | clean | PGD-20 | T1 | members, clean | floors | | seconds |", "|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        members = " / ".join(f"{value:.1f}" for value, _ in row.get("members", ()))
        described = ", ".join(f"{text} {floor:.1f}" for text, _, floor in row["floors"] if not text.startswith("member"))
        verdict = f"missed: {', '.join(row['missed'])}" if row["missed"] else "held"
        numbers = " | ".join(f"{row[column][0]:.1f}" for column in ("clean", "pgd_20", "t1"))
        lines.append(f"| `{row['recipe']}` | {row['seeds']} | {numbers} | {members} | {described} | {verdict} | {row['seconds'][0]:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
