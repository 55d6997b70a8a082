"""PS-RED's hypernetworks (T14 to T21 of the specification): counts, placement, cache, gradients."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from analysis.theory.cost import count_generation_macs, count_parameters, saved_share
from models import build_model
from models.errors import UserError
from models.layers.hypernetwork import GeneratedConv2d, WeightGenerator, generated_weights
from models.weights import load_pretrained, save_pretrained
from tests.numerics.ensemble_cases import batch, context, gradients, largest_difference, objective
from trainers.attacks import pgd

SMALL = {"backbone": "resnet8", "num_classes": 4, "image_shape": (3, 8, 8), "embedding_dim": 6, "hidden_dim": 5}


def small(num_members: int = 2, **parameters):
    model = build_model("ps_red", num_members=num_members, **{**SMALL, **parameters})
    with torch.no_grad():
        for member in model.members:
            member.network.backbone.classifier.weight.mul_(300)
    return model.double()


def generator_of(model, member: int = 0) -> WeightGenerator:
    return model.members[member].generator


def count_generations(monkeypatch) -> list[int]:
    calls = [0]
    generate = WeightGenerator.generate

    def counted(self, sources):
        calls[0] += 1
        return generate(self, sources)

    monkeypatch.setattr(WeightGenerator, "generate", counted)
    return calls


# T14, T15: counts.


@pytest.fixture(scope="module")
def resnet18_member():
    return build_model("ps_red", num_members=1)


def test_parameters_of_a_resnet18_member_to_the_last_one(resnet18_member):
    generator = generator_of(resnet18_member)
    kernels = [grid for grid in generator.grids if grid.kernel_size == 3]
    assert len(generator.grids) == 19
    assert sum(grid.num_units for grid in generator.grids) == 340
    assert sum(grid.num_units for grid in kernels) == 298
    assert generator.embeddings.numel() == 43_520
    assert count_parameters(generator.hypernetwork) == 1_131_072
    assert count_parameters(resnet18_member) == 1_191_050
    plain = count_parameters(build_model("natural"))
    assert plain == 11_173_962
    assert saved_share(resnet18_member, plain) == pytest.approx(0.8934, abs=5e-5)
    generated = sum(weight.numel() for weight in generator.forward())
    assert generated == 11_157_504
    assert 1_191_050 - 1_131_072 - 43_520 == plain - generated == 16_458, "stem, normalizations, classifier"
    assert count_generation_macs(resnet18_member) == 340 * 64 * 128 * (128 + 576)


@pytest.mark.parametrize(
    ("parameters", "per_member", "shared"),
    [
        ({"structure": "flat"}, 4_831_946, 0),
        ({"structure": "flat", "hidden_dim": 64}, 2_464_394, 0),
        ({"structure": "flat", "hidden_dim": 32}, 1_280_618, 0),
        ({"hidden_dim": 64}, 625_802, 0),
        ({"share": "hyper"}, 59_978, 1_131_072),
        ({"share": "hyper", "structure": "flat"}, 59_978, 4_771_968),
    ],
)
def test_parameters_of_the_variants(parameters, per_member, shared):
    model = build_model("ps_red", num_members=2, **parameters)
    assert count_parameters(model) == 2 * per_member + shared
    eight = 8 * per_member + shared
    expected = {(4_831_946, 0): 0.5676, (625_802, 0): 0.9440, (59_978, 1_131_072): 0.9820, (59_978, 4_771_968): 0.9412}
    if (per_member, shared) in expected:
        assert 1 - eight / (8 * 11_173_962) == pytest.approx(expected[per_member, shared], abs=5e-5)


def test_tiny_imagenet_saves_88_percent():
    model = build_model("ps_red", num_members=1, num_classes=200, image_shape=(3, 64, 64))
    plain = build_model("natural", num_classes=200, image_shape=(3, 64, 64))
    assert 3 * count_parameters(model) == 3_865_560
    assert 3 * count_parameters(plain) == 33_814_296
    assert saved_share(model, plain) == pytest.approx(0.8857, abs=5e-5)


def test_only_stem_norms_classifier_embeddings_and_hypernetwork_are_parameters_and_weights(resnet18_member):
    for names in (dict(resnet18_member.named_parameters()), resnet18_member.state_dict()):
        for name in names:
            short = name.removeprefix("members.0.")
            kind = short.removeprefix("network.backbone.")
            assert (
                kind.startswith(("conv1.", "classifier."))
                or ".bn" in f".{kind}"
                or kind.split(".")[-2:-1] == ["1"]  # the normalization of a shortcut
                or short.startswith(("generator.embeddings", "generator.hypernetwork."))
            ), name


# T16, T17, T18, T19: what is generated.


def plain_twin(model, member: int = 0, **parameters):
    options = {key: SMALL[key] for key in ("backbone", "num_classes", "image_shape")} | parameters
    twin = build_model("natural", **options).double()
    generated = model.members[member]
    weights = {f"{grid.name}.weight": weight for grid, weight in zip(generated.generator.grids, generated.generator(), strict=True)}
    twin.load_state_dict({**generated.network.state_dict(), **weights})
    return twin


@pytest.mark.parametrize("backbone", ["resnet8", "resnet20"])
def test_a_generated_network_equals_a_plain_one_with_its_weights(backbone):
    model = small(backbone=backbone, num_members=1)
    twin = plain_twin(model, backbone=backbone)
    x, _ = batch()
    for training in (False, True):
        model.train(training)
        twin.train(training)
        torch.testing.assert_close(model(x), twin(x), rtol=1e-12, atol=1e-12)


def test_a_generated_resnet18_and_resnet50_equal_plain_ones():
    x, _ = batch(2)
    for backbone in ("resnet18", "resnet50"):
        options = {"backbone": backbone, "num_classes": 4, "image_shape": (3, 8, 8)}
        model = build_model("ps_red", num_members=1, embedding_dim=8, hidden_dim=8, **options).double().eval()
        torch.testing.assert_close(model(x), plain_twin(model, **options).eval()(x), rtol=1e-12, atol=1e-12)


def test_an_embedding_moves_one_block_of_one_layer():
    generator = generator_of(small(num_members=1, backbone="resnet20"))
    before = [weight.clone() for weight in generator()]
    grid = next(grid for grid in generator.grids if grid.rows > 1 and grid.columns > 1 and grid.kernel_size == 3)
    for row in range(grid.rows):
        for column in range(grid.columns):
            unit = grid.first + row * grid.columns + column
            saved = generator.embeddings.detach()[unit].clone()
            with torch.no_grad():
                generator.embeddings[unit] += 1
            changed = [(now != then).detach() for now, then in zip(generator(), before, strict=True)]
            with torch.no_grad():
                generator.embeddings[unit] = saved
            for other, difference in zip(generator.grids, changed, strict=True):
                expected = torch.zeros_like(difference)
                if other.name == grid.name:
                    expected[16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = True
                assert torch.equal(difference, expected)


def test_window_reductions_of_pointwise_kernels():
    weights = {reduction: generator_of(small(num_members=1, reduction=reduction))() for reduction in ("mean", "sum", "max")}
    grids = generator_of(small(num_members=1)).grids
    pointwise = [index for index, grid in enumerate(grids) if grid.kernel_size == 1]
    assert pointwise
    for index, grid in enumerate(grids):
        factor = 9 if grid.kernel_size == 1 else 1
        torch.testing.assert_close(weights["sum"][index], factor * weights["mean"][index], rtol=1e-12, atol=1e-14)
        if grid.kernel_size == 1:
            assert (weights["max"][index] >= weights["mean"][index]).all()


def test_slices_lie_in_an_affine_subspace_of_the_hidden_dimension():
    weights = generator_of(small(num_members=1))()
    blocks = [weight[first : first + 16] for weight in weights if weight.shape[-1] == 3 for first in range(0, len(weight), 16)]
    slices = torch.cat([block.transpose(0, 1).flatten(1) for block in blocks])
    assert slices.shape[1] == 16 * 9
    assert torch.linalg.matrix_rank(slices, rtol=1e-9).item() <= 5 + 1
    assert torch.linalg.matrix_rank(slices[1:] - slices[:1], rtol=1e-9).item() <= 5


def test_generated_weights_start_with_the_variance_of_he(resnet18_member):
    weight = generator_of(resnet18_member)()[1]
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.03)
    flat = generator_of(build_model("ps_red", num_members=1, structure="flat"))()[1]
    assert flat.std().item() == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.03)
    model = build_model("ps_red", num_members=1, equalize_layers=True)
    deep = generator_of(model)()[-1]
    assert deep.std().item() == pytest.approx(math.sqrt(2 / (9 * 512)), rel=0.03)


# T20: when weights are generated.


def test_one_generation_until_the_parameters_change(monkeypatch):
    model = small(num_members=1).eval()
    calls = count_generations(monkeypatch)
    x, y = batch()
    for _ in range(3):
        model(x)
        with torch.no_grad():
            model(x)
        pgd(model, x, y, steps=2)
    assert calls[0] == 1
    before = model(x)
    with torch.no_grad():
        generator_of(model).embeddings.mul_(1.5)
    after = model(x)
    assert calls[0] == 2
    assert not torch.equal(before, after)
    model.train()
    model.eval()
    assert torch.equal(model(x), after)
    assert calls[0] == 3, "a change of mode forgets, in case weights were changed unseen"
    assert torch.equal(model.float().double()(x), model(x))


@pytest.mark.parametrize("kind", ["fused", "foreach", "for-loop", "adam"])
def test_an_optimizer_step_invalidates_the_weights_of_eval_mode(kind):
    model = small(num_members=1).eval()
    x, y = batch()
    if kind == "adam":
        optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), lr=0.1, fused=True)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=kind == "fused", foreach=kind == "foreach")
    before = model(x)
    nn.functional.cross_entropy(before, y).backward()
    optimizer.step()
    after = model(x)
    torch.testing.assert_close(after, plain_twin(model).eval()(x), rtol=1e-11, atol=1e-11)
    assert (after - before).abs().max() > 1e-3


def test_one_generation_per_batch_inside_the_context(monkeypatch):
    model = small(num_members=1).train()
    calls = count_generations(monkeypatch)
    x, y = batch()
    with generated_weights(model, detach=True):
        adversarial = pgd(model, x, y, steps=3)
    assert calls[0] == 1
    with generated_weights(model):
        (model(x).square().mean() + model(adversarial).square().mean()).backward()
    assert calls[0] == 3, "once for the passes, once more for the backward pass"
    assert generator_of(model)._cache is None, "weights as large as the network are not kept between steps"
    for _ in range(2):
        model(x)
    assert calls[0] == 5, "in training mode without the context each pass generates its own"


def test_weights_in_the_detaching_context_carry_no_gradient():
    model = small(num_members=1).train()
    x, _ = batch()
    with generated_weights(model, detach=True):
        model(x).square().mean().backward()
    assert generator_of(model).embeddings.grad is None
    assert model.members[0].network.backbone.conv1.weight.grad is not None


def test_parameters_changed_between_forward_and_backward_are_refused():
    model = small(num_members=1).eval()
    value = model(batch()[0]).square().mean()
    with torch.no_grad():
        generator_of(model).embeddings.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        value.backward()


def test_inference_mode_leaves_no_unusable_weights_behind():
    model = small(num_members=1).eval()
    x, y = batch()
    with torch.inference_mode():
        expected = model(x)
    nn.functional.cross_entropy(model(x), y).backward()
    torch.testing.assert_close(model(x), expected.clone())


# T21: gradients.


@pytest.mark.parametrize("parameters", [{}, {"structure": "flat"}, {"share": "hyper"}, {"reduction": "max", "equalize_layers": True}])
def test_gradients_reach_every_embedding_and_hypernetwork_weight(parameters):
    model = small(**parameters)
    x, y = batch()
    nn.functional.cross_entropy(model.member_logits(x).flatten(0, 1), y.repeat(2)).backward()
    for name, parameter in model.named_parameters():
        if "generator" in name or "hypernetwork" in name:
            assert parameter.grad is not None, name
            assert (parameter.grad.flatten(1) != 0).any(dim=1).all() if "embeddings" in name else parameter.grad.abs().sum() > 0


def test_all_ways_to_generate_have_the_same_first_and_second_gradients():
    x, y = batch()
    results = []
    for way in ("train", "scope", "eval"):
        model = small(num_members=1).train(way != "eval")
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()

        def value(model=model):
            leaf = x.clone().requires_grad_()
            loss = nn.functional.cross_entropy(model(leaf), y)
            (slope,) = torch.autograd.grad(loss, leaf, create_graph=True)
            parameters = list(generator_of(model).parameters())
            first = torch.autograd.grad(loss, parameters, create_graph=True)
            return loss + 100 * slope.square().sum() + sum(part.square().sum() for part in first)

        if way == "scope":
            with generated_weights(model):
                value().backward()
        else:
            value().backward()
        results.append(gradients(model))
    largest = max(slope.abs().max().item() for slope in results[0])
    assert largest_difference(results[0], results[1]) < 1e-12 * largest
    assert largest_difference(results[0], results[2]) < 1e-12 * largest


@pytest.mark.parametrize("share", ["none", "hyper"])
def test_red_trains_generated_members_and_both_computations_agree(share):
    x, y = batch()
    results = []
    for computation in ("cached", "joint"):
        model = small(share=share).train()
        method = objective("red", computation=computation, warmup_epochs=0)
        method.training_step(model, x, y, context(model))
        results.append(gradients(model))
    assert largest_difference(*results) < 1e-10 * max(slope.abs().max().item() for slope in results[0])


# Copies, files, mistakes.


@pytest.mark.parametrize("share", ["none", "hyper"])
def test_copies_and_pickles_are_independent(share):
    model = small(share=share).eval()
    x, _ = batch()
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), expected)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(1.1)
        assert not torch.equal(twin(x), expected)
        assert torch.equal(model(x), expected)
        assert count_parameters(twin) == count_parameters(model)


@pytest.mark.parametrize("share", ["none", "hyper"])
def test_saving_and_loading(tmp_path, share):
    model = small(share=share).float().eval()
    x, _ = batch(dtype=torch.float32)
    loaded = load_pretrained(save_pretrained(model, tmp_path), resample_on_forward=False)
    torch.testing.assert_close(loaded.member_logits(x), model.member_logits(x))


def test_members_with_a_defence_are_generated_too():
    model = build_model("ps_red", num_members=2, member={"name": "ctrw"}, **SMALL)
    assert sum(isinstance(module, GeneratedConv2d) for module in model.modules()) == 2 * 8
    assert model(batch(dtype=torch.float32)[0]).isfinite().all()


def test_autocast_does_not_reach_the_generated_weights():
    model = small(num_members=1).float().eval()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert generator_of(model)()[0].dtype == torch.float32
        assert model(batch(dtype=torch.float32)[0]).isfinite().all()


def test_mistakes_are_explained():
    with pytest.raises(UserError, match="no multiples of unit_channels 24"):
        build_model("ps_red", unit_channels=24, **SMALL)
    with pytest.raises(UserError, match="structure"):
        build_model("ps_red", structure="hah", **SMALL)
    with pytest.raises(RuntimeError, match="inside its GeneratedNetwork"):
        GeneratedConv2d(nn.Conv2d(3, 3, 3))(batch()[0])
