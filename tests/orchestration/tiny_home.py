"""Homes with models that were really trained, for seconds: 64 digits of 8 by 8 pixels, one epoch."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from orchestration.cli import main
from orchestration.home import Home

TINY = [
    "--data.image_size", "8", "--data.limit_train", "64", "--data.validation_size", "32", "--data.limit_test", "40",
    "--training.epochs", "1", "--training.batch_size", "32", "--training.attack.steps", "1", "--training.validation.steps", "1",
    "--training.precision", "fp32", "--resources.cpus_per_worker", "1",
]  # fmt: skip


@contextlib.contextmanager
def trained_home(folder: Path, migrated_store: Path, recipes: Sequence[str], *flags: str) -> Iterator[Home]:
    """A home in `folder` where these recipes were trained with the settings above and then `flags`; no other store is named meanwhile."""
    located = Home.locate(folder / "home")
    shutil.copy(migrated_store, located.root / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setattr("os.cpu_count", lambda: 1)  # several threads for images of 8x8 only wait for one another
        for recipe in recipes:
            assert main(["train", recipe, *TINY, *flags, "--home", str(located.root)]) == 0
        yield located


def copied_home(home: Home, folder: Path) -> Home:
    """A copy of a home that a test may change."""
    return Home.locate(shutil.copytree(home.root, folder / "home"))


def rayndom_json(capsys: pytest.CaptureFixture[str], home: Home, *arguments: str) -> tuple[int, Any, str]:
    """Run a command with `--json` and return (exit code, what it printed as JSON or None, errors)."""
    capsys.readouterr()
    code = main([*arguments, "--json", "--home", str(home.root)])
    captured = capsys.readouterr()
    return code, json.loads(captured.out) if captured.out.strip() else None, captured.err
