"""Beginning with given weights: every tensor that has a place gets there, the rest is said, and what cannot be is one message."""

from __future__ import annotations

import random

import pytest
import torch

from models.errors import UserError
from models.initial_weights import begin_with, is_path
from models.randomness import resample
from models.registry import build_model

SHAPE = (3, 16, 16)
UNIT = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def network(defence="at", backbone="resnet8", seed=0, **parameters):
    return build_model(defence, backbone=backbone, image_shape=SHAPE, seed=seed, **UNIT, **parameters).eval()


def randomized(state, seed=1):
    """Return tensors of these names and shapes that no builder would make, statistics of batches included."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(value.shape, generator=generator) * 0.2 + 0.1 if value.is_floating_point() else value
        for name, value in state.items()
    }


def answers(model, x):
    with torch.no_grad():
        return model(x)


X = torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("backbone", ["resnet8", "wrn16_4", "vit_tiny"])
def test_a_network_of_the_same_kind_answers_alike_afterwards(backbone):
    given, taken = network(backbone=backbone), network(backbone=backbone, seed=5)
    assert not torch.equal(answers(given, X), answers(taken, X))
    report = begin_with(taken, given.state_dict(), source="x")
    assert torch.equal(answers(given, X), answers(taken, X))
    assert (report.reinitialized, report.skipped) == ((), ())


ELSEWHERE = {
    "resnet8": (("classifier.", "linear."), ("classifier.", "fc.")),
    "wrn16_4": (("classifier.", "fc."), (".shortcut.", ".convShortcut.")),
    "preact_resnet18": (("classifier.", "linear."), (".shortcut.", ".shortcut.0.")),
}


@pytest.mark.parametrize("prefix", ["", "module.", "module.model."])
@pytest.mark.parametrize("backbone", ELSEWHERE)
def test_names_of_other_codes_are_translated(backbone, prefix):
    given = network(backbone=backbone)
    state = randomized(given.backbone.state_dict())
    given.backbone.load_state_dict(state)
    renamed = {}
    for name, value in state.items():
        for ours, theirs in ELSEWHERE[backbone]:
            name = name.replace(ours, theirs)
        renamed[prefix + name] = value
    taken = network(backbone=backbone, seed=5)
    report = begin_with(taken, renamed, source="x")
    assert torch.equal(answers(given, X), answers(taken, X))
    assert (report.reinitialized, report.skipped) == ((), ())


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050", "vit_tiny_patch16_224"])
def test_timms_own_names_are_known(name):
    import timm

    options = {"img_size": SHAPE[1:]} if name.startswith("vit") else {}
    raw = timm.create_model(name, num_classes=10, **options)
    raw.load_state_dict(randomized(raw.state_dict()))
    raw.eval()
    taken = network(backbone=f"timm:{name}")
    report = begin_with(taken, raw.state_dict(), source="x")
    torch.testing.assert_close(answers(taken, X), answers(raw, X), rtol=1e-4, atol=1e-5)
    assert (report.reinitialized, report.skipped) == ((), ())


def test_a_random_layer_takes_what_it_stands_for():
    given = network().state_dict()
    report = begin_with(ctrw := network("ctrw"), given, source="x")
    assert set(report.reinitialized) == {name for name in ctrw.state_dict() if name.endswith((".mu", ".sigma"))}
    filters = network("ctrw", seed=5, variant="filter")
    report = begin_with(filters, given, source="x")
    means = [name for name in filters.state_dict() if name.endswith(".mu")]
    assert means
    for name in means:
        assert torch.equal(filters.state_dict()[name], given[name.replace(".mu", ".weight")])
    assert all(name.endswith(".sigma") for name in report.reinitialized)
    rna = network("rna")
    begin_with(rna, given, source="x")
    assert torch.equal(rna.state_dict()["backbone.bn1.branches.bn.running_var"], given["backbone.bn1.running_var"])
    resample(rna)
    assert answers(rna, X).isfinite().all()


def test_whatever_is_left_out_or_renamed_is_said():
    for seed in range(30):
        choose = random.Random(seed)
        given = randomized(network().state_dict(), seed)
        dropped = {name for name in given if choose.random() < 0.2 and not name.endswith("num_batches_tracked")}
        strange = {f"elsewhere.{name}": given[name] for name in given if choose.random() < 0.1 and not name.endswith("num_batches_tracked")}
        fresh = network(seed=5)
        before = {name: value.clone() for name, value in fresh.state_dict().items()}
        state = {name: value for name, value in given.items() if name not in dropped} | strange
        report = begin_with(fresh, state, source="x")
        after = fresh.state_dict()
        assert set(report.reinitialized) == dropped
        assert set(report.skipped) == set(strange)
        for name in after:
            expected = before if name in dropped else given
            assert torch.equal(after[name], expected[name]), name


@pytest.mark.parametrize("seed", range(5))
def test_other_shapes_are_one_message_and_change_nothing(seed):
    choose = random.Random(seed)
    state = dict(network().state_dict())
    broken = choose.sample([name for name in state if state[name].dim()], choose.randint(1, 4))
    for name in broken:
        state[name] = torch.zeros(*state[name].shape, 2)
    fresh = network(seed=5)
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    with pytest.raises(UserError, match="other shapes") as caught:
        begin_with(fresh, state, source="given.pt")
    for name in broken:
        assert name in str(caught.value)
    assert "--training.reinitialize" in str(caught.value)
    assert all(torch.equal(before[name], value) for name, value in fresh.state_dict().items())
    parts = str(caught.value).partition("reinitialize '[")[2].partition("]")[0].split(", ")
    report = begin_with(fresh, state, source="given.pt", reinitialize=parts)
    assert set(broken) <= set(report.reinitialized)


def test_another_number_of_classes_needs_a_fresh_classifier():
    given = build_model("at", backbone="resnet8", image_shape=SHAPE, num_classes=3, seed=4).state_dict()
    with pytest.raises(UserError, match=r"reinitialize '\[classifier\]'"):
        begin_with(network(), given, source="x")
    taken = network(seed=5)
    report = begin_with(taken, given, source="x", reinitialize=["classifier"])
    assert set(report.reinitialized) == {"backbone.classifier.weight", "backbone.classifier.bias"} == set(report.skipped)
    assert torch.equal(taken.state_dict()["backbone.conv1.weight"], given["backbone.conv1.weight"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: {f"encoder.{name}": value for name, value in state.items()}, "no name in it is one of the network's"),
        (lambda state: state | {"backbone.conv1.weight": state["backbone.conv1.weight"] * float("nan")}, "not finite"),
    ],
)
def test_what_cannot_be_weights_of_it_is_refused(change, words):
    with pytest.raises(UserError, match=words):
        begin_with(network(), change(dict(network().state_dict())), source="x")


def test_a_part_that_is_none_is_named_with_a_near_one():
    with pytest.raises(UserError, match=r"'clasifier' is no tensor.*'classifier'"):
        begin_with(network(), network().state_dict(), source="x", reinitialize=["clasifier"])


def test_paths_and_names_are_told_apart():
    assert all(is_path(name) for name in ("a.pt", "./a", "runs/x/model", "/a/b.safetensors", "~/w.pth"))
    assert not any(is_path(name) for name in ("at_digits", "0123456789abcdef", "0" * 32))
