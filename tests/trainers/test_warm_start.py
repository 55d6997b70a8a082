"""Perturbations that one epoch leaves to the next: they follow their images, and an attack goes on where it was."""

from __future__ import annotations

import pytest
import torch

from models.errors import UserError
from models.registry import build_model
from models.threat_model import ThreatModel
from orchestration.recipes import load_recipe
from trainers.attacks import pgd
from trainers.config import TrainingConfig
from trainers.data import Augmentation, DataConfig, load_data
from trainers.fit import TrainingLoop
from trainers.optimizer import OptimizerConfig
from trainers.reporting import SilentReporter
from trainers.schedule import ScheduleConfig
from trainers.step import InnerAttackConfig
from trainers.validation import ValidationConfig
from trainers.warm_start import ShownImages, WarmStart


@pytest.fixture(scope="module")
def train():
    return load_data(DataConfig(name="digits", limit_train=64, limit_test=20, validation_size=32))


@pytest.mark.parametrize("name", ["none", "crop", "crop_flip"])
def test_a_perturbation_follows_its_image_through_crops_and_mirror_images(name, train):
    augmentation = Augmentation(name, 8)  # two pixels on each side of eight
    warm = WarmStart(train.train, augmentation, 10)
    kept = torch.zeros(64, 1, 8, 8)
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        rows = torch.randperm(64, generator=generator)[:16]
        draw = augmentation.draw(16, 8, 8, generator)
        x, others = torch.rand(16, 1, 8, 8, generator=generator), torch.full((16, 1, 8, 8), 9.0)
        starts = warm.starts(ShownImages(rows, draw), x, others)
        delta = (torch.rand(16, 1, 8, 8, generator=generator) - 0.5).half().float()
        for place, row in enumerate(rows.tolist()):
            top, left = draw.boxes[place, :2].tolist()
            padding = 0 if name == "none" else 2
            shown = torch.zeros(8, 8)
            for i in range(8):
                for j in range(8):
                    a, b = top + i - padding, left + (7 - j if draw.flips[place] else j) - padding
                    if 0 <= a < 8 and 0 <= b < 8:
                        shown[i, j] = kept[row, 0, a, b]
            expected = x[place, 0] + shown if warm.known_N[row] else others[place, 0]
            torch.testing.assert_close(starts[place, 0], expected)
            for i in range(8):
                for j in range(8):
                    a, b = top + i - padding, left + (7 - j if draw.flips[place] else j) - padding
                    if 0 <= a < 8 and 0 <= b < 8:
                        kept[row, 0, a, b] = delta[place, 0, i, j]
        warm.keep(ShownImages(rows, draw), delta)
    torch.testing.assert_close(warm.delta_NCHW.float(), kept)


def loop_of(splits, epochs, warm_start, augmentation=None):
    settings = TrainingConfig(
        epochs=epochs,
        batch_size=16,
        precision="fp32",
        attack=InnerAttackConfig(steps=1, step_size=0.02, warm_start=warm_start, random_start=False, mode="eval"),
        optimizer=OptimizerConfig(learning_rate=1e-30, momentum=0, weight_decay=0),
        schedule=ScheduleConfig(name="constant"),
        validation=ValidationConfig(steps=1),
    )
    model = build_model("single_normalization", backbone="resnet8", image_shape=(1, 8, 8), normalization="ln")
    return TrainingLoop(
        model,
        splits,
        ThreatModel(epsilon=0.1),
        settings,
        seed=0,
        device=torch.device("cpu"),
        augmentation=augmentation or Augmentation(),
        reporter=SilentReporter(),
    )


@pytest.mark.parametrize(("forget_every", "steps"), [(3, 3), (2, 1), (1, 1)])
def test_epochs_of_one_step_are_an_attack_of_several(forget_every, steps, train):
    loop = loop_of(train, 3, forget_every)
    for epoch in range(3):
        loop.train_epoch(epoch)
    x = train.train.images_NCHW.float() / 255
    whole = pgd(loop.model.eval(), x, train.train.labels, epsilon=0.1, step_size=0.02, steps=steps, random_start=False)
    delta = loop.context.warm_start.delta_NCHW.float()
    assert ((delta - (whole - x)).abs() < 1e-3).float().mean() > 0.98, "but for pixels whose gradient is nearly zero"
    assert loop.context.warm_start.known_N.all()


@pytest.mark.parametrize(
    "augmentation", [Augmentation("random_resized_crop"), Augmentation(mixing="mixup"), Augmentation(policy="rand_augment")]
)
def test_what_cannot_be_followed_is_refused(augmentation, train):
    with pytest.raises(UserError, match="warm_start"):
        loop_of(train, 1, 1, augmentation)


@pytest.mark.parametrize(
    ("recipe", "field"),
    [
        ("n_fgsm_digits", "attack.warm_start=3"),
        ("nu_at_digits", "attack.warm_start=3"),
        ("red_digits", "attack.warm_start=3"),
        ("at_digits", "attack.warm_start=0"),
        ("at_digits", "attack={warm_start: 3, stop_after: 1}"),
    ],
)
def test_nonsense_is_one_message(recipe, field):
    with pytest.raises(UserError, match="warm_start") as caught:
        load_recipe(recipe, [f"--training.{field}"])
    assert len(str(caught.value).splitlines()) == 1
