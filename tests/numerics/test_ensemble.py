"""Ensembles: inference modes, draws of members, exact expectation, cost (T8, T10, T11, T13 of the specification)."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from scipy import stats

from models import build_model
from models.ensemble import INFERENCE_MODES, Ensemble, inference_mode_of
from models.errors import UserError
from models.randomness import (
    frozen,
    num_configurations,
    random_sites,
    resample,
    seed_streams,
    seeded,
    set_configuration,
)
from tests.numerics.ensemble_cases import TinyNet, batch, expected_correct, tiny_ensemble


def answering_member(ensemble: Ensemble) -> int:
    """Return the member that answers a whole batch under `rsi_call`."""
    return ensemble.choice[0].item()


def test_index_frequencies_are_uniform_per_example_and_per_call():
    ensemble = tiny_ensemble(5)
    per_example = torch.cat([(resample(ensemble), ensemble.member_indices(10_000))[1] for _ in range(10)])
    assert stats.chisquare(per_example.bincount(minlength=5).numpy()).pvalue > 1e-3
    calls = []
    for _ in range(5_000):
        resample(ensemble)
        calls.append(answering_member(ensemble))
    assert stats.chisquare(torch.tensor(calls).bincount(minlength=5).numpy()).pvalue > 1e-3


def test_examples_of_a_batch_choose_independently():
    ensemble = tiny_ensemble(3)
    rows = torch.stack([(resample(ensemble), ensemble.member_indices(2))[1] for _ in range(9_000)])
    table = torch.zeros(3, 3)
    for first, second in rows.tolist():
        table[first, second] += 1
    assert stats.chi2_contingency(table.numpy()).pvalue > 1e-3
    neighbours = ensemble.member_indices(20_000)
    table = torch.stack([neighbours[:-1], neighbours[1:]]).T[::2]
    counts = torch.zeros(3, 3).index_put_((table[:, 0], table[:, 1]), torch.tensor(1.0), accumulate=True)
    assert stats.chi2_contingency(counts.numpy()).pvalue > 1e-3


def test_same_seed_same_members_and_the_global_generator_is_irrelevant():
    ensemble = tiny_ensemble(4)
    chosen = []
    for global_seed in (0, 1):
        seed_streams(ensemble, 7)
        torch.manual_seed(global_seed)
        resample(ensemble)
        chosen.append((answering_member(ensemble), ensemble.member_indices(200)))
    assert chosen[0][0] == chosen[1][0]
    assert torch.equal(chosen[0][1], chosen[1][1])
    seed_streams(ensemble, 8)
    resample(ensemble)
    assert not torch.equal(ensemble.member_indices(200), chosen[0][1])


def test_the_choice_of_a_row_does_not_depend_on_the_batch_size():
    ensemble = tiny_ensemble(4)
    long = ensemble.member_indices(300).clone()
    ensemble._rows = None
    assert torch.equal(ensemble.member_indices(70), long[:70])


@torch.no_grad()
def test_each_row_is_answered_by_its_member_and_nobody_else():
    ensemble = tiny_ensemble(3).eval()
    rows_seen = {index: 0 for index in range(3)}
    for index, member in enumerate(ensemble.members):
        member.register_forward_hook(
            lambda _module, inputs, _output, index=index: rows_seen.update({index: rows_seen[index] + len(inputs[0])})
        )
    x, _ = batch(40)
    logits = ensemble(x)
    assert sum(rows_seen.values()) == 40
    assert rows_seen == dict(enumerate(ensemble.member_indices(40).bincount(minlength=3).tolist()))
    every = ensemble.member_logits(x)
    expected = every[ensemble.member_indices(40), torch.arange(40)]
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
    with inference_mode_of(ensemble, "rsi_call"):
        before = sum(rows_seen.values())
        torch.testing.assert_close(ensemble(x), every[answering_member(ensemble)], rtol=1e-12, atol=1e-12)
        assert sum(rows_seen.values()) - before == 40


@torch.no_grad()
def test_one_member_equals_that_member_in_every_mode():
    ensemble = tiny_ensemble(1).eval()
    x, _ = batch()
    logits = ensemble.members[0](x)
    for mode in ("rsi_sample", "rsi_call", "mean_logit", "member(0)"):
        assert torch.equal(ensemble(x, mode), logits)
    torch.testing.assert_close(ensemble(x, "mean_prob"), logits.log_softmax(-1), rtol=1e-13, atol=1e-13)
    assert torch.equal(ensemble(x, "majority").argmax(-1), logits.argmax(-1))


@torch.no_grad()
def test_averaged_modes_match_their_definitions():
    ensemble = tiny_ensemble(3).eval()
    x, _ = batch(20)
    every = ensemble.member_logits(x)
    torch.testing.assert_close(ensemble(x, "mean_prob").exp(), every.softmax(-1).mean(0), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(ensemble(x, "mean_logit"), every.mean(0), rtol=1e-13, atol=1e-13)
    votes = torch.stack([every.argmax(-1).eq(label).sum(0) for label in range(every.shape[-1])], dim=-1)
    scores = ensemble(x, "majority")
    assert torch.equal(scores.floor().long(), votes), "half a probability never outweighs a vote"
    assert torch.equal(ensemble(x, "member(2)"), every[2])


def test_a_tied_vote_goes_to_the_more_probable_class():
    class Constant(torch.nn.Module):
        def __init__(self, logits):
            super().__init__()
            self.logits = torch.tensor([logits])

        def forward(self, x):
            return self.logits.expand(len(x), -1)

    ensemble = Ensemble([Constant([1.0, 0.0, 0.0]), Constant([0.0, 0.0, 3.0])], "majority")
    assert ensemble(torch.zeros(1, 1)).argmax().item() == 2


@torch.no_grad()
def test_mean_probability_survives_extreme_logits():
    ensemble = tiny_ensemble(2).eval().float()
    for member in ensemble.members:
        member.classifier.weight.mul_(1e4)
    x, _ = batch(dtype=torch.float32)
    scores = ensemble(x, "mean_prob")
    assert scores.isfinite().all()


@torch.no_grad()
def test_the_members_are_all_configurations():
    ensemble = tiny_ensemble(4).eval()
    x, y = batch(24)
    exact = expected_correct(ensemble, x, y)
    enumerated = []
    for index in range(num_configurations(ensemble)):
        set_configuration(ensemble, index)
        enumerated.append(ensemble(x).argmax(-1) == y)
    torch.testing.assert_close(torch.stack(enumerated).double().mean(0), exact, rtol=0, atol=1e-15)
    sampled = []
    for _ in range(400):
        resample(ensemble)
        sampled.append((ensemble(x).argmax(-1) == y).double().mean())
    sampled = torch.stack(sampled)
    assert abs(sampled.mean() - exact.mean()) < 4 * sampled.std() / math.sqrt(400)


def test_number_of_configurations_follows_the_mode_and_the_members():
    ensemble = tiny_ensemble(3)
    for mode in INFERENCE_MODES:
        with inference_mode_of(ensemble, mode):
            assert num_configurations(ensemble) == (3 if mode.startswith("rsi") else 1)
    assert ensemble.inference == "rsi_sample"
    with_dcs = build_model(
        "red", backbone="resnet8", image_shape=(3, 8, 8), num_members=2, member={"name": "dcs", "kernel_size": 3, "num_taps": 2}
    )
    assert num_configurations(with_dcs) == 2 * 36 * 36


@torch.no_grad()
def test_a_set_configuration_holds_until_the_next_draw_and_is_part_of_the_draw():
    ensemble = tiny_ensemble(3).eval()
    x, _ = batch()
    every = ensemble.member_logits(x)
    set_configuration(ensemble, 2)
    with seeded(ensemble, 3):
        assert not torch.equal(ensemble(x), every[2])
    with frozen(ensemble):
        resample(ensemble)
        assert torch.equal(ensemble(x), every[2])
    assert torch.equal(ensemble(x), every[2])
    for twin in (copy.deepcopy(ensemble), pickle.loads(pickle.dumps(ensemble))):
        assert torch.equal(twin(x), every[2])
    resample(ensemble)
    assert (ensemble.member_indices(100) != 2).any()
    with pytest.raises(IndexError):
        set_configuration(ensemble, 3)


def test_members_have_independent_streams_of_their_own():
    model = build_model("red", backbone="resnet8", image_shape=(3, 8, 8), num_members=3, member={"name": "ctrw"}, inference="mean_logit")
    sites = [site for name, site in random_sites(model) if name]
    assert len(sites) == 3
    for _ in range(2):
        deltas = [site.delta for site in sites]
        assert not torch.equal(deltas[0], deltas[1])
        assert not torch.equal(deltas[1], deltas[2])
        resample(model)


@pytest.mark.parametrize("member", ["ctrw", "rna", "dcs"])
def test_members_of_any_defence_answer_and_get_gradients(member):
    model = build_model("red", backbone="resnet8", image_shape=(3, 8, 8), num_members=2, member={"name": member})
    x, y = batch(dtype=torch.float32)
    torch.nn.functional.cross_entropy(model.train().member_logits(x).mean(0), y).backward()
    assert model(x).shape == (6, 10)
    assert all(any(p.grad is not None for p in part.parameters()) for part in model.members)
    weights = [next(part.parameters()) for part in model.members]
    assert model.spec.defence_parameters["member"]["name"] == member
    first = [p for p in model.members[0].state_dict().values() if p.dim() == 4]
    second = [p for p in model.members[1].state_dict().values() if p.dim() == 4]
    assert all(not torch.equal(a, b) for a, b in zip(first, second, strict=True)), "members start from different weights"
    assert len(weights) == 2


def test_mistakes_are_explained():
    with pytest.raises(UserError, match="Did you mean 'rsi_sample'"):
        tiny_ensemble(2, inference="rsi_samples")
    with pytest.raises(UserError, match="members 0 to 1"):
        tiny_ensemble(2)(batch()[0], "member(2)")
    with pytest.raises(UserError, match="at least one member"):
        Ensemble([])
    with pytest.raises(UserError, match="Did you mean 'ctrw'"):
        build_model("red", member={"name": "ctwr"})
    with pytest.raises(UserError, match="cannot be ensembles"):
        build_model("red", member={"name": "gal"})
    with pytest.raises(UserError, match="Did you mean 'constraint'"):
        build_model("red", member={"name": "ctrw", "constrain": "none"})
    with pytest.raises(UserError, match="not an ensemble"), inference_mode_of(TinyNet(0), "mean_prob"):
        pass


@pytest.mark.parametrize("name", ["red", "ps_red", "gal", "adp", "dverge", "trs"])
def test_members_begin_with_classifiers_of_a_size_at_which_input_gradients_count(name):
    ensemble = build_model(name, backbone="resnet8", image_shape=(1, 8, 8), num_members=3, seed=4)
    weights = [weight for key, weight in ensemble.state_dict().items() if key.endswith("classifier.weight")]
    assert len(weights) == 3
    for weight in weights:
        assert weight.abs().max() <= 64**-0.5
        assert weight.std().item() == pytest.approx((64 * 3) ** -0.5, rel=0.1)
    assert not torch.equal(weights[0], weights[1])
    again = build_model(name, backbone="resnet8", image_shape=(1, 8, 8), num_members=3, seed=4)
    assert torch.equal(again.state_dict()[classifier_of_first(again)], ensemble.state_dict()[classifier_of_first(ensemble)])
    small = build_model(name, backbone="resnet8", image_shape=(1, 8, 8), num_members=3, classifier_std=0.001)
    assert small.state_dict()[classifier_of_first(small)].std().item() == pytest.approx(0.001, rel=0.1)


def classifier_of_first(model: torch.nn.Module) -> str:
    return next(name for name in model.state_dict() if name.endswith("classifier.weight"))
