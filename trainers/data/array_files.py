"""Readers for data sets that come as arrays in a few files: digits, idx files, CIFAR's pickles, SVHN's .mat files.

Legend: N images, C channels, H, W. Nothing here is random and nothing is resized.
"""

from __future__ import annotations

import gzip
import pickle
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.errors import UserError
from models.file_content import check_ordinary, read_content
from trainers.data.location import existing_file, locate
from trainers.data.sets import DATASETS, DatasetInfo
from trainers.data.split import stratified_holdout

DIGITS_SPLIT_SEED = 0
"""Fixes the test set of scikit-learn's digits, which come without one. No config changes it."""
DIGITS_LEVELS = 16
IDX_UINT8 = 8
MOST_BYTES = 4_000_000_000
"""Of one file; the largest published one holds half a million images of 3 KB."""


@dataclass(frozen=True)
class RawImages:
    """A data set as published: uint8 images NCHW and int64 labels N of its training and its test list, on the CPU."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    class_names: tuple[str, ...]


def read_digits(root: Path) -> RawImages:
    """Read scikit-learn's digits; grey levels 0..16 become 0..255. They ship with the package: the root is not used."""
    from sklearn.datasets import load_digits  # Imported late: it takes longer than reading the digits.

    bunch = load_digits()
    levels_NHW = torch.from_numpy(bunch.images)
    images_NCHW = (levels_NHW * 255 / DIGITS_LEVELS).round().to(torch.uint8).unsqueeze(1)
    labels_N = torch.from_numpy(bunch.target).long()
    info = DATASETS["digits"]
    assert info.num_test is not None and info.class_names is not None
    train_N, test_N = stratified_holdout(labels_N, info.num_test, DIGITS_SPLIT_SEED)
    return RawImages(images_NCHW[train_N], labels_N[train_N], images_NCHW[test_N], labels_N[test_N], info.class_names)


def read_fashion_mnist(root: Path) -> RawImages:
    """Read the four idx files of Fashion-MNIST, plain or gzipped."""
    info = DATASETS["fashion_mnist"]
    folder = locate(info, root)

    def part(prefix: str) -> tuple[Tensor, Tensor]:
        images_path, labels_path = (
            existing_file(folder, f"{prefix}-{kind}-ubyte", info.compressed_suffix) for kind in ("images-idx3", "labels-idx1")
        )
        assert images_path is not None and labels_path is not None  # `locate` found them
        return _checked(read_idx(images_path, num_axes=3)[:, None], read_idx(labels_path, num_axes=1), info, images_path)

    assert info.class_names is not None
    return RawImages(*part("train"), *part("t10k"), info.class_names)


