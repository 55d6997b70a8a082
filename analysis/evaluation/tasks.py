"""An evaluation as a list of independent blocks of work: (checkpoint, attack and protocol, block of samples).

Whoever runs a block gets the same record, because every seed derives from the root seed, the attack's name and the block.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from analysis.attacked_model.draws import all_configurations
from analysis.attacked_model.identity import identity_hash
from analysis.attacked_model.plain_model import images_like, plain_model
from analysis.attacked_model.state_guard import restored_state
from analysis.attacks.registry import attack_entry, check_attack, parse_attack_parameters
from analysis.evaluation.gradient_paths import gradient_path, with_substitutes
from analysis.evaluation.inputs import images_of, labels_of, remarks_on
from analysis.evaluation.protocols import Scoring
from analysis.evaluation.studies import StudyPoint, StudySettings, applies, epsilon_levels, study_passes
from analysis.evaluation.suites import AttackItem, Suite, fitted_to_classes, load_suite
from analysis.fingerprints import data_hash, json_hash, weights_hash
from models.configuration import Config
from models.errors import UserError
from models.modes import mode
from models.randomness import ResampleOnForward, num_configurations
from models.threat_model import ThreatModel

FORMAT_VERSION = 2
MAX_BLOCK_SIZE = 256
_EPSILON_ZERO_SAMPLES = 64
_NUM_TRIED = 16  # images on which the model is tried before anything is planned
_BACKWARD_COST = 2.0  # a backward pass to the pixels costs about two forward passes

# What a task knows of its plan: a record may serve another plan in which these differ.
PLAN_FIELDS = {"suite", "num_blocks", "cost", "stands_for", "position", "succeeds"}

_logger = logging.getLogger(__name__)

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
    cost: float = Field(0.0, description="Estimated work: forward passes of one image; a backward pass counts as two.")

    @property
    def key(self) -> str:
        """Name of the record: equal for equal work."""
        return json_hash(self.model_dump(mode="json", exclude=PLAN_FIELDS))

    @property
    def key_without_model(self) -> str:
        """Name of the record in versions for which a model was its weights."""
        return json_hash(self.model_dump(mode="json", exclude=PLAN_FIELDS | {"model"}))

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


def bare_model(model: nn.Module) -> nn.Module:
    """Return the model whose draws the protocols control: `ResampleOnForward` is taken off; made under inference mode, it is copied."""
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
    if not 1 <= batch_size:
        raise UserError(f"batch_size is {batch_size}; it must be at least 1")
    spec = getattr(model, "spec", None)
    defence = defence or (spec.defence if spec is not None else None)
    chosen = load_suite(suite, defence)
    scoring = chosen.scoring
    if num_draws is not None:
        if num_draws < 1:
            raise UserError(f"num_draws is {num_draws}; it must be at least 1")
        selection = min(scoring.num_selection_draws, num_draws)
        scoring = scoring.model_copy(
            update={
                "num_evaluation_draws": num_draws,
                "num_selection_draws": selection,
                "enumerate_up_to": min(scoring.enumerate_up_to, num_draws),
            }
        )
    num_classes = _num_classes(model, x, y)
    for remark in remarks_on(*given, y, num_classes):
        _logger.warning("%s", remark)
    total = num_configurations(model)
    configurations = None if total == math.inf else int(total)
    randomized = configurations != 1
    finite = randomized and all_configurations(model, scoring.enumerate_up_to) is not None
    items = [item for item in chosen.attacks if item.is_for(randomized, finite=finite)]
    if chosen.attacks and not items:
        raise UserError(f"no attack of suite {chosen.name!r} is for {'randomized' if randomized else 'deterministic'} models")
    items, changes = fitted_to_classes(items, num_classes)
    for change in changes:
        _logger.warning("%s", change)
    path = gradient_path(model, x, y)
    items, more_changes = with_substitutes(items, path, model, x, y)
    for change in more_changes:
        _logger.warning("%s", change)
    studies = chosen.studies if path != "none" else _without_gradients(chosen.studies)
    if chosen.attacks and not items:
        raise UserError(f"no attack of suite {chosen.name!r} works with {num_classes} classes: {'; '.join(changes)}")
    for item in items:
        check_attack(item.attack, item.parameters_for(randomized, threat_model.norm), item.threat_model(threat_model), num_classes)

    limit = num_samples if num_samples is not None else chosen.num_samples
    order = class_balanced_order(y)[:limit]
    size = min(batch_size, MAX_BLOCK_SIZE)
    blocks = [tuple(order[start : start + size]) for start in range(0, len(order), size)]
    hashes: dict[tuple[int, ...], str] = {}
    shared: dict[str, Any] = {
        "threat_model": threat_model,
        "scoring": scoring,
        "seed": seed,
        "num_classes": num_classes,
        "num_configurations": configurations,
        "checkpoint": weights_hash(model),
        "model": identity_hash(model, tuple(x.shape[1:])),
        "defence": defence,
        "suite": chosen.name,
    }

    def tasks_for(ids_of_blocks: Sequence[tuple[int, ...]], **facts: Any) -> list[BlockTask]:
        made = []
        for block, ids in enumerate(ids_of_blocks):
            if ids not in hashes:
                hashes[ids] = data_hash(x[list(ids)], y[list(ids)])
            task = BlockTask(block=block, ids=ids, data=hashes[ids], num_blocks=len(ids_of_blocks), **facts, **shared)
            # What the registry built is known by its record and its weights; of any other model those said too little.
            succeeds = task.key_without_model if spec is not None else ""
            made.append(task.model_copy(update={"cost": estimated_cost(task), "succeeds": succeeds}))
        return made

    plan = tasks_for(blocks, kind="clean")
    if randomized and any("T4" in item.protocols for item in items):
        plan += tasks_for(blocks, kind="clean", protocol="T4")
    for item in items:
        kept = _first(blocks, item.num_samples)
        for protocol, stands_for in _protocols(item, randomized):
            plan += tasks_for(kept, kind="attack", item=item, protocol=protocol, stands_for=stands_for)
    probe = _epsilon_zero_item(items, randomized)
    if probe is not None:
        plan += tasks_for(_first(blocks, _EPSILON_ZERO_SAMPLES)[:1], kind="epsilon_zero", item=probe)
    if studies is not None:
        num_pixels = math.prod(x.shape[1:])
        for item, point, count in _study_items(studies, threat_model, num_pixels, randomized, configurations):
            kept = _first(blocks, count)
            plan += tasks_for(kept[:1] if point.name == "calibration" else kept, kind="study", item=item, study=point)
    return [task.model_copy(update={"position": position}) for position, task in enumerate(plan)]


def estimated_cost(task: BlockTask) -> float:
    """Return the work of a block in forward passes of one image."""
    scoring = task.scoring
    draws = 1
    if task.randomized:
        draws = scoring.num_evaluation_draws + scoring.num_selection_draws
        if task.num_configurations is not None and task.num_configurations <= scoring.enumerate_up_to:
            draws = task.num_configurations + scoring.num_selection_draws
    if task.item is None:
        return len(task.ids) * draws
    entry = attack_entry(task.item.attack)
    parameters = parse_attack_parameters(task.item.attack, task.item.parameters_for(task.randomized, task.threat_model.norm))
    gradient_draws = task.item.num_draws if task.randomized and task.protocol == "T1" else 1
    # Where no more draws are asked for than there are, each gradient takes all of them.
    takes_all = task.num_configurations is not None and task.num_configurations <= min(gradient_draws, scoring.enumerate_up_to)
    gradient_draws = task.num_configurations if takes_all and task.num_configurations is not None else gradient_draws
    cost = entry.cost(parameters, gradient_draws, task.num_classes, takes_all or gradient_draws == 1)
    passes = cost.forward + _BACKWARD_COST * cost.backward
    if task.study is not None:
        return study_passes(task.study, passes, gradient_draws, draws, len(task.ids))
    repeats = {"T0": scoring.num_repetitions, "T1": 1, "T2": scoring.num_known_draws, "T4": scoring.num_averaged_draws}
    runs = repeats[task.protocol] if task.randomized else 1
    return len(task.ids) * (runs * passes + (draws if task.protocol == "T1" else 2 * runs))


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
