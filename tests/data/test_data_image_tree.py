"""Data sets that come as folders of image files: image_folder, Tiny ImageNet, and the cache of decoded images."""

import logging
import os

import numpy as np
import pytest
import torch
from PIL import Image

from models.errors import UserError
from trainers.data import DataConfig, load_data
from trainers.data.decoding import CACHE_FOLDER


def write_image(path, pixels_HWC):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels_HWC).save(path)


def write_tree(folder, num_train=6, num_test=2, size=(9, 9), classes=("cat", "ant", "bee")):
    rng = np.random.default_rng(0)
    content = {}
    for part, count in (("train", num_train), ("test", num_test)):
        for name in classes:
            for number in range(count):
                path = folder / part / name / f"{number:03}.png"
                content[f"{part}/{name}/{number:03}.png"] = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
                write_image(path, content[f"{part}/{name}/{number:03}.png"])
    return content


def config(folder="pets", **fields):
    return DataConfig(name="image_folder", folder=str(folder), **{"validation_size": 3, **fields})


def no_decoding(monkeypatch):
    def refuse(path):
        raise AssertionError(f"decoded {path}")

    monkeypatch.setattr("trainers.data.decoding.open_rgb", refuse)


def test_an_image_folder_is_read_by_class(tmp_path):
    content = write_tree(tmp_path / "pets")
    splits = load_data(config(), tmp_path)
    assert splits.class_names == ("ant", "bee", "cat")
    assert splits.image_shape == (3, 9, 9)
    assert [len(split) for split in (splits.train, splits.validation, splits.test)] == [15, 3, 6]
    assert splits.validation.labels.tolist() == [0, 1, 2]
    expected = [content[name].transpose(2, 0, 1) for name in sorted(content) if name.startswith("test/")]
    assert np.array_equal(splits.test.images_NCHW.numpy(), np.stack(expected))
    assert splits.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    pictures = [{image.numpy().tobytes() for image in split.images_NCHW} for split in (splits.train, splits.validation, splits.test)]
    assert len(set.union(*pictures)) == 24


def test_its_statistics_are_measured_on_the_training_split(tmp_path):
    write_tree(tmp_path / "pets")
    splits = load_data(config(), tmp_path)
    pixels = splits.train.images_NCHW.double() / 255
    assert torch.allclose(torch.tensor(splits.mean).double(), pixels.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(torch.tensor(splits.std).double(), pixels.std((0, 2, 3), correction=0), atol=1e-6)
    assert splits.test.mean == splits.train.mean


def test_an_absolute_folder_needs_no_root(tmp_path):
    write_tree(tmp_path / "elsewhere" / "pets")
    splits = load_data(config(tmp_path / "elsewhere" / "pets"), tmp_path / "missing")
    assert len(splits.train) == 15
    assert (tmp_path / "elsewhere" / CACHE_FOLDER).is_dir()
    assert not (tmp_path / "missing").exists()


def test_decoded_images_are_cached_until_a_file_changes(tmp_path, monkeypatch):
    write_tree(tmp_path / "pets")
    progress = []
    first = load_data(config(), tmp_path, progress=lambda done, total: progress.append((done, total)))
    assert progress[-1] == (24, 24)
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)
    assert len(list((tmp_path / CACHE_FOLDER).iterdir())) == 2
    with monkeypatch.context() as patch:
        no_decoding(patch)
        second = load_data(config(), tmp_path)
    assert torch.equal(first.train.images_NCHW, second.train.images_NCHW)
    assert torch.equal(first.test.images_NCHW, second.test.images_NCHW)
    path = tmp_path / "pets" / "test" / "ant" / "000.png"
    write_image(path, np.full((9, 9, 3), 7, np.uint8))
    third = load_data(config(), tmp_path)
    assert (third.test.images_NCHW[0] == 7).all()
    assert len(list((tmp_path / CACHE_FOLDER).iterdir())) == 2  # The outdated one is gone.


def test_a_size_change_decodes_again_but_keeps_the_other_size(tmp_path, monkeypatch):
    write_tree(tmp_path / "pets", size=(9, 12))
    assert load_data(config(), tmp_path).image_shape == (3, 9, 12)
    assert load_data(config(image_size=6), tmp_path).image_shape == (3, 6, 6)
    no_decoding(monkeypatch)
    assert load_data(config(), tmp_path).image_shape == (3, 9, 12)
    assert load_data(config(image_size=6), tmp_path).image_shape == (3, 6, 6)


def test_a_broken_cache_is_decoded_again_with_a_warning(tmp_path, caplog):
    write_tree(tmp_path / "pets")
    first = load_data(config(), tmp_path)
    for path in (tmp_path / CACHE_FOLDER).iterdir():
        path.write_bytes(path.read_bytes()[:200])
    second = load_data(config(), tmp_path)
    assert "decoding the images again" in caplog.text
    assert torch.equal(first.train.images_NCHW, second.train.images_NCHW)
    caplog.clear()
    load_data(config(), tmp_path)
    assert not caplog.records


def test_a_cache_that_cannot_be_written_is_skipped_with_a_warning(tmp_path, caplog):
    write_tree(tmp_path / "pets")
    (tmp_path / CACHE_FOLDER).write_text("a file where the cache folder would be")
    with caplog.at_level(logging.WARNING):
        splits = load_data(config(), tmp_path)
    assert len(splits.train) == 15
    assert "cannot be cached" in caplog.text


