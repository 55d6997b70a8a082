"""RNA as a whole network: paths, draws, equality with plain networks, configuration errors."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from models import build_model
from models.errors import UserError
from models.layer_replacement import of_type, replace_modules
from models.layers.random_normalization import RandomNormalization2d
from models.randomness import num_configurations, random_sites, resample, seed_streams, set_configuration
from models.threat_model import ThreatModel
from trainers.hardware import FULL
from trainers.step import InnerAttackConfig, StepContext
from trainers.streams import Streams

SMALL = {"backbone": "resnet8", "image_shape": (3, 8, 8), "num_classes": 4}


def images(batch=4, size=8, dtype=torch.float32) -> torch.Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(dtype)


def context(redraw="attack_then_step", steps=3) -> StepContext:
    return StepContext(
        threat_model=ThreatModel(),
        attack=InnerAttackConfig(steps=steps, mode="train"),
        redraw=redraw,
        streams=Streams(0),
        precision=FULL,
        num_epochs=1,
        steps_per_epoch=10,
    )


@pytest.mark.parametrize(
    ("backbone", "last", "layers"),
    [
        ("resnet18", "plain", 20),
        ("wrn16_4", "plain", 12),
        ("wrn16_4", "random", 13),
        ("preact_resnet18", "plain", 16),
        ("resnet8", "random", 9),
    ],
)
def test_number_of_paths(backbone, last, layers):
    model = build_model("rna", backbone=backbone, image_shape=(3, 16, 16), last_normalization=last)
    assert len(list(random_sites(model))) == layers
    assert num_configurations(model) == 2**layers
    assert isinstance(num_configurations(model), int)


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "layers"), [("wrn34_10", 30), ("resnet50", 53)])
def test_number_of_paths_of_large_networks(backbone, layers):
    model = build_model("rna", backbone=backbone, image_shape=(3, 32, 32), pool=("bgn_size_1", "gn_size_1", "bgn_size_2", "gn_size_2"))
    assert num_configurations(model) == 4**layers


@pytest.mark.parametrize("training", [True, False])
def test_all_batch_norm_is_the_plain_network_bit_for_bit(training):
    plain = build_model("at", seed=3, **SMALL).train(training)
    random = build_model("rna", seed=3, **SMALL).train(training)
    set_configuration(random, 0)
    assert torch.equal(random(images()), plain(images()))


def test_all_instance_norm_is_the_network_of_group_norms_of_one_channel():
    plain = build_model("at", seed=3, **SMALL)
    replace_modules(plain, of_type(nn.BatchNorm2d), lambda _name, old: nn.GroupNorm(old.num_features, old.num_features))
    random = build_model("rna", seed=3, **SMALL)
    set_configuration(random, num_configurations(random) - 1)
    assert all(site.selected == 1 for _, site in random_sites(random))
    assert torch.equal(random(images()), plain(images()))


def test_the_instance_norm_baseline_has_no_affine_parameters():
    model = build_model("single_normalization", normalization="in", **SMALL)
    plain = build_model("at", **SMALL)
    replace_modules(plain, of_type(nn.BatchNorm2d), lambda _name, old: nn.InstanceNorm2d(old.num_features))
    torch.testing.assert_close(model(images()), plain(images()))


def test_layer_based_choice_is_one_type_everywhere():
    model = build_model("rna", choice="per_network", pool=("bn", "in", "ln"), **SMALL)
    assert num_configurations(model) == 3
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for draw in range(30):
        resample(model, generator if draw % 2 else None)
        selected = {site.selected for _, site in random_sites(model)}
        assert len(selected) == 1
        seen |= selected
    assert seen == {0, 1, 2}
    for index in range(3):
        set_configuration(model, index)
        assert {site.selected for _, site in random_sites(model)} == {index}


def test_layers_choose_uniformly_and_independently():
    model = build_model("rna", **SMALL)
    sites = [site for _, site in random_sites(model)]
    draws = 1500
    choices = torch.zeros(draws, len(sites))
    for index in range(draws):
        resample(model)
        choices[index] = torch.tensor([site.selected for site in sites])
    assert ((choices.mean(0) - 0.5).abs() < 4 * 0.5 / draws**0.5).all()
    correlation = torch.corrcoef(choices.T) - torch.eye(len(sites))
    assert correlation.abs().max() < 4.5 / draws**0.5


def test_the_same_seed_gives_the_same_path():
    first, second = build_model("rna", seed=1, **SMALL), build_model("rna", seed=1, **SMALL)
    for _ in range(5):
        resample(first)
        resample(second)
        assert [s.selected for _, s in random_sites(first)] == [s.selected for _, s in random_sites(second)]
    seed_streams(second, 2)
    paths = []
    for model in (first, second):
        drawn = []
        for _ in range(5):
            resample(model)
            drawn.append([s.selected for _, s in random_sites(model)])
        paths.append(drawn)
    assert paths[0] != paths[1]


@pytest.mark.parametrize(("redraw", "draws"), [("attack_then_step", 2), ("each_batch", 1), ("each_attack_step", 5)])
def test_draws_of_a_training_step(redraw, draws, monkeypatch):
    model = build_model("rna", **SMALL).train()
    site = next(site for _, site in random_sites(model))
    keys = []
    original = RandomNormalization2d.draw

    def counted(self, generator):
        if self is site:
            keys.append(self.draw_key)
        original(self, generator)

    monkeypatch.setattr(RandomNormalization2d, "draw", counted)
    context(redraw).adversarial_examples(model, images(), torch.tensor([0, 1, 2, 3]))
    assert len(keys) == len(set(keys)) == draws


def test_gradients_of_unchosen_types_are_none_in_eager_mode():
    model = build_model("rna", **SMALL).train()
    set_configuration(model, 0)
    model(images()).sum().backward()
    for _, site in random_sites(model):
        assert site.branches["bn"].weight.grad is not None
        assert site.branches["in"].weight.grad is None


def test_copies_pickles_double_precision_and_checkpoints():
    model = build_model("rna", **SMALL).double().eval()
    x = images(dtype=torch.float64)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    other = build_model("rna", seed=9, **SMALL).double().eval()
    other.load_state_dict(model.state_dict(), strict=True)
    for (_, source), (_, target) in zip(random_sites(model), random_sites(other), strict=True):
        target.set_configuration(source.selected)
    assert torch.equal(other(x), expected)


def test_instance_normalization_per_example_does_not_mix_examples():
    model = build_model("rna", draw_scope="per_example", **SMALL).eval()
    x = images(batch=70)
    torch.testing.assert_close(model(x)[:3], model(x[:3]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backbone", ["resnet8", "vgg16", "mobilenet_v2", "vit_tiny", "wrn16_4", "preact_resnet18"])
def test_every_backbone_with_batch_norm(backbone):
    model = build_model("rna", backbone=backbone, image_shape=(3, 32, 32), num_classes=4).eval()
    with torch.no_grad():
        outputs = set()
        for _ in range(3):
            resample(model)
            outputs.add(model(images(1, 32)).sum().item())
    assert len(outputs) == 3


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"pool": ("bn", "instance")}, r"pool.*unknown normalization 'instance'"),
        ({"pool": ()}, "empty"),
        ({"pool": ("bn", "gn_size_3")}, r"layer bn1: normalization 'gn_size_3': 16 channels"),
        ({"pools": ("bn",)}, "Did you mean 'pool'"),
    ],
)
def test_mistakes_are_explained(parameters, message):
    with pytest.raises(UserError, match=message):
        build_model("rna", **SMALL, **parameters)


def test_mistakes_of_the_baseline_are_explained():
    with pytest.raises(UserError, match="no choice of groups"):
        build_model("single_normalization", normalization="ln", num_groups=4, **SMALL)
    with pytest.raises(UserError, match="no BatchNorm"):
        build_model(
            "single_normalization",
            normalization="ln",
            backbone="vit_tiny",
            image_shape=(3, 32, 32),
            backbone_options={"stem_activation": "none"},
        )


@pytest.mark.slow
@pytest.mark.parametrize("defence", ["rna", "dcs", "ctrw"])
def test_one_compiled_graph_of_the_network_serves_all_draws(defence):
    import torch._dynamo as dynamo
    from torch._dynamo.testing import CompileCounterWithBackend

    model = build_model(defence, **SMALL).train()
    graphs = CompileCounterWithBackend("aot_eager")
    dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    x = images().requires_grad_()
    for _ in range(10):
        resample(model)
        twin = copy.deepcopy(model)
        gradients = []
        for network in (compiled, twin):
            (gradient,) = torch.autograd.grad(network(x).square().sum(), x)
            gradients.append(gradient)
        torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-2 * gradients[1].abs().max().item())
    assert graphs.frame_count == 1
