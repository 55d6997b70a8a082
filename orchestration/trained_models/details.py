"""What an exported model says of itself beside its network: how it was trained, how it was evaluated. Checked where it is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from models.errors import UserError


class _Part(BaseModel):
    """A part of a file of this tool's own: the parts that commands use, other ones are left alone. Nothing is converted."""

    model_config = ConfigDict(strict=True, extra="allow")


class _Training(_Part):
    metrics: dict[str, float]
    selected_epoch: int
    num_epochs: int


class _Estimate(_Part):
    accuracy: float = Field(ge=0, le=1)
    low: float = Field(ge=0, le=1)
    high: float = Field(ge=0, le=1)
    num_samples: int = Field(ge=1)
    num_draws: int = Field(ge=1)


class _Row(_Estimate):
    attack: str
    protocol: str
    in_threat_model: bool


class _Verdict(_Part):
    id: str
    title: str
    verdict: str


class _Evaluation(_Part):
    suite: str
    finished: bool
    marked: bool
    headline: _Estimate | None
    rows: list[_Row]
    verdicts: list[_Verdict]
    markdown: str = ""
    records: list[str] = []
    settings: dict[str, Any] = {}


class _Details(_Part):
    experiment: dict[str, Any] | None = None
    fingerprint: str | None = None
    class_names: list[str] = []
    training: _Training | None = None
    evaluation: _Evaluation | None = None


class _TrainedDetails(_Details):
    class_names: list[str]
    training: _Training


def check_details(details: Mapping[str, Any], source: str) -> None:
    """Check `details` of a config.json.

    Args:
        source: names them in errors.

    Raises:
        UserError: a part that commands use is missing or of another type.
    """
    _check(_TrainedDetails if details.get("experiment") is not None else _Details, details, source)


def check_summary(summary: Mapping[str, Any], source: str) -> None:
    """Check a kept evaluation as `check_details` checks `details`."""
    _check(_Evaluation, summary, source)


def _check(kind: type[_Part], content: Mapping[str, Any], source: str) -> None:
    try:
        kind.model_validate(dict(content))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{source} is damaged: {where}: {first['msg']} (it is {first['input']!r:.80})") from None


__all__ = ["check_details", "check_summary"]
