"""Crops and flips: exactly torchvision's, with their distribution, from their own generator."""

import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.functional import to_tensor

from trainers.data.augmentation import (
    Augmentation,
    AugmentationDraw,
    crop_padded,
    draw_resized_crop_boxes,
    resize_crops,
    scaled_padding,
    unit_interval,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator(9))


def test_pixels_become_what_torchvision_makes_of_them():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    picture = v2.functional.to_pil_image(levels[0])
    assert torch.equal(unit_interval(levels)[0], to_tensor(picture))


@pytest.mark.parametrize(("side", "padding"), [(8, 1), (16, 2), (28, 4), (32, 4), (64, 8), (224, 28)])
def test_padding_grows_with_the_image(side, padding):
    assert scaled_padding(4, side) == padding
    assert scaled_padding(0, side) == 0
    assert scaled_padding(1, side) >= 1


def test_a_crop_with_given_offsets_is_torchvisions_crop_of_the_padded_image():
    images = random_images(20, 3, 12, 10)
    boxes = torch.stack([torch.randint(0, high, (20,), generator=generator(high)) for high in (7, 5)], dim=1)
    draw = AugmentationDraw(boxes, torch.arange(20) % 3 == 0)
    ours = crop_padded(images, draw, padding_h=3, padding_w=2)
    for image, (top, left), flip, result in zip(images, boxes.tolist(), draw.flips, ours, strict=True):
        expected = v2.functional.crop(v2.functional.pad(image, [2, 3]), top, left, 12, 10)
        assert torch.equal(result, v2.functional.horizontal_flip(expected) if flip else expected)


@pytest.mark.parametrize("name", ["crop", "crop_flip"])
def test_a_whole_batch_equals_torchvision_image_by_image(name):
    images = random_images(64, 1, 32, 32)
    augmentation = Augmentation(name)
    draw = augmentation.draw(64, 32, 32, generator())
    ours = augmentation.apply(images, draw)
    assert ours.dtype == torch.float32
    assert ours.shape == images.shape
    for image, (top, left, height, width), flip, result in zip(images, draw.boxes.tolist(), draw.flips, ours, strict=True):
        expected = v2.functional.crop(v2.functional.pad(image, [4]), top, left, height, width)
        expected = v2.functional.horizontal_flip(expected) if flip else expected
        assert torch.equal(result, unit_interval(expected))


def test_offsets_and_flips_are_uniform():
    draw = Augmentation("crop_flip").draw(90_000, 32, 32, generator())
    for axis in (0, 1):
        counts = draw.boxes[:, axis].bincount()
        assert len(counts) == 9  # 0..8 with a padding of 4
        assert ((counts - 10_000).abs() < 500).all()
    assert abs(draw.flips.float().mean() - 0.5) < 0.01
    joint = (draw.boxes[:, 0] * 9 + draw.boxes[:, 1]).bincount()
    assert len(joint) == 81
    assert joint.min() > 850


def test_crop_never_flips_and_none_changes_nothing():
    assert not Augmentation("crop").draw(1000, 8, 8, generator()).flips.any()
    images = random_images(5, 3, 8, 8)
    rng = generator()
    before = rng.get_state()
    none = Augmentation("none")
    assert torch.equal(none.apply(images, none.draw(5, 8, 8, rng)), unit_interval(images))
    assert torch.equal(rng.get_state(), before)


def test_draws_come_from_their_generator_only():
    for name in ("crop", "crop_flip", "random_resized_crop"):
        torch.manual_seed(1)
        first = Augmentation(name).draw(100, 32, 32, generator(5))
        torch.manual_seed(2)
        global_state = torch.get_rng_state()
        second = Augmentation(name).draw(100, 32, 32, generator(5))
        assert torch.equal(first.boxes, second.boxes)
        assert torch.equal(first.flips, second.flips)
        assert torch.equal(torch.get_rng_state(), global_state)
        assert not torch.equal(first.boxes, Augmentation(name).draw(100, 32, 32, generator(6)).boxes)


def test_a_resized_crop_is_torchvisions():
    images = torch.rand(40, 3, 20, 24, generator=generator(), dtype=torch.float64)
    boxes = draw_resized_crop_boxes(40, 20, 24, generator(1))
    boxes[0] = torch.tensor([0, 0, 20, 24])
    boxes[1] = torch.tensor([19, 23, 1, 1])
    draw = AugmentationDraw(boxes, torch.arange(40) % 2 == 0)
    ours = resize_crops(images, draw)
    for image, box, flip, result in zip(images, boxes.tolist(), draw.flips, ours, strict=True):
        expected = v2.functional.resized_crop(image, *box, size=[20, 24], antialias=True)
        expected = v2.functional.horizontal_flip(expected) if flip else expected
        assert torch.allclose(result, expected, atol=1e-12)


def test_resized_crops_of_uint8_images_stay_in_the_unit_interval():
    images = random_images(200, 3, 16, 16)
    images[:100] = 255
    augmentation = Augmentation("random_resized_crop")
    result = augmentation.apply(images, augmentation.draw(200, 16, 16, generator()))
    assert result.min() >= 0
    assert result.max() <= 1
    assert (result[:100] > 0.9999).all()


def test_boxes_have_the_distribution_of_torchvisions_random_resized_crop():
    height, width, count = 40, 64, 4_000
    boxes = draw_resized_crop_boxes(count, height, width, generator()).double()
    assert (boxes[:, 0] + boxes[:, 2] <= height).all()
    assert (boxes[:, 1] + boxes[:, 3] <= width).all()
    assert (boxes >= 0).all()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        image, transform = torch.zeros(1, height, width), v2.RandomResizedCrop(8)
        drawn = [transform.make_params([image]) for _ in range(count)]
    theirs = torch.tensor([[d["top"], d["left"], d["height"], d["width"]] for d in drawn]).double()
    assert torch.allclose(boxes.mean(0), theirs.mean(0), rtol=0.05)
    assert torch.allclose(boxes.std(0), theirs.std(0), rtol=0.05)
    aspect = (boxes[:, 3] / boxes[:, 2]).log()
    assert abs(aspect.mean() - (theirs[:, 3] / theirs[:, 2]).log().mean()) < 0.02


def test_images_too_long_for_any_box_are_cut_in_the_middle():
    box = draw_resized_crop_boxes(1, 10, 1000, generator())[0].tolist()
    assert box == [0, (1000 - 13) // 2, 10, 13]  # 13 = 10 * 4/3
    box = draw_resized_crop_boxes(1, 1000, 10, generator())[0].tolist()
    assert box == [(1000 - 13) // 2, 0, 13, 10]
