"""Everything that trains, evaluates, resumes and loads, on the pretend accelerator and on the CPU, side by side; a line of JSON for each.

    python -m tests.devices.conformance training [NAME ...]
    python -m tests.devices.conformance evaluation CASE NORM [ATTACK ...]

It is a process of its own, because the pretend accelerator changes PyTorch for good. What is run is found in the registries.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast, get_args

import torch

from analysis.attacks.registry import attacks
from analysis.evaluate import evaluate
from analysis.evaluation.protocols import Scoring
from analysis.evaluation.studies import StudyName, StudySettings
from analysis.evaluation.suites import AttackItem, Suite
from analysis.result import EvaluationResult
from models.randomness import seed_streams
from models.threat_model import Norm, ThreatModel
from models.weights import load_pretrained, save_pretrained
from orchestration.experiment import ExperimentConfig
from orchestration.recipes.loading import load_recipe
from orchestration.recipes.names import listed_recipes
from orchestration.training.preparation import build_for
from tests.contracts.cases import build_case, images, labels
from tests.devices.pretend_accelerator import LEDGER, NAME, PretendDevice, register
from trainers.data import ArraySplit, Splits, load_data
from trainers.fit import TrainingLoop
from trainers.reporting import SilentReporter

TRAINING_IMAGES, OTHER_IMAGES = 4, 4
SMALL = (
    "--training.epochs=2",
    "--training.batch_size=4",
    "--training.attack.steps=2",
    "--training.validation.steps=2",
    "--training.validation.num_draws=2",
    "--training.precision=fp32",
)


def recipes() -> list[str]:
    """Return every recipe for the digits: each method, with each of its variants."""
    return [str(recipe) for recipe in listed_recipes() if recipe.setting == "digits"]


def small(recipe: str) -> ExperimentConfig:
    """Return the experiment of a recipe, for a training of four steps."""
    return load_recipe(recipe, SMALL).experiment


def few_images(experiment: ExperimentConfig) -> Splits:
    """Return a few images of the experiment's data, on the CPU."""
    splits = load_data(experiment.data, None, torch.device("cpu"))
    sizes = (TRAINING_IMAGES, OTHER_IMAGES, OTHER_IMAGES)
    return Splits(*(split.subset(range(size)) for split, size in zip((splits.train, splits.validation, splits.test), sizes, strict=True)))


def loop_on(device: str, experiment: ExperimentConfig, splits: Splits) -> TrainingLoop:
    """Return a training before its first step."""
    assert all(isinstance(split, ArraySplit) for split in (splits.train, splits.validation, splits.test))
    moved = Splits(*(split.to(device) for split in (splits.train, splits.validation, splits.test)))  # type: ignore[union-attr] # checked
    return TrainingLoop(
        build_for(experiment, splits),
        moved,
        experiment.threat_model,
        experiment.training,
        seed=experiment.seed,
        device=torch.device(device),
        augmentation=experiment.data.training_augmentation(),
        reporter=SilentReporter(),
    )


def train(device: str, experiment: ExperimentConfig, splits: Splits) -> dict[str, Any]:
    """Take an epoch of one step, and another one after a resume from it; export and load; return numbers, and what it cost."""
    loop = loop_on(device, experiment, splits)
    ((x_BCHW, y_B),) = loop.batches(0)
    LEDGER.clear()
    loss = loop.train_step(0, x_BCHW, y_B)["loss"]
    step = costs()
    metrics = loop.validate(loop.held_out)
    validation = costs()
    loop.finished_epochs = 1
    loop.measure({})
    with TemporaryDirectory() as folder:
        loop.save(Path(folder))
        again = loop_on(device, experiment, splits)
        outcome = again.run(Path(folder))
        save_pretrained(again.model, folder)
        loaded = load_pretrained(folder, resample_on_forward=False).to(device).eval()
    seed_streams(loaded, 0)
    with torch.no_grad():
        answers = loaded(x_BCHW).cpu()
    return {
        "loss": loss.item(),
        "metrics": metrics,
        "resumed": {name: value for name, value in outcome.history[-1].items() if not name.startswith(("time/", "memory/"))},
        "weights": {name: value.cpu().clone() for name, value in again.model.state_dict().items()},
        "answers": answers,
        "step": step,
        "validation": validation,
    }


