"""Models to and from the Hugging Face hub, against a small hub on this machine, and without one."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import subprocess
import sys
import threading
import urllib.parse

import pytest
import yaml

from models.weights import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE
from orchestration.cli import main
from orchestration.trained_models import hub
from tests.orchestration.finished_runs import finish
from tests.orchestration.sweep_process import ROOT

SHA = "a" * 40


class Hub(http.server.ThreadingHTTPServer):
    """What `huggingface_hub` asks of a hub to make, fill and read one repository."""

    def __init__(self):
        self.files, self.made, self.refuses = {}, set(), False
        super().__init__(("127.0.0.1", 0), _Handler)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, content, status=200, headers=None):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self):
        self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository Not Found"})

    def do_POST(self):
        text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urllib.parse.urlsplit(self.path).path
        if self.server.refuses:
            self.answer({"error": "no"}, 403)
        elif path == "/api/repos/create":
            asked = json.loads(text)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self.server.made.add(name)
            self.answer({"url": f"http://127.0.0.1/{name}", "name": name})
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in json.loads(text)["files"]]
            self.answer({"files": files})
        elif "/commit/" in path:
            for line in text.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self.answer({"success": True, "commitOid": SHA, "commitUrl": f"http://127.0.0.1/me/mine/commit/{SHA}"})
        else:
            self.missing()

    def do_GET(self):
        path = urllib.parse.urlsplit(self.path).path
        if path.startswith("/api/models/me/mine/tree/") and self.server.files:
            entries = self.server.files.items()
            self.answer([{"type": "file", "path": name, "size": len(content), "oid": SHA} for name, content in entries])
            return
        if path.startswith("/api/models/me/mine") and self.server.files:
            siblings = [{"rfilename": name} for name in self.server.files]
            self.answer({"id": "me/mine", "modelId": "me/mine", "sha": SHA, "siblings": siblings, "private": False, "tags": []})
            return
        name = path.rpartition("/")[2]
        if path.startswith("/me/mine/resolve/") and name in self.server.files:
            content = self.server.files[name]
            digest = hashlib.sha256(content).hexdigest()
            self.answer(content, headers={"ETag": f'"{digest}"', "X-Repo-Commit": SHA, "Content-Type": "application/octet-stream"})
            return
        self.missing()

    do_HEAD = do_GET

    def log_message(self, *arguments):
        pass


@pytest.fixture
def running():
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def rayndom(running, home, cache, *words):
    """Run a command as a process of its own: the library reads its endpoint when it is imported."""
    environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{running.server_port}",
        "HF_HOME": str(cache),
        "HF_TOKEN": "hf_of_a_test",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(ROOT),
        "PATH": "/usr/bin:/bin",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "orchestration.cli", *words, "--home", str(home.root)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=home.root)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_model_goes_to_the_hub_and_comes_back_and_stays_when_the_hub_is_away(home, running, tmp_path):
    experiment = finish(home, "ctrw_digits", kind="run", weights_seed=4)
    model = home.run(experiment.fingerprint) / "model"
    content = json.loads((model / CONFIG_FILE).read_text())
    content["details"]["evaluation"] = {
        "suite": "quick", "finished": True, "marked": True, "basis": "invalid: C9 failed", "rows": [], "verdicts": [], "markdown": "x",
        "headline": {"accuracy": 0.42, "low": 0.3, "high": 0.5, "num_samples": 50, "num_draws": 10},
        "settings": {"data": {"name": "digits"}, "threat_model": {"norm": "linf", "epsilon": 0.1}}, "remarks": [],
    }  # fmt: skip
    (model / CONFIG_FILE).write_text(json.dumps(content))
    done = rayndom(running, home, tmp_path / "cache", "export", experiment.fingerprint, "--to", "hf://me/mine", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["address"] == f"hf://me/mine@{SHA}"
    assert set(running.files) == {WEIGHTS_FILE, CONFIG_FILE, CARD_FILE} and running.made == {"me/mine"}
    assert running.files[WEIGHTS_FILE] == (model / WEIGHTS_FILE).read_bytes()
    card = yaml.safe_load(running.files[CARD_FILE].decode().split("---\n")[1])
    ((result,),) = [each["results"] for each in card["model-index"]]
    (metric,) = result["metrics"]
    assert metric["value"] == 0.42 and metric["args"]["marked"] is True and metric["args"]["high"] == 0.5
    assert "do not quote" in metric["name"] and result["dataset"]["name"] == "digits"

    words = ("export", "hf://me/mine", "--to", str(tmp_path / "back"))
    done = rayndom(running, home, tmp_path / "other cache", *words)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "back" / WEIGHTS_FILE).read_bytes() == running.files[WEIGHTS_FILE]
    running.shutdown()
    running.server_close()
    done = rayndom(running, home, tmp_path / "other cache", *words)
    assert done.returncode == 0, done.stderr
    done = rayndom(running, home, tmp_path / "empty cache", *words)
    assert done.returncode == 3 and done.stderr.count("error:") == 1, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_the_hub_refuses_is_one_sentence(home, running, tmp_path):
    experiment = finish(home, "at_digits", kind="run")
    running.refuses = True
    done = rayndom(running, home, tmp_path / "cache", "export", experiment.fingerprint, "--to", "hf://me/mine")
    assert done.returncode == 2 and "HF_TOKEN" in done.stderr and "hf_of_a_test" not in done.stderr
    running.refuses = False
    done = rayndom(running, home, tmp_path / "cache", "evaluate", "hf://me/nothing")
    assert done.returncode in (2, 3) and "hf://me/nothing" in done.stderr and done.stderr.count("error:") == 1, done.stderr
    running.files = {"pytorch_model.bin": b"a pickle"}
    done = rayndom(running, home, tmp_path / "cache", "evaluate", "hf://me/mine")
    assert done.returncode == 2 and WEIGHTS_FILE in done.stderr
    assert not list((tmp_path / "cache").rglob("*.bin")), "what is not ours is not even fetched"


@pytest.mark.parametrize("address", ["hf://", "hf://one", "hf://a/b/c", "hf://a b/c", "hf://../x/y", "hf://a/b@", "hf://-a/b"])
def test_what_is_no_address_is_refused_before_anything_is_asked(home, tmp_path, capsys, address, monkeypatch):
    monkeypatch.setattr(hub, "hub_library", lambda: pytest.fail("nothing is asked"))
    assert main(["export", "at_digits", "--to", address, "--home", str(tmp_path / "none")]) == 2
    assert main(["evaluate", address, "--home", str(home.root)]) == 2
    assert "hf://OWNER/NAME" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_without_the_package_one_sentence_says_which(home, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert main(["evaluate", "hf://me/mine", "--home", str(home.root)]) == 2
    assert "pip install huggingface_hub" in capsys.readouterr().err
