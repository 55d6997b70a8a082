"""Weights from a file, read without executing code, and put into a network whose names they must meet.

`.safetensors` is read by that library, any other file by `torch.load(weights_only=True)`. Two habits are undone, nothing else is guessed:

* a checkpoint that holds its weights beside other things has them under `state_dict`, `model_state_dict`, `model` or `net`;
* wrappers leave `module.` (DataParallel), `_orig_mod.` (torch.compile), `model.` or `network.` (`as_random_model`) before every name: it is
  taken off where every name of the file has it and no name of the network. The weights of `as_random_model(network)` are the network's.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from models.errors import UserError, nearest
from models.file_content import existing_file
from models.forward_randomness import ForwardRandomness
from models.weights import not_finite

STATE_KEYS = ("state_dict", "model_state_dict", "model", "net")
PREFIXES = ("module.", "_orig_mod.", "model.", "network.")
_MOST_SHOWN = 5


def load_state(network: nn.Module, path: Path) -> None:
    """Put the weights of a file into a network, every name and every shape of it.

    Raises:
        UserError: the file cannot be read without executing code, or holds other names or shapes, or values that are not finite.
    """
    if isinstance(network, ForwardRandomness):
        network = network.network
    state = without_prefixes(read_state(path), network.state_dict())
    _check_names(state, network, path)
    strange = not_finite(state)
    if strange is not None:
        raise UserError(f"the weights {path} are damaged: {strange} holds values that are not finite")
    try:
        network.load_state_dict(state, strict=True)
    except (RuntimeError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"the weights {path} do not fit the network: {_one_line(error)}") from None


def read_state(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file of weights by name. No code of the file is executed.

    Raises:
        UserError: it is not there, or holds something else.
    """
    path = existing_file(path, "weights")
    if path.suffix == ".safetensors":
        try:
            state = load_file(path)
        except (OSError, SafetensorError, ValueError, RuntimeError) as error:
            raise UserError(f"cannot read the weights {path}: {_one_line(error)}") from None
        if not state:
            raise UserError(f"the weights {path} hold no tensor")
        return state
    if is_torchscript(path):
        raise UserError(
            f"{path} is a TorchScript program, not a file of weights: name it as the model itself, `rayndom evaluate {path.name}`"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"the weights {path} hold more than tensors, and reading that would execute code, so it is not read; "
            "save them with `torch.save(network.state_dict(), FILE)` or safetensors"
        ) from None
    except Exception as error:  # a damaged file fails in many ways: EOFError, KeyError, RuntimeError, ...
        raise UserError(f"cannot read the weights {path}: {type(error).__name__}: {_one_line(error)}") from None
    return _tensors_in(content, path)


def is_torchscript(path: Path) -> bool:
    """Return whether a file is an archive of `torch.jit.save`."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.partition("/")[2].startswith("code/") for name in archive.namelist())
    except (
        OSError,
        zipfile.BadZipFile,
        ValueError,
        RuntimeError,
    ):  # no archive, a damaged one, or one of a kind that `zipfile` does not know
        return False


def _tensors_in(content: Any, path: Path) -> dict[str, Tensor]:
    if _is_state(content):
        return dict(content)
    if isinstance(content, Mapping):
        found = [key for key in STATE_KEYS if _is_state(content.get(key))]
        if len(found) == 1:
            return dict(content[found[0]])
        if found:
            raise UserError(f"{path} holds several sets of weights ({', '.join(found)}): save the one that is meant in a file of its own")
        shown = ", ".join(str(key)[:60] for key in list(content)[:10])
        raise UserError(f"{path} holds {shown or 'nothing'}; weights must be at the top or under {', '.join(STATE_KEYS)}")
    raise UserError(f"{path} holds a {type(content).__name__}, not a dictionary of weights by name")


def _is_state(content: Any) -> bool:
    return isinstance(content, Mapping) and bool(content) and all(isinstance(value, Tensor) for value in content.values())


def without_prefixes(state: Mapping[str, Tensor], wanted: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors without what wrappers left before every name; `wanted`: the names of the network."""
    state = dict(state)
    while state:  # of no names all begin with whatever one likes
        prefix = next((each for each in PREFIXES if all(name.startswith(each) for name in state)), None)
        if prefix is None or any(name.startswith(prefix) for name in wanted):
            return state
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _check_names(state: Mapping[str, Tensor], network: nn.Module, path: Path) -> None:
    wanted = {name: value for name, value in network.state_dict().items() if isinstance(value, Tensor)}
    # Files written before PyTorch counted batches do not hold the count, which no answer depends on; PyTorch itself fills it in.
    missing = [name for name in wanted if name not in state and not name.endswith("num_batches_tracked")]
    strange = [name for name in state if name not in network.state_dict()]
    others = [
        f"{name} is {tuple(state[name].shape)}, the network's is {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in state and state[name].shape != value.shape
    ]
    said = []
    if missing:
        said.append(f"{len(missing)} of the network's {len(wanted)} names are not in the file: {_listed(missing, strange)}")
    if strange:
        said.append(f"{len(strange)} names of the file are not the network's: {_listed(strange, missing)}")
    if others:
        said.append("other shapes: " + "; ".join(others[:_MOST_SHOWN]) + (" ..." if len(others) > _MOST_SHOWN else ""))
    if said:
        raise UserError(f"the weights {path} do not fit the network: {'. '.join(said)}")


def _listed(names: list[str], known: list[str]) -> str:
    shown = []
    for name in names[:_MOST_SHOWN]:
        close = nearest(name, known, count=1)
        shown.append(f"{name} (near: {close[0]})" if close else name)
    return ", ".join(shown) + (" ..." if len(names) > _MOST_SHOWN else "")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]
