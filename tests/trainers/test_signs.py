"""Signs that a training does not learn: what they measure, what provokes each, and that a training that learns shows none."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from models.registry import build_model
from models.threat_model import ThreatModel
from orchestration.recipes import load_recipe
from orchestration.training.single_run import _TrainingProgress
from tests.numerics import ensemble_cases, taylor_cases
from trainers.complaints import CLIPPED_STEPS, GRADIENT_RATIO, MOST_COMMON_ANSWER, complaints
from trainers.config import TrainingConfig
from trainers.data import DataConfig, load_data
from trainers.fit import fit
from trainers.optimizer import OptimizerConfig
from trainers.reporting import EpochReport
from trainers.schedule import ScheduleConfig
from trainers.signs import gradient_ratios, most_common_answer
from trainers.step import InnerAttackConfig
from trainers.validation import ValidationConfig


@pytest.fixture(scope="module")
def splits():
    return load_data(DataConfig(name="digits", limit_train=256, limit_test=20, validation_size=64))


def trained(splits, *, model: nn.Module | None = None, epochs: int = 1, **changes) -> list[dict[str, float]]:
    """Return the metrics of each epoch of a short training on digits at 8x8."""
    settings = {
        "epochs": epochs,
        "batch_size": 32,
        "precision": "fp32",
        "attack": InnerAttackConfig(steps=1, step_size=0.05),
        "optimizer": OptimizerConfig(learning_rate=0.05),
        "schedule": ScheduleConfig(name="constant"),
        "validation": ValidationConfig(steps=1),
    }
    model = build_model("at", backbone="resnet8", image_shape=(1, 8, 8)) if model is None else model
    return fit(model, splits, ThreatModel(epsilon=0.05), TrainingConfig(**settings | changes), seed=0).history


def length(loss: torch.Tensor, model: nn.Module) -> torch.Tensor:
    slopes = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)
    return torch.cat([slope.flatten() for slope in slopes if slope is not None]).norm()


def test_ratios_are_those_of_the_weighted_terms_of_trades():
    model = taylor_cases.tiny_network(nn.ReLU)
    x, y = taylor_cases.batch()
    method = taylor_cases.objective("trades", beta=3.0)
    (ratio,) = gradient_ratios(method, model, x, y, taylor_cases.context()).values()
    terms = method.outer_loss(model, x, method.attack(model, x, y, taylor_cases.context()), y, taylor_cases.context())
    expected = length(3 * terms["divergence"], model) / length(terms["cross_entropy"], model)
    assert ratio == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("ce_on", ["clean", "both"])
def test_ratios_are_those_of_the_weighted_terms_of_red(ce_on):
    ensemble = ensemble_cases.tiny_ensemble(3, normalized=False)
    x, y = ensemble_cases.batch()
    method = ensemble_cases.objective("red", warmup_epochs=0, lambda_a=700, lambda_b=5, example="mean_loss", ce_on=ce_on)
    ratios = gradient_ratios(method, ensemble, x, y, ensemble_cases.context(ensemble))
    terms = method.terms(ensemble, x, y, ensemble_cases.context(ensemble))
    cross_entropy = length(terms["loss"] - terms["regularization"], ensemble)
    assert ratios[f"{GRADIENT_RATIO}lipschitz"] == pytest.approx(
        (length(700 * terms["lipschitz"], ensemble) / cross_entropy).item(), rel=1e-5
    )
    assert ratios[f"{GRADIENT_RATIO}similarity"] == pytest.approx(
        (length(5 * terms["similarity"], ensemble) / cross_entropy).item(), rel=1e-5
    )


def test_nothing_is_said_before_the_weights_have_their_values():
    ensemble = ensemble_cases.tiny_ensemble(2)
    x, y = ensemble_cases.batch()
    method = ensemble_cases.objective("red", warmup_epochs=2)
    assert gradient_ratios(method, ensemble, x, y, ensemble_cases.context(ensemble, step=2, steps_per_epoch=2)) == {}
    assert gradient_ratios(method, ensemble, x, y, ensemble_cases.context(ensemble, step=3, steps_per_epoch=2))


@pytest.mark.parametrize("name", ["red", "trs", "gal", "adp", "dverge"])
@pytest.mark.filterwarnings("ignore:DVERGE begins")
def test_measuring_leaves_no_trace(name, splits):
    model = build_model("red", backbone="resnet8", image_shape=(1, 8, 8), num_members=2, member={"name": "rna"}).train()
    before = copy.deepcopy(model)
    x, y = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    gradient_ratios(ensemble_cases.objective(name), model, x, y, ensemble_cases.context(nn.Identity(), step=99))
    most_common_answer(model, splits.validation, seed=0)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training
    for (key, tensor), old in zip(
        [*model.named_parameters(), *model.named_buffers()], [*before.parameters(), *before.buffers()], strict=True
    ):
        assert torch.equal(tensor, old), key


def test_a_constant_network_is_said_to_be_one(splits):
    model = build_model("at", backbone="resnet8", image_shape=(1, 8, 8))
    nn.init.constant_(model.backbone.classifier.bias[3], 100.0)
    (metrics,) = trained(splits, model=model, optimizer=OptimizerConfig(learning_rate=1e-12))
    assert "one class for all images" in complaints(metrics)[MOST_COMMON_ANSWER]


def test_one_constant_member_suffices(splits):
    model = build_model("adp", backbone="resnet8", image_shape=(1, 8, 8), num_members=2).eval()
    assert most_common_answer(model, splits.validation, seed=0)[MOST_COMMON_ANSWER] < 1
    nn.init.constant_(model.members[1].backbone.classifier.bias[3], 100.0)
    assert most_common_answer(model, splits.validation, seed=0)[MOST_COMMON_ANSWER] == 1


def test_a_term_that_drowns_cross_entropy_is_named(splits):
    model = build_model("at", backbone="resnet8", image_shape=(1, 8, 8))
    nn.init.normal_(model.backbone.classifier.weight, std=0.3)
    (metrics,) = trained(splits, model=model, objective={"name": "trades", "beta": 1e5}, optimizer=OptimizerConfig(learning_rate=1e-9))
    assert "`divergence`" in complaints(metrics)[f"{GRADIENT_RATIO}divergence"]


def test_clipping_of_nearly_all_steps_is_said(splits):
    (metrics,) = trained(splits, optimizer=OptimizerConfig(learning_rate=0.05, gradient_clip_norm=1e-4))
    assert metrics[CLIPPED_STEPS] == 1
    assert "100 %" in complaints(metrics)[CLIPPED_STEPS]
    (metrics,) = trained(splits, optimizer=OptimizerConfig(learning_rate=0.05, gradient_clip_norm=1e6))
    assert metrics[CLIPPED_STEPS] == 0
    assert CLIPPED_STEPS not in trained(splits)[0], "without clipping there is nothing to say about it"


@pytest.mark.parametrize("objective", ["adversarial", "trades"])
def test_a_training_that_learns_says_nothing(objective, splits):
    history = trained(splits, objective=objective, epochs=3)
    assert history[-1]["validation/clean_accuracy"] > 0.4
    assert [complaints(metrics) for metrics in history] == [{}, {}, {}]


def test_the_console_says_each_sign_once(capsys):
    progress = _TrainingProgress(load_recipe("at_digits").experiment)
    metrics = {"train/loss": 1.0, "time/examples_per_second": 1.0, MOST_COMMON_ANSWER: 1.0}
    progress.epoch(EpochReport(1, metrics), replayed=False)
    progress.epoch(EpochReport(2, metrics | {CLIPPED_STEPS: 1.0}), replayed=False)
    said = capsys.readouterr().err
    assert said.count("one class for all images") == 1
    assert "warning: epoch 2: 100 % of the steps were clipped" in said
