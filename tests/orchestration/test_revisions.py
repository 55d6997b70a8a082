"""A value whose meaning changed makes another experiment: runs made before are neither reused nor gone on with."""

from __future__ import annotations

import pytest

from orchestration.recipes import load_recipe

# Fingerprints of runs whose masks came from parity classes drawn at random, of networks without any batch normalization, and of runs
# in which RNA's and BGN's statistics were each worker's.
BEFORE = {
    ("rna_cifar10_resnet18", "training.batch_norm=synchronized"): "49174833f15ec287",
    ("single_normalization_cifar10_wrn34_10", ""): "83270563ccd0089b",
    ("single_normalization_cifar10_wrn34_10", "defence.normalization=in"): "68f25301fb0babcd",
    ("dcs_cifar10_resnet18", "defence.sampling=stratified2"): "a876f5a80badac09",
    ("red_digits_dcs_members", "defence.member={name: dcs, sampling: stratified2}"): "8cdd943c0d077aa4",
    ("rna_dcs_digits", "defence.defences=[{name: rna}, {name: dcs, sampling: stratified2}]"): "6296f5ef443a5d3a",
}


@pytest.mark.parametrize(("recipe", "override"), BEFORE)
def test_runs_of_an_earlier_meaning_are_other_experiments(recipe, override):
    experiment = load_recipe(recipe, [f"--{override}"] if override else []).experiment
    section = "training" if override.startswith("training") else "defence"
    assert experiment.scientific()[section]["revision"] >= 1
    assert experiment.fingerprint != BEFORE[recipe, override]


@pytest.mark.parametrize(
    ("recipe", "overrides", "fingerprint"),
    [
        ("dcs_cifar10_resnet18", [], "20f782a4e94823c1"),
        # With all four classes nothing is drawn but the taps, as before.
        ("dcs_cifar10_resnet18", ["--defence.sampling=stratified2", "--defence.num_taps=4"], "b52004b0335377c0"),
        ("single_normalization_cifar10_wrn34_10", ["--defence.normalization=bn"], "4a92714e5565d7b8"),
        ("rna_cifar10_resnet18", [], "15d84849c89d6406"),
    ],
)
def test_what_kept_its_meaning_keeps_its_fingerprint(recipe, overrides, fingerprint):
    assert load_recipe(recipe, overrides).experiment.fingerprint == fingerprint
