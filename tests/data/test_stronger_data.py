"""More images and stronger augmentation: further images at a share, pairs that are mixed, policies of torchvision, softened labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from models.errors import UserError
from models.registry import build_model
from models.threat_model import ThreatModel
from orchestration.recipes import load_recipe
from tests.trainers.tiny_training import StopAfterOne
from trainers.averaging import AveragingConfig
from trainers.config import TrainingConfig
from trainers.data import Augmentation, DataConfig, load_data, training_batches
from trainers.data.mixing import draw_mixing, mix
from trainers.data.policies import apply_policy, crop_and_shift, improved_diversity
from trainers.fit import fit
from trainers.labels import most_probable, softened
from trainers.objective import objectives
from trainers.optimizer import OptimizerConfig
from trainers.schedule import ScheduleConfig
from trainers.step import InnerAttackConfig
from trainers.validation import ValidationConfig

RADIUS = ThreatModel(epsilon=0.1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def epoch_of(split, batch, augmentation=None, rank=0, ranks=1, seed=0):
    return list(training_batches(split, batch // ranks, augmentation or Augmentation(), generator(seed), generator(seed + 1), rank, ranks))


@pytest.fixture(scope="module")
def extra_file(tmp_path_factory):
    """40 images that are all 77, with label 3, as published files name and shape them."""
    path = tmp_path_factory.mktemp("extra") / "extra.npz"
    np.savez(path, image=np.full((40, 8, 8, 1), 77, dtype=np.uint8), label=np.full(40, 3))
    return path


def digits(**changes):
    return load_data(DataConfig(**{"name": "digits", "limit_train": 64, "limit_test": 20, "validation_size": 32} | changes))


@pytest.mark.parametrize("share", [0.25, 0.5, 0.7, 0.9])
def test_every_batch_has_its_share_and_an_epoch_all_own_images(share, extra_file):
    train = digits(extra_images=str(extra_file), extra_share=share).train
    own = digits().train
    is_extra = []
    seen = []
    for x, y in epoch_of(train, 16):
        extra = (x == 77 / 255).flatten(1).all(1)
        is_extra.append(extra)
        assert (y[extra] == 3).all()
        assert abs(extra.sum() - share * 16) <= 1
        seen += [image.numpy().tobytes() for image in x[~extra]]
    assert len(set(seen)) == len(seen) == min(len(own), len(seen))
    assert train.epoch_length == round(64 / (1 - share))
    assert len(seen) >= 64 - 16, "but for what the last batch leaves over"


def test_workers_have_the_rows_of_one(extra_file):
    train = digits(extra_images=str(extra_file), extra_share=0.6).train
    whole = epoch_of(train, 16)
    parts = [epoch_of(train, 16, rank=rank, ranks=2) for rank in range(2)]
    for number, (x, y) in enumerate(whole):
        assert torch.equal(x, torch.cat([part[number][0] for part in parts]))
        assert torch.equal(y, torch.cat([part[number][1] for part in parts]))


GRAY = np.zeros((4, 8, 8, 1), dtype=np.uint8)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": GRAY, "labels": np.zeros(4, int)}, "are needed"),
        ({"images": GRAY.astype(float), "labels": np.zeros(4, int)}, "uint8"),
        ({"images": GRAY[..., 0], "labels": np.zeros(4, int)}, "uint8"),
        ({"images": np.zeros((4, 9, 9, 1), np.uint8), "labels": np.zeros(4, int)}, "shape"),
        ({"images": GRAY, "labels": np.zeros(5, int)}, "labels"),
        ({"images": GRAY, "labels": np.full(4, 10)}, "0..9"),
        ({"images": GRAY, "labels": np.full(4, -1)}, "0..9"),
        ({"images": GRAY, "labels": np.full(4, 0.5)}, "labels"),
        ({"images": GRAY[:0], "labels": np.zeros(0, int)}, "uint8"),
        ({"images": np.array([object()]), "labels": np.zeros(1, int)}, "cannot read"),
        (b"no archive", "cannot read"),
        (None, "cannot read"),
    ],
)
def test_a_file_that_holds_no_such_images_is_one_message(arrays, words, tmp_path):
    path = tmp_path / "extra.npz"
    if isinstance(arrays, dict):
        np.savez(path, **arrays, allow_pickle=True)
    elif arrays is not None:
        path.write_bytes(arrays)
    with pytest.raises(UserError, match=words):
        digits(extra_images=str(path))


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_pairs_are_mixed_as_their_papers_say(name):
    x, others = torch.rand(30, 2, 6, 10), 2 + torch.rand(30, 2, 6, 10)
    labels, partners = torch.arange(30) % 5, (torch.arange(30) + 2) % 5
    draw = draw_mixing(30, 1.0, generator())
    mixed, soft = mix(name, x, others, labels, partners, draw, 5)
    for index in range(30):
        share, down, right = draw[index].tolist()
        if name == "mixup":
            expected = share * x[index] + (1 - share) * others[index]
        else:
            expected, half = x[index].clone(), 0.5 * (1 - share) ** 0.5
            top, left = int(down * 6), int(right * 10)
            rows = slice(max(0, top - int(half * 6)), min(6, top + int(half * 6)))
            columns = slice(max(0, left - int(half * 10)), min(10, left + int(half * 10)))
            expected[:, rows, columns] = others[index][:, rows, columns]
            share = 1 - (expected >= 2).double().mean().item()
        torch.testing.assert_close(mixed[index], expected)
        label = torch.zeros(5)
        label[labels[index]] += share
        label[partners[index]] += 1 - share
        torch.testing.assert_close(soft[index], label)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_shares_have_the_beta_distribution(alpha):
    share = draw_mixing(20_000, alpha, generator())[:, 0]
    assert share.mean().item() == pytest.approx(0.5, abs=0.02)
    assert share.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.05)


@pytest.mark.parametrize(
    "augmentation", [Augmentation("crop", 4, mixing="cutmix"), Augmentation("none", mixing="mixup", policy="rand_augment")]
)
def test_workers_mix_what_one_mixes(augmentation):
    train = digits().train
    whole = epoch_of(train, 16, augmentation)
    parts = [epoch_of(train, 16, augmentation, rank, 2) for rank in range(2)]
    for number, (x, y) in enumerate(whole):
        torch.testing.assert_close(x, torch.cat([part[number][0] for part in parts]), rtol=0, atol=0)
        torch.testing.assert_close(y, torch.cat([part[number][1] for part in parts]), rtol=0, atol=0)
        torch.testing.assert_close(y.sum(1), torch.ones(16))
    plain = epoch_of(train, 16, Augmentation(augmentation.name, 4))
    assert all(torch.equal(most_probable(functional.one_hot(y, 10)), y) for _, y in plain)


@pytest.mark.parametrize("name", ["rand_augment", "auto_augment", "trivial_augment"])
def test_a_policy_is_torchvisions_under_each_image_s_seed(name):
    from torchvision.transforms import v2

    policy = {
        "rand_augment": v2.RandAugment(magnitude=12),
        "auto_augment": v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10),
        "trivial_augment": v2.TrivialAugmentWide(),
    }[name]
    images = torch.randint(0, 256, (6, 3, 16, 16), generator=generator(), dtype=torch.uint8)
    before = torch.get_rng_state()
    changed = apply_policy(name, 12, images, torch.arange(6))
    assert torch.equal(before, torch.get_rng_state())
    for seed in range(6):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            assert torch.equal(changed[seed], policy(images[seed]))
    assert not torch.equal(changed, images)


@pytest.mark.parametrize("side", [8, 28, 32])
def test_crop_and_shift_moves_a_window_of_the_image_on_black(side):
    image_CHW = torch.arange(1, side * side + 1).view(1, side, side)
    losses = set()
    with torch.random.fork_rng(devices=[]):
        for seed in range(300):
            torch.manual_seed(seed)
            moved_CHW = crop_and_shift(image_CHW)
            rows, columns = (moved_CHW[0] > 0).any(1).nonzero().flatten(), (moved_CHW[0] > 0).any(0).nonzero().flatten()
            window = moved_CHW[0, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            top, left = divmod(window[0, 0].item() - 1, side)
            torch.testing.assert_close(window, image_CHW[0, top : top + len(rows), left : left + len(columns)], rtol=0, atol=0)
            losses.add(2 * side - len(rows) - len(columns))
    assert losses == set(range(int(side * 10 / 32) + 1))


@pytest.mark.parametrize("channels", [1, 3])
def test_idbh_changes_each_image_under_its_own_seed_and_erases_as_often_as_it_says(channels):
    images = torch.randint(1, 256, (64, channels, 32, 32), generator=generator(), dtype=torch.uint8)
    weak, strong = (apply_policy(name, 9, images, torch.arange(64)) for name in ("idbh_weak", "idbh_strong"))
    assert weak.dtype == torch.uint8 and weak.shape == images.shape
    assert torch.equal(weak[5:9], apply_policy("idbh_weak", 9, images[5:9], torch.arange(5, 9)))
    # One probability is drawn in both, before anything that depends on it: where the weak one erases, both are the same.
    same = (weak == strong).flatten(1).all(1).float().mean().item()
    assert 0.3 < same < 0.7
    changes = improved_diversity(0.5).transforms[1].transforms
    assert len(changes) == 8
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert all(change(images[0]).shape == images[0].shape for change in changes)


def test_nothing_more_is_drawn_where_nothing_is_switched_on():
    first, second = generator(), generator()
    Augmentation("crop_flip").draw(10, 8, 8, first)
    Augmentation("crop_flip", mixing="mixup").draw(10, 8, 8, second)
    boxes = Augmentation("crop_flip").draw(10, 8, 8, generator()).boxes
    assert torch.equal(boxes, Augmentation("crop_flip", mixing="mixup").draw(10, 8, 8, generator()).boxes)
    assert not torch.equal(first.get_state(), second.get_state())


def test_labels_are_softened_by_a_share_of_probabilities():
    logits = torch.randn(4, 3, generator=generator())
    labels = torch.tensor([0, 2, 1, 1])
    for given in (labels, functional.one_hot(labels, 3).float()):
        soft = softened(given, logits, 0.3, 2.0)
        expected = 0.7 * functional.one_hot(labels, 3) + 0.3 * torch.exp(logits / 2) / torch.exp(logits / 2).sum(1, keepdim=True)
        torch.testing.assert_close(soft, expected)


def test_the_average_softens_labels_once_it_has_begun(monkeypatch):
    from trainers.averaging import WeightAverage

    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    average = WeightAverage(model, AveragingConfig(name="ema", decay=0.5, label_weight=0.4, label_temperature=3.0), 1)
    x, y = torch.rand(2, 4), torch.tensor([0, 1])
    assert average.labels(model, x, y) is y
    average.after_step(1.0)
    kept = model(x).detach()
    with torch.no_grad():
        model[1].weight.add_(1)
    torch.testing.assert_close(average.labels(model, x, y), softened(y, kept, 0.4, 3.0))


SOFT = [name for name, entry in objectives().items() if entry.config(name=name).takes_soft_labels]


@pytest.mark.parametrize("objective", SOFT)
def test_a_training_on_mixed_images_and_softened_labels_is_resumed_bit_identically(objective, tmp_path, extra_file):
    splits = digits(extra_images=str(extra_file), extra_share=0.5)
    settings = TrainingConfig(
        objective=objective,
        epochs=2,
        batch_size=32,
        precision="fp32",
        attack=InnerAttackConfig(steps=1, step_size=0.05),
        optimizer=OptimizerConfig(learning_rate=0.01),
        schedule=ScheduleConfig(name="constant"),
        averaging=AveragingConfig(name="ema", label_weight=0.5),
        validation=ValidationConfig(steps=1, num_draws=1, select="last"),
    )
    augmentation = Augmentation("crop", 4, "rand_augment", 9, "cutmix")
    ends = []
    for resumed in (False, True):
        network = [build_model("at", backbone="resnet8", image_shape=(1, 8, 8)) for _ in range(2)]
        if resumed:
            fit(network[1], splits, RADIUS, settings, seed=0, augmentation=augmentation, reporter=StopAfterOne(tmp_path))
        fit(network[0], splits, RADIUS, settings, seed=0, augmentation=augmentation, resume_from=tmp_path if resumed else None)
        ends.append(network[0].state_dict())
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


def test_soft_labels_are_refused_by_what_takes_none():
    assert {"adversarial", "natural", "trades", "nu_at", "free"} <= set(SOFT)
    assert {"red", "rat_surrogate", "label_smoothing"}.isdisjoint(SOFT)
    with pytest.raises(UserError, match="two classes"):
        load_recipe("red_digits", ["--data.mixing=mixup"])
    with pytest.raises(UserError, match="probabilities"):
        load_recipe("red_digits", ["--training.averaging={name: ema, label_weight: 0.5}"])


@pytest.mark.parametrize(
    "field",
    [
        *("policy=randaugment", "policy_magnitude=31", "mixing=cutmixup", "mixing_alpha=0", "extra_share=1", "extra_share=0"),
        *("pixel_std=[0]", "pixel_mean=[0, 0]", "pixel_mean=[127]"),
    ],
)
def test_nonsense_is_one_message(field):
    with pytest.raises(UserError) as caught:
        load_recipe("at_digits", [f"--data.{field}"])
    assert len(str(caught.value).splitlines()) == 1


def test_labels_from_an_average_need_one():
    with pytest.raises(UserError, match="label_weight"):
        load_recipe("at_digits", ["--training.averaging.label_weight=0.5"])


def test_images_are_normalized_as_the_experiment_says():
    from orchestration.training.preparation import build_for

    experiment = load_recipe("at_digits", ["--data.pixel_mean=[0]", "--data.pixel_std=[1]", "--data.limit_train=64"]).experiment
    network = build_for(experiment, load_data(experiment.data))
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(network.normalization(x), x)
    assert network.spec.std == (1.0,)
