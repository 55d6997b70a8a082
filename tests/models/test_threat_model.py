"""The notation of radii, and the classic mistake."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from models.threat_model import ThreatModel


@pytest.mark.parametrize(("text", "value"), [("8/255", 8 / 255), ("0.1", 0.1), (0.1, 0.1), ("25.5/255", 0.1), (0, 0.0)])
def test_radii_are_read_as_papers_write_them(text, value):
    assert ThreatModel(epsilon=text).epsilon == pytest.approx(value, abs=1e-15)


@pytest.mark.parametrize(("value", "shown"), [(8 / 255, "8/255"), (0.1, 0.1), (128 / 255, "128/255"), (0.031, 0.031)])
def test_and_written_back_without_loss(value, shown):
    dumped = ThreatModel(epsilon=value).model_dump(mode="json")["epsilon"]
    assert dumped == shown
    assert ThreatModel(epsilon=dumped).epsilon == value


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epsilon": 8}, "did you mean 8/255"),
        ({"epsilon": "8/0"}, "zero"),
        ({"epsilon": "eight"}, "8/255"),
        ({"epsilon": -0.1}, "greater"),
        ({"norm": "l7"}, "linf"),
    ],
)
def test_mistakes_are_explained(settings, message):
    with pytest.raises(ValidationError, match=message):
        ThreatModel(**settings)
