"""What an attacker may do: the norm and the radius, and the notation `8/255`."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, model_validator

from models.configuration import Config

Norm = Literal["linf", "l2"]

LARGEST_RADIUS: dict[str, float] = {"linf": 1, "l2": 50}
"""Beyond these a radius, or a step, was written in levels of 0 to 255."""

_FRACTION = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*/\s*(\d+)\s*$")


def parse_pixel_fraction(value: Any) -> Any:
    """Read `8/255` (as papers write it) or a number; other types pass through to fail in the type check."""
    if isinstance(value, str):
        match = _FRACTION.match(value)
        if match:
            if int(match.group(2)) == 0:
                raise ValueError(f"{value!r} divides by zero")
            return float(match.group(1)) / int(match.group(2))
        try:
            return float(value)
        except ValueError:
            raise ValueError(f"{value!r} is neither a number nor a fraction like 8/255") from None
    return value


def format_pixel_fraction(value: float) -> str | float:
    """Write a multiple of 1/255 as papers do, any other number as it is."""
    numerator = round(value * 255)
    return f"{numerator}/255" if numerator > 0 and numerator / 255 == value else value


PixelFraction = Annotated[float, BeforeValidator(parse_pixel_fraction), PlainSerializer(format_pixel_fraction, return_type=Any)]


class ThreatModel(Config):
    """The set of perturbations an attacker may use: a ball around each image, in pixels of [0,1], cut at the pixel range."""

    norm: Norm = Field("linf", description="Norm of the ball: `linf` or `l2`.")
    epsilon: PixelFraction = Field(8 / 255, ge=0, description="Radius in pixels of [0,1], e.g. 8/255; l2: Euclidean length, e.g. 128/255.")

    @model_validator(mode="after")
    def _radius_fits_the_pixel_range(self) -> ThreatModel:
        if self.epsilon > LARGEST_RADIUS[self.norm]:
            raise ValueError(f"epsilon {self.epsilon:g}: pixels are in [0,1]; did you mean {self.epsilon:g}/255?")
        return self

    def __str__(self) -> str:
        return f"{self.norm} {format_pixel_fraction(self.epsilon)}"
