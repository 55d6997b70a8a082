"""Averaged weights: their values against naive means, their batch statistics, which copy is kept, and going on after a kill."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from models.errors import UserError
from models.layers.channel_statistics import Normalization2d, parse_normalization
from models.layers.random_normalization import RandomNormalization2d
from models.randomness import resample
from models.registry import build_model
from models.threat_model import ThreatModel
from orchestration.recipes import load_recipe
from tests.trainers.tiny_training import StopAfterOne, few_digits, tiny_config
from trainers import fit as fitting
from trainers.averaging import AveragingConfig, recompute_batch_statistics
from trainers.checkpoint import read_state, write_state
from trainers.data import Augmentation
from trainers.fit import TrainingLoop, fit
from trainers.optimizer import OptimizerConfig
from trainers.reporting import SilentReporter
from trainers.validation import ValidationConfig

RADIUS = ThreatModel(epsilon=0.1)


@pytest.fixture(scope="module")
def splits():
    return few_digits()


def config(**changes):
    return tiny_config(
        **{"epochs": 3, "optimizer": OptimizerConfig(learning_rate=0.05), "validation": ValidationConfig(steps=1, num_draws=1)} | changes
    )


def network(defence="at", **parameters):
    return build_model(defence, backbone="resnet8", image_shape=(1, 8, 8), **parameters)


def loop_of(model, splits, **changes):
    return TrainingLoop(
        model,
        splits,
        RADIUS,
        config(**changes),
        seed=0,
        device=torch.device("cpu"),
        augmentation=Augmentation(),
        reporter=SilentReporter(),
    )


def run(loop, epochs):
    """Train some epochs without validation; return the parameters after each step, in float64, and after each epoch."""
    steps, ends = [], []
    for epoch in range(epochs):
        for index, (x, y) in enumerate(loop.batches(epoch)):
            loop.train_step(index, x, y)
            steps.append({name: value.detach().double() for name, value in loop.model.named_parameters()})
        loop.average.after_epoch(epoch + 1)
        ends.append(steps[-1])
    return steps, ends


@pytest.mark.parametrize("start", [None, 0.5])
@pytest.mark.parametrize("warmup", [True, False])
@pytest.mark.parametrize("defence", ["at", "ctrw", "ps_red"])
def test_an_exponential_average_is_the_recursion(defence, warmup, start, splits):
    parameters = {"num_members": 2} if defence == "ps_red" else {}
    averaging = AveragingConfig(name="ema", decay=0.6, warmup=warmup, start=start)
    loop = loop_of(network(defence, **parameters), splits, averaging=averaging)
    steps, _ = run(loop, 3)
    taken = [weights for number, weights in enumerate(steps, start=1) if number / 4 > (start or 0) * 3]
    assert loop.average.updates == len(taken) == (12 if start is None else 6)
    expected = taken[0]
    for updates, weights in enumerate(taken[1:], start=1):
        decay = min(0.6, (1 + updates) / (10 + updates)) if warmup else 0.6
        expected = {name: decay * expected[name] + (1 - decay) * weights[name] for name in weights}
    for name, value in zip(loop.average.parameters, loop.average.values, strict=True):
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_swa_is_the_mean_of_the_ends_of_epochs(splits):
    loop = loop_of(network("ctrw"), splits, averaging=AveragingConfig(name="swa", start=0.34))
    _, ends = run(loop, 3)
    for name, value in zip(loop.average.parameters, loop.average.values, strict=True):
        torch.testing.assert_close(value.double(), (ends[1][name] + ends[2][name]) / 2, rtol=1e-5, atol=1e-6)


def test_the_average_of_random_weights_stays_in_their_set(splits):
    loop = loop_of(network("ctrw", constraint="project"), splits, averaging=AveragingConfig(name="ema", decay=0.5))
    run(loop, 2)
    with loop.average.in_the_model(loop.model):
        layer = loop.model.backbone.taps["0"]
        total, bounds = layer.sigma.sum().item(), layer.bounds
        assert layer.sigma.min() >= 0
        assert bounds.lower * (1 - 1e-5) <= total <= bounds.upper * (1 + 1e-5)


class Layers(nn.Module):
    """A normalization behind a convolution, so that its input depends on the weights."""

    def __init__(self, normalization):
        super().__init__()
        self.convolution = nn.Conv2d(2, 4, 1)
        self.normalization = normalization

    def forward(self, x):
        return self.normalization(self.convolution(x))


def batches(count=7):
    generator = torch.Generator().manual_seed(0)
    return [3 + 2 * torch.randn(5, 2, 3, 3, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("kind", ["BatchNorm2d", "bn", "bgn_size_2"])
def test_statistics_are_the_mean_of_those_of_the_batches(kind):
    normalization = nn.BatchNorm2d(4) if kind == "BatchNorm2d" else Normalization2d(4, parse_normalization(kind))
    model = Layers(normalization).eval()
    momentum, answer = normalization.momentum, model(batches()[0])
    recompute_batch_statistics(model, batches(), seed=0)
    with torch.no_grad():
        maps = [model.convolution(x).double() for x in batches()]
    groups = len(normalization.running_mean)
    maps = [x.unflatten(1, (groups, -1)).transpose(0, 1).flatten(1) for x in maps]
    torch.testing.assert_close(normalization.running_mean.double(), torch.stack([x.mean(1) for x in maps]).mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(normalization.running_var.double(), torch.stack([x.var(1) for x in maps]).mean(0), rtol=1e-5, atol=1e-5)
    assert normalization.momentum == momentum
    assert not model.training
    assert not torch.equal(model(batches()[0]), answer)


@pytest.mark.parametrize("scope", ["global", "per_example"])
def test_each_random_normalization_has_the_statistics_of_what_it_saw(scope):
    layer = RandomNormalization2d(4, ("bn", "bgn_size_2", "in"), draw_scope=scope)
    model = Layers(layer)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def note(module, inputs, output):
        chosen = layer._example_choices(5) if scope == "per_example" else layer.choice.expand(5)
        seen.append((inputs[0].detach().double(), chosen.clone()))

    layer.register_forward_hook(note)
    recompute_batch_statistics(model, batches(9), seed=3)
    for index, (name, groups) in enumerate([("bn", 4), ("bgn_size_2", 2)]):
        shares = torch.stack([(chosen == index).double().mean() for _, chosen in seen])
        means = torch.stack([x.unflatten(1, (groups, -1)).transpose(0, 1).flatten(1).mean(1) for x, _ in seen])
        assert shares.sum() > 0
        expected = (shares[:, None] * means).sum(0) / shares.sum()
        torch.testing.assert_close(layer.branches[name].running_mean.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_normalization_that_was_never_drawn_keeps_its_statistics():
    layer = RandomNormalization2d(4, ("bn", "bgn_size_2", "bgn_size_4"))
    model = Layers(layer)
    for branch in layer.branches.values():
        branch.running_mean.fill_(7.0)
    recompute_batch_statistics(model, batches(1), seed=0)
    assert sorted(float(branch.running_mean[0]) == 7.0 for branch in layer.branches.values()) == [False, True, True]


def test_draws_streams_and_modes_are_as_before():
    model = network("ctrw").train()
    model.backbone.layer1.eval()
    twin = copy.deepcopy(model)
    recompute_batch_statistics(model, [torch.rand(4, 1, 8, 8)], seed=5)
    assert not model.backbone.layer1.training
    for each in (model, twin):
        resample(each)
    first, second = (dict(each.named_buffers()) for each in (model, twin))
    assert all(torch.equal(first[name], second[name]) for name in first if "running" not in name)
    assert any(not torch.equal(first[name], second[name]) for name in first if "running" in name)


COMPARED = ("time/", "memory/", "validation/", "average/")


def without(history):
    return [{name: value for name, value in epoch.items() if not name.startswith(COMPARED)} for epoch in history]


@pytest.mark.parametrize("name", ["ema", "swa"])
def test_an_average_changes_nothing_in_the_training_itself(name, splits):
    plain = fit(network("rna"), splits, RADIUS, config(), seed=0)
    averaged = fit(network("rna"), splits, RADIUS, config(averaging=AveragingConfig(name=name, start=0)), seed=0)
    assert without(plain.history) == without(averaged.history)
    assert [epoch["validation/robust_accuracy"] for epoch in plain.history] == [
        epoch["validation/latest/robust_accuracy"] for epoch in averaged.history
    ]


@pytest.mark.parametrize(("select", "chosen"), [("best", "latest"), ("best", "average"), ("last", "average")])
def test_the_better_copy_is_kept(select, chosen, splits, monkeypatch):
    seen = []

    def judged(model, *arguments, **options):
        is_average = len(seen) % 2 == 1
        score = (0.9 if (chosen == "average") == is_average else 0.1) if select == "best" else 0.1
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return {"validation/clean_accuracy": score, "validation/robust_accuracy": score}

    monkeypatch.setattr(fitting, "validate", judged)
    model = network()
    settings = config(averaging=AveragingConfig(name="ema", decay=0.9), validation=ValidationConfig(steps=1, select=select), epochs=2)
    result = fit(model, splits, RADIUS, settings, seed=0)
    assert result.metrics["average/chosen"] == (chosen == "average")
    assert result.metrics["validation/robust_accuracy"] == result.metrics[f"validation/{chosen}/robust_accuracy"]
    kept = seen[2 * (result.selected_epoch - 1) + (chosen == "average")]
    assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["ema", "swa"])
@pytest.mark.parametrize("defence", ["ctrw", "rna", "ps_red"])
def test_a_resumed_run_ends_bit_identically(defence, name, splits, tmp_path):
    parameters = {"num_members": 2} if defence == "ps_red" else {}
    settings = config(averaging=AveragingConfig(name=name, start=0), validation=ValidationConfig(steps=1, select="last", num_draws=1))
    whole, resumed = network(defence, **parameters), network(defence, **parameters)
    uninterrupted = fit(whole, splits, RADIUS, settings, seed=0)
    fit(network(defence, **parameters), splits, RADIUS, settings, seed=0, reporter=StopAfterOne(tmp_path))
    result = fit(resumed, splits, RADIUS, settings, seed=0, resume_from=tmp_path)
    assert uninterrupted.metrics["average/chosen"] == 1
    assert without(uninterrupted.history) == without(result.history)
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in whole.state_dict().items())


@pytest.mark.parametrize(
    "break_it",
    [
        lambda state: state.pop("average"),
        lambda state: state["average"].update(updates=-1),
        lambda state: state["average"].update(updates="3"),
        lambda state: state["average"]["weights"].popitem(),
        lambda state: next(iter(state["average"]["weights"].values())).fill_(float("nan")),
        lambda state: state.update(average=[1]),
    ],
)
def test_a_damaged_average_is_refused(break_it, splits, tmp_path):
    settings = config(averaging=AveragingConfig(name="ema"), epochs=2)
    fit(network(), splits, RADIUS, settings, seed=0, reporter=StopAfterOne(tmp_path))
    state = read_state(tmp_path)
    break_it(state)
    write_state(state, tmp_path)
    with pytest.raises(UserError, match="checkpoint"):
        fit(network(), splits, RADIUS, settings, seed=0, resume_from=tmp_path)


@pytest.mark.parametrize("field", ["decay=1", "decay=-0.1", "start=1", "name=mean", "statistics_images=0", "decays=0.9", "warmup=2"])
def test_nonsense_is_one_message(field):
    with pytest.raises(UserError, match=r"training\.averaging"):
        load_recipe("at_digits", [f"--training.averaging.{field}"])


def test_a_fingerprint_knows_the_average_and_forgets_none():
    plain = load_recipe("at_digits").experiment
    assert load_recipe("at_digits", ["--training.averaging.name=none"]).experiment.fingerprint == plain.fingerprint
    assert load_recipe("at_digits", ["--training.averaging.name=ema"]).experiment.fingerprint != plain.fingerprint
