"""Where a result came from: code, packages, hardware and determinism, recorded with each run and each evaluation.

Nothing here names the machine, its user or a folder, and no environment variable is recorded but those that change numbers.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from packaging.requirements import Requirement

from models.accelerator import accelerator, has_module_like_cuda

PACKAGE_ROOT = Path(__file__).resolve().parent.parent
"""The folder that holds the four packages: the checkout, or site-packages."""

CODE = ("models", "trainers", "analysis", "orchestration", "pyproject.toml", "requirements.lock")
"""What decides a result; a changed README makes no checkout dirty."""

DETERMINISM_VARIABLES = ("PYTHONHASHSEED", "CUBLAS_WORKSPACE_CONFIG", "OMP_NUM_THREADS", "NVIDIA_TF32_OVERRIDE")

CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "bf16", "sve")
"""Of x86 and of Arm, as the kernel names them."""

GIBIBYTE = 2**30
_GIT_TIMEOUT_S = 30
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def collect_environment() -> dict[str, Any]:
    """Return the provenance of what this process computes, as JSON types.

    Sections: `code` (commit, dirty, diff_sha256, note), `lock_sha256`, `packages`, `python`, `platform`, `hardware`
    (memory in GiB), `determinism`. What cannot be found out is None, and `code.note` says why.
    """
    lock = PACKAGE_ROOT / "requirements.lock"
    return {
        "code": _code(),
        "lock_sha256": _sha256(lock.read_bytes()) if lock.is_file() else None,
        "packages": package_versions(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "hardware": {
            "cpu": cpu_model(),
            "cpu_features": cpu_features(),
            "cores": usable_cores(),
            "memory_gib": round(memory_limit() / GIBIBYTE, 1),
            "gpus": gpus(),
            "cuda": torch.version.cuda,
        },
        "determinism": _determinism(),
    }


def environment_tags() -> dict[str, str]:
    """Return the provenance as tags of an MLflow run, those that MLflow's own columns show among them; what is not known has none."""
    found = collect_environment()
    found["hardware"] = found["hardware"] | {"gpus": _in_words(found["hardware"]["gpus"])}
    tags = {f"environment.{name}": str(value) for name, value in _leaves(found).items() if value not in (None, [], "")}
    commit = found["code"]["commit"]
    return tags | ({"mlflow.source.git.commit": commit} if commit else {})


def _in_words(devices: list[dict[str, Any]]) -> str:
    """Return GPUs in one line, e.g. `2 x NVIDIA H200 (139.8 GiB)`."""
    names = [f"{device['name']} ({device['memory_gib']} GiB)" if "memory_gib" in device else device["name"] for device in devices]
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)) or "none"


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def uncommitted_changes(root: Path = PACKAGE_ROOT) -> str:
    """Return the difference between the code in `root` and its commit as a patch, new files included; empty if there is none.

    The checkout, its index and its objects are left as they are.

    Raises:
        UntrackedCodeError: `root` is not a git checkout, or git cannot read it.
    """
    present = [name for name in CODE if (root / name).exists()]
    # A private index and object folder: `git add` must see the new files, and must not be seen by the user.
    with tempfile.TemporaryDirectory() as scratch:
        objects = Path(root, _git(root, "rev-parse", "--git-path", "objects").strip()).resolve()
        private = {
            "GIT_INDEX_FILE": str(Path(scratch, "index")),
            "GIT_OBJECT_DIRECTORY": scratch,
            "GIT_ALTERNATE_OBJECT_DIRECTORIES": str(objects),
        }
        base = _commit(root)
        if base is None:
            base = _git(root, "hash-object", "-t", "tree", "-w", "--stdin", extra=private).strip()
        _git(root, "read-tree", base, extra=private)
        _git(root, "add", "--all", "--", *present, extra=private)
        return _git(root, "diff", "--cached", "--binary", "--relative", base, "--", *CODE, extra=private)


class UntrackedCodeError(RuntimeError):
    """The code does not lie in a git checkout that git can read; the message says why."""


def _code() -> dict[str, Any]:
    nothing: dict[str, Any] = {"commit": None, "dirty": None, "diff_sha256": None}
    try:
        if not _in_checkout(PACKAGE_ROOT):
            return nothing | {"note": "installed outside a git checkout"}
        commit, patch = _commit(PACKAGE_ROOT), uncommitted_changes(PACKAGE_ROOT)
    except UntrackedCodeError as error:
        return nothing | {"note": str(error)}
    return {
        "commit": commit,
        "dirty": bool(patch),
        "diff_sha256": _sha256(patch.encode(errors="surrogateescape")) if patch else None,
        "note": None if commit else "a git checkout without a commit",
    }


