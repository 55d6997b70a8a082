"""Folders that the library `datasets` of Hugging Face reads: what `save_to_disk` wrote, or the files of a dataset's repository.

Nothing is fetched and nothing of the folder is executed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.errors import UserError
from models.file_content import read_content
from trainers.data.array_files import RawImages
from trainers.data.config import DataConfig
from trainers.data.decoding import Progress
from trainers.data.encoded_images import EncodedImages, Label, kinds_in, missing, named_folder, raw_images, train_and_test

OLDEST = 4
"""Major version; older ones may execute a script of the folder."""
USUAL_LABELS = ("label", "labels")
MOST_IMAGE_BYTES = 200_000_000


def read_hugging_face(root: Path, config: DataConfig, progress: Progress | None = None) -> RawImages:
    """Read the splits train and test; a split validation is the test set where there is no other.

    The column of images is the only one of that kind; that of labels is `data.label_column`, else `label` or `labels`, else the only one of
    kind ClassLabel.

    Raises:
        UserError: the library is missing, the folder is none that it reads, or it does not hold labelled images.
    """
    library = _library()
    folder = named_folder(root, config)
    splits = _splits(library, folder)
    image, label = _columns(library, splits[0].features, config.label_column, folder)
    feature = splits[0].features[label]
    class_names = tuple(feature.names) if isinstance(feature, library.ClassLabel) else None
    bare = [split.select_columns([image, label]).cast_column(image, library.Image(decode=False)) for split in splits]
    train, test = (_encoded(split, part, image, label, folder) for part, split in zip(("train", "test"), bare, strict=True))
    return raw_images(train, test, class_names, folder, config.image_size, progress)


def _library() -> Any:
    try:
        import datasets  # Imported here: it is optional.
    except ImportError as error:
        raise missing("hugging_face", "datasets", error) from None
    if int(datasets.__version__.split(".")[0]) < OLDEST:
        raise UserError(f"data set 'hugging_face' needs datasets {OLDEST} or newer, {datasets.__version__} is installed")
    return datasets


def _splits(library: Any, folder: Path) -> tuple[Any, Any]:
    hidden = library.are_progress_bars_disabled()
    library.disable_progress_bars()
    try:
        if (folder / "dataset_dict.json").is_file():
            found = library.load_from_disk(str(folder))
        elif (folder / "state.json").is_file():
            raise UserError(f"{folder} holds one split; save a DatasetDict with the splits train and test")
        else:
            found = library.load_dataset(str(folder))
    except UserError:
        raise
    except Exception as error:  # The library raises many kinds on folders and files that it cannot read.
        raise _unreadable(folder, error) from None
    finally:
        if not hidden:
            library.enable_progress_bars()
    train, test = train_and_test({kind: found[name] for name in found for kind in kinds_in([str(name)])}, folder)
    if train.features != test.features:
        raise UserError(f"{folder}: the columns of train and test differ: {train.features} and {test.features}")
    return train, test


def _columns(library: Any, features: Any, wanted: str | None, folder: Path) -> tuple[str, str]:
    images = [name for name, feature in features.items() if isinstance(feature, library.Image)]
    if len(images) != 1:
        raise UserError(f"{folder} has {len(images)} columns of images ({', '.join(features)}); exactly one is needed")
    if wanted is not None:
        if wanted not in features:
            raise UserError(f"data.label_column: {folder} has no column {wanted!r}; it has {', '.join(features)}")
        return images[0], wanted
    classes = [name for name, feature in features.items() if isinstance(feature, library.ClassLabel)]
    usual = [name for name in USUAL_LABELS if name in features]
    if usual or len(classes) == 1:
        return images[0], (usual or classes)[0]
    others = ", ".join(classes or [name for name in features if name != images[0]]) or "no other column"
    raise UserError(f"{folder}: which column holds the labels? Name one by data.label_column: {others}")


def _encoded(split: Any, part: str, image: str, label: str, folder: Path) -> EncodedImages:
    images = EncodedImages()
    try:
        for row, each in enumerate(split):
            name = f"{row} of split {part} in {folder}"
            images.add(name, _content(each[image], name), _label(each[label], name, label))
    except UserError:
        raise
    except Exception as error:  # A broken file shows itself when its rows are read.
        raise _unreadable(folder, error) from None
    return images


def _content(value: Any, name: str) -> bytes:
    if value is not None and value.get("bytes") is not None:
        return bytes(value["bytes"])
    if value is None or not value.get("path"):
        raise UserError(f"image {name} is empty")
    return read_content(Path(value["path"]), MOST_IMAGE_BYTES)


def _label(value: Any, name: str, column: str) -> Label:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise UserError(f"image {name}: column {column!r} holds {value!r:.60}; whole numbers or names are needed")
    return value


def _unreadable(folder: Path, error: Exception) -> UserError:
    told = [each for each in (error, error.__cause__) if each is not None]
    reason = "; ".join(dict.fromkeys(" ".join(str(each).split())[:200] or type(each).__name__ for each in told))
    return UserError(f"cannot read the data set in {folder}: {reason}")
