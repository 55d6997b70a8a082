"""Where an evaluation runs when the user does not say: in this process where the work is small, else on every core or GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import orchestration.evaluating.evaluation_run as evaluation_run
from analysis.evaluate import Evaluation
from orchestration.evaluating.evaluation_run import SMALL_WORK, run_jobs


@pytest.mark.parametrize(
    ("settings", "cost", "place"),
    [
        ({"workers": None}, SMALL_WORK / 2, "here"),
        ({"workers": None}, SMALL_WORK * 2, "ray"),
        ({"workers": 1}, SMALL_WORK * 2, "here"),
        ({"workers": 2}, SMALL_WORK / 2, "ray"),
        ({"workers": None, "gpus_per_worker": 0.5}, SMALL_WORK / 2, "ray"),
        ({"workers": None, "address": "auto"}, SMALL_WORK / 2, "ray"),
    ],
)
def test_small_work_stays_here_and_other_work_goes_to_ray(monkeypatch, tmp_path, settings, cost, place):
    places = []
    monkeypatch.setattr(evaluation_run, "_run_here", lambda *arguments: places.append("here"))
    monkeypatch.setattr(evaluation_run, "run_on_ray", lambda *arguments: places.append("ray"))
    task = SimpleNamespace(key="a", succeeds="", cost=cost, title="pgd_20 T1 block 1/1")
    job = Evaluation([task], torch.zeros(1), torch.zeros(1), tmp_path / "records.jsonl")
    job.name, job.read_again = "tiny", lambda: None
    run_jobs([job], **settings)
    assert places == [place]
