"""Validation elsewhere while the next epoch trains: nothing but time may differ from a validation in its place."""

from __future__ import annotations

import contextlib
import random

import pytest
import torch

from models.registry import build_model
from models.threat_model import ThreatModel
from tests.trainers.tiny_training import few_digits, tiny_config
from trainers.averaging import AveragingConfig
from trainers.checkpoint import read_state
from trainers.data import Augmentation
from trainers.fit import TrainingDiverged, TrainingLoop
from trainers.optimizer import OptimizerConfig
from trainers.reporting import SilentReporter, StopTraining
from trainers.schedule import ScheduleConfig
from trainers.step import InnerAttackConfig
from trainers.validation import ValidationConfig

RADIUS = ThreatModel(epsilon=0.1)
TWO_STEPS = InnerAttackConfig(steps=2, step_size=0.05)


class Killed(BaseException):
    """Ends a training as a kill does."""


class Keeps:
    """Writes every state and remembers the reports; stops, or is killed, after an epoch."""

    def __init__(self, folder, *, stop=None, kill=None):
        self.folder, self.stop, self.kill = folder, stop, kill
        self.reports, self.states, self.weights = [], [], []
        self.model = None

    def epoch_finished(self, report, save):
        save(self.folder)
        self.reports.append((report.epoch, without_times(report.metrics)))
        self.states.append(read_state(self.folder))
        self.weights.append({name: value.clone() for name, value in self.model.state_dict().items()})
        if report.epoch == self.kill:
            raise Killed
        if report.epoch == self.stop:
            raise StopTraining

    def step_finished(self, step, num_steps, save):
        pass


def without_times(metrics):
    return {name: value for name, value in metrics.items() if not str(name).startswith(("time/", "system/", "memory/"))}


class Elsewhere:
    """Another worker, which is free, and does what it has begun, only now and then."""

    def __init__(self, loop, chance, free=0.7, works=0.8):
        self.loop, self.chance, self.free, self.works = loop, chance, free, works
        self.done = 0

    def begin(self, weights):
        if self.chance.random() > self.free:
            return None
        copies, other = {name: value.clone() for name, value in weights.items()}, self

        class Task:
            def result(self):
                if other.chance.random() > other.works:
                    return None
                other.done += 1
                other.loop.model.load_state_dict(copies)
                return other.loop.validate(other.loop.held_out)

        return Task()


def loop_of(config, splits, reporter, beside=None, defence="ctrw"):
    model = build_model(defence, backbone="resnet8", image_shape=(1, 8, 8))
    loop = TrainingLoop(
        model, splits, RADIUS, config, seed=3, device=torch.device("cpu"), augmentation=Augmentation(), reporter=reporter, beside=beside
    )
    reporter.model = loop.model
    return loop


def outcome(config, splits, folder, beside=None, *, stop=None, kill=None, resume=False):
    """Train; return how it ended, what was told, the states and the final weights."""
    folder.mkdir(exist_ok=True)
    reporter = Keeps(folder, stop=stop, kill=kill)
    loop = loop_of(config, splits, reporter, beside)
    ended = None
    with contextlib.suppress(Killed):
        try:
            result = loop.run(folder if resume else None)
            ended = (result.selected_epoch, result.num_epochs, result.stopped_early, [without_times(each) for each in result.history])
        except TrainingDiverged as error:
            ended = str(error)
    return ended, reporter, {name: value.clone() for name, value in loop.model.state_dict().items()}


def same(one, two):
    """Return whether two states or weights are equal to the bit."""
    if isinstance(one, torch.Tensor):
        return one.shape == two.shape and bool(((one == two) | ((one != one) & (two != two))).all())
    if isinstance(one, dict):
        one, two = without_times(one), without_times(two)
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


CASES = {
    "to the end": ({}, {}),
    "every second epoch": ({"validation": ValidationConfig(steps=1, every=2)}, {}),
    "the last one is kept": ({"validation": ValidationConfig(steps=1, select="last")}, {}),
    "patience": ({"validation": ValidationConfig(steps=1, patience=1), "optimizer": OptimizerConfig(learning_rate=1e-6)}, {}),
    "diverges": ({"optimizer": OptimizerConfig(learning_rate=1000.0)}, {}),
    "is stopped": ({}, {"stop": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_it_trains_reports_selects_and_stops_as_without(case, tmp_path):
    changes, ending = CASES[case]
    splits, config = few_digits(), tiny_config(**{"epochs": 5, "attack": TWO_STEPS} | changes)
    ended, told, weights = outcome(config, splits, tmp_path / "plain", **ending)
    for seed in range(2):
        elsewhere = Elsewhere(loop_of(config, splits, SilentReporter()), random.Random(seed), free=1 if seed == 0 else 0.7)
        found, also_told, also_weights = outcome(config, splits, tmp_path / f"beside {seed}", elsewhere, **ending)
        assert found == ended
        assert also_told.reports == told.reports
        assert same(also_told.states, told.states), "a kill after any epoch leaves the same"
        assert same(also_told.weights, told.weights), "who is told of an epoch finds its weights in the model"
        assert same(also_weights, weights)
        assert elsewhere.done or case == "diverges" or seed, "it was not all done in its place"


@pytest.mark.parametrize("epoch", [1, 3])
def test_a_killed_one_goes_on_and_ends_the_same(epoch, tmp_path):
    splits, config = few_digits(), tiny_config(epochs=5, attack=TWO_STEPS)
    ended, _, weights = outcome(config, splits, tmp_path / "plain")
    elsewhere = Elsewhere(loop_of(config, splits, SilentReporter()), random.Random(0), free=1, works=1)
    killed, _, _ = outcome(config, splits, tmp_path / "beside", elsewhere, kill=epoch)
    assert killed is None
    found, told, also_weights = outcome(config, splits, tmp_path / "beside", elsewhere, resume=True)
    assert found == ended and same(also_weights, weights)
    assert [number for number, _ in told.reports] == list(range(epoch + 1, 6))


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule": ScheduleConfig(name="plateau")},
        {"averaging": AveragingConfig(name="ema")},
        {"attack": InnerAttackConfig(steps=1, step_size=0.05)},
    ],
    ids=["plateau", "averages", "single_step"],
)
def test_where_the_next_epoch_depends_on_it_it_is_done_in_its_place(changes, tmp_path):
    splits, config = few_digits(), tiny_config(**{"epochs": 2, "attack": TWO_STEPS} | changes)
    elsewhere = Elsewhere(loop_of(config, splits, SilentReporter()), random.Random(0), free=1)
    outcome(config, splits, tmp_path, elsewhere)
    assert elsewhere.done == 0
