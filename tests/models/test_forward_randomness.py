"""Networks that draw in their forward, as random models: a draw is fixed, repeated, drawn anew, and each image has its own."""

from __future__ import annotations

import math
import pickle
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from analysis.evaluate import evaluate
from analysis.evaluation.suites import Suite
from models.forward_randomness import as_random_model
from models.randomness import frozen, num_configurations, resample, seeded
from models.threat_model import ThreatModel

OPERATIONS = {
    "randn_like": torch.randn_like,
    "rand_like": torch.rand_like,
    "randn": lambda x: torch.randn(x.shape),
    "rand of one value a row": lambda x: torch.rand(len(x)).view(-1, *(1,) * (x.dim() - 1)),
    "randint": lambda x: torch.randint(0, 5, (len(x), 1, 1, 1) if x.dim() == 4 else (len(x), 1)).float(),
    "normal_": lambda x: torch.empty_like(x).normal_(1, 2),
    "uniform_": lambda x: torch.empty_like(x).uniform_(-1, 1),
    "exponential_": lambda x: torch.empty_like(x).exponential_(),
    "bernoulli of a tensor": lambda x: torch.bernoulli(x.detach().sigmoid()),
    "normal of tensors": lambda x: torch.normal(x.detach(), x.detach().abs()),
    "dropout": lambda x: functional.dropout(torch.ones_like(x), 0.4),
    "multinomial": lambda x: torch.multinomial(x.detach().flatten(1).softmax(1), 1).view(-1, *(1,) * (x.dim() - 1)).float(),
    "one value for a batch": lambda x: torch.randn(1, *x.shape[1:]),
    "randint of bounds": lambda x: torch.randint(5, (len(x), *x.shape[1:])).float(),
    "a distribution": lambda x: torch.distributions.Laplace(torch.zeros(x.shape[1:]), 1.0).sample((len(x),)),
}


class Noisy(nn.Module):
    """Two random operations of the same kind, on images and on three features, an odd number."""

    def __init__(self, operation) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.operation = operation
        self.convolution, self.linear = nn.Conv2d(1, 3, 3), nn.Linear(3, 5)

    def forward(self, x):
        features = self.convolution(x + 0.3 * self.operation(x)).relu().mean((2, 3))
        return self.linear(features + 0.3 * self.operation(features))


@pytest.fixture
def x():
    return torch.rand((70, 1, 5, 5), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_draw_repeats_itself_and_another_one_differs_whatever_the_batch(name, x):
    model = as_random_model(Noisy(OPERATIONS[name]))
    resample(model)
    with frozen(model):
        whole = model(x)
        assert torch.equal(model(x), whole)
        for count in (1, 2, 31, 64, 65):
            torch.testing.assert_close(model(x[:count]), whole[:count])
        others = torch.cat([x[:3], torch.rand_like(x[3:])])
        torch.testing.assert_close(model(others)[:3], whole[:3])
        same = model(x[:1].expand(20, -1, -1, -1))
        if name != "one value for a batch":
            assert (same - same[0]).abs().amax(1)[1:].count_nonzero() > 4  # each place has values of its own
    resample(model)
    assert not torch.allclose(model(x), whole)


def test_draws_come_from_seeds_and_leave_every_global_generator_alone(x):
    def operation(values):
        return torch.randn_like(values) + random.random() + float(np.random.rand())  # noqa: NPY002 - what a network may do

    def reseed(seed):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - as above

    model = as_random_model(Noisy(operation), reseed)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002 - as above
    with seeded(model, 5):
        first = model(x)
    with seeded(model, 6):
        assert not torch.allclose(model(x), first)
    with seeded(model, 5):
        assert torch.equal(model(x), first)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])  # noqa: NPY002 - as above


def test_it_pickles_with_its_draw_and_is_a_continuum(x):
    model = as_random_model(nn.Sequential(nn.Dropout(0.5), nn.Flatten(), nn.Linear(25, 3))).train()
    resample(model)
    assert num_configurations(model) == math.inf
    with frozen(model):
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


def test_gradients_are_those_of_the_draw(x):
    model = as_random_model(Noisy(torch.randn_like)).double()
    with frozen(model):
        assert torch.autograd.gradcheck(model, x[:2].double().requires_grad_())


class NoisyMargin(nn.Module):
    """Logits (-m, m) with m = sum of x - 1/2, and normal noise on m: attacked at radius e, m falls by e times the number of pixels."""

    spread = 0.5

    def forward(self, x):
        margin = (x.flatten(1) - 0.5).sum(1) + self.spread * torch.randn(len(x))
        return torch.stack([-margin, margin], 1)


SUITE = Suite(
    name="noise",
    scoring={"num_selection_draws": 2, "num_evaluation_draws": 40, "num_known_draws": 2},
    attacks=[{"name": "pgd", "attack": "pgd", "parameters": {"steps": 10}, "protocols": ["T0", "T1", "T2"], "num_draws": 2}],
)


def test_t1_of_noise_in_forward_is_what_paper_says():
    x = 0.5 + 0.02 * torch.rand((200, 1, 8, 8), generator=torch.Generator().manual_seed(2))
    epsilon, y = 0.008, torch.ones(200, dtype=torch.long)
    attacked = (x.double().flatten(1) - 0.5).sum(1) - epsilon * 64
    expected = torch.distributions.Normal(0.0, NoisyMargin.spread).cdf(attacked).mean().item()
    assert 0.5 < expected < 0.8
    plain = evaluate(NoisyMargin(), x, y, SUITE, threat_model=ThreatModel(epsilon=epsilon))
    assert "C1" in [verdict.id for verdict in plain.failed]
    result = evaluate(as_random_model(NoisyMargin()), x, y, SUITE, threat_model=ThreatModel(epsilon=epsilon))
    assert not result.failed
    assert result.headline.low < expected < result.headline.high
    assert result.headline.value == pytest.approx(expected, abs=0.02)
    assert {row.protocol for row in result.rows if row.attack == "pgd"} >= {"T0", "T1", "T2"}
