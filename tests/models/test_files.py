"""Files are whole or as they were, whoever is killed meanwhile, and as readable as the umask says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from analysis.reporting.frames import write_parquet
from models import build_model
from models.files import is_unfinished, whole_file, write_text
from models.registry_files import broken_files, scan
from models.weights import load_pretrained, save_pretrained
from trainers.checkpoint import write_state


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Run Python code in a process of its own; it has `path` and says what it likes on its standard output."""
    head = "import sys\nfrom pathlib import Path\nfrom models.files import whole_file, write_text\npath = Path(sys.argv[1])\n"
    command = [sys.executable, "-c", head + textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])


HALF = """
with whole_file(path) as file:
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    sys.stdin.readline()
"""


def unfinished(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if is_unfinished(path)]


@pytest.mark.parametrize("name", ["result.json", "n" * 255, "ü" * 127])
def test_a_killed_writer_leaves_the_old_file_and_the_next_one_clears_up(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write_text(path, "old")
    process = start(HALF, path)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    assert len(unfinished(tmp_path)) == 1
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert path.read_text() == "old" and len(unfinished(tmp_path)) == 1
    write_text(path, "new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == [name]


def test_a_writer_leaves_the_unfinished_file_of_a_living_one_alone(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    process = start(HALF, path)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    write_text(path, "ours")
    assert path.read_text() == "ours" and len(unfinished(tmp_path)) == 1
    process.communicate("\n")
    assert process.returncode == 0
    assert path.read_text() == "half" and os.listdir(tmp_path) == [path.name]  # The last to end wins.


def test_an_exception_leaves_the_old_file(tmp_path: Path) -> None:
    path = write_text(tmp_path / "file", "old")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as file:  # noqa: PT012
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_a_file_that_grows_too_large_leaves_the_old_one(tmp_path: Path) -> None:
    path = write_text(tmp_path / "file", "old")
    code = """
    import resource, signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    try:
        write_text(path, "x" * 100_000)
    except OSError as error:
        print(type(error).__name__)
    """
    assert start(code, path).communicate()[0] == "OSError\n"
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_readers_never_see_a_part_while_several_processes_write(tmp_path: Path) -> None:
    path = write_text(tmp_path / "file.json", json.dumps([0] * 20_000))
    code = """
    import json
    for index in range(40):
        write_text(path, json.dumps([index] * 20_000))
    """
    writers = [start(code, path) for _ in range(3)]
    reads = 0
    while any(writer.poll() is None for writer in writers):
        content = json.loads(path.read_text())
        assert len(content) == 20_000 and len(set(content)) == 1
        reads += 1
    assert reads and all(writer.returncode == 0 for writer in writers)
    assert os.listdir(tmp_path) == ["file.json"]


def test_threads_of_one_process_do_not_disturb_one_another(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda index: write_text(path, str(index) * 1000), range(64)))
    assert len(set(path.read_text())) <= 2 and os.listdir(tmp_path) == ["file"]


def write_model(folder: Path) -> None:
    save_pretrained(build_model("ctrw", backbone="resnet8", image_shape=(1, 8, 8)), folder)


WRITERS = {
    "text": lambda folder: write_text(folder / "deep" / "text", "x"),
    "a model": write_model,
    "a checkpoint": lambda folder: write_state({"weights": torch.zeros(3)}, folder),
    "a table": lambda folder: write_parquet([{"a": 1}], folder / "table.parquet"),
}


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
@pytest.mark.parametrize("what", WRITERS)
def test_permissions_follow_the_umask(tmp_path: Path, what: str, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        WRITERS[what](tmp_path)
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files and {oct(path.stat().st_mode & 0o777) for path in files} == {oct(mode)}


def test_a_model_that_is_saved_over_another_one_is_the_new_one(tmp_path: Path) -> None:
    write_model(tmp_path)
    model = build_model("ctrw", backbone="resnet8", image_shape=(1, 8, 8), seed=1)
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path, resample_on_forward=False).state_dict()
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(loaded[name].numpy(), tensor.numpy(), err_msg=name)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty package `slots_for_a_test` that can be imported."""
    folder = tmp_path / "slots_for_a_test"
    folder.mkdir()
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == folder.name]:
        del sys.modules[name]


class Thing:
    """What the package of the test holds."""

    def __init__(self, name: str) -> None:
        self.name = name


ENTRY = "from tests.models.test_files import Thing\nENTRIES = (Thing('{}'),)\n"


def test_a_scan_finds_entries_in_the_order_of_their_files(package: Path) -> None:
    for file, name in (("second", "a"), ("first", "b")):
        (package / f"{file}.py").write_text(ENTRY.format(name))
    (package / "without.py").write_text("x = 1\n")
    assert list(scan("slots_for_a_test", "ENTRIES", Thing)) == ["b", "a"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("1 / 0\n", "division by zero"),
        ("def broken(:\n", "line 1"),
        ("import nowhere_at_all\n", "nowhere_at_all"),
        ("ENTRIES = (Missing,)\n", "Missing"),
        ("ENTRIES = 5\n", "ENTRIES"),
        ("ENTRIES = ('text',)\n", "Thing"),
        ("raise SystemExit(3)\n", "SystemExit"),
        ("x = '\0'\n", "null bytes"),
    ],
)
def test_a_broken_file_is_skipped_and_its_reason_is_kept(
    package: Path, content: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    (package / "first.py").write_text(ENTRY.format("a"))
    name = f"second_{len(content)}_{len(reason)}"
    (package / f"{name}.py").write_text(content)
    for _ in range(2):
        assert list(scan("slots_for_a_test", "ENTRIES", Thing)) == ["a"]
    (said,) = [sentence for sentence in broken_files("slots_for_a_test") if f"/{name}.py" in sentence]
    assert reason in said
    assert sum(f"/{name}.py" in record.getMessage() for record in caplog.records) == 1, "it is said once"


def test_a_name_that_two_files_claim_is_neithers(package: Path) -> None:
    for file, name in (("third", "a"), ("fourth", "a"), ("fifth", "b")):
        (package / f"{file}.py").write_text(ENTRY.format(name))
    assert list(scan("slots_for_a_test", "ENTRIES", Thing)) == ["b"]
    assert any("fourth.py" in sentence and "'a'" in sentence for sentence in broken_files("slots_for_a_test"))
