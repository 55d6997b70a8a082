"""The fields of an experiment with their values and descriptions, for help and documentation: generated from the schema."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


def field_rows(config: BaseModel, prefix: str = "") -> list[tuple[str, str, str]]:
    """Return (flag, value, description) of every leaf field of a config and the configs inside it."""
    rows: list[tuple[str, str, str]] = []
    for name, info in type(config).model_fields.items():
        value: Any = getattr(config, name)
        if isinstance(value, BaseModel):
            # A defence's parameters stand directly below `defence`.
            inner = prefix if name == "parameters" else f"{prefix}{name}."
            rows += field_rows(value, inner)
        else:
            shown = config.model_dump(mode="json").get(name, value)
            rows.append((f"--{prefix}{name}", "null" if shown is None else str(shown), info.description or ""))
    return rows
