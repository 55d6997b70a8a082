"""Perturbed images as an attack left them, kept beside the records: attacked once, they can be scored again on other draws or models.

One safetensors file per block, named by what decides its points: everything but the scoring draws. A file holds the points bit by bit,
their strides (which decide in what order convolutions add), and what the attack reported: passes, mended images, the draws it saw.

Shapes: S samples of one block.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from analysis.attacked_model.draws import Draw
from analysis.attacked_model.model import AttackedModel
from analysis.attacks.registry import AttackOutput
from analysis.evaluation.block_task import BlockTask
from analysis.evaluation.protocols import RunAttack
from analysis.fingerprints import tensor_bytes
from models.errors import UserError
from models.file_content import check_ordinary
from models.files import whole_file

PointPurpose = Literal["keep", "score", "reuse"]

_FACTS = "rayndom"
_logger = logging.getLogger(__name__)
_KINDS: tuple[Literal["seed", "configuration"], ...] = ("seed", "configuration")


@dataclass(frozen=True)
class AttackedPoints:
    """What one attack of a block returned and reported.

    Attributes:
        output: the points (S, C, H, W) and what was mended in them.
        num_forward, num_backward: images sent through the network. used: the draws that the attack saw.
    """

    output: AttackOutput
    num_forward: int
    num_backward: int
    used: frozenset[Draw]


@dataclass(frozen=True)
class PointStore:
    """A folder of kept points.

    Attributes:
        folder: of the files.
        purpose: `keep`: attack and keep the points; `score`: take them in the place of attacks; `reuse`: take them where they are, else
            attack and keep them.
    """

    folder: Path
    purpose: PointPurpose = "keep"

    def path(self, task: BlockTask) -> Path:
        """Return the file of a block's points."""
        return self.folder / f"{task.points_key}.safetensors"

    def holds(self, task: BlockTask) -> bool:
        """Return whether the points of a block are there, whole and unchanged."""
        try:
            self.read(task)
        except UserError:
            return False
        return True

    def tap(self, task: BlockTask) -> PointTap | None:
        """Return what stands between a block and its attack; None for a block that keeps no points."""
        if not task.has_points:
            return None
        attacks = self.purpose == "keep" or (self.purpose == "reuse" and not self.holds(task))
        return PointTap() if attacks else PointTap(*self.read(task))

    def write(self, task: BlockTask, points: list[AttackedPoints], num_folded: int) -> None:
        """Keep the points of a block, as a whole or not at all.

        Args:
            num_folded: batch normalizations that were folded in the network that was attacked and scored.

        Raises:
            OSError: the disk is full or the folder cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        attacks = []
        for index, each in enumerate(points):
            tensors[f"points.{index}"] = each.output.x.detach().cpu().contiguous()
            for kind in _KINDS:
                values = sorted(draw.value for draw in each.used if draw.kind == kind)
                tensors[f"{kind}.{index}"] = torch.tensor(values, dtype=torch.int64)
            attacks.append(
                {
                    "strides": list(each.output.x.stride()),
                    "num_not_finite": each.output.num_not_finite,
                    "num_out_of_range": each.output.num_out_of_range,
                    "num_forward": each.num_forward,
                    "num_backward": each.num_backward,
                }
            )
        facts = {"key": task.points_key, "data": task.data, "num_folded": num_folded, "attacks": attacks, "digest": _digest(tensors)}
        content = safetensors.torch.save(tensors, metadata={_FACTS: json.dumps(facts)})
        with whole_file(self.path(task)) as file:
            file.write(content)

    def read(self, task: BlockTask) -> tuple[list[AttackedPoints], int]:
        """Return the points of a block and how many batch normalizations were folded, as `write` was given them, on the CPU.

        Raises:
            UserError: they are not there, or the file is not as it was written.
        """
        path = self.path(task)
        if not os.path.lexists(path):
            raise UserError(f"the points of {task.title} are not in {self.folder}; {_REMEDY}")
        check_ordinary(path)  # a pipe would be waited for
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads((file.metadata() or {})[_FACTS])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            whole = facts["digest"] == _digest(tensors) and facts["data"] == task.data and facts["key"] == task.points_key
            points = [_attacked(each, tensors, index) for index, each in enumerate(facts["attacks"])]
            num_folded = int(facts["num_folded"])
        # RuntimeError: strides that no tensor of this shape has.
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise UserError(f"the points {path} cannot be read ({str(error)[:300]}); {_REMEDY}") from None
        if not whole:
            raise UserError(f"the points {path} are not those that were written; {_REMEDY}")
        return points, num_folded


_REMEDY = "`rayndom evaluate` with `--keep-points` makes them"


@dataclass
class PointTap:
    """Stands between a block and its attack: writes down what the attack gives, or gives what was written down instead.

    Attributes:
        stored: what is given; None: the attack runs.
        num_folded: batch normalizations folded where the stored points were made.
        seen: what the attacks of the block gave.
    """

    stored: list[AttackedPoints] | None = None
    num_folded: int | None = None
    seen: list[AttackedPoints] = field(default_factory=list)

    def through(self, attack: RunAttack) -> RunAttack:
        """Return the attack as the block shall call it; what an earlier call had seen is forgotten."""
        self.seen = []
        return self._recorded(attack) if self.stored is None else self._replayed(self.stored)

    def _recorded(self, attack: RunAttack) -> RunAttack:
        def run(attacked: AttackedModel, seed: int) -> AttackOutput:
            output = attack(attacked, seed)
            self.seen.append(AttackedPoints(output, attacked.num_forward, attacked.num_backward, frozenset(attacked.used)))
            return output

        return run

    def _replayed(self, stored: list[AttackedPoints]) -> RunAttack:
        def run(attacked: AttackedModel, seed: int) -> AttackOutput:
            del seed
            points = stored[len(self.seen)]
            self.seen.append(points)
            attacked.passes.num_forward += points.num_forward
            attacked.passes.num_backward += points.num_backward
            attacked.used.update(points.used)
            return points.output

        return run

    def move(self, place: Callable[[Tensor], Tensor]) -> None:
        """Put stored points on the device of the model."""
        if self.stored is not None:
            self.stored = [
                AttackedPoints(
                    AttackOutput(place(each.output.x), each.output.num_not_finite, each.output.num_out_of_range),
                    each.num_forward,
                    each.num_backward,
                    each.used,
                )
                for each in self.stored
            ]


def point_bytes(tasks: list[BlockTask], image: Tensor) -> int:
    """Return the bytes that the points of blocks take.

    Args:
        image: one image (C, H, W) as it is attacked.
    """
    return sum(task.num_points * len(task.ids) for task in tasks if task.has_points) * image.numel() * image.element_size()


def _attacked(facts: dict[str, Any], tensors: dict[str, Tensor], index: int) -> AttackedPoints:
    flat = tensors[f"points.{index}"]
    # Strides too are as they were: a convolution adds in another order where channels lie last.
    x = torch.empty_strided(tuple(flat.shape), facts["strides"], dtype=flat.dtype).copy_(flat)
    used = {Draw(kind, value) for kind in _KINDS for value in tensors[f"{kind}.{index}"].tolist()}
    output = AttackOutput(x, facts["num_not_finite"], facts["num_out_of_range"])
    return AttackedPoints(output, facts["num_forward"], facts["num_backward"], frozenset(used))


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


@dataclass(frozen=True)
class KeptPoints:
    """The points of an evaluation's attacks under T1, by attack and sample.

    Attributes:
        store: their folder. plan: of the evaluation.
    """

    store: PointStore
    plan: list[BlockTask]

    def images(self, wanted: Iterable[tuple[str, int]]) -> dict[tuple[str, int], Tensor]:
        """Return the perturbed images (C, H, W) of (attack, sample) pairs, as far as they were kept; each file is read once."""
        places = {
            (task.item.name, sample): (task, row)
            for task in self.plan
            if task.kind == "attack" and task.protocol == "T1" and task.item is not None
            for row, sample in enumerate(task.ids)
        }
        by_block: dict[str, list[tuple[str, int]]] = {}
        for pair in wanted:
            if pair in places:
                by_block.setdefault(places[pair][0].key, []).append(pair)
        found: dict[tuple[str, int], Tensor] = {}
        for pairs in by_block.values():
            task = places[pairs[0]][0]
            if not self.store.path(task).is_file():
                continue
            try:
                (points, *_), _ = self.store.read(task)
            except UserError as error:  # a picture less: what is scored is read again where it is scored
                _logger.warning("%s", error)
                continue
            found |= {pair: points.output.x[places[pair][1]].clone() for pair in pairs}
        return found
