"""Training with fewer gradients: single steps, replays, steps that end early, and how catastrophic overfitting is seen."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from models.errors import UserError
from models.randomness import random_sites
from models.registry import build_model
from models.threat_model import ThreatModel
from orchestration.recipes import load_recipe
from tests.trainers.tiny_training import StopAfterOne, few_digits, tiny_config
from trainers.attacks import pgd
from trainers.attacks.single_step import SingleStep, early_stopped_pgd, n_fgsm, single_step
from trainers.complaints import CATASTROPHIC_OVERFITTING, SINGLE_STEP_ACCURACY, complaints
from trainers.data import Augmentation
from trainers.fit import TrainingLoop, fit
from trainers.hardware import FULL
from trainers.objective import build_objective
from trainers.objectives.free import FreeConfig
from trainers.objectives.nuclear_norm import NuclearNormConfig
from trainers.optimizer import OptimizerConfig
from trainers.reporting import SilentReporter
from trainers.signs import catastrophic_overfitting
from trainers.step import InnerAttackConfig, StepContext
from trainers.streams import Streams

EPSILON = 0.1
RADIUS = ThreatModel(epsilon=EPSILON)


@pytest.fixture(scope="module")
def splits():
    return few_digits()


def smooth(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def batch(count=6, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, 2, 2, generator=generator, dtype=dtype), torch.arange(count) % 3


def generator(seed=3):
    return torch.Generator().manual_seed(seed)


def test_n_fgsm_is_one_step_of_epsilon_from_noise_that_is_never_cut_back():
    model, (x, y) = smooth(), batch(200)
    moved = single_step(model, x, y, n_fgsm(EPSILON), epsilon=EPSILON, norm="linf", generator=generator())
    noise = torch.empty_like(x).uniform_(-2 * EPSILON, 2 * EPSILON, generator=generator())
    start = (x + noise).clamp(0, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(functional.cross_entropy(model(start), y), start)
    torch.testing.assert_close(moved, (start + EPSILON * gradient.sign()).clamp(0, 1).detach())
    assert (moved - x).abs().max() > 1.5 * EPSILON
    assert (moved - x).abs().max() <= 3 * EPSILON + 1e-12


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_step_from_a_corner_ends_in_the_ball(norm):
    model, (x, y) = smooth(), batch(50)
    kind = SingleStep("corners", 0.5 * EPSILON, EPSILON, project=True)
    moved = single_step(model, x, y, kind, epsilon=EPSILON, norm=norm, generator=generator()) - x
    length = moved.abs().amax((1, 2, 3)) if norm == "linf" else moved.flatten(1).norm(dim=1)
    assert length.max() <= EPSILON + 1e-9
    still = SingleStep("corners", 0.5 * EPSILON, 0.0, project=True)
    start = single_step(model, x.clamp(0.1, 0.9), y, still, epsilon=EPSILON, norm=norm, generator=generator()) - x.clamp(0.1, 0.9)
    if norm == "linf":
        torch.testing.assert_close(start.abs(), torch.full_like(start, 0.5 * EPSILON))
        assert 0.3 < (start > 0).double().mean() < 0.7
    else:
        torch.testing.assert_close(start.flatten(1).norm(dim=1), torch.full((50,), 0.5 * EPSILON, dtype=torch.float64))


@pytest.mark.parametrize("stop_after", [0, 1, 3])
def test_each_image_stops_by_itself(stop_after):
    model, (x, y) = smooth(2), batch(40)
    together = early_stopped_pgd(model, x, y, x, epsilon=0.3, step_size=0.02, steps=12, norm="linf", stop_after=stop_after)
    stopped = 0
    for index in range(len(x)):
        image, label, left = x[index : index + 1].clone(), y[index : index + 1], stop_after
        for _ in range(12):
            leaf = image.clone().requires_grad_()
            logits = model(leaf)
            if logits.argmax(1).item() != label.item():
                if left == 0:
                    stopped += 1
                    break
                left -= 1
            (gradient,) = torch.autograd.grad(functional.cross_entropy(logits, label), leaf)
            image = (image + 0.02 * gradient.sign()).clamp(x[index] - 0.3, x[index] + 0.3).clamp(0, 1)
        torch.testing.assert_close(together[index : index + 1], image)
    assert 0 < stopped < len(x) or stop_after == 0


def test_with_steps_to_spare_nothing_stops():
    model, (x, y) = smooth(), batch(20)
    settings = {"epsilon": 0.2, "step_size": 0.05, "norm": "l2"}
    start = pgd(model, x, y, steps=0, generator=generator(), **settings)
    early = early_stopped_pgd(model, x, y, start, stop_after=99, steps=5, **settings)
    torch.testing.assert_close(early, pgd(model, x, y, steps=5, generator=generator(), **settings))


@pytest.mark.parametrize(("redraw", "draws"), [("attack_then_step", 1), ("each_attack_step", 5)])
def test_steps_that_end_early_see_the_draws_that_the_policy_says(redraw, draws):
    model = build_model("ctrw", backbone="resnet8", image_shape=(1, 8, 8))
    seen = []
    (site,) = [module for _, module in random_sites(model)]
    site.register_forward_pre_hook(lambda module, inputs: seen.append(module.draw_key))
    attack = InnerAttackConfig(steps=5, step_size=0.02, stop_after=9)
    context = StepContext(RADIUS, attack, redraw, Streams(0), FULL, 4, 2)
    context.streams.begin_epoch(model, 0)
    context.adversarial_examples(model, torch.rand(4, 1, 8, 8), torch.arange(4))
    assert len(seen) == 5
    assert len(set(seen)) == draws


def context_of(model, **changes):
    context = StepContext(RADIUS, InnerAttackConfig(steps=1, step_size=0.05), "attack_then_step", Streams(0), FULL, 4, 2)
    context.streams.begin_epoch(model, 0)
    for name, value in changes.items():
        setattr(context, name, value)
    return context


@pytest.mark.parametrize(("epoch", "step"), [(0, 0), (1, 2), (1, 3), (3, 7)])
def test_nu_at_is_its_equation(epoch, step):
    model, (x, y) = smooth(), batch(8)
    context = context_of(model, epoch=epoch, step=step)
    objective = build_objective(NuclearNormConfig(weight=8.0))
    weight, regularized = 8.0 * epoch / 4, step % 2 == 1
    state = context.streams.attack.get_state()
    terms = objective.training_step(model, x, y, context)
    source = torch.Generator()
    source.set_state(state)
    signs = torch.empty_like(x).uniform_(generator=source).sub_(0.5).sign()
    start = (x + EPSILON / 2 * signs).clamp(0, 1).requires_grad_()
    logits, clean = model(start), model(x).detach()
    climbed = functional.cross_entropy(logits, y)
    if regularized:
        climbed = climbed + weight * torch.linalg.svdvals(clean - logits).sum() / 8
    (gradient,) = torch.autograd.grad(climbed, start)
    moved = (start + EPSILON * gradient.sign()).clamp(x - EPSILON, x + EPSILON).clamp(0, 1).detach()
    clean, adversarial = model(x), model(moved)
    loss = functional.cross_entropy(clean, y) + weight * torch.linalg.svdvals(clean - adversarial).sum() / 8
    assert terms["loss"].item() == pytest.approx(loss.item(), rel=1e-9)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_free_training_is_its_algorithm(splits):
    model = build_model("single_normalization", backbone="resnet8", image_shape=(1, 8, 8), normalization="ln")
    # Laid out as the loop lays its own out: kernels of another layout round otherwise, and steps follow signs.
    naive = copy.deepcopy(model).to(memory_format=torch.channels_last)
    settings = tiny_config(objective=FreeConfig(replays=3), optimizer=OptimizerConfig(learning_rate=0.02, momentum=0, weight_decay=0))
    loop = TrainingLoop(
        model, splits, RADIUS, settings, seed=0, device=torch.device("cpu"), augmentation=Augmentation(), reporter=SilentReporter()
    )
    seen = []
    for index, (x, y) in enumerate(loop.batches(0)):
        loop.train_batch(index, x, y)
        seen.append((x, y))
    optimizer, naive = torch.optim.SGD(naive.parameters(), lr=0.02), naive.train()
    delta = torch.zeros_like(seen[0][0])
    for x, y in seen:
        for _ in range(3):
            image = (x + delta).clamp(0, 1).requires_grad_()
            optimizer.zero_grad()
            functional.cross_entropy(naive(image), y).backward()
            delta = ((image.detach() + EPSILON * image.grad.sign()).clamp(x - EPSILON, x + EPSILON).clamp(0, 1)) - x
            optimizer.step()
    for value, expected in zip(model.parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-4)
    assert loop.objective.passes(10, 1, 0) == 9


CHEAPER = {
    "free": {"objective": FreeConfig(replays=2)},
    "nu_at": {"objective": NuclearNormConfig()},
    "n_fgsm": {"attack": InnerAttackConfig(name="n_fgsm", step_size=0.05)},
    "early": {"attack": InnerAttackConfig(steps=3, step_size=0.05, stop_after=0)},
    "warm": {"attack": InnerAttackConfig(steps=2, step_size=0.05, warm_start=3), "accumulation": 2},
}


@pytest.mark.parametrize("name", CHEAPER)
def test_a_resumed_run_ends_bit_identically(name, splits, tmp_path):
    def network():
        return build_model("ctrw", backbone="resnet8", image_shape=(1, 8, 8))

    whole, resumed, settings = network(), network(), tiny_config(**CHEAPER[name])
    fit(whole, splits, RADIUS, settings, seed=0)
    fit(network(), splits, RADIUS, settings, seed=0, reporter=StopAfterOne(tmp_path))
    result = fit(resumed, splits, RADIUS, settings, seed=0, resume_from=tmp_path)
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in whole.state_dict().items())
    assert (CATASTROPHIC_OVERFITTING in result.metrics) == (name not in ("early", "warm"))


@pytest.mark.parametrize(
    ("several", "single", "seen"),
    [
        ([0.1, 0.3, 0.4, 0.05], [0.3, 0.4, 0.5, 0.9], True),
        ([0.1, 0.3, 0.4, 0.05], [0.3, 0.4, 0.5, 0.1], False),
        ([0.1, 0.3, 0.4, 0.3], [0.3, 0.4, 0.5, 0.9], False),
        ([0.1, 0.3, 0.4, 0.5], [0.3, 0.4, 0.5, 0.9], False),
        ([0.4], [0.9], False),
        ([], [], False),
    ],
)
def test_catastrophic_overfitting_is_several_steps_falling_while_one_does_not(several, single, seen):
    history = [{"validation/robust_accuracy": a, SINGLE_STEP_ACCURACY: b} for a, b in zip(several, single, strict=True)]
    history.insert(len(history) // 2, {"train/loss": 1.0})
    if several:
        assert catastrophic_overfitting(history) == seen
    said = complaints((history[-1] if several else {}) | {CATASTROPHIC_OVERFITTING: float(seen)})
    assert (CATASTROPHIC_OVERFITTING in said) == seen


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--training.attack.name=n_fgsm", "--training.attack.steps=7"], "one step"),
        (["--training.attack.name=nfgsm"], "n_fgsm"),
        (["--training.attack.name=n_fgsm", "--training.attack.stop_after=1", "--training.attack.steps=1"], "stop_after"),
        (["--training.attack.noise_radius=-1"], "noise_radius"),
        (["--training.objective={name: free, replays: 0}"], "replays"),
        (["--training.objective={name: nu_at, weight: -1}"], "weight"),
        (["--training.objective=nu_at", "--training.accumulation=2"], "whole batch"),
    ],
)
def test_nonsense_is_one_message(flags, words):
    with pytest.raises(UserError) as caught:
        load_recipe("at_digits", flags)
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
