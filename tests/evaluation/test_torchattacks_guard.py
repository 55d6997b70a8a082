"""torchattacks behind the guard: the same attacks, none of the side effects."""

import random

import numpy as np
import pytest
import torch
from evaluation_toys import AdditiveNoise, Quantized, classifier, labelled_by, pattern, two_classes
from torch import nn

from analysis.attacked_model.draws import ONLY_DRAW, FixedDraws, FreshDraws
from analysis.attacked_model.model import AttackedModel, Predictor
from analysis.attacks import torchattacks_guard
from analysis.attacks.registry import AttackProblem, attack_entry, attacks, parse_attack_parameters
from analysis.attacks.torchattacks_guard import run_torchattacks
from models.errors import UserError
from models.threat_model import ThreatModel
from trainers.attacks import pgd

pytest.importorskip("torchattacks")


def guarded(model, x, y, class_name, source=None, num_classes=5, **arguments):
    target = AttackedModel(Predictor(model), source or FixedDraws((ONLY_DRAW,)))
    return run_torchattacks(target, x, y, class_name=class_name, arguments=arguments, num_classes=num_classes)


def test_pgd_of_the_library_equals_ours_on_a_deterministic_model():
    network = classifier()
    x, y = labelled_by(network, 8)
    theirs = guarded(network, x, y, "PGD", random_start=False, steps=10)
    ours = pgd(network, x, y, random_start=False, steps=10)
    assert torch.allclose(theirs.x, ours, atol=1e-6)


# Every attack of the five papers, with sizes that make it short.
PAPER_ATTACKS = {
    "FGSM": {},
    "BIM": {"steps": 3},
    "PGD": {"steps": 3},
    "EOTPGD": {"steps": 3},
    "MIFGSM": {"steps": 3},
    "DIFGSM": {"steps": 3},
    "TPGD": {"steps": 3},
    "PGDL2": {"steps": 3},
    "CW": {"steps": 5},
    "DeepFool": {"steps": 3},
    "APGD": {"steps": 3},
    "APGDT": {"steps": 3},
    "FAB": {"steps": 3},
    "Square": {"n_queries": 20},
    "AutoAttack": {"version": "rand"},
    "OnePixel": {"steps": 1},
    "Pixle": {"x_dimensions": (1, 2), "y_dimensions": (1, 2), "restarts": 2, "max_iterations": 2},
    "SparseFool": {"steps": 2},
    "JSMA": {"gamma": 0.05},
    "SPSA": {"nb_iter": 2, "nb_sample": 8},
}


@pytest.mark.parametrize("class_name", PAPER_ATTACKS)
def test_nothing_is_left_behind(class_name):
    network = classifier(num_classes=10).train()
    network[1].eval()  # frozen batch normalization in a training model, which the library would put into train mode
    network[5].weight.grad = torch.full_like(network[5].weight, 3.0)
    x, y = labelled_by(classifier(num_classes=10), 3)
    modes = [module.training for module in network.modules()]
    state = {name: value.clone() for name, value in network.state_dict().items()}
    random.seed(1)
    np.random.seed(2)  # noqa: NPY002
    torch.manual_seed(3)
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    entry = attack_entry(f"torchattacks_{class_name.lower()}")
    norm = "l2" if entry.norms == ("l2",) else "linf"
    problem = AttackProblem(x, y, ThreatModel(norm=norm, epsilon=0.1), 10, 0)
    parameters = parse_attack_parameters(entry.name, PAPER_ATTACKS[class_name])
    with torch.no_grad():  # evaluation code may well sit inside no_grad
        output = entry.run(AttackedModel(Predictor(network), FixedDraws((ONLY_DRAW,))), problem, parameters)
    assert output.x.shape == x.shape
    assert output.x.isfinite().all()
    assert ((output.x >= 0) & (output.x <= 1)).all()
    assert output.num_not_finite == output.num_out_of_range == 0
    if entry.bounded:
        moved = (output.x - x).flatten(1)
        assert (moved.norm(dim=1) if norm == "l2" else moved.abs().amax(1)).max() <= 0.1 + 1e-6
    assert entry.bounded == (class_name not in ("CW", "DeepFool", "SparseFool", "OnePixel", "Pixle", "JSMA"))
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert torch.equal(network[5].weight.grad, torch.full_like(network[5].weight, 3.0))
    assert network[0].weight.grad is None
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])
    assert not output.x.requires_grad


def test_state_comes_back_after_an_exception():
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(64, 5)

        def forward(self, x):
            raise RuntimeError("out of memory")

    network = Breaks().train()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with pytest.raises(UserError, match="out of memory"):
        guarded(network, torch.rand(2, 1, 8, 8, generator=torch.Generator()), torch.tensor([0, 1]), "PGD")
    assert network.training
    assert network.inner.training
    assert torch.equal(torch.get_rng_state(), before)
    assert network.inner.weight.requires_grad


