"""Sweeps over several recipes, explicit points, theory as a prior: driven by hand without a cluster."""

from __future__ import annotations

import pytest
import yaml

from models.errors import UserError
from models.layers.channel_statistics import parse_normalization
from orchestration.catalogue import catalogue
from orchestration.defences.ctrw import CtrwPrior, initial_lower_bound
from orchestration.search_space import chosen_fields
from orchestration.sweeping.config import SweepConfig, sweep_key
from orchestration.sweeping.item_grid import item_tree
from orchestration.sweeping.loading import check_sweep, load_sweep
from orchestration.sweeping.named import list_sweeps
from orchestration.sweeping.proposals import StudySearch
from orchestration.sweeping.study import num_wanted, open_study, planned_points

JOINT = {
    "description": "two recipes",
    "recipes": ["ctrw_digits", "rna_digits"],
    "space": {
        "ctrw_digits": {
            "defence.lower_bound": {"type": "float", "low": 200, "high": 2000, "log": True},
            "defence.upper_bound": {"type": "float", "low": 800, "high": 4000, "above": "defence.lower_bound"},
        },
        "rna_digits": {"defence.choice": {"type": "choice", "choices": ["per_layer", "per_network"]}},
        "training.optimizer.learning_rate": {"type": "float", "low": 0.01, "high": 0.2, "log": True},
    },
    "num_trials": 12,
}


def joint(folder, **changes):
    path = folder / "both.yaml"
    path.write_text(yaml.safe_dump(JOINT | changes))
    return load_sweep(str(path))


def test_a_joint_sweep_chooses_the_recipe_first_and_then_only_its_dimensions(tmp_path):
    config = joint(tmp_path)
    study = open_study(config, tmp_path)
    search = StudySearch(config, study)
    seen = set()
    for index in range(12):
        values = search.suggest(f"t{index}")["values"]
        recipe = values["recipe"]
        seen.add(recipe)
        experiment = config.experiment(values)
        assert experiment.name == recipe
        assert experiment.training.optimizer.learning_rate == values["training.optimizer.learning_rate"]
        others = {"ctrw_digits", "rna_digits"} - {recipe}
        assert not any(name.startswith(f"{other}/") for other in others for name in values)
        if recipe == "ctrw_digits":
            assert values["ctrw_digits/defence.upper_bound"] >= values["ctrw_digits/defence.lower_bound"]
            assert experiment.defence.parameters.lower_bound == values["ctrw_digits/defence.lower_bound"]
        assert study.trials[-1].user_attrs["fingerprint"] == experiment.fingerprint
        search.on_trial_complete(f"t{index}", {"epoch": 12, "finished": True, "validation/robust_accuracy": 0.5})
    assert seen == {"ctrw_digits", "rna_digits"}


def test_a_trial_of_a_joint_sweep_is_the_run_that_its_recipe_alone_would_be(tmp_path):
    config = joint(tmp_path)
    alone = load_sweep("ctrw_bounds_digits")
    values = {"defence.lower_bound": 300.0, "defence.upper_bound": 900.0}
    scoped = {"recipe": "ctrw_digits"} | {f"ctrw_digits/{name}": value for name, value in values.items()}
    assert chosen_fields(scoped) == values
    assert config.experiment(scoped | {"ctrw_digits/defence.constraint": "project"}).fingerprint == alone.experiment(values).fingerprint


def test_the_catalogue_gives_the_space_of_a_recipe_without_one(tmp_path):
    config = joint(tmp_path, space={"rna_digits": JOINT["space"]["rna_digits"]})
    assert {"ctrw_digits/defence.lower_bound", "ctrw_digits/defence.upper_bound"} <= set(config.space)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"space": {"rna_digits": {"defence.choise": {"type": "choice", "choices": ["per_layer"]}}}}, ["rna_digits", "choise"]),
        ({"space": {"rna_digits": {"defence.choice": {"type": "choice", "choices": ["per_moon"]}}}}, ["per_moon", "per_layer"]),
        ({"space": {"defence.lower_bound": {"type": "float", "low": 5, "high": 10}}}, ["lower_bound"]),
        ({"recipes": ["ctrw_digits", "rna_digit"]}, ["'rna_digits'"]),
        ({"recipes": ["ctrw_digits", "ctrw_digits"]}, ["twice"]),
        ({"points": [{"recipe": "dcs_digits"}]}, ["dcs_digits"]),
    ],
)
def test_mistakes_in_any_recipe_are_found_before_anything_starts(changes, parts, tmp_path):
    with pytest.raises(UserError) as caught:
        joint(tmp_path, **changes)
    for part in parts:
        assert part in str(caught.value)


def test_explicit_points_come_first_or_are_all_there_is(tmp_path):
    table = check_sweep(*item_tree("rna.table5"))
    assert num_wanted(table) == 8
    points = planned_points(table)
    assert {point["training.redraw"] for point in points} == {"attack_then_step", "each_batch"}
    assert points[0]["defence.pool"] == ["bn", "in", "gn_groups_32", "ln"]
    config = load_sweep("ctrw_bounds_digits", {"points": [{"defence.lower_bound": 321.0}]})
    search = StudySearch(config, open_study(config, tmp_path))
    assert search.suggest("a")["values"]["defence.lower_bound"] == 321.0
    assert search.suggest("b")["values"]["defence.lower_bound"] != 321.0
    with pytest.raises(UserError, match="does not take 5"):
        load_sweep("ctrw_bounds_digits", {"points": [{"defence.lower_bound": 5}]})


