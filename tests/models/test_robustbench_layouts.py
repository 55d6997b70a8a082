"""Checkpoints of RobustBench's architectures, with random weights: they load by their own names, and the answers are theirs.

The networks are rebuilt here from what their papers and codes describe, layer by layer and by functions alone, from the state dict. Where
the package `robustbench` is installed, its own classes are asked as well.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch.nn import functional

from models.backbones import build_backbone
from models.initial_weights import begin_with
from models.registry import build_model
from models.weights import load_pretrained, save_pretrained

SHAPE = (3, 32, 32)
UNIT = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
X = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def randomized(state):
    """Return tensors of these names and shapes: filters that keep the size of maps, statistics and scales near 1."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name, value in state.items():
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        if value.dim() > 1:
            found[name] = noise / value[0].numel() ** 0.5
        elif name.endswith(("running_var", "weight")):
            found[name] = 1 + 0.3 * noise.abs()
        elif value.is_floating_point():
            found[name] = 0.3 * noise
    return found


def normalized(x, state, name):
    return functional.batch_norm(x, *(state[f"{name}.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias")))


def same(x, stride):
    """TensorFlow's padding of a 3x3 convolution of maps with an even side."""
    return functional.pad(x, (1, 1, 1, 1) if stride == 1 else (0, 1, 0, 1))


def deepmind_wide(x, state):
    x = functional.conv2d((x - state["mean"]) / state["std"], state["init_conv.weight"], padding=1)
    for group in range(3):
        numbers = sorted({int(found[1]) for name in state if (found := re.match(rf"layer\.{group}\.block\.(\d+)\.", name))})
        for number in numbers:
            block = f"layer.{group}.block.{number}"
            stride = 2 if group and number == 0 else 1
            out = functional.silu(normalized(x, state, f"{block}.batchnorm_0"))
            short = functional.conv2d(out, state[f"{block}.shortcut.weight"], stride=stride) if f"{block}.shortcut.weight" in state else x
            out = functional.conv2d(same(out, stride), state[f"{block}.conv_0.weight"], stride=stride)
            out = functional.silu(normalized(out, state, f"{block}.batchnorm_1"))
            x = short + functional.conv2d(out, state[f"{block}.conv_1.weight"], padding=1)
    x = functional.silu(normalized(x, state, "batchnorm")).mean((2, 3))
    return functional.linear(x, state["logits.weight"], state["logits.bias"])


def deepmind_preact(x, state):
    x = functional.conv2d((x - state["mean"]) / state["std"], state["conv_2d.weight"], padding=1)
    for stage in range(4):
        for number in range(2):
            block = f"layer_{stage}.{number}"
            stride = 2 if stage and number == 0 else 1
            out = functional.silu(normalized(x, state, f"{block}.batchnorm_0"))
            short = x
            if f"{block}.shortcut.weight" in state:
                short = functional.conv2d(same(x, stride), state[f"{block}.shortcut.weight"], stride=stride)
            out = functional.conv2d(same(out, stride), state[f"{block}.conv_2d_1.weight"], stride=stride)
            out = functional.silu(normalized(out, state, f"{block}.batchnorm_1"))
            x = short + functional.conv2d(out, state[f"{block}.conv_2d_2.weight"], padding=1)
    x = functional.silu(normalized(x, state, "batchnorm")).mean((2, 3))
    return functional.linear(x, state["logits.weight"], state["logits.bias"])


def robustbench_preact(x, state):
    x = functional.conv2d(x, state["conv1.weight"], padding=1)
    for stage in range(1, 5):
        for number in range(2):
            block = f"layer{stage}.{number}"
            stride = 2 if stage > 1 and number == 0 else 1
            out = functional.relu(normalized(x, state, f"{block}.bn1"))
            short = x
            if f"{block}.shortcut.0.weight" in state:
                short = functional.conv2d(x, state[f"{block}.shortcut.0.weight"], stride=stride)
            out = functional.conv2d(out, state[f"{block}.conv1.weight"], stride=stride, padding=1)
            x = short + functional.conv2d(
                functional.relu(normalized(out, state, f"{block}.bn2")), state[f"{block}.conv2.weight"], padding=1
            )
    return functional.linear(x.mean((2, 3)), state["linear.weight"], state["linear.bias"])


def renamed(state, rules):
    """Return our names as another code has them."""
    found = {}
    for name, value in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        found[name] = value
    return found


