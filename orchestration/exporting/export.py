"""Exporting a trained model: a folder that loads in three lines without Ray or MLflow, and that is checked before it counts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from models.errors import UserError
from models.files import is_unfinished, whole_file, write_text
from models.randomness import is_randomized
from models.weights import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, check_weights, load_pretrained, read_config
from orchestration import console
from orchestration.single_process import only_writer
from orchestration.trained_models.contents import same_weights
from orchestration.trained_models.targets import Target
from orchestration.training.card import model_card


class ExportCheckFailed(RuntimeError):
    """An exported model does not behave as the one that was trained."""


def export_target(target: Target, destination: Path, *, replace: bool = False) -> Path:
    """Copy a trained model to `destination` and check that it loads, predicts, and is as random as it should be.

    Args:
        target: what to export.
        destination: a folder; created, or one that holds an earlier export of the same model.
        replace: an exported model that is another one.

    Raises:
        UserError: the destination holds something else, or another process exports to it.
        ExportCheckFailed: the exported model fails its check.
    """
    _check_place(target, destination, replace)
    check_weights(target.folder)
    with only_writer(destination, f"the export to {destination}"):
        other = _check_place(target, destination, replace)  # another process may have exported while this one waited
        if other is not None:
            console.say(f"replacing {other} in {destination}")
        for name in (WEIGHTS_FILE, CONFIG_FILE, CARD_FILE):
            with open(target.folder / name, "rb") as source, whole_file(destination / name) as copy:
                shutil.copyfileobj(source, copy)
        check_export(destination)
    return destination


def _check_place(target: Target, destination: Path, replace: bool) -> str | None:
    """Return what other model a destination holds, None if it holds none.

    Raises:
        UserError: it holds something that is not to be replaced.
    """
    if not destination.exists():
        return None
    if not destination.is_dir():
        raise UserError(f"{destination} is a file; choose another folder")
    if not (destination / CONFIG_FILE).is_file():
        if all(_begun(path) for path in destination.iterdir()):
            return None
        raise UserError(f"{destination} is not empty and holds no earlier export; choose another folder")
    try:
        details = read_config(destination)["details"]
    except UserError as error:
        raise UserError(f"{destination} holds something else than an exported model ({error}); choose another folder") from None
    if same_weights(destination, target.folder):
        return None
    experiment = details.get("experiment")
    name = f"the model {experiment['name']}" if isinstance(experiment, dict) and experiment.get("name") else "a model"
    other = f"{name} ({details['fingerprint']})" if details.get("fingerprint") else name
    if not replace:
        raise UserError(f"{destination} holds {other}, not the model of {target.folder}; choose another folder, or replace it with --force")
    return other


def _begun(path: Path) -> bool:
    """Whether a file is left of an export that was killed before its config.json was written."""
    return path.name == WEIGHTS_FILE or is_unfinished(path)


def record_evaluation(folder: Path, target: Target, evaluation: dict[str, Any]) -> None:
    """Write an evaluation into the card and the config of an exported folder."""
    config = read_config(folder)
    details = config.setdefault("details", {})
    details["evaluation"] = evaluation
    write_text(folder / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
    if target.experiment is not None:
        card = model_card(target.experiment, details["training"], details["class_names"], evaluation.get("markdown"))
        write_text(folder / CARD_FILE, card)


def check_export(folder: Path) -> None:
    """Load the exported model and predict: two forwards of a randomized model must differ, those of others must not.

    Raises:
        ExportCheckFailed: they do not, or the outputs are not finite.
    """
    model = load_pretrained(folder)
    shape = read_config(folder)["model"]["image_shape"]
    x_BCHW = torch.rand((8, *shape), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = [model(x_BCHW) for _ in range(8)]
    if not all(output.isfinite().all() for output in outputs):
        raise ExportCheckFailed(f"the model in {folder} puts out values that are not finite")
    differs = any(not torch.equal(outputs[0], output) for output in outputs[1:])
    if differs != is_randomized(model):
        expected = "differ" if is_randomized(model) else "agree"
        raise ExportCheckFailed(f"two forwards of the model in {folder} should {expected}, and do not")
