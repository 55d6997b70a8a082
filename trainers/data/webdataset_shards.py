"""WebDataset shards: tar files with a picture and a label for each key, read by the library `webdataset`."""

from __future__ import annotations

import contextlib
import json
import re
import tarfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

from models.errors import UserError
from models.file_content import check_ordinary
from trainers.data.array_files import RawImages
from trainers.data.config import DataConfig
from trainers.data.decoding import Progress
from trainers.data.encoded_images import EncodedImages, Label, kinds_in, missing, named_folder, raw_images, train_and_test
from trainers.data.image_tree import IMAGE_SUFFIXES

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
TAR_BLOCK = 512
USUAL_KEY = "label"


def read_webdataset(root: Path, config: DataConfig, progress: Progress | None = None) -> RawImages:
    """Read all shards below a folder in the order of their names. A shard's name, or else its folder's, says its split.

    A label is the text of `.cls`, else `data.label_column` (or `label`) of `.json`: a number from 0, or a name.

    Raises:
        UserError: the library is missing, there are no such shards, or one is broken or does not hold labelled images.
    """
    library = _library()
    folder = named_folder(root, config)
    train, test = (_encoded(library, shards, config.label_column) for shards in train_and_test(_shards(folder), folder))
    return raw_images(train, test, None, folder, config.image_size, progress)


def _library() -> Any:
    try:
        from webdataset import tariterators  # Imported here: it is optional.
    except ImportError as error:
        raise missing("webdataset", "webdataset", error) from None
    return tariterators


def _shards(folder: Path) -> dict[str, list[Path]]:
    splits: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if not path.name.lower().endswith(SHARD_SUFFIXES):
            continue
        parts = reversed(path.relative_to(folder).parts)  # its own name first
        said = (kinds_in(re.split(r"[^a-z]+", part.lower())) for part in parts)
        kinds = next(filter(None, said), set())
        if len(kinds) != 1:
            raise UserError(
                f"cannot tell which split the shard {path} belongs to; shards are called like train-000000.tar or test-000000.tar"
            )
        splits.setdefault(kinds.pop(), []).append(path)
    if not splits:
        raise UserError(f"{folder} holds no shards ({', '.join(SHARD_SUFFIXES)})")
    return splits


def _encoded(library: Any, shards: list[Path], key: str | None) -> EncodedImages:
    images = EncodedImages()
    for path in shards:
        check_ordinary(path)
        try:
            _check_end(path)
            with path.open("rb") as stream, contextlib.closing(_samples(library, stream, path)) as samples:
                for sample in samples:
                    name = f"{sample['__key__']} of {path}"
                    images.add(name, _picture(sample, name), _label(sample, name, key))
        except UserError:
            raise
        except Exception as error:  # tarfile and what unpacks it raise many kinds on broken files.
            reason = " ".join(str(error.args[0] if error.args else error).split())[:200] or type(error).__name__
            raise UserError(f"cannot read the shard {path}: {reason}; the file is broken, put a fresh copy there") from None
    return images


def _samples(library: Any, stream: Any, path: Path) -> Generator[dict[str, Any], None, None]:
    # An open file, not an address: the library would run what follows `pipe:` and expand braces.
    files = library.tar_file_expander([{"url": str(path), "stream": stream}])
    return library.group_by_keys(files)  # type: ignore[no-any-return]


def _check_end(path: Path) -> None:
    """Raise a `UserError` for a shard that was cut off between two members or has a broken header: it would read like a shorter one."""
    with tarfile.open(path) as archive:
        archive.getmembers()
        assert archive.fileobj is not None
        archive.fileobj.seek(archive.offset)
        end = archive.fileobj.read(TAR_BLOCK)
    if len(end) < TAR_BLOCK or any(end):
        raise UserError(f"the shard {path} ends in its middle: it is broken, or a copy of it was cut off; put a fresh copy there")


def _picture(sample: dict[str, Any], name: str) -> bytes:
    found = [each for each in sample if not each.startswith("__") and f".{each.rpartition('.')[2]}" in IMAGE_SUFFIXES]
    if len(found) != 1:
        held = ", ".join(each for each in sample if not each.startswith("__"))
        raise UserError(f"sample {name} has {len(found)} pictures ({held}); exactly one is needed")
    return sample[found[0]]  # type: ignore[no-any-return]


def _label(sample: dict[str, Any], name: str, key: str | None) -> Label:
    if key is None and "cls" in sample:
        text = sample["cls"].decode("utf-8", errors="replace").strip()
        if not text:
            raise UserError(f"sample {name}: its .cls is empty")
        return int(text) if re.fullmatch(r"[+-]?[0-9]{1,18}", text) else text
    if "json" not in sample:
        raise UserError(f"sample {name} has no label: neither .cls nor .json")
    try:
        content = json.loads(sample["json"])
    except (ValueError, RecursionError) as error:
        raise UserError(f"sample {name}: its .json cannot be read: {error}") from None
    value = content.get(key or USUAL_KEY) if isinstance(content, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise UserError(f"sample {name}: {key or USUAL_KEY!r} of its .json is {value!r:.60}; a whole number or a name is needed")
    return value
