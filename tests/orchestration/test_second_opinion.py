"""`rayndom evaluate --against autoattack`: where the independent package is there, and where it is not."""

from __future__ import annotations

import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from analysis.attacks import independent_autoattack
from analysis.statistics import accuracy_interval, paired_difference
from orchestration.evaluating.second_opinion import SecondOpinion
from tests.orchestration.tiny_home import rayndom_json, trained_home

SUITE = """
scoring: {num_selection_draws: 2, num_evaluation_draws: 6}
attacks: [{name: pgd_2, attack: pgd, parameters: {steps: 2}, num_draws: 2}]
"""


class OneStep:
    """The package's interface around one step of the gradient's sign."""

    seen: list[dict] = []  # noqa: RUF012 - what the constructor was given, over all tests

    def __init__(self, model, *, norm, eps, version, seed, device):
        self.seen.append({"norm": norm, "eps": eps, "version": version, "seed": seed, "device": device})
        self.model, self.eps, self.logger = model, eps, logging.getLogger("auto-attack")
        self.apgd = SimpleNamespace(perturb=self.perturb)
        self.apgd_targeted, self.fab, self.square = SimpleNamespace(), SimpleNamespace(), SimpleNamespace()

    def perturb(self, x, y, best_loss=False):
        x = x.clone().requires_grad_()
        torch.nn.functional.cross_entropy(self.model(x), y).backward()
        return (x + self.eps * x.grad.sign()).clamp(0, 1).detach()

    def run_standard_evaluation(self, x, y, batch_size):
        assert batch_size == len(x)
        return self.perturb(x, y), y


@pytest.fixture(scope="module")
def trained(tmp_path_factory, migrated_store):
    """A home with a deterministic and a random model."""
    with trained_home(tmp_path_factory.mktemp("second"), migrated_store, ("ctrw_digits", "at_digits")) as located:
        yield located


@pytest.fixture
def package(monkeypatch):
    """Puts a package in the place of the independent one."""

    def install(content):
        monkeypatch.setitem(sys.modules, independent_autoattack.PACKAGE, content)
        independent_autoattack._library.cache_clear()

    yield install
    independent_autoattack._library.cache_clear()


def run(capsys, home, tmp_path, *arguments):
    """As `rayndom_json`: an evaluation with the suite above on 16 images."""
    suite = tmp_path / "short.yaml"
    suite.write_text(SUITE)
    return rayndom_json(capsys, home, "evaluate", *arguments, "--suite", str(suite), "--samples", "16")


def test_where_it_is_not_installed_one_sentence_says_how(trained, tmp_path, package, capsys):
    package(None)
    code, found, errors = run(capsys, trained, tmp_path, "at_digits", "--against", "autoattack")
    assert code == 2 and found is None
    assert "pip install --no-deps pyautoattack" in errors
    assert not list(trained.root.glob("evaluations/*/records.jsonl")), "nothing ran before it was said"
    code, _, errors = run(capsys, trained, tmp_path, "at_digits", "--against", "autoatack")
    assert code == 2 and "'autoattack'" in errors


@pytest.mark.parametrize(("recipe", "version"), [("at_digits", "standard"), ("ctrw_digits", "rand")])
def test_both_numbers_stand_side_by_side(trained, tmp_path, package, capsys, recipe, version):
    module = ModuleType(independent_autoattack.PACKAGE)
    module.AutoAttack = OneStep
    package(module)
    OneStep.seen.clear()
    code, found, said = run(capsys, trained, tmp_path, recipe, "--against", "autoattack")
    assert code == 0
    assert {each["version"] for each in OneStep.seen} == {version} and {each["norm"] for each in OneStep.seen} == {"Linf"}
    assert {each["eps"] for each in OneStep.seen} == {0.1}
    opinion = found["second_opinion"]
    assert opinion["implementation"] == "pyautoattack"
    assert opinion["ours"]["value"] == found["headline"]["accuracy"]
    assert opinion["difference"]["value"] == pytest.approx(opinion["ours"]["value"] - opinion["theirs"]["value"])
    assert opinion["ours"]["num_samples"] == opinion["theirs"]["num_samples"] == 16
    assert opinion["ours"]["num_draws"] == opinion["theirs"]["num_draws"]
    assert "second opinion" in said
    # It is no part of the evaluation: neither of its rows nor of its checks.
    assert {row["entry"] for row in found["rows"]} == {None, "pgd"}
    # Once measured it is not attacked again.
    OneStep.seen.clear()
    again = run(capsys, trained, tmp_path, recipe, "--against", "autoattack")[1]
    assert again["second_opinion"] == opinion and not OneStep.seen


@pytest.mark.parametrize(
    ("ours", "theirs", "randomized", "said"),
    [
        ([1] * 80 + [0] * 20, [1] * 50 + [0] * 50, False, "its number is too high"),
        ([1] * 50 + [0] * 50, [1] * 80 + [0] * 20, False, "less than the independent attack"),
        ([1] * 80 + [0] * 20, [1] * 80 + [0] * 20, False, "agree within half a point"),
        ([1] * 51 + [0] * 49, [1] * 50 + [0] * 50, False, "its number is too high"),
        ([1] * 51 + [0] * 49, [1] * 50 + [0] * 50, True, "no more than chance"),
    ],
)
def test_what_two_numbers_say_of_each_other(ours, theirs, randomized, said):
    numbers = accuracy_interval(ours, 1), accuracy_interval(theirs, 1), paired_difference(ours, theirs, exact=True)
    assert said in SecondOpinion("other 1.0", *numbers, randomized).sentence
