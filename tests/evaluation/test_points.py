"""Kept points: scored again they give what a fresh evaluation gives, to the last bit; without them nothing is scored."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from evaluation_toys import AdditiveNoise, Choice, MultiplicativeNoise, classifier, pattern, two_classes
from torch import nn

from analysis.evaluate import BlockQueue, Evaluation, PointStore, evaluate, plan_blocks, run_in_order
from analysis.evaluation.points import KeptPoints, point_bytes
from analysis.evaluation.records import append_record, comparable, read_records
from analysis.evaluation.suites import AttackItem, Suite
from analysis.evaluation.tasks import on_kept_points
from analysis.reporting.report import render_html
from analysis.reporting.survival import image_rows
from analysis.result import collect
from models.errors import UserError
from models.threat_model import ThreatModel

ROOT = Path(__file__).resolve().parents[2]
RADIUS = ThreatModel(epsilon=0.05)


def members(count: int) -> nn.Module:
    """Return a model of `count` equally likely linear members."""
    return Choice(torch.stack([torch.stack([-pattern(seed=s), pattern(seed=s)]) for s in range(count)]))


MODELS = {
    "noise": lambda: MultiplicativeNoise(pattern(), 2.0),
    "additive": lambda: AdditiveNoise(pattern(), 3.0),
    "choice": lambda: members(4),
    "deterministic": lambda: classifier(2),
    "channels_last": lambda: classifier(2).to(memory_format=torch.channels_last),
    "double": lambda: classifier(2).double(),
}


def suite_for(seed: int, **scoring: int) -> Suite:
    """Return a suite of attacks, protocols and draws that the seed chooses."""
    chance = random.Random(seed)
    attacks = [
        ("fgsm", {}),
        ("pgd", {"steps": chance.randint(1, 4)}),
        ("apgd_ce", {"steps": chance.randint(2, 4)}),
        ("square", {"num_queries": 8}),
        ("uniform_noise", {"num_points": 3}),
        ("torchattacks_cw", {"steps": 2}),
    ]
    items = []
    for name, parameters in chance.sample(attacks, 3):
        protocols = ("T0",) if name.startswith("torchattacks") else ("T1", *chance.sample(("T0", "T2", "T3", "T4"), chance.randint(0, 4)))
        items.append(AttackItem(attack=name, parameters=parameters, protocols=protocols, num_draws=chance.randint(1, 5)))
    drawn = {"num_selection_draws": 3, "num_evaluation_draws": 8, "num_averaged_draws": 2, "num_averaged_groups": 3}
    drawn |= {"num_known_draws": chance.randint(1, 3), "num_repetitions": chance.randint(1, 2)}
    return Suite(name="chosen", attacks=tuple(items), scoring={**drawn, **scoring})


def scored_again(model, x, y, suite, folder, **options) -> dict:
    """Return the records that kept points give, by key."""
    evaluation = Evaluation(plan_blocks(model, x, y, suite, **options), x, y, None, PointStore(folder, "score"))
    run_in_order(BlockQueue([evaluation]), lambda _: model)
    return {key: comparable(record) for key, record in evaluation.done.items()}


@pytest.mark.parametrize(("kind", "seed"), [(kind, seed) for seed, kind in enumerate(MODELS)])
def test_points_scored_again_give_the_records_of_a_fresh_evaluation(kind, seed, tmp_path):
    model, suite = MODELS[kind](), suite_for(seed)
    x, y = two_classes(10, noise=0.2)
    options = {"threat_model": RADIUS, "seed": seed, "batch_size": 6}
    evaluate(model, x, y, suite, points=tmp_path, **options)
    for num_draws in (None, 20, 5):
        fresh = {r["key"]: comparable(r) for r in evaluate(model, x, y, suite, num_draws=num_draws, **options).records}
        assert scored_again(model, x, y, suite, tmp_path, num_draws=num_draws, **options) == fresh


def test_every_bit_of_a_point_comes_back(tmp_path):
    model = MODELS["noise"]()
    x, y = two_classes(6)
    evaluate(model, x, y, suite_for(1), points=tmp_path, threat_model=RADIUS)
    plan = [task for task in plan_blocks(model, x, y, suite_for(1), threat_model=RADIUS) if task.has_points]
    store, size = PointStore(tmp_path), 0
    for task in plan:
        points, _ = store.read(task)
        assert len(points) == task.num_points
        size += sum(each.output.x.numel() * each.output.x.element_size() for each in points)
        assert all(each.output.x.dtype == torch.float32 and each.output.x.stride() == x.stride() for each in points)
    assert size == point_bytes(plan, x[0])


@pytest.mark.parametrize("harm", ["missing", "cut", "flipped", "empty", "swapped"])
def test_points_that_are_not_as_they_were_written_are_never_scored(harm, tmp_path):
    model, suite = members(3), suite_for(2)
    x, y = two_classes(6)
    folder = tmp_path / "points"
    evaluate(model, x, y, suite, points=folder, records=tmp_path / "records.jsonl", threat_model=RADIUS)
    first, second = sorted(folder.iterdir())[:2]
    content = bytearray(first.read_bytes())
    if harm == "missing":
        first.unlink()
    elif harm == "cut":
        first.write_bytes(content[:-5])
    elif harm == "flipped":
        content[-3] ^= 1
        first.write_bytes(content)
    elif harm == "empty":
        first.write_bytes(b"")
    else:
        first.write_bytes(second.read_bytes())
    with pytest.raises(UserError, match="--keep-points"):
        scored_again(model, x, y, suite, folder, threat_model=RADIUS)
    # The same command mends it: that block alone is attacked again.
    before = len((tmp_path / "records.jsonl").read_text().splitlines())
    evaluate(model, x, y, suite, points=folder, records=tmp_path / "records.jsonl", threat_model=RADIUS)
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == before + 1
    assert scored_again(model, x, y, suite, folder, threat_model=RADIUS)


def test_blocks_without_points_are_attacked_again_and_others_are_not(tmp_path):
    model, suite = MODELS["noise"](), suite_for(0)
    x, y = two_classes(6)
    path = tmp_path / "records.jsonl"
    first = evaluate(model, x, y, suite, records=path, threat_model=RADIUS)
    second = evaluate(model, x, y, suite, records=path, points=tmp_path / "points", threat_model=RADIUS)
    assert [comparable(r) for r in first.records] == [comparable(r) for r in second.records]
    lines = len(path.read_text().splitlines())
    assert lines == len(first.records) + sum(task.has_points for task in plan_blocks(model, x, y, suite, threat_model=RADIUS))
    evaluate(model, x, y, suite, records=path, points=tmp_path / "points", threat_model=RADIUS)
    assert len(path.read_text().splitlines()) == lines


def test_keys_are_those_of_evaluations_that_keep_no_points(tmp_path):
    model, suite = members(3), suite_for(2)
    x, y = two_classes(6)
    kept = evaluate(model, x, y, suite, points=tmp_path, threat_model=RADIUS)
    plain = evaluate(model, x, y, suite, threat_model=RADIUS)
    assert [comparable(r) for r in kept.records] == [comparable(r) for r in plain.records]
    assert all("points_of" not in record["header"] for record in kept.records)


def test_another_model_is_scored_on_the_same_points_under_keys_of_its_own(tmp_path):
    model, other = members(3), MODELS["noise"]()
    x, y = two_classes(10)
    evaluate(model, x, y, suite_for(1), points=tmp_path, threat_model=RADIUS)
    plan = plan_blocks(model, x, y, suite_for(1), threat_model=RADIUS)
    transferred = on_kept_points(plan, other, x, y)
    evaluation = Evaluation(transferred, x, y, None, PointStore(tmp_path, "score"))
    run_in_order(BlockQueue([evaluation]), lambda _: other)
    own = {task.key for task in plan_blocks(other, x, y, suite_for(1), threat_model=RADIUS) if task.has_points}
    attacked = {task.key for task in transferred if task.has_points}
    assert attacked and not attacked & own
    result = collect(evaluation.done.values(), transferred)
    # Naive: the points themselves, image by image, under the draws that score.
    from analysis.attacked_model.draws import seeded_draws, set_draw

    kept = KeptPoints(PointStore(tmp_path), plan)
    for name in {task.item.name for task in transferred if task.item is not None}:
        images = kept.images((name, sample) for sample in range(10))
        right = []
        for draw in seeded_draws(8, 0, "evaluation"):
            set_draw(other, draw)
            right += [other(images[name, s][None]).argmax(1).item() == y[s].item() for s in range(10)]
        (row,) = [row for row in result.rows if row.attack == name and row.protocol == "T1"]
        assert row.estimate.value == pytest.approx(sum(right) / len(right))
    paper = Suite(name="paper", attacks=(AttackItem(attack="fgsm", protocols=("T0",)),))
    under_t0 = plan_blocks(model, x, y, paper, threat_model=RADIUS)
    with pytest.raises(UserError, match="T1"):
        on_kept_points(under_t0, other, x, y)


def test_the_page_lists_images_by_survival_with_their_points(tmp_path):
    model, suite = MODELS["additive"](), suite_for(1)
    x, y = two_classes(12, noise=0.3)
    result = evaluate(model, x, y, suite, points=tmp_path, threat_model=RADIUS)
    kept = KeptPoints(PointStore(tmp_path), plan_blocks(model, x, y, suite, threat_model=RADIUS))
    rows, count = image_rows(result, x, kept)
    assert count == len(rows) == 12
    assert [row.survival for row in rows] == sorted(row.survival for row in rows)
    assert sum(row.survival for row in rows) / 12 == pytest.approx(result.headline.value)
    for row in rows:
        assert row.label == y[row.sample]
        assert row.survival == row.shares[row.worst]
        point = kept.images([(row.worst, row.sample)])[row.worst, row.sample]
        assert row.largest_change == pytest.approx((point - x[row.sample]).abs().max().item())
        assert row.picture and row.perturbed and row.change
    page = render_html("model", result, x, kept)
    assert all(row.perturbed in page for row in rows)
    some, count = image_rows(result, x, None, at_most=5)
    assert (len(some), count) == (5, 12)
    assert (some[0], some[-1].sample) == (image_rows(result, x)[0][0], rows[-1].sample)
    assert not some[0].perturbed and "--keep-points" in render_html("model", result, x)


def test_a_broken_block_leaves_the_others_alone_and_is_measured_alone(tmp_path):
    model, suite = members(3), suite_for(1)
    x, y = two_classes(8)
    path = tmp_path / "records.jsonl"
    plan = plan_blocks(model, x, y, suite, threat_model=RADIUS)
    broken_key = next(task.key for task in plan if task.kind == "attack")
    evaluation, told = Evaluation(plan, x, y, path), []
    queue = BlockQueue([evaluation], on_broken_block=lambda _, task, error: told.append((task.key, str(error))))
    while (taken := queue.take()) is not None:
        _, task = taken
        if task.key == broken_key:
            queue.broke(evaluation, task, RuntimeError("out of memory"))
        else:
            single = Evaluation([task], x, y)
            run_in_order(BlockQueue([single]), lambda _: model)
            queue.finished(evaluation, task, single.done[task.key])
    assert told == [(broken_key, "out of memory")]
    assert set(read_records(path)) == {task.key for task in plan} - {broken_key}
    lines = path.read_text().splitlines()
    result = evaluate(model, x, y, suite, threat_model=RADIUS, records=path)
    assert result.finished
    assert path.read_text().splitlines()[: len(lines)] == lines and len(path.read_text().splitlines()) == len(lines) + 1
    for error in (UserError("wrong"), OSError(28, "no space")):
        with pytest.raises(type(error)):
            BlockQueue([evaluation], on_broken_block=lambda *_: None).broke(evaluation, plan[0], error)


def test_a_block_that_is_asked_for_again_is_measured_although_its_record_is_there(tmp_path):
    model, suite = members(3), suite_for(1)
    x, y = two_classes(8)
    path = tmp_path / "records.jsonl"
    evaluate(model, x, y, suite, threat_model=RADIUS, records=path)
    plan = plan_blocks(model, x, y, suite, threat_model=RADIUS)
    key = plan[-1].key
    right = read_records(path)[key]
    append_record(path, {**right, "samples": {**right["samples"], "margin": [0.0] * 8}})  # as if it had gone wrong
    evaluation = Evaluation(plan, x, y, path, again=frozenset([key]))
    evaluation.read_again()
    assert [task.key for task in evaluation.pending] == [key]
    run_in_order(BlockQueue([evaluation]), lambda _: model)
    assert comparable(read_records(path)[key]) == comparable(right)


SCRIPT = """
import sys
sys.path.insert(0, "tests/evaluation")
import torch
torch.set_num_threads(1)
from test_points import MODELS, RADIUS, suite_for
from evaluation_toys import two_classes
from analysis.evaluate import evaluate
x, y = two_classes(30)
evaluate(MODELS["noise"](), x, y, suite_for(1), points=sys.argv[1] + "/points", records=sys.argv[1] + "/records.jsonl",
    threat_model=RADIUS, batch_size=2)
"""


def test_killed_and_started_again_it_has_all_points(tmp_path):
    path, command = tmp_path / "records.jsonl", [sys.executable, "-c", SCRIPT, str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while not path.exists() or path.read_bytes().count(b"\n") < 25:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    model, suite = MODELS["noise"](), suite_for(1)
    x, y = two_classes(30)
    options = {"threat_model": RADIUS, "batch_size": 2}
    plan = plan_blocks(model, x, y, suite, **options)
    done = read_records(path)
    assert len(done) < len(plan)
    store = PointStore(tmp_path / "points")
    assert all(store.holds(task) for task in plan if task.has_points and task.key in done), "a record has its points"
    result = evaluate(model, x, y, suite, records=path, points=store.folder, **options)
    keys = [line.partition('"key":"')[2][:32] for line in path.read_text().splitlines() if line.endswith("}")]
    assert len(keys) == len(set(keys)), "no block ran twice"
    fresh = {r["key"]: comparable(r) for r in evaluate(model, x, y, suite, **options).records}
    assert {r["key"]: comparable(r) for r in result.records} == fresh
    assert scored_again(model, x, y, suite, store.folder, **options) == fresh
