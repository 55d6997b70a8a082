"""An evaluation as a list of independent blocks of work: (checkpoint, attack and protocol, block of samples).

Whoever runs a block gets the same record, because every seed derives from the root seed, the attack's name and the block.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from analysis.attacked_model.draws import all_configurations
from analysis.attacked_model.identity import identity_hash
from analysis.attacked_model.plain_model import images_like, plain_model
from analysis.attacked_model.state_guard import restored_state
from analysis.attacks.registry import attack_entry, check_attack
from analysis.evaluation.block_task import BlockTask, RowProtocol
from analysis.evaluation.cost import estimated_cost, scoring_cost
from analysis.evaluation.gradient_paths import gradient_path, with_substitutes
from analysis.evaluation.inputs import images_of, labels_of, remarks_on
from analysis.evaluation.protocols import Scoring
from analysis.evaluation.studies import StudyPoint, StudySettings, applies, epsilon_levels
from analysis.evaluation.suites import AttackItem, Suite, fitted_to_classes, load_suite
from analysis.fingerprints import data_hash, weights_hash
from models.errors import UserError
from models.modes import mode
from models.randomness import ResampleOnForward, num_configurations
from models.threat_model import ThreatModel

MAX_BLOCK_SIZE = 256
_EPSILON_ZERO_SAMPLES = 64
_NUM_TRIED = 16  # images on which the model is tried before anything is planned

_logger = logging.getLogger(__name__)


def bare_model(model: nn.Module) -> nn.Module:
    """Return the model whose draws the protocols control: `ResampleOnForward` is taken off; made under inference mode, it is copied.

    Raises:
        UserError: it is no module.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"a model must be a torch.nn.Module (a function can be the forward of one), not {type(model).__name__}")
    while isinstance(model, ResampleOnForward):
        model = model.model
    if any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())):
        return copy.deepcopy(model)
    return model


def class_balanced_order(y: Tensor) -> list[int]:
    """Return all rows in an order whose every beginning is as balanced over the classes as possible; it depends on `y` alone."""
    seen: dict[int, int] = {}
    ranks = []
    for row, label in enumerate(y.tolist()):
        seen[label] = seen.get(label, -1) + 1
        ranks.append((seen[label], label, row))
    return [row for _, _, row in sorted(ranks)]


@torch.inference_mode(False)
def plan_blocks(
    model: nn.Module,
    x: Any,
    y: Any,
    suite: str | Path | Suite = "quick",
    *,
    defence: str | None = None,
    threat_model: ThreatModel | None = None,
    seed: int = 0,
    batch_size: int = MAX_BLOCK_SIZE,
    num_draws: int | None = None,
    num_samples: int | None = None,
) -> list[BlockTask]:
    """Return the blocks of an evaluation, in the order in which they are best run. Arguments are those of `evaluate`.

    Raises:
        UserError: anything that cannot be evaluated, before any work is done.
    """
    model = bare_model(model)
    threat_model = threat_model or ThreatModel()
    given = (x, y)
    x = images_of(x)
    y = labels_of(y, len(x))
    check_seed(seed)
    check_counts(batch_size=batch_size, num_draws=num_draws, num_samples=num_samples)
    spec = getattr(model, "spec", None)
    defence = defence or (spec.defence if spec is not None else None)
    chosen = load_suite(suite, defence)
    scoring = _with_draws(chosen.scoring, num_draws)
    num_classes = _num_classes(model, x, y)
    configurations = _configurations(model)
    randomized = configurations != 1
    finite = randomized and all_configurations(model, scoring.enumerate_up_to) is not None
    items, changes = _fitting_items(chosen, randomized, finite, num_classes)
    path = gradient_path(model, x, y)
    items, more_changes = with_substitutes(items, path, model, x, y)
    remarks = remarks_on(*given, y, num_classes) + changes + more_changes
    for remark in remarks:
        _logger.warning("%s", remark)
    if chosen.attacks and not items:
        raise UserError(f"no attack of suite {chosen.name!r} works with {num_classes} classes: {'; '.join(changes)}")
    for item in items:
        check_attack(item.attack, item.parameters_for(randomized, threat_model.norm), item.threat_model(threat_model), num_classes)

    shared = {
        "threat_model": threat_model,
        "scoring": scoring,
        "seed": seed,
        "num_classes": num_classes,
        "num_configurations": configurations,
        "checkpoint": weights_hash(model),
        "model": identity_hash(model, tuple(x.shape[1:])),
        "defence": defence,
        "suite": chosen.name,
        "remarks": tuple(remarks),
    }
    limit = num_samples if num_samples is not None else chosen.num_samples
    blocks = _Blocks(x, y, class_balanced_order(y)[:limit], min(batch_size, MAX_BLOCK_SIZE), shared, is_registered=spec is not None)
    plan = blocks.tasks(kind="clean")
    if randomized and any("T4" in item.protocols for item in items):
        plan += blocks.tasks(kind="clean", protocol="T4")
    for item in items:
        for protocol, stands_for in _protocols(item, randomized):
            plan += blocks.tasks(item.num_samples, kind="attack", item=item, protocol=protocol, stands_for=stands_for)
    probe = _epsilon_zero_item(items, randomized)
    if probe is not None:
        plan += blocks.tasks(_EPSILON_ZERO_SAMPLES, only_first=True, kind="epsilon_zero", item=probe)
    studies = chosen.studies if path != "none" else _without_gradients(chosen.studies)
    if studies is not None:
        num_pixels = math.prod(x.shape[1:])
        for item, point, count in _study_items(studies, threat_model, num_pixels, randomized, configurations):
            plan += blocks.tasks(count, only_first=point.name == "calibration", kind="study", item=item, study=point)
    return [task.model_copy(update={"position": position}) for position, task in enumerate(plan)]


