"""`rayndom data get`: from a server on this machine, with a connection that breaks, a wrong file and no server."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import tarfile
import threading
import zipfile

import pytest

from models.errors import EnvironmentProblem, UserError
from orchestration.cli import main
from trainers.data import download as module
from trainers.data.download import MIRROR_VARIABLE, PUBLISHED, Published, download


class _Server(http.server.ThreadingHTTPServer):
    """Serves `files` from memory; `breaks`: how many answers end in the middle; `ranges`: whether parts are sent."""

    def __init__(self):
        self.files, self.breaks, self.ranges, self.asked = {}, 0, True, []
        super().__init__(("127.0.0.1", 0), _Handler)


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, content = self.server, self.server.files.get(self.path.lstrip("/"))
        asked = self.headers.get("Range")
        server.asked.append((self.path.lstrip("/"), asked))
        if content is None:
            self.send_error(404)
            return
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and server.ranges else 0
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        rest = content[start:]
        if server.breaks:
            server.breaks -= 1
            self.wfile.write(rest[: len(rest) // 2])
            self.close_connection = True
            return
        self.wfile.write(rest)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(module, "_PAUSE_S", 0.0)
    with _Server() as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        monkeypatch.setenv(MIRROR_VARIABLE, f"http://127.0.0.1:{running.server_port}/")
        yield running
        running.shutdown()


def tar_of(folder, **files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as packed:
        for name, text in files.items():
            entry = tarfile.TarInfo(f"{folder}/{name}")
            entry.size = len(text)
            packed.addfile(entry, io.BytesIO(text.encode()))
    return buffer.getvalue()


def zip_of(folder, **files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        for name, text in files.items():
            packed.writestr(f"{folder}/{name}", text)
    return buffer.getvalue()


def publish(monkeypatch, server, name, content, to=".", holds=None, file="set.tar.gz"):
    server.files[file] = content
    md5 = hashlib.md5(content).hexdigest()
    monkeypatch.setitem(PUBLISHED, name, (Published(f"http://authors.invalid/{file}", md5, to, holds),))


@pytest.mark.parametrize(("pack", "file"), [(tar_of, "set.tar.gz"), (zip_of, "set.zip")])
@pytest.mark.parametrize("ranges", [True, False])
def test_an_archive_arrives_whole_although_the_connection_breaks(monkeypatch, server, tmp_path, pack, file, ranges):
    publish(monkeypatch, server, "cifar10", pack("made", a="x" * 5000, b="y"), holds="made", file=file)
    server.breaks, server.ranges = 2, ranges
    seen = []
    (found,) = download("cifar10", tmp_path, lambda name, done, total: seen.append((done, total)))
    assert {path.name: path.read_text() for path in found.iterdir()} == {"a": "x" * 5000, "b": "y"}
    assert [path.name for path in tmp_path.iterdir()] == ["made"], "nothing but the data set is left"
    assert len(server.asked) == 3
    assert any(asked for _, asked in server.asked), "what was there is not asked for again"
    assert seen[-1][0] == seen[-1][1] == len(server.files[file])
    asked = len(server.asked)
    download("cifar10", tmp_path)
    assert len(server.asked) == asked, "what is there is not fetched again"


def test_a_wrong_file_is_deleted_and_named_and_the_next_try_begins_anew(monkeypatch, server, tmp_path):
    content = b"the real thing" * 100
    publish(monkeypatch, server, "svhn", content, to="svhn", file="train.mat")
    server.files["train.mat"] = content[:-1] + b"!"
    with pytest.raises(UserError, match=r"not what was published.*deleted"):
        download("svhn", tmp_path)
    assert list((tmp_path / "svhn").iterdir()) == []
    server.files["train.mat"] = content
    assert [path.read_bytes() for path in download("svhn", tmp_path)] == [content]


def test_what_came_before_the_server_went_away_is_used_by_the_next_start(monkeypatch, server, tmp_path):
    content = bytes(range(256)) * 40
    publish(monkeypatch, server, "svhn", content, to="svhn", file="train.mat")
    server.breaks = 1000
    with pytest.raises(EnvironmentProblem, match=r"connection ended.*goes on from there"):
        download("svhn", tmp_path)
    kept = (tmp_path / "svhn" / ".train.mat.part").stat().st_size
    assert 0 < kept < len(content)
    server.breaks = 0
    server.asked.clear()
    assert download("svhn", tmp_path)[0].read_bytes() == content
    assert server.asked == [("train.mat", f"bytes={kept}-")]


def test_the_command_says_where_and_how_and_its_mistakes(monkeypatch, server, tmp_path, capsys):
    where = ["--data-root", str(tmp_path / "data"), "--home", str(tmp_path / "home")]
    publish(monkeypatch, server, "cifar10", tar_of("cifar-10-batches-py", **{"data_batch_1": "z"}), holds="cifar-10-batches-py")
    assert main(["data", "get", "cifar10", "--json", *where]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == [str(tmp_path / "data" / "cifar-10-batches-py")]
    assert main(["data", "--json", *where]) == 0
    listed = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert listed["digits"]["place"] and listed["svhn"] == listed["svhn"] | {"place": None, "can_be_fetched": True}
    server.files.clear()
    for words, code, said in (
        (["data", "get", "cifar1"], 2, "cifar10"),
        (["data", "get", "imagenet"], 2, "devkit"),
        (["data", "get"], 2, "rayndom data get NAME"),
        (["data", "get", "tiny_imagenet"], 3, "404"),
        (["train", "at_cifar100_resnet18", "--resources.gpus_per_worker", "0"], 2, "rayndom data get cifar100"),
    ):
        assert main([*words, *where]) == code, words
        assert said in capsys.readouterr().err


def test_the_checksums_are_those_of_torchvision():
    from torchvision import datasets

    known = {datasets.CIFAR10.tgz_md5, datasets.CIFAR100.tgz_md5, *(each[2] for each in datasets.SVHN.split_list.values())}
    known |= {md5 for _, md5 in datasets.FashionMNIST.resources} | {"90528d7ca1a48142e341f4ef8d21d0de"}
    assert {file.md5 for files in PUBLISHED.values() for file in files} <= known
