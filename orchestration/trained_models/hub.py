"""Models of the Hugging Face hub: `hf://OWNER/NAME`, with `@REVISION` where one is meant. What is fetched is weights as safetensors,
configuration and card; nothing of it is executed."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import ModuleType

from models.errors import EnvironmentProblem, UserError, first_line
from models.weights import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE
from orchestration import console
from orchestration.home import Home
from orchestration.trained_models.contents import downloaded, lacking

SCHEME = "hf://"
FILES = (WEIGHTS_FILE, CONFIG_FILE, CARD_FILE)
_ADDRESS = re.compile(r"hf://([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@([\w./-]{1,200}))?")


def hub_library() -> ModuleType:
    """Return the package `huggingface_hub`.

    Raises:
        UserError: it is not installed.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(f"hf:// needs the package huggingface_hub ({error}): `pip install huggingface_hub`, or the extra `hub`") from None
    return huggingface_hub


def repository_of(address: str) -> tuple[str, str | None]:
    """Return (owner/name, revision or None) of `hf://OWNER/NAME[@REVISION]`.

    Raises:
        UserError: it is none.
    """
    found = _ADDRESS.fullmatch(address)
    if found is None:
        raise UserError(f"{address!r:.200} is no model of the hub; write hf://OWNER/NAME, or hf://OWNER/NAME@REVISION")
    return found[1], found[2]


def fetch_model(address: str, home: Home) -> Path:
    """Fetch a model of the hub into the home's `downloads` and return its folder; without network the hub's own cache is asked.

    Raises:
        UserError: there is no such model, or it holds none of Rayndom's. EnvironmentProblem: the hub does not answer.
    """
    name, revision = repository_of(address)
    hub = hub_library()
    options = {"revision": revision, "allow_patterns": list(FILES), "library_name": "rayndom"}
    try:
        fetched = Path(hub.snapshot_download(name, **options))
    except hub.errors.LocalEntryNotFoundError as error:
        raise EnvironmentProblem(f"the hub does not answer and {address} was not fetched here before: {first_line(error)}") from None
    except (hub.errors.RepositoryNotFoundError, hub.errors.RevisionNotFoundError) as error:
        raise UserError(f"there is no {address} on the hub, or you may not read it: {first_line(error)}") from None
    except (hub.errors.HfHubHTTPError, OSError) as error:
        raise EnvironmentProblem(f"cannot fetch {address}: {first_line(error)}") from None
    missing = lacking(fetched)
    if missing:
        raise UserError(f"{address} is no model of Rayndom: it has no {', '.join(missing)}")

    def copy(folder: Path) -> Path:
        for file in FILES:
            if (fetched / file).is_file():
                shutil.copyfile(fetched / file, folder / file)
        return folder

    folder = downloaded(home, address, f"hf-{name.replace('/', '-')}", copy)
    console.say(f"{address} is {folder}")
    return folder
