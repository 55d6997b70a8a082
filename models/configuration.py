"""The base of every configuration: frozen, closed, each field described, and strict where a value would be read otherwise than meant."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

LARGEST_INTEGER = 2**63 - 1
LARGEST_FLOAT = 1e30
"""Networks compute with 32-bit numbers, which end at 3.4e38: what is multiplied with one of these would be infinite."""
SMALLEST_FLOAT = 1e-30
"""32-bit numbers begin at 1.2e-38: what is smaller than this is nothing there."""
MOST = 1_000_000
"""Where a number that has a smallest value ends, unless its field says where: a count, a weight of a loss, a width."""
MOST_IMAGES = 100_000_000
"""More than any set of labelled images has."""
LONGEST_TEXT = 2000
LONGEST_NUMBER = 60


class Config(BaseModel):
    """A frozen record. Unknown keys are errors; instances are hashable by value of their JSON form and safe to pickle.

    Refused in every field, however deep in lists and mappings: `true` and `false` where a number or a name is meant, numbers that are not
    finite, whole numbers beyond 64 bits, text of more than 2,000 characters or with characters that cannot be printed. A number whose field
    states a smallest value and no largest (`ge` or `gt` alone) is at most `MOST`, and 0 or at least `SMALLEST_FLOAT`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _is_what_it_looks_like(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields.get(info.field_name or "")
        refuse_misread(value, None if field is None else field.annotation)
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _can_be_computed_with(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, int | float) or isinstance(value, bool):
            return value
        if isinstance(value, float) and abs(value) > LARGEST_FLOAT:
            raise ValueError(f"{value:g} is beyond what 32-bit numbers hold ({LARGEST_FLOAT:g})")
        field = cls.model_fields.get(info.field_name or "")
        stated = {name for item in (field.metadata if field else ()) for name in ("ge", "gt", "le", "lt") if hasattr(item, name)}
        if stated and 0 < abs(value) < SMALLEST_FLOAT:
            raise ValueError(f"{value:g} is nothing in 32-bit numbers; 0, or at least {SMALLEST_FLOAT:g}")
        if stated and not stated & {"le", "lt"} and value > MOST:
            raise ValueError(f"{value:g} is more than can be meant; at most {MOST:,} is allowed")
        return value

    @classmethod
    def stored_earlier(cls, parameters: dict[str, Any]) -> dict[str, Any]:
        """Return parameters as an earlier version stored them, with what has been added since at the value that it stood for."""
        return parameters

    def changed(self, **fields: Any) -> Self:
        """Return the record with some fields changed, checked as a new one: an unknown field or a value that is not allowed is pydantic's
        error, as in a file."""
        given = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self)(**given | fields)

    @property
    def revision(self) -> int:
        """How often what these values mean has changed; a run's fingerprint holds it unless it is 0.

        A run that was made under an earlier meaning is another experiment: it is neither gone on with nor reused.
        """
        return 0


def refuse_misread(value: Any, annotation: Any = Any) -> None:
    """Raise a ValueError if plain data holds something that a field of this type would read otherwise than it looks; see `Config`.

    A section is left to its own fields, whose errors say where they are.

    Args:
        annotation: type of the field; `Any`: everything finite and printable is allowed.
    """
    if isinstance(value, bool):
        if not _takes_booleans(annotation):
            raise ValueError(f"{str(value).lower()} is a truth value, not {'a number' if _takes_numbers(annotation) else 'a name'}")
    elif isinstance(value, int):
        if not -LARGEST_INTEGER <= value <= LARGEST_INTEGER:
            raise ValueError("the number has more than 64 bits")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} is no finite number")
    elif isinstance(value, str):
        _refuse_text(value)
        if len(value) > LONGEST_NUMBER and not _takes_text(annotation):
            raise ValueError(f"{value[:20]}... is no number of at most {LONGEST_NUMBER} characters")
    elif isinstance(value, list | tuple):
        for item in value:
            refuse_misread(item, _inside(annotation, sequence=True))
    elif isinstance(value, Mapping) and not any(isinstance(arm, type) and issubclass(arm, BaseModel) for arm in _arms(annotation)):
        for key, item in value.items():
            if isinstance(key, str):
                _refuse_text(key)
            refuse_misread(item, _inside(annotation, sequence=False))


def _refuse_text(text: str) -> None:
    if len(text) > LONGEST_TEXT:
        raise ValueError(f"text of {len(text)} characters; at most {LONGEST_TEXT} are allowed")
    strange = next((character for character in text if not (character.isprintable() or character in "\n\t")), None)
    if strange is not None:
        raise ValueError(f"the text holds a character that cannot be printed ({strange!a})")


def _arms(annotation: Any) -> list[Any]:
    """Return the types that a union allows, or the type itself, without what Annotated adds."""
    if get_origin(annotation) is Annotated:
        return _arms(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [arm for each in get_args(annotation) for arm in _arms(each)]
    return [annotation]


def _choices(annotation: Any) -> list[Any]:
    """Return the values of all Literals among the types that are allowed."""
    return [choice for arm in _arms(annotation) if get_origin(arm) is Literal for choice in get_args(arm)]


def _takes_numbers(annotation: Any) -> bool:
    return int in _arms(annotation) or float in _arms(annotation) or any(type(choice) is int for choice in _choices(annotation))


def _takes_text(annotation: Any) -> bool:
    return not _takes_numbers(annotation) or str in _arms(annotation) or any(isinstance(choice, str) for choice in _choices(annotation))


def _takes_booleans(annotation: Any) -> bool:
    """Return whether a boolean is meant, or the type's own check says better what is: that of a section or a list."""
    choices = _choices(annotation)
    if bool in _arms(annotation) or any(isinstance(choice, bool) for choice in choices):
        return True
    return not (choices or _takes_numbers(annotation) or str in _arms(annotation))


def _inside(annotation: Any, *, sequence: bool) -> Any:
    """Return the type of what stands in a list or mapping of this type."""
    for arm in _arms(annotation):
        arguments = get_args(arm)
        if sequence and get_origin(arm) in (tuple, list, set, frozenset) and arguments:
            return Union[tuple(each for each in arguments if each is not ...)]  # noqa: UP007
        if not sequence and isinstance(get_origin(arm), type) and issubclass(get_origin(arm), Mapping) and len(arguments) == 2:
            return arguments[1]
    return Any
