"""Data sets that come as folders of image files: which files there are, and their labels. Nothing is decoded here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.errors import UserError
from models.file_content import read_content
from trainers.data.location import locate
from trainers.data.sets import DATASETS

MOST_LIST_BYTES = 200_000_000
"""Of a text file that lists images or names."""
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class ImageFiles:
    """Image files of one list: paths relative to `folder` (with `/`) and their labels N (int64)."""

    folder: Path
    files: tuple[str, ...]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.files)

    def subset(self, indices: Tensor) -> ImageFiles:
        """Return the files at the given positions, in the given order."""
        return ImageFiles(self.folder, tuple(self.files[index] for index in indices.tolist()), self.labels[indices])


@dataclass(frozen=True)
class ImageTree:
    """The training and test files of a data set. Labels number the class folders in the order of their sorted names."""

    train: ImageFiles
    test: ImageFiles
    class_names: tuple[str, ...]


def list_image_folder(root: Path, folder: str | None) -> ImageTree:
    """List train/<class>/ and test/<class>/ of a user's own folder."""
    location = locate(DATASETS["image_folder"], root, folder)
    return _list_class_folders(location, "train", "test")


def list_imagenet(root: Path, folder: str | None = None) -> ImageTree:
    """List train/<wnid>/ and val/<wnid>/ of ImageNet; class names are the WordNet identifiers."""
    location = locate(DATASETS["imagenet"], root)
    tree = _list_class_folders(location, "train", "val")
    _check_num_classes("imagenet", tree.class_names, location)
    return tree


def list_tiny_imagenet(root: Path, folder: str | None = None) -> ImageTree:
    """List train/<wnid>/images/ and, by val_annotations.txt, val/images/ of Tiny ImageNet.

    Class names come from words.txt where it is there, else they are the WordNet identifiers.
    """
    location = locate(DATASETS["tiny_imagenet"], root)
    wnids = _class_folders(location / "train")
    _check_num_classes("tiny_imagenet", wnids, location)
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    train = _files_by_class(location, [f"train/{wnid}" for wnid in wnids])
    files, labels = [], []
    annotations = location / "val" / "val_annotations.txt"
    for number, line in enumerate(_lines(annotations), start=1):
        fields = line.split("\t")
        if len(fields) < 2 or fields[1] not in label_of:
            raise UserError(f"{annotations}, line {number}: expected '<file><tab><wnid of train/>...', found {line!r}")
        files.append(f"val/images/{fields[0]}")
        labels.append(label_of[fields[1]])
    if not files:
        raise UserError(f"{annotations} is empty")
    names = _words(location / "words.txt", wnids)
    return ImageTree(train, ImageFiles(location, tuple(files), torch.tensor(labels)), names)


TREE_LISTERS = {
    "tiny_imagenet": list_tiny_imagenet,
    "imagenet": list_imagenet,
    "image_folder": list_image_folder,
}
"""From the data root and data.folder to the files, by data set."""


def _list_class_folders(location: Path, train_name: str, test_name: str) -> ImageTree:
    names, test_names = _class_folders(location / train_name), _class_folders(location / test_name)
    if names != test_names:
        only_train = ", ".join(sorted(set(names) - set(test_names))[:5]) or "none"
        only_test = ", ".join(sorted(set(test_names) - set(names))[:5]) or "none"
        raise UserError(
            f"{location}: {train_name}/ and {test_name}/ must hold the same class folders; "
            f"only in {train_name}/: {only_train}; only in {test_name}/: {only_test}"
        )
    train, test = (_files_by_class(location, [f"{part}/{name}" for name in names]) for part in (train_name, test_name))
    return ImageTree(train, test, names)


def _class_folders(folder: Path) -> tuple[str, ...]:
    names = tuple(sorted(entry.name for entry in _entries(folder) if _is_folder(entry)))
    if not names:
        raise UserError(f"{folder} holds no class folders; image files belong into {folder}/<class>/")
    return names


def _files_by_class(location: Path, class_folders: list[str]) -> ImageFiles:
    files, labels = [], []
    for label, class_folder in enumerate(class_folders):
        found = sorted(_image_files(location, class_folder))
        if not found:
            raise UserError(f"{location / class_folder} holds no image files; known suffixes: {', '.join(IMAGE_SUFFIXES)}")
        files += found
        labels += [label] * len(found)
    return ImageFiles(location, tuple(files), torch.tensor(labels))


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """Return what is in a folder, without what is hidden."""
    try:
        return [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror}") from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        raise UserError(f"cannot read {entry.path}: {error.strerror}") from None


def _image_files(location: Path, relative: str, above: tuple[str, ...] = ()) -> list[str]:
    """Return the image files below a folder; folders that are links are followed.

    Raises:
        UserError: a folder cannot be read, or a link leads back to a folder that it stands in.
    """
    files = []
    inside = (*above, os.path.realpath(location / relative))
    for entry in _entries(location / relative):
        name = f"{relative}/{entry.name}"
        if _is_folder(entry):
            if os.path.realpath(entry.path) in inside:
                raise UserError(f"{entry.path} is a link that leads back to a folder that it stands in; remove it")
            files += _image_files(location, name, inside)
        elif entry.name.lower().endswith(IMAGE_SUFFIXES):
            files.append(name)
    return files


def _check_num_classes(name: str, class_names: tuple[str, ...], location: Path) -> None:
    expected = DATASETS[name].num_classes
    if len(class_names) != expected:
        raise UserError(
            f"{location}/train holds {len(class_names)} class folders; {name} has {expected}. "
            "Unpack it again, or use a part of it as data set 'image_folder'"
        )


def _lines(path: Path) -> list[str]:
    try:
        return read_content(path, MOST_LIST_BYTES).decode().splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path}: not UTF-8 text (byte {error.start}); put a fresh copy there") from None


def _words(path: Path, wnids: tuple[str, ...]) -> tuple[str, ...]:
    if not path.exists():
        return wnids
    words = dict(line.split("\t", 1) for line in _lines(path) if "\t" in line)
    return tuple(words.get(wnid, wnid).split(",")[0].strip() for wnid in wnids)
