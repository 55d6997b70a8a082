"""Data sets that other libraries read: folders of Hugging Face's `datasets` and WebDataset shards; what was written, or one error."""

from __future__ import annotations

import builtins
import contextlib
import gzip
import io
import json
import random
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from models.errors import UserError
from trainers.data import DataConfig, load_data

NUM_TRAIN, NUM_TEST, SIDE, CLASSES = 40, 12, 7, ("ant", "bee", "cat")


def content(channels=3, seed=0):
    """Pictures (N, H, W[, 3]) and labels of both splits."""
    rng = np.random.default_rng(seed)
    shape = (SIDE, SIDE) if channels == 1 else (SIDE, SIDE, channels)
    return {
        part: (rng.integers(0, 256, (count, *shape), dtype=np.uint8), np.resize(np.arange(len(CLASSES)), count))
        for part, count in (("train", NUM_TRAIN), ("test", NUM_TEST))
    }


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def check(splits, written, class_names):
    """The test split in order, and training and validation together by their positions, are what was written."""
    assert splits.class_names == tuple(class_names)
    held = torch.cat([splits.train.indices, splits.validation.indices])
    assert sorted(held.tolist()) == list(range(NUM_TRAIN))
    for split, part in ((splits.train, "train"), (splits.validation, "train"), (splits.test, "test")):
        pixels, labels = written[part]
        expected = pixels[split.indices.numpy()]
        expected = expected[:, None] if expected.ndim == 3 else expected.transpose(0, 3, 1, 2)
        assert np.array_equal(split.images_NCHW.numpy(), expected)
        assert np.array_equal(split.labels.numpy(), labels[split.indices.numpy()])


def hugging_face(folder="set", **fields):
    pytest.importorskip("datasets")
    return DataConfig(name="hugging_face", folder=str(folder), **fields)


def webdataset(folder="set", **fields):
    pytest.importorskip("webdataset")
    return DataConfig(name="webdataset", folder=str(folder), **fields)


# Hugging Face


def as_datasets(written, label="label", feature=None, test="test", **more):
    datasets = pytest.importorskip("datasets")
    parts = {}
    for part, (pixels, labels) in written.items():
        values = [CLASSES[number] for number in labels] if feature == "string" else labels.tolist()
        columns = {"picture": [{"bytes": png(each), "path": None} for each in pixels], label: values}
        columns |= {name: labels.tolist() for name in more}
        kind = datasets.ClassLabel(names=list(CLASSES)) if feature is None else datasets.Value(feature)
        features = datasets.Features({"picture": datasets.Image(), label: kind} | more)
        parts[test if part == "test" else part] = datasets.Dataset.from_dict(columns, features=features)
    return datasets.DatasetDict(parts)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The library's cache of its own files, below the test's folder."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("channels", [1, 3])
def test_what_save_to_disk_wrote(tmp_path, channels):
    written = content(channels)
    as_datasets(written).save_to_disk(str(tmp_path / "set"))
    splits = load_data(hugging_face(validation_size=6), tmp_path)
    assert splits.image_shape == (channels, SIDE, SIDE)
    check(splits, written, CLASSES)
    pixels = splits.train.images_NCHW.double() / 255
    assert torch.allclose(torch.tensor(splits.mean).double(), pixels.mean((0, 2, 3)), atol=1e-6)


@pytest.mark.parametrize(("feature", "names"), [("int64", "012"), ("string", CLASSES)])
def test_labels_that_are_numbers_or_words(tmp_path, feature, names):
    written = content()
    as_datasets(written, "species", feature, test="valid").save_to_disk(str(tmp_path / "set"))
    check(load_data(hugging_face(label_column="species", validation_size=6), tmp_path), written, names)


def test_the_files_of_a_repository_and_only_the_newest_of_them(tmp_path, cache):
    for seed in (0, 1):
        written = content(seed=seed)
        for part, split in as_datasets(written).items():
            (tmp_path / "set" / "data").mkdir(parents=True, exist_ok=True)
            split.to_parquet(str(tmp_path / "set" / "data" / f"{part}-00000-of-00001.parquet"))
        check(load_data(hugging_face(tmp_path / "set", validation_size=6), tmp_path / "nowhere"), written, CLASSES)