def read_idx(path: Path, num_axes: int) -> np.ndarray:
    """Read one idx file of bytes: two zero bytes, a type byte, the number of axes, their sizes, the values."""
    try:
        content = read_content(path, MOST_BYTES)
        data = gzip.decompress(content) if path.suffix == ".gz" else content
        zeros, kind, axes = struct.unpack_from(">HBB", data)
        if (zeros, kind, axes) != (0, IDX_UINT8, num_axes):
            raise ValueError(f"its header is not that of an idx file of bytes with {num_axes} axes")
        shape = struct.unpack_from(f">{axes}I", data, 4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise _unreadable(path, error) from error


def read_cifar10(root: Path) -> RawImages:
    """Read CIFAR-10's Python batches."""
    info = DATASETS["cifar10"]
    folder = locate(info, root)
    batches = [folder / f"data_batch_{number}" for number in range(1, 6)]
    train, test = _read_cifar(batches, "labels", info), _read_cifar([folder / "test_batch"], "labels", info)
    return RawImages(*train, *test, _cifar_names(folder / "batches.meta", "label_names", info))


def read_cifar100(root: Path) -> RawImages:
    """Read CIFAR-100's Python files with their fine labels."""
    info = DATASETS["cifar100"]
    folder = locate(info, root)
    train, test = (_read_cifar([folder / name], "fine_labels", info) for name in ("train", "test"))
    return RawImages(*train, *test, _cifar_names(folder / "meta", "fine_label_names", info))


def read_svhn(root: Path) -> RawImages:
    """Read SVHN's cropped digits; its label 10 is the digit 0."""
    import scipy.io  # Imported late: only this data set needs it.

    info = DATASETS["svhn"]
    folder = locate(info, root)

    def part(name: str) -> tuple[Tensor, Tensor]:
        path = folder / name
        try:
            check_ordinary(path)
            content = scipy.io.loadmat(path)
            images_NCHW = content["X"].transpose(3, 2, 0, 1)
            labels_N = _whole_numbers(content["y"]).reshape(-1)
            if not ((labels_N >= 1) & (labels_N <= 10)).all():
                raise ValueError(f"labels run from {labels_N.min()} to {labels_N.max()}; SVHN's are 1 to 10")
            labels_N = labels_N % 10
        except Exception as error:  # scipy raises many kinds on broken files.
            raise _unreadable(path, error) from error
        return _checked(images_NCHW, labels_N, info, path)

    train_name, test_name = info.files
    assert info.class_names is not None
    return RawImages(*part(train_name), *part(test_name), info.class_names)


ARRAY_READERS = {
    "digits": read_digits,
    "fashion_mnist": read_fashion_mnist,
    "cifar10": read_cifar10,
    "cifar100": read_cifar100,
    "svhn": read_svhn,
}
"""From the data root to the raw images, by data set."""


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles dictionaries of numpy arrays and nothing else: a data file must not be able to run code."""

    _ALLOWED = frozenset(
        [
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("_codecs", "encode"),
        ]
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no CIFAR file needs")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _unpickle(path: Path, *keys: str) -> list[Any]:
    check_ordinary(path)
    try:
        with path.open("rb") as file:
            content = _ArrayUnpickler(file, encoding="latin1").load()
        return [content[key] for key in keys]
    except Exception as error:  # A broken pickle can raise nearly anything.
        raise _unreadable(path, error) from error


def _read_cifar(paths: list[Path], label_key: str, info: DatasetInfo) -> tuple[Tensor, Tensor]:
    assert info.image_shape is not None
    images, labels = [], []
    for path in paths:
        data, batch_labels = _unpickle(path, "data", label_key)
        try:
            if not isinstance(data, np.ndarray) or data.dtype != np.uint8:
                kind = f"an array of {data.dtype}" if isinstance(data, np.ndarray) else f"a {type(data).__name__}"
                raise ValueError(f"its pixels are {kind} instead of one of uint8, values 0 to 255")
            images_NCHW = data.reshape(-1, *info.image_shape)
            labels_N = _whole_numbers(batch_labels)
        except (ValueError, TypeError) as error:
            raise _unreadable(path, error) from error
        checked_NCHW, checked_N = _checked(images_NCHW, labels_N, info, path)
        images.append(checked_NCHW)
        labels.append(checked_N)
    return torch.cat(images), torch.cat(labels)


def _cifar_names(path: Path, key: str, info: DatasetInfo) -> tuple[str, ...]:
    (names,) = _unpickle(path, key)
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{path}: {key} should be a list of names, it is {names!r:.100}")
    if len(names) != info.num_classes:
        raise UserError(f"{path} names {len(names)} classes; {info.name} has {info.num_classes}")
    return tuple(names)


def _whole_numbers(values: Any) -> np.ndarray:
    """Return labels as an array of whole numbers.

    Raises:
        ValueError: they are something else, e.g. fractions, truth values or nothing at all.
    """
    array = np.asarray(values)
    if array.dtype.kind == "f" and np.isfinite(array).all() and (array == np.trunc(array)).all():
        array = array.astype(np.int64)  # as MATLAB writes whole numbers
    if array.dtype.kind not in "iu":
        raise ValueError(f"its labels should be whole numbers, they are {array.dtype} ({values!r:.60})")
    return array.astype(np.int64)


def _checked(images_NCHW: np.ndarray, labels_N: np.ndarray, info: DatasetInfo, path: Path) -> tuple[Tensor, Tensor]:
    """Return images and labels as tensors of their own memory; they must fit each other and the data set."""
    if images_NCHW.shape[1:] != info.image_shape or images_NCHW.dtype != np.uint8:
        raise UserError(
            f"{path} holds {images_NCHW.dtype} images of shape {images_NCHW.shape[1:]}; {info.name} has uint8 {info.image_shape}"
        )
    if labels_N.shape != images_NCHW.shape[:1] or len(labels_N) == 0:
        raise UserError(f"{path} holds {len(images_NCHW)} images, but there are {labels_N.size} labels")
    if labels_N.min() < 0 or labels_N.max() >= info.num_classes:
        raise UserError(f"{path}: labels run from {labels_N.min()} to {labels_N.max()}; {info.name} has {info.num_classes} classes")
    return torch.from_numpy(images_NCHW.copy(order="C")), torch.from_numpy(labels_N.astype(np.int64))


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"cannot read {path}: {error or type(error).__name__}; the file is broken, put a fresh copy there")
