"""Search spaces: typed dimensions over fields of an experiment, checked against the schema before anything starts.

The space of a sweep over several recipes is joint: first the recipe, then the dimensions of that recipe alone. A dimension of one recipe is
named `RECIPE/dotted.field`, so that distributions of different recipes never share a name; a name without a recipe is a field that all of
them have.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from models.configuration import Config
from models.errors import UserError
from models.threat_model import parse_pixel_fraction

if TYPE_CHECKING:
    import optuna

Number = Annotated[float, BeforeValidator(parse_pixel_fraction)]


class Dimension(Config):
    """One searched field.

    `float` and `int` lie in [low, high]; `choice` takes one of `choices`; a `grid` sweep visits `grid` values. `above` names another
    dimension that bounds this one from below (CTRW's B above A). `when` makes the dimension conditional on others' values.
    """

    type: Literal["float", "int", "choice"] = Field(description="Kind of the dimension.")
    low: Number | None = Field(None, description="Smallest value.")
    high: Number | None = Field(None, description="Largest value.")
    log: bool = Field(False, description="Search on a logarithmic scale; needs low > 0.")
    step: Number | None = Field(None, gt=0, description="Spacing of values.")
    choices: tuple[Any, ...] = Field((), description="Values of a `choice`.")
    above: str | None = Field(None, min_length=1, description="Dotted name of a dimension that is a lower bound of this one.")
    when: Mapping[str, tuple[Any, ...]] = Field(
        default_factory=dict, description="Search only when the named dimensions have one of these values."
    )

    @model_validator(mode="after")
    def _complete(self) -> Dimension:
        if any(not allowed for allowed in self.when.values()):
            raise ValueError("`when` names a dimension without any value: this one would never be searched")
        if self.type == "choice":
            self._check_choices()
            return self
        if self.choices:
            raise ValueError(f"a {self.type} dimension has `low` and `high`; `choices` are for the type `choice`")
        if self.low is None or self.high is None:
            raise ValueError(f"a {self.type} dimension needs `low` and `high`")
        if self.low >= self.high:
            raise ValueError(f"low {self.low:g} must be below high {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"a logarithmic scale needs low > 0, got {self.low:g}")
        if self.log and self.step is not None:
            raise ValueError("log and step exclude each other")
        if self.type == "int" and any(value is not None and value != int(value) for value in (self.low, self.high, self.step)):
            raise ValueError("an int dimension needs whole numbers")
        if self.step is not None:
            steps = (self.high - self.low) / self.step
            if abs(steps - round(steps)) > 1e-6 * max(1, steps) or round(steps) < 1:
                raise ValueError(f"steps of {self.step:g} from low {self.low:g} do not reach high {self.high:g}")
        return self

    def _check_choices(self) -> None:
        if not self.choices:
            raise ValueError("a choice needs `choices`")
        if self.low is not None or self.high is not None or self.step is not None or self.log:
            raise ValueError("a choice has `choices` alone; `low`, `high`, `step` and `log` are for numbers")
        labels = [label(choice) for choice in self.choices]
        for index, each in enumerate(labels):
            if each in labels[:index]:
                raise ValueError(f"the choice {each!r:.100} stands twice")

    def ends(self) -> list[Any]:
        """Return the values that must be valid for the whole dimension to be: both ends, or every choice."""
        if self.type == "choice":
            return [list(value) if isinstance(value, tuple) else value for value in self.choices]
        return [int(end) if self.type == "int" else float(end) for end in self.bounds]

    @property
    def num_values(self) -> float:
        """Number of values: of choices, of whole numbers, of steps; infinite for a continuum."""
        if self.type == "choice":
            return len(self.choices)
        low, high = self.bounds
        step = self.step or (1 if self.type == "int" else None)
        return math.inf if step is None else round((high - low) / step) + 1

    def values(self) -> list[Any]:
        """Return all values, in order; a continuum has none to return."""
        if self.type == "choice":
            return self.ends()
        assert math.isfinite(self.num_values)
        low, step = self.bounds[0], self.step or 1
        numbers = [low + index * step for index in range(int(self.num_values))]
        return [int(number) for number in numbers] if self.type == "int" else numbers

    def takes(self, value: Any) -> bool:
        """Return whether a value lies in this dimension: is one of the choices, or between the ends and, with a step, on one."""
        if self.type == "choice":
            return label(value) in [label(choice) for choice in self.choices]
        low, high = self.bounds
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            return False
        step = self.step or (1 if self.type == "int" else None)
        return step is None or abs((value - low) / step - round((value - low) / step)) < 1e-6

    @property
    def bounds(self) -> tuple[float, float]:
        """Smallest and largest value of a number; a choice has none."""
        assert self.low is not None and self.high is not None
        return self.low, self.high

    def suggest(self, trial: optuna.Trial, name: str, chosen: Mapping[str, Any]) -> Any:
        """Ask Optuna for a value, given those already chosen."""
        if self.type == "choice":
            labels = [label(choice) for choice in self.choices]
            return self.ends()[labels.index(trial.suggest_categorical(name, labels))]
        low, high = self.bounds
        if self.above is not None:
            low = self._first_from(chosen.get(self.above, low))
        if self.type == "int":
            return trial.suggest_int(name, int(low), int(high), step=int(self.step or 1), log=self.log)
        return trial.suggest_float(name, float(low), float(high), step=self.step, log=self.log)

    def _first_from(self, bound: float) -> float:
        """Return the smallest value of a number that is not below `bound`: a range that began between two steps would miss them all."""
        low, _ = self.bounds
        step = self.step or (1 if self.type == "int" and not self.log else None)
        if bound <= low or step is None:
            return max(low, math.ceil(bound) if self.type == "int" else bound)
        return low + math.ceil((bound - low) / step - 1e-9) * step

    def at_share(self, share: float, bound: float) -> float:
        """Return the value that lies a share in [0,1] of the way up from `bound`, or from the lower end where that is higher."""
        if math.isfinite(self.num_values) and not self.log:
            numbers = [value for value in self.values() if value >= bound]
            return numbers[min(int(share * len(numbers)), len(numbers) - 1)]
        low, high = max(self.bounds[0], bound), self.bounds[1]
        value = low * (high / low) ** share if self.log else low + (high - low) * share
        value = min(max(value, low), high)  # rounding may leave the range
        return min(max(round(value), math.ceil(low)), int(high)) if self.type == "int" else value

    def share_of(self, value: float, bound: float) -> float:
        """Return a share for which `at_share` gives `value`."""
        if math.isfinite(self.num_values) and not self.log:
            numbers = [each for each in self.values() if each >= bound]
            nearest_one = min(range(len(numbers)), key=lambda index: abs(numbers[index] - value))
            return (nearest_one + 0.5) / len(numbers)
        low, high = max(self.bounds[0], bound), self.bounds[1]
        if high <= low:
            return 0.5
        share = math.log(value / low) / math.log(high / low) if self.log else (value - low) / (high - low)
        return min(max(share, 0.0), 1.0)

    def distribution(self) -> optuna.distributions.BaseDistribution:
        """Return the whole range, without the bound that another dimension sets."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.type == "choice":
            return CategoricalDistribution([label(choice) for choice in self.choices])
        low, high = self.bounds
        if self.type == "int":
            return IntDistribution(int(low), int(high), log=self.log, step=int(self.step or 1))
        return FloatDistribution(float(low), float(high), log=self.log, step=self.step)


def label(choice: Any) -> str | int | float | bool | None:
    """Return a choice as Optuna stores it: scalars as they are, lists as text."""
    return " + ".join(map(str, choice)) if isinstance(choice, list | tuple) else choice


SearchSpace = Mapping[str, Dimension]


def ordered(space: SearchSpace) -> list[str]:
    """Return the dimensions in an order in which every one comes after those it depends on.

    Raises:
        UserError: a dependency does not exist or goes in a circle.
    """
    done: list[str] = []
    pending = list(space)
    while pending:
        ready = [name for name in pending if set(_dependencies(space[name])) <= set(done)]
        if not ready:
            missing = {dep for name in pending for dep in _dependencies(space[name])} - set(space)
            reason = f"{', '.join(sorted(missing))} is not a dimension" if missing else "they depend on each other"
            raise UserError(f"search space: cannot order {', '.join(pending)}: {reason:.300}")
        done += ready
        pending = [name for name in pending if name not in ready]
    return done


SHARE = " (share)"
"""Ends the name under which Optuna knows a bounded dimension that is proposed as a share, see `suggest`."""


def suggest(space: SearchSpace, trial: optuna.Trial, *, shares: bool = False) -> dict[str, Any]:
    """Return dotted field -> value for one trial, conditional dimensions only where their condition holds.

    Args:
        shares: propose a dimension that lies `above` another as its share of the way up from there. Its range is then the same in every
            trial; samplers that look at all dimensions together leave out those whose range changes.
    """
    chosen: dict[str, Any] = {}
    for name in ordered(space):
        dimension = space[name]
        if not is_active(dimension, chosen):
            continue
        if shares and dimension.above in chosen:
            chosen[name] = dimension.at_share(trial.suggest_float(name + SHARE, 0.0, 1.0), chosen[dimension.above])
        else:
            chosen[name] = dimension.suggest(trial, name, chosen)
    return chosen


def as_proposed(space: SearchSpace, values: Mapping[str, Any], *, shares: bool = False) -> dict[str, Any]:
    """Return values as Optuna is told to propose them: the reverse of `suggest`."""
    told: dict[str, Any] = {}
    for name, value in values.items():
        above = space[name].above
        if shares and above is not None and above in values:
            told[name + SHARE] = space[name].share_of(value, values[above])
        else:
            told[name] = label(value)
    return told


def is_active(dimension: Dimension, chosen: Mapping[str, Any]) -> bool:
    """Return whether a conditional dimension is searched, given the values chosen so far."""
    return all(chosen.get(name) in values for name, values in dimension.when.items())


def _dependencies(dimension: Dimension) -> list[str]:
    return [*dimension.when, *([dimension.above] if dimension.above else [])]


RECIPE = "recipe"
_SEPARATOR = "/"


def joint_space(spaces: Mapping[str, SearchSpace], shared: SearchSpace) -> dict[str, Dimension]:
    """Return one space: the choice of the recipe, dimensions that all share, each recipe's own under the condition that it is chosen."""
    space = {RECIPE: Dimension(type="choice", choices=tuple(spaces)), **shared}
    for recipe, own in spaces.items():
        space |= {scoped(recipe, name): _in(recipe, dimension, own) for name, dimension in own.items()}
    return space


def scoped(recipe: str, field: str) -> str:
    """Return the name of a recipe's dimension."""
    return f"{recipe}{_SEPARATOR}{field}"


def split(name: str) -> tuple[str | None, str]:
    """Return (recipe or None, dotted field) of a dimension's name."""
    recipe, separator, field = name.rpartition(_SEPARATOR)
    return (recipe, field) if separator else (None, name)


def chosen_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted field -> value for the recipe that `values` chose."""
    return {split(name)[1]: value for name, value in values.items() if name != RECIPE}


def flatten_by_recipe(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `space` of a file, whose sections are recipes and fields, with the dimensions of recipes named `RECIPE/dotted.field`."""
    flat: dict[str, Any] = {}
    for name, item in tree.items():
        # A dimension has a type; a section of a recipe holds dimensions.
        if isinstance(item, dict) and "type" not in item:
            flat |= {scoped(name, field): dimension for field, dimension in item.items()}
        else:
            flat[name] = item
    return flat


def _in(recipe: str, dimension: Dimension, own: SearchSpace) -> Dimension:
    """Return a recipe's dimension with its references scoped and its condition added."""
    when = {(scoped(recipe, name) if name in own else name): allowed for name, allowed in dimension.when.items()}
    above = dimension.above
    if above is not None and above in own:
        above = scoped(recipe, above)
    return dimension.model_copy(update={"when": {RECIPE: (recipe,)} | when, "above": above})
