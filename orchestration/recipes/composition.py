"""What a recipe is made of: layers, the lowest first, and the tree that they add up to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from models.errors import UserError, nearest
from models.yaml_text import read_yaml
from orchestration.home import checked_name
from orchestration.recipes.library import read_method, read_setting, setting_files
from orchestration.recipes.names import RecipeName, describe, is_recipe, possible_names, split_name
from orchestration.recipes.trees import Tree, merge, with_names

Origin = Literal["setting", "method", "exception", "variant", "file", "flag", "default"]

YAML_ENDINGS = (".yaml", ".yml")


@dataclass(frozen=True)
class Layer:
    """One contribution to an experiment. `source` names it in errors."""

    origin: Origin
    source: str
    tree: Tree


@dataclass(frozen=True)
class Composition:
    """A recipe before it is validated.

    Attributes:
        name: as typed, or the stem of its file. description: one line. parts: method, setting and variant; None for a file of its own.
    """

    name: str
    description: str
    layers: tuple[Layer, ...]
    parts: RecipeName | None = None

    @property
    def tree(self) -> Tree:
        """All layers merged, with name and description."""
        tree: Tree = {}
        for layer in self.layers:
            tree = merge(tree, with_names(layer.tree))
        return tree | {"name": self.name, "description": self.description}

    def source_of(self, location: Sequence[str]) -> str:
        """Return what to name in an error about a field: the layer that sets it last, or the recipe."""
        for layer in reversed(self.layers):
            if _reaches(with_names(layer.tree), location):
                return layer.source
        return self.name


def compose(recipe: str) -> Composition:
    """Return what a recipe is made of.

    Args:
        recipe: `<method>_<setting>[_<variant>]`, or the path of a YAML file.

    Raises:
        UserError: an unknown name, a file that cannot be read, or one that extends itself.
    """
    return _of_file(Path(recipe), ()) if recipe.endswith(YAML_ENDINGS) else _of_name(split_name(recipe))


def _of_name(parts: RecipeName) -> Composition:
    method = read_method(parts.method)
    variant = method.variants.get(parts.variant)
    without = variant is not None and variant.without_exceptions
    setting = read_setting(parts.setting if without else method.uses.get(parts.setting, parts.setting))
    source = f"method {method.name}"
    layers = [Layer("setting", f"setting {setting.name}", setting.tree), Layer("method", source, method.tree)]
    exception = {} if without else {key: value for key, value in method.exceptions.get(parts.setting, {}).items() if key != "description"}
    if exception:
        layers.append(Layer("exception", f"{source}, where {parts.setting}", exception))
    if variant is not None:
        layers.append(Layer("variant", f"{source}, variant {parts.variant}", variant.tree))
    return Composition(str(parts), describe(parts, method), tuple(layers), parts)


def _of_file(path: Path, below: tuple[Path, ...]) -> Composition:
    place = path.absolute()
    if place in below:
        names = " -> ".join(each.name for each in (*below[below.index(place) :], place))
        raise UserError(f"{path.name} extends itself: {names}")
    if not _is_file(path):
        raise UserError(f"no recipe file {str(path)[:300]}")
    tree = dict(read_yaml(path))
    base, description = tree.pop("extends", None), tree.pop("description", "")
    if not isinstance(description, str):
        raise UserError(f"{path.name}: description should be text, it is {description!r:.100}")
    _check_name(path, tree.pop("name", None))
    layers = () if base is None else _base_of_file(path, base, (*below, place)).layers
    return Composition(path.stem, description, (*layers, Layer("file", path.name, tree)))


def _check_name(path: Path, name: Any) -> None:
    """Raise a UserError if a file gives itself a name that none could have; a recipe is called like its file in any case."""
    if name is None:
        return
    if not isinstance(name, str) or not name.isprintable():
        raise UserError(f"{path.name}: name should be one line of text, it is {name!r:.100}; a recipe is called like its file, {path.stem}")
    try:
        checked_name(name)
    except ValueError as error:
        raise UserError(f"{path.name}: name: {error}") from None


def _base_of_file(path: Path, base: Any, below: tuple[Path, ...]) -> Composition:
    """Return what a file extends: a file beside it, a recipe, or a setting."""
    if not isinstance(base, str):
        raise UserError(f"{path.name}: extends should be the name of a recipe or a setting, it is {base!r:.100}")
    beside = [path.parent / base] if base.endswith(YAML_ENDINGS) else [path.parent / f"{base}{ending}" for ending in YAML_ENDINGS]
    for candidate in beside:
        if _is_file(candidate):
            return _of_file(candidate, below)
    if base in setting_files():
        setting = read_setting(base)
        return Composition(base, setting.description, (Layer("setting", f"setting {base}", setting.tree),))
    if not is_recipe(base):
        close = nearest(base[:300], [*possible_names(), *setting_files()])
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UserError(f"{path.name}: extends {base[:100]!r}, which is neither a file beside it nor a recipe nor a setting.{hint}")
    return compose(base)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _reaches(tree: Mapping[str, Any], location: Sequence[str]) -> bool:
    inner: Any = tree
    for index, part in enumerate(location):
        if isinstance(inner, str):  # a section by its bare name
            return list(location[index:]) == ["name"]
        if not isinstance(inner, Mapping) or part not in inner:
            return False
        inner = inner[part]
    return bool(location)


__all__ = ["YAML_ENDINGS", "Composition", "Layer", "Origin", "compose"]
