"""CTRW: the random weight, its constraints, its draws, every position and variant on every backbone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from models import build_model
from models.constraints import apply_constraints
from models.defences.ctrw import PRESETS
from models.errors import UserError
from models.layers.random_weight import RandomFeatureWeight, RandomFilterConv2d, SigmaBounds
from models.randomness import ResampleOnForward, frozen, num_configurations, random_sites, resample, seed_streams
from models.threat_model import ThreatModel
from trainers.hardware import FULL
from trainers.step import InnerAttackConfig, StepContext
from trainers.streams import Streams

SMALL = {"backbone": "resnet8", "image_shape": (3, 8, 8), "num_classes": 4}
SHAPE = (2, 3, 4)


def images(batch=4, size=8, dtype=torch.float32) -> torch.Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(dtype)


def weight(constraint="none", lower=0.0, upper=1e9, **options) -> RandomFeatureWeight:
    site = RandomFeatureWeight(SHAPE, 1.0, 0.5, SigmaBounds(constraint, lower, upper), **options).double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        site.mu.copy_(torch.randn(SHAPE, generator=generator))
        if site.sigma.requires_grad:
            site.sigma.copy_(torch.rand(SHAPE, generator=generator))
    return site


def test_gradients_of_mu_and_sigma():
    site = weight()
    x = torch.randn(5, *SHAPE, dtype=torch.float64)
    out = site(x)
    torch.testing.assert_close(out, x * (site.mu + site.delta * site.sigma))
    grad_mu, grad_sigma = torch.autograd.grad(out.sum(), (site.mu, site.sigma))
    torch.testing.assert_close(grad_mu, x.sum(0))
    torch.testing.assert_close(grad_sigma, (x * site.delta).sum(0))
    assert torch.autograd.gradcheck(lambda value: site(value).sin(), x[:1].requires_grad_())
    assert torch.autograd.gradgradcheck(lambda value: site(value).sin(), x[:1].requires_grad_())


def test_no_sigma_no_randomness():
    plain = build_model("at", seed=1, **SMALL).eval()
    model = build_model("ctrw", seed=1, constraint="none", **SMALL).eval()
    ((_, site),) = random_sites(model)
    with torch.no_grad():
        site.sigma.zero_()
    assert torch.equal(model(images()), plain(images()))
    first = model(images())
    resample(model)
    assert torch.equal(model(images()), first)


def test_the_same_seed_gives_the_same_draw_and_two_draws_differ():
    first, second = build_model("ctrw", seed=1, **SMALL).eval(), build_model("ctrw", seed=1, **SMALL).eval()
    assert torch.equal(first(images()), second(images()))
    before = first(images())
    resample(first)
    assert (first(images()) - before).abs().max() > 0
    resample(second)
    assert torch.equal(first(images()), second(images()))


def test_floor():
    bounds = SigmaBounds("floor", 12.0, 0.0)
    floor = 0.5
    sigma = torch.tensor([0.1, 0.4, 0.5, 0.7] * 6)
    kept = sigma >= floor
    before = sigma.clone()
    bounds.apply(sigma)
    assert sigma.min() >= floor - 1e-7
    assert torch.equal(sigma[kept], before[kept])
    torch.testing.assert_close(sigma[1] - sigma[0], torch.tensor(0.3))  # raised alike, as in the official code
    again = sigma.clone()
    bounds.apply(again)
    assert torch.equal(again, sigma)


def test_shift():
    bounds = SigmaBounds("shift", 12.0, 0.0)
    sigma = torch.rand(24)
    bounds.apply(sigma)
    assert sigma.double().sum().item() == pytest.approx(max(12.0, sigma.double().sum().item()), rel=1e-6)
    low = torch.full((24,), 0.1)
    bounds.apply(low)
    assert low.double().sum().item() == pytest.approx(12.0, rel=1e-6)
    high = torch.full((24,), 0.9)
    bounds.apply(high)
    assert torch.equal(high, torch.full((24,), 0.9))


@pytest.mark.parametrize("start", [-1.0, 0.0, 0.01, 0.3, 5.0])
def test_project_is_idempotent(start):
    bounds = SigmaBounds("project", 6.0, 12.0)
    sigma = torch.linspace(-1, 1, 24) + start
    bounds.apply(sigma)
    assert sigma.min() >= 0
    assert 6.0 * (1 - 1e-5) <= sigma.double().sum().item() <= 12.0 * (1 + 1e-5)
    again = sigma.clone()
    bounds.apply(again)
    torch.testing.assert_close(again, sigma, rtol=1e-6, atol=1e-7)


def train_steps(model: nn.Module, num_steps: int, learning_rate: float):
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9, weight_decay=0.1)
    for step in range(num_steps):
        resample(model)
        optimizer.zero_grad()
        (model(images()) * (1 if step % 2 else -1)).square().mean().backward()
        optimizer.step()
        apply_constraints(model)
        yield


def test_project_holds_after_every_step():
    model = build_model("ctrw", constraint="project", lower_bound=1000, upper_bound=1010, **SMALL).train()
    ((_, site),) = random_sites(model)
    size = 3 * 8 * 8
    lower, upper = 1000 * size / 3072, 1010 * size / 3072
    for _ in train_steps(model, 5, learning_rate=3.0):
        total = site.sigma.detach().double().sum().item()
        assert lower * (1 - 1e-5) <= total <= upper * (1 + 1e-5)
        assert site.sigma.min() >= 0


def test_the_projected_start_is_legal():
    ((_, site),) = random_sites(build_model("ctrw", **PRESETS["paper"], **SMALL))
    assert site.sigma.mean().item() == pytest.approx(1700 / 3072, rel=1e-6)


def test_fixed_sigma_never_moves():
    model = build_model("ctrw", constraint="fixed", lower_bound=1536, **SMALL).train()
    ((_, site),) = random_sites(model)
    before = site.sigma.detach().clone()
    assert not site.sigma.requires_grad
    assert before.eq(0.5).all()
    for _ in train_steps(model, 2, learning_rate=1.0):
        assert torch.equal(site.sigma, before)


def test_the_draw_is_held_in_an_attack_and_renewed_per_forward_on_demand():
    model = build_model("ctrw", **SMALL).eval()
    ((_, site),) = random_sites(model)
    with frozen(model):
        weights = []
        for _ in range(10):
            resample(model)
            weights.append(site.sample_weight())
        assert all(torch.equal(value, weights[0]) for value in weights)
    renewing = ResampleOnForward(model, seed=1)
    seen = set()
    for _ in range(10):
        renewing(images())
        seen.add(site.delta.sum().item())
    assert len(seen) == 10


def test_two_draws_per_training_step(monkeypatch):
    model = build_model("ctrw", **SMALL).train()
    drawn = []
    original = RandomFeatureWeight.draw
    monkeypatch.setattr(RandomFeatureWeight, "draw", lambda self, generator: (drawn.append(1), original(self, generator))[1])
    context = StepContext(
        threat_model=ThreatModel(),
        attack=InnerAttackConfig(steps=3),
        redraw="attack_then_step",
        streams=Streams(0),
        precision=FULL,
        num_epochs=1,
        steps_per_epoch=10,
    )
    context.adversarial_examples(model, images(), torch.tensor([0, 1, 2, 3]))
    assert len(drawn) == 2


@pytest.mark.parametrize("variant", ["in", "out", "both"])
def test_who_shares_a_draw(variant):
    twice = images(1).repeat(2, 1, 1, 1)
    shared = build_model("ctrw", variant=variant, **SMALL).eval()
    a, b = shared(twice)
    torch.testing.assert_close(a, b)
    own = build_model("ctrw", variant=variant, draw_scope="per_example", **SMALL).eval()
    a, b = own(twice)
    assert not torch.allclose(a, b)
    x = images(70)
    torch.testing.assert_close(own(x)[:5], own(x[:5]), rtol=1e-4, atol=1e-5)


def test_a_checkpoint_holds_mu_and_sigma_but_not_the_draw():
    model = build_model("ctrw", seed=1, draw_scope="per_example", **SMALL).eval()
    names = [name for name in model.state_dict() if "taps.0" in name]
    assert names == ["backbone.taps.0.mu", "backbone.taps.0.sigma"]
    expected = model(images())
    other = build_model("ctrw", seed=2, draw_scope="per_example", **SMALL).eval()
    other.load_state_dict(model.state_dict(), strict=True)
    seed_streams(other, 1)
    torch.testing.assert_close(other(images()), expected)


@pytest.mark.parametrize("scope", ["global", "per_example"])
def test_copies_pickles_and_double_precision(scope):
    model = build_model("ctrw", draw_scope=scope, **SMALL).double().eval()
    x = images(dtype=torch.float64)
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), expected)
        resample(twin)
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("defence", ["ctrw", "rna", "dcs"])
@pytest.mark.parametrize("scope", ["global", "per_example"])
def test_draws_taken_in_inference_mode_serve_a_gradient_later(defence, scope):
    model = build_model(defence, draw_scope=scope, **SMALL).train()
    with torch.inference_mode():
        resample(model)
        with frozen(model):
            model(images(70))
    model(images(70)).sum().backward()


def test_autocast_keeps_the_random_weight_in_full_precision():
    site = weight().float()
    x = torch.randn(3, *SHAPE).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = site(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, (x.float() * site.sample_weight()).bfloat16())


def test_a_random_filter_is_the_convolution_with_the_drawn_weight():
    conv = nn.Conv2d(3, 5, 3, padding=1)
    site = RandomFilterConv2d(conv, 0.1, SigmaBounds("none", 0, 1))
    x = torch.randn(2, 3, 6, 6)
    expected = nn.functional.conv2d(x, site.mu + site.delta * site.sigma, conv.bias, padding=1)
    torch.testing.assert_close(site(x), expected)
    torch.testing.assert_close(site.mu, conv.weight)


BACKBONES = ["resnet8", "resnet20", "wrn16_4", "mobilenet_v2", "vit_tiny"]
LARGE_BACKBONES = ["resnet18", "preact_resnet18", "vgg16", "resnet50", "wrn34_10"]


@pytest.mark.parametrize("backbone", [*BACKBONES, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE_BACKBONES)])
def test_every_position_and_variant_on_every_backbone(backbone):
    shape = (3, 32, 32)
    plain = build_model("at", backbone=backbone, image_shape=shape, num_classes=4)
    positions = [int(key) for key in plain.backbone.taps]
    shapes = plain.backbone.feature_shapes(shape)
    variants = 0
    for position in positions:
        for variant in ("in", "out", "both", "filter"):
            options = {"position": position, "variant": variant, "constraint": "project", "lower_bound": 1000.0}
            if variant != "in" and position == positions[-1]:
                with pytest.raises(UserError, match="only variant `in` is possible"):
                    build_model("ctrw", backbone=backbone, image_shape=shape, num_classes=4, **options)
                continue
            model = build_model("ctrw", backbone=backbone, image_shape=shape, num_classes=4, **options).eval()
            variants += 1
            sites = [site for _, site in random_sites(model)]
            assert len(sites) == (2 if variant == "both" else 1)
            if variant in ("in", "both"):
                assert tuple(sites[0].mu.shape) == shapes[str(position)]
            for site in sites:
                total = site.sigma.detach().double().sum().item()
                assert site.bounds.lower * (1 - 1e-5) <= total <= site.bounds.upper * (1 + 1e-5)
            with torch.no_grad():
                first = model(images(1, 32))
                resample(model)
                assert not torch.equal(model(images(1, 32)), first)
    assert variants == 4 * len(positions) - 3


def test_the_sum_of_bounds_follows_the_size_of_the_map():
    ((_, site),) = random_sites(build_model("ctrw", backbone="resnet18", position=4))
    assert tuple(site.mu.shape) == (256, 8, 8)
    assert site.bounds.lower / site.mu.numel() == pytest.approx(2048 / 3072)
    ((_, site),) = random_sites(build_model("ctrw", backbone="resnet18", position=4, bounds_refer_to="feature_map"))
    assert site.bounds.lower == 2048
    assert num_configurations(site) == float("inf")


def test_mistakes_are_explained():
    with pytest.raises(UserError, match=r"position 9 does not exist in ResNet; it has positions 0, 1, 2, 3, 4"):
        build_model("ctrw", position=9, **SMALL)
    with pytest.raises(UserError, match="no sigma satisfies"):
        build_model("ctrw", constraint="project", lower_bound=3000, **SMALL)
    with pytest.raises(UserError, match="shared by the batch"):
        build_model("ctrw", variant="filter", draw_scope="per_example", **SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["global", "per_example"])
def test_one_compiled_graph_serves_all_draws(scope):
    import torch._dynamo as dynamo
    from torch._dynamo.testing import CompileCounterWithBackend

    site = weight(draw_scope=scope)
    graphs = CompileCounterWithBackend("aot_eager")
    dynamo.reset()
    compiled = torch.compile(site, fullgraph=True, backend=graphs)
    x = torch.randn(5, *SHAPE, dtype=torch.float64)
    site(x)  # makes room for five rows
    for _ in range(12):
        resample(site)
        torch.testing.assert_close(compiled(x), site(x))
    assert graphs.frame_count == 1


def test_a_fixed_deviation_of_zero_is_refused():
    """It would be deterministic and still claim infinitely many configurations."""
    with pytest.raises(UserError, match="nothing would be random"):
        build_model("ctrw", constraint="fixed", lower_bound=0.0, backbone="resnet8", image_shape=(3, 8, 8))
    build_model("ctrw", constraint="fixed", lower_bound=1.0, backbone="resnet8", image_shape=(3, 8, 8))
