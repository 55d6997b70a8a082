"""A value whose meaning changed makes another experiment: runs made before are neither reused nor gone on with."""

from __future__ import annotations

import pytest

from orchestration.recipes import load_recipe

# Fingerprints of runs whose masks came from parity classes drawn at random.
BEFORE = {
    ("dcs_cifar10_resnet18", "defence.sampling=stratified2"): "a876f5a80badac09",
    ("red_digits_dcs_members", "defence.member={name: dcs, sampling: stratified2}"): "8cdd943c0d077aa4",
    ("rna_dcs_digits", "defence.defences=[{name: rna}, {name: dcs, sampling: stratified2}]"): "6296f5ef443a5d3a",
}


@pytest.mark.parametrize(("recipe", "override"), BEFORE)
def test_runs_of_an_earlier_meaning_are_other_experiments(recipe, override):
    experiment = load_recipe(recipe, [f"--{override}"]).experiment
    section, without = experiment.scientific()["defence"], load_recipe(recipe).experiment.scientific()["defence"]
    assert section["revision"] == without.get("revision", 0) + 1
    assert experiment.fingerprint != BEFORE[recipe, override]


@pytest.mark.parametrize("overrides", [[], ["--defence.sampling=stratified2", "--defence.num_taps=4"]])
def test_what_kept_its_meaning_keeps_its_fingerprint(overrides):
    """With all four classes nothing is drawn but the taps, as before."""
    assert "revision" not in load_recipe("dcs_cifar10_resnet18", overrides).experiment.scientific()["defence"]
