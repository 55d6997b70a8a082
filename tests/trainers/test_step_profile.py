"""Where the time of a step goes: parts add up, what is nested is counted once, operations are those that are done."""

from __future__ import annotations

import json
import threading

import pytest
import torch

from models.profiling import PartTimes, profiled, timed
from models.threat_model import ThreatModel
from trainers.config import TrainingConfig
from trainers.data import ArraySplit, Augmentation, Splits
from trainers.fit import TrainingLoop
from trainers.reporting import SilentReporter
from trainers.step_profile import PARTS, measured_peak, profile_step


class Network(torch.nn.Module):
    """One matrix product: 48 pixels, 4 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(48, 4)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return self.layer(x_BCHW.flatten(1))


def loop(steps: int, augmentation: str = "crop_flip") -> TrainingLoop:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (32, 3, 4, 4), dtype=torch.uint8, generator=generator)
    split = ArraySplit(images, torch.arange(32) % 4, torch.arange(32), ("a", "b", "c", "d"), (0.5,) * 3, (0.25,) * 3)
    config = TrainingConfig(epochs=2, batch_size=8, objective="adversarial", attack={"steps": steps, "step_size": 0.01}, precision="fp32")
    return TrainingLoop(
        Network(),
        Splits(split, split, split),
        ThreatModel(norm="linf", epsilon=0.1),
        config,
        seed=0,
        device=torch.device("cpu"),
        augmentation=Augmentation(augmentation),
        reporter=SilentReporter(),
    )


class Clock:
    """A clock that stands still unless it is told to go on."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def take(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr("models.profiling.time", made)
    return made


def test_a_part_inside_another_is_counted_once_and_another_thread_is_not(clock):
    times = PartTimes(lambda: clock.take(0.5))  # what the device still has to do is that of the part that asked for it

    @timed("inner")
    def inner() -> None:
        clock.take(4)

    with profiled(times), timed("outer"):
        clock.take(1)
        inner()
        other = threading.Thread(target=inner)
        other.start()
        other.join()
    inner()
    assert times.seconds == {"outer": 1 + 0.5 + 4 + 0.5, "inner": 4 + 0.5}


def test_a_part_that_fails_is_closed(clock):
    times = PartTimes(lambda: None)
    with profiled(times), timed("outer"):
        with pytest.raises(ZeroDivisionError), timed("inner"):
            raise ZeroDivisionError
        clock.take(2)
    with pytest.raises(ZeroDivisionError), profiled(times):
        raise ZeroDivisionError
    with timed("after"):
        clock.take(3)
    assert times.seconds == {"outer": 2, "inner": 0}


def test_operations_are_those_of_the_attack_and_the_step(tmp_path):
    product = 2 * 8 * 48 * 4  # 8 images, 48 pixels, 4 classes
    found = [profile_step(loop(steps), tmp_path / f"{steps}.json", 1).operations for steps in (1, 3)]
    # Each attack step is a forward and the gradient of the images, the training step a forward and the gradient of the weights.
    assert found == [(2 * 1 + 2) * product, (2 * 3 + 2) * product]


def test_the_parts_add_up_and_stand_in_the_trace(tmp_path):
    subject = loop(2)
    found = profile_step(subject, tmp_path / "trace.json", 2)
    assert list(found.parts) == list(PARTS)
    assert sum(found.parts.values()) == pytest.approx(found.seconds)
    assert all(seconds >= 0 for seconds in found.parts.values()) and 0 <= found.idle <= found.seconds
    assert min(found.parts[name] for name in ("data", "augmentation", "attack", "step")) > 0 == found.parts["all-reduce"]
    names = {event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert {"data", "augmentation", "attack", "step"} <= names
    assert found.metrics()["system/step/share_of_peak"] == pytest.approx(found.operations / found.seconds / found.peak)
    assert [row[0] for row in found.rows()] == [*PARTS, "whole step", "idle"]


def test_a_profiled_training_takes_the_same_steps(tmp_path):
    profiled_loop, plain = loop(1), loop(1)
    plain.model.load_state_dict(profiled_loop.model.state_dict())
    profile_step(profiled_loop, tmp_path / "trace.json", 1)
    batches = iter(plain.batches(1))
    for index in range(4):  # one skipped, one measured, one traced, one counted
        plain.train_batch(index, *next(batches))
    assert torch.equal(profiled_loop.model.layer.weight, plain.model.layer.weight)


def test_the_peak_is_that_of_the_fastest_product(clock, monkeypatch):
    seconds = iter([8.0, 4.0, 2.0, 4.0, 8.0])
    monkeypatch.setattr("trainers.step_profile.time", clock)
    monkeypatch.setattr(torch, "mm", lambda first, second: clock.take(next(seconds)))
    assert measured_peak(torch.device("cpu"), loop(1).context.precision) == 2 * 1024**3 / 2.0
