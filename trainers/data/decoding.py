"""Decoding image files in several threads, and a cache of the result beside the data."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.errors import UserError
from models.file_content import check_ordinary
from models.files import whole_file
from trainers.data.image_tree import ImageFiles

Progress = Callable[[int, int], None]
"""Called with (images done, images in all), from the calling thread."""

CACHE_FOLDER = ".rayndom_cache"
CACHE_FORMAT = 1
"""Part of the key: raised when the same files would decode to other pixels."""
FILES_PER_TASK = 128
MAX_MEMORY_SHARE = 0.8

_log = logging.getLogger(__name__)


def available_cpus() -> int:
    """Return the number of processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


WIDE_MODES = {"I": "32-bit whole numbers", "F": "floating-point numbers"}
"""Pillow's modes whose values are not 0 to 255, beside those of 16 bits: converted to RGB, all above 255 would be white."""


def open_rgb(path: Path | str) -> Image.Image:
    """Decode one image file to RGB.

    Raises:
        UserError: naming the file: it is missing, broken, no image, or its pixels have more than 8 bits in a single channel.
    """
    check_ordinary(Path(path))
    return decoded_rgb(path, str(path))


def decoded_rgb(source: Path | str | BinaryIO, name: str) -> Image.Image:
    """Decode one image to RGB, from its file or from its bytes.

    Args:
        name: in messages.

    Raises:
        UserError: as `open_rgb`.
    """
    try:
        with Image.open(source) as image:
            wide = "16-bit numbers" if image.mode.startswith("I;16") else WIDE_MODES.get(image.mode)
            if wide is not None:
                raise ValueError(f"its pixels are {wide}, whose range is not known; save it with 8 bits per channel")
            return image.convert("RGB")
    except Exception as error:  # On broken files decoders raise nearly anything.
        reason = str(error) or type(error).__name__
        raise UserError(f"cannot decode the image {name}: {reason}. Replace the file or remove it") from None


def decode_files(images: ImageFiles, image_size: int | None, progress: Progress | None = None) -> Tensor:
    """Decode image files to uint8 NCHW on the CPU, resized to squares of `image_size` if it is given.

    Raises UserError as `decode_images`.
    """
    paths = [images.folder / name for name in images.files]
    return decode_images([str(path) for path in paths], lambda row: open_rgb(paths[row]), image_size, progress)


def decode_images(
    names: Sequence[str], image_at: Callable[[int], Image.Image], image_size: int | None, progress: Progress | None = None
) -> Tensor:
    """Decode images to uint8 NCHW on the CPU, in several threads, resized to squares of `image_size` if it is given.

    Resizing is bilinear with antialiasing and does not keep the aspect ratio.

    Args:
        names: in messages; at least one. image_at: returns an image in RGB by its position; called from several threads.

    Raises UserError on the first broken image, on images of different sizes when no image_size is given, and if the
    result would not fit into memory.
    """
    width, height = (image_size, image_size) if image_size else image_at(0).size
    _check_memory(len(names), height, width)
    decoded_NCHW = np.empty((len(names), 3, height, width), dtype=np.uint8)

    def decode_part(start: int) -> int:
        stop = min(start + FILES_PER_TASK, len(names))
        for row in range(start, stop):
            image = image_at(row)
            if image.size != (width, height):
                if image_size is None:
                    raise UserError(
                        f"images differ in size: {names[0]} is {width}x{height}, {names[row]} is "
                        f"{image.size[0]}x{image.size[1]}; set data.image_size to resize them all"
                    )
                image = image.resize((width, height), Image.Resampling.BILINEAR)
            decoded_NCHW[row] = np.asarray(image).transpose(2, 0, 1)
        return stop - start

    done = 0
    with ThreadPoolExecutor(max_workers=min(16, available_cpus())) as pool:
        tasks = [pool.submit(decode_part, start) for start in range(0, len(names), FILES_PER_TASK)]
        try:
            for task in as_completed(tasks):
                done += task.result()
                if progress is not None:
                    progress(done, len(names))
        except BaseException:  # Ctrl-C too: the rest of a large set is not decoded first.
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return torch.from_numpy(decoded_NCHW)


def decode_cached(images: ImageFiles, image_size: int | None, cache_folder: Path, progress: Progress | None = None) -> Tensor:
    """Return what `decode_files` returns, from the cache if the same files were decoded before.

    Files are the same if their names, sizes and times of change are. A cache file holds the pixels only; labels come
    from the listing, which is part of the key. A cache that cannot be written or read is passed over with a logged
    warning.
    """
    list_name, key = _cache_key(images, image_size)
    path = cache_folder / f"{list_name}-{key}.npy"
    if path.is_file():
        try:
            cached_NCHW = np.load(path, allow_pickle=False)
            if cached_NCHW.dtype != np.uint8 or cached_NCHW.ndim != 4 or cached_NCHW.shape[:2] != (len(images), 3):
                raise ValueError(f"it holds {cached_NCHW.dtype} of shape {cached_NCHW.shape}")
        except (OSError, ValueError, EOFError) as error:
            _log.warning("the image cache %s cannot be read (%s); decoding the images again", path, error)
        else:
            if progress is not None:
                progress(len(images), len(images))
            return torch.from_numpy(cached_NCHW)
    decoded_NCHW = decode_files(images, image_size, progress)
    try:
        _write_cache(path, decoded_NCHW.numpy(), list_name)
    except OSError as error:
        _log.warning("the decoded images cannot be cached in %s (%s); each run will decode them again", cache_folder, error)
    return decoded_NCHW


def _cache_key(images: ImageFiles, image_size: int | None) -> tuple[str, str]:
    """Return a name that stays when files change, and a key that does not."""
    list_name = hashlib.sha256(f"{images.folder}|{images.files[0].split('/')[0]}|{image_size}".encode()).hexdigest()
    key = hashlib.sha256(f"{CACHE_FORMAT}".encode())
    for name, label in zip(images.files, images.labels.tolist(), strict=True):
        try:
            status = os.stat(images.folder / name)
        except OSError as error:
            raise UserError(f"cannot read the image {images.folder / name}: {error.strerror}") from error
        key.update(f"{name}|{label}|{status.st_size}|{status.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return list_name[:16], key.hexdigest()[:32]


def _write_cache(path: Path, decoded_NCHW: np.ndarray, list_name: str) -> None:
    with whole_file(path) as file:
        np.save(file, decoded_NCHW, allow_pickle=False)
    for outdated in path.parent.glob(f"{list_name}-*.npy"):
        if outdated != path:
            outdated.unlink(missing_ok=True)


def _check_memory(num_images: int, height: int, width: int) -> None:
    needed = num_images * 3 * height * width
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return  # Not every system tells; then running out of memory is the only sign.
    if needed > MAX_MEMORY_SHARE * memory:
        raise UserError(
            f"{num_images:,} images of {height}x{width} need {needed / 2**30:.1f} GiB decoded, more than this "
            f"machine's memory of {memory / 2**30:.1f} GiB allows; lower data.image_size, or "
            "set data.streamed for an image_folder"
        )
