"""What a quantity is: a number, or a table of them, that the theory of a defence says something about, computed from a trained model.

Quantities are found by scanning `analysis/quantities/` for tuples named `QUANTITIES`; one more is one more entry, or one more file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from analysis.attacked_model.draws import seeded_draws, set_draw
from analysis.evaluation.tasks import class_balanced_order
from analysis.theory.transferability import Attack, undisturbed
from models.classifier import ModelSpec
from models.errors import UserError, unknown_name
from models.plugins import once_for_plugins
from models.randomness import derive_seed, is_randomized
from models.registry_files import broken_files, scan
from models.threat_model import ThreatModel
from trainers.attacks import pgd
from trainers.hardware import channels_last

Row = Mapping[str, Any]
ATTACK_STEPS = 20
MOST_IMAGES = 1000
"""The largest number of images that a quantity takes by itself."""


class NotComputable(UserError):
    """A quantity applies to the model, but not to what it does on these images."""


@dataclass(frozen=True)
class Finding:
    """What was found.

    Attributes:
        rows: a tidy frame. A list of whole numbers in a cell is a histogram.
        notes: sentences without which the table would mislead, or that say what follows from it.
        metrics: the numbers worth following from run to run, by short name.
        series: what a figure draws, as nested lists of numbers: `values` of a distribution; `grid` with `x` and `y` of a surface (several:
            `grids` with `labels`).
        how: in a few words, what it was measured on. num_samples, num_draws: images, and draws or pairs of draws.
    """

    rows: Sequence[Row]
    notes: tuple[str, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    series: Mapping[str, Any] = field(default_factory=dict)
    how: str = ""
    num_samples: int | None = None
    num_draws: int | None = None


@dataclass
class Subject:
    """A trained model and what it is measured with.

    Attributes:
        model: without `ResampleOnForward`. load_images: returns test images in [0,1] and labels; called when first needed.
        threat_model: what attacks may do. num_samples, num_draws: what the user asked for; None: what each quantity takes by itself.
        at_most: images, whatever a quantity takes; None: no limit. seed: root of all seeds. progress: is told what is being done.
        other: a second model, for quantities of two.
    """

    model: nn.Module
    load_images: Callable[[], tuple[Tensor, Tensor]]
    threat_model: ThreatModel = field(default_factory=ThreatModel)
    num_samples: int | None = None
    num_draws: int | None = None
    at_most: int | None = None
    seed: int = 0
    progress: Callable[[str], None] = lambda text: None
    other: nn.Module | None = None

    @cached_property
    def _loaded(self) -> tuple[Tensor, Tensor, list[int]]:
        x_NCHW, y_N = self.load_images()
        like = next(self.model.parameters())
        return channels_last(x_NCHW.to(like)), y_N.to(like.device), class_balanced_order(y_N)

    def images(self, count: int) -> tuple[Tensor, Tensor]:
        """Return test images and labels, as many of each class: `count` of them, or as many as the user asked for."""
        x_NCHW, y_N, order = self._loaded
        rows = order[: min(self.num_samples or count, self.at_most or len(order))]
        return x_NCHW[rows], y_N[rows]

    def draws(self, count: int) -> int:
        """Return the number of draws (or pairs of draws): `count`, or what the user asked for."""
        return self.num_draws or count

    def generator(self, *parts: int | str) -> torch.Generator:
        """Return a CPU generator whose seed derives from the root seed and `parts`."""
        return torch.Generator().manual_seed(derive_seed(self.seed, "analysis", *parts))

    @contextlib.contextmanager
    def one_draw(self) -> Iterator[None]:
        """Eval mode and one draw, the same for all quantities of this seed; afterwards everything is as before."""
        with undisturbed(self.model):
            set_draw(self.model, seeded_draws(1, self.seed, "analysis")[0])
            yield

    def attack(self) -> Attack:
        """Return PGD within the threat model against the draw that the model holds, with a random start of its own at each call."""
        generator, epsilon = self.generator("attack"), self.threat_model.epsilon

        def run(model: nn.Module, x_BCHW: Tensor, y_B: Tensor) -> Tensor:
            return pgd(
                model,
                x_BCHW,
                y_B,
                epsilon=epsilon,
                step_size=epsilon / 4,
                steps=ATTACK_STEPS,
                norm=self.threat_model.norm,
                generator=generator,
            )

        return run

    @property
    def spec(self) -> ModelSpec:
        """How the model was built.

        Raises:
            NotComputable: it does not say.
        """
        spec = getattr(self.model, "spec", None)
        if not isinstance(spec, ModelSpec):
            raise NotComputable(f"{type(self.model).__name__} does not say how it was built: it has no `spec`")
        return spec

    @property
    def attack_name(self) -> str:
        """The attack in words."""
        return f"PGD-{ATTACK_STEPS}, {self.threat_model}"


@dataclass(frozen=True)
class Requirement:
    """What a model must have.

    Attributes:
        text: in words, with the defences that have it. fits: whether a model has it.
    """

    text: str
    fits: Callable[[nn.Module], bool]


def has_layer(*kinds: type[nn.Module]) -> Callable[[nn.Module], bool]:
    """Return a predicate: a model has a module of one of these types."""
    return lambda model: any(isinstance(module, kinds) for module in model.modules())


ANY_MODEL = Requirement("any model", lambda model: True)
RANDOMIZED = Requirement("a model with more than one draw", is_randomized)


@dataclass(frozen=True)
class Quantity:
    """An entry of the registry.

    Attributes:
        name: what users type. title: head of its table. meaning: how to read it, one line. reference: paper and equation.
        requirement: what a model must have. compute: measures it; it may take parameters, which tables of papers set.
        cheap: it takes seconds on a small model and belongs to what is computed when nothing is named.
        of_two: it compares with a second model, which only tables of papers have. trained: False if training changes nothing of it.
    """

    name: str
    title: str
    meaning: str
    reference: str
    requirement: Requirement
    compute: Callable[..., Finding]
    cheap: bool = True
    of_two: bool = False
    trained: bool = True

    def applies(self, model: nn.Module) -> bool:
        """Return whether `model` has what it needs."""
        return not self.of_two and self.requirement.fits(model)


@once_for_plugins
def quantities() -> dict[str, Quantity]:
    """Return all quantities by name, in the order of their files."""
    return scan("analysis.quantities", "QUANTITIES", Quantity)


def quantity(name: str) -> Quantity:
    """Return an entry; an unknown name is a `UserError` with the nearest ones."""
    if name not in quantities():
        raise unknown_name("quantity", name, quantities(), broken_files("analysis.quantities"))
    return quantities()[name]


def rounded(values: Tensor) -> Any:
    """Return values as nested lists of numbers with six digits, for `Finding.series`."""

    def short(value: Any) -> Any:
        return [short(each) for each in value] if isinstance(value, list) else float(f"{value:.6g}")

    return short(values.detach().double().cpu().tolist())
