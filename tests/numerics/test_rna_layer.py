"""RandomNormalization2d against PyTorch's normalizations, in float64 to 1e-10."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call

from models.errors import UserError
from models.layers.channel_statistics import Normalization2d, parse_normalization, pool_batch
from models.layers.random_normalization import RandomNormalization2d
from models.modes import mode
from models.randomness import frozen, resample, seed_streams, seeded, set_configuration

C = 6
POOL = ("bn", "in", "ln", "gn_groups_3", "gn_size_3", "bgn_groups_3", "bgn_size_3", "bgn_size_6")
IMPLEMENTATIONS = ("selected", "one_formula")


class GroupBatchNorm(nn.Module):
    """BGN by definition: BatchNorm over groups of channels laid side by side, then a scale and a shift per channel."""

    def __init__(self, num_channels: int, groups: int) -> None:
        super().__init__()
        self.inner = nn.BatchNorm2d(groups, affine=False)
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))
        self.groups = groups

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, c, h, w = x.shape
        out = self.inner(x.reshape(b, self.groups, c // self.groups * h, w)).reshape(b, c, h, w)
        return out * self.weight[:, None, None] + self.bias[:, None, None]


class LayerNormOverMaps(nn.Module):
    """nn.LayerNorm over (C, H, W) without its own affine parameters, then a scale and a shift per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(C))
        self.bias = nn.Parameter(torch.zeros(C))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = nn.functional.layer_norm(x, x.shape[1:])
        return out * self.weight[:, None, None] + self.bias[:, None, None]


def reference(name: str) -> nn.Module:
    return {
        "bn": lambda: nn.BatchNorm2d(C),
        "in": lambda: nn.InstanceNorm2d(C, affine=True),
        "ln": LayerNormOverMaps,
        "gn_groups_3": lambda: nn.GroupNorm(3, C),
        "gn_size_3": lambda: nn.GroupNorm(2, C),
        "bgn_groups_3": lambda: GroupBatchNorm(C, 3),
        "bgn_size_3": lambda: GroupBatchNorm(C, 2),
        "bgn_size_6": lambda: GroupBatchNorm(C, 1),
    }[name]().double()


def layer(pool=POOL, implementation="one_formula", **options) -> RandomNormalization2d:
    site = RandomNormalization2d(C, pool, **options).double()
    site.implementation = implementation
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in site.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator, dtype=torch.float64) + 0.5)
    return site


def maps(batch=4, height=5, width=3, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, C, height, width, generator=generator, dtype=torch.float64)
    return x * 2 + torch.arange(C).view(1, C, 1, 1)


def use_parameters_of(module: nn.Module, branch: Normalization2d) -> None:
    with torch.no_grad():
        module.weight.copy_(branch.weight)
        module.bias.copy_(branch.bias)


def values_and_gradients(module, weight, bias, x):
    x = x.clone().requires_grad_()
    out = module(x)
    upstream = torch.cos(torch.arange(out.numel(), dtype=out.dtype)).view_as(out)
    return out, *torch.autograd.grad(out, (x, weight, bias), upstream)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", POOL)