class _Blocks:
    """The images of an evaluation in blocks, and the tasks that are made of them.

    Args:
        x, y: all images and labels. order: rows that are evaluated, the most important first. size: images of a block.
        shared: what all tasks of the evaluation have in common.
        is_registered: what the registry built is known by its record and its weights; of any other model those say too little.
    """

    def __init__(self, x: Tensor, y: Tensor, order: Sequence[int], size: int, shared: dict[str, Any], *, is_registered: bool) -> None:
        self.x, self.y, self.shared, self.is_registered = x, y, shared, is_registered
        self.rows = [tuple(order[start : start + size]) for start in range(0, len(order), size)]
        self.hashes: dict[tuple[int, ...], str] = {}

    def tasks(self, count: int | None = None, *, only_first: bool = False, **facts: Any) -> list[BlockTask]:
        """Return a task for each block of the first `count` images (None: all), or for the first block alone.

        Args:
            facts: what these tasks are.
        """
        blocks = _first(self.rows, count)
        made = []
        for block, ids in enumerate(blocks[:1] if only_first else blocks):
            if ids not in self.hashes:
                self.hashes[ids] = data_hash(self.x[list(ids)], self.y[list(ids)])
            num_blocks = 1 if only_first else len(blocks)
            task = BlockTask(block=block, ids=ids, data=self.hashes[ids], num_blocks=num_blocks, **facts, **self.shared)
            succeeds = task.key_without_model if self.is_registered else ""
            made.append(task.model_copy(update={"cost": estimated_cost(task), "succeeds": succeeds}))
        return made


def check_seed(seed: int) -> None:
    """Raise a `UserError` unless it is a whole number of 63 bits."""
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= seed < 2**63:
        raise UserError(f"seed is {seed!r:.40}; it must be a whole number from 0 to 2^63 - 1")


def check_counts(**counts: int | None) -> None:
    """Raise a `UserError` unless each is a whole number from 1 on, or None."""
    for name, number in counts.items():
        if number is not None and (isinstance(number, bool) or not isinstance(number, Integral) or number < 1):
            raise UserError(f"{name} is {number!r:.40}; it must be at least 1" + ("" if isinstance(number, Integral) else ", and whole"))


def _with_draws(scoring: Scoring, num_draws: int | None) -> Scoring:
    """Return how perturbed images are scored, with another number of draws where one is asked for."""
    if num_draws is None:
        return scoring
    return scoring.model_copy(
        update={
            "num_evaluation_draws": num_draws,
            "num_selection_draws": min(scoring.num_selection_draws, num_draws),
            "enumerate_up_to": min(scoring.enumerate_up_to, num_draws),
        }
    )


def _configurations(model: nn.Module) -> int | None:
    """Return how many draws a model has, 1 for a deterministic one; None: a continuum."""
    total = num_configurations(model)
    return None if total == math.inf else int(total)


def _fitting_items(chosen: Suite, randomized: bool, finite: bool, num_classes: int) -> tuple[list[AttackItem], list[str]]:
    """Return the attacks of a suite that are for such a model, as they work with K classes, and what was changed, in words."""
    items = [item for item in chosen.attacks if item.is_for(randomized, finite=finite)]
    if chosen.attacks and not items:
        raise UserError(f"no attack of suite {chosen.name!r} is for {'randomized' if randomized else 'deterministic'} models")
    return fitted_to_classes(items, num_classes)