DEEPMIND_WIDE = (
    (r"^conv1\.", "init_conv."),
    (r"^block(\d)\.layer\.", lambda found: f"layer.{int(found[1]) - 1}.block."),
    (r"^bn1\.", "batchnorm."),
    (r"\.bn1\.", ".batchnorm_0."),
    (r"\.bn2\.", ".batchnorm_1."),
    (r"\.conv1\.", ".conv_0."),
    (r"\.conv2\.", ".conv_1."),
    (r"^classifier\.", "logits."),
)
DEEPMIND_PREACT = (
    (r"^conv1\.", "conv_2d."),
    (r"^layer(\d)\.", lambda found: f"layer_{int(found[1]) - 1}."),
    (r"^bn\.", "batchnorm."),
    (r"\.bn1\.", ".batchnorm_0."),
    (r"\.bn2\.", ".batchnorm_1."),
    (r"\.conv1\.", ".conv_2d_1."),
    (r"\.conv2\.", ".conv_2d_2."),
    (r"^classifier\.", "logits."),
)
ROBUSTBENCH_PREACT = ((r"\.shortcut\.", ".shortcut.0."), (r"^classifier\.", "linear."))
STATISTICS = {"mean": torch.tensor([0.49, 0.48, 0.45]), "std": torch.tensor([0.247, 0.243, 0.262])}

CASES = {
    "wide": ("wrn16_4", {"activation": "silu", "padding": "same"}, DEEPMIND_WIDE, deepmind_wide, True),
    "DeepMind's preact": (
        "preact_resnet18",
        {"activation": "silu", "padding": "same", "shortcut": "raw_3x3"},
        DEEPMIND_PREACT,
        deepmind_preact,
        True,
    ),
    "preact": ("preact_resnet18", {"shortcut": "raw", "last_normalization": False}, ROBUSTBENCH_PREACT, robustbench_preact, False),
}


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_answers_as_its_own_network(case, tmp_path):
    backbone, options, rules, forward, normalizes = CASES[case]
    state = renamed(randomized(build_backbone(backbone, num_classes=10, image_shape=SHAPE, **options).state_dict()), rules)
    given = dict(state)
    if normalizes:
        given |= {name: value.double().view(3, 1, 1) for name, value in STATISTICS.items()}
    statistics = {name: tuple(value.tolist()) for name, value in STATISTICS.items()} if normalizes else UNIT
    model = build_model("at", backbone=backbone, image_shape=SHAPE, backbone_options=options, **statistics).double().eval()
    report = begin_with(model, {f"module.{name}": value for name, value in given.items()}, source="x")
    assert report.reinitialized == ()
    assert set(report.skipped) == ({"mean", "std"} if normalizes else set())
    with torch.no_grad():
        torch.testing.assert_close(model(X), forward(X, given), rtol=1e-6, atol=1e-6)
        assert model(X).std() > 0.01
        if backbone == "wrn16_4":  # exported without a training, and loaded again
            kept = load_pretrained(save_pretrained(model.float(), tmp_path / "kept"))
            torch.testing.assert_close(kept(X.float()), model(X.float()))


@pytest.mark.parametrize("name", ["wrn28_10", "wrn70_16"])
def test_the_large_ones_have_the_published_numbers_of_weights(name):
    with torch.device("meta"):
        network = build_backbone(name, num_classes=10, image_shape=SHAPE)
    assert sum(parameter.numel() for parameter in network.parameters()) == {"wrn28_10": 36_479_194, "wrn70_16": 266_796_506}[name]
    assert len(network.main_path_convolutions()) == {"wrn28_10": 25, "wrn70_16": 67}[name]


@pytest.mark.parametrize("case", ["ResNet18", "PreActResNet18", "WideResNet", "DMWideResNet", "DMPreActResNet"])
def test_the_packages_own_classes_agree(case):
    resnet = pytest.importorskip("robustbench.model_zoo.architectures.resnet")
    wide = pytest.importorskip("robustbench.model_zoo.architectures.wide_resnet")
    deepmind = pytest.importorskip("robustbench.model_zoo.architectures.dm_wide_resnet")
    silu = {"activation": "silu", "padding": "same"}
    theirs, backbone, options, normalizes = {
        "ResNet18": (resnet.ResNet18, "resnet18", {}, False),
        "PreActResNet18": (resnet.PreActResNet18, "preact_resnet18", {"shortcut": "raw", "last_normalization": False}, False),
        "WideResNet": (lambda: wide.WideResNet(16, widen_factor=4, sub_block1=True), "wrn16_4", {}, False),
        "DMWideResNet": (lambda: deepmind.DMWideResNet(10, 16, 4, deepmind.Swish), "wrn16_4", silu, True),
        "DMPreActResNet": (
            lambda: deepmind.DMPreActResNet(10, 18, 0, deepmind.Swish),
            "preact_resnet18",
            {**silu, "shortcut": "raw_3x3"},
            True,
        ),
    }[case]
    network = theirs()
    state = network.state_dict()
    network.load_state_dict(state | {name: value.float() for name, value in randomized(state).items() if name not in ("mean", "std")})
    statistics = {"mean": deepmind.CIFAR10_MEAN, "std": deepmind.CIFAR10_STD} if normalizes else UNIT
    model = build_model("at", backbone=backbone, image_shape=SHAPE, backbone_options=options, **statistics).eval()
    report = begin_with(model, network.state_dict(), source="x")
    assert report.reinitialized == ()
    assert all(name in ("mean", "std") or name.startswith("sub_block1.") for name in report.skipped)
    with torch.no_grad():
        torch.testing.assert_close(model(X.float()), network.eval()(X.float()), rtol=1e-5, atol=1e-5)
