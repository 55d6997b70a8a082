"""Fetching the data sets that their authors publish, when a user asks for it: with their checksums, resumable, put in place as a whole."""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import tarfile
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from models.errors import EnvironmentProblem, UserError, unknown_name
from models.files import put_in_place

MIRROR_VARIABLE = "RAYNDOM_DATA_MIRROR"
"""Environment variable with the address of a folder that holds the files under their names, for networks without the authors' servers."""

Progress = Callable[[str, int, int | None], None]
"""`(file, bytes that are there, bytes in all or None)`."""

_CHUNK = 1 << 20
_TRIES = 5
_TIMEOUT_S = 60


@dataclass(frozen=True)
class Published:
    """A file as it is published.

    Attributes:
        url: its address. md5: of its content, by its authors or by torchvision. to: folder below the data root that it belongs into.
        holds: of an archive, the folder that it makes there; None: the file itself is what is needed.
    """

    url: str
    md5: str
    to: str
    holds: str | None = None

    @property
    def name(self) -> str:
        """Its name."""
        return self.url.rpartition("/")[2]


_FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
_SVHN = "http://ufldl.stanford.edu/housenumbers"

PUBLISHED: dict[str, tuple[Published, ...]] = {
    "fashion_mnist": (
        Published(f"{_FASHION}/train-images-idx3-ubyte.gz", "8d4fb7e6c68d591d4c3dfef9ec88bf0d", "fashion_mnist"),
        Published(f"{_FASHION}/train-labels-idx1-ubyte.gz", "25c81989df183df01b3e8a0aad5dffbe", "fashion_mnist"),
        Published(f"{_FASHION}/t10k-images-idx3-ubyte.gz", "bef4ecab320f06d8554ea6380940ec79", "fashion_mnist"),
        Published(f"{_FASHION}/t10k-labels-idx1-ubyte.gz", "bb300cfdad3c16e7a12a480ee83cd310", "fashion_mnist"),
    ),
    "cifar10": (
        Published(
            "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a", ".", "cifar-10-batches-py"
        ),
    ),
    "cifar100": (
        Published("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85", ".", "cifar-100-python"),
    ),
    "svhn": (
        Published(f"{_SVHN}/train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373", "svhn"),
        Published(f"{_SVHN}/test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3", "svhn"),
    ),
    "tiny_imagenet": (
        Published("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de", ".", "tiny-imagenet-200"),
    ),
}
"""Data set -> the files that make it; the others are made here or have licences that must be agreed to."""


def download(name: str, root: Path, progress: Progress = lambda file, done, total: None) -> list[Path]:
    """Fetch a data set into the data root and return what is there now. What is there already is not fetched again.

    Args:
        name: of the data set. root: the data root. progress: told while a file comes.

    Raises:
        UserError: it cannot be fetched by its name, or what came is not what was published: it is deleted.
        EnvironmentProblem: a server does not answer or the disk is full; what came is kept, and the same call goes on.
    """
    if name not in PUBLISHED:
        raise unknown_name("data set to download", name, PUBLISHED)
    return [_fetch(file, root, progress) for file in PUBLISHED[name]]


def _fetch(file: Published, root: Path, progress: Progress) -> Path:
    folder = root / file.to
    wanted = folder / (file.holds or file.name)
    if wanted.exists():
        return wanted
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{file.name}.part"
    _transfer(file, part, progress)
    found = _md5(part)
    if found != file.md5:
        part.unlink()
        raise UserError(
            f"what came from {address_of(file)} is not what was published: its MD5 is {found}, not {file.md5}. It was deleted; the same "
            "command fetches it again"
        )
    if file.holds is None:
        put_in_place(part, wanted)
    else:
        _unpack(part, file, wanted)
        part.unlink()
    return wanted


def address_of(file: Published) -> str:
    """Return where a file is fetched from: its authors' server, or the mirror.

    Raises:
        UserError: the mirror is no address.
    """
    mirror = os.environ.get(MIRROR_VARIABLE, "").rstrip("/")
    if not mirror:
        return file.url
    try:
        address = urllib.parse.urlsplit(mirror)
        sound = address.scheme in ("http", "https", "ftp", "file") and bool(address.hostname or address.scheme == "file")
        sound = sound and mirror.isascii() and mirror.isprintable() and " " not in mirror and (address.port or 0) >= 0
    except ValueError:
        sound = False
    if not sound:
        raise UserError(f"{MIRROR_VARIABLE} is {mirror[:300]!r}, no address of a folder, as https://HOST/DATA")
    return f"{mirror}/{file.name}"


def _transfer(file: Published, part: Path, progress: Progress) -> None:
    """Bring `part` to its full length, from where it is; a broken connection is tried again."""
    address, problem = address_of(file), ""
    for number in range(_TRIES):
        if number:
            time.sleep(min(2 ** (number - 1), 8) * _PAUSE_S)
        try:
            if _transfer_once(address, file.name, part, progress):
                return
            problem = "the connection ended before the file did"
        except urllib.error.HTTPError as error:
            problem = f"the server answered {error.code} {error.reason}"
            if error.code < 500 and error.code not in (408, 429):
                break
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            problem = str(getattr(error, "reason", error)) or type(error).__name__
        except OSError as error:
            raise EnvironmentProblem(f"cannot write {part}: {error.strerror}; what came is kept") from None
    raise EnvironmentProblem(f"cannot fetch {address}: {problem}. What came is kept; the same command goes on from there")


_PAUSE_S = 1.0


def _transfer_once(address: str, name: str, part: Path, progress: Progress) -> bool:
    """Ask for the rest of a file; return whether it is there in full."""
    there = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(address, headers={"Range": f"bytes={there}-", "User-Agent": "rayndom"} if there else {})
    try:
        answer = urllib.request.urlopen(request, timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code == 416 and there:  # nothing is left to send: the checksum says whether it is right
            return True
        raise
    with answer:
        if there and answer.status != 206:  # this server sends whole files alone
            there = 0
        length = answer.headers.get("Content-Length")
        total = None if length is None else there + int(length)
        with part.open("ab" if there else "wb") as sink:
            while chunk := answer.read(_CHUNK):
                sink.write(chunk)
                there += len(chunk)
                progress(name, there, total)
    return total is None or there >= total


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _unpack(archive: Path, file: Published, wanted: Path) -> None:
    """Unpack an archive beside its place, and put the folder in place when it is whole."""
    assert file.holds is not None
    with tempfile.TemporaryDirectory(dir=wanted.parent, prefix=f".{file.holds}.") as scratch:
        try:
            if file.name.endswith(".zip"):
                with zipfile.ZipFile(archive) as packed:
                    packed.extractall(scratch)
            else:
                with tarfile.open(archive) as packed_tar:
                    packed_tar.extractall(scratch, filter="data")
        except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
            raise UserError(f"{file.name} cannot be unpacked: {error}") from None
        except OSError as error:
            raise EnvironmentProblem(f"cannot unpack {file.name} to {wanted.parent}: {error.strerror}") from None
        if not (Path(scratch) / file.holds).is_dir():
            raise UserError(f"{file.name} holds no folder {file.holds}")
        shutil.move(Path(scratch) / file.holds, wanted)
