"""The explicit batch normalization is the framework's, number for number and key for key."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from models.layers.explicit_batch_norm import ExplicitBatchNorm2d, make_batch_norm_explicit
from models.modes import mode
from tests.numerics.taylor_cases import batch, tiny_network


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tracks", [True, False])
def test_equals_the_fused_layer(momentum: float | None, affine: bool, tracks: bool) -> None:
    fused = nn.BatchNorm2d(3, momentum=momentum, affine=affine, track_running_stats=tracks).double()
    explicit = ExplicitBatchNorm2d(3, momentum=momentum, affine=affine, track_running_stats=tracks).double()
    if affine:
        nn.init.uniform_(fused.weight, 0.5, 2)
        nn.init.normal_(fused.bias)
    explicit.load_state_dict(fused.state_dict())
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        x = 2 + 3 * torch.randn(4, 3, 5, 5, dtype=torch.float64, generator=generator)
        torch.testing.assert_close(explicit(x), fused(x), rtol=1e-12, atol=1e-12)
    for (name, value), other in zip(explicit.state_dict().items(), fused.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-12, atol=1e-12, msg=name)
    torch.testing.assert_close(explicit.eval()(x), fused.eval()(x), rtol=1e-12, atol=1e-12)


def test_gradients_equal_those_of_the_fused_layer() -> None:
    model = tiny_network(nn.ReLU)
    explicit = copy.deepcopy(model)
    make_batch_norm_explicit(explicit)
    x, y = batch()
    for network in (model, explicit):
        nn.functional.cross_entropy(network(x), y).backward()
    for (name, a), b in zip(explicit.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-13, msg=name)


def test_conversion_keeps_parameters_state_dict_and_modes() -> None:
    model = tiny_network(nn.ReLU)
    model.backbone.bn2.eval()
    before = dict(model.named_parameters())
    state = copy.deepcopy(model.state_dict())
    assert make_batch_norm_explicit(model) == ["backbone.bn1", "backbone.bn2"]
    assert make_batch_norm_explicit(model) == []
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert list(model.state_dict()) == list(state)
    assert model.backbone.bn1.training
    assert not model.backbone.bn2.training
    tiny_network(nn.ReLU, seed=5).load_state_dict(model.state_dict())  # an export loads into the plain network
    model.load_state_dict(tiny_network(nn.ReLU, seed=5).state_dict())


def test_batch_statistics_without_update() -> None:
    model = tiny_network(nn.ReLU)
    make_batch_norm_explicit(model)
    x, _ = batch()
    state = copy.deepcopy(model.state_dict())
    with mode(model, "train_without_update"):
        quiet = model(x)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(model(x), quiet, rtol=0, atol=0)


def test_reduced_precision_keeps_statistics_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    x = (100 + torch.randn(64, 3, 8, 8, generator=generator)).bfloat16()
    out = ExplicitBatchNorm2d(3)(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, nn.BatchNorm2d(3)(x), rtol=2e-2, atol=2e-2)


def test_one_value_per_channel_is_an_error() -> None:
    with pytest.raises(ValueError, match="more than one value per channel"):
        ExplicitBatchNorm2d(3)(torch.zeros(1, 3, 1, 1))
