"""What an objective is: the loss of one training method, and how its gradients come about.

An objective leaves gradients in `.grad` and returns named scalars; the loop in `trainers.fit` owns everything else (zeroing,
averaging over workers, clipping, the optimizer, constraints). Objectives are found by scanning `trainers/objectives/`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from models.configuration import Config
from models.errors import unknown_name
from models.plugins import once_for_plugins
from models.registry_files import broken_files, scan

if TYPE_CHECKING:
    from trainers.step import StepContext


class ObjectiveConfig(Config):
    """Base of all objective configs; `name` chooses the objective. Objectives without parameters use it as it is."""

    takes_soft_labels: ClassVar[bool] = False
    """Whether labels may be probabilities (B, K) instead of numbers (B,): where they meet cross-entropy alone."""
    takes_single_step: ClassVar[bool] = False
    """Whether images are perturbed by a single step of the objective's own instead of the configured attack."""

    is_compilable: ClassVar[bool] = False
    """Whether a step calls the model itself and differentiates once: then its passes may be compiled code."""

    name: str = Field(description="Name of the objective, e.g. `adversarial`.")

    def problem_with(self, defence: Config, num_classes: int) -> str | None:
        """Return why the loss has no meaning for a defence with these parameters and so many classes, None where it has one."""
        return None

    @property
    def needs_whole_batch(self) -> bool:
        """Whether a step looks at all images of a worker together, so that gradients cannot be accumulated over parts of them."""
        return False


class Objective(ABC):
    """One training method. Where its gradients come from one backward pass of one loss, it is a `LossObjective`."""

    def __init__(self, config: ObjectiveConfig) -> None:
        self.config = config

    @property
    def replays(self) -> int:
        """Optimizer steps on each batch, one after the other."""
        return 1

    def prepare(self, model: nn.Module) -> None:
        """Check that `model` fits and set up what lasts the whole run. Called once, before the optimizer is built."""

    @abstractmethod
    def training_step(self, model: nn.Module, x_BCHW: Tensor, y_B: Tensor, context: StepContext) -> dict[str, Tensor]:
        """Add the gradients of one batch to the parameters' `.grad` and return detached scalars, `loss` among them."""

    def terms(self, model: nn.Module, x_BCHW: Tensor, y_B: Tensor, context: StepContext) -> Mapping[str, Tensor]:
        """Return `loss` and the terms that it is made of, with graph, for whoever looks at them; nothing where it is one term.

        All graphs are alive at once, unlike in a training step: for few images.
        """
        return {}

    def is_settled(self, context: StepContext) -> bool:
        """Return whether the weights of the loss's terms have reached their values."""
        return True

    @abstractmethod
    def passes(self, attack_steps: int, num_members: int, epoch: int) -> float:
        """Return what one training step costs for one image, counted in forward passes of one network, for estimates before anything runs.

        A backward pass costs as much as a forward pass to the pixels and the same again to the weights: cross-entropy on one image is 3,
        a step of an attack 2.

        Args:
            attack_steps: of the inner attack. num_members: networks of an ensemble; 1 for other models. epoch: 0-based.
        """

    def after_optimizer_step(self, model: nn.Module, context: StepContext) -> None:
        """Undo what the step needed on the weights (AWP). Called after each optimizer step, before constraints."""

    def step_state(self) -> dict[str, Tensor]:
        """Return what a step leaves for the next one of the same epoch, for a training that is taken up between the two."""
        return {}

    def load_step_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `step_state` returned."""


class LossObjective(Objective):
    """A training method that is a loss."""

    @abstractmethod
    def loss(self, model: nn.Module, x_BCHW: Tensor, y_B: Tensor, context: StepContext) -> Mapping[str, Tensor]:
        """Return `loss` (scalar with graph) and any number of further named scalars to log."""

    def terms(self, model: nn.Module, x_BCHW: Tensor, y_B: Tensor, context: StepContext) -> Mapping[str, Tensor]:
        return self.loss(model, x_BCHW, y_B, context)

    def training_step(self, model: nn.Module, x_BCHW: Tensor, y_B: Tensor, context: StepContext) -> dict[str, Tensor]:
        return backward(self.loss(model, x_BCHW, y_B, context))


def backward(terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add the gradients of `terms["loss"]` to the parameters' `.grad` and return all terms, detached."""
    terms["loss"].backward()
    return {name: value.detach() for name, value in terms.items()}


@dataclass(frozen=True)
class ObjectiveEntry:
    """A named objective: `create(config)` makes it.

    `selection`: which checkpoint `training.validation.select` keeps where nobody says: `last` for an objective that does not train for
    robust accuracy, which would select an arbitrary epoch.
    """

    name: str
    description: str
    config: type[ObjectiveConfig]
    create: Callable[[Any], Objective]
    selection: Literal["best", "last"] = "best"


@once_for_plugins
def objectives() -> dict[str, ObjectiveEntry]:
    """Return all objectives by name, collected from the tuples `OBJECTIVES` in `trainers/objectives/`."""
    return scan("trainers.objectives", "OBJECTIVES", ObjectiveEntry)


def objective_entry(name: str) -> ObjectiveEntry:
    """Return the entry of an objective; an unknown name is a `UserError` with the nearest ones."""
    entries = objectives()
    if name not in entries:
        raise unknown_name("objective", name, entries, broken_files("trainers.objectives"))
    return entries[name]


def build_objective(config: ObjectiveConfig) -> Objective:
    """Return the objective that `config` describes."""
    return objective_entry(config.name).create(config)


def _parse(value: Any) -> Any:
    """Validate `{"name": ..., parameters}` with the config class of that name; a bare name stands for its defaults."""
    if isinstance(value, ObjectiveConfig):
        value = value.model_dump()
    if isinstance(value, str):
        value = {"name": value}
    if isinstance(value, Mapping) and "name" in value:
        if not isinstance(value["name"], str):
            raise ValueError(f"the name of an objective is text, not {value['name']!r:.100}")
        return objective_entry(value["name"]).config(**value)
    return value


ObjectiveField = Annotated[ObjectiveConfig, BeforeValidator(_parse)]
