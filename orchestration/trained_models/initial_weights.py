"""What `training.initial_weights` may name, and the tensors behind a name."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from models.classifier import ModelSpec
from models.errors import UserError
from models.external.source import TIMM, is_external_reference
from models.external.state_files import read_state
from models.external.timm_networks import timm_state, timm_weights_file
from models.file_content import existing_file, sha256_of
from models.initial_weights import SCHEMES, WeightsReport, begin_with, is_path
from models.weights import CONFIG_FILE, WEIGHTS_FILE, check_weights, read_config
from orchestration.home import Home
from orchestration.storage import fetch
from trainers.config import TrainingConfig


@dataclass(frozen=True)
class InitialWeights:
    """Weights on this disk that a training begins with.

    Attributes:
        name: what the user named. file: with the tensors. sha256: of that file.
        timm: timm's name of the network that the file is of; empty: the file's names are meant as they are.
        reinitialize: what of the network keeps its fresh values, see `begin_with`.
    """

    name: str
    file: Path
    sha256: str
    timm: str = ""
    reinitialize: tuple[str, ...] = ()

    def for_training(self, training: TrainingConfig) -> InitialWeights:
        """Return them as a training takes them that names them."""
        return dataclasses.replace(self, reinitialize=training.reinitialize)

    def begin(self, network: nn.Module) -> WeightsReport:
        """Put them into a network of `build_model`; see `begin_with`.

        Raises:
            UserError: the file cannot be read or has changed, or its tensors do not fit.
        """
        fetch(self.file.parent)  # on another node than the one that found them
        if sha256_of(self.file) != self.sha256:
            raise UserError(f"initial weights {self.name}: {self.file} has changed while the training was being started")
        return begin_with(
            network,
            self._state(network),
            source=self.name,
            sha256=self.sha256,
            reinitialize=self.reinitialize,
            remark=self._remark(getattr(network, "spec", None)),
        )

    def _state(self, network: nn.Module) -> Mapping[str, Tensor]:
        if not self.timm:
            return read_state(self.file)
        spec = getattr(network, "spec", None)
        assert isinstance(spec, ModelSpec)
        return timm_state(self.timm, self.file, spec.image_shape)

    def _remark(self, spec: ModelSpec | None) -> str:
        """Say where an exported model saw its images normalized otherwise."""
        if spec is None or self.timm or not (self.file.name == WEIGHTS_FILE and (self.file.parent / CONFIG_FILE).is_file()):
            return ""
        model = read_config(self.file.parent)["model"]
        if (tuple(model.get("mean", ())), tuple(model.get("std", ()))) == (spec.mean, spec.std):
            return ""
        return "they were trained on images that were normalized otherwise"

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON types."""
        return vars(self) | {"file": str(self.file), "reinitialize": list(self.reinitialize)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> InitialWeights:
        """Return what `to_json` wrote."""
        return cls(**{**content, "file": Path(content["file"]), "reinitialize": tuple(content["reinitialize"])})


def initial_weights(training: TrainingConfig, home: Home) -> InitialWeights | None:
    """Return the weights that a training begins with, None for fresh ones; those of an MLflow store are fetched.

    Raises:
        UserError: there are none, or they would have to be made by executing code; says what may be named.
    """
    name = training.initial_weights
    return None if name is None else named_weights(name, home).for_training(training)


def named_weights(name: str, home: Home) -> InitialWeights:
    """Return the weights of a name, a path of which is one from the root; raises what `initial_weights` raises."""
    if is_path(name) and not name.startswith(SCHEMES) and not os.path.isdir(name):
        file = existing_file(name, "training.initial_weights")
        return InitialWeights(name, file, sha256_of(file))
    try:
        if name.startswith(TIMM):
            network = name.removeprefix(TIMM)
            file = timm_weights_file(network)
            return InitialWeights(name, file, sha256_of(file), network)
        folder = _model_of(name, home)
        return InitialWeights(name, folder / WEIGHTS_FILE, check_weights(folder))
    except UserError as error:
        raise UserError(f"training.initial_weights: {error}") from None


def _model_of(name: str, home: Home) -> Path:
    """Return the folder of an exported model, a run, or what MLflow knows."""
    from orchestration.trained_models.targets import resolve_target  # here: it brings MLflow, which a sweep's help does without

    if not os.path.isdir(name) and is_external_reference(name):
        raise UserError(f"{name!r:.300} is code: weights are an exported model, a run, a file of tensors or timm:NAME")
    target = resolve_target(name, home)
    if target.external is not None:
        raise UserError(f"{name} is a model that Rayndom did not build: name its file of weights instead")
    return target.folder


def lasting_name(name: str, home: Home) -> str:
    """Return a name that goes on meaning what `name` means now: an alias of a registered model may move, its version does not.

    Raises:
        UserError: there is no such alias.
    """
    if not name.startswith("models:/") or "@" not in name:
        return name
    from orchestration.trained_models.downloads import version_named  # here: it brings MLflow

    try:
        return version_named(home, name)
    except UserError as error:
        raise UserError(f"training.initial_weights: {error}") from None
