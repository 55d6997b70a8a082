"""ARC, FAB, Square under l2, mean probability, transfer and AutoAttack against closed forms, autograd and an independent implementation."""

import numpy as np
import pytest
import torch
from evaluation_toys import AdditiveNoise, Choice, classifier, digits_classifier, labelled_by, pattern, two_classes
from scipy import optimize
from torch import nn

from analysis.attacked_model.draws import ONLY_DRAW, FixedDraws, FreshDraws, all_configurations, seeded_draws, set_draw
from analysis.attacked_model.mean_draw import MeanDrawPredictor, has_mean_draw
from analysis.attacked_model.model import AttackedModel, Predictor
from analysis.attacks.apgd import apgd
from analysis.attacks.arc import arc
from analysis.attacks.fab import fab_targeted, project_onto_hyperplane
from analysis.attacks.mean_probability import mean_probability_gradient
from analysis.attacks.registry import AttackProblem, attack_entry, check_attack, parse_attack_parameters
from analysis.evaluation.suites import load_suite, with_surrogate
from analysis.evaluation.tasks import plan_blocks
from analysis.fingerprints import weights_hash
from models import build_model
from models.errors import UserError
from models.threat_model import ThreatModel
from models.weights import save_pretrained
from trainers.attacks import cross_entropy, margin


def attacked(model, source=None, **options):
    return AttackedModel(Predictor(model), source or FixedDraws((ONLY_DRAW,)), **options)


def run(name, target, x, y, *, norm="linf", epsilon=0.05, num_classes=5, seed=0, **parameters):
    problem = AttackProblem(x, y, ThreatModel(norm=norm, epsilon=epsilon), num_classes, seed)
    return attack_entry(name).run(target, problem, parse_attack_parameters(name, parameters)).x


