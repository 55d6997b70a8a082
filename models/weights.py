"""Saving and loading a model as a folder: model.safetensors, config.json, README.md. Needs neither Ray nor MLflow."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from models.classifier import ModelSpec
from models.errors import UserError
from models.file_content import check_ordinary, sha256_of
from models.files import whole_file, write_text
from models.json_text import first_problem, read_json
from models.randomness import ResampleOnForward, is_randomized
from models.registry import build_from_spec, defence_model

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
CARD_FILE = "README.md"
FORMAT_VERSION = 1
DIGEST = "weights_sha256"
"""Key of config.json: the SHA-256 of model.safetensors, as `sha256sum` prints it."""

_logger = logging.getLogger(__name__)


def save_pretrained(model: nn.Module, folder: str | Path, *, card: str | None = None, details: dict[str, Any] | None = None) -> Path:
    """Write `model` to `folder` (created if missing; files of an earlier save are replaced one by one, atomically).

    Args:
        model: from `build_model`, or loaded by `load_pretrained`. Draws and streams are not written: they are not weights.
        folder: where to.
        card: text of README.md; None: a short one.
        details: JSON-able facts kept in config.json under `details` (training configuration, metrics, provenance).

    Raises:
        ValueError: the model was not built by `build_model`.
    """
    model = model.model if isinstance(model, ResampleOnForward) else model
    spec = getattr(model, "spec", None)
    if spec is None:
        raise ValueError("the model has no record of how it was built: build it with models.build_model")
    folder = Path(folder)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    weights = save(state, metadata={"format": "pt"})
    config = {
        "format_version": FORMAT_VERSION,
        "library": "rayndom",
        "randomized": is_randomized(model),
        DIGEST: hashlib.sha256(weights).hexdigest(),
        "model": spec.model_dump(mode="json"),
        "details": details or {},
    }
    # Written through a file of ours: the library's own writer makes files that only their owner can read.
    with whole_file(folder / WEIGHTS_FILE) as file:
        file.write(weights)
    write_text(folder / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
    text = card if card is not None else f"# {spec.defence} on {spec.backbone}\n\nSaved by Rayndom; see config.json.\n"
    write_text(folder / CARD_FILE, text)
    return folder


def load_pretrained(folder: str | Path, *, resample_on_forward: bool = True, seed: int = 0) -> nn.Module:
    """Load a model that `save_pretrained` wrote, in eval mode.

    Args:
        folder: the folder.
        resample_on_forward: a randomized model comes wrapped in `ResampleOnForward`, so that each call uses a new draw; False: the bare
            model, whose draws the caller takes with `resample`.
        seed: of the streams of draws.

    Raises:
        UserError: the folder, its config or its weights are missing, unreadable, or not those that were saved together.
    """
    folder = Path(folder)
    spec = _model_section(folder)
    parameters = defence_model(spec.defence).config.stored_earlier(spec.defence_parameters)
    model = build_from_spec(spec.model_copy(update={"defence_parameters": parameters}), seed=seed)
    path = folder / WEIGHTS_FILE
    check_ordinary(path)
    try:
        state = load_file(path)
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot read the weights {path}: {error}") from error
    strange = not_finite(state)
    if strange is not None:
        raise UserError(f"the weights {path} are damaged: {strange} holds values that are not finite")
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise UserError(f"the weights {path} do not fit the model of {CONFIG_FILE}: {error}") from error
    check_weights(folder)
    model.eval()
    if resample_on_forward and is_randomized(model):
        wrapped = ResampleOnForward(model)
        wrapped.eval()
        return wrapped
    return model


def with_other_parameters(folder: str | Path, parameters: Mapping[str, Any], destination: str | Path) -> Path:
    """Write the weights of an exported model as a model whose defence has other parameters, e.g. another law of its draws; return where.

    Args:
        folder: the model. parameters: of its defence that change. destination: the new folder.

    Raises:
        UserError: no such parameter or value, or the weights do not fit the network that it gives.
    """
    model = load_pretrained(folder, resample_on_forward=False)
    assert isinstance(model.spec, ModelSpec)
    changed = build_from_spec(model.spec.model_copy(update={"defence_parameters": {**model.spec.defence_parameters, **parameters}}))
    try:
        changed.load_state_dict(model.state_dict(), strict=True)
    except RuntimeError as error:
        raise UserError(f"the weights of {folder} do not fit a network with {dict(parameters)}: {error}") from error
    details = read_config(folder).get("details", {})
    return save_pretrained(changed, destination, details={**details, "weights_of": str(Path(folder).name), "changed": dict(parameters)})


def check_weights(folder: Path) -> str:
    """Check that the weights of an exported model are those that its config.json was written with; return the SHA-256 of their file.

    An export of an earlier version does not say which those are: it is remarked on, once.

    Raises:
        UserError: they are others, or cannot be read.
    """
    path = folder / WEIGHTS_FILE
    found, expected = sha256_of(path), read_config(folder).get(DIGEST)
    if expected is None:
        _remark_unchecked(folder)
    elif found != expected:
        raise UserError(
            f"the weights {path} are not those that {CONFIG_FILE} was written with: their SHA-256 is {found}, {DIGEST} says "
            f"{str(expected)[:80]}. They were changed or damaged, or belong to another model"
        )
    return found


@functools.lru_cache(maxsize=1000)
def _remark_unchecked(folder: Path) -> None:
    """Say once for each folder that its weights cannot be checked."""
    _logger.warning("%s was saved by an earlier version, without %s: that the weights are its own cannot be checked", folder, DIGEST)


def not_finite(state: Mapping[str, torch.Tensor]) -> str | None:
    """Return the name of a tensor that holds an infinite value or none at all (NaN), None if all are finite."""
    return next((name for name, tensor in state.items() if not bool(tensor.isfinite().all())), None)


def read_config(folder: str | Path) -> dict[str, Any]:
    """Return config.json of an exported folder as a dictionary; a missing or broken one is a `UserError`."""
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{Path(folder)} is not an exported model: it has no file {CONFIG_FILE}")
    config = read_json(path)
    if config.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path} has format_version {config.get('format_version')!r}; this version reads {FORMAT_VERSION}")
    details = config.setdefault("details", {})
    if not isinstance(config.get("model"), dict) or not isinstance(details, dict):
        raise UserError(f"{path} is damaged: `model` and `details` should be objects")
    return config


def _model_section(folder: Path) -> ModelSpec:
    try:
        return ModelSpec.model_validate(read_config(folder)["model"])
    except ValidationError as error:
        raise UserError(f"{folder / CONFIG_FILE} does not describe a model: model.{first_problem(error)}") from None