def costs() -> dict[str, dict[str, int]]:
    """Return what was read back and copied since the last call."""
    found = {"reads": dict(LEDGER.reads), "copies": dict(LEDGER.copies)}
    LEDGER.clear()
    return found


def compare_training(recipe: str) -> dict[str, Any]:
    """Train a recipe on both devices; return by how much they differ, and what the accelerator's training cost."""
    experiment = small(recipe)
    splits = few_images(experiment)
    expected = train("cpu", experiment, splits)
    with PretendDevice():
        found = train(NAME, experiment, splits)
    names = expected["weights"]
    return {
        "case": recipe,
        "loss": [expected["loss"], found["loss"]],
        "metrics": [expected["metrics"], found["metrics"]],
        "resumed": [expected["resumed"], found["resumed"]],
        "weights": max((names[name].double() - value.double()).abs().max().item() for name, value in found["weights"].items()),
        "answers": (expected["answers"] - found["answers"]).abs().max().item() / expected["answers"].abs().max().item(),
        "step": found["step"],
        "validation": found["validation"],
    }


SIZES = {"steps": 3, "num_queries": 5, "num_points": 3, "num_targets": 2, "rounds": 2, "updates": 3, "num_directions": 4, "num_frozen": 2}
NEED_MORE = ("transfer_surrogate",)
"""Attacks that cannot run without an argument of the user's."""
TORCHATTACKS = "torchattacks_pgd"
"""One of the library's attacks stands for all: they share one guard."""


def short_attacks(norm: Norm, names: Sequence[str]) -> list[AttackItem]:
    """Return the named attacks for a norm, or every one of the registry, as short as it gets; projected gradient descent under every
    protocol."""
    items = []
    for name, entry in attacks().items():
        missing = entry.requires is not None and importlib.util.find_spec(entry.requires) is None
        others = name.startswith("torchattacks") and name != TORCHATTACKS
        if norm not in entry.norms or missing or others or name in NEED_MORE or (names and name not in names):
            continue
        parameters = {field: SIZES[field] for field in entry.parameters.model_fields if field in SIZES}
        protocols = ("T0", "T1", "T2", "T3", "T4") if name == "pgd" else ("T1",)
        models = "randomized" if name.startswith("transfer_") else "all"  # a deterministic model is its own static one
        items.append(AttackItem(name=name, attack=name, parameters=parameters, models=models, protocols=protocols, num_draws=2))
    return items


def short_suite(norm: Norm, names: Sequence[str]) -> Suite:
    """Return a suite of the named attacks, or of all attacks and all studies, each as short as it gets."""
    sizes = ("num_samples", "num_searched", "num_random_points", "num_votes", "num_gradients", "num_tested")
    studies = StudySettings(
        names=tuple(name for name in get_args(StudyName) if name != "calibration"),  # it is of toys, which stay on the CPU
        steps=2,
        num_draws=2,
        max_steps=4,
        max_draws=4,
        **dict.fromkeys(sizes, 3),
    )
    scoring = Scoring(
        num_selection_draws=2, num_evaluation_draws=3, num_known_draws=2, num_averaged_draws=2, num_averaged_groups=1, num_retries=2
    )
    return Suite(name="short", scoring=scoring, attacks=tuple(short_attacks(norm, names)), studies=None if names else studies)


def compare_evaluation(case: str, norm: Norm, names: Sequence[str]) -> dict[str, Any]:
    """Evaluate a model on both devices; return the rows of both results, and what the evaluation cost."""
    threat_model = ThreatModel(norm=norm, epsilon=0.05 if norm == "linf" else 0.5)
    suite = short_suite(norm, names)

    def result(device: str) -> EvaluationResult:
        LEDGER.clear()
        return evaluate(build_case(case).to(device), images(4), labels(4), suite, threat_model=threat_model)

    expected = result("cpu")
    with PretendDevice():
        found = result(NAME)
        cost = costs()
    rows = [{f"{row.attack} {row.protocol}": row.estimate.value for row in each.rows} for each in (expected, found)]
    return {"case": f"{case} {norm}", "rows": rows, **cost}


def main(arguments: Sequence[str]) -> None:
    """Run what the arguments name and print a line for each."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    register()
    kind, *names = arguments
    if kind == "training":
        for name in names or recipes():
            print(json.dumps(compare_training(name)), flush=True)
    else:
        case, norm, *chosen = names
        assert norm in get_args(Norm)
        print(json.dumps(compare_evaluation(case, cast(Norm, norm), chosen)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
