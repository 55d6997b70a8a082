"""Frames, figures and the page of an evaluation."""

import json
import re
from dataclasses import replace

import numpy as np
import pyarrow.parquet
import pytest
import torch

from analysis.evaluate import evaluate
from analysis.evaluation import calibration
from analysis.evaluation.images import decode_png, encode_png
from analysis.evaluation.studies import StudySettings
from analysis.evaluation.suites import AttackItem, Suite
from analysis.reporting import figure_style, figures, frames
from analysis.reporting.conclusion import conclusion
from analysis.reporting.report import render_html, write_report
from analysis.statistics import accuracy_interval
from models.errors import UserError
from models.threat_model import ThreatModel
from orchestration.recipes import load_recipe


def read_parquet(path):
    return pyarrow.parquet.read_table(path).to_pylist()


SUITE = Suite(
    name="mine",
    scoring={"num_selection_draws": 4, "num_evaluation_draws": 12},
    studies=StudySettings(
        names=("epsilon", "steps", "draws", "progress"), num_samples=24, steps=10, num_draws=2, max_steps=40, max_draws=8
    ),
    attacks=(
        AttackItem(attack="fgsm", num_draws=2),
        AttackItem(attack="apgd_ce", parameters={"steps": 10}, num_draws=2, protocols=("T0", "T1", "T3")),
    ),
)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    path = tmp_path_factory.mktemp("evaluation") / "records.jsonl"
    x, y = calibration.calibration_images()
    model = calibration.calibration_toys()["noisy"]
    return evaluate(model, x[:24], y[:24], SUITE, threat_model=ThreatModel(epsilon=0.15), records=path), path


@pytest.fixture(scope="module")
def masked():
    x, y = calibration.calibration_images()
    return evaluate(calibration.calibration_toys()["masked"], x[:12], y[:12], "quick", threat_model=ThreatModel(epsilon=0.15))


def test_curves_come_from_the_studies(evaluated):
    result, _ = evaluated
    curve = figures.epsilon_curve(result)
    assert curve[0] == (0.0, result.clean)
    assert curve[-1][0] == 1.0
    assert curve[-1][1].value < 0.2
    assert [level for level, _ in figures.convergence_curve(result, "steps")][:4] == [2, 5, 10, 20]
    assert [level for level, _ in figures.convergence_curve(result, "draws")][:3] == [1, 2, 4]
    assert len(figures.loss_curve(result)) == 11
    assert (np.diff(figures.loss_curve(result)) >= 0).all()


def test_figures_are_written_as_png_and_pdf_and_are_reproducible(evaluated, tmp_path):
    result, _ = evaluated
    drawn = figures.figures_of(result)
    assert set(drawn) == {"attacks", "epsilon", "steps", "draws", "loss", "examples"}
    for kind, head in (("png", b"\x89PNG"), ("pdf", b"%PDF")):
        (first,) = figure_style.save_figure(drawn["epsilon"], tmp_path / "a", [kind])
        (second,) = figure_style.save_figure(figures.figures_of(result)["epsilon"], tmp_path / "b", [kind])
        assert first.read_bytes()[:4] == head
        assert first.read_bytes() == second.read_bytes()


def test_the_page_is_self_contained_and_says_everything(evaluated):
    result, _ = evaluated
    page = render_html("<noisy & toy>", result)
    assert "&lt;noisy &amp; toy&gt;" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert page.count("data:image/png;base64,") == 6
    for row in result.rows:
        assert row.caption in page
    for verdict in result.verdicts:
        assert verdict.id in page
    assert result.header["checkpoint"] in page
    assert "unknown draw (T1)" in page


def test_an_invalid_evaluation_is_marked_everywhere(masked):
    described = load_recipe("trades_tiny_imagenet_resnet18").experiment.description
    assert "no paper used this combination" in described
    page = render_html("masked", masked, description=described)
    assert described in page
    assert 'body class="invalid"' in page
    assert "Do not quote these numbers" in conclusion("masked", masked)
    accuracies = re.findall(r"\d+\.\d %[^<]*</td>", page.split("<h2>May")[0])
    assert accuracies
    assert all("(!)" in cell for cell in accuracies)
    assert "examples" in figures.figures_of(masked)


def test_conclusion_is_one_sentence(evaluated):
    result, _ = evaluated
    sentence = conclusion("toy", result)
    assert sentence.endswith(".")
    assert "an attacker who knows that the model is random" in sentence


