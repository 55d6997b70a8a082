"""What every randomized model promises (DESIGN, section 2), for every defence there is and every one to come."""

from __future__ import annotations

import pytest

from rayndom.testing.randomness import RandomnessContract
from tests.contracts.cases import RANDOM_CASES, case_names


@pytest.mark.parametrize("name", RANDOM_CASES)
class TestRandomness(RandomnessContract):
    """The suite that plug-ins inherit, too."""


def test_every_randomized_defence_is_among_the_cases():
    assert set(RANDOM_CASES) <= set(case_names())
