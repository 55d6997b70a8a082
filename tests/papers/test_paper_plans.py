"""Every row of every table resolves to a valid experiment at every scale, its network can be built, and its evaluation is a valid suite."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from analysis.evaluation.block_task import BlockTask
from analysis.evaluation.cost import estimated_cost
from analysis.evaluation.suites import Suite
from analysis.fingerprints import weights_hash
from analysis.reproduction.papers import get_item, list_items
from analysis.reproduction.papers.measures import Accuracy, WorstCase
from analysis.reproduction.papers.model import Item
from analysis.reproduction.scale import SCALES, STAND_IN_SCALES, parse_scale
from analysis.reproduction.suites import attack_item, evaluation_suites, measure_at, read_row
from models.errors import UserError
from models.randomness import num_configurations
from models.registry import build_model
from models.threat_model import ThreatModel
from models.weights import load_pretrained, save_pretrained
from orchestration.home import Home
from orchestration.recipes import load_recipe
from orchestration.reproducing.cost import image_shape, untrained_network
from orchestration.reproducing.plan import Training, evaluated_folder, model_folder, planned_trainings, recipe_experiment
from orchestration.reproducing.scaling import scaled

ITEMS = [name for name in list_items() if not get_item(name).nothing_to_run]


def suites_of(item: Item, training: Training, **settings) -> dict[str, Suite]:
    return evaluation_suites(item, training.row, training.run, training.scale, **settings)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ITEMS)
def test_every_plan_resolves_to_valid_recipes(name, scale):
    planned = planned_trainings(get_item(name), scale)
    assert planned
    for training in planned:
        found, run = training.experiment, training.run
        if scale == "smoke":
            assert (found.data.name, found.backbone.name, found.training.epochs) == ("digits", "resnet8", 3)
            assert found.threat_model.norm == run.norm
            assert not found.resources.gpus_per_worker
        if scale == "small":
            setting = "fashion_mnist_resnet8" if "fashion_mnist" in run.recipe else "cifar10_jpeg_resnet8"
            stand_in = load_recipe(f"at_{setting}").experiment
            assert (found.data, found.backbone) == (stand_in.data, stand_in.backbone)
            assert (found.training.epochs, found.training.batch_size) == (12, stand_in.training.batch_size)
            assert found.threat_model.norm == run.norm
            if run.norm == "linf":
                assert found.threat_model == stand_in.threat_model
                assert (found.training.attack.steps, found.training.attack.step_size) == (
                    stand_in.training.attack.steps,
                    stand_in.training.attack.step_size,
                )
            assert not found.resources.gpus_per_worker
        if scale == "short":
            assert (found.training.epochs, found.training.schedule.name) == (min(30, run.epochs), "one_cycle")
        if scale == "paper":
            assert found.training.epochs == run.epochs, "shorter schedules shrink in proportion to it"
            values = found.flatten()
            assert {name: values[name] for name in run.in_epochs} == run.in_epochs


@pytest.mark.parametrize("scale", SCALES)
def test_what_a_page_says_of_a_training_typed_behind_its_recipe_is_that_training(scale):
    trainings = {each.fingerprint: each for name in ITEMS for each in planned_trainings(get_item(name), scale)}
    assert len(trainings) > 50
    for fingerprint, training in trainings.items():
        typed = load_recipe(training.run.recipe, [f"--{override}" for override in training.overrides]).experiment
        assert (typed.fingerprint, typed.resources) == (fingerprint, training.experiment.resources)


def test_at_paper_scale_nothing_but_the_row_changes_the_recipe():
    training = planned_trainings(get_item("ctrw.table1"), "paper")[1]
    assert (training.key, training.run.recipe, training.overrides) == (
        "resnet18/without",
        "ctrw_cifar10_resnet18",
        ("defence.constraint=none",),
    )


def test_equal_experiments_are_one_across_tables():
    def of(item: str, row: str, scale: str = "paper") -> str:
        return next(each.fingerprint for each in planned_trainings(get_item(item), scale) if each.row.key == row)

    assert of("rna.table1", "resnet18/bn") == of("ctrw.table1", "resnet18/baseline") == of("rna.fig1d", "bn") == of("common.table1", "at")
    assert of("rna.table4", "in_bn") == of("rna.table5", "both1_free") == of("rna.fig5a", "rna") == of("rna.table1", "resnet18/rna")
    assert of("ctrw.table7", "lower") == of("ctrw.table1", "resnet18/fixed")
    assert of("ctrw.fig3d", "0") == of("ctrw.table5", "resnet18")
    assert of("dcs.table5", "n2") == of("dcs.fig6a", "k5/n2") == of("dcs.fig7", "2") == of("dcs.table1", "cifar10/resnet18/dcs")
    assert of("rat.table2", "cifar10/trades/second") == of("rat.table6", "second")
    assert of("dcs.table1", "cifar10/resnet18/conv") != of("ctrw.table1", "resnet18/baseline"), "its schedule is another"
    assert of("ctrw.table2", "resnet18/ctrw", "smoke") == of("ctrw.table1", "wrn34/ctrw", "smoke")


def test_an_unknown_scale_is_a_user_error():
    with pytest.raises(UserError, match="'smoke'"):
        parse_scale("smok")


def test_a_row_may_need_a_training_per_column_group():
    groups = {each.group: each.run.recipe for each in planned_trainings(get_item("rna.table3"), "paper")}
    assert groups == {"CIFAR-10": "rna_cifar10_wrn34_10", "ImageNet": "rna_imagenet_resnet50"}


def test_fields_counted_in_epochs_shrink_with_the_schedule():
    (awp,) = [each.run for each in planned_trainings(get_item("rat.table1"), "paper") if each.key == "awp"]
    recipe = recipe_experiment(awp.recipe, ())
    for scale, warmup in (("paper", 9), ("short", 2), ("small", 1), ("smoke", 1)):
        assert scaled(recipe, awp, scale).training.objective.weight_perturbation.warmup_epochs == warmup


@pytest.mark.slow
@pytest.mark.parametrize("scale", sorted(STAND_IN_SCALES))
def test_every_network_of_a_stand_in_can_be_built(scale):
    built = set()
    for name in ITEMS:
        for training in planned_trainings(get_item(name), scale):
            found = training.experiment
            network = (found.data.name, found.defence.name, found.defence.parameters.model_dump_json())
            if network not in built:
                built.add(network)
                with torch.no_grad():
                    assert untrained_network(found).eval()(torch.zeros(2, *image_shape(found))).shape == (2, 10)
    assert len(built) > 60


def test_rows_of_the_small_scale_are_those_of_the_item():
    item = get_item("common.table1")
    small = item.at("small")
    assert {row.key for row in small.rows} == set(item.small) < {row.key for row in item.rows}
    assert item.at("paper") is item
    assert all(set(note.rows) <= set(item.small) for note in small.notes)
    assert {cell.row.key for cell in small.cells()} == set(item.small)
    with pytest.raises(ValueError, match="rows nothing"):
        dataclasses.replace(item, small=("at", "nothing"))


def test_a_seed_changes_nothing_but_the_seed_and_is_typed_behind_the_recipe():
    for scale in SCALES:
        for first, second in zip(*(planned_trainings(get_item("rat.table2"), scale, seed=seed) for seed in (0, 3)), strict=True):
            assert first.experiment.changed(seed=3) == second.experiment
            assert first.fingerprint != second.fingerprint
            typed = load_recipe(second.run.recipe, [f"--{override}" for override in second.overrides]).experiment
            assert typed.fingerprint == second.fingerprint


@pytest.mark.parametrize("scale", SCALES)
def test_every_attack_column_is_in_the_suites_of_its_row(scale):
    for name in ITEMS:
        item = get_item(name)
        for training in planned_trainings(item, scale):
            suites = {name: {attack.name: attack for attack in suite.attacks} for name, suite in suites_of(item, training).items()}
            for column in item.columns:
                if training.row.run_for(column) != training.run:
                    continue
                for measure in (column.measure, column.measure.honest):
                    if isinstance(measure, Accuracy):
                        attack = suites[measure.suite][measure.row_name]
                        assert measure.protocol in attack.protocols
                    elif isinstance(measure, WorstCase):
                        assert {"apgd_ce_50", "apgd_margin_50"} <= set(suites[measure.suite])


def test_suites_keep_the_paper_at_paper_scale_and_shrink_below_it():
    item = get_item("dcs.table1")
    training = planned_trainings(item, "paper")[2]
    assert training.key == "cifar10/resnet18/dcs"
    suites = suites_of(item, training)
    assert list(suites) == ["paper_dcs", "standard"]
    paper, standard = suites.values()
    attacks = {attack.name: attack for attack in paper.attacks}
    assert (paper.num_samples, paper.scoring.num_repetitions, attacks["pgd_20"].protocols) == (None, 10, ("T0", "T1"))
    assert attacks["cw"].parameters["steps"] == 1000
    assert (attacks["cw"].protocols, standard.num_samples) == (("T0",), 1000)
    (only_paper,) = suites_of(item, training, honest=False).values()
    assert all(attack.protocols == ("T0",) for attack in only_paper.attacks)
    smoke = suites_of(item, planned_trainings(item, "smoke")[2])["paper_dcs"]
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
    for training in planned_trainings(item, "smoke"):
        for suite in suites_of(item, training).values():
            facts = {"threat_model": ThreatModel(epsilon=0.1), "scoring": suite.scoring, "num_classes": 10, "num_configurations": None}
            for attack in suite.attacks:
                ids = tuple(range(min(suite.num_samples or 10_000, attack.num_samples or 10_000)))
                task = BlockTask(kind="attack", item=attack, protocol="T1", ids=ids, block=0, seed=0, checkpoint="", data="", **facts)
                passes += estimated_cost(task)
    assert passes < 2e6, "a core makes a million passes of ResNet-8 at 16x16 in ten minutes"


def test_attacks_of_the_smoke_scale_grow_with_the_radius_except_under_l2():
    swept = next(column for column in get_item("rna.fig5b").columns if column.key == "epsilon_8")
    linf = get_item("rna.fig5b").rows[0].run
    assert attack_item(swept.measure, linf, "smoke").epsilon == pytest.approx(0.1)
    assert attack_item(swept.measure, linf, "short").epsilon == pytest.approx(8 / 255)
    l2 = planned_trainings(get_item("rat.table3"), "smoke")[0].run
    measure = get_item("rat.table3").column("cifar10_pgd").measure
    assert attack_item(measure, l2, "smoke").parameters["step_size"] == "15/255"
    far = get_item("rna.fig5c").column("mean_20").measure
    assert measure_at(far, linf, "smoke").parameters["difference"] == 9
    assert measure_at(far, linf, "paper") == far


def test_numbers_are_read_from_an_evaluation_by_measure():
    from analysis.evaluate import evaluate

    model = build_model("ctrw", backbone="resnet8", image_shape=(1, 8, 8))
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand((4, 1, 8, 8), generator=generator), torch.arange(4)
    item = get_item("ctrw.fig3c")
    (training,) = planned_trainings(item, "smoke")
    (suite,) = suites_of(item, training).values()
    suite = suite.model_copy(update={"attacks": tuple(attack for attack in suite.attacks if attack.name == "pgd_20 steps=10")})
    result = evaluate(model, x, y, suite=suite)
    measure = item.column("steps_10").measure
    paper, honest = read_row(measure, result).estimate, read_row(measure.honest, result).estimate
    assert paper.num_draws == 1
    assert honest.num_draws == 5
    assert read_row(item.column("steps_20").measure, result) is None


@pytest.mark.parametrize("name", ITEMS)
def test_smoke_asks_for_one_worker_without_a_gpu(name: str):
    for training in planned_trainings(get_item(name), "smoke"):
        resources = training.experiment.resources
        assert (resources.workers, resources.gpus_per_worker) == (1, 0)


def test_pools_leave_out_at_smoke_what_does_not_fit_and_the_cells_say_so():
    item = get_item("rna.table5")
    whole = {each.key: each.experiment.defence.parameters.pool for each in planned_trainings(item, "paper")}
    for training in planned_trainings(item, "smoke"):
        kept, wanted = training.experiment.defence.parameters.pool, whole[training.key]
        # The network has layers of 16, 32 and 64 channels; a number of groups above them clamps.
        assert kept == tuple(name for name in wanted if not name.endswith(("size_32", "size_64")))
        told = any(note.key == "groups" for column in item.columns for note in item.cell(training.row, column).notes)
        assert told == (kept != wanted), training.key
    assert {"gn_size_64", "bgn_size_64"} <= {*whole["both64_free"]}


@pytest.mark.parametrize(("n", "masks"), [(4, 1296), (3, 324), (2, 54), (1, 9)])
def test_cancelled_rows_evaluate_the_network_of_uniform_masks_under_stratified_ones(n, masks, tmp_path):
    """The caption cancels in the test alone; what the code does, training under such masks without GSAT, is a row of its own."""
    trainings = {each.key: each for each in planned_trainings(get_item("dcs.table5"), "smoke")}
    plain, cancelled = trainings[f"n{n}"], trainings[f"n{n}/cancelled"]
    assert plain.fingerprint == cancelled.fingerprint
    assert plain.experiment.defence.parameters.sampling == "uniform"
    assert plain.experiment.defence.parameters.gsat != "off"
    home = Home(tmp_path)
    model = build_model("dcs", backbone="resnet8", image_shape=(1, 8, 8), num_taps=n).eval()
    save_pretrained(model, model_folder(home, plain))
    assert evaluated_folder(home, plain) == model_folder(home, plain)
    tested = load_pretrained(evaluated_folder(home, cancelled), resample_on_forward=False)
    assert num_configurations(tested) == masks
    for name, value in tested.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    assert weights_hash(tested) != weights_hash(model), "records of the two must not be taken for one another"
    coded = trainings.get(f"n{n}/as_coded")
    assert (coded is None) == (n == 2), "the code has no such masks for n = 2"
    if coded is not None:
        parameters = coded.experiment.defence.parameters
        assert (parameters.sampling, parameters.gsat, coded.row.extra) == ("stratified2", "off", True)
