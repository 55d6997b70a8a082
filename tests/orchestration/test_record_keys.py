"""Keys of what is kept: equal work is found again only while its key stays what it was. A key that changes here strands what users have.

Every kind of record has one fixed example: blocks of evaluations, readings of reproductions, sweeps. Fingerprints of experiments are in
`recipe_fingerprints.txt`. Where a meaning did change, the key is changed here with the sentence that says so.
"""

from __future__ import annotations

import pytest

from analysis.evaluation.protocols import Scoring
from analysis.evaluation.studies import StudyPoint, StudySettings
from analysis.evaluation.suites import AttackItem
from analysis.evaluation.tasks import BlockTask
from analysis.reproduction.papers.measures import Theory, Timing
from analysis.reproduction.readings import identity
from models.threat_model import ThreatModel
from orchestration.sweeping.config import sweep_key
from orchestration.sweeping.loading import load_sweep
from orchestration.sweeping.named import list_sweeps

ATTACK = AttackItem(name="pgd_7", attack="pgd", parameters={"steps": 7}, protocols=("T1",))
POINT = StudyPoint(name="epsilon", level=0.1, settings=StudySettings())


def block(**changes) -> BlockTask:
    """Return a block of three images; what is not named is as every evaluation has it."""
    common = {
        "threat_model": ThreatModel(epsilon="8/255"),
        "scoring": Scoring(),
        "seed": 5,
        "num_classes": 10,
        "num_configurations": None,
        "block": 1,
        "ids": (3, 1, 2),
        "checkpoint": "weights",
        "model": "function",
        "data": "images",
        "defence": "ctrw",
    }
    return BlockTask(**common | changes)


BLOCKS = {
    "clean": (block(kind="clean"), "18b002d7312872170f4e190805bd87ae"),
    "attack": (block(kind="attack", item=ATTACK, protocol="T2"), "a4f776e483dac91733a58fa6e9722171"),
    "epsilon_zero": (block(kind="epsilon_zero", item=ATTACK), "3ae0a9ca3f0d297e05847195a04479a9"),
    "study": (block(kind="study", item=ATTACK, study=POINT), "eb4fccc18ccfb7df53d29bb0868bc4f6"),
}
READINGS = {
    "theory": (Theory("weight_landscape", {"radius": "1/2"}, field="mean"), "983c818efa0efe6fdb3804e04a2839fc"),
    "time": (Timing("test_set_seconds"), "69a26b068f940e539fdb46affcff6758"),
}
# Digits are trained in batches of 32 since 252 steps of 64 turned out too few; sweeps on them are other searches.
SWEEPS = {
    "ctrw_bounds_digits": "ctrw_bounds_digits-ef881917",
    "ctrw_theory_digits": "ctrw_theory_digits-79c8ba1e",
    "dcs_taps_digits": "dcs_taps_digits-a98c10a9",
    "dcs_theory_digits": "dcs_theory_digits-ef68ac5d",
    "ingredients_cifar10_jpeg": "ingredients_cifar10_jpeg-ff97d8ec",
    "ingredients_digits": "ingredients_digits-3dcd0c81",
    "joint": "joint-6d83857e",
    "rat_awp": "rat_awp-5029ea21",
    "rat_digits": "rat_digits-aa433ec1",
    "rat_weights": "rat_weights-839da9cc",
    "red_grid": "red_grid-bc1fef45",
    "red_regularizers_digits": "red_regularizers_digits-efdd47cd",
    "rna_pools_digits": "rna_pools_digits-cd559c5b",
}


@pytest.mark.parametrize(("task", "key"), BLOCKS.values(), ids=BLOCKS)
def test_blocks_of_an_evaluation(task, key):
    assert task.key == key
    moved = task.model_copy(update={"suite": "another", "num_blocks": 9, "cost": 3.0, "position": 4, "succeeds": "x"})
    assert moved.key == key, "what its plan says is no part of it"
    assert len({each.model_copy(update={"seed": 6}).key for each, _ in BLOCKS.values()} | {each.key for each, _ in BLOCKS.values()}) == 8


@pytest.mark.parametrize(("measure", "key"), READINGS.values(), ids=READINGS)
def test_readings_of_a_reproduction(measure, key):
    assert identity(measure, 64, 0, ["first", "second"], "digits") == key


def test_sweeps():
    assert {name: sweep_key(load_sweep(name)) for name in list_sweeps()} == SWEEPS
