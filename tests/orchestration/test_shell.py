"""What a shell and its user notice: completion, `--quiet`, `open`, names that are spelled otherwise."""

from __future__ import annotations

import json
import os
import shutil
import subprocess

import pytest

from orchestration.cli import main
from orchestration.commands import COMMANDS
from orchestration.trained_models.targets import resolve_target
from tests.orchestration.finished_runs import finish


def completed(script, *typed):
    """What bash offers after these words, of which the last may be half typed."""
    words = " ".join(f"'{word}'" for word in typed)
    probe = f'{script}\nCOMP_WORDS=({words}); COMP_CWORD={len(typed) - 1}; _rayndom; printf "%s\\n" "${{COMPREPLY[@]}}"'
    return subprocess.run(["bash", "-c", probe], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_flags_choices_and_recipes(capsys):
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert set(completed(script, "rayndom", "")) == {command.name for command in COMMANDS}
    assert completed(script, "rayndom", "evalu") == ["evaluate"]
    assert completed(script, "rayndom", "evaluate", "--until") == ["--until"]
    assert "ctrw_digits" in completed(script, "rayndom", "train", "ctrw_dig")
    assert {"recipes", "runs"} <= set(completed(script, "rayndom", "list", "r"))


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_are_given_the_same_words(capsys, shell):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(command.name in script for command in COMMANDS) and "--until" in script and "ctrw_digits" in script
    if shutil.which(shell):
        subprocess.run([shell, "-n", "/dev/stdin"], input=script, text=True, check=True)


def test_quiet_says_results_and_errors_alone(home, tmp_path, capsys):
    experiment = finish(home, kind="run")
    where = ["--home", str(home.root)]
    assert main(["export", experiment.fingerprint, "--to", str(tmp_path / "one"), "--quiet", *where]) == 0
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    assert main(["export", experiment.fingerprint, "--to", str(tmp_path / "two"), "--quiet", "--json", *where]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["folder"] == str(tmp_path / "two") and captured.err == ""
    assert main(["export", "nothing", "--to", str(tmp_path / "three"), "--quiet", *where]) == 2
    assert "error:" in capsys.readouterr().err
    assert main(["list", "runs", "--quiet", *where]) == 0
    assert experiment.fingerprint in capsys.readouterr().out, "a table is a result"
    assert main(["export", experiment.fingerprint, "--to", str(tmp_path / "one"), *where]) == 0
    assert "exported to" in capsys.readouterr().out, "for the next command it is off again"


def test_the_number_of_images_has_one_name_and_the_others_lead_to_it(home, capsys):
    for flag in ("--num-samples", "--num_samples", "--images", "--num-test-examples"):
        assert main(["evaluate", "at_digits", flag, "10", "--home", str(home.root)]) == 2
        assert "Did you mean --samples?" in capsys.readouterr().err, flag


def test_open_finds_the_newest_page_or_says_what_writes_it(home, capsys):
    experiment = finish(home, kind="run")
    where = ["--print", "--json", "--home", str(home.root)]
    assert main(["open", experiment.fingerprint, *where]) == 2
    assert "rayndom evaluate" in capsys.readouterr().err
    target = resolve_target(experiment.fingerprint, home)
    folder = target.records_folder(home, target.checkpoint())
    for number, suite in enumerate(("quick", "standard")):
        page = folder / f"report-{suite}" / "report.html"
        page.parent.mkdir(parents=True)
        page.write_text("<p>a page</p>")
        os.utime(page, (number, number))
    assert main(["open", experiment.fingerprint, *where]) == 0
    assert json.loads(capsys.readouterr().out)["page"] == str(folder / "report-standard" / "report.html")
    paper = home.root / "reproductions" / "ctrw-smoke.html"
    paper.parent.mkdir()
    paper.write_text("<p>a paper</p>")
    assert main(["open", "ctrw", *where]) == 0
    assert json.loads(capsys.readouterr().out)["page"] == str(paper)
