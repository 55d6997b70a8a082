"""A replacement that replaces nothing replaces nothing: with its randomness taken out, every defence is the untouched network.

For every defence that changes a network, on every backbone (timm's with padding by size, standardized or scaled weights among them), at
every size at which it builds. Where it does not build, the refusal names the layer that could not be replaced faithfully.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from models.backbones import build_backbone, list_backbones
from models.errors import UserError
from models.layer_replacement import get_module, set_module
from models.layers.random_normalization import RandomNormalization2d
from models.layers.random_weight import RandomFeatureWeight, RandomFilterConv2d
from models.layers.stochastic_convolution import StochasticConv2d
from models.randomness import random_sites
from models.registry import build_model, list_defences
from tests.contracts.cases import SMALLER

QUICK = ("resnet8", "wrn16_4")
TIMM = ("test_resnet", "tf_mobilenetv3_small_075", "test_nfnet", "test_byobnet")
OF_WRN28_10 = ("wrn34_10", "wrn70_16")
"""Deeper and wider networks of the same class as wrn28_10: 46 and 267 million parameters in float64 would show nothing else."""
LARGE_TIMM = ("tf_efficientnet_b0", "nf_resnet26", "densenet121", "regnety_002", "test_convnext", "test_vit")
BACKBONES = [
    *(name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in list_backbones() if name not in OF_WRN28_10),
    *(f"timm:{name}" for name in TIMM),
    *(pytest.param(f"timm:{name}", marks=pytest.mark.slow) for name in LARGE_TIMM),
]
SIZES = [16, pytest.param(8, marks=pytest.mark.slow), pytest.param(32, marks=pytest.mark.slow)]


@dataclass(frozen=True)
class Neutral:
    """A way to make a defence do nothing.

    Attributes:
        parameters: of the defence. silence: what is done to the built network. replaced: names of the layers that it takes the place of.
    """

    defence: str
    parameters: dict[str, Any] = field(default_factory=dict)
    silence: Callable[[nn.Module], None] = lambda model: None
    replaced: Callable[[nn.Module], list[str]] = lambda backbone: []


def without_deviation(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, RandomFeatureWeight | RandomFilterConv2d):
            module.sigma.data.zero_()


def middle_taps(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, StochasticConv2d):
            side, kept = module.kernel_size, round(module.num_taps**0.5)
            first = (side - kept) // 2
            module.set_taps(tuple(row * side + column for row in range(first, first + kept) for column in range(first, first + kept)))


def first_types(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, RandomNormalization2d):
            module.set_configuration(0)


def second_convolution(backbone: nn.Module) -> list[str]:
    return backbone.spatial_convolutions()[1:2]


def every_convolution(backbone: nn.Module) -> list[str]:
    return backbone.spatial_convolutions()


CENTRED = {"initialization": "centred", "gsat": "off"}
NEUTRAL: dict[str, Neutral] = {
    "ctrw": Neutral("ctrw", {"constraint": "none"}, without_deviation),
    "ctrw last": Neutral("ctrw", {"constraint": "none", "position": 1}, without_deviation),
    "ctrw out": Neutral("ctrw", {"constraint": "none", "variant": "out"}, without_deviation),
    "ctrw both": Neutral("ctrw", {"constraint": "none", "variant": "both"}, without_deviation),
    "ctrw filter": Neutral(
        "ctrw", {"constraint": "none", "variant": "filter"}, without_deviation, lambda backbone: [backbone.stem_convolution]
    ),
    "rna": Neutral("rna", {}, first_types, lambda backbone: backbone.normalization_layers()),
    "rna last too": Neutral("rna", {"last_normalization": "random"}, first_types, lambda backbone: backbone.normalization_layers()),
    "single_normalization": Neutral("single_normalization"),
    "single_normalization bgn": Neutral(
        "single_normalization",
        {"normalization": "bgn", "group_size": 1, "last_normalization": "replaced"},
        replaced=lambda backbone: backbone.normalization_layers(),
    ),
    "dcs all taps": Neutral("dcs", CENTRED | {"kernel_size": 5, "num_taps": 25}, replaced=second_convolution),
    "dcs middle": Neutral("dcs", CENTRED | {"kernel_size": 5, "num_taps": 9}, middle_taps, second_convolution),
    "dcs everywhere": Neutral("dcs", CENTRED | {"kernel_size": 7, "num_taps": 49, "positions": "all"}, replaced=every_convolution),
    "dcn": Neutral("dcn", replaced=second_convolution),
    "dcn everywhere": Neutral("dcn", {"positions": "all"}, replaced=every_convolution),
    "stacked": Neutral(
        "stacked",
        {
            "defences": [
                {"name": "rna", "pool": ["bn", "ln"]},
                {"name": "dcs", "kernel_size": 5, "num_taps": 25, **CENTRED},
                {"name": "ctrw", "constraint": "none", "position": 1},
                {"name": "dcn", "positions": [3]},
            ]
        },
        lambda model: (first_types(model), without_deviation(model))[0],
        lambda backbone: [*backbone.normalization_layers(), *backbone.spatial_convolutions()[1:3]],
    ),
}
ENSEMBLES = [name for name, smaller in SMALLER.items() if "num_members" in smaller and name != "ps_red"]
"""Of one member; the weights of PS-RED come out of a hypernetwork, so it has no untouched network."""

PLAIN = [name for name in list_defences() if name not in {*(neutral.defence for neutral in NEUTRAL.values()), *ENSEMBLES, "ps_red"}]


def build(defence: str, backbone: str, size: int, parameters: dict[str, Any]) -> nn.Module:
    if parameters.get("positions") == "all":
        count = len(build_backbone(backbone, 4, (3, size, size)).spatial_convolutions())
        parameters = parameters | {"positions": tuple(range(1, count + 1))}
    return build_model(defence, backbone=backbone, num_classes=4, image_shape=(3, size, size), seed=5, **parameters)


def cannot_be_replaced(backbone: nn.Module, names: list[str]) -> list[str]:
    """Names of layers that are more than a convolution with zero padding or a batch normalization, by their classes alone."""
    modules = {name: get_module(backbone, name) for name in names}
    return [
        name
        for name, module in modules.items()
        if type(module) not in (nn.Conv2d, nn.BatchNorm2d) or getattr(module, "padding_mode", "zeros") != "zeros"
    ]


@torch.no_grad()
def logits(model: nn.Module, x: torch.Tensor, training: bool) -> torch.Tensor:
    torch.manual_seed(0)  # dropout and the like
    return model.train(training)(x)


REFUSALS = ("no BatchNorm layer", "does not exist", "gives a constant", "no convolution", "no kernel of another size", "does not fit into")
"""What may stand against a defence beside layers that are more than plain: there is nothing to replace, or it would make no sense."""


def built_or_refused(defence: str, backbone: str, size: int, parameters: dict[str, Any]) -> tuple[nn.Module | None, str]:
    try:
        return build(defence, backbone, size, parameters), ""
    except UserError as error:
        return None, str(error)


@functools.lru_cache(maxsize=2)
def untouched(backbone: str, size: int) -> nn.Module:
    return build("natural", backbone, size, {}).double()


def images(size: int) -> torch.Tensor:
    return torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def check_equal(model: nn.Module, plain: nn.Module, x: torch.Tensor) -> None:
    for training in (False, True):
        expected = logits(copy.deepcopy(plain), x, training)
        torch.testing.assert_close(logits(model, x, training), expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item() + 1e-15)


@pytest.mark.parametrize("case", NEUTRAL)  # the fastest to change: the untouched network of a backbone and a size is built once
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_replacement_that_replaces_nothing_replaces_nothing(case, backbone, size):
    neutral = NEUTRAL[case]
    try:
        plain = untouched(backbone, size)
    except UserError:
        pytest.skip(f"{backbone} does not build at {size}x{size}")
    odd = cannot_be_replaced(plain.backbone, neutral.replaced(plain.backbone))
    model, refusal = built_or_refused(neutral.defence, backbone, size, neutral.parameters)
    if model is None:
        told = [f"layer {name} is a {type(get_module(plain.backbone, name)).__name__}" for name in odd]
        assert any(part in refusal for part in [*told, *REFUSALS]), refusal
        return
    assert not odd, "built though it lost what a layer adds"
    neutral.silence(model)
    check_equal(model.double(), plain, images(size))


@pytest.mark.parametrize("backbone", ["resnet8", "timm:test_resnet"])
@pytest.mark.parametrize("defence", PLAIN)
def test_a_defence_that_only_trains_otherwise_has_the_untouched_network(defence, backbone):
    check_equal(build(defence, backbone, 16, {}).double(), untouched(backbone, 16), images(16))


@pytest.mark.parametrize("defence", ENSEMBLES)
def test_an_ensemble_of_one_is_its_member(defence):
    """With the weights of the plain network: the classifiers of members start otherwise."""
    parameters = {"num_members": 1, "inference": "mean_logit"} | ({"leaky_relu_slope": None} if defence == "gal" else {})
    model, plain = build(defence, "resnet8", 16, parameters).double(), untouched("resnet8", 16)
    model.members[0].load_state_dict(plain.state_dict())
    check_equal(model, plain, images(16))


class HalvedConv2d(nn.Conv2d):
    """Adds something of its own to a convolution."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / 2


