"""Optimizers, what they decay, schedules, and gradients accumulated over parts of a batch."""

from __future__ import annotations

import copy
import math
import random

import pytest
import torch
from torch import nn

from models.errors import UserError
from models.randomness import random_sites
from models.registry import build_model, list_defences
from models.threat_model import ThreatModel
from orchestration.recipes import load_recipe
from tests.contracts.cases import build_case, case_names
from tests.trainers.tiny_training import StopAfterOne, few_digits, tiny_config
from trainers.accumulation import accumulate
from trainers.data import evaluation_batches
from trainers.fit import fit
from trainers.hardware import FULL
from trainers.objective import Objective, ObjectiveConfig
from trainers.optimizer import OptimizerConfig, build_optimizer, parameter_groups
from trainers.schedule import ScheduleConfig, learning_rate_factor, plateau_reductions
from trainers.step import InnerAttackConfig, StepContext
from trainers.streams import Streams

RADIUS = ThreatModel(epsilon=0.1)
NAMES = ("sgd", "adam", "adamw", "lion", "muon")


@pytest.fixture(scope="module")
def splits():
    return few_digits()


def config(**changes):
    return tiny_config(**{"batch_size": 32, "optimizer": OptimizerConfig(learning_rate=0.01)} | changes)


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 3))


def stepped(optimizer_config, steps=3):
    """Return the weights after some steps on gradients that are the weights' sines."""
    model = small()
    optimizer = build_optimizer(model, optimizer_config)
    start = copy.deepcopy(model.state_dict())
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = parameter.detach().sin()
        optimizer.step()
    return start, model.state_dict()


def naive(start, name, steps=3, lr=0.01, decay=0.1):
    """AdamW (Loshchilov and Hutter 2019, Algorithm 2) and Lion (Chen et al. 2023, Algorithm 2) in float64."""
    w, m, v = start.double(), torch.zeros_like(start).double(), torch.zeros_like(start).double()
    for t in range(1, steps + 1):
        g = w.sin()
        if name == "adamw":
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            w = w - lr * ((m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8) + decay * w)
        else:
            update = (0.9 * m + 0.1 * g).sign()
            w, m = w - lr * (update + decay * w), 0.99 * m + 0.01 * g
    return w


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_decoupled_optimizers_are_their_papers_loops(name):
    start, end = stepped(OptimizerConfig(name=name, learning_rate=0.01, weight_decay=0.1))
    for key in ("0.weight", "1.weight", "3.bias"):
        torch.testing.assert_close(end[key].double(), naive(start[key], name), rtol=1e-5, atol=1e-7)


def test_muon_moves_a_matrix_along_its_gradient_made_orthogonal():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 64, 2), nn.BatchNorm2d(64))
    before = copy.deepcopy(model.state_dict())
    optimizer = build_optimizer(model, OptimizerConfig(name="muon", learning_rate=0.01, weight_decay=0))
    for parameter in model.parameters():
        parameter.grad = parameter.detach().sin() + 0.1
    optimizer.step()
    moved = (before["0.weight"] - model[0].weight.detach()).double().flatten(1)
    u, _, v = torch.linalg.svd((before["0.weight"].sin() + 0.1).double().flatten(1), full_matrices=False)
    cosine = (moved * (u @ v)).sum() / (moved.norm() * (u @ v).norm())
    assert cosine > 0.99, "a filter is a row of the matrix, and all its singular values become about 1"
    assert not torch.equal(before["1.weight"], model[1].weight), "vectors are moved by AdamW"


@pytest.mark.parametrize("excluded", [(), ("bias",), ("sigma", "normalization"), ("sigma", "normalization", "bias")])
@pytest.mark.parametrize("name", case_names())
def test_every_parameter_is_in_one_group_by_its_kind(name, excluded):
    model = build_case(name)
    groups = parameter_groups(model, excluded)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sorted(id(parameter) for group in groups for parameter in group["params"]) == sorted(map(id, trainable))
    left_out = {id(parameter) for group in groups if group.get("weight_decay") == 0 for parameter in group["params"]}
    for key, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer, _, leaf = key.rpartition(".")
        is_norm = hasattr(model.get_submodule(layer), "eps")
        kind = "normalization" if is_norm else "sigma" if leaf == "sigma" else "bias" if leaf.endswith("bias") else None
        assert (id(parameter) in left_out) == (kind in excluded), key


def test_the_cases_have_all_kinds():
    assert any(hasattr(site, "sigma") for _, site in random_sites(build_case("ctrw")))
    assert set(list_defences()) <= set(case_names())


@pytest.mark.parametrize("name", NAMES)
def test_what_is_left_out_does_not_shrink(name):
    model = small()
    optimizer = build_optimizer(
        model, OptimizerConfig(name=name, learning_rate=0.1, weight_decay=0.5, no_weight_decay=("normalization", "bias"))
    )
    before = copy.deepcopy(model.state_dict())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, before[key]) == (key not in ("0.weight", "3.weight")), key


def network(defence="ctrw"):
    return build_model(defence, backbone="resnet8", image_shape=(1, 8, 8))


