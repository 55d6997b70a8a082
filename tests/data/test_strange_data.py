"""Data of other kinds than it should be: refused with the file's name and what it holds, never read as something else."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import scipy.io
from PIL import Image

from models.errors import UserError
from tests.data.test_data_files import dump, write_cifar10
from tests.data.test_data_image_tree import config, write_tree
from trainers.data import DataConfig, load_data
from trainers.data.decoding import CACHE_FOLDER

PIXELS = np.random.default_rng(0).integers(0, 256, (10, 3072), dtype=np.uint8)
STRANGE_PIXELS = [PIXELS.astype(kind) for kind in ("float32", "float64", "int16", "uint16", "int64", "bool", "complex64", "<U3")]
STRANGE_PIXELS += [PIXELS.tolist(), None, "x", 5, {}, PIXELS[:, :100], PIXELS[:0], PIXELS[0]]
STRANGE_LABELS = [[each] * 10 for each in (0.5, None, "0", True, float("nan"), [0], -1, 10, 10**30)]
STRANGE_LABELS += [list(range(9)), None, 3, "0123456789", {}]
STRANGE_NAMES = [None, 5, "abcdefghij", [None] * 10, list(range(10)), [""] * 10, ["a"] * 9, {}, [["a"]] * 10]


@pytest.fixture
def cifar(tmp_path):
    write_cifar10(tmp_path / "cifar10", np.random.default_rng(0))
    return tmp_path / "cifar10"


@pytest.mark.parametrize("number", range(len(STRANGE_PIXELS)))
def test_pixels_that_are_not_bytes(cifar, number):
    dump(cifar / "data_batch_3", {"data": STRANGE_PIXELS[number], "labels": list(range(10))})
    with pytest.raises(UserError, match="data_batch_3"):
        load_data(DataConfig(name="cifar10"), cifar.parent)


@pytest.mark.parametrize("number", range(len(STRANGE_LABELS)))
def test_labels_that_are_not_whole_numbers_of_classes(cifar, number):
    dump(cifar / "test_batch", {"data": PIXELS, "labels": STRANGE_LABELS[number]})
    with pytest.raises(UserError, match="test_batch"):
        load_data(DataConfig(name="cifar10"), cifar.parent)


@pytest.mark.parametrize("number", range(len(STRANGE_NAMES)))
def test_names_that_are_no_list_of_text(cifar, number):
    dump(cifar / "batches.meta", {"label_names": STRANGE_NAMES[number]})
    with pytest.raises(UserError, match=r"batches\.meta"):
        load_data(DataConfig(name="cifar10"), cifar.parent)


@pytest.mark.parametrize("labels", [[1.5] * 3, [0, 1, 2], [11, 12, 13], [-1, 1, 1]])
def test_svhn_labels_that_are_none(tmp_path, labels):
    for name in ("train_32x32.mat", "test_32x32.mat"):
        scipy.io.savemat(tmp_path / name, {"X": np.zeros((32, 32, 3, 3), np.uint8), "y": np.array(labels)[:, None]})
    with pytest.raises(UserError, match=r"train_32x32\.mat"):
        load_data(DataConfig(name="svhn"), tmp_path)


@pytest.mark.parametrize(
    ("suffix", "pixels"),
    [
        ("png", np.full((9, 9), 40_000, np.uint16)),
        ("tiff", np.full((9, 9), 40_000, np.uint16)),
        ("tiff", np.full((9, 9), 0.5, np.float32)),
        ("tiff", np.full((9, 9), 70_000, np.int32)),
        ("pgm", np.full((9, 9), 3_000, np.uint16)),
    ],
)
def test_pixels_of_more_than_eight_bits(tmp_path, suffix, pixels):
    write_tree(tmp_path / "pets")
    path = tmp_path / "pets" / "train" / "bee" / f"wide.{suffix}"
    Image.fromarray(pixels).save(path)
    with pytest.raises(UserError, match=rf"bee/wide\.{suffix}.*8 bits"):
        load_data(config(), tmp_path)


def refusal(root, **fields):
    """Return why an image folder is refused, None if it is read."""
    try:
        load_data(config(**fields), root)
    except UserError as error:
        return str(error)
    return None


def test_mangled_images_are_named_or_read(tmp_path):
    """Bits flipped, bytes cut, pipes: a UserError with the file, or an image."""
    rng = random.Random(0)
    write_tree(tmp_path / "pets", num_train=4)
    path = tmp_path / "pets" / "train" / "ant" / "002.png"
    for kind in ("png", "jpeg", "gif", "bmp", "tiff", "webp", "ppm"):
        Image.fromarray(np.random.default_rng(1).integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(path, format=kind)
        whole = path.read_bytes()
        for _ in range(12):
            content = bytearray(whole)
            for _ in range(rng.randint(1, 6)):
                content[rng.randrange(len(content))] = rng.randrange(256)
            path.write_bytes(bytes(content[: rng.choice([len(content), rng.randrange(len(content))])]))
            said = refusal(tmp_path, image_size=9)
            assert said is None or "002.png" in said
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match=r"002\.png"):
        load_data(config(), tmp_path)


@pytest.mark.parametrize("place", ["train/ant/again", "train/again", "test/bee/deep/again"])
@pytest.mark.parametrize("leads_to", [".", "..", "../..", "again"])
def test_links_that_loop(tmp_path, place, leads_to):
    write_tree(tmp_path / "pets")
    link = tmp_path / "pets" / place
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(leads_to)
    said = refusal(tmp_path)
    if said is None:
        assert leads_to == "again", "a link to itself is no folder and no image; everything else must be refused"
    else:
        assert "again" in said or "must hold the same class folders" in said


@pytest.mark.parametrize("part", ["train", "test", "train/ant"])
def test_a_file_where_a_folder_should_be(tmp_path, part):
    write_tree(tmp_path / "pets")
    folder = tmp_path / "pets" / part
    folder.rename(tmp_path / "aside")
    folder.write_text("")
    with pytest.raises(UserError, match=str(tmp_path / "pets")):
        load_data(config(), tmp_path)


def test_a_cache_of_other_images_is_not_believed(tmp_path, caplog):
    write_tree(tmp_path / "pets")
    load_data(config(), tmp_path)
    for path in (tmp_path / CACHE_FOLDER).glob("*.npy"):
        np.save(path, np.zeros((2, 3, 9, 9), np.float32))
    assert len(load_data(config(), tmp_path).train) == 15
    assert "cache" in caplog.text
