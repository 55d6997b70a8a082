"""A home of an earlier commit, unpacked for a file of tests: they copy it before they break it."""

from __future__ import annotations

import tarfile

import pytest

from tests.orchestration.test_earlier_home import ARCHIVE


@pytest.fixture(scope="module")
def earlier_home(tmp_path_factory):
    """A home with runs, evaluations, an analysis, a sweep and an export; its MLflow store is not looked at."""
    folder = tmp_path_factory.mktemp("earlier")
    with tarfile.open(ARCHIVE) as packed:
        packed.extractall(folder, filter="data")
    return folder / "home"
