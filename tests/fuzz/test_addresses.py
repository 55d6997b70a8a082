"""Addresses that lead nowhere: of a home in a store, of a study, of a mirror, and where a folder should be. They are refused."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from tests.fuzz.command_line import SEED, complaint, rayndom

SCHEMES = (
    "s3", "gs", "abfs", "memory", "file", "local", "http", "zip", "tar", "dir", "reference", "filecache", "simplecache", "generic", "hdfs",
    "arrow_hdfs", "dbfs", "jupyter", "github", "git", "lakefs", "libarchive", "data", "foo", "S3", "", "1x", "é", "\udcff", "s3+x", "a b",
    "postgresql", "mysql+pymysql", "sqlite", "grpc", "journal", "redis", "oracle", "mssql+nowhere",
)  # fmt: skip
PLACES = (
    "", "/", "//", "///", "//x",
    "//x/y", "///x", "//[::1", "//user:secret@x/y", "//x/../..", "//x/\udcff", "//x/%00", "//x?y=1#z", "//x:y/z",
    "//x:99999999/y", "//x::file:///nowhere", "//\n", "// ", "//" + "x" * 3000, "////nowhere/x/y",
)  # fmt: skip
FEW, MANY = 60, 1500
LOOKING = (["status"], ["list", "runs"], ["clean"])
HANGS = ("http", "https", "github", "git", "lakefs", "webhdfs")
"""Stores that ask the network, which is not what is tested here, when only their name is known."""


@pytest.fixture(autouse=True)
def at_a_place_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("RAYNDOM_CACHE", str(tmp_path / "cache"))
    for name in ("RAYNDOM_STUDY", "MLFLOW_TRACKING_URI", "RAYNDOM_DATA_MIRROR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    report = SimpleNamespace(total_seconds=0.0, to_json=dict, rows=list)
    monkeypatch.setattr("orchestration.training.dry_run.dry_run", lambda experiment, workplace: report)


def addresses(seed: int, number: int) -> list[str]:
    rng = random.Random(seed)
    found = [f"{scheme}:{place}" for scheme in SCHEMES for place in PLACES]
    return rng.sample(found, min(number, len(found)))


def try_homes(seed: int, number: int) -> list[str]:
    rng, problems = random.Random(seed), []
    for address in addresses(seed, number):
        if "://" not in address or address.partition(":")[0] in HANGS:
            continue
        outcome = rayndom([*rng.choice(LOOKING), f"--home={address}"])
        problem = complaint(outcome, ["home"], refused=None, allowed=(0, 2, 3))
        if problem is None and "secret" in outcome.said:
            problem = "a password is printed"
        if problem:
            problems.append(f"{problem}: --home={address[:80]!r}: {outcome.error[:200]!r}")
    return problems


def try_studies(seed: int, number: int, folder) -> list[str]:
    problems = []
    for address in addresses(seed, number):
        outcome = rayndom(["sweep", "ctrw_bounds_digits", "--dry-run", f"--study={address}", "--home", str(folder / "home")])
        problem = complaint(outcome, ["study", "--study", "RAYNDOM_STUDY"], refused=None)
        if problem is None and "secret" in outcome.said:
            problem = "a password is printed"
        if problem:
            problems.append(f"{problem}: --study={address[:80]!r}: {outcome.error[:200]!r}")
    return problems


def test_homes(tmp_path):
    problems = try_homes(SEED + 70, FEW)
    assert not problems, "\n".join(problems)
    assert not list((tmp_path / "here").iterdir()), "nothing is made where an address seems to lead"


def test_studies(tmp_path):
    problems = try_studies(SEED + 71, FEW // 3, tmp_path)
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("place", ["//x", "// ", "//x /y", "//./x", "//localhost/x"])
@pytest.mark.parametrize("scheme", ["file", "FILE", "local"])
@pytest.mark.parametrize("command", LOOKING, ids=" ".join)
def test_a_file_address_names_the_path_from_the_root(tmp_path, scheme, place, command):
    """What follows the two slashes of `file://` is a machine: as a folder below this one it would be made here."""
    outcome = rayndom([*command, f"--home={scheme}:{place}"])
    assert outcome.code == 2, outcome.error
    assert "home" in outcome.error
    assert not list((tmp_path / "here").iterdir())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_addresses(tmp_path):
    problems = [*try_homes(SEED + 72, MANY), *try_studies(SEED + 73, MANY // 4, tmp_path)]
    assert not problems, "\n".join(problems)


def test_a_study_that_is_away_is_told_before_ray_starts(tmp_path, monkeypatch):
    def starts(*_: object, **__: object) -> None:
        raise AssertionError("Ray starts")

    monkeypatch.setattr("orchestration.training.cluster.connect", starts)
    monkeypatch.setattr("orchestration.sweeping.sweep.check_networks", lambda config, data_root, weights: None)
    for address in ("foo://x", "sqlite:////nowhere/at/all.db", "journal:/nowhere/at/all", "a\0b"):
        outcome = rayndom(["sweep", "ctrw_bounds_digits", "--num_trials=1", f"--study={address}", "--home", str(tmp_path / "home")], 60)
        assert complaint(outcome, ["study", "RAYNDOM_STUDY"], refused=True, allowed=(2, 3)) is None, (address, outcome.said)


@pytest.mark.parametrize("address", ["s3:/bucket/team", "s3://bucket/team", "hf:/owner/name", "models:/name", "file:///tmp/x"])
def test_an_address_is_no_folder(tmp_path, address):
    for words in (
        ["new", "defence", "my_noise", f"--to={address}"],
        ["data", f"--data-root={address}"],
        ["data", "get", "cifar10", f"--data-root={address}"],
        *([["status", f"--home={address}"]] if "://" not in address else []),
    ):
        outcome = rayndom(words)
        assert complaint(outcome, [address], refused=True) is None, (words, outcome.said)
    assert not list((tmp_path / "here").iterdir())


@pytest.mark.parametrize(
    "address", [":build", ":1", "x:", "x:y", "x:0", "x:99999999", "x" * 5000, "ray://", "ray://[::1", "ray://h:port", "a b:1", "x:1\n"]
)
def test_an_address_of_no_cluster(address):
    """Ray itself would wait for some of them for half a minute."""
    from models.errors import UserError
    from orchestration.training.cluster import connect

    with pytest.raises(UserError, match="--address") as refused:
        connect(address)
    assert len(str(refused.value)) < 1000
    outcome = rayndom(["logs", "nowhere", f"--address={address}"], 60)
    assert complaint(outcome, ["--address"], refused=True) is None, outcome.said


@pytest.mark.parametrize("mirror", ["foo", "foo://x", "http://", "http://[::1", "\n", "s3://x", "http://a b/", "\udcff", "//x"])
def test_a_mirror_that_is_none(tmp_path, monkeypatch, mirror):
    monkeypatch.setenv("RAYNDOM_DATA_MIRROR", mirror)
    outcome = rayndom(["data", "get", "fashion_mnist", "--data-root", str(tmp_path / "data")])
    assert complaint(outcome, ["RAYNDOM_DATA_MIRROR"], refused=True) is None, outcome.said
    assert outcome.seconds < 5, "nobody waits for an address that is none"


@pytest.mark.parametrize("place", ["/proc/nothing", "/dev/null/x", "~nobody_of_this_name/x", "a\0b", "x" * 300, "\udcff/" + "x" * 300])
def test_places_of_a_new_defence(place):
    outcome = rayndom(["new", "defence", "my_noise", f"--to={place}"])
    assert complaint(outcome, ["--to", place.split("/")[0][:20], "null byte"], refused=True, allowed=(2, 3)) is None, outcome.said


@pytest.mark.parametrize("content", [b"", b"x", b"\xff\n\xff", b"a\nb\nc", b"\n" * 9])
def test_a_lock_that_somebody_else_wrote_is_taken_over(tmp_path, content):
    from orchestration.storage import Storage

    held = Storage(f"file://{tmp_path / 'bucket'}", tmp_path / "copy").held(tmp_path / "copy" / "lock")
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket" / "lock.held").write_bytes(content)
    held.stale_s = 0.1
    assert held.take("me", 5) is None
    held.release()


def test_a_store_that_holds_a_pipe_is_read_without_it(tmp_path):
    import os

    bucket = tmp_path / "bucket"
    bucket.mkdir()
    os.mkfifo(bucket / "pipe")
    assert rayndom(["status", f"--home=file://{bucket}"]).code == 0
