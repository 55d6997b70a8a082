"""What lies before the first random layer is computed once for all draws, and nothing else is."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from torch import nn

from analysis.attacked_model.draws import FreshDraws, seeded_draws
from analysis.attacked_model.model import AttackedModel, Predictor
from analysis.evaluation.protocols import score_draws
from models import build_model, shared_prefix
from models.randomness import RandomModule, seed_streams
from models.shared_prefix import SharedPrefix
from trainers.attacks import cross_entropy, pgd

CASES = [
    ("ctrw", "resnet8", {"position": 3}),
    ("ctrw", "resnet8", {"position": 2, "variant": "filter"}),
    ("dcs", "resnet8", {"positions": (4,), "kernel_size": 3, "num_taps": 2}),
    ("dcs", "resnet8", {"draw_scope": "per_example"}),
    ("rna", "resnet8", {}),
    ("red", "resnet8", {"num_members": 2, "inference": "rsi_call"}),
    ("red", "resnet8", {"num_members": 2, "inference": "rsi_sample"}),
    ("ps_red", "resnet8", {"num_members": 2, "inference": "rsi_call"}),
]


def small(defence, backbone="resnet8", **options):
    return build_model(defence, backbone=backbone, image_shape=(3, 8, 8), num_classes=4, **options).eval()


def batch(count=3):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 3, 8, 8, generator=generator), torch.randint(0, 4, (count,), generator=generator)


@pytest.fixture
def unshared(monkeypatch):
    """Make the next passes separate ones."""

    def switch():
        monkeypatch.setattr(shared_prefix, "_shareable", lambda network: iter(()))

    return switch


@pytest.mark.parametrize(("defence", "backbone", "options"), CASES)
def test_gradients_scores_and_counts_are_those_of_separate_passes(defence, backbone, options, unshared):
    model = small(defence, backbone, **options).double()
    x, y = batch()
    x = x.double()
    seed = random.Random(defence + backbone).randrange(1000)

    def everything():
        found = []
        for num_averaged in (1, 2):
            attacked = AttackedModel(Predictor(model, num_averaged), FreshDraws(3, seed))
            found += [*attacked.gradient(x, y, cross_entropy), *attacked.score(x, y, cross_entropy)]
            found.append(torch.tensor([attacked.num_forward, attacked.num_backward]))
        found += score_draws(Predictor(model), x, y, seeded_draws(4, seed))
        seed_streams(model, seed)
        return [*found, pgd(model, x, y, steps=2, num_draws=3)]

    together = everything()
    unshared()
    torch.testing.assert_close(together, everything(), rtol=1e-9, atol=1e-9)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_layers_before_the_first_random_one_run_once(monkeypatch):
    model = small("ctrw", position=2)
    x, y = batch()
    calls: Counter[str] = Counter()
    names = {module: name for name, module in model.named_modules()}
    forward = nn.Conv2d.forward

    def counted(self, images):
        calls[names[self].removeprefix("backbone.")] += 1
        return forward(self, images)

    monkeypatch.setattr(nn.Conv2d, "forward", counted)
    attacked = AttackedModel(Predictor(model), FreshDraws(5, 0))
    attacked.gradient(x, y, cross_entropy)
    before = ("conv1", "layer1.0.conv1", "layer1.0.conv2")  # position 2 lies behind layer1
    assert all(calls[name] == (1 if name in before else 5) for name in calls) and set(before) < set(calls)
    attacked.score(x, y, cross_entropy)
    assert all(calls[name] == (2 if name in before else 10) for name in calls)


class WritesIntoAnother(RandomModule):
    """A random site of a plug-in, whose draw is in the weights of a plain layer that comes before it."""

    def __init__(self, layer):
        super().__init__()
        self.written = [layer]
        self.take_first_draw()

    @property
    def num_configurations(self):
        return float("inf")

    def draw(self, generator):
        with torch.no_grad():
            self.written[0].weight.normal_(generator=generator)

    def forward(self, x):
        return x


class Counting(nn.Conv2d):
    """A layer that knows how often it ran."""

    def forward(self, x):
        self.runs = getattr(self, "runs", 0) + 1
        return super().forward(x) * self.runs


def test_what_may_differ_between_draws_is_not_shared(unshared):
    x, y = batch()
    convolution = nn.Conv2d(3, 4, 8)
    written = nn.Sequential(convolution, WritesIntoAnother(convolution), nn.Flatten())
    hooked, counting, training = (nn.Sequential(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4), small("ctrw"), nn.Flatten()) for _ in range(3))
    hooked[0].register_forward_hook(lambda *_: None)
    counting[0] = Counting(3, 4, 8)
    for model, layer in ((hooked, hooked[0]), (counting, counting[0]), (training.train(), training[1])):
        assert layer not in set(shared_prefix._shareable(model))
    attacked = AttackedModel(Predictor(written), FreshDraws(3, 7))
    found = attacked.gradient(x, y, cross_entropy)
    unshared()
    torch.testing.assert_close(found, AttackedModel(Predictor(written), FreshDraws(3, 7)).gradient(x, y, cross_entropy))


def test_an_answer_without_a_path_to_the_images_is_an_error():
    model = small("ctrw", position=2)
    x = batch()[0].requires_grad_()
    with SharedPrefix(model, x, 2) as shared:
        model(x)
        with pytest.raises(RuntimeError, match="no gradient"):
            shared.add_gradient_of(torch.ones((), requires_grad=True) * 2)
