"""Parts of a network by name, as a configuration names them: which tensors they hold, and holding their parameters as they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from models.errors import UserError, nearest


def tensors_of(parts: Sequence[str], names: Iterable[str], field: str) -> set[str]:
    """Return those of a network's tensors that belong to the named parts.

    Args:
        parts: names of tensors, or how they begin up to a dot (layers, blocks); `backbone.` may be left out.
        names: of all tensors.
        field: of the configuration, for the error.

    Raises:
        UserError: a part holds none of them.
    """
    known = list(names)
    found: set[str] = set()
    for asked in parts:
        held = {name for name in known if any(_begins(each, asked) for each in (name, name.removeprefix("backbone.")))}
        if not held:
            layers = {name.rpartition(".")[0].removeprefix("backbone.") for name in known}
            close = nearest(asked[:300], sorted(layers))
            hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
            raise UserError(f"{field}: {asked!r:.300} is no tensor and no part of the network.{hint}")
        found |= held
    return found


def freeze(network: nn.Module, parts: Sequence[str], field: str = "training.freeze") -> None:
    """Let the parameters of the named parts take no gradient, in place; see `tensors_of`. Running statistics go on as elsewhere.

    Raises:
        UserError: a part has no parameter, or nothing is left to train.
    """
    if not parts:
        return
    parameters = dict(network.named_parameters())
    for name in tensors_of(parts, parameters, field):
        parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise UserError(f"{field}: nothing is left to train")


def _begins(name: str, asked: str) -> bool:
    return name == asked or name.startswith(f"{asked.rstrip('.')}.")
