"""Streamed splits: decoded by workers, reproducible whatever their number."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from models.errors import UserError
from trainers.data import Augmentation, DataConfig, StreamedSplit, evaluation_batches, load_data, training_batches
from trainers.data.streaming import _DecodedFiles

SIZES = ((20, 30), (31, 24), (16, 16), (40, 18))


def write_tree(folder, parts=("train", "test"), num_classes=2, num_images=4):
    rng = np.random.default_rng(0)
    for part in parts:
        for label in range(num_classes):
            (folder / part / f"class{label:03}").mkdir(parents=True)
            for number in range(num_images):
                height, width = SIZES[number % len(SIZES)]
                pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / f"class{label:03}" / f"{number}.png")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_tree(folder / "pets")
    return folder


def load(root, num_workers=0, **fields):
    settings = {"validation_size": 2, "image_size": 14, **fields}
    return load_data(DataConfig(name="image_folder", folder="pets", streamed=True, **settings), root, num_workers=num_workers)


def batches_of(split, batch_size, name="random_resized_crop", seed=0, **kwargs):
    order, augmentation = (torch.Generator().manual_seed(seed + offset) for offset in (0, 1000))
    return training_batches(split, batch_size, Augmentation(name), order, augmentation, **kwargs)


def test_two_workers_deliver_what_none_delivers_over_two_epochs(root):
    torch.manual_seed(1)
    alone = batches_of(load(root).train, 2)
    expected = [batch for _ in range(2) for batch in alone]
    torch.manual_seed(2)
    state = torch.get_rng_state()
    with_workers = batches_of(load(root, num_workers=2).train, 2)
    actual = [batch for _ in range(2) for batch in with_workers]
    assert torch.equal(torch.get_rng_state(), state)
    assert len(expected) == len(actual) == 6
    for (x_BCHW, y_B), (other_BCHW, other_B) in zip(expected, actual, strict=True):
        assert (x_BCHW.dtype, x_BCHW.shape, y_B.dtype) == (torch.float32, (2, 3, 14, 14), torch.int64)
        assert x_BCHW.min() >= 0
        assert x_BCHW.max() <= 1
        assert torch.equal(x_BCHW, other_BCHW)
        assert torch.equal(y_B, other_B)
    first, second = (torch.cat([x for x, _ in expected[part]]) for part in (slice(3), slice(3, 6)))
    assert not torch.equal(first, second)


def test_ranks_together_see_what_one_process_sees(root):
    split = load(root).train
    single = batches_of(split, 2)
    ranks = [batches_of(split, 1, rank=rank, world_size=2) for rank in range(2)]
    for _ in range(2):
        for (x_BCHW, y_B), *parts in zip(single, *ranks, strict=True):
            assert torch.equal(torch.cat([x for x, _ in parts]), x_BCHW)
            assert torch.equal(torch.cat([y for _, y in parts]), y_B)


def test_splits_are_disjoint_stratified_and_described(root):
    splits = load(root)
    assert isinstance(splits.train, StreamedSplit)
    assert (splits.num_classes, splits.image_shape) == (2, (3, 14, 14))
    assert not set(splits.train.files.files) & set(splits.validation.files.files)
    assert splits.validation.labels.tolist() == [0, 1]
    assert [len(split) for split in (splits.train, splits.validation, splits.test)] == [6, 2, 8]
    assert all(0.4 < mean < 0.6 for mean in splits.mean)
    assert splits.test.subset(range(3)).files.files == splits.test.files.files[:3]
    assert load(root, limit_train=2).train.labels.tolist() == [0, 1]


def test_evaluation_is_torchvisions_resize_and_centre_crop_in_order(root):
    split = load(root).test
    reference = v2.Compose([v2.Resize(16), v2.CenterCrop(14), v2.PILToTensor()])
    batches = evaluation_batches(split, 3)
    assert len(batches) == 3
    for _ in range(2):
        x_NCHW, y_N = (torch.cat(parts) for parts in zip(*batches, strict=True))
        assert y_N.tolist() == [0] * 4 + [1] * 4
        for x_CHW, name in zip(x_NCHW, split.files.files, strict=True):
            assert torch.equal(x_CHW, reference(Image.open(split.files.folder / name)) / 255)


def test_evaluation_shards_are_contiguous_and_complete(root):
    split = load(root).test
    whole = torch.cat([x for x, _ in evaluation_batches(split, 8)])
    shards = [torch.cat([x for x, _ in evaluation_batches(split, 2, rank, 3)]) for rank in range(3)]
    assert [len(shard) for shard in shards] == [2, 3, 3]
    assert torch.equal(torch.cat(shards), whole)


def test_without_augmentation_training_images_are_the_centre_cuts(root):
    split = load(root).train
    cuts = {x.numpy().tobytes() for batch, _ in evaluation_batches(split, 6) for x in batch}
    assert {x.numpy().tobytes() for batch, _ in batches_of(split, 3, "none") for x in batch} == cuts


def test_a_broken_image_is_named_without_a_traceback_of_the_worker(tmp_path):
    write_tree(tmp_path / "pets")
    split = load(tmp_path, num_workers=1).test
    (tmp_path / "pets" / "test" / "class001" / "2.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"^cannot decode the image .*class001/2\.png") as caught:
        list(evaluation_batches(split, 4))
    assert "Traceback" not in str(caught.value)


def test_other_augmentations_are_refused(root):
    with pytest.raises(UserError, match="allowed: none, random_resized_crop"):
        batches_of(load(root).train, 2, "crop_flip")


def test_imagenet_streams_from_its_class_folders(tmp_path):
    write_tree(tmp_path / "imagenet", ("train", "val"), num_classes=3)
    with pytest.raises(UserError, match=r"train holds 3 class folders; imagenet has 1000"):
        load_data(DataConfig(name="imagenet"), tmp_path)
    image = (tmp_path / "imagenet" / "train" / "class000" / "2.png").read_bytes()
    for part, number in (("train", 2), ("val", 1)):
        for label in range(1000):
            folder = tmp_path / "imagenet" / part / f"class{label:03}"
            folder.mkdir(exist_ok=True)
            for name in range(number):
                (folder / f"{name}.png").write_bytes(image)
    settings = DataConfig(name="imagenet", augmentation="random_resized_crop", validation_size=1000, limit_test=8)
    splits = load_data(settings, tmp_path, num_workers=0)
    assert (splits.num_classes, splits.image_shape) == (1000, (3, 224, 224))
    assert splits.mean == (0.485, 0.456, 0.406)
    assert splits.validation.labels.tolist() == list(range(1000))
    x_BCHW, y_B = next(iter(batches_of(splits.train, 2)))
    assert x_BCHW.shape == (2, 3, 224, 224)
    assert y_B.shape == (2,)
    assert [len(y) for _, y in evaluation_batches(splits.test, 5)] == [5, 3]


def test_a_streamed_crop_is_torchvisions_with_the_draw_of_its_seed(root):
    files, augmentation = load(root).train.files, Augmentation("random_resized_crop")
    decoded = _DecodedFiles(files, 14, augmentation)
    flipped = 0
    for seed in range(40):
        row = seed % len(files)
        image = v2.functional.pil_to_tensor(Image.open(files.folder / files.files[row]))
        draw = augmentation.draw(1, *image.shape[1:], torch.Generator().manual_seed(seed))
        expected = v2.functional.resized_crop(v2.functional.to_pil_image(image), *draw.boxes[0].tolist(), size=[14, 14], antialias=True)
        expected = v2.functional.horizontal_flip(expected) if draw.flips[0] else expected
        flipped += int(draw.flips[0])
        x_CHW, label = decoded[row, seed]
        assert torch.equal(x_CHW, v2.functional.pil_to_tensor(expected))
        assert label == files.labels[row]
    assert 10 < flipped < 30
