"""The base of every configuration: frozen, closed, each field described."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """A frozen record. Unknown keys are errors; instances are hashable by value of their JSON form and safe to pickle."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @classmethod
    def stored_earlier(cls, parameters: dict[str, Any]) -> dict[str, Any]:
        """Return parameters as an earlier version stored them, with what has been added since at the value that it stood for."""
        return parameters

    @property
    def revision(self) -> int:
        """How often what these values mean has changed; a run's fingerprint holds it unless it is 0.

        A run that was made under an earlier meaning is another experiment: it is neither gone on with nor reused.
        """
        return 0
