"""DCS and its baseline DCN as whole networks: positions, draws of a training step, equality with plain networks, errors."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from models import build_model
from models.errors import UserError
from models.layers.deformable_convolution import DeformableConv2d
from models.layers.stochastic_convolution import StochasticConv2d
from models.positions import spatial_convolutions
from models.randomness import num_configurations, random_sites, resample, set_configuration
from models.threat_model import ThreatModel
from trainers.hardware import FULL
from trainers.step import InnerAttackConfig, StepContext
from trainers.streams import Streams

SMALL = {"backbone": "resnet8", "image_shape": (3, 8, 8), "num_classes": 4}


def images(batch=4, size=8, dtype=torch.float32) -> torch.Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(dtype)


def context(redraw="attack_then_step") -> StepContext:
    return StepContext(
        threat_model=ThreatModel(),
        attack=InnerAttackConfig(steps=2),
        redraw=redraw,
        streams=Streams(0),
        precision=FULL,
        num_epochs=1,
        steps_per_epoch=10,
    )


@pytest.mark.parametrize(
    ("backbone", "name", "shape"),
    [
        ("resnet18", "backbone.layer1.0.conv1", (64, 64, 5, 5)),
        ("wrn16_4", "backbone.block1.layer.0.conv1", (64, 16, 5, 5)),
        ("preact_resnet18", "backbone.layer1.0.conv1", (64, 64, 5, 5)),
        ("resnet50", "backbone.layer1.0.conv2", (64, 64, 5, 5)),
        ("vgg16", "backbone.stage1.0", (64, 64, 5, 5)),
        ("mobilenet_v2", "backbone.stage1.0.depthwise.0", (32, 1, 5, 5)),
        ("vit_tiny", "backbone.stem.conv2", (96, 48, 5, 5)),
    ],
)
def test_the_second_spatial_convolution_of_every_backbone(backbone, name, shape):
    model = build_model("dcs", backbone=backbone, image_shape=(3, 32, 32), num_classes=4).eval()
    ((found, site),) = random_sites(model)
    assert found == name
    assert site.weight.shape == shape
    assert num_configurations(model) == 300
    plain = build_model("at", backbone=backbone, image_shape=(3, 32, 32), num_classes=4)
    assert spatial_convolutions(plain.backbone)[1] == name.removeprefix("backbone.")
    with torch.no_grad():
        assert model(images(1, 32)).shape == (1, 4)


def test_a_position_in_a_stage_that_halves_the_map():
    model = build_model("dcs", backbone="resnet18", image_shape=(3, 16, 16), positions=(6,))
    ((name, site),) = random_sites(model)
    assert name == "backbone.layer2.0.conv1"
    assert site.stride == (2, 2)
    assert model(images(2, 16)).shape == (2, 10)


def test_several_positions_draw_independently():
    model = build_model("dcs", positions=(1, 2, 5), **SMALL)
    assert num_configurations(model) == 300**3
    same = 0
    for _ in range(200):
        resample(model)
        first, second, _ = (site.selected_taps for _, site in random_sites(model))
        same += first == second
    assert same < 8


@pytest.mark.parametrize("initialization", ["fresh", "centred"])
def test_a_plain_network_can_be_embedded(initialization):
    plain = build_model("at", seed=2, **SMALL).eval()
    model = build_model("dcs", seed=2, num_taps=9, initialization=initialization, **SMALL).eval()
    ((_, site),) = random_sites(model)
    if initialization == "fresh":
        site.embed(plain.backbone.layer1[0].conv1)
    site.set_taps((6, 7, 8, 11, 12, 13, 16, 17, 18))
    torch.testing.assert_close(model(images()), plain(images()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gsat", ["off", "attack", "chain"])
def test_draws_of_a_training_step(gsat, monkeypatch):
    model = build_model("dcs", kernel_size=3, gsat=gsat, **SMALL).train()
    ((_, site),) = random_sites(model)
    masks = []
    original = StochasticConv2d._set_taps

    def recorded(self, taps):
        masks.append(set(taps))
        original(self, taps)

    monkeypatch.setattr(StochasticConv2d, "_set_taps", recorded)
    step = context()
    overlap_in_step = overlap_between_steps = 0
    for _ in range(25):
        masks_before = len(masks)
        last = set(site.selected_taps)
        step.adversarial_examples(model, images(), torch.tensor([0, 1, 2, 3]))
        assert len(masks) == masks_before + 2
        attacked, trained = masks[-2:]
        assert set(site.selected_taps) == trained
        overlap_in_step += bool(attacked & trained)
        overlap_between_steps += bool(last & attacked) and masks_before > 0
    assert (overlap_in_step > 0) == (gsat == "off")
    assert (overlap_between_steps > 0) == (gsat != "chain")


def test_enumeration_gives_different_networks_and_the_mean_of_draws_converges_to_theirs():
    model = build_model("dcs", kernel_size=3, num_taps=1, gsat="off", **SMALL).eval()
    with torch.no_grad():
        outputs = []
        for index in range(num_configurations(model)):
            set_configuration(model, index)
            outputs.append(model(images()))
        exact = torch.stack(outputs).mean(0)
        spread = torch.stack(outputs).std(0)
        assert len({output.sum().item() for output in outputs}) == 9
        draws = 300
        total = torch.zeros_like(exact)
        for _ in range(draws):
            resample(model)
            total += model(images())
    assert ((total / draws - exact).abs() <= 4.5 * spread / draws**0.5 + 1e-6).all()


def test_copies_pickles_double_precision_and_checkpoints():
    model = build_model("dcs", **SMALL).double().eval()
    x = images(dtype=torch.float64)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    other = build_model("dcs", seed=9, **SMALL).double().eval()
    other.load_state_dict(model.state_dict(), strict=True)
    ((_, source),), ((_, target),) = random_sites(model), random_sites(other)
    target.set_taps(source.selected_taps)
    torch.testing.assert_close(other(x), expected, rtol=1e-12, atol=1e-12)


def test_deformable_convolution_starts_as_the_plain_network_and_learns_its_offsets():
    plain = build_model("at", seed=2, **SMALL).double()
    model = build_model("dcn", seed=2, **SMALL).double()
    x = images(dtype=torch.float64)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-9, atol=1e-9)
    (layer,) = (module for module in model.modules() if isinstance(module, DeformableConv2d))
    model(x).square().sum().backward()
    assert layer.offset.weight.grad.abs().sum() > 0
    assert num_configurations(model) == 1


def test_deformable_convolution_under_autocast():
    model = build_model("dcn", **SMALL).eval()
    exact = model(images())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(images())
    assert (rough.float() - exact).abs().max() < 0.05 * exact.abs().max() + 0.05


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"kernel_size": 4}, "k must be odd.*3, 5"),
        ({"num_taps": 13}, "2 n <= k k"),
        ({"gsat": "chain", "draw_scope": "per_example"}, "chain"),
        ({"positions": (2, 2)}, "twice"),
        ({"positions": (0,)}, "positions.0.*greater than or equal to 1"),
        ({"positions": (99,)}, "has 7 spatial convolutions"),
        ({"taps": 3}, "num_taps"),
        ({"kernel_size": 31}, "kernel_size 31 is larger than the image.*at most"),
    ],
)
def test_mistakes_are_explained(parameters, message):
    with pytest.raises(UserError, match=message):
        build_model("dcs", **SMALL, **parameters)
