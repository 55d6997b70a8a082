"""Folded batch normalization computes the same function, under every draw, and only where it is legal."""

import pytest
import torch
from torch import nn

from analysis.attacked_model.draws import seeded_draws, set_draw
from analysis.attacked_model.folding import folded_for_evaluation
from analysis.evaluate import evaluate
from analysis.evaluation.suites import AttackItem, Suite
from analysis.reporting.conclusion import to_markdown
from models import build_model
from models.layers.channel_map import scale_filters
from models.threat_model import ThreatModel


def trained_like(model, seed=0):
    """Give batch normalizations statistics and affine parameters as after training."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.copy_(0.3 * torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(module.num_features, generator=generator))
            if module.weight is not None:
                module.weight.data.copy_(0.5 + torch.rand(module.num_features, generator=generator))
                module.bias.data.copy_(0.2 * torch.randn(module.num_features, generator=generator))
    return model.eval()


def small(defence, backbone="resnet8", **options):
    return trained_like(build_model(defence, backbone=backbone, image_shape=(3, 16, 16), num_classes=5, **options))


def images(count=4):
    return torch.rand((count, 3, 16, 16), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("defence", "backbone", "options", "least"),
    [
        ("at", "resnet8", {}, 7),
        ("at", "preact_resnet18", {}, 8),
        ("at", "mobilenet_v2", {}, 20),
        ("ctrw", "resnet8", {}, 7),
        ("ctrw", "resnet8", {"variant": "filter", "position": 1}, 7),
        ("dcs", "resnet8", {"kernel_size": 3, "num_taps": 2}, 7),
        ("red", "resnet8", {"num_members": 2}, 14),
    ],
)
def test_folding_changes_no_logit_under_any_draw(defence, backbone, options, least):
    model = small(defence, backbone, **options)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folded, count = folded_for_evaluation(model, images())
    assert count >= least
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for draw in seeded_draws(3, "folding", defence):
        for each in (model, folded):
            set_draw(each, draw)
        x = images().requires_grad_()
        expected, found = model(x), folded(x)
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
        (one,) = torch.autograd.grad(expected[:, 0].sum(), x, retain_graph=True)
        (two,) = torch.autograd.grad(found[:, 0].sum(), x)
        assert torch.allclose(one, two, rtol=1e-3, atol=1e-4 * one.abs().max().item())


def test_random_normalizations_and_training_models_are_left_alone():
    model = small("rna")
    folded, _ = folded_for_evaluation(model, images())
    for draw in seeded_draws(3, "folding", "rna"):
        for each in (model, folded):
            set_draw(each, draw)
        assert torch.allclose(folded(images()), model(images()), atol=1e-4)
    training = build_model("at", backbone="resnet8", image_shape=(3, 16, 16), num_classes=5).train()
    before = {name: value.clone() for name, value in training.state_dict().items()}
    assert folded_for_evaluation(nn.Sequential(nn.Flatten(), nn.Linear(768, 5)).eval(), images())[1] == 0
    assert {name for name in before} == set(training.state_dict())


def test_a_convolution_that_something_else_reads_is_not_folded(caplog):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)

        def forward(self, x):
            y = self.conv(x)
            return self.head((self.norm(y) + y).mean((2, 3)))

    model = trained_like(Branches())
    folded, count = folded_for_evaluation(model, images())
    assert (folded, count) == (model, 0)
    assert not caplog.text  # it was not even tried


def test_shared_and_repeated_convolutions_are_not_folded():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
            self.head = nn.Linear(3, 5)

        def forward(self, x):
            return self.head(self.second(self.conv(self.first(self.conv(x)))).mean((2, 3)))

    model = trained_like(Twice())
    assert folded_for_evaluation(model, images()) == (model, 0)


def test_an_evaluation_with_folding_finds_what_one_without_finds(monkeypatch):
    model, x = small("dcs", kernel_size=3, num_taps=2), images(12)
    y = model(x).argmax(1)
    suite = Suite(
        name="mine", attacks=(AttackItem(attack="pgd", parameters={"steps": 3, "random_start": False, "loss": "margin"}, num_draws=4),)
    )
    folded = evaluate(model, x, y, suite)
    assert folded.records[0]["block"]["num_folded"] > 0
    monkeypatch.setattr("analysis.evaluation.blocks.folded_for_evaluation", lambda model, x: (model, 0))
    plain = evaluate(model, x, y, suite)
    assert [row.estimate.value for row in folded.rows] == pytest.approx([row.estimate.value for row in plain.rows], abs=0.03)
    assert not folded.marked, to_markdown(folded)


class TwoBranches(nn.Module):
    """A network that normalizes images it takes for attacked ones by other statistics, as AdvProp does with its two batch normalizations.

    Args:
        seed: of weights and statistics. limit: roughness of an image from which it is taken for attacked; above that of clean images.
    """

    def __init__(self, seed, limit):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.limit = limit
        self.convolution = nn.Conv2d(1, 8, 3, padding=1)
        self.clean, self.attacked = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.head = nn.Linear(8 * 36, 3)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            for normalization in (self.clean, self.attacked):
                normalization.running_mean.copy_(torch.randn(8, generator=generator))
                normalization.running_var.copy_(0.2 + torch.rand(8, generator=generator))

    def forward(self, x):
        features = self.convolution(x)
        rough = (x[..., 1:] - x[..., :-1]).abs().mean((1, 2, 3)) > self.limit
        if not rough.any():
            return self.head(self.clean(features).relu().flatten(1))
        both = torch.where(rough.view(-1, 1, 1, 1), self.attacked(features), self.clean(features))
        return self.head(both.relu().flatten(1))


@pytest.mark.parametrize("seed", range(6))
def test_a_branch_that_clean_images_never_take_is_evaluated_as_it_is(seed):
    x = (0.5 + 0.01 * torch.rand(24, 1, 6, 6, generator=torch.Generator().manual_seed(seed))).double()
    model = TwoBranches(seed, limit=0.02).double().eval()
    assert folded_for_evaluation(model, x[:2])[1] == 1, "on clean images alone the copy looks right"
    with torch.no_grad():
        y = model(x).argmax(1)
    attacks = (AttackItem(attack="pgd", parameters={"steps": 3}), AttackItem(attack="fgsm"))
    settings = {"threat_model": ThreatModel(epsilon=0.1)}
    result = evaluate(model, x, y, Suite(name="two", attacks=attacks), **settings)
    for module in (model.clean, model.attacked):
        module.register_forward_hook(lambda _module, _inputs, output: output)  # hooks forbid folding
    expected = evaluate(model, x, y, Suite(name="two", attacks=attacks), **settings)
    assert [row.estimate.value for row in result.rows] == [row.estimate.value for row in expected.rows]
    assert all(record["block"]["num_folded"] == 0 for record in result.records if record["header"]["kind"] == "attack")


def test_folding_stays_where_it_is_right():
    model = small("at")
    suite = Suite(name="one", attacks=(AttackItem(attack="pgd", parameters={"steps": 3}),))
    result = evaluate(model, images(8), torch.arange(8) % 5, suite)
    assert all(record["block"]["num_folded"] >= 7 for record in result.records)


def test_a_layer_that_no_code_names_is_folded_if_it_says_how():
    class Doubled(nn.Module):
        """A convolution of somebody else's defence, with its filter twice as large as stored."""

        def __init__(self):
            super().__init__()
            self.filters = nn.Parameter(torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(2)))
            self.bias = None

        def take_channel_map(self, scale_O, shift_O):
            self.bias = scale_filters((self.filters,), self.bias, scale_O, shift_O)

        def forward(self, x):
            return nn.functional.conv2d(x, 2 * self.filters, self.bias)

    class Said(nn.Module):
        """A normalization of somebody else's: an affine map of its channels."""

        def channel_map(self):
            return torch.full((4,), 3.0).double(), torch.full((4,), -1.0).double()

        def forward(self, x):
            return 3 * x - 1

    for normalization in (nn.BatchNorm2d(4), Said()):
        model = trained_like(nn.Sequential(Doubled(), normalization, nn.Flatten(), nn.Linear(4 * 14 * 14, 5)))
        folded, count = folded_for_evaluation(model, images())
        assert count == 1
        assert isinstance(folded[1], nn.Identity)
        torch.testing.assert_close(folded(images()), model(images()))
