"""Which function a model computes: more than its weights, for two models of equal weights may differ in a plain attribute or in their code.

What counts: the answers on fixed images under fixed draws and seeds, the class of every module, its plain attributes, and the source of
classes and functions that come with neither PyTorch nor this project (of those the answers tell). Where one of these differs although the
function is the same, an evaluation measures again, which costs time and never truth.
"""

from __future__ import annotations

import hashlib
import inspect
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from analysis.attacked_model.draws import ONLY_DRAW, seeded_draws, set_draw
from analysis.attacked_model.plain_model import logits_of, parameter_like
from analysis.attacked_model.state_guard import restored_state
from analysis.fingerprints import tensor_bytes, value_text
from models.errors import UserError
from models.modes import mode
from models.randomness import is_randomized, random_sites

_NUM_IMAGES, _NUM_DRAWS = 4, 3
_STEPS = 100  # answers are compared in hundredths of the largest: far above what another number of threads changes
_KNOWN_CODE = ("torch", "torchvision", "timm", "models")
_BOOKKEEPING = frozenset(vars(nn.Module())) | {"stream", "draw_key", "stream_name", "_on_host"}


@torch.no_grad()
def identity_hash(model: nn.Module, image_shape: tuple[int, ...]) -> str:
    """Return a hash of what `model` computes in eval mode, beside its weights; the model is as before afterwards.

    Args:
        image_shape: (C, H, W).
    """
    generator = torch.Generator().manual_seed(0)
    like = parameter_like(model, torch.zeros(()))
    x_BCHW = torch.rand((_NUM_IMAGES, *image_shape), generator=generator).to(like)
    draws = seeded_draws(_NUM_DRAWS, 0, "identity") if is_randomized(model) else (ONLY_DRAW,)
    answers = []
    with restored_state(model), mode(model, "eval"):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002 - models may draw from the global generator
        torch.manual_seed(0)
        before = _attributes(model)
        for draw in draws:
            set_draw(model, draw)
            answers.append(_in_steps(_answer(model, x_BCHW)))
        after = _attributes(model)
    digest = hashlib.blake2b(digest_size=16)
    for answer in answers:
        digest.update(answer)
    for name, text in before.items():
        if after.get(name) == text:  # a counter of calls says nothing about the function
            digest.update(f"{name}={text}\n".encode())
    return digest.hexdigest()


def _answer(model: nn.Module, x_BCHW: Tensor) -> Any:
    try:
        return model(x_BCHW)
    except (Exception, SystemExit) as error:
        text = str(error).strip().partition("\n")[0][:300]
        raise UserError(f"the model answers the test images, and raises on images of noise: {type(error).__name__}: {text}") from error


def _in_steps(output: Any) -> bytes:
    """Return logits as whole steps of the largest of them."""
    values = logits_of(output).double().nan_to_num(nan=2.0, posinf=1.5, neginf=-1.5)
    scale = values.abs().max().clamp_min(1e-300) if values.numel() else 1.0
    return tensor_bytes((values / scale * _STEPS).round().to(torch.int16))


def _attributes(model: nn.Module) -> dict[str, str]:
    """Return the class, the foreign source and the plain attributes of every module as text, by dotted name."""
    draws = {f"{name}.{draw}" if name else draw for name, site in random_sites(model) for draw in site.draw_names}
    persistent = set(model.state_dict(keep_vars=True))
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        found[f"{name}:class"] = _code(type(module))
        for attribute, value in vars(module).items():
            if attribute not in _BOOKKEEPING:
                found[f"{name}:{attribute}"] = _text(value)
    for name, buffer in model.named_buffers():
        if name not in persistent and name not in draws:
            found[f"{name}:buffer"] = _text(buffer)
    return found


def _text(value: Any) -> str:
    """Return a value as text that equal values share, without addresses."""
    return value_text(value, _thing_text)


def _thing_text(value: Any) -> str:
    if inspect.isroutine(value) or inspect.isclass(value):
        cells = getattr(value, "__closure__", None) or ()
        return _code(value) + "".join(_text(cell.cell_contents) for cell in cells if not isinstance(cell.cell_contents, nn.Module))
    return type(value).__qualname__


def _code(thing: Any) -> str:
    """Return the name of a class or function, and its source where it is neither PyTorch's nor this project's."""
    module = getattr(thing, "__module__", None) or ""
    name = f"{module}.{getattr(thing, '__qualname__', type(thing).__qualname__)}"
    if module.partition(".")[0] in _KNOWN_CODE or inspect.isbuiltin(thing):
        return name
    try:
        return f"{name}\n{inspect.getsource(thing)}"
    except (OSError, TypeError):  # typed into an interpreter, or compiled: its code object says as much
        methods = vars(thing).values() if inspect.isclass(thing) else [thing]
        return name + "".join(each.__code__.co_code.hex() for each in methods if hasattr(each, "__code__"))
