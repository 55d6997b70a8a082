"""One block of an evaluation's work: one attack under one protocol on up to 256 images, and the names of what it makes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from analysis.evaluation.protocols import Scoring
from analysis.evaluation.studies import StudyPoint
from analysis.evaluation.suites import AttackItem
from analysis.fingerprints import json_hash
from models.configuration import Config
from models.threat_model import ThreatModel

FORMAT_VERSION = 2

# What a task knows of its plan: a record may serve another plan in which these differ.
PLAN_FIELDS = {"suite", "num_blocks", "cost", "stands_for", "position", "succeeds", "remarks"}

BlockKind = Literal["clean", "attack", "epsilon_zero", "study"]
RowProtocol = Literal["T0", "T1", "T2", "T4"]


class BlockTask(Config):
    """One block of work. `key` names its record; fields that change no number are no part of it."""

    format_version: int = Field(FORMAT_VERSION, description="Version of the records.")
    kind: BlockKind = Field(description="`clean`: score the images and examine the model; `attack`; `epsilon_zero`: C5; `study`.")
    study: StudyPoint | None = Field(None, description="What a block of kind `study` measures.")
    item: AttackItem | None = Field(None, description="The attack; none for `clean`.")
    protocol: RowProtocol = Field("T1", description="Protocol; a deterministic model has only T1.")
    stands_for: tuple[str, ...] = Field((), description="All protocols this one stands for (deterministic models).")
    threat_model: ThreatModel = Field(description="Threat model of the evaluation.")
    scoring: Scoring = Field(description="Draws.")
    seed: int = Field(description="Root seed of the evaluation.")
    num_classes: int = Field(description="K.")
    num_configurations: int | None = Field(description="Size of the space of draws; none: infinite; 1: deterministic.")
    block: int = Field(ge=0, description="Number of the block.")
    ids: tuple[int, ...] = Field(description="Rows of the images in this block.")
    checkpoint: str = Field(description="Hash of the weights.")
    model: str = Field("", description="Hash of what the model computes with them: see `analysis.attacked_model.identity`.")
    data: str = Field(description="Hash of the block's images and labels.")
    defence: str | None = Field(None, description="Name of the defence.")
    suite: str = Field("", description="Name of the suite.")
    num_blocks: int = Field(1, description="Blocks of this attack and protocol.")
    position: int = Field(0, description="Place in the plan.")
    succeeds: str = Field("", description="Key under which an earlier version kept this block; empty: such a record is not to be trusted.")
    remarks: tuple[str, ...] = Field((), description="What a reader of the numbers should know of how images, labels and suite were read.")
    cost: float = Field(0.0, description="Estimated work: forward passes of one image; a backward pass counts as two.")
    points_of: str = Field("", description="Key of the points that are scored, where they were made on another model; empty: attack.")

    @property
    def key(self) -> str:
        """Name of the record: equal for equal work."""
        return json_hash(self.model_dump(mode="json", exclude=self.unsaid_fields))

    @property
    def key_without_model(self) -> str:
        """Name of the record in versions for which a model was its weights."""
        return json_hash(self.model_dump(mode="json", exclude=self.unsaid_fields | {"model"}))

    @property
    def unsaid_fields(self) -> set[str]:
        """Fields that say nothing of the work: those of the plan, and that the points are the model's own."""
        return PLAN_FIELDS if self.points_of else PLAN_FIELDS | {"points_of"}

    @property
    def has_points(self) -> bool:
        """Whether the block makes perturbed images that are worth keeping; those of studies are not."""
        return self.kind in ("attack", "epsilon_zero")

    @property
    def num_points(self) -> int:
        """Perturbed images per sample: one per repetition under T0, one per known draw under T2."""
        if not self.randomized or self.protocol not in ("T0", "T2"):
            return 1
        return (
            self.scoring.num_repetitions
            if self.protocol == "T0"
            else self._enumerated(self.scoring.num_known_draws) or (self.scoring.num_known_draws)
        )

    @property
    def points_key(self) -> str:
        """Name of the block's perturbed images: equal where the attack is the same, whatever draws score it."""
        if self.points_of:
            return self.points_of
        scoring, item = self.scoring, self.item
        # What of the scoring an attack sees: see `analysis.evaluation.protocols`.
        seen = {
            "T0": [scoring.num_repetitions, scoring.attacked_draw],
            "T1": [self._enumerated(item.num_draws if item is not None else 1)],
            "T2": [scoring.num_known_draws, self._enumerated(scoring.num_known_draws)],
            "T4": [scoring.num_averaged_draws, self._enumerated(scoring.num_averaged_draws)],
        }[self.protocol]
        said = self.model_dump(mode="json", exclude=self.unsaid_fields | {"scoring"})
        return json_hash({**said, "seen": seen if self.randomized else []})

    def _enumerated(self, at_most: int) -> int | None:
        """Return the number of draws where an attack meets all of them, else None."""
        count = self.num_configurations
        return count if count is not None and count <= min(at_most, self.scoring.enumerate_up_to) else None

    @property
    def randomized(self) -> bool:
        """Whether the model has more than one draw."""
        return self.num_configurations != 1

    @property
    def title(self) -> str:
        """The task in words, for progress bars."""
        if self.item is None:
            name = "clean images"
        elif self.study is not None:
            name = f"study of {self.item.name.replace('_', ' ')},"
        else:
            name = self.item.name if self.item.epsilon is None else f"{self.item.name} at radius {self.item.epsilon:.3g}"
        return f"{name} {self.protocol} block {self.block + 1}/{self.num_blocks}"