def on_kept_points(plan: Sequence[BlockTask], model: nn.Module, x: Tensor, y: Tensor) -> list[BlockTask]:
    """Return the blocks that score, on another model, the points that a plan's attacks under T1 made on theirs, and its clean images.

    Args:
        plan: of the evaluation that kept its points. model: the other one. x, y: images and labels of the plan.

    Raises:
        UserError: the model does not fit the images or the labels, or no attack of the plan ran under T1.
    """
    model = bare_model(model)
    num_classes = _num_classes(model, x, y)
    spec = getattr(model, "spec", None)
    whose: dict[str, Any] = {
        "num_classes": num_classes,
        "num_configurations": _configurations(model),
        "checkpoint": weights_hash(model),
        "model": identity_hash(model, tuple(x.shape[1:])),
        "defence": spec.defence if spec is not None else None,
        "stands_for": ("T1",),
        "succeeds": "",
    }
    kept = [task for task in plan if task.kind in ("clean", "attack") and task.protocol == "T1"]
    if all(task.kind == "clean" for task in kept):
        raise UserError("no attack of this evaluation ran under T1, so it has no points that were made for an unknown draw")
    made = [task.model_copy(update=whose | {"points_of": task.points_key if task.has_points else ""}) for task in kept]
    return [task.model_copy(update={"position": place, "cost": scoring_cost(task)}) for place, task in enumerate(made)]


def _without_gradients(studies: StudySettings | None) -> StudySettings | None:
    """Return the studies that do not follow the model's gradients."""
    if studies is None:
        return None
    return studies.model_copy(update={"names": tuple(name for name in studies.names if name == "calibration")})


def _protocols(item: AttackItem, randomized: bool) -> list[tuple[RowProtocol, tuple[str, ...]]]:
    """Return the protocols to run with those they stand for. For a deterministic model T0 = T1 = T2 = T3 = T4: one pass."""
    if not randomized:
        return [("T1", item.protocols)]
    return [(protocol, (protocol,)) for protocol in item.protocols if protocol != "T3"]


def _study_items(
    settings: StudySettings, threat_model: ThreatModel, num_pixels: int, randomized: bool, num_configurations: int | None
) -> list[tuple[AttackItem, StudyPoint, int]]:
    """Return the item, the study and the number of images of every study that applies."""
    found = []
    for name in settings.names:
        if not applies(name, randomized=randomized, num_configurations=num_configurations, num_draws=settings.num_draws):
            continue
        levels: list[float | None] = [*epsilon_levels(threat_model, num_pixels)] if name == "epsilon" else [None]
        counts = {"gradient_resolution": settings.num_gradients, "unit_test": settings.num_tested, "calibration": 1}
        for level in levels:
            item = AttackItem(
                name=name if level is None else f"{name} {level:.6g}",
                attack=settings.attack,
                parameters={"steps": settings.steps},
                num_draws=settings.num_draws,
                epsilon=level,
            )
            # A study's record serves other suites, whichever studies they ask for besides.
            point = StudyPoint(name=name, level=level, settings=settings.model_copy(update={"names": (name,)}))
            found.append((item, point, counts.get(name, settings.num_samples)))
    return found


def _epsilon_zero_item(items: Sequence[AttackItem], randomized: bool) -> AttackItem | None:
    """Return the first attack that the harness itself runs under T1 with a radius: with radius 0 it must change nothing."""
    for item in items:
        entry = attack_entry(item.attack)
        if entry.bounded and entry.requires is None and not entry.is_transfer and (not randomized or "T1" in item.protocols):
            return item.model_copy(update={"epsilon": 0.0})
    return None


def _first(blocks: list[tuple[int, ...]], count: int | None) -> list[tuple[int, ...]]:
    """Return the blocks of the first `count` samples."""
    if count is None:
        return blocks
    kept: list[tuple[int, ...]] = []
    for ids in blocks:
        taken = sum(map(len, kept))
        if taken >= count:
            break
        kept.append(ids[: count - taken])
    return kept


def _num_classes(model: nn.Module, x: Tensor, y: Tensor) -> int:
    """Return K; a model that cannot be judged is a `UserError`."""
    tried = x[:_NUM_TRIED].to(images_like(model, x))
    network = plain_model(model, tried[:1])
    with restored_state(network), mode(network, "eval"), torch.no_grad():
        try:
            logits = network(tried)
        except UserError:
            raise
        except Exception as error:
            text = str(error).strip().partition("\n")[0]
            raise UserError(f"the model cannot be run on {len(tried)} images at once: {type(error).__name__}: {text}") from error
    if logits.dim() != 2 or len(logits) != len(tried):
        raise UserError(f"the model must return logits of shape (B, K), not {tuple(logits.shape)} for {len(tried)} images")
    if logits.shape[1] < 2:
        raise UserError(
            f"the model returns {logits.shape[1]} logit per image: with one class nothing can be misclassified. "
            "Return two logits, (-z/2, z/2), where z is the single logit of a binary classifier."
        )
    broken = int((~logits.isfinite().all(1)).sum())
    if broken:
        raise UserError(f"the model returns NaN or infinite logits for {broken} of {len(tried)} images")
    lowest, highest = int(y.min()), int(y.max())
    if lowest < 0 or highest >= logits.shape[1]:
        raise UserError(f"labels are in [{lowest}, {highest}], the model has {logits.shape[1]} classes")
    return logits.shape[1]
