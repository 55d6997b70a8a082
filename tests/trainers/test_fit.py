"""The training loop: schedules, selection, early stopping, divergence, what a resumed run refuses."""

from __future__ import annotations

import copy
import math
import subprocess
import sys

import pytest
import torch

from models.errors import UserError
from models.registry import build_model
from models.threat_model import ThreatModel
from trainers.config import TrainingConfig
from trainers.data import DataConfig, load_data
from trainers.fit import TrainingDiverged, fit
from trainers.optimizer import OptimizerConfig
from trainers.schedule import ScheduleConfig, learning_rate_factor
from trainers.step import InnerAttackConfig
from trainers.validation import ValidationConfig, validate

RADIUS = ThreatModel(epsilon=0.1)


@pytest.fixture(scope="module")
def splits():
    return load_data(DataConfig(name="digits", limit_train=64, limit_test=20, validation_size=32))


def config(**changes) -> TrainingConfig:
    settings = {
        "epochs": 3,
        "batch_size": 32,
        "precision": "fp32",
        "attack": InnerAttackConfig(steps=2, step_size=0.05),
        "optimizer": OptimizerConfig(learning_rate=0.05),
        "schedule": ScheduleConfig(name="one_cycle"),
        "validation": ValidationConfig(steps=2),
    }
    return TrainingConfig(**settings | changes)


def network():
    return build_model("at", backbone="resnet8", image_shape=(1, 8, 8))


def test_schedules_at_known_points():
    steps = ScheduleConfig(name="multistep", milestones=(100, 150))
    assert [learning_rate_factor(steps, epoch, 200) for epoch in (0, 99.9, 100, 149, 150, 199)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.01]
    )
    cosine = ScheduleConfig(name="cosine")
    assert [learning_rate_factor(cosine, epoch, 90) for epoch in (0, 45, 90)] == pytest.approx([1, 0.5, 0], abs=1e-12)
    cycle = ScheduleConfig(name="one_cycle", warmup_fraction=0.25)
    assert [learning_rate_factor(cycle, epoch, 8) for epoch in (0, 1, 2, 5, 8)] == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert learning_rate_factor(ScheduleConfig(name="constant"), 7, 8) == 1


def test_the_model_ends_with_the_selected_weights(splits):
    model = network()
    result = fit(model, splits, RADIUS, config(), seed=0)
    scores = [(epoch["validation/robust_accuracy"], epoch["validation/clean_accuracy"]) for epoch in result.history]
    assert scores.index(max(scores)) + 1 == result.selected_epoch
    again = validate(model, splits.validation, RADIUS, InnerAttackConfig(step_size=0.05), ValidationConfig(steps=2), seed=0, batch_size=256)
    assert again["validation/robust_accuracy"] == result.metrics["validation/robust_accuracy"]
    last = fit(network(), splits, RADIUS, config(validation=ValidationConfig(steps=2, select="last")), seed=0)
    assert last.selected_epoch == 3


def test_two_runs_with_one_seed_are_equal_and_another_seed_differs(splits):
    weights = []
    for seed in (0, 0, 1):
        model = network()
        fit(model, splits, RADIUS, config(epochs=1), seed=seed)
        weights.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_patience_ends_a_run_that_no_longer_improves(splits):
    still = config(epochs=20, optimizer=OptimizerConfig(learning_rate=1e-9, momentum=0), validation=ValidationConfig(steps=1, patience=2))
    model = network().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.0
    result = fit(model, splits, RADIUS, still, seed=0)
    assert result.stopped_early
    assert result.num_epochs < 20


def with_nothing_to_learn(model):
    """Return the model with a weight that is not finite, as a step that was too long leaves one."""
    with torch.no_grad():
        next(model.parameters()).fill_(float("inf"))
    return model


def test_divergence_is_a_clear_error(splits):
    with pytest.raises(TrainingDiverged, match="learning_rate"):
        fit(with_nothing_to_learn(network()), splits, RADIUS, config(), seed=0)


