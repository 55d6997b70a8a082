"""Every quantity that a table or figure of a paper names is measured on a network of its row, as `rayndom analyse` measures it."""

from __future__ import annotations

import pytest
import torch

from analysis.quantities.quantity import Subject, quantity
from analysis.reproduction.papers import get_item, list_items
from analysis.reproduction.papers.measures import Theory
from analysis.reproduction.readings import read_theory
from orchestration.reproducing.cost import untrained_network
from orchestration.reproducing.plan import ReadingJob, plan_item, reading_of


def theory_cells() -> dict[str, tuple[ReadingJob, str, str]]:
    """One cell per quantity, set of its parameters' names, and field."""
    found = {}
    for name in list_items():
        planned = plan_item(get_item(name), "smoke")
        for cell in planned.cells():
            measure = cell.column.measure
            if isinstance(measure, Theory) and cell.row.key not in ("natural", "at", "in", "gn", "bgn", "ln", "dcn", "trades", "awp"):
                kind = measure.parameters.get("kind", "")
                key = f"{measure.name} {kind} {measure.field}"
                if key not in found:
                    job = reading_of(planned, cell)
                    assert job is not None
                    found[key] = (job, measure.field, cell.column.unit)
    return found


CELLS = theory_cells()


def subject_of(job: ReadingJob, count: int = 4) -> Subject:
    networks = [untrained_network(each.experiment).eval() for each in job.trainings]
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand((count, 1, 16, 16), generator=generator), torch.arange(count)
    experiment = job.training.experiment
    return Subject(networks[0], lambda: (x, y), experiment.threat_model, at_most=count, other=networks[1] if networks[1:] else None)


@pytest.mark.parametrize("key", CELLS)
def test_a_cell_finds_its_number_or_its_series(key):
    job, field, unit = CELLS[key]
    assert isinstance(job.measure, Theory)
    found = read_theory(job.measure, subject_of(job))
    if "unhit" in key:
        assert "stride" in found.reason or found.series, "a stride of 1 leaves no point unhit"
        return
    assert not found.reason
    reading = found.reading(field, unit)
    assert reading is not None
    assert (reading.value is None) == (not field)
    assert reading.series if not field else True
    if job.measure.name not in ("parameters", "cost", "ctrw_cosines", "ctrw_diagnostics"):
        assert reading.num_samples == 4, "a reduced scale takes fewer images"


def test_a_figure_and_an_analysis_measure_one_thing():
    job, field, _ = CELLS["draw_cosines  mean_cosine"]
    subject = subject_of(job)
    own = quantity("draw_cosines").compute(subject)
    assert read_theory(Theory("draw_cosines", field=field), subject).numbers[field] == own.metrics["mean_cosine"]
    assert own.rows[0]["mean cosine"] == own.metrics["mean_cosine"]


def test_what_a_network_cannot_have_is_a_reason():
    plain = next(each for each in plan_item(get_item("common.table2"), "smoke").trainings.values() if each.key == "at")
    found = read_theory(Theory("draw_cosines"), subject_of(ReadingJob(plain, Theory("draw_cosines"))))
    assert "more than one draw" in found.reason


def test_counting_parameters_trains_nothing_and_reads_no_images():
    for scale in ("smoke", "short", "paper"):
        planned = plan_item(get_item("red.parameters"), scale)
        assert planned.unique == []
        assert len(planned.trainings) == 2
    assert plan_item(get_item("common.table1"), "paper", {"at"}, {"parameters"}).unique, "its cost has a latency, which training may change"