def halved() -> nn.Module:
    return HalvedConv2d(16, 16, 3, padding=1, bias=False)


def circular() -> nn.Module:
    return nn.Conv2d(16, 16, 3, padding=1, bias=False, padding_mode="circular")


def normalized_weight() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Conv2d(16, 16, 3, padding=1, bias=False))


@pytest.mark.parametrize(("make", "words"), [(halved, "HalvedConv2d"), (circular, "circular"), (normalized_weight, "ParametrizedConv2d")])
@pytest.mark.parametrize(
    ("defence", "parameters"),
    [
        ("dcs", CENTRED),
        ("dcn", {}),
        ("ctrw", {"variant": "filter", "position": 1}),
        ("ctrw", {"variant": "both", "position": 1, "constraint": "none"}),
        ("rna", {}),
    ],
)
def test_a_convolution_that_is_more_than_plain_is_kept_or_refused_by_name(defence, parameters, make, words, monkeypatch):
    """Layers that stand beside a convolution leave it as it is; those that would take its place refuse it."""
    name = "layer1.0.conv1"

    def odd_backbone(*arguments, **options):
        backbone = build_backbone(*arguments, **options)
        torch.manual_seed(0)
        set_module(backbone, name, make())
        return backbone

    monkeypatch.setattr("models.registry.build_backbone", odd_backbone)
    plain = build("natural", "resnet8", 16, {}).double()
    if defence == "rna" or parameters.get("variant") == "both":
        model = build(defence, "resnet8", 16, parameters).double()
        first_types(model)
        without_deviation(model)
        check_equal(model, plain, images(16))
    else:
        with pytest.raises(UserError, match=rf"{name}.*{words}"):
            build(defence, "resnet8", 16, parameters)


def test_defences_in_one_network_keep_each_others_layers():
    """The numbers of convolutions are those of the backbone, whatever stands there by now; a place is taken once."""
    two = build("stacked", "resnet8", 16, {"defences": [{"name": "dcs", "positions": [2]}, {"name": "dcs", "positions": [3]}]})
    sites = [name for name, _ in random_sites(two)]
    assert sites == ["backbone.layer1.0.conv1", "backbone.layer1.0.conv2"]
    for first, second, words in (
        ({"name": "dcs"}, {"name": "dcn"}, "layer1.0.conv1 is a StochasticConv2d"),
        ({"name": "ctrw"}, {"name": "ctrw"}, "position 0 holds a RandomFeatureWeight already"),
        ({"name": "rna"}, {"name": "single_normalization", "normalization": "ln"}, "bn1 is a RandomNormalization2d"),
    ):
        with pytest.raises(UserError, match=words):
            build("stacked", "resnet8", 16, {"defences": [first, second]})