def resumed_equals_whole(settings, splits, folder):
    whole, resumed = network(), network()
    fit(whole, splits, RADIUS, settings, seed=0)
    fit(network(), splits, RADIUS, settings, seed=0, reporter=StopAfterOne(folder))
    fit(resumed, splits, RADIUS, settings, seed=0, resume_from=folder)
    return all(torch.equal(value, resumed.state_dict()[key]) for key, value in whole.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_ends_bit_identically(name, splits, tmp_path):
    optimizer = OptimizerConfig(name=name, learning_rate=0.01, no_weight_decay=("sigma",))
    assert resumed_equals_whole(config(optimizer=optimizer, accumulation=2), splits, tmp_path)


def test_warm_up_rises_evenly_and_a_cosine_falls_behind_it():
    schedule = ScheduleConfig(name="cosine", warmup_epochs=2)
    for epoch in [0.0, 0.5, 1.0, 1.5, 2.0, 5.0, 8.0, 10.0]:
        expected = epoch / 2 if epoch < 2 else 0.5 * (1 + math.cos(math.pi * (epoch - 2) / 8))
        assert learning_rate_factor(schedule, epoch, 10) == pytest.approx(expected, abs=1e-12)
    steps = ScheduleConfig(name="multistep", milestones=(4,), warmup_epochs=1)
    assert [learning_rate_factor(steps, epoch, 10) for epoch in (0.25, 1, 4)] == pytest.approx([0.25, 1, 0.1])


@pytest.mark.parametrize("seed", range(8))
def test_a_plateau_is_seen_as_pytorch_sees_it(seed):
    choose = random.Random(seed)
    schedule = ScheduleConfig(name="plateau", factor=0.5, plateau_patience=choose.randint(0, 4))
    theirs_optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        theirs_optimizer, mode="max", factor=0.5, patience=schedule.plateau_patience, threshold=0, eps=0
    )
    history = []
    for _ in range(40):
        if choose.random() < 0.2:
            history.append({"train/loss": 1.0})
            continue
        value = choose.randint(0, 6) / 6
        averaged = {"validation/robust_accuracy": 0.9, "validation/latest/robust_accuracy": value}
        history.append(averaged if seed % 2 else {"validation/robust_accuracy": value})
        theirs.step(value)
        factor = learning_rate_factor(schedule, 3, 10, plateau_reductions(schedule, history))
        assert factor == pytest.approx(theirs_optimizer.param_groups[0]["lr"])


def test_a_training_lowers_its_rate_on_a_plateau(splits, monkeypatch):
    measured = iter([0.5, 0.4, 0.3, 0.2, 0.1])
    monkeypatch.setattr(
        "trainers.fit.validate", lambda *a, **k: dict.fromkeys(("validation/robust_accuracy", "validation/clean_accuracy"), next(measured))
    )
    settings = config(epochs=5, schedule=ScheduleConfig(name="plateau", plateau_patience=1, factor=0.1))
    result = fit(network("at"), splits, RADIUS, settings, seed=0)
    rates = [epoch["train/learning_rate"] for epoch in result.history]
    assert rates == pytest.approx([0.01, 0.01, 0.01, 0.001, 0.001])


def without_batch_norm():
    return build_model("single_normalization", backbone="resnet8", image_shape=(1, 8, 8), normalization="ln", seed=1)


def test_a_training_in_parts_is_the_training(splits):
    ends = []
    for parts in (1, 4):
        model = without_batch_norm()
        result = fit(model, splits, RADIUS, config(accumulation=parts), seed=0)
        ends.append((model.state_dict(), result.history[-1]["train/loss"]))
    (whole, loss), (parts, loss_of_parts) = ends
    assert loss == pytest.approx(loss_of_parts, rel=1e-4)
    for key, value in whole.items():
        torch.testing.assert_close(parts[key], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("scope", "alike"), [("global", True), ("per_example", False)])
def test_parts_share_the_draw_of_the_step_and_examples_have_their_own(scope, alike, splits):
    model = build_model("ctrw", backbone="resnet8", image_shape=(1, 8, 8), draw_scope=scope)
    keys = []

    class Seen(Objective):
        def training_step(self, model, x, y, context):
            context.adversarial_examples(model, x, y)
            keys.append([site.draw_key for _, site in random_sites(model)])
            return {"loss": model(x).mean()}

        def passes(self, attack_steps, num_members, epoch):
            return 1.0

    context = StepContext(RADIUS, InnerAttackConfig(steps=1, step_size=0.05), "attack_then_step", Streams(0), FULL, 1, 1)
    x, y = next(iter(evaluation_batches(splits.train, 8)))
    accumulate(Seen(ObjectiveConfig(name="seen")), model, x, y, context, 4)
    assert len(keys) == 4
    assert (len({tuple(each) for each in keys}) == 1) == alike


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--training.accumulation=3"], "accumulation 3"),
        (["--training.accumulation=0"], "accumulation"),
        (["--training.accumulation=2", "--training.batch_size=6", "--resources.workers=2"], "workers 2"),
        (["--training.optimizer.name=lio"], "lion"),
        (["--training.optimizer.no_weight_decay=[biases]"], "bias"),
        (["--training.optimizer.no_weight_decay=[bias, bias]"], "twice"),
        (["--training.schedule.name=one_cycle", "--training.schedule.warmup_epochs=1"], "one_cycle"),
        (["--training.schedule.name=cosine", "--training.schedule.warmup_epochs=1000"], "leaves nothing"),
        (["--training.schedule.plateau_patience=-1"], "plateau_patience"),
    ],
)
def test_nonsense_is_one_message(flags, words):
    with pytest.raises(UserError) as caught:
        load_recipe("at_digits", flags)
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_whole_batches_are_not_accumulated():
    with pytest.raises(UserError, match="whole batch"):
        load_recipe("awp_digits", ["--training.accumulation=2"])
