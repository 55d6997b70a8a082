"""Names of defences and how a model of each is built. Found by scanning `models/defences/`: a new defence is one new file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from models.backbones import build_backbone, list_backbones
from models.backbones.base import Backbone, ImageShape
from models.classifier import Classifier, InputNormalization, ModelSpec
from models.configuration import Config
from models.constraints import apply_constraints
from models.errors import UserError, nearest, unknown_name
from models.plugins import once_for_plugins
from models.randomness import derive_seed, seed_streams
from models.registry_files import broken_files, scan


@dataclass(frozen=True)
class BuildRequest:
    """What a defence is built on. `network()` gives a new plain network; ensembles call it once per member."""

    backbone: str
    num_classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    seed: int
    backbone_options: Mapping[str, Any] = field(default_factory=dict)

    def network(self, transform: Callable[[Backbone], None] | None = None, member: int = 0) -> Classifier:
        """Return a freshly initialized classifier.

        Args:
            transform: changes the backbone in place (replaces layers) before it is wrapped.
            member: members of an ensemble have different initial weights.
        """
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "initialization", member))
        backbone = build_backbone(self.backbone, self.num_classes, self.image_shape, generator=generator, **self.backbone_options)
        if transform is not None:
            transform(backbone)
        return Classifier(InputNormalization(self.mean, self.std), backbone, self.image_shape)


Change = Callable[[Backbone, Any, ImageShape], None]
"""`(backbone, config, image_shape)`: replaces layers of the backbone, in place."""


@dataclass(frozen=True)
class DefenceModel:
    """How the network of one defence is built.

    Attributes:
        name: what users type.
        description: one line.
        config: its parameters, a `Config` subclass.
        change: `(backbone, config, image_shape)` replaces layers of a backbone in place: all that most defences are. It may raise a
            `UserError` where it does not fit the backbone. Such defences can be stacked.
        build: `(config, request) -> nn.Module`, instead of `change`, for a defence that is more than layers in one network.
        fit: `(config, backbone) -> config` for another backbone than the one the parameters were chosen for: places that it does not have
            become its last one, what does not fit its layers is left out. None: the parameters fit every backbone.
        presets: named sets of parameters by source, e.g. `paper`, `official`, `common`.
    """

    name: str
    description: str
    config: type[Config]
    change: Change | None = None
    build: Callable[[Any, BuildRequest], nn.Module] | None = None
    fit: Callable[[Any, Backbone], Config] | None = None
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.change is None) == (self.build is None):
            raise ValueError(f"defence {self.name!r} must have either `change` or `build`")

    def parse(self, parameters: Mapping[str, Any]) -> Config:
        """Validate parameters; raises what `parse_parameters` raises."""
        return parse_parameters("defence", self.name, self.config, parameters)

    def network(self, config: Config, request: BuildRequest) -> nn.Module:
        """Return a new network of this defence."""
        if self.build is not None:
            return self.build(config, request)
        change = self.change
        assert change is not None
        return request.network(lambda backbone: change(backbone, config, request.image_shape))


@once_for_plugins
def defence_models() -> dict[str, DefenceModel]:
    """Return all defences by name."""
    return scan("models.defences", "DEFENCE_MODELS", DefenceModel)


def list_defences() -> list[str]:
    """Return the names of all defences and baselines, sorted."""
    return sorted(defence_models())


def defence_model(name: str) -> DefenceModel:
    """Return the entry of a defence; an unknown name is a `UserError` that lists the nearest ones."""
    entries = defence_models()
    if name not in entries:
        of_others = [] if nearest(name, list(entries)) else ["A plug-in's is known with `--plugin FOLDER` or RAYNDOM_PLUGINS=FOLDER"]
        raise unknown_name("defence", name, entries, [*of_others, *broken_files("models.defences")])
    return entries[name]


def parse_defence_parameters(name: str, parameters: Mapping[str, Any]) -> Config:
    """Validate the parameters of a defence; the error names the field, what is allowed and the nearest field."""
    return defence_model(name).parse(parameters)


def parse_parameters(kind: str, name: str, config: type[Config], parameters: Mapping[str, Any]) -> Config:
    """Validate the parameters of something that is known by name; the error names it, the field, what is allowed and the nearest field."""
    for key in parameters:
        if key not in config.model_fields:
            close = nearest(key, config.model_fields)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise UserError(f"{kind} {name!r} has no parameter {key!r}.{hint} It has: {', '.join(config.model_fields) or 'none'}.")
    try:
        return config(**parameters)
    except ValidationError as error:
        details = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or name}: {item['msg'].removeprefix('Value error, ')} (got {item['input']!r})"
            for item in error.errors()
        )
        raise UserError(f"{kind} {name!r}: {details}") from None


def parse_defence_section(section: Mapping[str, Any]) -> tuple[DefenceModel, Config]:
    """Return the entry and the parameters of a section `{"name": ..., parameters}`; errors are those of the two functions above."""
    entry = defence_model(section["name"])
    return entry, entry.parse({key: value for key, value in section.items() if key != "name"})


def fitted_section(section: Mapping[str, Any], backbone: Backbone) -> dict[str, Any]:
    """Return a section `{"name": ..., parameters}` as it fits a backbone; see `DefenceModel.fit`."""
    entry, parameters = parse_defence_section(section)
    return {"name": entry.name, **(entry.fit(parameters, backbone) if entry.fit else parameters).model_dump(mode="json")}


def section_stored_earlier(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section `{"name": ..., parameters}` that a file of an earlier version may hold, in today's terms."""
    parameters = {key: value for key, value in section.items() if key != "name"}
    return {"name": section["name"], **defence_model(section["name"]).config.stored_earlier(parameters)}