def linear_members(num_members, num_classes, seed=0):
    members = torch.randn((num_members, num_classes, 64), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Choice(members), members


def distances(members, x, y, norm):
    """Return the distance of each image to each linear member's boundary, (N, B)."""
    flat = x.flatten(1) - 0.5
    result = []
    for weight in members:
        logits = flat @ weight.T
        gaps = logits.gather(1, y[:, None]) - logits
        normals = weight[y][:, None] - weight[None]
        dual = normals.abs().sum(2) if norm == "linf" else normals.norm(dim=2)
        ratio = (gaps / dual.clamp_min(1e-12)).scatter(1, y[:, None], torch.inf)
        result.append(ratio.amin(1))
    return torch.stack(result)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_arc_crosses_the_boundary_of_a_linear_model_exactly_where_it_is_within_reach(norm):
    model, members = linear_members(1, 4)
    x = torch.full((30, 1, 8, 8), 0.5, dtype=torch.float64) + 0.1 * torch.randn(
        (30, 1, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    y = ((x.flatten(1) - 0.5) @ members[0].T).argmax(1)
    reach = distances(members, x, y, norm)[0]
    epsilon = float(reach.median())
    x_adv, _, wrong = arc(attacked(model), x, y, epsilon=epsilon, norm=norm, rounds=3)
    decided = (reach / epsilon - 1).abs() > 0.1
    assert ((wrong > 0) == (reach < epsilon))[decided].all()
    length = (x_adv - x).flatten(1).abs().amax(1) if norm == "linf" else (x_adv - x).flatten(1).norm(dim=1)
    assert length.max() <= epsilon * (1 + 1e-9)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_arc_fools_a_member_where_the_mean_gradient_cancels(norm):
    # Two members whose gradients are opposite: the mean loss has a saddle at the image, either member alone is easy.
    direction = pattern().double()
    members = torch.stack([torch.stack([direction, -direction]), torch.stack([-direction, direction])])
    members[:, 0] += 0.02 * torch.ones(64)

    class Offset(Choice):
        def forward(self, x):
            return super().forward(x) + torch.tensor([1.0, 0.0])

    model = Offset(members)
    x, y = torch.full((4, 1, 8, 8), 0.5, dtype=torch.float64), torch.zeros(4, dtype=torch.long)
    epsilon = 0.02 if norm == "linf" else 0.16
    source = FixedDraws(all_configurations(model, 2))
    x_adv, _, wrong = arc(attacked(model, source), x, y, epsilon=epsilon, norm=norm, rounds=5)
    assert (wrong == 0.5).all()
    with torch.no_grad():
        shares = []
        for draw in source.draws:
            set_draw(model, draw)
            shares.append((model(x_adv).argmax(1) != y).double())
    assert torch.equal(torch.stack(shares).mean(0), wrong)


def test_arc_is_at_least_as_strong_as_apgd_on_an_ensemble_of_linear_models():
    model, members = linear_members(4, 5, seed=3)
    x = torch.full((40, 1, 8, 8), 0.5, dtype=torch.float64) + 0.2 * torch.randn(
        (40, 1, 8, 8), generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    y = torch.stack([(x.flatten(1) - 0.5) @ member.T for member in members]).mean(0).argmax(1)
    source = FixedDraws(all_configurations(model, 4))
    _, _, by_apgd = apgd(attacked(model, source), x, y, epsilon=0.01, steps=30, loss=cross_entropy)
    _, _, by_arc = arc(attacked(model, source), x, y, epsilon=0.01, norm="linf", rounds=10)
    assert by_arc.mean() >= by_apgd.mean() + 0.01


def test_arc_on_a_continuum_attacks_frozen_draws():
    model = AdditiveNoise(pattern(), 1.0)
    x, y = two_classes(12)
    target = attacked(model, FreshDraws(6, "arc"))
    x_adv = run("arc", target, x, y, num_classes=2, epsilon=0.08, rounds=3)
    assert len(target.used) == 6
    assert (x_adv - x).abs().max() <= 0.08 + 1e-6


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_projection_onto_a_plane_inside_the_box_is_optimal(norm):
    rng = np.random.default_rng(0)
    for trial in range(8):
        x, normal = rng.random(6), rng.normal(size=6)
        reachable = (np.where(normal > 0, 1 - x, -x) * normal).sum()  # largest increase within the box
        offset = -reachable * (0.3 + 0.1 * (trial % 6))
        step = project_onto_hyperplane(torch.tensor(x)[None], torch.tensor(normal)[None], torch.tensor([offset]), norm)[0].numpy()
        assert normal @ step == pytest.approx(-offset, rel=1e-9)
        assert ((x + step >= -1e-12) & (x + step <= 1 + 1e-12)).all()
        if norm == "linf":
            rows = np.block([[np.eye(6), -np.ones((6, 1))], [-np.eye(6), -np.ones((6, 1))]])
            found = optimize.linprog(
                np.r_[np.zeros(6), 1],
                A_ub=rows,
                b_ub=np.zeros(12),
                A_eq=np.r_[normal, 0][None],
                b_eq=[-offset],
                bounds=[*zip(-x, 1 - x, strict=True), (0, None)],
            )
            assert np.abs(step).max() == pytest.approx(found.fun, rel=1e-6)
        else:
            found = optimize.minimize(
                lambda z: z @ z,
                step * 0,
                jac=lambda z: 2 * z,
                bounds=list(zip(-x, 1 - x, strict=True)),
                constraints={"type": "eq", "fun": lambda z, n=normal, o=offset: n @ z + o},
                method="SLSQP",
                options={"ftol": 1e-14, "maxiter": 500},
            )
            assert step @ step == pytest.approx(found.fun, rel=1e-5)


def test_projection_where_the_plane_misses_the_box_goes_to_the_nearest_corner():
    x, normal = torch.tensor([[0.2, 0.6]], dtype=torch.float64), torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    for norm in ("linf", "l2"):
        step = project_onto_hyperplane(x, normal, torch.tensor([-9.0], dtype=torch.float64), norm)
        assert torch.allclose(x + step, torch.tensor([[1.0, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fab_finds_the_distance_to_a_linear_boundary(norm):
    model, members = linear_members(1, 2)
    x = torch.full((10, 1, 8, 8), 0.5, dtype=torch.float64) + 0.02 * torch.randn(
        (10, 1, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    y = ((x.flatten(1) - 0.5) @ members[0].T).argmax(1)
    found, nearest = fab_targeted(attacked(model), x, y, 1 - y, x, norm=norm, steps=30)
    assert torch.allclose(nearest, distances(members, x, y, norm)[0], rtol=0.02)
    assert (model(found).argmax(1) != y).all()


def test_fab_agrees_with_apgd_on_a_network():
    network = classifier()
    x, y = labelled_by(network, 60)
    accuracy = {}
    for name, options in (("fab_targeted", {"steps": 30}), ("apgd_targeted", {"steps": 30})):
        x_adv = run(name, attacked(network), x, y, epsilon=0.15, **options)
        accuracy[name] = (network(x_adv).argmax(1) == y).float().mean().item()
    assert accuracy["fab_targeted"] == pytest.approx(accuracy["apgd_targeted"], abs=0.06)
    assert 0.1 < accuracy["fab_targeted"] < 0.9


def test_square_under_l2_climbs_towards_the_worst_point_of_a_linear_model():
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2, bias=False))
    network[1].weight.data = torch.stack([torch.full((64,), 5.0), torch.randn(64, generator=torch.Generator().manual_seed(0))])
    x, y = torch.full((4, 1, 8, 8), 0.5), torch.zeros(4, dtype=torch.long)
    target = attacked(network)
    epsilon = 0.3
    reached = []
    for queries in (1, 800):
        x_adv = run("square", target, x, y, norm="l2", epsilon=epsilon, num_classes=2, num_queries=queries)
        assert (x_adv - x).flatten(1).norm(dim=1).max() <= epsilon * (1 + 1e-5)
        reached.append(margin(network(x_adv), y) - margin(network(x), y))
    best = epsilon * (network[1].weight[1] - network[1].weight[0]).norm()
    assert (reached[0] < 0.5 * best).all()
    assert (reached[1] > 0.7 * best).all()


def test_mean_probability_gradient_is_that_of_the_averaged_predictor():
    model, members = linear_members(3, 4)
    x = torch.rand((5, 1, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = torch.arange(5) % 4
    ours = mean_probability_gradient(attacked(model, FixedDraws(all_configurations(model, 3))), x, y)
    leaf = x.clone().requires_grad_()
    probabilities = torch.stack([((leaf.flatten(1) - 0.5) @ (member * 1.0).T).softmax(1) for member in members]).mean(0)
    (expected,) = torch.autograd.grad(-probabilities.gather(1, y[:, None]).log().sum(), leaf)
    assert torch.allclose(ours, expected, rtol=1e-8, atol=1e-12)
    model.members.data *= 500  # probabilities underflow; the weights must not
    assert mean_probability_gradient(attacked(model, FixedDraws(all_configurations(model, 3))), x, y).isfinite().all()


def test_mean_probability_pgd_beats_the_averaged_predictor():
    model = AdditiveNoise(pattern(), 1.0)
    x, y = two_classes(20)
    x_adv = run("mean_probability_pgd", attacked(model, FreshDraws(5, "m")), x, y, num_classes=2, epsilon=0.09, steps=10)
    predictor = Predictor(model, averaged_draws=seeded_draws(40, "score"))
    assert (predictor.logits(x_adv, ONLY_DRAW).argmax(1) == y).float().mean() < 0.2


@pytest.mark.parametrize(("defence", "options", "mean"), [("ctrw", {}, 0.0), ("dcs", {"kernel_size": 3, "num_taps": 2}, 2 / 9)])
def test_the_static_model_of_a_defence_has_its_randomness_at_its_mean(defence, options, mean):
    model = build_model(defence, backbone="resnet8", image_shape=(3, 16, 16), num_classes=4, **options).eval()
    assert has_mean_draw(model)
    predictor = MeanDrawPredictor(model, seed=1)
    x = torch.rand((3, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    predictor.logits(x, ONLY_DRAW)
    values = [getattr(site, name) for site in model.modules() for name in getattr(site, "draw_names", ())]
    floating = torch.cat([value.flatten() for value in values if value.is_floating_point()])
    assert floating.mean() == pytest.approx(mean, abs=0.02)
    assert floating.std() < 0.1
    assert not has_mean_draw(build_model("rna", backbone="resnet8", image_shape=(3, 16, 16), num_classes=4))


def test_transfer_attacks_stay_in_the_ball_and_are_made_elsewhere(tmp_path):
    model = build_model("rna", backbone="resnet8", image_shape=(3, 8, 8), num_classes=4).eval()
    surrogate = build_model("at", backbone="resnet8", image_shape=(3, 8, 8), num_classes=4, seed=5)
    folder = save_pretrained(surrogate, tmp_path / "at")
    x = torch.rand((6, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    y = torch.arange(6) % 4
    with torch.no_grad():
        before = surrogate.eval()(x)
    cases = {
        "transfer_static": {"steps": 3},
        "transfer_frozen_draws": {"steps": 3, "num_frozen": 2},
        "transfer_surrogate": {"steps": 3, "surrogate": str(folder), "method": "pgd"},
    }
    for name, parameters in cases.items():
        target = attacked(model, FreshDraws(4, name))
        x_adv = run(name, target, x, y, num_classes=4, epsilon=0.03, **parameters)
        assert 1e-3 < (x_adv - x).abs().max() <= 0.03 + 1e-6
        assert target.num_backward > 0
    x_adv = run("transfer_surrogate", attacked(model), x, y, num_classes=4, epsilon=0.03, surrogate=str(folder), method="fgsm")
    after = surrogate(x_adv)
    assert (cross_entropy(after, y) >= cross_entropy(before, y) - 1e-4).float().mean() > 0.8
    with pytest.raises(UserError, match="cannot be read"):
        check_attack("transfer_surrogate", {"surrogate": str(tmp_path / "absent")}, ThreatModel(), 4)
    suite = with_surrogate(load_suite("quick"), folder, weights_hash(surrogate))
    assert suite.name == "quick_with_surrogate"
    assert [task.item.name for task in plan_blocks(model, x, y, suite) if task.item is not None][-2] == "transfer_surrogate"
    other = build_model("at", backbone="resnet8", image_shape=(3, 8, 8), num_classes=4, seed=6)
    with pytest.raises(UserError, match="it was trained again"):
        plan_blocks(model, x, y, with_surrogate(load_suite("quick"), folder, weights_hash(other)))
    with pytest.raises(UserError, match="has 4 classes, the model has 10"):
        check_attack("transfer_surrogate", {"surrogate": str(folder)}, ThreatModel(), 10)


@pytest.mark.parametrize("name", ["apgd_ce", "apgd_targeted", "fab_targeted", "square", "pgd", "autoattack_standard"])
def test_leaving_alone_what_errs_changes_no_accuracy_and_saves_passes(name):
    network = classifier()
    x, y = labelled_by(network, 60)
    small = {
        "square": {"num_queries": 400},
        "autoattack_standard": {"steps": 10, "num_queries": 20},
        "pgd": {"steps": 20, "stop_at_success": True},
    }.get(name, {"steps": 20})
    accuracy, passes = [], []
    for stops in (False, True):
        target = attacked(network, stops_at_success=stops)
        x_adv = run(name, target, x, y, epsilon=0.15, **small)
        accuracy.append((network(x_adv).argmax(1) == y).float().mean().item())
        passes.append(target.num_forward + 2 * target.num_backward)
    # pgd's last iterate may be right again; parts of autoattack start elsewhere for fewer images.
    assert abs(accuracy[0] - accuracy[1]) <= {"pgd": 0.05, "autoattack_standard": 0.04}.get(name, 0.0)
    assert passes[1] < 0.95 * passes[0]


def test_autoattack_works_on_two_classes_and_on_draws():
    model = AdditiveNoise(pattern(), 1.0)
    x, y = two_classes(10)
    for name in ("autoattack_standard", "autoattack_rand"):
        small = {"steps": 3, "num_queries": 5} if name == "autoattack_standard" else {"steps": 3}
        x_adv = run(name, attacked(model, FreshDraws(2, name)), x, y, num_classes=2, epsilon=0.05, **small)
        assert ((x_adv - x).flatten(1).abs().amax(1) > 1e-3).all()


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.1), ("l2", 0.6)])
def test_autoattack_agrees_with_an_independent_worst_case_of_100_steps(norm, epsilon):
    torchattacks = pytest.importorskip("torchattacks")
    network, x, y = digits_classifier(adversarial_epsilon=0.1)
    x_adv = run(
        "autoattack_standard", attacked(network, stops_at_success=True), x, y, norm=norm, epsilon=epsilon, num_classes=10, num_queries=300
    )
    ours = (network(x_adv).argmax(1) == y).float().mean().item()
    common = {"eps": epsilon, "norm": {"linf": "Linf", "l2": "L2"}[norm]}
    survivors = torch.arange(len(x))[network(x).argmax(1) == y]
    for attack in (
        torchattacks.APGD(network, steps=100, loss="ce", **common),
        torchattacks.APGDT(network, steps=100, n_classes=10, **common),
        torchattacks.FAB(network, steps=100, n_classes=10, multi_targeted=True, **common),
    ):
        points = attack(x[survivors], y[survivors]).detach()
        survivors = survivors[network(points).argmax(1) == y[survivors]]
    theirs = len(survivors) / len(x)
    assert 0.1 < ours < 0.95
    assert abs(ours - theirs) <= 0.005
