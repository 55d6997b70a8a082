"""Running one block of an evaluation, on any worker."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from analysis.attacked_model.backward import WithBackward
from analysis.attacked_model.draws import ONLY_DRAW, seeded_draws
from analysis.attacked_model.folding import computes_the_same, folded_for_evaluation
from analysis.attacked_model.model import AttackedModel
from analysis.attacked_model.plain_model import images_like, plain_model
from analysis.attacked_model.state_guard import StateReport, restored_state
from analysis.attacks.registry import AttackOutput, AttackProblem, attack_entry, parse_attack_parameters
from analysis.evaluation.block_task import BlockTask
from analysis.evaluation.examination import (
    company_facts,
    gradient_calls_in_forward,
    gradient_prediction,
    liveness,
    missing_gradients,
    output_facts,
    shares_draw_in_batch,
)
from analysis.evaluation.images import encode_png
from analysis.evaluation.inputs import images_of, labels_of, rows_of
from analysis.evaluation.points import PointStore, PointTap
from analysis.evaluation.protocols import BlockOutcome, BlockSetting, run_protocol, score_clean
from analysis.evaluation.records import Record, pack_rows
from analysis.evaluation.study_runs import Study, StudyOutcome
from analysis.evaluation.tasks import bare_model
from analysis.fingerprints import data_hash, weights_hash
from models.accelerator import has_module_like_cuda
from models.errors import UserError
from models.modes import mode
from models.randomness import derive_seed, resample
from models.threat_model import ThreatModel

_NUM_EXAMINED = 200
_NUM_LIVE = 16
_NUM_EXAMPLES = 4
_NUM_TRACED = 2
_NUM_COMPARED_DRAWS = 2

_logger = logging.getLogger(__name__)


@torch.inference_mode(False)
def measure_block(
    model: nn.Module, x: Any, y: Any, task: BlockTask, run_study: Callable[[Study], StudyOutcome], points: PointStore | None = None
) -> Record:
    """Run one block and return its record.

    Args:
        model: the model of the plan, on any device; it is as before afterwards.
        x, y: all images and labels of the plan, not only the block's.
        task: from `plan_blocks`. run_study: runs a block of a study.
        points: where perturbed images are kept, or taken from in the place of an attack; None: neither.

    Raises:
        ValueError: images are not those of the plan.
        UserError: the weights are not those of the plan; points that are to be scored are not there.
    """
    model = bare_model(model)
    hash_before = weights_hash(model)
    if hash_before != task.checkpoint:
        raise UserError(
            f"the model's weights are {hash_before[:16]}, those of the plan were {task.checkpoint[:16]}: something has changed them since. "
            "A model that changes them when it is called has no accuracy of its own"
        )
    rows = list(task.ids)
    x_block = images_of(rows_of(x, rows))
    y_block = labels_of(rows_of(y, rows), len(rows))
    if data_hash(x_block, y_block) != task.data:
        raise ValueError(f"the images of block {task.block} are not those of the plan")
    like = images_like(model, x_block)
    x_block, y_block = x_block.to(like), y_block.to(like.device)

    tap = points.tap(task) if points is not None else None
    if tap is not None:
        tap.move(lambda kept: kept.to(like))

    started = time.perf_counter()
    with mode(model, "eval"), restored_state(model) as outer:
        plain = plain_model(model, x_block[:1])
        network, num_folded = plain, 0
        # Points are scored by the network they were made on: where folding failed there, it would here.
        if tap is None or tap.num_folded != 0 or task.points_of:
            network, num_folded = folded_for_evaluation(plain, x_block[:_NUM_TRACED])
        measured, report = _measured(network, x_block, y_block, task, run_study, tap)
        if num_folded and not _folding_holds(plain, network, x_block, measured.outcome, task):
            _logger.warning("block %d is run again: with batch normalization folded, the model computes something else", task.block)
            num_folded = 0
            measured, report = _measured(plain, x_block, y_block, task, run_study, tap)
    seconds = time.perf_counter() - started
    if points is not None and tap is not None and tap.stored is None:
        points.write(task, tap.seen, num_folded)

    threat_model = _threat_model(task)
    return {
        "key": task.key,
        "header": {**_header(task), "radius": threat_model.epsilon, "bounded": _bounded(task)},
        "samples": _columns(measured.outcome, task, y_block),
        "block": {
            **_block_facts(measured.outcome),
            "liveness": measured.liveness,
            "hygiene": _hygiene([*report.changed, *outer.changed], measured.training_modules, weights_hash(model) == hash_before),
            "examination": measured.examined,
            "study": measured.study,
            "num_folded": num_folded,
            "examples": _examples(measured.outcome, task, x_block),
        },
        "measured": {"seconds": seconds, "device": _device_name(like.device), "versions": _versions()},
    }


@dataclass(frozen=True)
class _Measured:
    """What was seen of a network in one block."""

    outcome: BlockOutcome
    study: dict[str, Any]
    liveness: dict[str, dict[str, float]]
    training_modules: int
    examined: dict[str, Any]


def _measured(
    network: nn.Module, x: Tensor, y: Tensor, task: BlockTask, run_study: Callable[[Study], StudyOutcome], tap: PointTap | None
) -> tuple[_Measured, StateReport]:
    with restored_state(network) as report:
        live_seed = derive_seed(task.seed, "examination", task.block)
        before = liveness(network, x[:_NUM_LIVE], live_seed)
        outcome, study = _run(network, x, y, task, run_study, tap)
        training_modules = sum(module.training for module in network.modules())
        after = liveness(network, x[:_NUM_LIVE], live_seed)
        examined = _examine(network, x, y, task) if task.kind == "clean" and task.block == 0 else {}
    return _Measured(outcome, study, {"before": before, "after": after}, training_modules, examined), report


def _folding_holds(model: nn.Module, folded: nn.Module, x: Tensor, outcome: BlockOutcome, task: BlockTask) -> bool:
    draws = seeded_draws(_NUM_COMPARED_DRAWS, task.seed, "evaluation") if task.randomized else (ONLY_DRAW,)
    return computes_the_same(model, folded, [x, *outcome.points], draws)


def _run(
    model: nn.Module, x: Tensor, y: Tensor, task: BlockTask, run_study: Callable[[Study], StudyOutcome], tap: PointTap | None
) -> StudyOutcome:
    """Return the outcome of a block and, for a study, its facts."""
    name = "clean" if task.item is None else f"{task.item.name}:{task.kind}"
    setting = BlockSetting(
        model,
        x,
        y,
        seed=task.seed,
        attack_name=name,
        block=task.block,
        scoring=task.scoring,
        num_draws=task.item.num_draws if task.item is not None else 1,
    )
    if task.item is None:
        return score_clean(setting, averaged=task.protocol == "T4"), {}
    threat_model = _threat_model(task)
    if task.study is not None:
        return run_study(Study(task.study, setting, threat_model, task.num_classes))
    entry = attack_entry(task.item.attack)
    parameters = parse_attack_parameters(task.item.attack, task.item.parameters_for(task.randomized, task.threat_model.norm))

    def attack(attacked: AttackedModel, seed: int) -> AttackOutput:
        return entry.run(attacked, AttackProblem(x, y, threat_model, task.num_classes, seed), parameters)

    return run_protocol(task.protocol, setting, attack if tap is None else tap.through(attack)), {}


def _threat_model(task: BlockTask) -> ThreatModel:
    return task.threat_model if task.item is None else task.item.threat_model(task.threat_model)


def _bounded(task: BlockTask) -> bool:
    return task.item is None or attack_entry(task.item.attack).bounded


def _columns(outcome: BlockOutcome, task: BlockTask, y: Tensor) -> dict[str, Any]:
    return {
        "ids": list(task.ids),
        "labels": y.tolist(),
        "correct": {name: pack_rows(matrix.cpu().numpy()) for name, matrix in outcome.correct.items()},
        "num_correct": {name: matrix.sum(1).tolist() for name, matrix in outcome.correct.items()},
        "margin": outcome.margin_S.tolist(),
        "linf": outcome.linf_S.tolist(),
        "l2": outcome.l2_S.tolist(),
        "num_unchanged": outcome.num_unchanged_S.tolist(),
    }


def _block_facts(outcome: BlockOutcome) -> dict[str, Any]:
    return {
        "num_draws": {name: matrix.shape[1] for name, matrix in outcome.correct.items()},
        "exact": outcome.exact,
        "num_points": outcome.num_points,
        "lowest": outcome.lowest,
        "highest": outcome.highest,
        "num_not_finite": outcome.num_not_finite,
        "num_out_of_range": outcome.num_out_of_range,
        "num_forward": outcome.num_forward,
        "num_backward": outcome.num_backward,
        "draws_disjoint": outcome.draws_disjoint,
    }


def _examples(outcome: BlockOutcome, task: BlockTask, x: Tensor) -> list[str]:
    """Return the first images as they were scored, as PNG in base64: clean ones, and perturbed ones under T1."""
    if task.block > 0 or task.protocol != "T1" or task.kind not in ("clean", "attack"):
        return []
    points = x if task.kind == "clean" or outcome.x is None else outcome.x
    return [encode_png(image) for image in points[:_NUM_EXAMPLES]]


def _hygiene(changed: list[str], training_modules: int, same_weights: bool) -> dict[str, Any]:
    return {"changed": sorted(set(changed)), "training_modules": training_modules, "same_weights": same_weights}


def _examine(model: nn.Module, x: Tensor, y: Tensor, task: BlockTask) -> dict[str, Any]:
    x, y = x[:_NUM_EXAMINED], y[:_NUM_EXAMINED]
    seed = derive_seed(task.seed, "examination")
    resample(model, torch.Generator().manual_seed(seed))
    return {
        "num_samples": len(x),
        "num_pixels": x[0].numel(),
        "gradient_calls_in_forward": gradient_calls_in_forward(model, x[:2]),
        "shares_draw_in_batch": shares_draw_in_batch(model, x, seed),
        "has_gradient": getattr(model, "has_gradient", True),
        "missing_gradients": missing_gradients(model, x, y, task.threat_model, seed),
        # A stand-in for the backward pass is not asked to be the gradient of the answers.
        "prediction": {} if _has_stand_in(model) else gradient_prediction(model, x, y, task.threat_model, seed),
        "outputs": output_facts(model, x, y, seed),
        "company": company_facts(model, x, seed),
    }


def _has_stand_in(model: nn.Module) -> bool:
    return any(isinstance(module, WithBackward) for module in model.modules())


def _header(task: BlockTask) -> dict[str, Any]:
    return task.model_dump(mode="json", exclude={"ids", "cost", "succeeds"} | ({"points_of"} if not task.points_of else set()))


def _device_name(device: torch.device) -> str:
    return torch.get_device_module(device).get_device_name(device) if has_module_like_cuda(device) else device.type


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("rayndom", "numpy", "torchattacks"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions
