"""Data sets that come as array files, read from tiny files in their original formats."""

import gzip
import pickle
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch

from models.errors import UserError
from trainers.data import DATASETS, DataConfig, data_root, load_data
from trainers.data.sets import SHIPPED as REGISTRY


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def no_system_folders(monkeypatch):
    for name, info in REGISTRY.items():
        monkeypatch.setitem(REGISTRY, name, replace(info, system_folders=()))


def write_idx(path, array, compress):
    data = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(data)) if compress else path.write_bytes(data)


def write_fashion_mnist(folder, rng, compress=False):
    content = {}
    for prefix, count in (("train", 40), ("t10k", 20)):
        images, labels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8), np.arange(count, dtype=np.uint8) % 10
        write_idx(folder / f"{prefix}-images-idx3-ubyte", images, compress)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte", labels, compress)
        content[prefix] = images, labels
    return content


def dump(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    # Protocol 2 and numpy's old module name: what the published files contain.
    data = pickle.dumps(content, protocol=2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    path.write_bytes(data)


def write_cifar10(folder, rng):
    batches = {}
    for name in [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]:
        data, labels = rng.integers(0, 256, (10, 3072), dtype=np.uint8), rng.permutation(10).tolist()
        dump(folder / name, {"data": data, "labels": labels, "batch_label": name, "filenames": ["x"] * 10})
        batches[name] = data, labels
    dump(folder / "batches.meta", {"label_names": [f"class{label}" for label in range(10)], "num_vis": 3072})
    return batches


@pytest.mark.parametrize(("place", "compress"), [("FashionMNIST/raw", False), ("fashion_mnist", True), ("fashion-mnist", True)])
def test_fashion_mnist_is_read_from_idx_files(tmp_path, rng, place, compress, no_system_folders):
    content = write_fashion_mnist(tmp_path / place, rng, compress)
    splits = load_data(DataConfig(name="fashion_mnist", validation_size=10), tmp_path)
    assert splits.image_shape == (1, 28, 28)
    assert [len(split) for split in (splits.train, splits.validation, splits.test)] == [30, 10, 20]
    assert splits.validation.labels.bincount().tolist() == [1] * 10
    assert splits.class_names[9] == "ankle boot"
    images, labels = content["t10k"]
    assert np.array_equal(splits.test.images_NCHW.numpy()[:, 0], images)
    assert splits.test.labels.tolist() == labels.tolist()
    images, labels = content["train"]
    assert np.array_equal(splits.train.images_NCHW.numpy()[:, 0], images[splits.train.indices.numpy()])


def test_fashion_mnist_of_the_system_package_is_found_without_a_root(tmp_path):
    if not Path(DATASETS["fashion_mnist"].system_folders[0]).exists():
        pytest.skip("the Debian package dataset-fashion-mnist is not installed")
    splits = load_data(DataConfig(name="fashion_mnist", limit_train=100, limit_test=50), tmp_path)
    assert [len(split) for split in (splits.train, splits.validation, splits.test)] == [100, 5000, 50]
    assert splits.validation.labels.bincount().tolist() == [500] * 10
    pixels = splits.validation.images_NCHW / 255
    assert float(pixels.mean()) == pytest.approx(splits.mean[0], abs=0.005)
    assert float(pixels.std()) == pytest.approx(splits.std[0], abs=0.005)


def test_broken_idx_files_are_named(tmp_path, rng, no_system_folders):
    config = DataConfig(name="fashion_mnist", validation_size=10)
    write_fashion_mnist(tmp_path / "fashion_mnist", rng)
    path = tmp_path / "fashion_mnist" / "t10k-images-idx3-ubyte"
    whole = path.read_bytes()
    for broken in (b"", b"<html>not found</html>", whole[:-7]):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=r"cannot read .*t10k-images-idx3-ubyte: .*the file is broken"):
            load_data(config, tmp_path)
    path.unlink()
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(whole)[:-100])
    with pytest.raises(UserError, match=r"cannot read .*t10k-images-idx3-ubyte\.gz"):
        load_data(config, tmp_path)
    write_idx(path, np.zeros((19, 28, 28), np.uint8), compress=False)
    with pytest.raises(UserError, match="holds 19 images, but there are 20 labels"):
        load_data(config, tmp_path)


@pytest.mark.parametrize("place", ["cifar-10-batches-py", "cifar10/cifar-10-batches-py"])
def test_cifar10_is_read_from_its_python_batches(tmp_path, rng, place, caplog):
    batches = write_cifar10(tmp_path / place, rng)
    splits = load_data(DataConfig(name="cifar10", validation_size=10), tmp_path)
    assert splits.image_shape == (3, 32, 32)
    assert splits.class_names[3] == "class3"
    assert [len(split) for split in (splits.train, splits.validation, splits.test)] == [40, 10, 10]
    data, labels = batches["test_batch"]
    assert np.array_equal(splits.test.images_NCHW.numpy(), data.reshape(10, 3, 32, 32))
    assert splits.test.labels.tolist() == labels
    for split in (splits.train, splits.validation):
        for image, label, index in zip(split.images_NCHW, split.labels, split.indices.tolist(), strict=True):
            data, labels = batches[f"data_batch_{index // 10 + 1}"]
            assert np.array_equal(image.numpy().reshape(-1), data[index % 10])
            assert int(label) == labels[index % 10]
    assert "the published set 50,000 and 10,000: results are not comparable" in caplog.text


