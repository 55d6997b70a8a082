"""StochasticConv2d and its space of masks: implementations against the definition, in float64 to 1e-10."""

from __future__ import annotations

import copy
import pickle
import random

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from models.errors import UserError
from models.layers.stochastic_convolution import StochasticConv2d
from models.randomness import (
    frozen,
    num_configurations,
    resample,
    resample_after_attack,
    seed_streams,
    seeded,
    set_configuration,
)
from models.registry import build_model

IMPLEMENTATIONS = ("masked", "crop", "gather", "auto")


def layer(k=5, n=2, stride=1, channels=(4, 6), groups=1, bias=False, **options) -> StochasticConv2d:
    torch.manual_seed(0)
    return StochasticConv2d(*channels, k, n, (stride, stride), groups, bias, **options).double()


def maps(batch=3, channels=4, height=7, width=6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, channels, height, width, generator=generator, dtype=torch.float64)


def by_definition(site: StochasticConv2d, x: torch.Tensor, taps) -> torch.Tensor:
    """Sum over the kept taps of the shifted, zero-padded map times that tap's weight: naive loops over pixels."""
    k, pad = site.kernel_size, site.kernel_size // 2
    down, across = site.stride
    padded = functional.pad(x, (pad,) * 4)
    height = (x.shape[2] + 2 * pad - k) // down + 1
    width = (x.shape[3] + 2 * pad - k) // across + 1
    per_group = site.out_channels // site.groups
    rows = []
    for i in range(height):
        row = []
        for j in range(width):
            value = torch.zeros(x.shape[0], site.out_channels, dtype=x.dtype)
            for tap in taps:
                r, c = divmod(tap, k)
                pixel = padded[:, :, i * down + r, j * across + c].unflatten(1, (site.groups, -1))
                kernel = site.weight[:, :, r, c].unflatten(0, (site.groups, per_group))
                value = value + torch.einsum("bgc,goc->bgo", pixel, kernel).flatten(1)
            row.append(value)
        rows.append(torch.stack(row, dim=-1))
    out = torch.stack(rows, dim=-2)
    return out if site.bias is None else out + site.bias[:, None, None]


