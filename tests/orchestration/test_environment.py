"""A run's record says exactly which code made it, and nothing about the machine's name, its user or its folders."""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path

import pytest
import torch

from orchestration import environment
from orchestration.environment import UntrackedCodeError, collect_environment, uncommitted_changes


def git(folder: Path, *arguments: str, text: str | None = None) -> str:
    identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    finished = subprocess.run(["git", *identity, "-C", str(folder), *arguments], input=text, capture_output=True, text=True, check=True)
    return finished.stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with one commit: a package, a README, an ignored file."""
    root = tmp_path / "checkout"
    (root / "models").mkdir(parents=True)
    (root / "models" / "layer.py").write_text("sigma = 1\n")
    (root / "models" / "old.py").write_text("old = True\n")
    (root / "README.md").write_text("read me\n")
    (root / ".gitignore").write_text("*.log\n")
    git(root, "init", "--quiet")
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "first")
    return root


def change(root: Path) -> None:
    (root / "models" / "layer.py").write_text("sigma = 2\n")
    (root / "models" / "old.py").unlink()
    (root / "models" / "new.py").write_text("new = True\n")


def test_a_clean_checkout_has_no_changes(checkout: Path) -> None:
    assert uncommitted_changes(checkout) == ""


def test_a_readme_and_ignored_files_change_no_result(checkout: Path) -> None:
    (checkout / "README.md").write_text("other\n")
    (checkout / "models" / "run.log").write_text("noise\n")
    assert uncommitted_changes(checkout) == ""


def test_the_patch_rebuilds_the_code_that_ran(checkout: Path, tmp_path: Path) -> None:
    change(checkout)
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", str(checkout), str(clone))
    git(clone, "apply", "-", text=uncommitted_changes(checkout))
    assert (clone / "models" / "layer.py").read_text() == "sigma = 2\n"
    assert (clone / "models" / "new.py").read_text() == "new = True\n"
    assert not (clone / "models" / "old.py").exists()


def test_looking_leaves_index_and_objects_alone(checkout: Path) -> None:
    change(checkout)
    before = git(checkout, "status", "--porcelain"), sorted((checkout / ".git" / "objects").rglob("*"))
    uncommitted_changes(checkout)
    assert (git(checkout, "status", "--porcelain"), sorted((checkout / ".git" / "objects").rglob("*"))) == before


def test_a_checkout_without_a_commit_is_all_change(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "layer.py").write_text("sigma = 1\n")
    git(tmp_path, "init", "--quiet")
    assert "+sigma = 1" in uncommitted_changes(tmp_path)


def test_another_repository_in_the_environment_is_not_asked(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    assert uncommitted_changes(checkout) == ""


def test_the_record_names_commit_and_changes(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "PACKAGE_ROOT", checkout)
    code = environment._code()
    assert code == {
        "commit": git(checkout, "rev-parse", "HEAD").strip(),
        "dirty": False,
        "diff_sha256": None,
        "note": None,
    }


def test_two_different_changes_have_different_hashes(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "PACKAGE_ROOT", checkout)
    hashes = []
    for value in (2, 3, 2):
        (checkout / "models" / "layer.py").write_text(f"sigma = {value}\n")
        code = environment._code()
        assert code["dirty"] is True
        hashes.append(code["diff_sha256"])
    assert hashes[0] == hashes[2] != hashes[1]


@pytest.mark.parametrize("inside_a_users_repository", [False, True])
def test_an_installed_package_says_that_it_has_no_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside_a_users_repository: bool
) -> None:
    if inside_a_users_repository:
        git(tmp_path, "init", "--quiet")
    packages = tmp_path / "environment" / "site-packages"
    (packages / "models").mkdir(parents=True)
    (packages / "models" / "layer.py").write_text("sigma = 1\n")
    monkeypatch.setattr(environment, "PACKAGE_ROOT", packages)
    assert environment._code() == {
        "commit": None,
        "dirty": None,
        "diff_sha256": None,
        "note": "installed outside a git checkout",
    }


def test_without_git_the_record_says_so(checkout: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UntrackedCodeError, match="git is not installed"):
        uncommitted_changes(checkout)
    monkeypatch.setattr(environment, "PACKAGE_ROOT", checkout)
    assert environment._code()["note"] == "git is not installed"


def test_the_record_is_json_and_names_no_machine_user_or_folder() -> None:
    record = collect_environment()
    text = json.dumps(record)
    assert str(environment.PACKAGE_ROOT) not in text
    assert str(Path.home()) not in text.replace('"/"', "")
    assert record["platform"] == f"{platform.system()} {platform.release()} {platform.machine()}"
    assert record["packages"]["torch"] == environment.installed_version("torch")
    assert record["hardware"]["cores"] >= 1
    assert record["hardware"]["memory_gib"] > 0
    assert set(record) == {"code", "lock_sha256", "packages", "python", "platform", "hardware", "determinism"}


def test_determinism_flags_follow_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    determinism = collect_environment()["determinism"]
    assert determinism["cudnn_deterministic"] is True
    assert determinism["variables"]["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_a_containers_memory_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(environment, "_CGROUP_LIMITS", (limit,))
    machine = environment.memory_limit()
    limit.write_text("max\n")
    assert environment.memory_limit() == machine
    limit.write_text(f"{2**20}\n")
    assert environment.memory_limit() == 2**20
