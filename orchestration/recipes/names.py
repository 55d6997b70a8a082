"""Names of recipes: `<method>_<setting>`, or `<method>_<setting>_<variant>`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from models.errors import UserError, nearest
from orchestration.recipes.library import (
    Method,
    method_files,
    read_method,
    read_setting,
    readable_methods,
    readable_settings,
    setting_files,
)

_LONGEST = 300


@dataclass(frozen=True)
class RecipeName:
    """The parts of a recipe's name; `variant` is empty for most."""

    method: str
    setting: str
    variant: str = ""

    def __str__(self) -> str:
        return "_".join(part for part in (self.method, self.setting, self.variant) if part)


def split_name(name: str) -> RecipeName:
    """Return the parts of a recipe's name.

    A name is split at the longest setting in it that a method stands before, and nothing or a variant of this method behind.

    Raises:
        UserError: there is no such way, or there are two; says which part is unknown, and the nearest names.
    """
    readings = [reading for reading in _readings(name) if reading.method in method_files()]
    good = [reading for reading in readings if not reading.variant or reading.variant in read_method(reading.method).variants]
    longest = max((len(reading.setting) for reading in good), default=0)
    best = [reading for reading in good if len(reading.setting) == longest]
    if not best:
        raise _unknown(name, readings)
    if len(best) > 1:
        ways = " or ".join(f"method {each.method}, setting {each.setting}{_variant_of(each)}" for each in best)
        raise UserError(f"the recipe name {name!r} can be read in {len(best)} ways: {ways}. Rename a setting or a method of your own.")
    return best[0]


def is_recipe(name: str) -> bool:
    """Return whether a name is that of a recipe."""
    try:
        split_name(name)
    except UserError:
        return False
    return True


def listed_recipes() -> list[RecipeName]:
    """Return the combinations that methods and their variants list: those of the papers, and what goes with them."""
    found: list[RecipeName] = []
    for method in readable_methods():
        found += [RecipeName(method.name, setting) for setting in method.settings]
        found += [RecipeName(method.name, setting, name) for name, variant in method.variants.items() for setting in variant.settings]
    readable = {setting.name for setting in readable_settings()}
    return sorted((each for each in found if each.setting in readable), key=str)


def list_recipes() -> dict[str, str]:
    """Return names and one-line descriptions of the listed recipes."""
    methods = {method.name: method for method in readable_methods()}
    return {str(recipe): describe(recipe, methods[recipe.method]) for recipe in listed_recipes()}


def is_listed(recipe: RecipeName, method: Method) -> bool:
    """Return whether a method names this combination as one of its own."""
    return recipe.setting in (method.variants[recipe.variant].settings if recipe.variant else method.settings)


def describe(recipe: RecipeName, method: Method) -> str:
    """Return one line on what a recipe is; for a combination that is not listed it says so."""
    text = method.description
    variant = method.variants.get(recipe.variant)
    if variant is None or not variant.without_exceptions:
        text = str(method.exceptions.get(recipe.setting, {}).get("description", text))
    if variant is not None:
        text = variant.description or text
    remark = "" if is_listed(recipe, method) else "; no paper used this combination"
    return f"{text}, on {read_setting(recipe.setting).description}{remark}"


def possible_names() -> list[str]:
    """Return every method on every setting, and the listed variants: what a mistyped name is compared with."""
    plain = [f"{method}_{setting}" for method in method_files() for setting in setting_files()]
    return [*plain, *(str(recipe) for recipe in listed_recipes() if recipe.variant)]


def _readings(name: str) -> list[RecipeName]:
    """Return each way to read a name as something, a setting, and something or nothing."""
    words = name.split("_")
    found: list[RecipeName] = []
    if len(name) > _LONGEST:
        return found
    for setting in setting_files():
        length = setting.count("_") + 1
        for start in range(1, len(words) - length + 1):
            if "_".join(words[start : start + length]) == setting:
                found.append(RecipeName("_".join(words[:start]), setting, "_".join(words[start + length :])))
    return found


def _unknown(name: str, readings: Iterable[RecipeName]) -> UserError:
    """Build the error for a name that is no recipe; `readings` are those whose method exists, so that only the variant is unknown."""
    shown = name if len(name) <= 100 else f"{name[:97]}..."
    for reading in sorted(readings, key=lambda each: -len(each.setting)):
        variants = read_method(reading.method).variants
        close = nearest(reading.variant, variants)
        hint = f" Did you mean {f'{reading.method}_{reading.setting}_{close[0]}'!r}?" if close else ""
        has = f"It has: {', '.join(variants)}." if variants else "It has none."
        return UserError(f"unknown recipe {shown!r}: the method {reading.method!r} has no variant {reading.variant!r}.{hint} {has}")
    problem, candidates = _diagnosis(name)
    hint = f" Did you mean {' or '.join(map(repr, candidates))}?" if candidates else ""
    return UserError(f"unknown recipe {shown!r}: {problem}.{hint} `rayndom list methods` and `rayndom list settings` name the parts.")


def _diagnosis(name: str) -> tuple[str, list[str]]:
    """Return which part of a name is unknown, and the nearest names."""
    methods, settings = method_files(), setting_files()
    if name in methods:
        return f"{name!r} is a method; a recipe is <method>_<setting>", [f"{name}_{setting}" for setting in read_method(name).settings[:3]]
    if name in settings:
        listed = [str(recipe) for recipe in listed_recipes() if recipe.setting == name and not recipe.variant]
        return f"{name!r} is a setting; a recipe is <method>_<setting>", listed[:3]
    found = max(_readings(name), key=lambda each: len(each.setting), default=None)
    if found is not None:
        close = [str(RecipeName(method, found.setting)) for method in nearest(found.method, methods)]
        return f"{found.setting!r} is a setting, but there is no method {found.method[:100]!r}", close
    method = max((each for each in methods if name.startswith(f"{each}_")), key=len, default=None)
    if method is not None:
        rest = name[len(method) + 1 :][:_LONGEST]
        return f"{method!r} is a method, but there is no setting {rest[:100]!r}", [
            f"{method}_{setting}" for setting in nearest(rest, settings)
        ]
    return "it names neither a method nor a setting", nearest(name[:_LONGEST], possible_names())


def _variant_of(reading: RecipeName) -> str:
    return f", variant {reading.variant}" if reading.variant else ""


__all__ = [
    "RecipeName",
    "describe",
    "is_listed",
    "is_recipe",
    "list_recipes",
    "listed_recipes",
    "possible_names",
    "split_name",
]