def value_and_gradients(function, site, x):
    x = x.clone().requires_grad_()
    out = function(x)
    upstream = torch.cos(torch.arange(out.numel(), dtype=out.dtype)).view_as(out)
    return out, *torch.autograd.grad(out, (x, site.weight), upstream)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("k", "n", "stride", "height", "groups"),
    [
        (5, 2, 1, 7, 1),
        (5, 2, 2, 7, 1),
        (5, 2, 2, 8, 2),
        (3, 2, 1, 6, 1),
        (3, 5, 2, 6, 1),
        (5, 4, 1, 8, 2),
        (7, 1, 2, 3, 1),
        (5, 25, 1, 7, 1),
    ],
)
def test_implementations_equal_the_definition(implementation, k, n, stride, height, groups):
    site = layer(k, n, stride, groups=groups, bias=True)
    site.implementation = implementation
    x = maps(batch=2, height=height)
    for _ in range(3):
        resample(site)
        ours = value_and_gradients(site, site, x)
        target = value_and_gradients(lambda value: by_definition(site, value, site.selected_taps), site, x)
        for value, expected in zip(ours, target, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
        kept = torch.zeros(k * k, dtype=torch.bool)
        kept[list(site.selected_taps)] = True
        assert (ours[2].flatten(2)[:, :, ~kept] == 0).all()


@pytest.mark.parametrize("seed", range(60))
def test_all_forms_equal_the_definition_on_maps_of_any_size(seed):
    """Maps from 1x1, kernels larger than the map, strides that differ by axis, groups, any mask: float64, to 1e-12."""
    chance = random.Random(seed)
    k = chance.choice([1, 3, 5, 7, 9])
    n = chance.randint(1, min(k * k, chance.choice([1, 2, 3, 5, 81])))
    groups = chance.choice([1, 1, 2])
    stride = (chance.randint(1, 3), chance.randint(1, 3))
    site = StochasticConv2d(2 * groups, 2 * groups, k, n, stride, groups, bias=chance.random() < 0.5).double()
    if site.bias is not None:
        nn.init.normal_(site.bias)
    x = maps(batch=2, channels=2 * groups, height=chance.randint(1, 6), width=chance.randint(1, 6))
    for _ in range(3):
        site.set_taps(tuple(chance.sample(range(k * k), n)))
        target = value_and_gradients(lambda value: by_definition(site, value, site.selected_taps), site, x)
        for implementation in IMPLEMENTATIONS:
            site.implementation = implementation
            for value, expected in zip(value_and_gradients(site, site, x), target, strict=True):
                torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", range(12))
def test_masks_of_single_examples_equal_the_definition_on_maps_of_any_size(seed):
    chance = random.Random(100 + seed)
    k, stride = chance.choice([1, 3, 5, 7]), (chance.randint(1, 3), chance.randint(1, 3))
    n = chance.randint(1, k * k)
    site = StochasticConv2d(4, 4, k, n, stride, groups=chance.choice([1, 2]), bias=True, draw_scope="per_example").double()
    x = maps(batch=3, channels=4, height=chance.randint(1, 5), width=chance.randint(1, 5))
    out = site(x)
    for row in range(3):
        taps = site.tap_rows[row].tolist()
        torch.testing.assert_close(out[row : row + 1], by_definition(site, x[row : row + 1], taps), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("backbone", "size", "parameters"),
    [
        ("resnet8", 8, {"kernel_size": 7, "positions": (7,)}),
        ("resnet18", 8, {"kernel_size": 5, "positions": (15,)}),
        ("vgg16", 32, {"kernel_size": 7, "positions": (12,)}),
    ],
)
def test_no_draw_crashes_on_the_small_maps_of_deep_layers(backbone, size, parameters):
    """Networks whose last maps are smaller than the kernel; 8 of 40 draws of the first one used to crash."""
    model = build_model("dcs", backbone=backbone, image_shape=(3, size, size), **parameters).eval()
    x = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    (site,) = [module for module in model.modules() if isinstance(module, StochasticConv2d)]
    seen: list[torch.Tensor] = []
    site.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(x)
        for _ in range(40):
            resample(model)
            site.implementation = "masked"
            expected = site(seen[0])
            site.implementation = "auto"
            torch.testing.assert_close(site(seen[0]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[:3])
def test_every_mask_agrees_in_every_implementation(implementation):
    site = layer(5, 2, stride=2)
    x = maps()
    for index in range(site.num_configurations):
        site.set_configuration(index)
        site.implementation = "masked"
        expected = site(x)
        site.implementation = implementation
        torch.testing.assert_close(site(x), expected, rtol=1e-11, atol=1e-11)


def test_all_taps_are_the_plain_convolution_bit_for_bit():
    site = layer(3, 9, bias=True).float()
    x = maps().float()
    expected = functional.conv2d(x, site.weight, site.bias, padding=1)
    site.implementation = "masked"
    assert torch.equal(site(x), expected)
    for implementation in IMPLEMENTATIONS[1:]:
        site.implementation = implementation
        torch.testing.assert_close(site(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[:3])
def test_second_derivatives(implementation):
    site = layer(3, 2, channels=(2, 2))
    site.implementation = implementation
    x = maps(batch=1, channels=2, height=3, width=3).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda value, weight: _with_weight(site, value, weight), (x, site.weight.detach().requires_grad_()))


def _with_weight(site, value, weight):
    return functional_call(site, {"weight": weight}, (value,)).sin()


@pytest.mark.parametrize(("stride", "height"), [(1, 7), (1, 8), (2, 7), (2, 8), (3, 7)])
def test_the_output_has_the_size_of_the_replaced_convolution(stride, height):
    conv = nn.Conv2d(4, 6, 3, stride, padding=1)
    for k in (1, 3, 5, 7):
        site = layer(k, 1, stride).float()
        for implementation in IMPLEMENTATIONS:
            site.implementation = implementation
            assert site(maps(height=height).float()).shape == conv(maps(height=height).float()).shape


def test_disjoint_masks_add_up():
    site = layer(5, 2)
    both = layer(5, 4)
    both.load_state_dict(site.state_dict())
    x = maps()
    outputs = []
    for taps in ((3, 11), (0, 24)):
        site.set_taps(taps)
        outputs.append(site(x))
    both.set_taps((0, 3, 11, 24))
    torch.testing.assert_close(both(x), outputs[0] + outputs[1], rtol=1e-12, atol=1e-12)


def test_a_smaller_kernel_can_be_embedded():
    conv = nn.Conv2d(4, 6, 3, padding=1).double()
    site = layer(5, 9, bias=True)
    site.embed(conv)
    site.set_taps((6, 7, 8, 11, 12, 13, 16, 17, 18))
    torch.testing.assert_close(site(maps()), conv(maps()), rtol=1e-12, atol=1e-12)
    with pytest.raises(UserError, match="7x7 kernel does not fit into 5x5"):
        site.embed(nn.Conv2d(4, 6, 7))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_mask_per_example(stride, groups):
    site = layer(5, 2, stride, groups=groups, bias=True, draw_scope="per_example")
    x = maps(batch=5)
    out, *gradients = value_and_gradients(site, site, x)
    rows = site.tap_rows[:5].tolist()
    assert len({tuple(row) for row in rows}) > 1
    single = layer(5, 2, stride, groups=groups, bias=True)

    def one_by_one(value):
        parts = []
        for index, row in enumerate(rows):
            single.set_taps(tuple(row))
            parts.append(single(value[index : index + 1]))
        return torch.cat(parts)

    expected, *expected_gradients = value_and_gradients(one_by_one, single, x)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    for gradient, target in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, target, rtol=1e-10, atol=1e-10)


def test_masks_of_examples_do_not_depend_on_the_batch_size():
    site = layer(draw_scope="per_example", gsat="attack")
    seed_streams(site, 1)
    resample_after_attack(site)
    x = maps(batch=70)
    torch.testing.assert_close(site(x[:4]), site(x)[:4], rtol=1e-12, atol=1e-12)
    site.set_configuration(17)
    shared = layer()
    shared.set_configuration(17)
    torch.testing.assert_close(site(x), shared(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(site(maps(batch=100)), shared(maps(batch=100)), rtol=1e-12, atol=1e-12)


# The space of masks.


def test_masks_are_uniform():
    site = layer(3, 2)
    draws = 7200
    counts = torch.zeros(9)
    masks: dict[tuple[int, ...], int] = {}
    for _ in range(draws):
        resample(site)
        assert site.mask.sum() == 2
        assert tuple(site.mask.flatten().nonzero().flatten().tolist()) == site.selected_taps
        counts[list(site.selected_taps)] += 1
        masks[site.selected_taps] = masks.get(site.selected_taps, 0) + 1
    assert ((counts - draws * 2 / 9).abs() < 4 * (draws * 2 / 9 * 7 / 9) ** 0.5).all()
    assert len(masks) == 36
    chi_square = sum((count - draws / 36) ** 2 / (draws / 36) for count in masks.values())
    assert chi_square < 66.6  # 99.9 % of the distribution with 35 degrees of freedom


# Draws.


def test_draws_follow_the_rules_of_random_sites():
    site = layer()
    seed_streams(site, 4)
    path = []
    for _ in range(50):
        resample(site)
        path.append(site.selected_taps)
    assert len(set(path)) > 30
    seed_streams(site, 4)
    for taps in path[:5]:
        resample(site)
        assert site.selected_taps == taps
    with frozen(site):
        resample(site)
        assert site.selected_taps == path[4]
        site.set_taps((0, 1))
    assert site.selected_taps == path[4]
    assert num_configurations(site) == 300
    set_configuration(site, 299)
    assert site.selected_taps == (23, 24)


@pytest.mark.parametrize("sampling", ["uniform", "stratified2"])
@pytest.mark.parametrize("scope", ["global", "per_example"])
def test_gsat_trains_on_taps_that_the_attack_did_not_use(sampling, scope):
    site = layer(3, 2, gsat="attack", sampling=sampling, draw_scope=scope)
    counts = torch.zeros(9)
    for _ in range(400):
        resample(site)
        attacked = site.tap_rows.clone() if scope == "per_example" else site.taps[None]
        resample_after_attack(site)
        trained = site.tap_rows if scope == "per_example" else site.taps[None]
        assert not (attacked[:, :, None] == trained[:, None, :]).any()
        counts += trained.flatten().bincount(minlength=9)
    if sampling == "uniform" and scope == "global":
        total = counts.sum()
        assert ((counts / total - 1 / 9).abs() < 4 * (1 / 9 / total) ** 0.5).all()


def test_a_chain_avoids_the_draw_before():
    site = layer(3, 2, gsat="chain")
    seed_streams(site, 0)
    before = None
    for _ in range(300):
        resample(site)
        attacked = set(site.selected_taps)
        assert before is None or not attacked & before
        resample_after_attack(site)
        before = set(site.selected_taps)
        assert not attacked & before
    # An evaluation is not part of the chain: the same seed gives the same draws, whatever was trained before.
    drawn = []
    for _ in range(2):
        with seeded(site, 7):
            drawn.append([site.selected_taps])
            for _ in range(3):
                resample(site)
                drawn[-1].append(site.selected_taps)
        resample(site)
        resample_after_attack(site)
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("gsat", ["off", "attack", "chain"])
def test_evaluation_draws_are_independent(gsat):
    site = layer(gsat=gsat)
    seed_streams(site, 2)
    draws = 6000
    overlaps = torch.zeros(3)
    before = set(site.selected_taps)
    for _ in range(draws):
        resample(site)
        now = set(site.selected_taps)
        overlaps[len(before & now)] += 1
        before = now
    for overlap, probability in enumerate((0.843333, 0.153333, 0.003333)):
        spread = (probability * (1 - probability) / draws) ** 0.5
        assert abs(overlaps[overlap] / draws - probability) < 4 * spread


def test_without_gsat_the_training_draw_is_independent():
    site = layer(3, 4, gsat="off")
    shared = 0
    for _ in range(50):
        resample(site)
        attacked = set(site.selected_taps)
        resample_after_attack(site)
        shared += len(attacked & set(site.selected_taps))
    assert shared > 0


def test_copies_pickles_and_functional_calls_keep_the_mask():
    site = layer(gsat="chain")
    x = maps()
    for twin in (copy.deepcopy(site), pickle.loads(pickle.dumps(site))):
        assert torch.equal(twin(x), site(x))
        expected = site.selected_taps
        twin.set_configuration(0)
        assert site.selected_taps == expected
    assert torch.equal(functional_call(site, dict(site.named_parameters()), (x,)), site(x))
    assert set(site.state_dict()) == {"weight"}
    # The draw is a buffer: who passes another mask gets that mask.
    mask = torch.zeros(5, 5, dtype=torch.float64)
    mask[1, 2] = mask[4, 4] = 1
    other = functional_call(site, {"mask": mask}, (x,))
    site.set_taps((7, 24))
    torch.testing.assert_close(other, site(x), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["global", "per_example"])
def test_one_compiled_graph_serves_all_masks(scope):
    import torch._dynamo as dynamo
    from torch._dynamo.testing import CompileCounterWithBackend

    site = layer(draw_scope=scope).float()
    graphs = CompileCounterWithBackend("aot_eager")
    dynamo.reset()
    compiled = torch.compile(site, fullgraph=True, backend=graphs)
    x = maps().float().requires_grad_()
    for _ in range(12):
        resample(site)
        out = compiled(x)
        (gradient,) = torch.autograd.grad(out.square().sum(), x)
        target = site(x)
        (expected,) = torch.autograd.grad(target.square().sum(), x)
        torch.testing.assert_close(out, target, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3)
    assert graphs.frame_count == 1
