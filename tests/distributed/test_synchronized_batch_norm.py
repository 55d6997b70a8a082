"""`training.batch_norm: synchronized` on two gloo processes: layers, networks and trainings equal those of one process with the whole
batch, forward, in gradients of first and second order, and in running statistics."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from models.errors import UserError
from models.layers.channel_statistics import Normalization2d, is_synchronized, parse_normalization
from models.layers.explicit_batch_norm import ExplicitBatchNorm2d
from models.layers.random_normalization import RandomNormalization2d
from models.randomness import random_sites, resample, seed_streams, set_configuration
from models.registry import build_model
from models.threat_model import ThreatModel
from tests.distributed.pair_of_processes import results_of
from trainers.config import TrainingConfig
from trainers.data import Augmentation, DataConfig, load_data
from trainers.distributed import synchronize_batch_norm
from trainers.fit import fit
from trainers.objective import build_objective
from trainers.objectives.red import RedObjectiveConfig

pytestmark = pytest.mark.distributed

C = 6
SPLITS = {"even": (4, 4), "uneven": (5, 2), "one is empty": (6, 0)}
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}


def explicit() -> nn.Module:
    return ExplicitBatchNorm2d(C)


def random_layer(scope: str):
    return lambda: RandomNormalization2d(C, ("bn", "in", "bgn_groups_3"), draw_scope=scope)


LAYERS = {
    "BatchNorm2d": lambda: nn.BatchNorm2d(C),
    "BatchNorm2d without affine parameters": lambda: nn.BatchNorm2d(C, affine=False),
    "BatchNorm2d with a cumulative average": lambda: nn.BatchNorm2d(C, momentum=None),
    "BatchNorm2d that tracks nothing": lambda: nn.BatchNorm2d(C, track_running_stats=False),
    "explicit": explicit,
    "bgn": lambda: Normalization2d(C, parse_normalization("bgn_size_2")),
    "bn of the family": lambda: Normalization2d(C, parse_normalization("bn")),
    "gn": lambda: Normalization2d(C, parse_normalization("gn_groups_2")),
    "rna global": random_layer("global"),
    "rna per_rank": random_layer("per_rank"),
    "rna per_example": random_layer("per_example"),
}
CASES = [(name, split, dtype) for name in LAYERS for split in SPLITS for dtype in TOLERANCES if dtype == torch.float64 or split == "uneven"]


def layer_of(name: str, dtype: torch.dtype) -> nn.Module:
    """Return a layer in a chain with a second one, so that statistics depend on statistics."""
    torch.manual_seed(3)
    layer = nn.Sequential(LAYERS[name](), nn.Conv2d(C, C, 1), nn.Tanh(), LAYERS[name]()).to(dtype)
    for parameter in layer.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return layer.train()


def maps(dtype: torch.dtype, rows: int = 7) -> torch.Tensor:
    """Return maps whose mean is far from 0: a sum of squares would lose digits there."""
    generator = torch.Generator().manual_seed(1)
    return (10 + torch.randn(rows, C, 3, 2, generator=generator, dtype=torch.float64)).to(dtype)


def choose(layer: nn.Module, rank: int) -> None:
    """Let per-rank layers choose differently on the two workers, others alike."""
    for index, site in enumerate(module for module in layer.modules() if isinstance(module, RandomNormalization2d)):
        site.set_configuration((index + (rank if site.draw_scope == "per_rank" else 0)) % 3)
        if site.draw_scope == "per_example":
            resample(site)


def measure(layer: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the output, the gradients of a sum over examples, those of a gradient penalty, and the statistics."""
    x = x.clone().requires_grad_()
    # Two training forwards: running statistics move twice.
    layer(x)
    out = layer(x)
    weights = torch.cos(torch.arange(out.shape[1:].numel(), dtype=out.dtype)).view(out.shape[1:])
    loss = (out.square() * weights).sum()
    parameters = dict(layer.named_parameters())
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    penalty = loss + 0.01 * first.square().sum()
    gradients = torch.autograd.grad(penalty, [x, *parameters.values()], allow_unused=True, materialize_grads=True)
    found = {"out": out, "input gradient": first, "second input gradient": gradients[0]}
    found |= {f"gradient of {name}": gradient for name, gradient in zip(parameters, gradients[1:], strict=True)}
    found |= {name: buffer for name, buffer in layer.state_dict().items() if name not in parameters}
    return {name: value.detach().clone() for name, value in found.items()}


JOBS = {}


def job(function):
    """Register a function that both processes run."""
    JOBS[function.__name__] = function
    return function


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """`both(name)` returns what job `name` returned on rank 0 and on rank 1."""
    return results_of(__name__, tmp_path_factory.mktemp("gloo"))


def rows_of(split: str, rank: int) -> slice:
    first, second = SPLITS[split]
    return slice(0, first) if rank == 0 else slice(first, first + second)


@job
def layers(rank):
    found = {}
    for name, split, dtype in CASES:
        layer = layer_of(name, dtype)
        synchronize_batch_norm(layer)
        choose(layer, rank)
        x = maps(dtype, sum(SPLITS[split]))
        found[name, split, dtype] = measure(layer, x[rows_of(split, rank)])
    return found


