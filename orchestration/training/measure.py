"""How finished models are measured, and what those metrics are called: settings and names alone, `final_measures` measures."""

from __future__ import annotations

from pydantic import Field

from models.configuration import MOST_IMAGES, Config

PROTOCOLS = ("T0", "T1", "T2", "T3")
MARKED_METRIC = "validation/evaluation_marked"
"""1 where a check of the evaluation failed, else 0: its accuracies must then not be shown without their mark."""


def protocol_metric(protocol: str) -> str:
    """Return the metric of robust accuracy under a protocol, `T0` to `T3`."""
    return f"validation/robust_accuracy/{protocol}"


class MeasureConfig(Config):
    """How robust accuracy under a named protocol is measured at the end of a trial, on validation images.

    It is measured only if an objective or a constraint names a `validation/robust_accuracy/T<n>`.
    """

    suite: str = Field("quick", description="Evaluation suite.")
    num_examples: int = Field(200, ge=1, le=MOST_IMAGES, description="Validation images.")
    num_draws: int | None = Field(None, ge=1, le=10_000, description="Draws that score; none: the suite's.")
