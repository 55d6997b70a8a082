"""What a defence and a trainer rely on in every backbone: shapes, positions, names, initialization, derivatives."""

from __future__ import annotations

import copy
import functools
import pickle
import random
import sys

import numpy as np
import pytest
import torch
from torch import nn

import models.backbones
from models.backbones import (
    Backbone,
    backbone_entries,
    build_backbone,
    canonical_backbone_name,
    list_backbones,
)
from models.backbones.timm_adapter import default_num_strides
from models.errors import UserError
from models.layer_replacement import get_module, of_type, replace_modules

CIFAR = (3, 32, 32)
LARGE = {"resnet50", "wrn34_10"}
ALL = list_backbones()
SMALL = [name for name in ALL if name not in LARGE]


def on_meta(name: str, num_classes: int = 10, image_shape: tuple[int, int, int] = CIFAR, **options: object) -> Backbone:
    # Drawing truncated normal weights on the meta device costs more than drawing real ones.
    with torch.device("cpu" if name == "vit_tiny" else "meta"):
        return build_backbone(name, num_classes, image_shape, **options)


@functools.cache
def unchanged(name: str, image_shape: tuple[int, int, int] = CIFAR) -> Backbone:
    """A backbone for tests that leave it as it is."""
    return on_meta(name, 7, image_shape).eval()