@pytest.mark.parametrize("class_name", ["PGD", "OnePixel", "AutoAttack"])
def test_results_depend_on_the_seed_given_and_on_nothing_else(class_name):
    network = classifier()
    x, y = labelled_by(network, 3)
    outputs = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        np.random.seed(global_seed)  # noqa: NPY002
        outputs.append(guarded(network, x, y, class_name, **({"version": "rand"} if class_name == "AutoAttack" else {})).x)
    assert torch.equal(*outputs)


def test_randomized_model_is_redrawn_at_each_forward_or_frozen():
    model = AdditiveNoise(pattern(), 0.5)
    x, y = two_classes(4)
    fresh, frozen = FreshDraws(1, "fresh"), FixedDraws((ONLY_DRAW,))
    for source, expected in ((fresh, 6), (frozen, 1)):
        target = AttackedModel(Predictor(model), source)
        run_torchattacks(target, x, y, class_name="PGD", arguments={"steps": 6}, num_classes=2)
        assert len(target.used) == expected


def test_nan_becomes_the_clean_image_and_is_counted():
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 5)).eval()
    nn.init.zeros_(network[1].weight)  # constant logits: DeepFool divides zero by zero
    nn.init.zeros_(network[1].bias)
    x = torch.rand((3, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    output = guarded(network, x, torch.zeros(3, dtype=torch.long), "DeepFool", steps=2)
    assert output.num_not_finite == 3
    assert torch.equal(output.x, x)


def test_cw_works_on_negative_logits_and_on_black_and_white_pixels():
    class Negative(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, x):
            return self.network(x) - 100

    network = classifier()
    x = torch.randint(0, 2, (8, 1, 8, 8), generator=torch.Generator().manual_seed(4)).float()
    y = network(x).argmax(1)
    output = guarded(Negative(network), x, y, "CW", c=100, steps=60, lr=0.3)
    assert (network(output.x).argmax(1) != y).float().mean() > 0.5


def test_cw_runs_all_its_steps_on_changing_draws_and_may_stop_on_a_fixed_one():
    model = AdditiveNoise(pattern(), 0.5)
    x, y = two_classes(4)
    passes = {}
    for name, source in (("fresh", FreshDraws(1, "cw")), ("fixed", FixedDraws((ONLY_DRAW,)))):
        target = AttackedModel(Predictor(model), source)
        run_torchattacks(target, x, y, class_name="CW", arguments={"steps": 40, "lr": 0.5}, num_classes=2)
        passes[name] = target.num_forward / len(x)
    assert passes["fresh"] == 40
    assert passes["fixed"] < 40, "the library's own early stop, as the papers ran it"


def test_spsa_is_given_iterations_enough_to_use_its_radius():
    network = classifier()
    x, y = labelled_by(network, 2)
    output = guarded(network, x, y, "SPSA", nb_sample=2)
    assert (output.x - x).abs().amax() > 0.02, "the library's default moves 0.01 at most"


def test_a_zero_gradient_stalls_mifgsm_but_returns_no_nan():
    network = classifier()
    x, y = labelled_by(network, 3)
    output = guarded(Quantized(network), x, y, "MIFGSM")  # it divides the gradient by its length, here zero
    assert torch.equal(output.x, x), "C12 says that there is no gradient"


def test_the_attacked_model_keeps_its_own_draws_whatever_the_library_seeds():
    model = AdditiveNoise(pattern(), 0.5)
    x, y = two_classes(4)
    seen = []
    for seed in (1, 2):
        target = AttackedModel(Predictor(model), FreshDraws(1, "private", seed))
        run_torchattacks(target, x, y, class_name="APGD", arguments={"steps": 3}, num_classes=2, seed=0)
        seen.append(set(target.used))
    assert seen[0].isdisjoint(seen[1]), "APGD seeds the global generator alike in both; draws do not come from it"


def test_mistakes_are_explained(monkeypatch):
    network = classifier()
    x, y = labelled_by(network, 2)
    with pytest.raises(UserError, match=r"no argument 'step'.*steps"):
        guarded(network, x, y, "PGD", step=3)
    with pytest.raises(UserError, match="MIFGSM"):
        guarded(network, x, y, "MIFGM")
    with pytest.raises(UserError, match="at least 4 classes"):
        guarded(network, x, y, "APGDT", num_classes=3)
    with pytest.raises(UserError, match="at least 10 classes"):
        guarded(network, x, y, "JSMA")

    def missing(name):
        raise ImportError(f"No module named {name!r}")

    torchattacks_guard._library.cache_clear()
    monkeypatch.setattr(torchattacks_guard.importlib, "import_module", missing)
    with pytest.raises(UserError, match="pip install --no-deps torchattacks"):
        guarded(network, x, y, "PGD")
    torchattacks_guard._library.cache_clear()


def test_autoattack_of_the_library_never_goes_by_the_official_name():
    assert "torchattacks_autoattack" in attacks()
    assert all(name.startswith("torchattacks_") for name, entry in attacks().items() if entry.requires == "torchattacks")
