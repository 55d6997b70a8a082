"""`autoattack_standard` at official strength against independent implementations of the same four attacks, on adversarially trained models.

torchattacks   its APGD, APGDT, FAB and Square with the official sizes, which its own AutoAttack does not use
pyautoattack   a repackaging of the authors' code, if it is installed (`pip install --no-deps pyautoattack`): called directly, and as
               `rayndom evaluate --against autoattack` calls it
"""

import pytest
import torch
from evaluation_toys import digits_classifier
from torch import Tensor, nn

from analysis.evaluate import evaluate
from analysis.evaluation.calibration import calibration_images, calibration_toys
from analysis.evaluation.suites import AttackItem, Suite
from models.threat_model import ThreatModel


def accuracies(network: nn.Module, x: Tensor, y: Tensor, norm: str, epsilon: float, **sizes: int) -> tuple[float, float]:
    """Return our accuracy under PGD-20 and under `autoattack_standard` (its defaults are the official sizes), through the harness."""
    items = (AttackItem(attack="pgd", parameters={"steps": 20}), AttackItem(attack="autoattack_standard", parameters=sizes))
    result = evaluate(network, x, y, Suite(name="official", attacks=items), threat_model=ThreatModel(norm=norm, epsilon=epsilon))
    found = {row.attack: row.estimate.value for row in result.rows}
    return found["pgd"], found["autoattack_standard"]


def surviving(network: nn.Module, x: Tensor, y: Tensor, attacks: list) -> float:
    """Return the share of images that survive attacks one after the other, each on the survivors of those before."""
    rows = torch.arange(len(x))[network(x).argmax(1) == y]
    for attack in attacks:
        if len(rows):
            points = attack(x[rows], y[rows]).detach()
            rows = rows[network(points).argmax(1) == y[rows]]
    return len(rows) / len(x)


def torchattacks_standard(network: nn.Module, norm: str, epsilon: float, steps: int = 100, num_queries: int = 5000) -> list:
    """Return the library's four attacks, by default at official strength: 100 steps, 9 targets, 5000 queries, schedule not rescaled."""
    library = pytest.importorskip("torchattacks")
    common = {"eps": epsilon, "norm": {"linf": "Linf", "l2": "L2"}[norm]}
    return [
        library.APGD(network, steps=steps, loss="ce", **common),
        library.APGDT(network, steps=steps, n_classes=10, **common),
        library.FAB(network, steps=steps, n_classes=10, multi_targeted=True, **common),
        library.Square(network, n_queries=num_queries, resc_schedule=False, **common),
    ]


def test_a_few_images_and_steps():
    network = calibration_toys()["adversarially_trained"].float()
    x, y = (part[:24] for part in calibration_images())
    x = x.float()
    pgd_20, ours = accuracies(network, x, y, "linf", 0.15, steps=20, num_queries=100)
    assert 0.1 < ours <= pgd_20 < 1
    theirs = surviving(network, x, y, torchattacks_standard(network, "linf", 0.15, steps=20, num_queries=100))
    assert abs(ours - theirs) <= 1 / len(x) + 1e-9


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.1), ("l2", 0.6)])
@pytest.mark.parametrize("implementation", ["torchattacks", "pyautoattack"])
def test_it_agrees_with_an_independent_implementation_within_half_a_point(implementation, norm, epsilon):
    if implementation == "pyautoattack":
        official = pytest.importorskip("pyautoattack")
    network, x, y = digits_classifier(adversarial_epsilon=0.1)
    pgd_20, ours = accuracies(network, x, y, norm, epsilon)
    if implementation == "torchattacks":
        theirs = surviving(network, x, y, torchattacks_standard(network, norm, epsilon))
    else:
        attack = official.AutoAttack(
            network, norm={"linf": "Linf", "l2": "L2"}[norm], eps=epsilon, version="standard", device="cpu", seed=0
        )
        found = attack.run_standard_evaluation(x, y, batch_size=len(x))
        points = found[0] if isinstance(found, tuple) else found  # later versions return what they found beside the points
        theirs = (network(points).argmax(1) == y).float().mean().item()
    print(f"{implementation} {norm} {epsilon}: PGD-20 {pgd_20:.4f}, autoattack_standard {ours:.4f}, independent {theirs:.4f}")
    assert 0.1 < ours < 0.95
    assert ours <= pgd_20
    assert abs(ours - theirs) <= 0.005 + 1e-9


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("norm", "epsilon", "seed"), [("linf", 0.1, 0), ("l2", 0.6, 0), ("linf", 0.15, 1)])
def test_a_second_opinion_agrees_within_half_a_point_on_deterministic_models(norm, epsilon, seed):
    pytest.importorskip("pyautoattack")
    network, x, y = digits_classifier(adversarial_epsilon=0.1, seed=seed)
    _, ours = accuracies(network, x, y, norm, epsilon)
    items = (AttackItem(attack="pyautoattack_standard"),)
    result = evaluate(network, x, y, Suite(name="against", attacks=items), threat_model=ThreatModel(norm=norm, epsilon=epsilon))
    theirs = result.headline.value
    print(f"{norm} {epsilon}: ours {ours:.4f}, independent {theirs:.4f}")
    assert 0.1 < ours < 0.95
    assert abs(ours - theirs) <= 0.005 + 1e-9


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_second_opinion_on_a_random_model_moves_every_image_and_is_no_stronger_than_ours():
    pytest.importorskip("pyautoattack")
    network = calibration_toys()["noisy"]
    x, y = (part[:32] for part in calibration_images())
    found = {}
    for attack, parameters, draws in (("autoattack_rand", {"steps": 20}, 10), ("pyautoattack_rand", {"steps": 20}, 1)):
        items = (AttackItem(attack=attack, parameters=parameters, num_draws=draws),)
        result = evaluate(network, x, y, Suite(name="against", attacks=items), threat_model=ThreatModel(epsilon=0.15))
        assert next(verdict for verdict in result.verdicts if verdict.id == "C4").status.value == "PASS"
        found[attack] = result.headline
    print({name: (each.value, each.low, each.high) for name, each in found.items()})
    assert found["autoattack_rand"].value <= found["pyautoattack_rand"].value + 0.05