def test_which_column_holds_the_labels_is_asked_where_it_is_not_clear(tmp_path):
    datasets = pytest.importorskip("datasets")
    written = content()
    coarse = datasets.ClassLabel(names=list("xyz"))
    as_datasets(written, "fine", coarse=coarse).save_to_disk(str(tmp_path / "set"))
    with pytest.raises(UserError, match=r"data\.label_column: fine, coarse"):
        load_data(hugging_face(), tmp_path)
    check(load_data(hugging_face(label_column="coarse", validation_size=6), tmp_path), written, "xyz")
    with pytest.raises(UserError, match=r"no column 'label'; it has picture, fine, coarse"):
        load_data(hugging_face(label_column="label"), tmp_path)


def test_a_folder_that_is_none_of_the_librarys(tmp_path, cache):
    datasets = pytest.importorskip("datasets")
    with pytest.raises(UserError, match=r"there is no folder .*set"):
        load_data(hugging_face(), tmp_path)
    (tmp_path / "set").mkdir()
    with pytest.raises(UserError, match=r"cannot read the data set in .*set"):
        load_data(hugging_face(), tmp_path)
    written = as_datasets(content())
    written["train"].save_to_disk(str(tmp_path / "one"))
    with pytest.raises(UserError, match="one split"):
        load_data(hugging_face("one"), tmp_path)
    datasets.DatasetDict({"train": written["train"]}).save_to_disk(str(tmp_path / "lonely"))
    with pytest.raises(UserError, match=r"splits train; train and test"):
        load_data(hugging_face("lonely"), tmp_path)
    plain = datasets.Dataset.from_dict({"label": [0, 1]})
    datasets.DatasetDict({"train": plain, "test": plain}).save_to_disk(str(tmp_path / "plain"))
    with pytest.raises(UserError, match="0 columns of images"):
        load_data(hugging_face("plain"), tmp_path)


# WebDataset


def write_shards(folder, written, label=lambda number: {"cls": str(number).encode()}, shards=3, suffix=".tar", test="test"):
    library = pytest.importorskip("webdataset")
    for part, (pixels, labels) in written.items():
        for shard, rows in enumerate(np.array_split(np.arange(len(labels)), shards)):
            path = folder / f"{test if part == 'test' else part}-{shard:06}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            with library.TarWriter(str(path)) as writer:
                for row in rows:
                    writer.write({"__key__": f"{row:06}", "png": png(pixels[row]), **label(int(labels[row]))})


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_shards_in_the_order_of_their_names(tmp_path, channels, suffix):
    written = content(channels)
    write_shards(tmp_path / "set", written, suffix=suffix)
    check(load_data(webdataset(validation_size=6), tmp_path), written, "012")


@pytest.mark.parametrize(
    ("label", "names", "fields"),
    [
        (lambda number: {"cls": CLASSES[number].encode()}, CLASSES, {}),
        (lambda number: {"json": json.dumps({"label": number}).encode()}, "012", {}),
        (lambda number: {"cls": b"0", "json": json.dumps({"kind": CLASSES[number]}).encode()}, CLASSES, {"label_column": "kind"}),
    ],
)
def test_labels_of_shards(tmp_path, label, names, fields):
    written = content()
    write_shards(tmp_path / "set", written, label, test="val")
    check(load_data(webdataset(validation_size=6, **fields), tmp_path), written, names)


def test_a_folder_may_say_the_split_and_its_name_is_no_command(tmp_path):
    written = content()
    place = tmp_path / "pipe: touch {a..c} train :: x"
    write_shards(place / "flat", written)
    for part in written:
        (place / "set" / part).mkdir(parents=True)
        for number, path in enumerate(sorted((place / "flat").glob(f"{part}-*"))):
            shutil.copy(path, place / "set" / part / f"{number}.tar")
    check(load_data(webdataset(place / "set", validation_size=6), tmp_path), written, "012")
    shutil.copy(place / "set" / "train" / "0.tar", place / "set" / "0.tar")
    with pytest.raises(UserError, match="cannot tell which split"):
        load_data(webdataset(place / "set"), tmp_path)


