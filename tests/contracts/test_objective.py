"""What every objective of the registry promises, found by name: two workers train what one trains.

Loss, further scalars and gradients of one step on the halves of a batch average to those of the step on the whole batch, in float64;
noise and random starts are those of the images, so they differ by rank. Networks have no batch normalization, or a synchronized one. One
pair of processes serves all objectives.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn

from models.backbones.resnet import BasicBlock, ResNet
from models.classifier import Classifier, InputNormalization
from models.ensemble import Ensemble
from models.errors import UserError
from models.layer_replacement import of_type, replace_modules
from models.randomness import seed_streams
from models.threat_model import ThreatModel
from tests.orchestration.metric_names import unexplained
from trainers.accumulation import accumulate
from trainers.distributed import average_gradients, synchronize_batch_norm, world
from trainers.hardware import FULL
from trainers.objective import Objective, objective_entry, objectives
from trainers.step import InnerAttackConfig, StepContext
from trainers.streams import Streams

IMAGE_SHAPE = (3, 8, 8)
NUM_CLASSES = 4
BATCH = 8

# Settings beside the defaults under which a worker's part of the batch could count for something else than the whole.
VARIANTS: dict[str, dict[str, Any]] = {
    "red-per_sample": {"grad_scale": "per_sample"},
    "red-batch_mean": {"grad_scale": "batch_mean"},
    "red-spread": {"members": "spread"},
    "red-joint": {"computation": "joint"},
    "red-mean_loss": {"example": "mean_loss"},
    "red-random_member": {"example": "random_member"},
    "gal-joint": {"computation": "joint"},
    "trs-per_sample": {"gradient_scale": "per_sample"},
    "trs-joint": {"computation": "joint"},
    "dverge-distilling": {"pretraining_epochs": 0},
    "dverge-adversarial": {"adversarial_training": True},
    "ensemble_adversarial-random": {"example": "random_member_per_step"},
    "trades-awp": {"weight_perturbation": {"gamma": 0.01, "warmup_epochs": 0}},
    "adversarial-awp": {"weight_perturbation": {"gamma": 0.01, "warmup_epochs": 0}},
    "rat_taylor-first": {"order": 1},
}
CASES = [*objectives(), *(name for name in VARIANTS if name.partition("-")[0] in objectives())]

# Taylor terms and members spread over workers refuse synchronized batch statistics.
REFUSE_SYNCHRONIZED = ("rat_taylor", "red-spread")
STEPS = [(name, False) for name in CASES] + [(name, True) for name in CASES if not name.startswith(REFUSE_SYNCHRONIZED)]

# Random starts and noise are drawn per image, so both halves of a batch whose halves are equal see different ones.
NOISY = ("gal", "trs", "adversarial", "trades", "red")


def build(name: str, *, synchronized: bool = False) -> tuple[Objective, nn.Module]:
    """Return the objective of a case and a float64 model that it can train, in training mode."""
    base = name.partition("-")[0]
    entry = objective_entry(base)
    objective = entry.create(entry.config(**{"name": base} | VARIANTS.get(name, {})))
    if getattr(objective.config, "warmup_epochs", 0):
        objective = entry.create(objective.config.model_copy(update={"warmup_epochs": 0}))
    for model in (network(0, synchronized), Ensemble([network(seed, synchronized) for seed in range(3)])):
        seed_streams(model, 0)
        if synchronized and world()[1] > 1:
            synchronize_batch_norm(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                objective.prepare(model)
            except UserError:  # this objective trains an ensemble
                continue
        return objective, model.double().train()
    raise AssertionError(f"no model for {name}")


def network(seed: int, normalized: bool) -> nn.Module:
    """Return a residual network of one block, with or without normalizations, whose logits are not nearly equal."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = ResNet(BasicBlock, (1,), (4,), NUM_CLASSES, IMAGE_SHAPE, stem="cifar")
        nn.init.normal_(backbone.classifier.weight)
    if not normalized:
        replace_modules(backbone, of_type(nn.BatchNorm2d), lambda _name, _module: nn.Identity())
    return Classifier(InputNormalization((0.5,) * 3, (0.25,) * 3), backbone)


