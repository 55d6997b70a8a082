"""The cluster files fit Ray's schema and each other, and docs/cluster.md names only what exists. No cloud is asked."""

from __future__ import annotations

import copy
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
AWS = ROOT / "ray_cluster.yaml"
ON_PREMISES = ROOT / "docs" / "cluster" / "on_premises.yaml"
KUBERAY = ROOT / "docs" / "cluster" / "kuberay_rayjob.yaml"
GUIDE = ROOT / "docs" / "cluster.md"
COMMAND_LISTS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)

NFS = "nfs_"
"""Begins the names of the variants of files whose home is in a bucket."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The files by name, and the variants with a shared folder, made as the head of each file says."""
    found = {"aws": AWS, "on_premises": ON_PREMISES, "kuberay": KUBERAY}
    for name in ("aws", "kuberay"):
        (command,) = re.findall(r"sed (-e .*) > ", found[name].read_text())
        variant = tmp_path_factory.mktemp("nfs") / f"{name}.yaml"
        variant.write_text(subprocess.run(["sed", *shlex.split(command)], cwd=ROOT, capture_output=True, text=True, check=True).stdout)
        found[NFS + name] = variant
    return found


@pytest.fixture
def path(request: pytest.FixtureRequest, files: dict[str, Path]) -> Path:
    return files[request.param]


