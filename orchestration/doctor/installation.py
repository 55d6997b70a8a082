"""Checks of Python, the packages and where they are imported from. Versions are read, not imported, wherever that is enough."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from orchestration.doctor.check import Check
from orchestration.environment import PACKAGE_ROOT, installed_version, requirements

PACKAGES = ("models", "trainers", "analysis", "orchestration")
OLDEST_PYTHON = (3, 11)
SHOWN = ("torch", "ray", "mlflow", "optuna", "torchattacks")
SETUP = "run `make setup` in the checkout: it installs exactly what requirements.lock names"


def check_installation() -> list[Check]:
    """Return the findings on Python, packages and import locations."""
    return [
        check_python(sys.version_info[:2]),
        *check_packages(requirements()),
        check_lock(PACKAGE_ROOT / "requirements.lock"),
        check_torchattacks(),
        check_ray_extras(),
        check_uv(),
        check_import_locations(Path.cwd()),
    ]


def check_python(version: tuple[int, ...]) -> Check:
    """Compare Python's (major, minor) with the oldest that is supported."""
    found = f"{platform.python_implementation()} {'.'.join(map(str, version))}"
    if version < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        return Check("Python", "fail", found, f"Rayndom needs {oldest} or newer: `make setup PYTHON={oldest}`")
    return Check("Python", "ok", found)


def check_packages(required: list[Requirement]) -> list[Check]:
    """Compare installed versions with what Rayndom depends on: one finding for each that does not fit, or one for all."""
    problems = []
    for requirement in required:
        installed, wanted = installed_version(requirement.name), str(requirement.specifier)
        if installed is None:
            problems.append(Check(f"package {requirement.name}", "fail", f"not installed; needed: {wanted or 'any'}", SETUP))
        elif not requirement.specifier.contains(installed, prereleases=True):
            mend = SETUP
            if requirement.name == "mlflow" and Version(installed).major < 3:
                mend = f"plain pip takes MLflow 2 to please torchattacks' old pin on requests; {SETUP}"
            problems.append(Check(f"package {requirement.name}", "fail", f"{installed}; needed: {wanted}", mend))
    if problems:
        return problems
    shown = ", ".join(f"{name} {installed_version(name)}" for name in SHOWN)
    return [Check("packages", "ok", f"all {len(required)} recent enough ({shown})")]


def check_lock(lock: Path) -> Check:
    """Compare the installed packages with the lock, without which a result cannot be had again."""
    if not lock.is_file():
        return Check("locked packages", "ok", "no requirements.lock here: Rayndom is installed without a checkout")
    lines = (line.strip() for line in lock.read_text().splitlines())
    wanted = [Requirement(line) for line in lines if line and not line.startswith(("#", "-"))]
    apply = [item for item in wanted if item.marker is None or item.marker.evaluate()]
    different = [item.name for item in apply if not item.specifier.contains(installed_version(item.name) or "0.0.0.dev0", prereleases=True)]
    if different:
        shown = ", ".join(different[:5]) + (", ..." if len(different) > 5 else "")
        return Check("locked packages", "warn", f"{len(different)} of {len(apply)} differ: {shown}", SETUP)
    return Check("locked packages", "ok", f"all {len(apply)} as in requirements.lock")


def check_torchattacks() -> Check:
    """Check that torchattacks imports beside a requests that MLflow accepts, which its own pin forbids."""
    name = "torchattacks"
    installed, requests = installed_version("torchattacks"), installed_version("requests")
    if installed is None:
        mend = f"`pip install --no-deps torchattacks`; {SETUP}"
        return Check(name, "warn", "not installed: suites with `torchattacks_...` attacks cannot run, all others can", mend)
    if requests is None or Version(requests) < Version("2.32"):
        found = f"requests {requests or 'missing'}: torchattacks' pin was followed, and MLflow 3 needs 2.32 or newer"
        return Check(name, "fail", found, f"{SETUP} (uv overrides the pin; plain pip cannot)")
    try:
        importlib.import_module("torchattacks")
    except (ImportError, AttributeError) as error:
        return Check(name, "fail", f"{installed} cannot be imported: {error}", SETUP)
    found = f"{installed} imports beside requests {requests}"
    if importlib.util.find_spec("robustbench") is not None and installed_version("robustbench") is None:
        found += "; its wheel also brings an old `robustbench` that is not RobustBench (Rayndom does not use it)"
    return Check(name, "ok", found)


def check_ray_extras() -> Check:
    """Check what Ray's dashboard needs: without it, trials stopped early never free their workers."""
    name = "Ray's dashboard"
    try:
        declared = importlib.metadata.requires("ray") or []
    except importlib.metadata.PackageNotFoundError:
        return Check(name, "fail", "Ray is not installed", SETUP)
    extra = [item for item in map(Requirement, declared) if item.marker and item.marker.evaluate({"extra": "default"})]
    missing = [
        item.name
        for item in extra
        if (version := installed_version(item.name)) is None or not item.specifier.contains(version, prereleases=True)
    ]
    if missing:
        mend = f"sweeps that stop trials early hang without it; {SETUP}"
        return Check(name, "fail", f"packages are missing or too old: {', '.join(missing)}", mend)
    return Check(name, "ok", f"all {len(extra)} packages of ray[default] are there")


def check_uv() -> Check:
    """Look for uv, which installs the locked packages."""
    program = shutil.which("uv") or shutil.which("uv", path=str(PACKAGE_ROOT / ".uv" / "bin"))
    if program is None:
        return Check("uv", "warn", "not found: packages can be used, not renewed", "`make setup` gets it into .uv/")
    try:
        answer = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return Check("uv", "warn", f"does not run: {error}", "remove .uv and run `make setup`")
    return Check("uv", "ok", answer.stdout.strip())


def check_import_locations(working_folder: Path) -> Check:
    """Check that `models` and the others are Rayndom's, here and in Ray's workers, which look in the working folder first."""
    name = "imports"
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        origin = Path(spec.origin).resolve() if spec and spec.origin else None
        if origin != PACKAGE_ROOT / package / "__init__.py":
            found = f"`{package}` is imported from {origin.parent if origin else 'nowhere'}, not from {PACKAGE_ROOT}"
            return Check(name, "fail", found, "unset PYTHONPATH, uninstall the other package, or rename its folder")
    for package in PACKAGES:
        for shadow in (working_folder / package, working_folder / f"{package}.py"):
            if shadow.exists() and shadow.resolve() != PACKAGE_ROOT / package:
                found = f"{shadow} hides Rayndom's `{package}` from Ray's workers and from scripts started here"
                return Check(name, "warn", found, "start from another folder, or rename it")
    return Check(name, "ok", f"{', '.join(PACKAGES)} come from {PACKAGE_ROOT}")
