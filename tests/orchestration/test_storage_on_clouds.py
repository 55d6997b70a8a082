"""Homes at s3://, gs:// and abfs://, each against a server of its protocol on the loopback: copies, newer versions, locks, removal."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestration.storage import SMALL_BYTES, Storage
from tests.orchestration.services import Service, answers, free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
AZURITE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="  # in Azurite's documentation


def s3(port: int, folder: Path) -> tuple[list[str], dict[str, str]]:
    """moto."""
    names = {"AWS_ACCESS_KEY_ID": "rayndom", "AWS_SECRET_ACCESS_KEY": "none", "AWS_DEFAULT_REGION": "us-east-1"}
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    return command, names | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}


def gs(port: int, folder: Path) -> tuple[list[str], dict[str, str]]:
    """fake-gcs-server; others leave out the precondition that a lock rests on."""
    address = f"http://127.0.0.1:{port}"
    where = ["-host", "127.0.0.1", "-port", str(port), "-public-host", f"127.0.0.1:{port}", "-external-url", address]
    command = ["fake-gcs-server", "-backend", "memory", "-scheme", "http", *where]
    return command, {"STORAGE_EMULATOR_HOST": address, "GOOGLE_CLOUD_PROJECT": "rayndom"}


def abfs(port: int, folder: Path) -> tuple[list[str], dict[str, str]]:
    """Azurite."""
    command = ["azurite-blob", "--blobHost", "127.0.0.1", "--blobPort", str(port), "--location", str(folder), "--skipApiVersionCheck"]
    place = f"http://127.0.0.1:{port}/devstoreaccount1"
    connection = f"DefaultEndpointsProtocol=http;AccountName=devstoreaccount1;AccountKey={AZURITE_KEY};BlobEndpoint={place};"
    return command, {"AZURE_STORAGE_CONNECTION_STRING": connection}


NEEDS = {"s3": (s3, ("moto", "s3fs"), None), "gs": (gs, ("gcsfs",), "fake-gcs-server"), "abfs": (abfs, ("adlfs",), "azurite-blob")}


@pytest.fixture(params=NEEDS)
def url(request, tmp_path, monkeypatch) -> Iterator[str]:
    """URL of a home in an empty bucket."""
    serve, packages, program = NEEDS[request.param]
    lacking = [name for name in packages if importlib.util.find_spec(name) is None]
    if lacking or (program and not shutil.which(program)):
        pytest.skip(f"not here: {', '.join([*lacking, program or ''])}")
    port = free_port()
    command, variables = serve(port, tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with Service(command, tmp_path / "log", lambda: answers(f"http://127.0.0.1:{port}")):
        import fsspec

        files = fsspec.core.url_to_fs(f"{request.param}://team", skip_instance_cache=True)[0]
        files.clear_instance_cache()
        files.mkdir("team")
        yield f"{request.param}://team/homes/one"
        files.clear_instance_cache()


def tree(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_home_in_a_bucket_is_copied_renewed_held_and_removed(url, tmp_path):
    here, there = Storage(url, tmp_path / "here"), Storage(url, tmp_path / "there")
    here.check(writable=True)
    for name in ("runs/a/config.json", "runs/a/model/model.safetensors", "runs/a/result.json"):
        (here.root / name).parent.mkdir(parents=True, exist_ok=True)
        (here.root / name).write_text(name)
    (here.root / "large").write_bytes(os.urandom(9 * SMALL_BYTES))
    here.push(here.root)
    there.pull(there.root, largest=SMALL_BYTES)
    assert sorted(tree(there.root)) == ["runs/a/config.json", "runs/a/model/model.safetensors", "runs/a/result.json"]
    there.pull(there.root)
    assert tree(there.root) == tree(here.root)
    for turn in range(5):  # faster than a second each
        (there.root / "runs/a/config.json").write_text(f"turn {turn}")
        there.push(there.root)
        here.push(here.root)
        here.pull(here.root)
        assert (here.root / "runs/a/config.json").read_text() == f"turn {turn}"
    contenders = [here.held(here.root / "lock") for _ in range(6)]
    taken: list[int] = []
    threads = [
        threading.Thread(target=lambda index=index: taken.append(index) if contenders[index].try_to_take("me") else None)
        for index in range(len(contenders))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1
    assert there.held(there.root / "lock").look()[2] == "me"
    contenders[taken[0]].release()
    assert there.held(there.root / "lock").try_to_take("another")
    here.remove(here.root / "runs")
    third = Storage(url, tmp_path / "third")
    third.pull(third.root)
    assert sorted(tree(third.root)) == ["large"]