def blank(model: Backbone, *shape: int) -> torch.Tensor:
    return torch.zeros(shape, device=model.classifier.weight.device)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def images(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(shape, generator=seeded(7), dtype=dtype)


@pytest.fixture(scope="module")
def small_backbones() -> dict[str, Backbone]:
    """Every backbone but the two large ones for 8x8 gray images; tests that change one work on a copy."""
    return {name: build_backbone(name, 5, (1, 8, 8), generator=seeded(0)) for name in SMALL}


def test_the_promised_names_exist() -> None:
    promised = {
        *("resnet8", "resnet18", "resnet20", "resnet50", "wrn16_4", "wrn34_10"),
        *("preact_resnet18", "vgg16", "mobilenet_v2", "vit_tiny"),
    }
    assert promised <= set(ALL)
    assert all(entry.description for entry in backbone_entries().values())


@pytest.mark.parametrize(
    ("name", "parameters", "normalizations", "convolutions"),
    [
        ("resnet18", 11_173_962, 20, 17),
        ("wrn34_10", 46_160_474, 31, 31),
        ("resnet50", 23_520_842, 53, 49),
        ("resnet8", 78_042, 9, 7),
        ("resnet20", 272_474, 21, 19),
        ("wrn16_4", 2_748_890, 13, 13),
        ("preact_resnet18", 11_172_170, 17, 17),
        ("vgg16", 14_728_266, 13, 13),
        ("mobilenet_v2", 2_236_682, 52, 52),
    ],
)
def test_sizes_are_those_of_the_published_networks(name: str, parameters: int, normalizations: int, convolutions: int) -> None:
    model = on_meta(name)
    assert num_parameters(model) == parameters
    assert len(model.normalization_layers()) == normalizations
    assert len(model.main_path_convolutions()) == convolutions


def test_second_convolutions_are_those_that_dcs_replaces() -> None:
    resnet18 = on_meta("resnet18")
    assert resnet18.stem_convolution == "conv1"
    assert resnet18.main_path_convolutions()[1] == "layer1.0.conv1"
    second = get_module(resnet18, "layer1.0.conv1")
    assert (second.in_channels, second.out_channels, second.stride) == (64, 64, (1, 1))

    wrn = on_meta("wrn34_10")
    assert wrn.main_path_convolutions()[:2] == ["conv1", "block1.layer.0.conv1"]
    second = get_module(wrn, "block1.layer.0.conv1")
    assert (second.in_channels, second.out_channels, second.stride) == (16, 160, (1, 1))

    resnet50 = on_meta("resnet50", 1000, (3, 224, 224))
    third = get_module(resnet50, resnet50.main_path_convolutions()[2])
    assert resnet50.main_path_convolutions()[2] == "layer1.0.conv2"
    assert (third.kernel_size, third.in_channels, third.out_channels) == ((3, 3), 64, 64)

    vit = on_meta("vit_tiny", 10, (3, 224, 224))
    stem = [get_module(vit, name) for name in vit.main_path_convolutions()]
    assert [convolution.out_channels for convolution in stem] == [48, 96, 192, 384, 192]
    assert [convolution.stride[0] for convolution in stem] == [2, 2, 2, 2, 1]


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("resnet18", [(3, 32, 32), (64, 32, 32), (64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]),
        ("wrn34_10", [(3, 32, 32), (16, 32, 32), (160, 32, 32), (320, 16, 16), (640, 8, 8)]),
        ("preact_resnet18", [(3, 32, 32), (64, 32, 32), (64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]),
        ("resnet8", [(3, 32, 32), (16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)]),
        ("vgg16", [(3, 32, 32), (64, 32, 32), (64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2), (512, 1, 1)]),
        ("vit_tiny", [(3, 32, 32), (192, 4, 4)]),
    ],
)
def test_positions_of_cifar_networks(name: str, shapes: list[tuple[int, int, int]]) -> None:
    model = unchanged(name)
    assert list(model.taps) == [str(position) for position in range(len(shapes))]
    assert list(model.feature_shapes(CIFAR).values()) == shapes


def test_stem_follows_the_image_size_and_can_be_chosen() -> None:
    for name in ("resnet18", "resnet50"):
        assert on_meta(name, image_shape=(3, 64, 64)).feature_shapes((3, 64, 64))["1"] == (64, 64, 64)
        assert on_meta(name, image_shape=(3, 224, 224)).feature_shapes((3, 224, 224))["1"] == (64, 56, 56)
        assert on_meta(name, stem="imagenet").feature_shapes(CIFAR)["1"] == (64, 8, 8)
    assert on_meta("mobilenet_v2").feature_shapes(CIFAR)["8"] == (1280, 4, 4)
    assert on_meta("mobilenet_v2", stem="imagenet").feature_shapes(CIFAR)["8"] == (1280, 1, 1)
    with pytest.raises(UserError, match=r"'stem' of backbone 'resnet18'.*'cifar' or 'imagenet' \(got 'cifar10'\)"):
        on_meta("resnet18", stem="cifar10")


def test_vision_transformer_keeps_at_least_four_by_four_tokens() -> None:
    for side, num_strides in {224: 4, 64: 4, 63: 3, 32: 3, 28: 2, 16: 2, 8: 1, 4: 0}.items():
        assert default_num_strides((3, side, side)) == num_strides
        assert side / 2**num_strides >= 4
    assert unchanged("vit_tiny", (1, 28, 28)).feature_shapes((1, 28, 28))["1"] == (192, 7, 7)
    plain = on_meta("vit_tiny", num_strides=2, stem_activation="none")
    assert plain.feature_shapes(CIFAR)["1"] == (192, 8, 8)
    assert plain.normalization_layers() == []
    with pytest.raises(UserError, match="at least 4 x 4"):
        on_meta("vit_tiny", image_shape=(3, 2, 2))
    with pytest.raises(UserError, match="0 to 4"):
        on_meta("vit_tiny", num_strides=5)


@pytest.mark.parametrize("name", ALL)
def test_names_are_in_forward_order(name: str) -> None:
    model = on_meta(name)
    called: list[str] = []
    for layer_name, module in model.named_modules():
        module.register_forward_pre_hook(lambda module, inputs, layer_name=layer_name: called.append(layer_name))
    model.eval()(blank(model, 1, *CIFAR))

    convolutions = model.main_path_convolutions()
    assert [layer for layer in called if layer in set(convolutions)] == convolutions
    normalizations = model.normalization_layers()
    assert [layer for layer in called if layer in set(normalizations)] == normalizations
    assert convolutions[0] == model.stem_convolution

    all_convolutions = {layer for layer, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    shortcuts = {layer for layer in all_convolutions if "shortcut" in layer.split(".")}
    assert set(convolutions) == all_convolutions - shortcuts
    assert set(normalizations) == {layer for layer, module in model.named_modules() if type(module) is nn.BatchNorm2d}


def test_names_stay_when_a_layer_has_been_replaced() -> None:
    model = on_meta("resnet8")
    before = (model.main_path_convolutions(), model.normalization_layers())
    replace_modules(model, of_type(nn.BatchNorm2d), lambda name, module: nn.Identity())
    replace_modules(model, lambda name, module: name == "conv1", lambda name, module: nn.Sequential(module))
    assert (model.main_path_convolutions(), model.normalization_layers()) == before
    assert model.stem_convolution == "conv1"


@pytest.mark.parametrize("image_shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize("name", ALL)
def test_logits_and_features_have_their_shapes(name: str, image_shape: tuple[int, int, int]) -> None:
    model = unchanged(name, image_shape)
    with torch.no_grad():
        features_BD = model.forward_features(blank(model, 2, *image_shape))
        assert features_BD.shape == (2, model.classifier.in_features)
        assert model.classifier(features_BD).shape == (2, 7)


@pytest.mark.parametrize("name", SMALL)
def test_forward_is_the_classifier_of_the_features(name: str, small_backbones: dict[str, Backbone]) -> None:
    model = copy.deepcopy(small_backbones[name]).double()
    x_BCHW = images(4, 1, 8, 8, dtype=torch.float64)
    for training in (True, False):
        model.train(training)
        logits_BK = model(x_BCHW)
        assert logits_BK.dtype == torch.float64
        assert logits_BK.isfinite().all()
        torch.testing.assert_close(model.classifier(model.forward_features(x_BCHW)), logits_BK, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", SMALL)
def test_every_tap_reaches_the_logits(name: str, small_backbones: dict[str, Backbone]) -> None:
    class Scale(nn.Module):
        def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
            return 0.5 * x_BCHW

    original = small_backbones[name].eval()
    x_BCHW = images(2, 1, 8, 8)
    for key in original.taps:
        model = copy.deepcopy(original)
        model.taps[key] = Scale()
        assert not torch.equal(model(x_BCHW), original(x_BCHW)), f"tap {key} does nothing"


@pytest.mark.parametrize("name", SMALL)
def test_copies_pickles_layouts_and_functional_calls_agree(name: str, small_backbones: dict[str, Backbone]) -> None:
    model = copy.deepcopy(small_backbones[name]).eval()
    x_BCHW = images(2, 1, 8, 8)
    logits_BK = model(x_BCHW)
    unpickled = pickle.loads(pickle.dumps(model))
    assert torch.equal(unpickled(x_BCHW), logits_BK)
    assert unpickled.main_path_convolutions() == model.main_path_convolutions()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert torch.equal(torch.func.functional_call(model, state, (x_BCHW,)), logits_BK)
    last_BK = copy.deepcopy(model).to(memory_format=torch.channels_last)(x_BCHW.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last_BK, logits_BK, rtol=1e-3, atol=1e-4 * float(logits_BK.detach().abs().max()))


@pytest.mark.parametrize("name", SMALL)
def test_input_gradients_can_be_differentiated(name: str, small_backbones: dict[str, Backbone]) -> None:
    model = copy.deepcopy(small_backbones[name])
    x_BCHW = images(2, 1, 8, 8).requires_grad_()
    loss = nn.functional.cross_entropy(model(x_BCHW), torch.tensor([0, 1]))
    (gradient_BCHW,) = torch.autograd.grad(loss, x_BCHW, create_graph=True)
    gradient_BCHW.square().sum().backward()
    stem = get_module(model, model.stem_convolution)
    assert stem.weight.grad.isfinite().all()
    assert stem.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("training", [True, False])
def test_double_backward_of_resnet8_agrees_with_differences(training: bool) -> None:
    model = build_backbone("resnet8", 3, (1, 8, 8), generator=seeded(3)).double()
    assert len(replace_modules(model, of_type(nn.ReLU), lambda name, module: nn.Softplus())) == 7
    model.train(training)
    generator = seeded(4)
    x_BCHW = torch.rand(3, 1, 8, 8, generator=generator, dtype=torch.float64)
    labels_B = torch.tensor([0, 1, 2])
    parameters = dict(model.named_parameters())
    direction = {
        key: torch.randn(value.shape, generator=generator, dtype=torch.float64) * value.detach().abs().mean()
        for key, value in parameters.items()
    }

    def gradient_norm(state: dict[str, torch.Tensor]) -> torch.Tensor:
        x = x_BCHW.clone().requires_grad_()
        loss = nn.functional.cross_entropy(torch.func.functional_call(model, state, (x,)), labels_B)
        (gradient_BCHW,) = torch.autograd.grad(loss, x, create_graph=True)
        return 1e4 * gradient_BCHW.square().sum()

    gradients = torch.autograd.grad(gradient_norm(parameters), list(parameters.values()), allow_unused=True)
    exact = sum((gradient * direction[key]).sum() for key, gradient in zip(parameters, gradients, strict=True) if gradient is not None)

    def shifted(step: float) -> torch.Tensor:
        return gradient_norm({key: value + step * direction[key] for key, value in parameters.items()}).detach()

    h = 1e-4
    differences = (8 * (shifted(h) - shifted(-h)) - (shifted(2 * h) - shifted(-2 * h))) / (12 * h)
    torch.testing.assert_close(exact, differences, rtol=1e-7, atol=0.0)


def test_vision_transformer_has_forward_mode_derivatives(small_backbones: dict[str, Backbone]) -> None:
    model = copy.deepcopy(small_backbones["vit_tiny"]).double().eval()
    replace_modules(model, of_type(nn.ReLU), lambda name, module: nn.Softplus())
    x_BCHW = images(1, 1, 8, 8, dtype=torch.float64)
    tangent_BCHW = torch.randn(x_BCHW.shape, generator=seeded(1), dtype=torch.float64)
    _, derivative_BK = torch.func.jvp(model, (x_BCHW,), (tangent_BCHW,))
    h = 1e-4
    differences_BK = (model(x_BCHW + h * tangent_BCHW) - model(x_BCHW - h * tangent_BCHW)) / (2 * h)
    torch.testing.assert_close(derivative_BK, differences_BK, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ALL)
def test_activations_write_to_new_memory(name: str) -> None:
    assert not any(getattr(module, "inplace", False) for module in unchanged(name).modules())


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2"])
def test_same_function_as_torchvision(name: str) -> None:
    """With the ImageNet stem, the networks are torchvision's, down to the order of the weights."""
    import torchvision

    reference = getattr(torchvision.models, name)(weights=None, num_classes=6).eval()
    model = on_meta(name, 6, stem="imagenet").eval()
    ours, theirs = model.state_dict(), reference.state_dict()
    assert [value.shape for value in ours.values()] == [value.shape for value in theirs.values()]
    model.load_state_dict(dict(zip(ours, theirs.values(), strict=True)), assign=True)
    x_BCHW = images(1, *CIFAR)
    with torch.no_grad():
        expected_BK = reference(x_BCHW)
        torch.testing.assert_close(model(x_BCHW), expected_BK, rtol=1e-4, atol=1e-5 * float(expected_BK.abs().max()))


def test_initialization_is_that_of_the_papers_code() -> None:
    resnet = build_backbone("resnet18", 100, CIFAR, generator=seeded(0))
    for name in resnet.main_path_convolutions()[1:]:
        weight = get_module(resnet, name).weight
        fan_out = weight.shape[0] * weight.shape[2] * weight.shape[3]
        assert float(weight.detach().std()) == pytest.approx((2 / fan_out) ** 0.5, rel=0.02)
    assert float(resnet.classifier.weight.detach().std()) == pytest.approx(0.001, rel=0.02)

    wrn = build_backbone("wrn16_4", 100, CIFAR, generator=seeded(0))
    convolution = get_module(wrn, "block3.layer.1.conv2")
    expected = (2 / (9 * convolution.out_channels)) ** 0.5
    assert float(convolution.weight.detach().std()) == pytest.approx(expected, rel=0.02)
    assert not wrn.classifier.bias.any()
    assert not resnet.classifier.bias.any()


@pytest.mark.parametrize("name", ["resnet8", "vit_tiny"])
def test_generator_alone_decides_the_weights(name: str) -> None:
    def weights(generator: torch.Generator | None) -> torch.Tensor:
        model = build_backbone(name, 3, (1, 8, 8), generator=generator)
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    torch.manual_seed(1)
    states = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    generator = seeded(5)
    first = weights(generator)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]  # noqa: NPY002

    torch.manual_seed(2)
    assert torch.equal(weights(seeded(5)), first)
    assert not torch.equal(weights(seeded(6)), first)
    assert not torch.equal(weights(generator), first), "the next draw from the same generator is another one"


def test_without_generator_the_caller_seeds() -> None:
    torch.manual_seed(3)
    first = build_backbone("resnet8", 3, (1, 8, 8)).conv1.weight
    assert not torch.equal(build_backbone("resnet8", 3, (1, 8, 8)).conv1.weight, first)
    torch.manual_seed(3)
    assert torch.equal(build_backbone("resnet8", 3, (1, 8, 8)).conv1.weight, first)


def test_measuring_shapes_changes_nothing() -> None:
    model = build_backbone("resnet8", 3, (1, 8, 8), generator=seeded(0)).double().train()
    model.bn1.eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    rng = torch.get_rng_state()
    assert model.feature_shapes((1, 16, 8))["4"] == (64, 4, 2)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert not any(tap._forward_pre_hooks for tap in model.taps.values())

    with pytest.raises(RuntimeError, match="channels"):
        model.feature_shapes((3, 8, 8))
    assert [module.training for module in model.modules()] == modes
    assert not any(tap._forward_pre_hooks for tap in model.taps.values())


def test_aliases_and_unknown_names() -> None:
    assert canonical_backbone_name("wrn32") == "wrn34_10"
    assert canonical_backbone_name("timm:resnet18") == "timm:resnet18"
    assert "wrn32" not in list_backbones()
    with pytest.raises(UserError, match=r"unknown backbone 'resnet_18'. Did you mean 'resnet18'"):
        build_backbone("resnet_18", 10, CIFAR)
    with pytest.raises(UserError, match="timm:NAME"):
        build_backbone("timm", 10, CIFAR)
    with pytest.raises(UserError, match="unknown backbone 'resnet18:small'"):
        build_backbone("resnet18:small", 10, CIFAR)
    with pytest.raises(UserError, match=r"option of backbone 'resnet18'.*'stam'.*'stem'"):
        build_backbone("resnet18", 10, CIFAR, stam="cifar")
    with pytest.raises(UserError, match="num_classes is 1"):
        build_backbone("resnet8", 1, CIFAR)
    for shape in [(32, 32), (0, 8, 8), (3, 8.5, 8)]:
        with pytest.raises(UserError, match="channels, height, width"):
            build_backbone("resnet8", 10, shape)


TOY = """
from torch import nn
from models.backbones.base import Backbone, BackboneEntry, identity_taps

class Toy(Backbone):
    def __init__(self, num_classes, image_shape, width):
        super().__init__()
        self.taps = identity_taps(2)
        self.stem = nn.Conv2d(image_shape[0], width, 3)
        self.classifier = nn.Linear(width, num_classes)
        self.record_layers()

    def forward_features(self, x_BCHW):
        return self.taps["1"](self.stem(self.taps["0"](x_BCHW))).mean(dim=(2, 3))

def build(num_classes, image_shape, *, width=4):
    return Toy(num_classes, image_shape, width)

BACKBONES = {NAME: BackboneEntry(build, "a toy", aliases=("plaything",))}
"""


@pytest.fixture
def extra_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(models.backbones, "__path__", [*models.backbones.__path__, str(tmp_path)])
    backbone_entries.cache_clear()
    yield tmp_path
    backbone_entries.cache_clear()
    for name in ("models.backbones.toy_backbone", "models.backbones.toy_clash"):
        sys.modules.pop(name, None)
        models.backbones.__dict__.pop(name.rpartition(".")[2], None)


def test_a_new_backbone_is_one_new_file(extra_folder) -> None:
    (extra_folder / "toy_backbone.py").write_text(TOY.replace("NAME", '"toy"'))
    assert "toy" in list_backbones()
    model = build_backbone("plaything", 3, (2, 5, 5), width=6)
    assert model(torch.zeros(1, 2, 5, 5)).shape == (1, 3)
    assert model.feature_shapes((2, 5, 5)) == {"0": (2, 5, 5), "1": (6, 3, 3)}


def test_a_name_that_two_files_claim_is_neithers(extra_folder) -> None:
    (extra_folder / "toy_clash.py").write_text(TOY.replace("NAME", '"resnet8"'))
    assert "resnet8" not in list_backbones()
    assert "resnet18" in list_backbones()
    with pytest.raises(UserError, match=r"toy_clash\.py was skipped.*'resnet8'"):
        build_backbone("resnet8", 3, (2, 5, 5))


def test_a_broken_file_is_skipped_and_named_where_it_may_be_meant(extra_folder) -> None:
    (extra_folder / "toy_broken.py").write_text("def broken(:\n")
    assert "resnet18" in list_backbones()
    with pytest.raises(UserError, match=r"toy_broken\.py was skipped.*line 1"):
        build_backbone("plaything", 3, (2, 5, 5))


@pytest.mark.parametrize(
    ("variant", "options", "taps"),
    [
        ("mobilenetv3_small_050", {}, {"0": (3, 32, 32), "1": (288, 1, 1)}),
        ("vit_tiny_patch16_224", {"depth": 2, "patch_size": 8}, {"0": (3, 32, 32)}),
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1), "num_heads": (3, 6)}, {"0": (3, 32, 32), "1": (192, 4, 4)}),
    ],
)
def test_timm_models_are_backbones(variant: str, options: dict[str, object], taps: dict[str, tuple]) -> None:
    import timm

    torch.manual_seed(0)
    model = build_backbone(f"timm:{variant}", 6, CIFAR, **options).eval()
    torch.manual_seed(0)
    if "vit" in variant or "swin" in variant:
        options = {"img_size": 32, **options}
    reference = timm.create_model(variant, num_classes=6, **options).eval()
    assert model.feature_shapes(CIFAR) == taps
    x_BCHW = images(2, *CIFAR).requires_grad_()
    logits_BK = model(x_BCHW)
    torch.testing.assert_close(logits_BK, reference(x_BCHW), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.classifier(model.forward_features(x_BCHW)), logits_BK)
    (gradient_BCHW,) = torch.autograd.grad(logits_BK.square().sum(), x_BCHW, create_graph=True)
    gradient_BCHW.square().sum().backward()
    assert get_module(model, model.stem_convolution).weight.grad.isfinite().all()


def test_timm_normalizations_can_be_replaced_without_losing_activations() -> None:
    model = on_meta("timm:mobilenetv3_small_050")
    names = model.normalization_layers()
    assert len(names) == 34
    assert all(type(get_module(model, name)) is nn.BatchNorm2d for name in names)
    before = sum(isinstance(module, nn.Hardswish) for module in model.modules())
    replace_modules(model, of_type(nn.BatchNorm2d), lambda name, module: nn.Identity())
    assert sum(isinstance(module, nn.Hardswish) for module in model.modules()) == before > 0


def test_timm_mistakes_are_named() -> None:
    with pytest.raises(UserError, match=r"unknown timm model 'resnet180'. Did you mean 'resnet18'"):
        build_backbone("timm:resnet180", 10, CIFAR)
    with pytest.raises(UserError, match="ends in Conv2d"):
        on_meta("timm:resnetv2_50")
    with pytest.raises(UserError, match=r"timm cannot build 'resnet18'.*'stem_size'"):
        on_meta("timm:resnet18", stem_size=3)
    with pytest.raises(UserError, match="stands in its name"):
        on_meta("timm:resnet18", variant="resnet50")