def _in_checkout(root: Path) -> bool:
    """Return whether git tracks this code: site-packages inside a user's own checkout is ignored there, or untracked."""
    try:
        if _git(root, "rev-parse", "--is-inside-work-tree").strip() != "true":
            return False
    except UntrackedCodeError:
        if any((folder / ".git").exists() for folder in (root, *root.parents)):
            raise
        return False
    # In a fresh repository nothing is tracked yet; then the checkout's own top folder tells.
    return bool(_git(root, "ls-files", "--", *CODE)) or (root / ".git").exists()


def _commit(root: Path) -> str | None:
    try:
        return _git(root, "rev-parse", "--verify", "--quiet", "HEAD").strip()
    except UntrackedCodeError:
        return None


def _git(root: Path, *arguments: str, extra: dict[str, str] | None = None) -> str:
    # A hook's or an editor's GIT_* variables would point at another repository.
    clean = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    try:
        finished = subprocess.run(
            ["git", "-C", str(root), *arguments],
            env=clean | (extra or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_GIT_TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError:
        raise UntrackedCodeError("git is not installed") from None
    except subprocess.TimeoutExpired:
        raise UntrackedCodeError(f"git did not answer within {_GIT_TIMEOUT_S} s") from None
    if finished.returncode:
        # git's own message names folders, which do not belong into a record.
        owner = b"dubious ownership" in finished.stderr
        raise UntrackedCodeError(
            "the checkout belongs to another user and git does not read it" if owner else "git cannot read the checkout"
        )
    return finished.stdout.decode(errors="surrogateescape")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def requirements() -> list[Requirement]:
    """Return what Rayndom depends on, from pyproject.toml in a checkout, else from the installed package's metadata."""
    file = PACKAGE_ROOT / "pyproject.toml"
    if file.is_file():
        with file.open("rb") as handle:
            project = tomllib.load(handle).get("project", {})
        if project.get("name") == "rayndom":
            return [Requirement(line) for line in project["dependencies"]]
    parsed = [Requirement(line) for line in importlib.metadata.requires("rayndom") or ()]
    return [item for item in parsed if item.marker is None or item.marker.evaluate({"extra": ""})]


def package_versions() -> dict[str, str | None]:
    """Return the installed version of Rayndom and of each package it depends on; None where there is none."""
    names = ["rayndom", *(requirement.name for requirement in requirements())]
    return {name: installed_version(name) for name in names}


def installed_version(name: str) -> str | None:
    """Return the installed version of a package, None if there is none. Nothing is imported."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """Return the processor's name."""
    described = Path("/proc/cpuinfo")
    if described.is_file():
        for line in described.read_text(errors="replace").splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """Return which of the instruction sets that decide the speed of training this processor has; empty where unknown."""
    described = Path("/proc/cpuinfo")
    if not described.is_file():
        return []
    known = set()
    for line in described.read_text(errors="replace").splitlines():
        if line.lower().startswith(("flags", "features")):
            known.update(line.partition(":")[2].split())
    return [name for name in CPU_FEATURES if name in known]


def usable_cores() -> int:
    """Return how many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_limit() -> int:
    """Return the bytes of memory this process may use: the machine's, or its container's if that is less."""
    limits = [psutil.virtual_memory().total]
    for file in _CGROUP_LIMITS:
        if file.is_file() and (text := file.read_text().strip()).isdigit():
            limits.append(int(text))
    return min(limits)


def gpus() -> list[dict[str, Any]]:
    """Return name, memory (GiB) and, of NVIDIA's, compute capability of each GPU that this process sees; of Apple's the type alone."""
    kind = accelerator()
    if kind is None:
        return []
    if not has_module_like_cuda(kind):
        return [{"name": kind.type}]
    found = [torch.get_device_module(kind).get_device_properties(index) for index in range(torch.accelerator.device_count())]
    if kind.type != "cuda":
        return [{"name": device.name, "memory_gib": round(device.total_memory / GIBIBYTE, 1)} for device in found]
    return [
        {
            "name": device.name,
            "memory_gib": round(device.total_memory / GIBIBYTE, 1),
            "compute_capability": f"{device.major}.{device.minor}",
        }
        for device in found
    ]


def _determinism() -> dict[str, Any]:
    return {
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "num_threads": torch.get_num_threads(),
        "hash_randomization": bool(sys.flags.hash_randomization),
        "variables": {name: os.environ[name] for name in DETERMINISM_VARIABLES if name in os.environ},
    }
