"""Models that Rayndom did not train: named on the command line, and, once evaluated, by the name of their folder in the home.

`external/NAME/external.json` says what was named and what its files held; records and results lie beside it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from torch import nn

from analysis.fingerprints import json_hash, weights_hash
from models.errors import UserError
from models.external.source import ExternalModel, external_model
from models.file_content import absolute
from models.files import write_text
from models.json_text import read_json
from orchestration.home import Home, readable
from trainers.data import DataConfig

EXTERNAL_FILE = "external.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class KnownExternal:
    """A network that Rayndom did not build, with what was found when it was loaded.

    Attributes:
        model: how it is named and loaded. data: whose test images it is evaluated on.
        checkpoint: hash of its weights. source_digest, weights_digest: of its files.
    """

    model: ExternalModel
    data: DataConfig
    checkpoint: str
    source_digest: str
    weights_digest: str | None

    @property
    def key(self) -> str:
        """Eight hexadecimal digits of its code, its weights and its callable."""
        return json_hash([self.model.kind, self.source_digest, self.model.attribute, self.checkpoint])[:8]

    @property
    def name(self) -> str:
        """What the home calls it, e.g. `my_model.build-1a2b3c4d`."""
        return f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', self.model.name)[:100]}-{self.key}"

    def has_its_code(self) -> bool:
        """Return whether its code or program is there and what it was."""
        try:
            return self.model.source_digest == self.source_digest
        except UserError:
            return False

    def load(self) -> nn.Module:
        """Return the network, in eval mode.

        Raises:
            UserError: its files are not those that were found, or give other weights.
        """
        if (self.model.source_digest, self.model.weights_digest) != (self.source_digest, self.weights_digest):
            raise UserError(f"{self.model.reference} has changed since it was evaluated as {self.name}: evaluate it again")
        network = self.model.load()
        if weights_hash(network) != self.checkpoint:
            raise UserError(f"{self.model.reference} gives other weights than when it was evaluated as {self.name}: evaluate it again")
        return network

    def keep(self, home: Home) -> None:
        """Write into the home what it is, so that its name means it from now on."""
        content = {
            "format_version": FORMAT_VERSION,
            "model": self.model.model_dump(mode="json"),
            "data": self.data.model_dump(mode="json"),
            "checkpoint": self.checkpoint,
            "source_digest": self.source_digest,
            "weights_digest": self.weights_digest,
        }
        write_text(home.external(self.name) / EXTERNAL_FILE, json.dumps(content, indent=2) + "\n")


def known_external(
    reference: str, weights: str | None, data: DataConfig, num_classes: int | None, image_shape: tuple[int, int, int] | None
) -> KnownExternal:
    """Return the network that a command line names, built once or twice to see that it is the same each time.

    Args:
        reference, weights: as of `external_model`. data: whose images it is evaluated on.
        num_classes, image_shape: K and (C, H, W), for `timm:NAME`.

    Raises:
        UserError: it cannot be built, or has no weights of its own.
    """
    model = external_model(reference, weights, num_classes=num_classes, image_shape=image_shape)
    checkpoint = weights_hash(model.load())
    if model.weights is None and model.kind == "callable" and weights_hash(model.load(seed=1)) != checkpoint:
        raise UserError(
            f"{reference} gives other weights at each call: they are drawn, not trained. Name a file of trained ones with --weights, "
            "or let the callable load them"
        )
    return KnownExternal(model, data, checkpoint, model.source_digest, model.weights_digest)


def read_external(home: Home, name: str) -> KnownExternal | None:
    """Return the network that a home knows by this name; None: it knows none.

    Raises:
        UserError: its file is damaged.
    """
    path = home.external(name) / EXTERNAL_FILE
    if "/" in name or name in ("", ".", "..") or len(name) > 200 or not path.is_file():
        return None
    content = read_json(path)
    try:
        if content.get("format_version") != FORMAT_VERSION:
            raise UserError(f"{path} has format_version {content.get('format_version')!r}; this version reads {FORMAT_VERSION}")
        model, data = ExternalModel.model_validate(content["model"]), DataConfig.model_validate(content["data"])
        digests: list[Any] = [content[key] for key in ("checkpoint", "source_digest", "weights_digest")]
    except (KeyError, ValidationError) as error:
        raise UserError(f"{path} is damaged: {' '.join(str(error).split())[:300]}") from None
    if not all(isinstance(digest, str) or (digest is None and place == 2) for place, digest in enumerate(digests)):
        raise UserError(f"{path} is damaged: checkpoint, source_digest and weights_digest should be texts")
    return KnownExternal(model, data, *digests)


def externals_in(home: Home) -> list[KnownExternal]:
    """Return the networks that a home knows, by name; what cannot be read is skipped with a warning."""
    names = [path.parent.name for path in home.entries(f"external/*/{EXTERNAL_FILE}")]
    return [found for found in readable(lambda name: read_external(home, name), names) if found is not None]


def evaluated_as(reference: str, home: Home) -> KnownExternal:
    """Return the network that was evaluated here under a reference, as `FILE.py:CALLABLE`, and whose code has not changed since.

    Raises:
        UserError: none was, only with earlier code, or several were, with other weights.
    """
    known = [each for each in externals_in(home) if each.model.reference in (reference, _absolute(reference))]
    current = [each for each in known if each.has_its_code()]
    if len(current) == 1:
        return current[0]
    names = ", ".join(each.name for each in current or known)
    if current:
        raise UserError(f"{reference} was evaluated here with several weights; name one: {names}")
    if known:
        raise UserError(f"{reference} has changed since it was evaluated here; name what it was ({names}), or evaluate it again")
    raise UserError(f"{reference} was not evaluated here yet: `rayndom evaluate {reference} --data NAME` (and `--weights FILE`) does")


def _absolute(reference: str) -> str:
    source, colon, attribute = reference.partition(":")
    return f"{absolute(source)}{colon}{attribute}"
