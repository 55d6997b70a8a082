"""Every row of every table resolves to a valid experiment at every scale, its network can be built, and its evaluation is a valid suite."""

from __future__ import annotations

import functools

import pytest
import torch

from analysis.evaluation.tasks import BlockTask, estimated_cost
from analysis.reproduction.papers import get_item, list_items
from analysis.reproduction.papers.measures import Accuracy, Clean, WorstCase
from analysis.reproduction.scale import SCALES
from analysis.reproduction.suites import PlannedRun, attack_item, evaluation_suites, measure_at, overrides_at, plan, read_estimate
from models.errors import UserError
from models.registry import build_model
from models.threat_model import ThreatModel
from orchestration.experiment import ExperimentConfig
from orchestration.recipes import load_recipe
from trainers.data import DATASETS

ITEMS = [name for name in list_items() if not get_item(name).nothing_to_run]


@functools.cache
def experiment(recipe: str, overrides: tuple[str, ...]) -> ExperimentConfig:
    return load_recipe(recipe, [f"--{override}" for override in overrides]).experiment


def fingerprint(run: PlannedRun) -> str:
    return experiment(run.recipe, run.overrides).fingerprint


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ITEMS)
def test_every_plan_resolves_to_valid_recipes(name, scale):
    planned = plan(get_item(name), scale)
    assert planned
    for run in planned:
        found = experiment(run.recipe, run.overrides)
        if scale == "smoke":
            assert (found.data.name, found.backbone.name, found.training.epochs) == ("digits", "resnet8", 3)
            assert found.threat_model.norm == run.run.norm
            assert not found.resources.gpus_per_worker
        if scale == "short":
            assert (found.training.epochs, found.training.schedule.name) == (min(30, run.run.epochs), "one_cycle")
        if scale == "paper":
            assert found.training.epochs == run.run.epochs, "shorter schedules shrink in proportion to it"
            values = found.flatten()
            assert {name: values[name] for name in run.run.in_epochs} == run.run.in_epochs


def test_at_paper_scale_nothing_but_the_row_changes_the_recipe():
    run = plan(get_item("ctrw.table1"), "paper")[1]
    assert (run.row, run.recipe, run.flags) == ("resnet18/without", "ctrw_cifar10_resnet18", ["--defence.constraint=none"])


def test_equal_experiments_are_one_across_tables():
    def of(item: str, row: str, scale: str = "paper") -> str:
        return next(fingerprint(run) for run in plan(get_item(item), scale) if run.row == row)

    assert of("rna.table1", "resnet18/bn") == of("ctrw.table1", "resnet18/baseline") == of("rna.fig1d", "bn") == of("common.table1", "at")
    assert of("rna.table4", "in_bn") == of("rna.table5", "both1_free") == of("rna.fig5a", "rna") == of("rna.table1", "resnet18/rna")
    assert of("ctrw.table7", "lower") == of("ctrw.table1", "resnet18/fixed")
    assert of("ctrw.fig3d", "0") == of("ctrw.table5", "resnet18")
    assert of("dcs.table5", "n2") == of("dcs.fig6a", "k5/n2") == of("dcs.fig7", "2") == of("dcs.table1", "cifar10/resnet18/dcs")
    assert of("rat.table2", "cifar10/trades/second") == of("rat.table6", "second")
    assert of("dcs.table1", "cifar10/resnet18/conv") != of("ctrw.table1", "resnet18/baseline"), "its schedule is another"
    assert of("ctrw.table2", "resnet18/ctrw", "smoke") == of("ctrw.table1", "wrn34/ctrw", "smoke")


def test_rows_that_the_paper_does_not_have_can_be_left_out():
    item = get_item("rat.table1")
    assert {run.row for run in plan(item, "short")} - {run.row for run in plan(item, "short", extra=False)} == {
        row.key for row in item.rows if row.extra
    }


def test_an_unknown_scale_is_a_user_error():
    with pytest.raises(UserError, match="'smoke'"):
        plan(get_item("ctrw.table1"), "smok")


def test_a_row_may_need_a_training_per_column_group():
    groups = {run.group: run.recipe for run in plan(get_item("rna.table3"), "paper")}
    assert groups == {"CIFAR-10": "rna_cifar10_wrn34_10", "ImageNet": "rna_imagenet_resnet50"}


def test_fields_counted_in_epochs_shrink_with_the_schedule():
    (awp,) = [run.run for run in plan(get_item("rat.table1"), "paper") if run.row == "awp"]
    field = "training.objective.weight_perturbation.warmup_epochs"
    assert f"{field}=2" in overrides_at(awp, "short")
    assert f"{field}=1" in overrides_at(awp, "smoke")
    assert experiment(awp.recipe, ()).training.objective.weight_perturbation.warmup_epochs == 9


@pytest.mark.slow
def test_every_network_of_the_smoke_scale_can_be_built():
    info = DATASETS["digits"]
    built = set()
    for name in ITEMS:
        for run in plan(get_item(name), "smoke"):
            found = experiment(run.recipe, run.overrides)
            network = (found.defence.name, found.defence.parameters.model_dump_json())
            if network not in built:
                built.add(network)
                model = build_model(
                    found.defence.name,
                    backbone=found.backbone.name,
                    num_classes=info.num_classes,
                    image_shape=(1, 16, 16),
                    **found.defence.parameters.model_dump(),
                )
                with torch.no_grad():
                    assert model.eval()(torch.zeros(2, 1, 16, 16)).shape == (2, 10)
    assert len(built) > 60


