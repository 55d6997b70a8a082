"""Batches of a split on the device: order, ranks, reproducibility."""

import pytest
import torch

from models.errors import UserError
from trainers.data import (
    ArraySplit,
    Augmentation,
    DataConfig,
    evaluation_batches,
    load_data,
    shard_range,
    training_batches,
)


def make_split(num_images: int, side: int = 16) -> ArraySplit:
    """Images whose first pixels spell their index, so that a batch tells which images it holds."""
    rng = torch.Generator().manual_seed(0)
    images_NCHW = torch.randint(0, 256, (num_images, 1, side, side), dtype=torch.uint8, generator=rng)
    index_N = torch.arange(num_images)
    images_NCHW[:, 0, 0, 0] = (index_N // 256).to(torch.uint8)
    images_NCHW[:, 0, 0, 1] = (index_N % 256).to(torch.uint8)
    return ArraySplit(images_NCHW, index_N % 7, index_N, tuple("abcdefg"), (0.5,), (0.25,))


def indices_of(x_BCHW: torch.Tensor) -> list[int]:
    pixels = (x_BCHW[:, 0, 0, :2] * 255).round().long()
    return (pixels[:, 0] * 256 + pixels[:, 1]).tolist()


def batches_of(split, batch_size, name="none", seed=0, **kwargs):
    order, augmentation = (torch.Generator().manual_seed(seed + offset) for offset in (0, 1000))
    return training_batches(split, batch_size, Augmentation(name), order, augmentation, **kwargs)


def test_an_epoch_shows_every_image_once_in_random_order_with_its_label():
    split = make_split(100)
    batches = batches_of(split, 20)
    assert len(batches) == 5
    seen = []
    for x_BCHW, y_B in batches:
        assert (x_BCHW.dtype, x_BCHW.shape, y_B.dtype) == (torch.float32, (20, 1, 16, 16), torch.int64)
        assert x_BCHW.min() >= 0
        assert x_BCHW.max() <= 1
        assert [index % 7 for index in indices_of(x_BCHW)] == y_B.tolist()
        seen += indices_of(x_BCHW)
    assert sorted(seen) == list(range(100))
    assert seen != list(range(100))


def test_epochs_differ_and_the_same_seeds_repeat_them():
    split = make_split(60)
    batches = batches_of(split, 20, "crop_flip")
    first, second = [x for x, _ in batches], [x for x, _ in batches]
    assert not torch.equal(torch.cat(first), torch.cat(second))
    again = batches_of(split, 20, "crop_flip")
    for epoch in (first, second):
        assert all(torch.equal(ours, theirs) for ours, (theirs, _) in zip(epoch, again, strict=True))


def test_an_epoch_is_resumed_by_restoring_the_generators():
    split = make_split(60)
    batches = batches_of(split, 20, "crop_flip")
    next(iter(batches))  # An epoch that was interrupted: it moves the generators like a whole one.
    states = batches.order_generator.get_state(), batches.augmentation_generator.get_state()
    expected = torch.cat([x for x, _ in batches])
    resumed = batches_of(split, 20, "crop_flip", seed=77)
    resumed.order_generator.set_state(states[0])
    resumed.augmentation_generator.set_state(states[1])
    assert torch.equal(torch.cat([x for x, _ in resumed]), expected)
    whole = batches_of(split, 20, "crop_flip")
    list(whole)
    assert torch.equal(whole.order_generator.get_state(), states[0])
    assert torch.equal(whole.augmentation_generator.get_state(), states[1])


@pytest.mark.parametrize("name", ["none", "crop_flip", "random_resized_crop"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_see_what_one_process_sees(name, world_size):
    split = make_split(100)
    single = batches_of(split, 4 * world_size, name)
    ranks = [batches_of(split, 4, name, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert {len(batches) for batches in ranks} == {len(single)}
    for epoch in range(2):
        for (x_BCHW, y_B), *parts in zip(single, *ranks, strict=True):
            assert torch.equal(torch.cat([x for x, _ in parts]), x_BCHW), epoch
            assert torch.equal(torch.cat([y for _, y in parts]), y_B)


def test_the_last_small_batch_is_kept_on_request_and_shared_out():
    split = make_split(23)
    sizes = [len(y) for _, y in batches_of(split, 5, drop_last=False)]
    assert sizes == [5, 5, 5, 5, 3]
    assert [len(y) for _, y in batches_of(split, 5)] == [5, 5, 5, 5]
    ranks = [batches_of(split, 5, drop_last=False, rank=rank, world_size=2) for rank in range(2)]
    assert [[len(y) for _, y in batches] for batches in ranks] == [[5, 5, 1], [5, 5, 2]]
    seen = [index for batches in ranks for x, _ in batches for index in indices_of(x)]
    assert sorted(seen) == list(range(23))
    # One image left for two ranks: no rank may run dry, so it is left out.
    ranks = [batches_of(make_split(21), 5, drop_last=False, rank=rank, world_size=2) for rank in range(2)]
    assert [len(batches) for batches in ranks] == [2, 2]


def test_the_global_generator_is_neither_used_nor_moved():
    split = make_split(40)
    torch.manual_seed(1)
    first = torch.cat([x for x, _ in batches_of(split, 10, "crop_flip")])
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = torch.cat([x for x, _ in batches_of(split, 10, "crop_flip")])
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_batch_larger_than_the_training_set_is_refused():
    with pytest.raises(UserError, match=r"has 10 images, fewer than one batch of 16 \(8 on each of 2 workers\)"):
        batches_of(make_split(10), 8, world_size=2)
    with pytest.raises(UserError, match="batch_size must be at least 1"):
        batches_of(make_split(10), 0)
    with pytest.raises(ValueError, match=r"rank must be in 0\.\.1"):
        batches_of(make_split(10), 2, rank=2, world_size=2)


def test_evaluation_shows_every_image_once_in_order():
    split = make_split(23)
    batches = evaluation_batches(split, 10)
    assert len(batches) == 3
    assert [len(y) for _, y in batches] == [10, 10, 3]
    for _ in range(2):
        assert [index for x, _ in batches for index in indices_of(x)] == list(range(23))
    x_BCHW, y_B = next(iter(batches))
    assert torch.equal(x_BCHW, split.images_NCHW[:10] / 255)
    assert torch.equal(y_B, split.labels[:10])


@pytest.mark.parametrize("world_size", [2, 4, 7])
def test_evaluation_shards_are_disjoint_complete_and_unpadded(world_size):
    split = make_split(23)
    seen = []
    for rank in range(world_size):
        shard = [index for x, _ in evaluation_batches(split, 2, rank, world_size) for index in indices_of(x)]
        assert shard == list(shard_range(23, rank, world_size))
        seen += shard
    assert seen == list(range(23))


def test_an_empty_split_has_no_evaluation_batches():
    split = load_data(DataConfig(validation_size=0)).validation
    assert len(evaluation_batches(split, 8)) == 0
    assert list(evaluation_batches(split, 8)) == []