def test_a_broken_image_is_named(tmp_path):
    write_tree(tmp_path / "pets")
    path = tmp_path / "pets" / "train" / "bee" / "003.png"
    whole = path.read_bytes()
    for broken in (b"", b"not an image", whole[:60]):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=r"cannot decode the image .*train/bee/003\.png: .*Replace the file or remove"):
            load_data(config(), tmp_path)
    assert not (tmp_path / CACHE_FOLDER).exists()
    path.unlink()
    path.symlink_to(tmp_path / "gone.png")
    with pytest.raises(UserError, match=r"cannot read the image .*003\.png"):
        load_data(config(), tmp_path)


def test_images_of_different_sizes_need_an_image_size(tmp_path):
    write_tree(tmp_path / "pets")
    write_image(tmp_path / "pets" / "train" / "cat" / "099.png", np.zeros((5, 9, 3), np.uint8))
    with pytest.raises(UserError, match=r"000\.png is 9x9, .*cat/099\.png is 9x5; set data\.image_size"):
        load_data(config(), tmp_path)
    assert load_data(config(image_size=9), tmp_path).image_shape == (3, 9, 9)


def test_training_and_test_images_of_different_sizes_need_an_image_size(tmp_path):
    write_tree(tmp_path / "pets", num_test=0)
    for name in ("ant", "bee", "cat"):
        write_image(tmp_path / "pets" / "test" / name / "0.png", np.zeros((5, 9, 3), np.uint8))
    with pytest.raises(UserError, match=r"training images are \(9, 9\), test images \(5, 9\)"):
        load_data(config(), tmp_path)


def test_grey_palette_and_transparent_images_are_read_as_rgb(tmp_path):
    write_tree(tmp_path / "pets")
    for number, mode in enumerate(("L", "P", "RGBA", "LA", "CMYK")):
        suffix = "jpg" if mode == "CMYK" else "png"
        Image.new(mode, (9, 9)).save(tmp_path / "pets" / "train" / "cat" / f"mode{number}.{suffix}")
    assert len(load_data(config(), tmp_path).train) == 20


def test_nested_folders_are_searched_and_other_files_left_alone(tmp_path):
    write_tree(tmp_path / "pets")
    write_image(tmp_path / "pets" / "train" / "cat" / "more" / "1.PNG", np.zeros((9, 9, 3), np.uint8))
    (tmp_path / "pets" / "train" / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "pets" / "train" / "cat" / ".hidden.png").write_text("not an image")
    (tmp_path / "pets" / "train" / ".ipynb_checkpoints").mkdir()
    assert len(load_data(config(), tmp_path).train) == 16


def test_trees_that_make_no_sense_are_explained(tmp_path):
    with pytest.raises(UserError, match=r"Needed: train, test\nin this folder:\n  .*pets\n.*train/<class>"):
        load_data(config(), tmp_path)
    write_tree(tmp_path / "pets")
    (tmp_path / "pets" / "test" / "dog").mkdir()
    with pytest.raises(UserError, match=r"only in train/: none; only in test/: dog"):
        load_data(config(), tmp_path)
    (tmp_path / "pets" / "train" / "dog").mkdir()
    with pytest.raises(UserError, match=r"train/dog holds no image files"):
        load_data(config(), tmp_path)
    (tmp_path / "flat" / "train").mkdir(parents=True)
    (tmp_path / "flat" / "test").mkdir()
    with pytest.raises(UserError, match=r"train holds no class folders"):
        load_data(config("flat"), tmp_path)


def test_a_tree_larger_than_memory_is_refused_before_decoding(tmp_path, monkeypatch):
    write_tree(tmp_path / "pets")
    sizes = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 100}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    with pytest.raises(UserError, match=r"18 images of 9x9 need .* lower data\.image_size, or set data\.streamed"):
        load_data(config(), tmp_path)


def write_tiny_imagenet(folder, num_classes=200):
    wnids = [f"n{label:08}" for label in range(num_classes)]
    annotations = []
    for label, wnid in enumerate(wnids):
        for number in range(2):
            write_image(folder / "train" / wnid / "images" / f"{wnid}_{number}.JPEG", np.full((64, 64, 3), label, np.uint8))
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
        write_image(folder / "val" / "images" / f"val_{label}.JPEG", np.full((64, 64, 3), label, np.uint8))
        annotations.append(f"val_{label}.JPEG\t{wnid}\t0\t0\t62\t62\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(reversed(annotations)))
    (folder / "words.txt").write_text("".join(f"{wnid}\tthing {wnid[-3:]}, other word\n" for wnid in wnids))


def test_tiny_imagenet_is_read_in_its_own_layout(tmp_path, monkeypatch):
    write_tiny_imagenet(tmp_path / "tiny-imagenet-200")
    settings = DataConfig(name="tiny_imagenet", image_size=8, validation_size=200)
    splits = load_data(settings, tmp_path)
    assert (splits.num_classes, splits.image_shape) == (200, (3, 8, 8))
    assert splits.class_names[7] == "thing 007"
    for split in (splits.train, splits.validation, splits.test):
        assert len(split) == 200
        assert split.labels.unique().numel() == 200
        grey = split.images_NCHW.float().mean((1, 2, 3))
        assert ((grey - split.labels).abs() < 3).all()
    assert splits.mean == (0.4802, 0.4481, 0.3975)
    no_decoding(monkeypatch)
    load_data(settings, tmp_path)


def test_an_incomplete_tiny_imagenet_is_refused(tmp_path):
    write_tiny_imagenet(tmp_path / "tiny-imagenet-200", num_classes=3)
    with pytest.raises(UserError, match="train holds 3 class folders; tiny_imagenet has 200"):
        load_data(DataConfig(name="tiny_imagenet"), tmp_path)