def test_what_cannot_be_trained_is_said_first(splits):
    with pytest.raises(UserError, match="larger than the training set"):
        fit(network(), splits, RADIUS, config(batch_size=65), seed=0)


def test_gradient_clipping_bounds_the_step(splits):
    plain, clipped = network(), network()
    start = copy.deepcopy(plain.state_dict())
    slow = {"epochs": 1, "batch_size": 64, "schedule": ScheduleConfig(name="constant")}
    norm = 1e-3
    settings = OptimizerConfig(learning_rate=1.0, momentum=0, weight_decay=0, gradient_clip_norm=norm)
    fit(clipped, splits, RADIUS, config(**slow, optimizer=settings, validation=ValidationConfig(steps=1, select="last")), seed=0)
    moved = math.sqrt(sum(((value - start[name]) ** 2).sum().item() for name, value in clipped.named_parameters()))
    assert moved == pytest.approx(norm, rel=1e-3)


def test_validation_leaves_modes_draws_and_streams_alone(splits):
    model = build_model("ctrw", backbone="resnet8", image_shape=(1, 8, 8)).train()
    twin = copy.deepcopy(model)
    first = validate(model, splits.validation, RADIUS, InnerAttackConfig(step_size=0.05), ValidationConfig(steps=2), seed=0, batch_size=16)
    assert model.training
    x = torch.rand(4, 1, 8, 8)
    model.eval()
    twin.eval()
    with torch.no_grad():
        assert torch.equal(model(x), twin(x))
    assert "validation/robust_accuracy/eot_pgd_2x4" in first
    second = validate(model, splits.validation, RADIUS, InnerAttackConfig(step_size=0.05), ValidationConfig(steps=2), seed=0, batch_size=16)
    assert first == second


def test_every_epoch_says_its_peak_memory(splits):
    result = fit(network(), splits, RADIUS, config(epochs=2), seed=0)
    peaks = [epoch["memory/peak_process_megabytes"] for epoch in result.history]
    assert all(10 < peak < 100_000 for peak in peaks)


def test_the_peak_of_an_earlier_epoch_is_forgotten():
    # In a process of its own: one that holds gigabytes may give freed memory back later.
    run = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True)
    large, small = map(float, run.stdout.split())
    assert small < large - 200


PEAKS = """
import numpy as np, torch
from trainers.hardware import PROCESS_METRIC, PeakMemory
first = PeakMemory(torch.device("cpu"))
np.ones(40 * 2**20)  # 320 MB, freed at once
large = first.metrics()[PROCESS_METRIC]
print(large, PeakMemory(torch.device("cpu")).metrics()[PROCESS_METRIC])
"""


@pytest.mark.parametrize(
    ("defence", "objective", "losses"),
    [
        ("at", "adversarial", (2.310009002685547, 2.30059814453125)),
        ("ctrw", "adversarial", (2.3047680854797363, 2.3027100563049316)),
        ("rna", "adversarial", (2.3076331615448, 2.3013601303100586)),
        ("red", "red", (2.675844669342041, 3.0373096466064453)),
        ("rat", "rat_taylor", (2.3046929836273193, 2.2903785705566406)),
    ],
)
def test_a_training_is_the_one_that_it_was(splits, defence, objective, losses):
    """Losses of two epochs as they once were: whoever changes them on purpose gives the defence or objective a new revision.

    To the last bit on one machine with one thread; other orders of summation move them by less than 1e-5, another draw by more than 1e-4.
    """
    members = {"num_members": 2} if defence == "red" else {}
    model = build_model(defence, backbone="resnet8", image_shape=(1, 8, 8), seed=1, **members)
    settings = config(
        objective=objective, epochs=2, optimizer=OptimizerConfig(learning_rate=0.01), schedule=ScheduleConfig(name="constant")
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = fit(model, splits, RADIUS, settings, seed=3)
    finally:
        torch.set_num_threads(threads)
    assert [epoch["train/loss"] for epoch in found.history] == pytest.approx(losses, rel=2e-5)