def build_model(
    defence: str,
    *,
    backbone: str = "resnet18",
    num_classes: int = 10,
    image_shape: tuple[int, int, int] = (3, 32, 32),
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    seed: int = 0,
    backbone_options: Mapping[str, Any] | None = None,
    **defence_parameters: Any,
) -> nn.Module:
    """Build the network of a defence.

    Args:
        defence: one of `list_defences()`.
        backbone: one of `list_backbones()`, or `timm:NAME`.
        num_classes: K.
        image_shape: (C, H, W).
        mean, std: per channel, of pixels in [0,1]; None: 0.5 and 0.25 for every channel.
        seed: of the initial weights and of the streams of draws.
        backbone_options: e.g. `{"stem": "imagenet"}`.
        **defence_parameters: fields of the defence's config.

    Returns:
        A module that maps pixels in [0,1] of shape (B, C, H, W) to logits (B, K), with its normalization inside. It holds a first
        draw; `resample(model)` takes another. The global random number generators are neither read nor changed.

    Raises:
        UserError: an unknown name or a value out of range.
    """
    entry = defence_model(defence)
    config = entry.parse(defence_parameters)
    channels = image_shape[0]
    request = BuildRequest(
        backbone=backbone,
        num_classes=num_classes,
        image_shape=(channels, image_shape[1], image_shape[2]),
        mean=tuple(mean) if mean is not None else (0.5,) * channels,
        std=tuple(std) if std is not None else (0.25,) * channels,
        seed=seed,
        backbone_options=dict(backbone_options or {}),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "construction"))
        model = entry.network(config, request)
    apply_constraints(model)
    seed_streams(model, seed)
    spec = ModelSpec(
        defence=defence,
        defence_parameters=config.model_dump(mode="json"),
        backbone=backbone,
        backbone_options=dict(request.backbone_options),
        num_classes=num_classes,
        image_shape=request.image_shape,
        mean=request.mean,
        std=request.std,
    )
    model.spec = spec  # type: ignore[assignment] # any module may carry the record of how it was built
    return model


def build_from_spec(spec: ModelSpec, seed: int = 0) -> nn.Module:
    """Build the model that a `ModelSpec` describes, with fresh weights."""
    return build_model(
        spec.defence,
        backbone=spec.backbone,
        num_classes=spec.num_classes,
        image_shape=spec.image_shape,
        mean=spec.mean,
        std=spec.std,
        seed=seed,
        backbone_options=spec.backbone_options,
        **spec.defence_parameters,
    )


__all__ = [
    "BuildRequest",
    "DefenceModel",
    "build_from_spec",
    "build_model",
    "defence_model",
    "defence_models",
    "fitted_section",
    "list_backbones",
    "list_defences",
    "parse_defence_parameters",
    "parse_defence_section",
    "parse_parameters",
    "section_stored_earlier",
]