def test_each_choice_equals_pytorchs_normalization(name, implementation):
    site = layer(implementation=implementation)
    site.set_configuration(POOL.index(name))
    expected = reference(name)
    branch = site.branches[name]
    use_parameters_of(expected, branch)
    for training in (True, True, False):
        site.train(training)
        expected.train(training)
        x = maps(seed=7 if training else 8)
        ours = values_and_gradients(site, branch.weight, branch.bias, x)
        theirs = values_and_gradients(expected, expected.weight, expected.bias, x)
        for value, target in zip(ours, theirs, strict=True):
            torch.testing.assert_close(value, target, rtol=1e-10, atol=1e-10)
    if branch.kind.over_batch:
        inner = expected.inner if isinstance(expected, GroupBatchNorm) else expected
        torch.testing.assert_close(branch.running_mean, inner.running_mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(branch.running_var, inner.running_var, rtol=1e-12, atol=1e-12)
        assert branch.num_batches_tracked == inner.num_batches_tracked == 2


def test_selected_batch_norm_is_bit_identical_to_pytorchs():
    site = RandomNormalization2d(C, ("bn", "in"))
    site.set_configuration(0)
    expected = nn.BatchNorm2d(C)
    x = maps().float()
    for training in (True, True, False):
        site.train(training)
        expected.train(training)
        assert torch.equal(site(x), expected(x))


def test_batch_group_norm_of_single_channels_is_batch_norm():
    ours = Normalization2d(C, parse_normalization("bgn_size_1")).double()
    bn = nn.BatchNorm2d(C).double()
    assert torch.equal(ours(maps()), bn(maps()))
    assert Normalization2d(C, parse_normalization(f"bgn_size_{C}")).running_mean.shape == (1,)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", POOL)
def test_second_derivatives(name, implementation):
    site = layer(implementation=implementation)
    site.track_running_stats = False
    for branch in site.branches.values():
        branch.track_running_stats = False
    site.set_configuration(POOL.index(name))
    x = maps(batch=2, height=2, width=2).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda value: site(value).sin(), x, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_only_the_chosen_statistics_move_and_only_the_chosen_parameters_get_a_gradient(implementation):
    site = layer(("bn", "in", "bgn_size_2"), implementation)
    before = {name: value.clone() for name, value in site.named_buffers()}
    site.set_configuration(2)
    site.train()
    (site(maps()) ** 2).sum().backward()
    moved = {name for name, value in site.named_buffers() if not torch.equal(value, before[name])}
    assert moved - {"choice"} == {f"branches.bgn_size_2.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    with_gradient = {name for name, value in site.named_parameters() if value.grad is not None and value.grad.abs().sum() > 0}
    assert with_gradient == {"branches.bgn_size_2.weight", "branches.bgn_size_2.bias"}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_attack_modes(implementation):
    site = layer(("bn", "in"), implementation)
    site.set_configuration(0)
    site.train()
    train_output = site(maps())
    before = {name: value.clone() for name, value in site.named_buffers()}
    with mode(site, "train_without_update"):
        torch.testing.assert_close(site(maps()), train_output, rtol=1e-12, atol=1e-12)
    with mode(site, "eval"):
        assert not torch.allclose(site(maps()), train_output)
    assert all(torch.equal(value, before[name]) for name, value in site.named_buffers())
    site(maps())
    assert not torch.equal(site.branches["bn"].running_mean, before["branches.bn.running_mean"])


def test_a_choice_per_example_is_the_mixture_of_the_choices():
    pool = ("bn", "in", "ln")
    site = layer(pool, draw_scope="per_example")
    seed_streams(site, 3)
    x = maps(batch=20)
    for training in (True, False):
        site.train(training)
        mixed = site(x)
        choices = site.choice_rows[:20]
        assert set(choices.tolist()) == {0, 1, 2}
        twin = copy.deepcopy(site)
        for index in range(3):
            twin.set_configuration(index)
            alone = twin(x)
            torch.testing.assert_close(mixed[choices == index], alone[choices == index], rtol=1e-12, atol=1e-12)


def test_choices_of_examples_depend_neither_on_the_batch_size_nor_on_other_examples():
    site = layer(("bn", "in"), draw_scope="per_example").eval()
    seed_streams(site, 3)
    x = maps(batch=80)
    small = site(x[:5])
    large = site(x)
    torch.testing.assert_close(large[:5], small)
    again = layer(("bn", "in"), draw_scope="per_example").eval()
    seed_streams(again, 3)
    torch.testing.assert_close(again(x), large)


def test_running_statistics_with_a_choice_per_example_move_by_the_share_that_chose_them():
    site = layer(("bn", "in"), draw_scope="per_example")
    seed_streams(site, 3)
    site.train()
    site(maps(batch=8))
    share = (site.choice_rows[:8] == 0).double().mean()
    assert 0 < share < 1
    expected = 0.1 * share * maps(batch=8).mean(dim=(0, 2, 3))
    torch.testing.assert_close(site.branches["bn"].running_mean, expected)


def test_draws_follow_the_rules_of_random_sites():
    site = layer(("bn", "in", "ln", "gn_size_2"))
    seed_streams(site, 5)
    choices = []
    for _ in range(2000):
        resample(site)
        choices.append(int(site.choice))
        assert site.selected == choices[-1]
    counts = torch.tensor(choices).bincount(minlength=4)
    assert ((counts - 500).abs() < 4 * (2000 * 0.25 * 0.75) ** 0.5).all()
    seed_streams(site, 5)
    for choice in choices[:20]:
        resample(site)
        assert site.selected == choice
    before = site.selected
    with seeded(site, 9):
        first = site.selected
    with seeded(site, 9):
        assert site.selected == first
    assert site.selected == before
    with frozen(site):
        site.set_configuration((before + 1) % 4)
        assert site.selected != before
    assert site.selected == before


def test_copies_pickles_and_functional_calls_keep_the_choice():
    site = layer(("bn", "in"), "selected").eval()
    site.set_configuration(1)
    x = maps()
    for twin in (copy.deepcopy(site), pickle.loads(pickle.dumps(site))):
        assert torch.equal(twin(x), site(x))
        twin.set_configuration(0)
        assert site.selected == 1
    weights = dict(site.named_parameters())
    assert torch.equal(functional_call(site, weights, (x,)), site(x))
    # The draw is a buffer: who passes another one gets that choice.
    other = functional_call(site, {"choice": torch.tensor(0)}, (x,))
    assert not torch.equal(other, site(x))
    site.set_configuration(0)
    assert torch.equal(other, site(x))
    assert "choice" not in site.state_dict()


def test_statistics_of_several_workers_replace_one_function():
    site = layer(("bn",), "one_formula")
    whole = maps(batch=6)
    parts = whole[:2], whole[2:]
    moments = [(x.mean(dim=(2, 3)), x.var(dim=(2, 3), correction=0)) for x in parts]

    def all_examples(mean_BG, variance_BG):
        return pool_batch(torch.cat([m for m, _ in moments]), torch.cat([v for _, v in moments]))

    for implementation in IMPLEMENTATIONS:
        one, several = copy.deepcopy(site), copy.deepcopy(site)
        one.implementation = several.implementation = implementation
        several.branches["bn"].batch_reduction = all_examples
        expected = one(whole)
        torch.testing.assert_close(several(parts[0]), expected[:2], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(several.branches["bn"].running_var, one.branches["bn"].running_var)


def test_half_precision_input_keeps_its_type():
    for implementation in IMPLEMENTATIONS:
        for index in range(len(POOL)):
            site = layer(POOL, implementation).float()
            site.set_configuration(index)
            out = site(maps().bfloat16())
            assert out.dtype == torch.bfloat16
            exact = copy.deepcopy(site)(maps().float())
            assert (out.float() - exact).abs().max() < 0.1


@pytest.mark.parametrize("size", [1, 2, 9])
@pytest.mark.parametrize("name", POOL)
def test_the_layout_in_memory_changes_neither_values_nor_itself(name, size):
    site = layer(POOL, "selected")
    site.set_configuration(POOL.index(name))
    x = maps(height=size, width=size)
    laid_out = x.to(memory_format=torch.channels_last).requires_grad_()
    out = site(laid_out)
    torch.testing.assert_close(out, copy.deepcopy(site)(x), rtol=1e-10, atol=1e-10)
    if size > 1 and "bgn" not in name:
        assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batchnorm", "unknown normalization"),
        ("gn_32", "Did you mean 'gn_groups_32'"),
        ("gn_groups_0", "positive number"),
        ("bgn_size_", "bgn_size_2"),
    ],
)
def test_unknown_normalizations(text, message):
    with pytest.raises(UserError, match=message):
        parse_normalization(text)


def test_numbers_of_groups():
    assert parse_normalization("gn_groups_32").groups(16) == 16
    assert parse_normalization("bgn_size_2").groups(16) == 8
    assert parse_normalization("ln").groups(16) == 1
    with pytest.raises(UserError, match=r"48 channels cannot be split into 32 equal groups.*24"):
        parse_normalization("gn_groups_32").groups(48)
    for name in ("gn_size_32", "bgn_size_32", "gn_size_64"):
        with pytest.raises(UserError, match=rf"{name}.*16 channels cannot be split into groups of (32|64)"):
            parse_normalization(name).groups(16)
    with pytest.raises(UserError, match="twice"):
        RandomNormalization2d(C, ("bn", "bn"))
    with pytest.raises(UserError, match="empty"):
        RandomNormalization2d(C, ())
    for pool in (("in", "gn_size_1"), ("bn", "ln", "bgn_size_1"), ("gn_groups_1", "ln")):
        with pytest.raises(UserError, match=f"'{pool[0]}' and '{pool[-1]}' of the pool are the same"):
            RandomNormalization2d(C, pool)
    assert parse_normalization("in") == parse_normalization("gn_size_1") != parse_normalization("gn_size_2")


@pytest.mark.slow
def test_one_compiled_graph_serves_all_draws():
    import torch._dynamo as dynamo
    from torch._dynamo.testing import CompileCounterWithBackend

    model = nn.Sequential(nn.Conv2d(C, C, 3, padding=1), *(RandomNormalization2d(C, ("bn", "in", "ln")) for _ in range(3)))
    seed_streams(model, 0)
    graphs = CompileCounterWithBackend("aot_eager")
    dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    x = maps().float().requires_grad_()
    expected_graphs = None
    for draw in range(12):
        resample(model)
        for training in (True, False):
            model.train(training)
            twin = copy.deepcopy(model)
            out = compiled(x)
            (gradient,) = torch.autograd.grad(out.square().sum(), x)
            target = twin(x)
            (expected,) = torch.autograd.grad(target.square().sum(), x)
            torch.testing.assert_close(out, target, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3)
            for mine, theirs in zip(model.buffers(), twin.buffers(), strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
        if draw == 0:
            expected_graphs = graphs.frame_count
    assert graphs.frame_count == expected_graphs == 2  # one for each mode
    set_configuration(model, 0)
    compiled(x)
    assert graphs.frame_count == 2