def of_one_process(name: str, split: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Measure with the whole batch; where the two workers choose differently, each row follows its worker's choice."""
    layer = layer_of(name, dtype)
    choose(layer, 0)
    if name in ("rna per_rank", "rna per_example"):
        other = layer_of(name, dtype)
        choose(other, 1)
        first, second = SPLITS[split]
        whole = layer_of("rna per_example", dtype)
        whole.load_state_dict(layer.state_dict())
        for site, zero, one in zip(whole, layer, other, strict=True):
            if not isinstance(site, RandomNormalization2d):
                continue
            rows = [
                each.choice_rows[:count] if name == "rna per_example" else each.choice.expand(count)
                for each, count in ((zero, first), (one, second))
            ]
            site.set_draw("choice_rows", torch.cat(rows))
        layer = whole
    return measure(layer, maps(dtype, sum(SPLITS[split])))


@pytest.mark.parametrize(("name", "split", "dtype"), CASES)
def test_layers_of_two_processes_equal_those_of_one(name, split, dtype, both):
    expected = of_one_process(name, split, dtype)
    found = [results[name, split, dtype] for results in both("layers")]
    tolerance = TOLERANCES[dtype]
    for key, target in expected.items():
        scale = target.double().abs().max().item() if target.numel() else 0.0
        if key in ("out", "input gradient", "second input gradient"):
            ours = torch.cat([each[key] for each in found])
        elif key.startswith("gradient of"):
            ours = found[0][key] + found[1][key]
        else:
            assert torch.equal(found[0][key], found[1][key]) or "num_batches" not in key
            ours = found[0][key]
            torch.testing.assert_close(found[1][key], ours, rtol=0, atol=tolerance * max(scale, 1.0))
        torch.testing.assert_close(ours, target, rtol=0, atol=10 * tolerance * max(scale, 1.0), msg=lambda text, key=key: f"{key}: {text}")


SMALL = {"backbone": "resnet8", "image_shape": (1, 8, 8), "seed": 1}
NETWORKS = {
    "at": {},
    "rna": {"pool": ("bn", "bgn_size_2", "ln")},
    "single_normalization": {"normalization": "bgn", "num_groups": 8},
    "dcs": {"kernel_size": 3},
}


def network(name: str) -> nn.Module:
    model = build_model(name, **SMALL, **NETWORKS[name]).double().train()
    seed_streams(model, 4)
    return model


def network_gradients(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    loss = nn.functional.cross_entropy(model(x), y, reduction="sum")
    loss.backward()
    found = {"input": x.grad}
    found |= {name: torch.zeros_like(value) if value.grad is None else value.grad for name, value in model.named_parameters()}
    return found | {f"buffer {name}": value.clone() for name, value in model.state_dict().items() if "running" in name}


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return x, torch.arange(6)


@job
def networks(rank):
    found = {}
    for name in NETWORKS:
        model = network(name)
        synchronize_batch_norm(model)
        assert is_synchronized(model)
        assert not any(type(module) is nn.BatchNorm2d for module in model.modules())
        x, y = batch()
        rows = slice(0, 4) if rank == 0 else slice(4, 6)
        found[name] = network_gradients(model, x[rows], y[rows])
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_two_processes_equal_those_of_one(name, both):
    expected = network_gradients(network(name), *batch())
    first, second = (results[name] for results in both("networks"))
    for key, target in expected.items():
        if key == "input":
            ours = torch.cat([first[key], second[key]])
        elif key.startswith("buffer"):
            ours = second[key]
        else:
            ours = first[key] + second[key]
        torch.testing.assert_close(ours, target, rtol=1e-9, atol=1e-11, msg=lambda text, key=key: f"{key}: {text}")


def training(defence: str):
    splits = load_data(DataConfig(name="digits", limit_train=64, limit_test=20, validation_size=32))
    model = build_model(defence, **SMALL)
    config = TrainingConfig(
        objective="adversarial",
        epochs=1,
        batch_size=32,
        precision="fp32",
        batch_norm="synchronized",
        attack={"steps": 2, "step_size": 0.05},
        optimizer={"learning_rate": 0.01},
        schedule={"name": "constant"},
        validation={"steps": 2, "select": "last"},
    )
    result = fit(model, splits, ThreatModel(epsilon=0.1), config, seed=0, augmentation=Augmentation("crop", 4))
    return {name: value.clone() for name, value in model.state_dict().items()}, result.metrics["train/loss"]


TRAINED = ("at", "rna", "single_normalization")


@job
def trainings(rank):
    torch.set_num_threads(1)
    return {name: training(name) for name in TRAINED}


@pytest.mark.parametrize("defence", TRAINED)
def test_two_workers_train_what_one_trains(defence, both):
    weights, loss = training(defence)
    for results in both("trainings"):
        ours, our_loss = results[defence]
        assert our_loss == pytest.approx(loss, abs=1e-4)
        for name, target in weights.items():
            # Signs of attack gradients near zero differ by rounding, so single pixels do.
            torch.testing.assert_close(ours[name], target, atol=2e-3, rtol=2e-3, msg=lambda text, name=name: f"{name}: {text}")


def test_one_process_keeps_its_own_statistics():
    """A model that was trained by several workers and is now alone, loaded or handed on."""
    model, plain = network("rna"), network("rna")
    synchronize_batch_norm(model)
    for _, site in [*random_sites(model), *random_sites(plain)]:
        site.set_configuration(0)
    x, _ = batch()
    torch.testing.assert_close(model(x), plain(x), rtol=1e-10, atol=1e-12)
    set_configuration(model, 0)
    copy.deepcopy(model)(x)


def test_what_cannot_be_synchronized_is_refused_by_name():
    class Doubled(nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    with pytest.raises(UserError, match="layer 1 is a Doubled"):
        synchronize_batch_norm(nn.Sequential(nn.BatchNorm2d(3), Doubled(3)))
    ensemble = build_model("red", num_members=2, backbone="resnet8", image_shape=(1, 8, 8))
    synchronize_batch_norm(ensemble)
    with pytest.raises(UserError, match="spread"):
        build_objective(RedObjectiveConfig(name="red", members="spread")).prepare(ensemble)
