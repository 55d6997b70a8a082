"""The base of every configuration: frozen, closed, each field described."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """A frozen record. Unknown keys are errors; instances are hashable by value of their JSON form and safe to pickle."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
