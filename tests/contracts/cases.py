"""The cases of the conformance suites, as the tests of this project name them."""

from __future__ import annotations

from models.registry import list_defences
from rayndom.testing.cases import IMAGE_SHAPE, NUM_CLASSES, SMALLER, VARIANTS, build_case, images, is_random, labels, sharpen

__all__ = [
    "IMAGE_SHAPE",
    "NUM_CLASSES",
    "RANDOM_CASES",
    "SMALLER",
    "VARIANTS",
    "build_case",
    "case_names",
    "images",
    "is_random",
    "labels",
    "sharpen",
]


def case_names() -> list[str]:
    """Return the names of all cases."""
    return [*list_defences(), *(name for name in VARIANTS if name.partition("-")[0] in list_defences())]


RANDOM_CASES = [name for name in case_names() if is_random(name)]
