"""Which code a training rests on: the files of its defence and its objective. Kept beside a run's fingerprint, never in it: the same
configuration means the same run, and where the code of its method has changed since, that is said."""

from __future__ import annotations

import hashlib
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from models.plugins import plugins
from models.registry import defence_model
from orchestration.experiment import ExperimentConfig
from trainers.objective import objective_entry

_PARTS = re.compile(r"^\s*from (models\.layers\.\w+|trainers\.(?:taylor|ensembles)\.\w+|trainers\.trades_terms) import", re.MULTILINE)
"""What methods are made of, as their files import it."""


def method_code(experiment: ExperimentConfig) -> dict[str, str]:
    """Return module -> 16 hexadecimal digits of its source, of the defence's and the objective's files and what of ours they are made of;
    of a plug-in, of all its modules."""
    defence, objective = defence_model(experiment.defence.name), objective_entry(experiment.training.objective.name)
    found: dict[str, str] = {}
    for owner in (defence.change or defence.build, defence.config, objective.create, objective.config):
        for module, path in _sources(inspect.getmodule(owner).__name__ if owner is not None else ""):  # type: ignore[union-attr]
            if module not in found and path.is_file():
                found[module] = hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
    return dict(sorted(found.items()))


def _sources(module: str) -> Iterator[tuple[str, Path]]:
    for plugin in plugins():
        if module == plugin.module or module.startswith(f"{plugin.module}."):
            yield from plugin.sources.items()
            return
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None or module == "models.configuration":
        return
    path = Path(file)
    yield module, path
    for part in _PARTS.findall(path.read_text(encoding="utf-8")):
        yield part, path.parents[module.count(".")].joinpath(*part.split(".")).with_suffix(".py")


def digest_of_code(files: Mapping[str, str]) -> str:
    """Return 16 hexadecimal digits of what `method_code` returned."""
    return hashlib.blake2b(repr(sorted(files.items())).encode(), digest_size=8).hexdigest()


def changed_files(known: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the modules that are not what they were, those that came and those that went among them."""
    return sorted(module for module in {*known, *now} if known.get(module) != now.get(module))