def test_lemma_1_bounds_or_seeds_ctrw_and_says_when_it_leaves_nothing():
    # With mu = 1 and sigma = 1: 1000 / E|1 + delta|, and E|1 + delta| = 1.16663 for a standard normal delta.
    assert initial_lower_bound(CtrwPrior(), 1.0) == pytest.approx(1000 / 1.16663, rel=0.02)
    seeded = load_sweep("ctrw_theory_digits")
    assert 840 < seeded.points[0]["defence.lower_bound"] < 875
    bounded = load_sweep("ctrw_theory_digits", {"prior": {"ctrw": {"use": "bound"}}})
    assert bounded.space["defence.lower_bound"].low == seeded.points[0]["defence.lower_bound"]
    with pytest.raises(UserError, match=r"infeasible.*ends at 2000"):
        load_sweep("ctrw_theory_digits", {"prior": {"ctrw": {"use": "bound", "alpha": -1e-4}}})


def test_equation_12_bounds_or_seeds_dcs_and_says_when_it_leaves_nothing():
    seeded = load_sweep("dcs_theory_digits")
    assert {(point["defence.kernel_size"], point["defence.num_taps"]) for point in seeded.points} == {(3, 2), (3, 3)}
    assert any("k=5" in remark and "no searched n" in remark for remark in seeded.remarks)
    prior = {"epsilon_c": 0.9, "epsilon_l": 40, "num_points": 324, "stride": 2, "use": "bound"}
    bounded = load_sweep("dcs_theory_digits", {"prior": {"dcs": prior}})
    assert bounded.space["defence.kernel_size"].choices == (3,)
    assert bounded.space["defence.num_taps"].choices == (2, 3)
    with pytest.raises(UserError, match="leaves nothing"):  # the paper's own k=5, n=2, S=1 among them
        load_sweep("dcs_theory_digits", {"prior": {"dcs": prior | {"stride": 1}}})


@pytest.mark.parametrize(
    ("prior", "parts"),
    [
        ({"ctwr": {}}, ["'ctwr'", "'ctrw'"]),
        ({"rna": {"use": "seed"}}, ["'rna'", "ctrw, dcs"]),
        ({"ctrw": {"ues": "seed"}}, ["'ues'", "'use'"]),
        ({"ctrw": {"use": "never"}}, ["use", "'never'", "'bound' or 'seed'"]),
        ({"ctrw": 3}, ["ctrw", "mapping", "alpha, use"]),
        ({"dcs": {"epsilon_c": 1}}, ["epsilon_l"]),
        (["ctrw"], ["prior"]),
    ],
)
def test_a_mistake_in_a_prior_names_it_and_what_is_allowed(prior, parts):
    with pytest.raises(UserError) as caught:
        load_sweep("ctrw_bounds_digits", {"prior": prior})
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_a_prior_that_asks_nothing_of_a_defence_is_none():
    assert sweep_key(load_sweep("ctrw_theory_digits", {"prior": {"ctrw": {"use": "seed"}, "dcs": None}})) == sweep_key(
        load_sweep("ctrw_theory_digits")
    )
    stored = load_sweep("ctrw_theory_digits").model_dump(mode="json")
    assert SweepConfig(**stored).prior == load_sweep("ctrw_theory_digits").prior


def test_the_name_of_a_recipe_is_a_sweep_over_its_defences_own_space():
    config = load_sweep("ctrw_fashion_mnist", {"num_trials": 3})
    assert (config.name, config.recipe, config.num_trials) == ("ctrw_fashion_mnist", "ctrw_fashion_mnist", 3)
    assert {"defence.constraint", "defence.lower_bound", "defence.upper_bound", "defence.position"} == set(config.space)
    assert config.baselines == ("natural_fashion_mnist", "at_fashion_mnist")
    assert load_sweep("red_cifar10_resnet18_dcs_members").baselines == ("natural_cifar10_resnet18", "at_cifar10_resnet18")
    assert load_sweep("at_digits").baselines == ("natural_digits",), "a recipe is no baseline of itself"


def test_a_recipe_named_as_a_sweep_can_take_another_data_set():
    settings = {"settings.data.name": "image_folder", "settings.data.folder": "photos", "settings.data.image_size": 32}
    config = load_sweep("rna_fashion_mnist", settings)
    assert config.experiment({}).data.folder == "photos"
    assert config.baseline_experiment("at_fashion_mnist").data.folder == "photos"


def test_a_misspelt_recipe_is_told_the_nearest_name():
    with pytest.raises(UserError, match="'ctrw_fashion_mnist'"):
        load_sweep("ctrw_fashion_mnsit")


def test_the_own_space_of_ctrw_has_an_upper_bound_only_where_it_is_used():
    space = load_sweep("ctrw_digits").space
    assert space["defence.upper_bound"].when == {"defence.constraint": ("project",)}


def test_no_search_space_offers_a_pool_of_normalizations_twice():
    spaces = {name: entry.search_space for name, entry in catalogue().items()}
    spaces |= {name: load_sweep(name).space for name in list_sweeps()}
    searched = [(name, space[field]) for name, space in spaces.items() for field in space if field.endswith("defence.pool")]
    assert len(searched) > 1
    for name, dimension in searched:
        pools = [frozenset(map(parse_normalization, choice)) for choice in dimension.choices]
        assert len(set(pools)) == len(pools), f"{name}: {dimension.choices}"
        assert all(len(pool) == len(choice) for pool, choice in zip(pools, dimension.choices, strict=True))
