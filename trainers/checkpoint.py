"""The resumable state of a run and how it is written: atomically, into a folder that also holds the model for use.

A checkpoint folder holds `training.pt` (weights, optimizer, streams, draws, progress; loaded with `weights_only=True`).
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

from models.errors import UserError
from models.files import whole_file
from trainers.reporting import are_metrics

STATE_FILE = "training.pt"
START_AGAIN = "Delete the folder to train from the beginning."

_PARTS: dict[str, Any] = {
    "finished_epochs": int,
    "seed": int,
    "weights": dict,
    "optimizer": dict,
    "history": list,
    "best": (dict, type(None)),
    "validations_since_best": int,
    "ended": bool,
}
"""What a training's state is made of."""


def write_state(state: dict[str, Any], folder: Path) -> Path:
    """Write `state` to `folder`. A full disk or a kill leaves the previous file as it was.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    path = folder / STATE_FILE
    try:
        with whole_file(path) as file:
            torch.save(state, file)
    except RuntimeError as error:
        # PyTorch's zip writer reports a full disk as a RuntimeError.
        raise OSError(f"cannot write the checkpoint {path}: {error}") from error
    return path


def read_state(folder: Path) -> dict[str, Any]:
    """Read what `write_state` wrote.

    Raises:
        UserError: the file is missing, truncated or not a checkpoint.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        raise UserError(f"no checkpoint in {folder}: {STATE_FILE} is missing")
    try:
        if not zipfile.is_zipfile(path):
            raise EOFError("it is not whole")
        state = torch.load(path, map_location="cpu", weights_only=True)
    # A file that was changed after it was written makes PyTorch raise nearly anything.
    except Exception as error:
        first = str(error).strip().splitlines()
        reason = first[0] if first else type(error).__name__
        raise UserError(f"cannot read the checkpoint {path}: {reason[:300]}. {START_AGAIN}") from error
    problem = _problem_with(state)
    if problem is not None:
        raise UserError(f"the checkpoint {path} is damaged: {problem}. {START_AGAIN}")
    return state


def _problem_with(state: Any) -> str | None:
    """Return what keeps this from being a state that `write_state` was given by a training, None if nothing does."""
    if not isinstance(state, dict):
        return f"it holds a {type(state).__name__} instead of named parts"
    for name, kind in _PARTS.items():
        if name not in state:
            return f"{name!r} is missing"
        if not isinstance(state[name], kind) or (isinstance(state[name], bool) and kind is int):
            return f"{name!r} is a {type(state[name]).__name__}"
    epochs, best = state["finished_epochs"], state["best"]
    if not all(are_metrics(metrics) for metrics in state["history"]):
        return "'history' should hold the metrics of each epoch, numbers by name"
    if epochs < 1 or epochs != len(state["history"]):
        return f"'finished_epochs' is {epochs}, but 'history' holds {len(state['history'])} epochs"
    if state["validations_since_best"] < 0:
        return "'validations_since_best' is negative"
    average = state.get("average")
    if average is not None and not (isinstance(average, dict) and type(average.get("updates")) is int and average["updates"] >= 0):
        return "'average' is not an average of weights and how many it is of"
    for name, part in (("best", best), ("weights", state), ("average", average)):
        weights = None if part is None else part.get("weights")
        if part is not None and not (isinstance(weights, dict) and all(isinstance(each, torch.Tensor) for each in weights.values())):
            return f"the weights of {name!r} are not named tensors"
        strange = next((key for key, tensor in (weights or {}).items() if not bool(tensor.isfinite().all())), None)
        if strange is not None:
            return f"the weight {strange} holds values that are not finite"
    if best is not None:
        score, epoch = best.get("score"), best.get("epoch")
        if not (isinstance(score, list) and len(score) == 2 and all(isinstance(each, int | float) for each in score)):
            return "the score of 'best' is not two numbers"
        if not isinstance(epoch, int) or not 1 <= epoch <= epochs or not are_metrics(best.get("metrics")):
            return "'best' names no epoch that is finished, or no metrics"
    if not {"state", "param_groups"} <= set(state["optimizer"]):
        return "'optimizer' is not the state of an optimizer"
    return None