def test_a_shard_that_was_cut_or_overwritten_anywhere_is_one_error(tmp_path):
    """Every cut is noticed; overwritten bytes are noticed, or lie where tar keeps nothing that counts."""
    written = content()
    write_shards(tmp_path / "set", written)
    splits = load_data(webdataset(validation_size=6), tmp_path)
    chosen = random.Random(5)
    path = tmp_path / "set" / "train-000001.tar"
    whole = path.read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512  # of the last member
    cuts = {0, 1, 511, 512, 1024, end - 1, end, *(512 * chosen.randrange(1, end // 512) for _ in range(8))}
    for cut in sorted(cuts):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"train-000001\.tar") as caught:
            load_data(webdataset(), tmp_path)
        assert len(str(caught.value).splitlines()) == 1
    told = 0
    for _ in range(20):
        start = chosen.randrange(end - 40)
        path.write_bytes(whole[:start] + bytes(chosen.randrange(256) for _ in range(40)) + whole[start + 40 :])
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.suppress(UserError))
            told += 1
            found = load_data(webdataset(validation_size=6), tmp_path)
            told -= 1
            assert torch.equal(found.train.images_NCHW, splits.train.images_NCHW)
    assert told > 5
    packed = gzip.compress(whole)
    path.write_bytes(packed[: len(packed) // 2])
    path.rename(path.with_suffix(".tgz"))
    with pytest.raises(UserError, match=r"train-000001\.tgz"):
        load_data(webdataset(), tmp_path)


BROKEN_SAMPLES = {
    "no label": {"png": png(np.zeros((7, 7), np.uint8))},
    "0 pictures": {"cls": b"0"},
    "2 pictures": {"cls": b"0", "png": png(np.zeros((7, 7), np.uint8)), "jpg": b"x"},
    "cannot decode": {"cls": b"0", "png": b"no picture"},
    r"\.cls is empty": {"cls": b" ", "png": png(np.zeros((7, 7), np.uint8))},
    "cannot be read": {"json": b"[" * 9999, "png": png(np.zeros((7, 7), np.uint8))},
    "a whole number or a name": {"json": b'{"label": 1.5}', "png": png(np.zeros((7, 7), np.uint8))},
    "none of the": {"cls": b"7", "png": png(np.zeros((7, 7), np.uint8))},
    "differ in size": {"cls": b"0", "png": png(np.zeros((9, 9), np.uint8))},
    "8 bits": {"cls": b"0", "png": png(np.full((7, 7), 40_000, np.uint16))},
}


@pytest.mark.parametrize("said", BROKEN_SAMPLES)
def test_a_sample_that_is_none_is_named(tmp_path, said):
    library = pytest.importorskip("webdataset")
    write_shards(tmp_path / "set", content())
    with library.TarWriter(str(tmp_path / "set" / "test-000009.tar")) as writer:
        writer.write({"__key__": "odd", **BROKEN_SAMPLES[said]})
    with pytest.raises(UserError, match=said) as caught:
        load_data(webdataset(), tmp_path)
    assert "odd of" in str(caught.value) and "test-000009.tar" in str(caught.value)


@pytest.mark.parametrize("labels", [[-1, 0], [0, 10**6], ["a", 1]])
def test_labels_that_do_not_count_from_zero(tmp_path, labels):
    write_shards(tmp_path / "set", content(), lambda number: {"cls": str(labels[number % 2]).encode()})
    with pytest.raises(UserError, match="labels"):
        load_data(webdataset(), tmp_path)


def test_splits_that_are_missing(tmp_path):
    write_shards(tmp_path / "set", {"train": content()["train"]})
    with pytest.raises(UserError, match="has the splits train"):
        load_data(webdataset(), tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no shards"):
        load_data(webdataset("empty"), tmp_path)


# Both


@pytest.mark.parametrize(("name", "package"), [("hugging_face", "datasets"), ("webdataset", "webdataset")])
def test_a_missing_package_is_one_sentence(tmp_path, monkeypatch, name, package):
    real = builtins.__import__

    def refuse(wanted, *rest, **named):
        if wanted.partition(".")[0] == package:
            raise ImportError(f"No module named {wanted!r}")
        return real(wanted, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match=rf"needs the package {package}.*pip install {package}") as caught:
        load_data(DataConfig(name=name, folder="set"), tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_pictures_of_several_sizes_are_resized_as_image_files_are(tmp_path):
    rng = np.random.default_rng(3)
    pictures = [rng.integers(0, 256, (*rng.integers(5, 12, 2), 3), dtype=np.uint8) for _ in range(12)]
    labels = [0, 1, 2] * 4
    write_shards(tmp_path / "set", {"train": (pictures, labels), "test": (pictures, labels)})
    for part in ("train", "test"):
        for row, (pixels, label) in enumerate(zip(pictures, labels, strict=True)):
            path = tmp_path / "tree" / part / str(label) / f"{row:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(pixels))
    found = load_data(webdataset(image_size=6, validation_size=3), tmp_path).test
    tree = load_data(DataConfig(name="image_folder", folder="tree", image_size=6, validation_size=3), tmp_path).test
    by_label = sorted(range(12), key=lambda row: labels[row])
    assert torch.equal(found.images_NCHW[by_label], tree.images_NCHW)
