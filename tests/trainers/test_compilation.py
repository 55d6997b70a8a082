"""Compiled steps: the numbers of eager ones, no compilation at a redraw, and eager where they cannot be."""

from __future__ import annotations

import copy
import logging
import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from models import build_model
from models.randomness import resample
from models.threat_model import ThreatModel
from orchestration.recipes.loading import load_recipe
from trainers.compilation import CompiledForward, compiled_steps, reason_for_eager
from trainers.config import TrainingConfig
from trainers.data import Augmentation
from trainers.fit import TrainingLoop, fit
from trainers.objective import ObjectiveConfig, objectives
from trainers.reporting import SilentReporter
from trainers.step import InnerAttackConfig

from .tiny_training import few_digits, tiny_config

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ADVERSARIAL = TrainingConfig().objective


def tiny_loop(defence: str, config: TrainingConfig) -> TrainingLoop:
    splits = few_digits()
    model = build_model(defence, backbone="resnet8", num_classes=10, image_shape=splits.image_shape, seed=0)
    threat_model = ThreatModel(epsilon=0.1)
    return TrainingLoop(model, splits, threat_model, config, seed=0, device=CPU, augmentation=Augmentation(), reporter=SilentReporter())


def losses(loop: TrainingLoop, count: int) -> list[float]:
    return [loop.train_batch(index, *batch)["loss"].item() for index, batch in zip(range(count), loop.batches(0), strict=False)]


@pytest.mark.parametrize("defence", ["dcs", pytest.param("rna", marks=pytest.mark.slow), pytest.param("ctrw", marks=pytest.mark.slow)])
def test_a_redraw_compiles_nothing_and_numbers_are_those_of_eager_steps(defence):
    """Through PyTorch's tracing alone, which needs no compiler and takes seconds."""
    torch._dynamo.reset()
    config = tiny_config(attack=InnerAttackConfig(steps=2, step_size=0.05, mode="train"))
    eager, compiled = tiny_loop(defence, config), tiny_loop(defence, config)
    graphs = CompileCounterWithBackend("aot_eager")
    compiled.compiled = CompiledForward(compiled.model, backend=graphs)
    begun = losses(compiled, 2)
    made = graphs.frame_count
    assert 1 <= made <= 3  # a gradient of the images, one of the weights
    expected, found = losses(eager, 4), losses(compiled, 4)
    assert graphs.frame_count == made
    assert begun == pytest.approx(expected[:2], rel=1e-3)
    assert len(found) == 4 and "forward" not in compiled.model.__dict__


def test_a_copy_of_a_model_amid_a_compiled_step_is_a_model_of_its_own():
    model = build_model("ctrw", backbone="resnet8", num_classes=10, image_shape=(1, 16, 16)).eval()
    x = torch.rand(2, 1, 16, 16)
    with CompiledForward(model, backend="eager")():
        resample(model)
        inside = model(x)
    torch.testing.assert_close(inside, copy.deepcopy(model)(x))


@pytest.mark.parametrize(
    ("setting", "device", "objective", "expected"),
    [
        ("off", CUDA, "adversarial", ""),
        ("auto", CPU, "adversarial", ""),
        ("auto", CUDA, "adversarial", ""),
        ("on", CPU, "rat_taylor", "differentiates twice"),
        ("on", CPU, "adversarial", "no C++ compiler"),
    ],
)
def test_what_stays_eager_says_why_where_compiled_code_was_asked_for(setting, device, objective, expected, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    config = objectives()[objective].config(name=objective)
    reason = reason_for_eager(setting, device, config)
    assert reason is not None and expected in reason and bool(reason) == bool(expected)


def test_steps_that_stay_eager_are_told_once_and_train(monkeypatch, caplog):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    with caplog.at_level(logging.WARNING):
        loop = tiny_loop("ctrw", tiny_config(compile="on"))
        assert all(loss > 0 for loss in losses(loop, 2))
    assert [record.message for record in caplog.records if "compile" in record.message] == [
        "training.compile is on, but steps are not compiled: this machine has no C++ compiler"
    ]


def test_objectives_are_eager_unless_they_say_otherwise():
    assert ObjectiveConfig.is_compilable is False
    assert {name for name, entry in objectives().items() if entry.config.is_compilable} == {
        "natural", "adversarial", "trades", "label_smoothing",
    }  # fmt: skip


def test_compiled_code_is_not_part_of_what_a_run_is():
    plain = load_recipe("ctrw_digits", []).experiment
    for setting in ("on", "off", "auto"):
        assert load_recipe("ctrw_digits", ["--training.compile", setting]).experiment.fingerprint == plain.fingerprint


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler")
@pytest.mark.parametrize("defence", ["at", "rna", "dcs", "ctrw"])
def test_compiled_training_ends_where_the_eager_one_does(defence):
    torch._dynamo.reset()
    results = {}
    for setting in ("off", "on"):
        splits = few_digits()
        model = build_model(defence, backbone="resnet8", num_classes=10, image_shape=splits.image_shape, seed=0)
        results[setting] = fit(model, splits, ThreatModel(epsilon=0.1), tiny_config(compile=setting), seed=0)
    assert compiled_steps(model, "on", CPU, ADVERSARIAL).__class__ is CompiledForward
    loss, accuracy = (
        {setting: found.metrics[name] for setting, found in results.items()} for name in ("train/loss", "validation/clean_accuracy")
    )
    assert loss["on"] == pytest.approx(loss["off"], abs=0.05)
    assert accuracy["on"] == pytest.approx(accuracy["off"], abs=2 / 32)  # two of the validation images


@pytest.mark.gpu
@pytest.mark.parametrize("defence", ["at", "rna", "dcs", "ctrw"])
def test_compiled_steps_on_a_gpu(defence):
    model = build_model(defence, backbone="resnet8", num_classes=10, image_shape=(3, 32, 32)).cuda().train()
    x = torch.rand(8, 3, 32, 32, device="cuda", requires_grad=True)
    compiled = compiled_steps(model, "on", CUDA, ADVERSARIAL)
    assert isinstance(compiled, CompiledForward)
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    with compiled():
        (found,) = torch.autograd.grad(model(x).square().sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2 * expected.abs().max().item())
