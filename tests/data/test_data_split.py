"""Splits: disjoint, stratified, the same everywhere."""

import hashlib

import pytest
import torch

from models.errors import UserError
from trainers.data import DATASETS, DataConfig, load_data
from trainers.data.array_files import read_digits
from trainers.data.split import (
    class_balanced_prefix,
    derived_validation_size,
    pixel_statistics,
    resize_square,
    stratified_holdout,
)


def test_digits_have_three_splits_of_uint8_pixels_over_the_full_range():
    splits = load_data(DataConfig())
    assert [len(split) for split in (splits.train, splits.validation, splits.test)] == [1294, 143, 360]
    assert (splits.num_classes, splits.image_shape) == (10, (1, 8, 8))
    assert splits.class_names == tuple("0123456789")
    for split in (splits.train, splits.validation, splits.test):
        assert split.images_NCHW.dtype == torch.uint8
        assert split.images_NCHW.is_contiguous()
        assert split.images_NCHW.shape == (len(split), 1, 8, 8)
        assert split.labels.dtype == torch.int64
        assert (int(split.images_NCHW.min()), int(split.images_NCHW.max())) == (0, 255)
        assert split.labels.unique().tolist() == list(range(10))


def test_no_digit_is_in_two_splits_and_none_is_lost():
    splits = load_data(DataConfig())
    pictures = [{image.numpy().tobytes() for image in split.images_NCHW} for split in (splits.train, splits.validation, splits.test)]
    assert len(set.union(*pictures)) == sum(map(len, pictures)) == 1797
    indices = torch.cat([splits.train.indices, splits.validation.indices])
    assert indices.sort().values.tolist() == list(range(1437))


def test_the_digits_split_is_the_same_on_every_machine():
    splits = load_data(DataConfig())
    digest = hashlib.sha256()
    for split in (splits.train, splits.validation, splits.test):
        digest.update(split.images_NCHW.numpy().tobytes())
        digest.update(split.labels.numpy().tobytes())
    assert digest.hexdigest() == "bbca5e6c2e81fbbf9221fb2f7cd96f1970b3ba3029c5a1f903edf70b70218c6d"


def test_the_split_seed_changes_validation_but_never_the_test_set():
    first, second = load_data(DataConfig()), load_data(DataConfig(split_seed=1))
    assert not torch.equal(first.validation.indices, second.validation.indices)
    assert torch.equal(first.test.images_NCHW, second.test.images_NCHW)


def test_the_split_does_not_depend_on_the_global_generator():
    torch.manual_seed(1)
    first = load_data(DataConfig()).validation.indices
    torch.manual_seed(2)
    assert torch.equal(first, load_data(DataConfig()).validation.indices)


@pytest.mark.parametrize("num_held", [0, 1, 7, 50, 299])
def test_each_class_gives_its_share_to_within_one_image(num_held):
    labels_N = torch.tensor([0] * 200 + [1] * 70 + [2] * 30)
    kept, held = stratified_holdout(labels_N, num_held, seed=3)
    assert len(held) == num_held
    assert torch.cat([kept, held]).sort().values.tolist() == list(range(300))
    assert torch.equal(held, held.sort().values)
    assert torch.equal(kept, kept.sort().values)
    for label, count in enumerate((200, 70, 30)):
        assert abs(int((labels_N[held] == label).sum()) - num_held * count / 300) < 1


def test_held_out_images_are_drawn_from_the_whole_class():
    _, held = stratified_holdout(torch.zeros(1000, dtype=torch.int64), 100, seed=0)
    assert held.max() > 900
    assert held.min() < 100


def test_the_derived_validation_size_is_a_tenth_but_at_most_5000():
    assert derived_validation_size(1437, None) == 143
    assert derived_validation_size(50_000, None) == 5_000
    assert derived_validation_size(1_281_167, None) == 5_000
    assert derived_validation_size(100, 0) == 0


def test_a_validation_set_that_leaves_nothing_to_train_on_is_refused():
    with pytest.raises(UserError, match=r"validation_size is 1437, but there are only 1437 training images"):
        load_data(DataConfig(validation_size=1437))


def test_without_validation_all_training_images_train():
    splits = load_data(DataConfig(validation_size=0))
    assert (len(splits.train), len(splits.validation)) == (1437, 0)
    assert splits.validation.num_classes == 10


def test_limits_take_the_first_images_of_each_class_and_are_nested():
    labels_N = torch.tensor([0, 0, 0, 0, 1, 2, 1, 0])
    assert class_balanced_prefix(labels_N, 3).tolist() == [0, 4, 5]
    assert class_balanced_prefix(labels_N, 5).tolist() == [0, 1, 4, 5, 6]
    assert class_balanced_prefix(labels_N, 100).tolist() == list(range(8))
    full, small = load_data(DataConfig()), load_data(DataConfig(limit_train=50, limit_test=20))
    assert small.train.labels.bincount().tolist() == [5] * 10
    assert small.test.labels.bincount().tolist() == [2] * 10
    assert set(small.train.indices.tolist()) < set(full.train.indices.tolist())
    assert torch.equal(small.validation.images_NCHW, full.validation.images_NCHW)


def test_digits_at_16_pixels_are_bilinear_enlargements():
    small, large = load_data(DataConfig()).train, load_data(DataConfig(image_size=16)).train
    assert large.image_shape == (1, 16, 16)
    expected = torch.nn.functional.interpolate(small.images_NCHW.double(), size=(16, 16), mode="bilinear")
    assert (large.images_NCHW.double() - expected).abs().max() <= 0.5 + 1e-3
    assert torch.equal(small.labels, large.labels)


def test_shrinking_is_antialiased():
    stripes = torch.zeros(1, 1, 32, 32, dtype=torch.uint8)
    stripes[..., ::2] = 200
    shrunk = resize_square(stripes, 8)
    assert ((shrunk.int() - 100).abs() <= 15).all()


def test_pixel_statistics_are_those_of_the_pixels():
    images_NCHW = torch.randint(0, 256, (50, 3, 5, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images_NCHW[:, 2] = 51
    mean, std = pixel_statistics(images_NCHW)
    pixels_NCHW = images_NCHW.double() / 255
    assert torch.allclose(torch.tensor(mean).double(), pixels_NCHW.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(torch.tensor(std[:2]).double(), pixels_NCHW[:, :2].std((0, 2, 3), correction=0), atol=1e-6)
    assert std[2] == pytest.approx(1 / 255, abs=1e-6)


def test_the_stated_statistics_of_digits_are_those_of_its_training_images():
    mean, std = pixel_statistics(read_digits(None).train_images)
    assert DATASETS["digits"].mean == pytest.approx(mean, abs=1e-4)
    assert DATASETS["digits"].std == pytest.approx(std, abs=1e-4)


def test_a_subset_keeps_images_labels_and_indices_together():
    split = load_data(DataConfig()).train
    part = split.subset(torch.tensor([5, 2]))
    assert torch.equal(part.images_NCHW, split.images_NCHW[[5, 2]])
    assert part.indices.tolist() == split.indices[[5, 2]].tolist()
    assert part.labels.tolist() == split.labels[[5, 2]].tolist()
    assert len(split.subset(range(3))) == 3