launched = pytest.mark.parametrize("path", ["aws", "nfs_aws", "on_premises"], indirect=True)
every_file = pytest.mark.parametrize("path", ["aws", "nfs_aws", "on_premises", "kuberay", "nfs_kuberay"], indirect=True)


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def validate(config: dict[str, Any]) -> dict[str, Any]:
    """Validate as `ray up` does; the raw file alone does not fit the schema."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def shell_lines(config: dict[str, Any]) -> list[str]:
    return [line for name in COMMAND_LISTS for line in config.get(name) or ()]


# Ray's cluster launcher


@launched
def test_ray_accepts_the_file(path: Path) -> None:
    prepared = validate(read(path))
    assert prepared["head_node_type"] in prepared["available_node_types"]


@launched
def test_ray_would_refuse_a_misspelled_key(path: Path) -> None:
    import jsonschema

    with pytest.raises(jsonschema.ValidationError, match="setup_comands"):
        validate(read(path) | {"setup_comands": []})


@launched
def test_every_shell_line_parses(path: Path) -> None:
    for line in shell_lines(read(path)):
        finished = subprocess.run(["bash", "-n", "-c", f"({line})"], capture_output=True, text=True)
        assert finished.returncode == 0, f"{line}\n{finished.stderr}"


@launched
def test_nodes_install_the_lock_and_are_examined_before_ray_starts(path: Path) -> None:
    config = read(path)
    assert any("make setup" in line for line in config["setup_commands"])
    for name in ("head", "worker"):
        lines = config[f"{name}_setup_commands"] + config[f"{name}_start_ray_commands"]
        doctor = next(index for index, line in enumerate(lines) if "rayndom doctor" in line)
        start = next(index for index, line in enumerate(lines) if "ray start" in line)
        assert doctor < start


def environment_of(config: dict[str, Any]) -> dict[str, str]:
    """The variables of `rayndom.env` as a shell on a node has them."""
    lines = shell_lines(config)
    (block,) = [line for line in lines if "rayndom.env <<" in line]
    exports = "\n".join(block.splitlines()[1:-1])
    shown = subprocess.run(["bash", "-c", f"{exports}\nenv -0"], capture_output=True, text=True, check=True, env={}).stdout
    return dict(variable.split("=", 1) for variable in shown.split("\0") if variable)


@pytest.mark.parametrize("path", ["nfs_aws", "on_premises"], indirect=True)
def test_a_shared_folder_is_exported_by_the_head_and_mounted_by_workers_before_they_join(path: Path) -> None:
    config = read(path)
    lines, environment = shell_lines(config), environment_of(config)
    shared = environment["RAYNDOM_HOME"].removesuffix("/home")
    assert environment["RAYNDOM_DATA"] == f"{shared}/data"
    assert any(line.startswith("echo") and shared in line and "exports" in line for line in lines)
    assert any("nfs-kernel-server" in line for line in config["head_setup_commands"])
    assert any("nfs-common" in line for line in config["setup_commands"])
    starts = config["worker_start_ray_commands"]
    mount = next(n for n, line in enumerate(starts) if "mount -t nfs4" in line and f"$RAY_HEAD_IP:{shared} {shared}" in line)
    assert mount < next(n for n, line in enumerate(starts) if "rayndom doctor" in line)
    assert "s3" not in str(shell_lines(config)) and "IamInstanceProfile" not in str(config)


@pytest.mark.parametrize("name", ["aws", "kuberay"])
def test_by_default_nodes_share_a_bucket_and_no_disk(name: str, files: dict[str, Path]) -> None:
    import orchestration.storage

    text = "\n".join(line for line in files[name].read_text().splitlines() if not line.strip().startswith("#"))
    assert not re.search(r"nfs|mount -t|ReadWriteMany|persistentVolumeClaim", text)
    homes = set(re.findall(r"RAYNDOM_HOME(?:=|, value: )([^\s}]+)", text))
    assert len(homes) == 1 and orchestration.storage.is_url(homes.pop())
    if name == "aws":
        config = read(files[name])
        assert any("EXTRAS=server,storage" in line for line in config["setup_commands"])
        assert all("IamInstanceProfile" in each["node_config"] for each in config["available_node_types"].values())
    else:
        image = (ROOT / "docs" / "cluster" / "Dockerfile").read_text()
        assert re.search(r"make setup EXTRAS=\S*storage", image)


@launched
def test_nodes_have_the_token(path: Path) -> None:
    config = read(path)
    lines = shell_lines(config)
    assert environment_of(config)["RAY_AUTH_MODE"] == "token"
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert all(". ~/rayndom.env" in line for line in lines if "ray start" in line)


@launched
def test_the_code_travels_as_make_prepares_it(path: Path) -> None:
    assert read(path)["file_mounts"]["~/rayndom_code"] == ".cluster/code"


def test_gpu_workers_are_spot_machines_that_come_and_go() -> None:
    config = read(AWS)
    head, worker = (config["available_node_types"][name] for name in ("head", "gpu_worker"))
    assert config["provider"]["type"] == "aws"
    assert worker["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert worker["resources"]["GPU"] >= 1
    assert worker["min_workers"] < worker["max_workers"] <= config["max_workers"]
    assert head["max_workers"] == 0
    assert "GPU" not in head["resources"]
    assert worker["node_config"]["ImageId"] == head["node_config"]["ImageId"]


def test_on_premises_workers_are_all_started() -> None:
    config = read(ON_PREMISES)
    assert config["provider"]["type"] == "local"
    assert config["min_workers"] == config["max_workers"] == len(config["provider"]["worker_ips"])


@every_file
def test_no_secret_is_in_the_file(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"AKIA[0-9A-Z]{16}|-----BEGIN|(password|secret|token)\s*[:=]\s*['\"]?[0-9a-zA-Z/+]{16,}", text, re.I)


# KubeRay


@pytest.mark.parametrize("path", ["kuberay", "nfs_kuberay"], indirect=True)
def test_the_ray_job_has_what_kuberay_asks_for(path: Path) -> None:
    *_, job = yaml.safe_load_all(path.read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert job["spec"]["entrypoint"].startswith("rayndom ")
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["authOptions"]["mode"] == "token"
    assert cluster["headGroupSpec"]["template"]["spec"]["containers"]
    (group,) = cluster["workerGroupSpecs"]
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    (container,) = group["template"]["spec"]["containers"]
    assert int(container["resources"]["limits"]["nvidia.com/gpu"]) >= 1
    assert "nvidia.com/gpu" not in cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["resources"]["limits"]


def test_the_ray_job_names_the_ray_of_the_lock() -> None:
    job = yaml.safe_load(KUBERAY.read_text())
    locked = re.search(r"^ray==(\S+)", (ROOT / "requirements.lock").read_text(), re.M)[1]
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == locked


def test_with_a_volume_all_pods_share_the_home_folder(files: dict[str, Path]) -> None:
    volume, job = yaml.safe_load_all(files["nfs_kuberay"].read_text())
    assert volume["spec"]["accessModes"] == ["ReadWriteMany"]
    cluster = job["spec"]["rayClusterSpec"]
    for template in (cluster["headGroupSpec"]["template"], cluster["workerGroupSpecs"][0]["template"]):
        claims = {
            item["name"]: item["persistentVolumeClaim"]["claimName"]
            for item in template["spec"]["volumes"]
            if "persistentVolumeClaim" in item
        }
        (container,) = template["spec"]["containers"]
        home = next(item["value"] for item in container["env"] if item["name"] == "RAYNDOM_HOME")
        mounts = {item["mountPath"]: claims.get(item["name"]) for item in container["volumeMounts"]}
        assert any(home.startswith(f"{folder}/") and claim == volume["metadata"]["name"] for folder, claim in mounts.items())


@pytest.mark.parametrize("file", [AWS, ON_PREMISES, ROOT / "docs" / "cluster" / "Dockerfile", GUIDE], ids=lambda file: file.name)
def test_extras_that_are_installed_exist(file: Path) -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {extra for extras in re.findall(r"EXTRAS=([\w,]+)", file.read_text()) for extra in extras.split(",")}
    assert named <= set(known)


# What is sent to a cluster


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A small checkout with this Makefile, changed since its commit, whose origin holds a password."""
    root = tmp_path / "checkout"
    (root / "models").mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", root)
    (root / "models" / "kept.py").write_text("value = 1\n")
    (root / "models" / "old.py").write_text("old = True\n")
    (root / ".gitignore").write_text("*.log\n")
    git(root, "init", "--quiet")
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "first")
    git(root, "remote", "add", "origin", "https://someone:correct-horse@example.org/rayndom")
    (root / "models" / "kept.py").write_text("value = 2\n")
    (root / "models" / "old.py").unlink()
    (root / "models" / "new.py").write_text("new = True\n")
    (root / "run.log").write_text("noise\n")
    return root


