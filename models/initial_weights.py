"""Beginning with given weights: which tensors of a state dict go where in a network, and what is said of it.

A name is looked for as it is, below `backbone.`, and as the backbone translates the names of other libraries (`Backbone.names_elsewhere`).
Where a defence has put a layer of its own in the place of one with a `weight`, that weight starts the mean of a random one (`mu`), and
that of a batch normalization the `bn` among those of a random normalization.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from models.classifier import Classifier
from models.errors import UserError
from models.external.state_files import without_prefixes
from models.network_parts import tensors_of
from models.weights import not_finite

SCHEMES = ("models:/", "timm:")
"""How names of weights begin that are no paths."""
_ENDINGS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar")
_MOST_SHOWN = 5
_COUNT = "num_batches_tracked"
"""Counts that no answer depends on; files of some libraries lack them."""


@dataclass(frozen=True)
class WeightsReport:
    """What became of given weights.

    Attributes:
        source: how they were named. sha256: of the file that held them.
        loaded: tensors of the network that have the given values.
        reinitialized: tensors of the network that have fresh values: nothing was given for them, or that was asked for.
        skipped: given tensors that the network has no place for, or that were not asked for.
        remark: what else is to be known; empty: nothing.
    """

    source: str
    sha256: str
    loaded: tuple[str, ...]
    reinitialized: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    remark: str = ""

    def sentence(self) -> str:
        """Return the report in one line."""
        total = len(self.loaded) + len(self.reinitialized)
        parts = [f"{len(self.loaded)} of {total} tensors from {self.source} (SHA-256 {self.sha256[:12]}...)"]
        for what, names in (("fresh", self.reinitialized), ("not used of the file", self.skipped)):
            if names:
                parts.append(f"{what}: {_listed(names)}")
        return "; ".join([*parts, *([self.remark] if self.remark else [])])

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON types."""
        return {
            "source": self.source,
            "sha256": self.sha256,
            "loaded": len(self.loaded),
            "reinitialized": list(self.reinitialized),
            "skipped": list(self.skipped),
            "remark": self.remark,
            "sentence": self.sentence(),
        }


def is_path(name: str) -> bool:
    """Return whether weights are named by a path: with a slash or a file's ending; other names are those of runs and recipes."""
    return "/" in name or name.endswith(_ENDINGS) or name.startswith((".", "~"))


@dataclass
class _Match:
    """Source name and tensor for each tensor of the network that is given."""

    given: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)


@torch.no_grad()
def begin_with(
    network: nn.Module, state: Mapping[str, Tensor], *, source: str, sha256: str = "", reinitialize: Sequence[str] = (), remark: str = ""
) -> WeightsReport:
    """Put given weights into a network, whatever of it they have a value for; the rest keeps what it has.

    Args:
        network: from `build_model`; changed in place, or not at all.
        state: tensors by name, in the words of this package, of torchvision, timm or RobustBench.
        source, sha256, remark: for the report and errors.
        reinitialize: tensors of the network that keep their fresh values: names, or how names begin, `backbone.` left out or not.

    Raises:
        UserError: no name fits, a shape differs where nothing is asked to stay fresh, a value is not finite, or `reinitialize` names
            nothing.
    """
    wanted = {name: value for name, value in network.state_dict().items() if isinstance(value, Tensor)}
    fresh = tensors_of(reinitialize, wanted, "training.reinitialize")
    state = without_prefixes(state, wanted)
    match = _match(network, wanted, state)
    asked = [name for name in match.given if name in fresh]
    match.skipped += [match.given.pop(name) for name in asked]
    if not match.given:
        raise UserError(
            f"initial weights {source}: no name in it is one of the network's. It holds {_listed(tuple(state))}; the network has "
            f"{_listed(tuple(wanted))}"
        )
    _check_shapes(match.given, state, wanted, source)
    strange = not_finite({name: state[given] for name, given in match.given.items()})
    if strange is not None:
        raise UserError(f"initial weights {source}: {match.given[strange]} holds values that are not finite")
    for name, given in match.given.items():
        wanted[name].copy_(state[given])
    reinitialized = tuple(name for name in wanted if name not in match.given and not (name.endswith(_COUNT) and name not in fresh))
    skipped = tuple(name for name in match.skipped if not name.endswith(_COUNT))
    return WeightsReport(source, sha256, tuple(match.given), reinitialized, skipped, remark)


def _match(network: nn.Module, wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> _Match:
    match = _Match()
    for given in state:
        name = next((name for name in _candidates(network, given) if name in wanted), None)
        if name is None:
            name = next(
                (name for name in _in_its_place(network, given) if name in wanted and wanted[name].shape == state[given].shape), None
            )
        if name is None or name in match.given:
            match.skipped.append(given)
        else:
            match.given[name] = given
    return match


def _candidates(network: nn.Module, given: str) -> list[str]:
    """Return what a given tensor may be called in the network, the most literal first."""
    if not isinstance(network, Classifier):
        return [given]
    names = network.backbone.names_elsewhere
    own = given.removeprefix("backbone.")
    translated = names.get(own) if isinstance(names, Mapping) else _translated(own, names)
    return [given, f"backbone.{own}", *([f"backbone.{translated}"] if translated else [])]


def _translated(name: str, rules: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _in_its_place(network: nn.Module, given: str) -> list[str]:
    """Return the names of what a defence has put where the tensor was."""
    found = []
    for name in _candidates(network, given):
        layer, _, leaf = name.rpartition(".")
        found += [f"{layer}.branches.bn.{leaf}", *([f"{layer}.mu"] if leaf == "weight" else [])]
    return found


def _check_shapes(given: Mapping[str, str], state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: str) -> None:
    others = [name for name, key in given.items() if state[key].shape != wanted[name].shape]
    if others:
        shown = "; ".join(
            f"{given[name]} is {tuple(state[given[name]].shape)}, the network's {name} is {tuple(wanted[name].shape)}"
            for name in others[:_MOST_SHOWN]
        )
        parts = ", ".join(sorted({name.removeprefix("backbone.").rpartition(".")[0] or name for name in others}))
        raise UserError(
            f"initial weights {source} have other shapes: {shown}{' ...' if len(others) > _MOST_SHOWN else ''}. "
            f"`--training.reinitialize '[{parts}]'` begins with fresh ones there"
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_MOST_SHOWN]) + (f", ... ({len(names)} in all)" if len(names) > _MOST_SHOWN else "")
