"""Checks of what the machine gives: GPUs, processor, memory, shared memory, open files, disk, data sets."""

from __future__ import annotations

import importlib.util
import os
import resource
import tempfile
import warnings
from pathlib import Path

import psutil
import torch

from models.accelerator import accelerator
from models.errors import UserError
from orchestration.doctor.check import Check
from orchestration.environment import GIBIBYTE, cpu_features, cpu_model, gpus, memory_limit, usable_cores
from orchestration.home import Home
from orchestration.storage import Storage
from trainers.data.location import candidate_folders, data_root, locate
from trainers.data.sets import DATASETS, DatasetInfo

DISK_WARN_GIB = 10
DISK_FAIL_GIB = 1
RAY_FULL_DISK = 0.95
"""Ray stops storing objects on a disk that is fuller than this."""
SHARED_MEMORY_WARN_GIB = 1
MEMORY_WARN_GIB = 4
MEMORY_FAIL_GIB = 1
OPEN_FILES_WARN = 4096
GPU_FREE_WARN_GIB = 2

_DRIVER = Path("/proc/driver/nvidia/version")
_SHARED_MEMORY = Path("/dev/shm")


def check_machine(home: Home, store: Storage | None = None) -> list[Check]:
    """Return the findings on hardware and its limits."""
    return [
        check_gpus(),
        check_processor(cpu_features()),
        check_memory(),
        check_shared_memory(_SHARED_MEMORY),
        check_open_files(),
        check_home(home.root) if store is None else check_store(store),
        check_disk("disk of the home folder", home.root, "choose another with --home, or make room"),
        check_disk("disk of Ray's temporary files", ray_temporary_folder(), "set RAY_TMPDIR to a larger disk"),
    ]


def check_gpus() -> Check:
    """List the GPUs that PyTorch can use; say why it uses none where there is a driver."""
    name = "GPU"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if available:
        return _usable_gpus(name)
    if accelerator() is not None:  # of another maker
        return Check(name, "ok", ", ".join(device["name"] for device in gpus()))
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not _DRIVER.exists():
        return Check(name, "ok", "none: models train on the CPU")
    if hidden is not None and hidden.strip() in ("", "-1"):
        return Check(name, "warn", "hidden by CUDA_VISIBLE_DEVICES", "unset CUDA_VISIBLE_DEVICES")
    if torch.version.cuda is None:
        found = f"a driver is here, but torch {torch.__version__} was built without CUDA"
        return Check(name, "warn", found, "run `make setup`: the locked torch has CUDA")
    reason = str(caught[0].message).splitlines()[0] if caught else "PyTorch sees no usable device"
    mend = f"compare `nvidia-smi` with CUDA {torch.version.cuda}, which torch needs; update the driver"
    return Check(name, "fail", f"a driver is here, but: {reason}", mend)


def _usable_gpus(name: str) -> Check:
    try:
        devices = gpus()
        free = [torch.cuda.mem_get_info(index)[0] / GIBIBYTE for index in range(len(devices))]
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        return Check(name, "fail", f"cannot be used: {reason}", "look at `nvidia-smi`: another program may hold it")
    lines = [
        f"{device['name']} ({available:.0f} of {device['memory_gib']:.0f} GiB free)"
        for device, available in zip(devices, free, strict=True)
    ]
    found = f"{len(devices)}: {', '.join(lines)}; CUDA {torch.version.cuda}"
    if min(free) < GPU_FREE_WARN_GIB:
        return Check(name, "warn", found, "another program fills a GPU (`nvidia-smi` names it)")
    return Check(name, "ok", found)


def check_processor(features: list[str]) -> Check:
    """Describe the processor and whether it computes bf16 natively."""
    bf16 = [feature for feature in ("amx_bf16", "avx512_bf16", "bf16") if feature in features]
    note = f"bf16 by {' and '.join(bf16)}" if bf16 else "no bf16 instructions: training on it stays in float32"
    return Check("processor", "ok", f"{cpu_model()}, {usable_cores()} cores, {note}")


def check_memory() -> Check:
    """Compare what is free with what a small run needs."""
    limit = memory_limit() / GIBIBYTE
    free = min(psutil.virtual_memory().available / GIBIBYTE, limit)
    found = f"{free:.1f} of {limit:.1f} GiB free"
    if free < MEMORY_WARN_GIB:
        return Check("memory", "fail" if free < MEMORY_FAIL_GIB else "warn", found, "close other programs, or run fewer trials at a time")
    return Check("memory", "ok", found)


def check_shared_memory(folder: Path) -> Check:
    """Check the shared memory that Ray's object store and data loading processes live in."""
    name = "shared memory"
    if not folder.is_dir():
        return Check(name, "ok", "this system has no /dev/shm")
    size = psutil.disk_usage(str(folder)).total / GIBIBYTE
    if size < SHARED_MEMORY_WARN_GIB:
        mend = "start the container with --shm-size=8g; Ray falls back to files, and data loading can crash"
        return Check(name, "warn", f"{size:.2f} GiB", mend)
    return Check(name, "ok", f"{size:.1f} GiB")


