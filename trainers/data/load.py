"""From a data config to the three splits."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from models.errors import UserError
from trainers.data.array_files import ARRAY_READERS, RawImages
from trainers.data.config import DataConfig
from trainers.data.decoding import CACHE_FOLDER, Progress, decode_cached, decode_files
from trainers.data.extra_images import with_extra_images
from trainers.data.hugging_face import read_hugging_face
from trainers.data.image_tree import TREE_LISTERS, ImageFiles, ImageTree
from trainers.data.location import data_root
from trainers.data.sets import DATASETS
from trainers.data.split import ArraySplit, Splits, StreamedSplit, pixel_statistics, resize_square, split_indices
from trainers.data.streaming import STREAMED_SIDE
from trainers.data.webdataset_shards import read_webdataset

STREAMED_STATISTICS_IMAGES = 1_000
ENCODED_READERS = {"hugging_face": read_hugging_face, "webdataset": read_webdataset}
"""From the data root, the config and who is told of the progress to the raw images, by data set that another library reads."""

_log = logging.getLogger(__name__)


def load_data(
    config: DataConfig,
    root: Path | str | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    num_workers: int | None = None,
) -> Splits:
    """Read a data set and return its train, validation and test splits, which never overlap.

    `root` holds the data sets (default: the environment variable RAYNDOM_DATA, else ./data). `progress` is told
    (done, total) while image files are decoded. `num_workers` is the number of decoding processes of a streamed set
    (default: the processors, at most 8).

    Raises UserError if files are missing (with the folders searched and how to obtain them), broken, or too few.
    """
    root = data_root(root)
    read = ARRAY_READERS.get(config.name) or DATASETS[config.name].read
    if config.name in ENCODED_READERS:
        raw = ENCODED_READERS[config.name](root, config, progress)
    elif read is not None:
        raw = read(root)
        _warn_of_other_counts(config.name, len(raw.train_labels), len(raw.test_labels))
    else:
        tree = TREE_LISTERS[config.name](root, config.folder)
        _warn_of_other_counts(config.name, len(tree.train), len(tree.test))
        if config.streams:
            return _streamed_splits(tree, config, torch.device(device), num_workers)
        raw = _decode_tree(tree, config, root, progress)
    splits = _array_splits(raw, config, torch.device(device))
    if config.extra_images is None:
        return splits
    assert isinstance(splits.train, ArraySplit)
    train = with_extra_images(splits.train, root / config.extra_images, config.extra_share, config.image_size)
    return replace(splits, train=train)


def _array_splits(raw: RawImages, config: DataConfig, device: torch.device) -> Splits:
    chosen = split_indices(raw.train_labels, raw.test_labels, config)
    info = DATASETS[config.name]
    mean, std = info.mean, info.std

    def make(images_NCHW: Tensor, labels_N: Tensor, indices_N: Tensor) -> ArraySplit:
        images_NCHW = images_NCHW[indices_N]
        if config.image_size is not None:
            images_NCHW = resize_square(images_NCHW, config.image_size)
        return ArraySplit(
            images_NCHW=images_NCHW.contiguous().to(device),
            labels=labels_N[indices_N].to(device),
            indices=indices_N,
            class_names=raw.class_names,
            mean=mean,
            std=std,
        )

    if info.num_classes is None:
        # Measured on the training split alone, and before the images leave the CPU.
        mean, std = pixel_statistics(raw.train_images[chosen.train])
    return Splits(
        train=make(raw.train_images, raw.train_labels, chosen.train),
        validation=make(raw.train_images, raw.train_labels, chosen.validation),
        test=make(raw.test_images, raw.test_labels, chosen.test),
    )


def _decode_tree(tree: ImageTree, config: DataConfig, root: Path, progress: Progress | None) -> RawImages:
    folder = tree.train.folder
    # Beside the data: in the root, or next to a folder that lies elsewhere.
    cache_folder = (root if folder.is_relative_to(root) else folder.parent) / CACHE_FOLDER
    info = DATASETS[config.name]
    native = None if info.image_shape is None else info.image_shape[-1]
    total = len(tree.train) + len(tree.test)
    decoded = []
    for files, before in ((tree.train, 0), (tree.test, len(tree.train))):
        report = None if progress is None else (lambda done, _, before=before: progress(before + done, total))
        decoded.append(decode_cached(files, config.image_size or native, cache_folder, report))
    train_NCHW, test_NCHW = decoded
    if train_NCHW.shape[1:] != test_NCHW.shape[1:]:
        raise UserError(
            f"{folder}: training images are {tuple(train_NCHW.shape[-2:])}, test images {tuple(test_NCHW.shape[-2:])} "
            "(height, width); set data.image_size to resize them all"
        )
    return RawImages(train_NCHW, tree.train.labels, test_NCHW, tree.test.labels, tree.class_names)


def _streamed_splits(tree: ImageTree, config: DataConfig, device: torch.device, num_workers: int | None) -> Splits:
    chosen = split_indices(tree.train.labels, tree.test.labels, config)
    info = DATASETS[config.name]
    side = config.image_size or STREAMED_SIDE
    mean, std = info.mean, info.std
    if info.num_classes is None:
        step = -(-len(chosen.train) // STREAMED_STATISTICS_IMAGES)
        mean, std = pixel_statistics(decode_files(tree.train.subset(chosen.train[::step]), side))

    def make(files: ImageFiles, indices_N: Tensor) -> StreamedSplit:
        return StreamedSplit(
            files=files.subset(indices_N),
            indices=indices_N,
            image_size=side,
            class_names=tree.class_names,
            mean=mean,
            std=std,
            device=device,
            num_workers=num_workers,
        )

    return Splits(
        train=make(tree.train, chosen.train),
        validation=make(tree.train, chosen.validation),
        test=make(tree.test, chosen.test),
    )


def _warn_of_other_counts(name: str, num_train: int, num_test: int) -> None:
    info = DATASETS[name]
    if info.num_train is not None and (num_train, num_test) != (info.num_train, info.num_test):
        _log.warning(
            "%s has %s training and %s test images here, the published set %s and %s: results are not comparable",
            *(name, f"{num_train:,}", f"{num_test:,}", f"{info.num_train:,}", f"{info.num_test:,}"),
        )
