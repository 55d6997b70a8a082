"""Backbones by name: `list_backbones()` and `build_backbone("resnet18", num_classes=10, image_shape=(3, 32, 32))`.

Every module of this folder that holds a table `BACKBONES: dict[str, BackboneEntry]` contributes its entries; a new
backbone is one new file.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError

from models.backbones.base import Backbone, BackboneEntry, ImageShape
from models.errors import UserError, unknown_name
from models.plugins import once_for_plugins
from models.registry_files import broken_files, modules_of, modules_of_plugins, skip

__all__ = [
    "Backbone",
    "BackboneEntry",
    "ImageShape",
    "backbone_entries",
    "build_backbone",
    "canonical_backbone_name",
    "check_backbone_options",
    "list_backbones",
]


_NO_OPTIONS = {
    "name": "it is the name itself",
    "num_classes": "the data set decides it",
    "image_shape": "the data set decides it",
    "generator": "the seed decides it",
    "in_chans": "the data set decides it",
    **dict.fromkeys(
        ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"), "weights are never fetched"
    ),
}
LARGEST_OPTION = 16_384
"""Of numbers in the options of a family: no architecture has a layer that wide, and a larger one may not fit into any memory."""


@once_for_plugins
def backbone_entries() -> dict[str, BackboneEntry]:
    """Return the entries of all modules of this folder by name, sorted; families such as `timm` are among them.

    A file that is broken is skipped with a logged warning; a name that two files claim is neither's.
    """
    entries: dict[str, BackboneEntry] = {}
    owners: dict[str, str] = {}
    twice: set[str] = set()
    ours = ((module, module.__name__.rpartition(".")[2]) for module in modules_of(__name__))
    foreign = ((module, module.__name__) for module in modules_of_plugins(__name__, "BACKBONES"))
    for module, file in (*ours, *foreign):
        try:
            found = {name: (name, *entry.aliases) for name, entry in getattr(module, "BACKBONES", {}).items()}
        except (TypeError, AttributeError) as error:
            skip(__name__, file, f"BACKBONES should be entries by name: {error}")
            continue
        for name, spellings in found.items():
            for spelling in spellings:
                if spelling in owners:
                    twice |= {name, *(each for each, entry in entries.items() if spelling in (each, *entry.aliases))}
                    skip(__name__, file, f"{owners[spelling]}.py claims the name {spelling!r} too; neither has it")
                owners[spelling] = file
            entries[name] = module.BACKBONES[name]
    return {name: entry for name, entry in sorted(entries.items()) if name not in twice}


def list_backbones() -> list[str]:
    """Return the names that `build_backbone` takes, without aliases, sorted; `timm:NAME` works beside them."""
    return [name for name, entry in backbone_entries().items() if not entry.is_family]


def canonical_backbone_name(name: str) -> str:
    """Return the one name of a backbone: an alias becomes the name that it stands for.

    Raises:
        UserError: there is no such backbone; the message holds the nearest names. Whether a family such as timm has
            the variant is found out when it is built.
    """
    entries = backbone_entries()
    family, colon, variant = name.partition(":")
    if colon and variant and family in entries and entries[family].is_family:
        return name
    for canonical, entry in entries.items():
        if not entry.is_family and name in (canonical, *entry.aliases):
            return canonical
    spellings = [f"{canonical}:NAME" if entry.is_family else canonical for canonical, entry in entries.items()]
    known = spellings + [alias for entry in entries.values() for alias in entry.aliases]
    raise unknown_name("backbone", name, known, broken_files(__name__))


def build_backbone(
    name: str,
    num_classes: int,
    image_shape: Sequence[int],
    *,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Backbone:
    """Build a backbone with freshly initialized weights.

    Args:
        name: A name of `list_backbones()`, an alias, or `timm:NAME`.
        num_classes: The number of logits, at least 2.
        image_shape: (C, H, W) of the images; C is any number of channels.
        generator: Where the seed of the initialization comes from; one number is drawn from it and the global random
            state stays as it is. None: the weights come from the global generator, as the caller has seeded it.
        options: Options of that backbone, for instance `stem="imagenet"`.

    Raises:
        UserError: the name, the number of classes, the image shape or an option is not a valid one.
    """
    canonical = canonical_backbone_name(name)
    shape = _checked_shape(image_shape)
    if num_classes < 2:
        raise UserError(f"num_classes is {num_classes}; a classifier needs at least 2 classes.")
    family, colon, variant = canonical.partition(":")
    entry = backbone_entries()[family]
    _check_options(canonical, entry, options)
    if colon:
        options = {**options, "variant": variant}
    with _initialization(generator):
        return entry.build(num_classes, shape, **options)


def _checked_shape(image_shape: Sequence[int]) -> ImageShape:
    if len(image_shape) != 3 or any(int(size) != size or size < 1 for size in image_shape):
        raise UserError(f"image_shape is {tuple(image_shape)}; it is (channels, height, width), each at least 1.")
    channels, height, width = (int(size) for size in image_shape)
    return channels, height, width


def check_backbone_options(name: str, options: Mapping[str, Any]) -> None:
    """Check that a backbone has these options and takes their values; what a family's own options take is found out when it is built.

    Raises:
        UserError: an unknown option, one that is given otherwise, or a value of another type.
    """
    canonical = canonical_backbone_name(name)
    _check_options(canonical, backbone_entries()[canonical.partition(":")[0]], options)


def _check_options(name: str, entry: BackboneEntry, options: Mapping[str, Any]) -> None:
    parameters = inspect.signature(entry.build).parameters.values()
    for option in options:
        if option in _NO_OPTIONS:
            raise UserError(f"{option!r} is no option of backbone {name!r}: {_NO_OPTIONS[option]}.")
    allowed = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    if entry.is_family:
        allowed.remove("variant")
        if "variant" in options:
            raise UserError(f"the variant of backbone {name!r} stands in its name, after the colon, and is no option.")
    is_open = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    hints = get_type_hints(entry.build)
    for option, value in options.items():
        if option in allowed:
            _check_type(name, option, value, hints.get(option, Any))
        elif not is_open:
            raise unknown_name(f"option of backbone {name!r}:", option, allowed)
        elif isinstance(value, int | float) and not abs(value) <= LARGEST_OPTION:
            raise UserError(f"option {option!r} of backbone {name!r} is {value:g}; at most {LARGEST_OPTION} is allowed")


def _check_type(name: str, option: str, value: Any, hint: Any) -> None:
    try:
        TypeAdapter(hint).validate_python(value, strict=True)
    except ValidationError as error:
        raise UserError(f"option {option!r} of backbone {name!r}: {error.errors()[0]['msg']} (got {value!r:.100})") from None


@contextmanager
def _initialization(generator: torch.Generator | None) -> Iterator[None]:
    """Seed PyTorch's global generators from `generator` for the duration of the block."""
    if generator is None:
        yield
        return
    seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
    default_device = torch.get_default_device()
    # Seeding all CUDA devices would both start CUDA and disturb generators that are not saved here.
    on_cuda = default_device.type == "cuda"
    devices = [default_device.index or 0] if on_cuda else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        if on_cuda:
            torch.cuda.manual_seed(seed)
        yield