def cluster_code(root: Path) -> str:
    return subprocess.run(["make", "cluster-code"], cwd=root, capture_output=True, text=True, check=True).stdout


needs_make = pytest.mark.skipif(shutil.which("make") is None or shutil.which("git") is None, reason="needs make and git")


@needs_make
def test_the_code_is_sent_as_it_is_now_with_its_commit(checkout: Path) -> None:
    cluster_code(checkout)
    sent = checkout / ".cluster" / "code"
    assert (sent / "models" / "kept.py").read_text() == "value = 2\n"
    assert sorted(file.name for file in (sent / "models").iterdir()) == ["kept.py", "new.py"]
    assert not (sent / "run.log").exists()
    assert git(sent, "rev-parse", "HEAD") == git(checkout, "rev-parse", "HEAD")
    assert git(sent, "status", "--porcelain") == git(checkout, "status", "--porcelain")


@needs_make
def test_the_origins_password_is_not_sent(checkout: Path) -> None:
    cluster_code(checkout)
    files = [file for file in (checkout / ".cluster" / "code").rglob("*") if file.is_file()]
    assert not any(b"correct-horse" in file.read_bytes() for file in files)


@needs_make
def test_code_that_did_not_change_is_not_renewed_because_ray_would_restart(checkout: Path) -> None:
    assert "is in .cluster/code" in cluster_code(checkout)
    assert "is in .cluster/code" not in cluster_code(checkout)
    (checkout / "models" / "new.py").write_text("new = False\n")
    assert "is in .cluster/code" in cluster_code(checkout)
    assert (checkout / ".cluster" / "code" / "models" / "new.py").read_text() == "new = False\n"


def test_ray_uploads_our_code_and_not_our_data() -> None:
    from ray._private.runtime_env.packaging import _get_ignore_file

    ignored = _get_ignore_file(ROOT, ignore_file=".rayignore")
    for name in ("data/cifar10", ".venv/bin/python", "rayndom_home/mlflow.db", ".cluster/code/models", "model.safetensors"):
        assert ignored(ROOT / name), name
    for name in ("trainers/data/sets.py", "models/weights.py", "orchestration/recipes/methods/at.yaml", "requirements.lock"):
        assert not ignored(ROOT / name), name


# The guide


def test_the_guide_names_make_targets_and_commands_that_exist() -> None:
    from orchestration.commands import COMMANDS

    text = GUIDE.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    used = set(re.findall(r"(?:^|`|&& )make ([a-z-]+)", text, re.M))
    assert {"setup", "cluster-up"} <= used <= targets
    code = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", text, re.S))
    commands = set(re.findall(r"(?:[ `']|bin/)rayndom ([a-z]+)(?=[ `'\n])", code))
    assert {"sweep", "doctor"} <= commands <= {command.name for command in COMMANDS}


def test_the_guides_sweep_is_valid(tmp_path: Path) -> None:
    from orchestration.sweeping.loading import load_sweep

    (block,) = re.findall(r"```yaml\n(.*?)```", GUIDE.read_text(), re.S)
    (tmp_path / "cifar10_bounds.yaml").write_text(block)
    sweep = load_sweep(str(tmp_path / "cifar10_bounds.yaml"))
    assert sweep.experiment({}).resources.gpus_per_worker == 1