def test_the_conclusion_claims_nothing_of_too_few_and_takes_the_single_draw_of_the_paper_as_what_it_is(evaluated):
    result, _ = evaluated
    outcomes = np.random.default_rng(0).random((2000, 100))
    headline, paper = accuracy_interval(outcomes < 0.4), accuracy_interval(outcomes[:, 0] < 0.6)
    assert paper.needed_draws is not None
    told = conclusion("toy", replace(result, headline=headline, paper=paper))
    assert "points below the paper's protocol (T0), whose few draws cannot tell a difference from chance; a first look, " in told
    sure = accuracy_interval(outcomes < 0.6)
    told = conclusion("toy", replace(result, headline=headline, paper=sure))
    assert re.search(r", 20\.\d points below the paper's protocol \(T0\); a first look, .* \d+ of 21 checks ran, none failed", told)
    higher = conclusion("toy", replace(result, headline=sure, paper=headline))
    assert "below the paper" not in higher
    few = conclusion("toy", replace(result, headline=accuracy_interval(outcomes[:20, 0] < 0.4, 1)))
    assert re.search(r"no claim can be made: too few images \(about \d+ would do\)\.$", few)


def test_reports_are_written_as_files(evaluated, tmp_path):
    result, _ = evaluated
    written = write_report("toy", result, tmp_path / "report")
    assert json.loads(written["json"].read_text())["conclusion"] == conclusion("toy", result)
    frame = read_parquet(written["parquet"])
    assert [row["attack"] for row in frame] == [row.attack for row in result.rows]
    assert frame[0]["accuracy"] == result.rows[0].estimate.value
    samples = read_parquet(written["samples"])
    clean = [row for row in samples if row["attack"] == "clean"]
    assert len(clean) == 24
    assert sum(row["num_correct"] for row in clean) / 24 / clean[0]["num_draws"] == pytest.approx(result.clean.value)
    assert {path.suffix for path in written["figures"].iterdir()} == {".png", ".pdf"}


def test_records_of_several_evaluations_become_one_frame(evaluated, masked, tmp_path):
    result, path = evaluated
    frame = frames.frame_of_records([path])
    assert [(row["attack"], row["protocol"], row["accuracy"]) for row in frame] == [
        (row.attack, row.protocol, row.estimate.value) for row in result.rows
    ]
    assert {row["checkpoint"] for row in frame} == {result.header["checkpoint"]}
    with pytest.raises(UserError, match="holds no records"):
        frames.frame_of_records([tmp_path / "absent.jsonl"])


@pytest.mark.slow  # a new database takes seconds
def test_mlflow_runs_become_a_frame(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.create_experiment("sweep", artifact_location=str(tmp_path / "artifacts"))
    for index in range(3):
        run = client.create_run(experiment, run_name=f"trial {index}")
        client.log_metric(run.info.run_id, "accuracy", index / 10)
        client.log_param(run.info.run_id, "sigma", index)
        if index == 2:
            client.log_param(run.info.run_id, "accuracy", "a parameter of the same name")
        client.set_terminated(run.info.run_id)
    frame = frames.frame_of_runs(uri, "sweep")
    assert sorted(row["accuracy"] for row in frame) == [0.0, 0.1, 0.2]
    assert {row["sigma"] for row in frame} == {"0", "1", "2"}
    assert sum(row["param:accuracy"] is not None for row in frame) == 1
    assert all(not name.startswith("mlflow.") for name in frame[0])
    with pytest.raises(UserError, match=r"no experiment 'sweeps'; it has: .*sweep"):
        frames.frame_of_runs(uri, "sweeps")


def test_parquet_keeps_types_and_mixes_as_text(tmp_path):
    frame = [{"a": 1, "b": 0.5, "c": None, "d": 1}, {"a": 2, "b": None, "c": True, "d": "x"}]
    assert read_parquet(frames.write_parquet(frame, tmp_path / "new" / "frame.parquet")) == [
        {"a": 1, "b": 0.5, "c": None, "d": "1"},
        {"a": 2, "b": None, "c": True, "d": "x"},
    ]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["frame.parquet"]
    with pytest.raises(ValueError, match="empty frame"):
        frames.write_parquet([], tmp_path / "x.parquet")


@pytest.mark.parametrize("channels", [1, 3])
def test_images_survive_png(channels):
    image = torch.randint(0, 256, (channels, 5, 4), generator=torch.Generator().manual_seed(0)) / 255
    pixels = decode_png(encode_png(image))
    expected = (image * 255).round().byte().permute(1, 2, 0).numpy()
    assert (pixels == (expected[:, :, 0] if channels == 1 else expected)).all()
