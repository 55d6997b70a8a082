"""Ctrl-C and SIGTERM: the first says what is kept and what to type, the second ends at once; no process of a command is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from orchestration import cli
from orchestration.cli import main
from orchestration.interruption import first_taken_by_tune, in_good_order
from tests.orchestration.sweep_process import ROOT, SweepProcess, assert_whole_record
from tests.orchestration.test_sweep_on_ray import write_sweep

SLOW_TO_END = """
import subprocess, sys, time
from orchestration.interruption import first_taken_by_tune, in_good_order
with in_good_order():
    child = subprocess.Popen(["sleep", "300"], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        print(child.pid, flush=True)
        time.sleep(300)
    except KeyboardInterrupt:
        print("first", flush=True)
        time.sleep(300)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl_c", "sigterm"])
def test_the_second_ends_at_once_and_leaves_no_process(number):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_TO_END], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    child = psutil.Process(int(process.stdout.readline()))
    process.send_signal(number)
    assert process.stdout.readline() == "first\n"
    assert process.poll() is None
    began = time.monotonic()
    process.send_signal(number)
    assert process.wait(20) == 130
    assert time.monotonic() - began < 10
    assert "ended at once" in process.stderr.read()
    assert psutil.wait_procs([child], timeout=5)[1] == []


def test_what_was_taken_by_tune_is_given_back():
    before = signal.getsignal(signal.SIGINT)
    with in_good_order():
        ours = signal.getsignal(signal.SIGINT)
        with first_taken_by_tune():
            assert signal.getsignal(signal.SIGINT) not in (before, ours)
        assert signal.getsignal(signal.SIGINT) is ours
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["train", "at_digits", "--seed", "3"], ["everything finished is kept", "rayndom train at_digits --seed 3"]),
        (["show", "at_digits"], ["nothing is left half done", "rayndom show at_digits"]),
    ],
    ids=["train", "show"],
)
def test_an_interruption_says_what_is_kept_and_what_to_type(words, parts, monkeypatch, capsys):
    def press(arguments):
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        time.sleep(30)

    monkeypatch.setattr(cli, "_run", press)
    began = time.monotonic()
    assert main(words) == 130
    assert time.monotonic() - began < 10
    told = capsys.readouterr()
    for part in parts:
        assert part in told.out


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("presses", [1, 2])
def test_a_sweep_ends_by_ctrl_c_in_its_terminal_and_goes_on(presses, home, tmp_path):
    """The whole group gets the signal, as from a terminal; a second one comes while the first is being answered."""
    path = write_sweep(tmp_path, trials=2, epochs=6, train=320)
    with SweepProcess(path, home, tmp_path / "1.log", ("--no-evaluation",)) as process:
        process.wait_until(lambda text: "epoch 2/6" in text, 600, "the second epoch")
        for _ in range(presses):
            os.killpg(process.process.pid, signal.SIGINT)
            time.sleep(0.3)
        assert process.wait(20 if presses == 2 else 200) == 130, process.text
        assert process.left_over(60) == []
        assert "everything finished is kept" in process.text
    with SweepProcess(path, home, tmp_path / "2.log", ("--no-evaluation",)) as process:
        assert process.wait(900) == 0, process.text
    assert_whole_record(home, "tiny", 2)
