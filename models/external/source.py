"""How a network that Rayndom did not build is named, and how it is loaded from that name: in any process of a machine, the same network."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, ValidationError
from torch import nn
from torch.nn.parameter import is_lazy

from models.configuration import Config
from models.errors import UserError
from models.external.program_files import exported_program, torchscript
from models.external.python_code import built_by, callables_of, is_file, module_file
from models.external.state_files import load_state
from models.external.timm_networks import check_timm_name, timm_network, timm_version
from models.file_content import existing_file, sha256_of

Kind = Literal["callable", "timm", "torchscript", "exported"]

TIMM = "timm:"
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_SCHEMES = ("models", "hf", "runs", "s3", "http", "https", "file")  # what a colon means elsewhere
_ENDINGS: dict[str, Kind] = {".pt": "torchscript", ".pth": "torchscript", ".ts": "torchscript", ".pt2": "exported"}


class ExternalModel(Config):
    """A network by its name. `load` gives it; `source_digest` and `weights_digest` say whether the files are those that were meant.

    A command line names it by `FILE.py:CALLABLE`, `MODULE:CALLABLE`, `timm:NAME`, `FILE.pt` or `FILE.pt2`, see `external_model`.
    """

    kind: Kind = Field(
        description="What names it: a `callable`, a network of `timm`, a `torchscript` file, an `exported` file of torch.export."
    )
    source: str = Field(description="Absolute path of the file, dotted name of the module, or name in timm.")
    attribute: str = Field("", description="Dotted name of the callable.")
    weights: str | None = Field(None, description="Absolute path of the file of weights; none: what `source` gives has its weights.")
    folder: str = Field(description="Where a module is looked for: the folder in which it was named.")
    num_classes: int | None = Field(None, ge=2, description="K, for a network of timm.")
    image_shape: tuple[int, int, int] | None = Field(None, description="(C, H, W) of the images, for a network of timm.")

    @property
    def name(self) -> str:
        """Short name, for tables."""
        stem = self.source if self.kind == "timm" or self._is_module else Path(self.source).stem
        return f"{stem}.{self.attribute}" if self.attribute else stem

    @property
    def reference(self) -> str:
        """What a command line names it by."""
        if self.kind == "timm":
            return f"{TIMM}{self.source}"
        return f"{self.source}:{self.attribute}" if self.attribute else self.source

    @property
    def source_digest(self) -> str:
        """SHA-256 of the file of its code or program; of timm, its version."""
        if self.kind == "timm":
            return f"timm {timm_version()}"
        return sha256_of(self.files[0])

    @property
    def weights_digest(self) -> str | None:
        """SHA-256 of the file of weights."""
        return None if self.weights is None else sha256_of(Path(self.weights))

    @property
    def files(self) -> tuple[Path, ...]:
        """Files that it is loaded from; every process that loads it must see them."""
        named = [] if self.kind == "timm" else [module_file(self.source, self.folder) if self._is_module else Path(self.source)]
        return (*named, *([Path(self.weights)] if self.weights is not None else []))

    @property
    def _is_module(self) -> bool:
        return self.kind == "callable" and not is_file(self.source)

    @property
    def executes(self) -> str:
        """What is executed on loading it, as a sentence."""
        weights = "; weights are read as tensors, without executing code" if self.weights is not None else ""
        if self.kind == "callable":
            return f"{self.reference} is code of yours, and is executed{weights}"
        if self.kind == "timm":
            return f"{self.reference} is built by timm, without its weights: nothing is downloaded{weights}"
        if self.kind == "torchscript":
            return f"{self.source} is a TorchScript program, run by PyTorch's interpreter, which executes no Python"
        return f"{self.source} is a file of torch.export: reading one can execute code that was put into it, so trust where it is from"

    def load(self, seed: int = 0) -> nn.Module:
        """Return the network on the CPU, in eval mode.

        Args:
            seed: of the global generators while it is built, which are as before afterwards: what a network draws when it is built
                (a fixed random projection, say) is the same in every process.

        Raises:
            UserError: anything that keeps it from being built with its weights.
        """
        states = random.getstate(), np.random.get_state()  # noqa: NPY002 - a user's code may draw from the global generator
        try:
            with torch.random.fork_rng():
                random.seed(seed)
                np.random.seed(seed)  # noqa: NPY002 - as above
                torch.manual_seed(seed)
                network = self._built()
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002 - as above
        self._check_values(network)
        if self.weights is not None:
            load_state(network, Path(self.weights))
        return network.cpu().eval()

    def _check_values(self, network: nn.Module) -> None:
        for name, tensor in (*network.named_parameters(), *network.named_buffers()):
            if is_lazy(tensor) or tensor.is_meta:
                state = "takes its shape from a first batch" if is_lazy(tensor) else "is on the device meta"
                raise UserError(f"{self.reference}: {name} has no values yet: it {state}; let the callable give it some")

    def _built(self) -> nn.Module:
        if self.kind == "callable":
            return built_by(self.source, self.attribute, self.folder)
        if self.kind == "timm":
            assert self.num_classes is not None and self.image_shape is not None  # as `external_model` checks
            return timm_network(self.source, self.num_classes, self.image_shape)
        return torchscript(Path(self.source)) if self.kind == "torchscript" else exported_program(Path(self.source))


def is_external_reference(reference: str) -> bool:
    """Return whether a text names a network that Rayndom did not build: `FILE.py:NAME`, `MODULE:NAME`, `timm:NAME`, `FILE.pt[2]`."""
    if reference.startswith("hf://"):
        return False
    if reference.startswith(TIMM) or reference.endswith(".py") or Path(reference).suffix in _ENDINGS:
        return not Path(reference[:255]).is_dir()
    source, colon, attribute = reference.partition(":")
    if is_file(source) and colon:
        return True
    return source not in _SCHEMES and all(_DOTTED.fullmatch(part) for part in (source, attribute))


def external_model(
    reference: str,
    weights: str | Path | None = None,
    *,
    num_classes: int | None = None,
    image_shape: tuple[int, int, int] | None = None,
) -> ExternalModel:
    """Return the network that a text names. Its code is not executed yet.

    Args:
        reference: `FILE.py:CALLABLE`, `MODULE:CALLABLE`, `timm:NAME`, a file of TorchScript (`.pt`, `.pth`, `.ts`) or
            torch.export (`.pt2`).
        weights: a file of weights: `.safetensors`, or what `torch.save(network.state_dict(), FILE)` wrote.
        num_classes, image_shape: K and (C, H, W), for `timm:NAME` alone.

    Raises:
        UserError: a file that is not there, a name that is none, or weights where they have no place or are missing.

    Example:
        model = external_model("my_model.py:build", "weights.safetensors").load()
        result = evaluate(model, x, y, suite="quick", threat_model=ThreatModel(epsilon="8/255"))
    """
    fields: dict[str, Any] = {"weights": None if weights is None else str(existing_file(weights, "--weights")), "folder": str(Path.cwd())}
    if reference.startswith(TIMM):
        fields |= _of_timm(reference, fields["weights"], num_classes, image_shape)
    elif (kind := _ENDINGS.get(Path(reference).suffix)) is not None:
        if weights is not None:
            raise UserError(f"{reference} has its weights inside: --weights is for a callable or timm:NAME")
        fields |= {"kind": kind, "source": str(existing_file(reference, "model"))}
    else:
        fields |= _of_callable(reference)
    try:
        return ExternalModel(**fields)
    except ValidationError as error:  # e.g. the path holds characters that cannot be printed
        raise UserError(f"{reference!r:.300} cannot be read: {error.errors()[0]['msg']}") from None


def _of_timm(reference: str, weights: str | None, num_classes: int | None, image_shape: tuple[int, int, int] | None) -> dict[str, Any]:
    name = reference.removeprefix(TIMM)
    check_timm_name(name)
    if weights is None:
        raise UserError(f"{reference} needs --weights: a file with its trained weights; nothing is downloaded")
    if num_classes is None or image_shape is None:
        raise UserError(f"{reference} needs to know the number of classes and the shape of the images")
    return {"kind": "timm", "source": name, "num_classes": num_classes, "image_shape": image_shape}


def _of_callable(reference: str) -> dict[str, Any]:
    source, _, attribute = reference.partition(":")
    if is_file(source):
        source = str(existing_file(source, "model"))
        if not attribute:
            names = callables_of(Path(source))
            example = "build" if "build" in names or not names else names[0]
            known = f" (it has {', '.join(names[:20])})" if names else ""
            raise UserError(f"{reference} is a file: name the callable in it that returns the network, as {source}:{example}{known}")
    elif not _DOTTED.fullmatch(source):
        raise UserError(f"{reference!r:.300} names no network: what is meant is FILE.py:NAME, MODULE:NAME, timm:NAME, FILE.pt or FILE.pt2")
    if not _DOTTED.fullmatch(attribute):
        raise UserError(f"{reference!r:.300}: {attribute!r:.100} is no name of a callable; what is meant is FILE.py:NAME or MODULE:NAME")
    return {"kind": "callable", "source": source, "attribute": attribute}