def check_open_files() -> Check:
    """Check the limit on open files; each Ray worker and each connection takes some."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = soft == resource.RLIM_INFINITY
    found = "no limit" if unlimited else str(soft)
    if not unlimited and soft < OPEN_FILES_WARN:
        reachable = hard == resource.RLIM_INFINITY or hard >= 65536
        mend = "`ulimit -n 65536`" if reachable else "raise the hard limit (limits.conf, or the container's --ulimit)"
        return Check("open files", "warn", f"at most {found}", f"{mend} before Ray starts on this machine")
    return Check("open files", "ok", f"at most {found}" if not unlimited else found)


def check_home(root: Path) -> Check:
    """Check that the home folder can be written, and that its SQLite files do not lie on a network disk."""
    name = "home folder"
    existing = nearest_existing(root)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return Check(name, "fail", f"{existing} cannot be written", "choose another with --home or RAYNDOM_HOME")
    kind = filesystem_kind(existing)
    if is_network(kind):
        mend = (
            "fine while only one machine writes there; else set MLFLOW_TRACKING_URI to an MLflow server, because SQLite's locks "
            "do not hold on network disks"
        )
        return Check(name, "warn", f"{root} lies on a network disk ({kind})", mend)
    return Check(name, "ok", f"{root}" if root.exists() else f"{root} (made when needed)")


def check_store(store: Storage) -> Check:
    """Check that the object store of a home takes what is written to it, and that its copy here can be written."""
    name = "home folder"
    try:
        store.check(writable=True)
    except UserError as error:
        return Check(name, "fail", str(error), "name another with --home or RAYNDOM_HOME, or give this machine access to it")
    copy = check_home(store.root)
    return copy if copy.status == "fail" else Check(name, "ok", f"{store.url}, its copy here in {store.root}")


def check_disk(name: str, folder: Path, mend: str) -> Check:
    """Check the room on the disk of a folder, which need not exist yet."""
    existing = nearest_existing(folder)
    try:
        usage = psutil.disk_usage(str(existing))
    except OSError as error:
        return Check(name, "fail", f"{existing}: {error.strerror}", mend)
    free = usage.free / GIBIBYTE
    found = f"{free:.1f} GiB free at {folder}"
    if free < DISK_FAIL_GIB:
        return Check(name, "fail", found, mend)
    if free < DISK_WARN_GIB:
        return Check(name, "warn", found, mend)
    if usage.used / max(1, usage.used + usage.free) > RAY_FULL_DISK:
        return Check(name, "warn", f"{found}, but over {RAY_FULL_DISK:.0%} full: Ray stores nothing there", mend)
    return Check(name, "ok", found)


def ray_temporary_folder() -> Path:
    """Return where Ray keeps sockets, logs and objects that do not fit into memory."""
    return Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / "ray"


def nearest_existing(folder: Path) -> Path:
    """Return the folder itself, or the closest one above it that exists."""
    for candidate in (folder, *folder.parents):
        if candidate.exists():
            return candidate
    return Path(folder.anchor or ".")


def filesystem_kind(folder: Path) -> str:
    """Return the name of the file system that holds an existing folder, e.g. `ext4`; empty where unknown."""
    resolved = folder.resolve()
    best, kind = -1, ""
    for partition in psutil.disk_partitions(all=True):
        mount = Path(partition.mountpoint)
        if resolved.is_relative_to(mount) and len(mount.parts) >= best:
            best, kind = len(mount.parts), partition.fstype
    return kind


def is_network(kind: str) -> bool:
    """Return whether a file system is shared over the network."""
    return kind.startswith(("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "fuse.", "9p", "afs"))


def check_datasets(root: Path | None) -> list[Check]:
    """Return one finding for each data set that Rayndom knows by name. Nothing is read or unpacked."""
    folder = data_root(root)
    return [check_dataset(info, folder) for info in DATASETS.values() if not info.needs_folder]


def check_dataset(info: DatasetInfo, root: Path) -> Check:
    """Look for the files of one data set below the data root and where system packages put them."""
    name = f"data set {info.name}"
    if not info.files:
        if importlib.util.find_spec("sklearn") is None:
            return Check(name, "fail", "scikit-learn, which brings it, is not installed", "run `make setup`")
        return Check(name, "ok", "inside scikit-learn")
    try:
        return Check(name, "ok", str(locate(info, root)))
    except UserError:
        searched = ", ".join(str(folder) for folder in candidate_folders(info, root))
        return Check(name, "warn", f"not in {searched}", info.how_to_obtain.format(root=root))
