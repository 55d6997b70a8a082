"""The conformance suites for a defence of one's own, for pytest: a plug-in's test is one line.

    from rayndom.testing import contract_of

    TestFeatureNoise = contract_of("feature_noise")

Where the defence's defaults are too large for a test: `contract_of("my_ensemble", num_members=2)`.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.register_assert_rewrite("rayndom.testing.randomness", "rayndom.testing.defence")


def contract_of(name: str, **smaller: Any) -> type:
    """Return the class of tests that a defence must pass; pytest collects it under a name that begins with `Test`.

    Args:
        name: of the defence, as `rayndom list defences` shows it.
        smaller: parameters with which it fits a network of three small stages and images of 8 by 8 pixels.

    Raises:
        UserError: there is no such defence.
    """
    from rayndom.testing import cases
    from rayndom.testing.defence import DefenceContract
    from rayndom.testing.randomness import RandomnessContract

    if smaller:
        cases.SMALLER[name] = smaller
    suites = (RandomnessContract, DefenceContract) if cases.is_random(name) else (DefenceContract,)
    return pytest.mark.parametrize("name", [name])(type(f"Test_{name}", suites, {"__doc__": f"What {name} promises."}))