def test_cifar100_is_read_with_its_fine_labels(tmp_path, rng):
    folder = tmp_path / "cifar-100-python"
    for name, count in (("train", 200), ("test", 100)):
        fine = (np.arange(count) % 100).tolist()
        data = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        dump(folder / name, {"data": data, "fine_labels": fine, "coarse_labels": [0] * count})
    names = [f"fine{label}" for label in range(100)]
    dump(folder / "meta", {"fine_label_names": names, "coarse_label_names": ["coarse"] * 20})
    splits = load_data(DataConfig(name="cifar100"), tmp_path)
    assert splits.num_classes == 100
    assert splits.class_names[42] == "fine42"
    assert splits.test.labels.tolist() == list(range(100))


def test_a_data_file_cannot_run_code(tmp_path, rng):
    class Malicious:
        def __reduce__(self):
            return eval, ("__import__('os').environ.__setitem__('RAYNDOM_TEST_INTRUDER', '1')",)

    write_cifar10(tmp_path / "cifar10", rng)
    dump(tmp_path / "cifar10" / "data_batch_2", {"data": Malicious(), "labels": [0]})
    with pytest.raises(UserError, match=r"cannot read .*data_batch_2: it refers to .*eval"):
        load_data(DataConfig(name="cifar10"), tmp_path)


def test_broken_cifar_files_are_named(tmp_path, rng):
    folder = tmp_path / "cifar10"
    write_cifar10(folder, rng)
    path = folder / "data_batch_4"
    whole = path.read_bytes()
    for content in (b"", b"not a pickle", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"cannot read .*data_batch_4"):
            load_data(DataConfig(name="cifar10"), tmp_path)
    dump(path, {"data": np.zeros((3, 100), np.uint8), "labels": [0, 1, 2]})
    with pytest.raises(UserError, match=r"cannot read .*data_batch_4"):
        load_data(DataConfig(name="cifar10"), tmp_path)
    dump(path, {"data": np.zeros((3, 3072), np.uint8), "labels": [0, 1, 12]})
    with pytest.raises(UserError, match=r"data_batch_4: labels run from 0 to 12; cifar10 has 10 classes"):
        load_data(DataConfig(name="cifar10"), tmp_path)


@pytest.mark.parametrize("place", [".", "svhn"])
def test_svhn_is_read_from_mat_files_and_its_label_ten_is_zero(tmp_path, rng, place):
    (tmp_path / place).mkdir(exist_ok=True)
    content = {}
    for name, count in (("train", 40), ("test", 20)):
        images = rng.integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
        labels = (np.arange(count, dtype=np.uint8) % 10 + 1)[:, None]
        scipy.io.savemat(tmp_path / place / f"{name}_32x32.mat", {"X": images, "y": labels})
        content[name] = images, labels
    splits = load_data(DataConfig(name="svhn", validation_size=10), tmp_path)
    images, labels = content["test"]
    assert splits.test.labels.tolist() == [int(label) % 10 for label in labels[:, 0]]
    assert torch.equal(splits.test.images_NCHW[7], torch.from_numpy(images[..., 7].transpose(2, 0, 1).copy()))
    (tmp_path / place / "test_32x32.mat").write_bytes(b"MATLAB 7.3? no")
    with pytest.raises(UserError, match=r"cannot read .*test_32x32\.mat"):
        load_data(DataConfig(name="svhn", validation_size=10), tmp_path)


def test_the_image_size_is_applied_to_every_split(tmp_path, rng):
    write_cifar10(tmp_path / "cifar10", rng)
    splits = load_data(DataConfig(name="cifar10", image_size=8, validation_size=10), tmp_path)
    for split in (splits.train, splits.validation, splits.test):
        assert split.image_shape == (3, 8, 8)
        assert split.images_NCHW.dtype == torch.uint8


@pytest.mark.parametrize("name", [name for name, info in DATASETS.items() if name != "digits" and not info.needs_folder])
def test_missing_data_is_answered_with_files_folders_and_source(tmp_path, name, no_system_folders):
    with pytest.raises(UserError) as caught:
        load_data(DataConfig(name=name), tmp_path)
    message, info = str(caught.value), DATASETS[name]
    assert f"the files of data set '{name}' are not there, and nothing is downloaded unasked" in message
    for file in info.files:
        assert file in message
    for folder in info.folders:
        assert str(tmp_path / folder if folder != "." else tmp_path) in message
    assert "RAYNDOM_DATA" in message
    assert "{root}" not in message


def test_missing_data_names_the_package_or_archive(tmp_path, no_system_folders):
    with pytest.raises(UserError, match="apt-get install dataset-fashion-mnist"):
        load_data(DataConfig(name="fashion_mnist"), tmp_path)
    with pytest.raises(UserError, match=r"cifar-10-python\.tar\.gz(.|\n)*cifar-10-batches-py"):
        load_data(DataConfig(name="cifar10"), tmp_path)


def test_an_incomplete_folder_is_told_what_it_lacks(tmp_path, rng):
    write_cifar10(tmp_path / "cifar10", rng)
    (tmp_path / "cifar10" / "test_batch").unlink()
    with pytest.raises(UserError, match=r"Incomplete: .*cifar10 lacks test_batch\."):
        load_data(DataConfig(name="cifar10"), tmp_path)


def test_the_root_is_the_argument_else_the_environment_else_data(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYNDOM_DATA", str(tmp_path / "from_environment"))
    assert data_root(tmp_path / "given") == tmp_path / "given"
    assert data_root() == tmp_path / "from_environment"
    monkeypatch.delenv("RAYNDOM_DATA")
    monkeypatch.chdir(tmp_path)
    assert data_root() == tmp_path / "data"
