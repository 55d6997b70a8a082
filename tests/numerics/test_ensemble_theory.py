"""Quantities of ensembles: transfer, the identity and bounds of random sampling inference (T11, T12), gradients, landscapes, costs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from analysis.theory.cost import count_bytes, count_generation_macs, count_macs, count_parameters, measure_costs, saved_share
from analysis.theory.ensemble_gradients import gradient_similarity, lipschitz_estimates, member_landscapes
from analysis.theory.ensembles import (
    AccuracyMatrix,
    MemberAttack,
    accuracy_matrix,
    attack_on_expectation,
    candidate_answers,
    feature_diversity,
    rsi_bounds,
    transfer_matrix,
)
from models import build_model
from models.ensemble import INFERENCE_MODES, Ensemble
from models.errors import UserError
from models.layers.stochastic_convolution import StochasticConv2d
from models.randomness import resample
from tests.numerics.ensemble_cases import NUM_CLASSES, TinyNet, batch, expected_correct, tiny_ensemble
from trainers.attacks import pgd

ATTACK = MemberAttack(epsilon=0.1, num_steps=5, num_restarts=2)


@pytest.fixture
def fitted():
    """A tiny ensemble, in training mode, fitted to a few images, so that attacks have something to break."""
    ensemble = tiny_ensemble(3, activation=nn.Softplus)
    x, y = batch(16)
    optimizer = torch.optim.Adam(ensemble.parameters(), lr=0.03)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(ensemble.member_logits(x).flatten(0, 1), y.repeat(3)).backward()
        optimizer.step()
    return ensemble, x, y


def test_identity_of_random_sampling_is_exact():
    generator = torch.Generator().manual_seed(0)
    for num_members in (2, 3, 8):
        table = torch.rand(num_members, num_members, 50, generator=generator) < 0.6
        matrix = AccuracyMatrix(table, table.any(dim=1))
        identity = matrix.same_member_accuracy / num_members + (num_members - 1) / num_members * matrix.other_member_accuracy
        assert matrix.rsi_accuracy == pytest.approx(identity, abs=1e-15)
        draws = torch.randint(num_members, (2, 20_000), generator=generator)
        sampled = table[draws[0], draws[1], torch.randint(50, (20_000,), generator=generator)].double()
        assert sampled.mean().item() == pytest.approx(matrix.rsi_accuracy, abs=4 * sampled.std().item() / 20_000**0.5)


def test_rsi_accuracy_is_the_mean_of_the_expected_accuracies_on_each_members_examples(fitted):
    ensemble, x, y = fitted
    attack = MemberAttack(epsilon=0.1, num_steps=3, num_restarts=1)
    matrix = accuracy_matrix(ensemble, x, y, attack, batch_size=16)
    ensemble.eval()
    expected = [expected_correct(ensemble, attack.examples(member, x, y, 0), y).mean().item() for member in ensemble.members]
    assert matrix.rsi_accuracy == pytest.approx(sum(expected) / 3, abs=1e-12)


def test_order_of_bounds_on_random_tables():
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        table = torch.rand(6, 4, 30, generator=generator) < torch.rand((), generator=generator)
        bounds = rsi_bounds(table)
        assert bounds.lower <= bounds.attacked + 1e-12
        assert bounds.attacked <= bounds.upper + 1e-12
        naive = sum(min(table[p, :, b].double().mean().item() for p in range(6)) for b in range(30)) / 30
        assert bounds.attacked == pytest.approx(naive)


def test_one_perturbation_that_fools_everybody_leaves_nothing_to_gain():
    table = torch.ones(3, 4, 10, dtype=torch.bool)
    table[1, :, :5] = False
    bounds = rsi_bounds(table)
    assert bounds.lower == bounds.attacked == 0.5


def test_bounds_of_an_attacked_ensemble(fitted):
    ensemble, x, y = fitted
    table = candidate_answers(ensemble, x, y, ATTACK, batch_size=7)
    assert table.shape == (1 + 4 * 2, 3, 16)
    bounds = rsi_bounds(table)
    matrix = accuracy_matrix(ensemble, x, y, ATTACK)
    assert bounds.lower <= bounds.attacked <= bounds.upper
    assert bounds.attacked <= expected_correct(ensemble.eval(), x, y).mean().item()
    assert bounds.attacked <= matrix.accuracy.mean(dim=1).max().item() + 1e-12


def test_transfer_matrix_counts_what_all_members_get_right(fitted):
    ensemble, x, y = fitted
    transfer = transfer_matrix(ensemble, x, y, ATTACK)
    with torch.no_grad():
        right = (ensemble.eval().member_logits(x).argmax(-1) == y).all(0)
    assert transfer.num_examples == right.sum().item() > 0
    assert transfer.success_NN.shape == (3, 3)
    for i, attacked in enumerate(ensemble.members):
        correct = torch.ones(3, transfer.num_examples, dtype=torch.bool)
        for restart in range(2):
            adversarial = ATTACK.examples(attacked, x[right], y[right], restart)
            correct &= ensemble.member_logits(adversarial).argmax(-1) == y[right]
        torch.testing.assert_close(transfer.success_NN[i], 1 - correct.double().mean(1))
    own = transfer.success_NN.diagonal()
    assert (own >= transfer.success_NN.mean(dim=0) - 1e-12).all(), "a member falls most often to examples made against it"
    with pytest.raises(UserError, match="classified rightly by all members"):
        transfer_matrix(Ensemble([Wrong(0), Wrong(1)]), x, y)


class Wrong(nn.Module):
    def __init__(self, label: int) -> None:
        super().__init__()
        self.label = label

    def forward(self, x):
        return nn.functional.one_hot(torch.full((len(x),), self.label), NUM_CLASSES).double() + 0 * x.flatten(1)[:, :NUM_CLASSES]


def test_attacking_the_expectation_beats_attacks_on_members_and_on_random_draws_in_mean_loss(fitted):
    ensemble, x, y = fitted
    ensemble.eval()
    ensemble.inference = "rsi_call"
    attack = MemberAttack(epsilon=0.05, num_steps=30, step_size=0.01, num_restarts=1)

    def mean_loss(images):
        return torch.stack([nn.functional.cross_entropy(member(images), y) for member in ensemble.members]).mean().item()

    exact = mean_loss(attack_on_expectation(ensemble.members, x, y, attack))
    assert exact > max(mean_loss(attack.examples(member, x, y, 0)) for member in ensemble.members)
    sampled = pgd(ensemble, x, y, epsilon=0.05, step_size=0.01, steps=10, resample_each_step=True)
    assert exact > mean_loss(sampled)


def test_gradient_similarity():
    x, y = batch()
    same = gradient_similarity(Ensemble([TinyNet(0).double(), TinyNet(0).double()]), x, y)
    torch.testing.assert_close(same.signed_NN, torch.ones(2, 2, dtype=torch.float64), rtol=0, atol=1e-9)
    assert same.mean_absolute == pytest.approx(1, abs=1e-9)
    ensemble = tiny_ensemble(3).eval()
    found = gradient_similarity(ensemble, x, y, batch_size=4)
    leaf = x.clone().requires_grad_()
    slopes = [
        torch.autograd.grad(nn.functional.cross_entropy(member(leaf), y, reduction="sum"), leaf)[0].flatten(1)
        for member in ensemble.members
    ]
    cosine = nn.functional.cosine_similarity(slopes[0], slopes[2], dim=1)
    assert found.signed_NN[0, 2].item() == pytest.approx(cosine.mean().item(), abs=1e-9)
    assert found.absolute_NN[2, 0].item() == pytest.approx(cosine.abs().mean().item(), abs=1e-9)


class Slope(nn.Module):
    """A member whose loss for label 0 is a softplus of c times the sum of the pixels."""

    def __init__(self, c: float) -> None:
        super().__init__()
        self.c = c

    def forward(self, x):
        total = self.c * x.flatten(1).sum(1)
        return torch.stack([torch.zeros_like(total), total], dim=1)


def test_lipschitz_estimates_of_a_known_slope():
    x = torch.full((4, 1, 4, 4), 0.5, dtype=torch.float64)
    y = torch.zeros(4, dtype=torch.long)
    found = lipschitz_estimates(Ensemble([Slope(2.0), Slope(40.0)]), x, y, epsilon=0.1, num_points=12)
    # The loss is log(1 + exp(c s)) with s = 8: its slope is c sigmoid(c s), which is c here.
    torch.testing.assert_close(found.mean_gradient_l2, torch.tensor([2.0, 40.0]).double() * 4, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.mean_gradient_l1, torch.tensor([2.0, 40.0]).double() * 16, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.local_lipschitz, found.mean_gradient_l2, rtol=1e-3, atol=0)
    assert (found.smoothness < 1e-2).all(), "a nearly linear loss"
    assert (found.mean_local_lipschitz <= found.local_lipschitz + 1e-12).all()
    torch.testing.assert_close(found.risk, torch.tensor([16.0, 320.0]).double(), rtol=1e-5, atol=0)


def test_local_slopes_never_exceed_the_largest_gradient_of_a_convex_loss():
    ensemble = Ensemble([Slope(0.1)])
    x, y = torch.rand(5, 1, 4, 4, dtype=torch.float64), torch.zeros(5, dtype=torch.long)
    found = lipschitz_estimates(ensemble, x, y, epsilon=0.3, norm="l2")
    assert found.local_lipschitz.item() <= 0.1 * 4
    assert found.smoothness.item() <= 0.25 * (0.1 * 4) ** 2


def test_landscapes_share_their_axes_and_have_the_loss_in_the_middle():
    ensemble = tiny_ensemble(2).eval()
    x, y = batch()
    surface = member_landscapes(ensemble, x, y, half_width=0.05, num_points=5)
    assert surface.loss_NGG.shape == (2, 5, 5)
    for index, member in enumerate(ensemble.members):
        assert surface.loss_NGG[index, 2, 2].item() == pytest.approx(nn.functional.cross_entropy(member(x), y).item(), abs=1e-12)
    mean = surface.loss_NGG.mean(0)
    assert mean[3, 2] > mean[2, 2] > mean[1, 2], "the first axis goes up the mean loss"


def test_feature_diversity_is_the_mean_loss_of_the_others(fitted):
    ensemble, x, y = fitted
    still = feature_diversity(ensemble, x, y, epsilon=0.0)
    ensemble.eval()
    clean = torch.stack([nn.functional.cross_entropy(member(x), y) for member in ensemble.members]).mean()
    assert still == pytest.approx(clean.item(), abs=1e-12)
    assert feature_diversity(ensemble, x, y, epsilon=0.3) > still
    with pytest.raises(UserError, match="at least two"):
        feature_diversity(Ensemble([TinyNet(0)]), x, y)


# Costs.


def test_macs_of_a_hand_counted_network():
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 5))
    assert count_macs(network, (3, 8, 8)) == 64 * 4 * 27 + 4 * 64 * 5
    assert count_parameters(network) == 4 * 27 + 4 + 5 * 256 + 5
    assert count_bytes(network) == 4 * count_parameters(network)


def test_resnet18_has_556_million_multiply_accumulates():
    assert count_macs(build_model("natural"), (3, 32, 32)) == pytest.approx(0.556e9, rel=2e-3)


def test_a_layer_that_no_code_names_says_what_it_needs():
    class Wasteful(nn.Module):
        """Multiplies a whole matrix for the one column that its output needs, and generates weights that nobody counts with the image."""

        def __init__(self):
            super().__init__()
            self.matrix = nn.Parameter(torch.ones(6, 6))

        def macs_for(self, output):
            return 6 * output.numel()

        def generate_now(self):
            return (self.matrix @ self.matrix,)

        def forward(self, x_BCHW):
            return (x_BCHW.flatten(1) @ self.matrix)[:, :1]

    network = nn.Sequential(Wasteful(), nn.Linear(1, 5))
    assert count_macs(network, (1, 2, 3)) == 6 + 5
    assert count_generation_macs(network) == 6**3


def test_one_member_is_paid_under_random_sampling_and_all_otherwise():
    options = {"backbone": "resnet8", "image_shape": (3, 8, 8)}
    single = count_macs(build_model("natural", **options), (3, 8, 8))
    model = build_model("red", num_members=3, **options)
    rows = {row.inference: row for row in measure_costs(model, (3, 8, 8), batch_sizes=(1, 4), num_rounds=1)}
    assert tuple(rows) == INFERENCE_MODES
    for name, row in rows.items():
        assert row.macs_per_image == (single if name.startswith("rsi") else 3 * single)
        assert set(row.latency) == {1, 4}
        assert all(seconds > 0 for seconds in row.latency.values())
        assert row.generation_macs == 0
    (row,) = measure_costs(build_model("natural", **options), (3, 8, 8), batch_sizes=(1,), num_rounds=1)
    assert row.inference == "forward"
    with pytest.raises(UserError, match="only ensembles"):
        measure_costs(TinyNet(0), (3, 8, 8), inferences=["rsi_call"])


def test_generated_weights_are_counted_apart_and_saved_on_disk():
    options = {"backbone": "resnet8", "image_shape": (3, 8, 8), "num_members": 2}
    plain = build_model("red", **options)
    generated = build_model("ps_red", embedding_dim=4, hidden_dim=4, **options)
    (row,) = measure_costs(generated, (3, 8, 8), inferences=["rsi_call"], batch_sizes=(1,), num_rounds=1)
    (reference,) = measure_costs(plain, (3, 8, 8), inferences=["rsi_call"], batch_sizes=(1,), num_rounds=1)
    assert row.macs_per_image == reference.macs_per_image
    assert row.generation_macs > 0
    assert row.num_bytes < reference.num_bytes
    assert saved_share(generated, plain) == pytest.approx(1 - row.num_parameters / reference.num_parameters)


def test_a_stochastic_convolution_counts_with_its_kept_taps_whatever_the_draw_computes():
    plain = build_model("natural", backbone="resnet8", image_shape=(3, 16, 16))
    for taps in (1, 2, 3):
        random = build_model("dcs", backbone="resnet8", image_shape=(3, 16, 16), kernel_size=5, num_taps=taps, positions=(2,))
        (layer,) = (module for module in random.modules() if isinstance(module, StochasticConv2d))
        counts = set()
        for _ in range(8):
            resample(random)
            counts.add(count_macs(random, (3, 16, 16)))
        pixels = 16 * 16 * layer.in_channels * layer.out_channels
        assert counts == {count_macs(plain, (3, 16, 16)) + (taps - 9) * pixels}