@pytest.mark.parametrize("scale", SCALES)
def test_every_attack_column_is_in_the_suites_of_its_row(scale):
    for name in ITEMS:
        item = get_item(name)
        for run in plan(item, scale):
            suites = {suite.name.split()[-1]: {attack.name: attack for attack in suite.attacks} for suite in evaluation_suites(item, run)}
            row = item.row(run.row)
            for column in item.columns:
                if row.run_for(column) != run.run:
                    continue
                for measure in (column.measure, column.measure.honest):
                    if isinstance(measure, Accuracy):
                        attack = suites[measure.suite][measure.row_name]
                        assert measure.protocol in attack.protocols
                    elif isinstance(measure, WorstCase):
                        assert {"apgd_ce_50", "apgd_margin_50"} <= set(suites[measure.suite])


def test_suites_keep_the_paper_at_paper_scale_and_shrink_below_it():
    item = get_item("dcs.table1")
    run = plan(item, "paper")[2]
    assert run.row == "cifar10/resnet18/dcs"
    (paper, standard) = evaluation_suites(item, run)
    attacks = {attack.name: attack for attack in paper.attacks}
    assert (paper.num_samples, paper.scoring.num_repetitions, attacks["pgd_20"].protocols) == (None, 10, ("T0", "T1"))
    assert attacks["cw"].parameters["steps"] == 1000
    assert (attacks["cw"].protocols, standard.num_samples) == (("T0",), 1000)
    only_paper = evaluation_suites(item, run, honest=False)
    assert len(only_paper) == 1
    assert all(attack.protocols == ("T0",) for attack in only_paper[0].attacks)
    smoke = evaluation_suites(item, plan(item, "smoke")[2])[0]
    attacks = {attack.name: attack for attack in smoke.attacks}
    assert smoke.num_samples == 32
    assert attacks["cw"].parameters["steps"] == 10
    assert attacks["pgd_20"].parameters["step_size"] == pytest.approx(0.025)
    assert attacks["autoattack_of_torchattacks"].parameters["version"] == "rand"
    assert attacks["autoattack_of_torchattacks"].num_samples == 4


@pytest.mark.parametrize("name", ITEMS)
def test_the_attacks_of_every_item_take_minutes_at_smoke(name: str):
    item = get_item(name)
    passes = 0.0
    for planned in plan(item, "smoke"):
        for suite in evaluation_suites(item, planned):
            facts = {"threat_model": ThreatModel(epsilon=0.1), "scoring": suite.scoring, "num_classes": 10, "num_configurations": None}
            for attack in suite.attacks:
                ids = tuple(range(min(suite.num_samples or 10_000, attack.num_samples or 10_000)))
                task = BlockTask(kind="attack", item=attack, protocol="T1", ids=ids, block=0, seed=0, checkpoint="", data="", **facts)
                passes += estimated_cost(task)
    assert passes < 2e6, "a core makes a million passes of ResNet-8 at 16x16 in ten minutes"


def test_attacks_of_the_smoke_scale_grow_with_the_radius_except_under_l2():
    swept = next(column for column in get_item("rna.fig5b").columns if column.key == "epsilon_8")
    linf = plan(get_item("rna.fig5b"), "smoke")[0].run
    assert attack_item(swept.measure, linf, "smoke").epsilon == pytest.approx(0.1)
    assert attack_item(swept.measure, linf, "short").epsilon == pytest.approx(8 / 255)
    l2 = plan(get_item("rat.table3"), "smoke")[0].run
    measure = get_item("rat.table3").column("cifar10_pgd").measure
    assert attack_item(measure, l2, "smoke").parameters["step_size"] == "15/255"
    far = get_item("rna.fig5c").column("mean_20").measure
    assert measure_at(far, linf, "smoke").parameters["differences"] == (9,)
    assert measure_at(far, linf, "paper") == far


def test_numbers_are_read_from_an_evaluation_by_measure():
    from analysis.evaluate import evaluate

    model = build_model("ctrw", backbone="resnet8", image_shape=(1, 8, 8))
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand((4, 1, 8, 8), generator=generator), torch.arange(4)
    item = get_item("ctrw.fig3c")
    (run,) = plan(item, "smoke")
    (suite,) = evaluation_suites(item, run)
    suite = suite.model_copy(update={"attacks": tuple(attack for attack in suite.attacks if attack.name == "pgd_20 steps=10")})
    result = evaluate(model, x, y, suite=suite)
    measure = item.column("steps_10").measure
    paper, honest = read_estimate(measure, result), read_estimate(measure.honest, result)
    assert paper.num_draws == 1
    assert honest.num_draws == 5
    assert read_estimate(Clean(), result) == result.clean
    assert read_estimate(item.column("steps_20").measure, result) is None
    assert read_estimate(WorstCase("standard"), result) == result.headline


@pytest.mark.parametrize("name", ITEMS)
def test_smoke_asks_for_one_worker_without_a_gpu(name: str):
    for run in plan(get_item(name), "smoke"):
        resources = experiment(run.recipe, run.overrides).resources
        assert (resources.workers, resources.gpus_per_worker) == (1, 0)
