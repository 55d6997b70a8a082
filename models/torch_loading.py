"""What `torch.load` calls in the place of pickle for a folder that `save_pretrained` wrote, so that tools which know `torch.load` alone
(MLflow's `pytorch` flavour) get the model itself: built from its configuration, still random, and no code of a file is executed.

`write_stub` lays two small files beside the weights: one names this module as the pickle module; the other holds the header that
`torch.load` reads by `pickle_module.load` from files of its older format, here a line of JSON for each of its parts.
"""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import IO, Any

from torch import nn
from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

from models.weights import load_pretrained

STUB_FILE, MODULE_FILE = "model.pth", "pickle_module_info.txt"
"""How MLflow calls the file that `torch.load` opens, and the one that names the pickle module."""
_HEADER: tuple[Any, ...] = (MAGIC_NUMBER, PROTOCOL_VERSION, {}, [])
"""A magic number, the protocol, facts of the system, and, after the model, the keys of its storages: none."""
_MOST_BYTES = 1000


def write_stub(folder: Path) -> None:
    """Lay beside an exported model what lets `torch.load(folder / "model.pth", pickle_module=models.torch_loading)` return it."""
    (folder / STUB_FILE).write_text("".join(f"{json.dumps(part)}\n" for part in _HEADER))
    (folder / MODULE_FILE).write_text(__name__)


def load(file: IO[bytes], **options: Any) -> Any:
    """Return the next part of the header; nothing is unpickled.

    Raises:
        ValueError: the file was not written by `write_stub`.
    """
    return json.loads(file.readline(_MOST_BYTES))


class Unpickler:
    """Reads the model of the folder that the file lies in."""

    def __init__(self, file: IO[bytes], **options: Any) -> None:
        self.file = file

    def load(self) -> nn.Module:
        """Return the model in eval mode; a randomized one draws anew at each call, by a seed that nobody knows."""
        return load_pretrained(Path(self.file.name).parent, seed=secrets.randbits(62))