def own_rows(*, equal_halves: bool = False) -> tuple[Tensor, Tensor]:
    """Return this worker's rows of a batch; with `equal_halves` every worker of two has the same."""
    rank, size = world()
    x_BCHW = torch.rand((BATCH, *IMAGE_SHAPE), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y_B = torch.arange(BATCH) % NUM_CLASSES
    if equal_halves:
        x_BCHW, y_B = x_BCHW[: BATCH // 2].repeat(2, 1, 1, 1), y_B[: BATCH // 2].repeat(2)
    own = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
    return x_BCHW[own], y_B[own]


def new_context(model: nn.Module) -> StepContext:
    """Return the context of a run at its beginning."""
    context = StepContext(
        threat_model=ThreatModel(epsilon=0.1),
        attack=InnerAttackConfig(steps=2, step_size=0.05),
        redraw="attack_then_step",
        streams=Streams(0, world()[0]),
        precision=FULL,
        num_epochs=4,
        steps_per_epoch=2,
    )
    context.streams.begin_epoch(model, 0)
    return context


def step(name: str, synchronized: bool) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Take one training step on this worker's rows; return scalars and gradients, averaged over the workers."""
    objective, model = build(name, synchronized=synchronized)
    scalars = objective.training_step(model, *own_rows(), new_context(model))
    average_gradients(model.parameters())
    means = torch.stack([scalars[key].double() for key in sorted(scalars)])
    if dist.is_initialized():
        dist.all_reduce(means)
        means /= world()[1]
    gradients = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}
    return dict(zip(sorted(scalars), means.tolist(), strict=True)), copy.deepcopy(gradients)


def seen_images(name: str) -> Tensor:
    """Return the images of the last forward pass of a step, of the first member in an ensemble; both workers begin with the same images."""
    objective, model = build(name)
    seen: list[Tensor] = []
    first = model.members[0] if isinstance(model, Ensemble) else model
    first.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].detach().clone()))
    objective.training_step(model, *own_rows(equal_halves=True), new_context(model))
    return seen[-1]


def _enter(rank: int, folder: str, size: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    try:
        results = {case: step(*case) for case in STEPS}
        noisy = {name: seen_images(name) for name in NOISY} if size == 2 else {}
        torch.save((results, noisy), Path(folder) / f"result-{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What two processes computed: (steps by case, images by noisy objective) of each rank."""
    return computed_by(2, tmp_path_factory.mktemp("gloo"))


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """What four processes computed, like `both`."""
    return computed_by(4, tmp_path_factory.mktemp("gloo"))


def computed_by(size: int, folder: Path) -> list[Any]:
    multiprocessing.spawn(_enter, (str(folder), size), nprocs=size, join=True)
    return [torch.load(folder / f"result-{rank}.pt", weights_only=False) for rank in range(size)]


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "synchronized"), STEPS)
def test_two_workers_compute_what_one_computes(name, synchronized, both):
    assert_like_one_worker(name, synchronized, both)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(("name", "synchronized"), STEPS)
def test_four_workers_compute_what_one_computes(name, synchronized, four):
    assert_like_one_worker(name, synchronized, four)


def test_the_metrics_of_our_objectives_are_explained() -> None:
    """An objective of yours explains its own: this is no part of what the suite asks of each by its name."""
    logged = {f"train/{scalar}" for name in CASES for scalar in step(name, False)[0]}
    assert unexplained(sorted(logged)) == [], "docs/metrics.md explains every metric"


def assert_like_one_worker(name: str, synchronized: bool, several: list[Any]) -> None:
    scalars, gradients = step(name, synchronized)
    for steps, _ in several:
        scalars_of_several, gradients_of_several = steps[name, synchronized]
        assert scalars_of_several == pytest.approx(scalars, rel=1e-9, abs=1e-12)
        assert gradients_of_several.keys() == gradients.keys()
        for key, gradient in gradients.items():
            found = gradients_of_several[key]
            torch.testing.assert_close(found, gradient, rtol=1e-7, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}")
    assert any(gradient.abs().max() > 1e-4 for gradient in gradients.values()), "a step that trains nothing proves nothing"


def is_divisible(name: str) -> bool:
    """Return whether the objective of a case can be computed in parts, as it says itself."""
    base = name.partition("-")[0]
    return not objective_entry(base).config(**{"name": base} | VARIANTS.get(name, {})).needs_whole_batch


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("name", [case for case in CASES if is_divisible(case)])
def test_gradients_of_parts_add_up_to_those_of_the_batch(name, parts):
    scalars, gradients = step(name, False)
    objective, model = build(name)
    context = new_context(model)
    of_parts = accumulate(objective, model, *own_rows(), context, parts)
    assert {key: value.item() for key, value in of_parts.items()} == pytest.approx(scalars, rel=1e-9, abs=1e-12)
    for key, parameter in model.named_parameters():
        if key in gradients:
            torch.testing.assert_close(parameter.grad, gradients[key], rtol=1e-7, atol=1e-10)
        else:
            assert parameter.grad is None
    whole_objective, whole_model = build(name)
    whole = new_context(whole_model)
    whole_objective.training_step(whole_model, *own_rows(), whole)
    for stream, other in zip(context.streams.state(), whole.streams.state(), strict=True):
        assert torch.equal(stream, other), "the next step begins where it would have begun"


def test_what_looks_at_the_whole_batch_says_so():
    assert {case for case in CASES if not is_divisible(case)} >= {"trs", "dverge", "trades-awp", "adversarial-awp"}


@pytest.mark.distributed
@pytest.mark.parametrize("name", NOISY)
def test_noise_differs_by_rank(name, both):
    first, second = (noisy[name] for _, noisy in both)
    assert first.shape == second.shape
    assert (first - second).abs().max() > 1e-3, "both ranks hold the same images, so only noise can tell them apart"
