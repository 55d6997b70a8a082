"""Two gloo processes: draw scopes, one all-reduce per step, the same training as one process at equal global batches."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from models.randomness import random_sites, resample, seed_streams
from models.registry import build_model
from models.threat_model import ThreatModel
from tests.distributed.pair_of_processes import results_of
from trainers.averaging import AveragingConfig
from trainers.config import TrainingConfig
from trainers.data import Augmentation, DataConfig, load_data
from trainers.distributed import average_batch_statistics, average_gradients, exclude_draws_from_ddp
from trainers.fit import fit
from trainers.optimizer import OptimizerConfig
from trainers.schedule import ScheduleConfig
from trainers.step import InnerAttackConfig
from trainers.validation import ValidationConfig

pytestmark = pytest.mark.distributed


JOBS = {}


def job(function):
    """Register a function that both processes run."""
    JOBS[function.__name__] = function
    return function


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """`both(name)` returns what job `name` returned on rank 0 and on rank 1."""
    return results_of(__name__, tmp_path_factory.mktemp("gloo"))


def draws_of(model):
    return [site.draw_state()["buffers"] for _, site in random_sites(model)], [site.draw_key for _, site in random_sites(model)]


@job
def draw(rank):
    drawn = {}
    for scope in ("global", "per_rank", "per_example"):
        model = build_model("ctrw", backbone="resnet8", image_shape=(1, 8, 8), draw_scope=scope)
        seed_streams(model, 3, rank)
        drawn[scope] = []
        for _ in range(3):
            resample(model)
            drawn[scope].append(draws_of(model)[1])
    return drawn


@pytest.mark.parametrize(("scope", "equal"), [("global", True), ("per_rank", False), ("per_example", False)])
def test_the_draw_scope_is_the_one_that_was_chosen(scope, equal, both):
    first, second = (drawn[scope] for drawn in both("draw"))
    assert (first == second) == equal
    assert len({tuple(keys) for keys in first}) == 3


@job
def wrapped_in_ddp(rank):
    model = build_model("ctrw", backbone="resnet8", image_shape=(1, 8, 8), draw_scope="per_rank")
    seed_streams(model, 3, rank)
    exclude_draws_from_ddp(model)
    before = draws_of(model)[0][0]["delta"].clone()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    wrapped(torch.rand(4, 1, 8, 8)).sum().backward()
    wrapped(torch.rand(4, 1, 8, 8))
    return before, draws_of(model)[0][0]["delta"]


def test_pytorchs_own_wrapper_can_be_told_to_leave_draws_alone(both):
    (before_0, after_0), (before_1, after_1) = both("wrapped_in_ddp")
    assert torch.equal(before_0, after_0)
    assert torch.equal(before_1, after_1)
    assert not torch.equal(after_0, after_1)


@job
def average(rank):
    used_by_both = torch.nn.Parameter(torch.zeros(2, 3).t())  # a layout that is not contiguous
    used_by_one = torch.nn.Parameter(torch.zeros(4))
    used_by_none = torch.nn.Parameter(torch.zeros(1))
    used_by_both.grad = torch.full_like(used_by_both, 1.0 + rank)
    if rank == 1:
        used_by_one.grad = torch.full((4,), 6.0)
    calls = []
    real = dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs)
    average_gradients([used_by_both, used_by_one, used_by_none])
    dist.all_reduce = real
    return used_by_both.grad, used_by_one.grad, used_by_none.grad, len(calls)


def test_gradients_are_averaged_by_one_all_reduce_and_unused_ones_stay_none(both):
    for shared, one, none, calls in both("average"):
        assert torch.equal(shared, torch.full((3, 2), 1.5))
        assert torch.equal(one, torch.full((4,), 3.0))
        assert none is None
        assert calls == 1


@job
def statistics(rank):
    model = build_model("at", backbone="resnet8", image_shape=(1, 8, 8))
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.fill_(rank)
    average_batch_statistics(model)
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith("running_mean")}


def test_running_statistics_are_averaged(both):
    for buffers in both("statistics"):
        assert all(torch.equal(buffer, torch.full_like(buffer, 0.5)) for buffer in buffers.values())


def without_batch_norm():
    """Return a network in which examples do not see each other, so that one and two workers compute the same."""
    return build_model("single_normalization", backbone="resnet8", image_shape=(1, 8, 8), normalization="ln", seed=1)


def trained(**settings):
    torch.set_num_threads(1)
    splits = load_data(DataConfig(name="digits", limit_train=64, limit_test=20, validation_size=32))
    model = settings.pop("model", None) or without_batch_norm()
    defaults = {
        "objective": "adversarial",
        "epochs": 2,
        "batch_size": 32,
        "precision": "fp32",
        "attack": InnerAttackConfig(steps=2, step_size=0.05),
        "optimizer": OptimizerConfig(learning_rate=0.05),
        "schedule": ScheduleConfig(name="one_cycle"),
        "validation": ValidationConfig(steps=2, select="last"),
    }
    config = TrainingConfig(**defaults | settings)
    calls = []
    if dist.is_initialized():
        real = dist.all_reduce
        dist.all_reduce = lambda *args, **kwargs: calls.append(args[0].numel()) or real(*args, **kwargs)
    result = fit(model, splits, ThreatModel(epsilon=0.1), config, seed=0, augmentation=Augmentation("crop", 4))
    size = sum(parameter.numel() for parameter in model.parameters())
    return model.state_dict(), result.metrics, sum(count >= size for count in calls)


@job
def train(rank):
    return trained()


def test_two_workers_train_what_one_trains_at_equal_global_batches(both):
    alone_weights, alone_metrics, _ = train(0)
    steps = 2 * (64 // 32)
    for weights, metrics, reductions in both("train"):
        assert reductions == steps, "exactly one all-reduce of the gradients per training step"
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, alone_weights[name], atol=1e-5, rtol=1e-4)
        for name in ("train/loss", "validation/clean_accuracy"):
            assert metrics[name] == pytest.approx(alone_metrics[name], abs=1e-4)


def network():
    return build_model("at", backbone="resnet8", image_shape=(1, 8, 8), seed=1)


@job
def train_on_single_steps(rank):
    return trained(attack=InnerAttackConfig(name="n_fgsm", step_size=0.05), accumulation=2)[0]


def test_two_workers_take_the_single_steps_and_parts_of_one(both):
    alone = train_on_single_steps(0)
    for weights in both("train_on_single_steps"):
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, alone[name], atol=1e-5, rtol=1e-4)


@job
def train_from_the_epoch_before(rank):
    return trained(attack=InnerAttackConfig(steps=1, step_size=0.05, warm_start=9), epochs=3)[0]


def test_two_workers_go_on_from_what_the_other_kept(both):
    alone = train_from_the_epoch_before(0)
    for weights in both("train_from_the_epoch_before"):
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, alone[name], atol=1e-4, rtol=1e-3)


@job
def train_averaged(rank):
    averaging = AveragingConfig(name="ema", decay=0.7)
    return trained(averaging=averaging, model=network(), batch_norm="synchronized")[:2]


def test_two_workers_average_what_one_averages(both):
    alone_weights, alone_metrics = train_averaged(0)
    assert alone_metrics["average/chosen"] == 1
    (first, _), (second, _) = both("train_averaged")
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), "both workers hold the same average and the same statistics"
        torch.testing.assert_close(tensor, alone_weights[name], atol=1e-4, rtol=1e-3)


class Kills:
    """Writes every state that it may, and ends the training after the second step of each of two epochs."""

    def __init__(self, folder, start):
        self.folder, self.at = folder, start

    def epoch_finished(self, report, save):
        if dist.get_rank() == 0:
            save(self.folder)
        dist.barrier()

    def step_finished(self, step, num_steps, save):
        save(self.folder)
        if step == self.at:
            dist.barrier()
            raise KeyboardInterrupt


def train_with_own_statistics(folder=None, kills=()):
    """Train a network whose workers have running statistics and draws of their own within an epoch; draws change once an epoch."""
    splits = load_data(DataConfig(name="digits", limit_train=64, limit_test=20, validation_size=32))
    config = TrainingConfig(
        objective="adversarial",
        epochs=2,
        batch_size=16,
        precision="fp32",
        redraw="each_epoch",
        attack=InnerAttackConfig(steps=1, step_size=0.05),
        optimizer=OptimizerConfig(learning_rate=0.05),
        validation=ValidationConfig(steps=1, select="last"),
    )
    for kill in (*kills, None):
        model = build_model("ctrw", backbone="resnet8", image_shape=(1, 8, 8), draw_scope="per_rank", seed=1)
        reporter = None if kill is None else Kills(folder, kill)
        try:
            fit(model, splits, ThreatModel(epsilon=0.1), config, seed=0, reporter=reporter, resume_from=folder)
        except KeyboardInterrupt:
            continue
        return model.state_dict()


@job
def interrupted(rank):
    folders = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(folders)
    folder = Path(folders[0])
    try:
        return train_with_own_statistics(), train_with_own_statistics(folder, kills=(2, 3))
    finally:
        dist.barrier()
        shutil.rmtree(folder, ignore_errors=True)


def test_two_workers_that_are_killed_amid_an_epoch_go_on_bit_identically(both):
    for whole, resumed in both("interrupted"):
        for name, tensor in whole.items():
            assert torch.equal(tensor, resumed[name]), name
