"""What every randomized model promises: a suite that a defence inherits, ours and those of plug-ins (see `rayndom.testing`)."""

from __future__ import annotations

import copy
import math
import pickle
import random

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from models.randomness import (
    ResampleOnForward,
    frozen,
    load_randomness_state,
    num_configurations,
    random_sites,
    randomness_state,
    resample,
    seed_streams,
    seeded,
    set_configuration,
)
from rayndom.testing.cases import build_case, images, labels


def different_draw(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return the output under a draw that differs from the current one: small spaces repeat, so a few are tried."""
    before = model(x)
    for _ in range(30):
        resample(model)
        after = model(x)
        if not torch.equal(before, after):
            return after
    pytest.fail("thirty draws gave the same output")


class RandomnessContract:
    """Draws come from streams alone, are held, copied, stored and taken again, and differ. Parametrized with `name`, a case of
    `rayndom.testing.cases`."""

    @pytest.fixture
    def model(self, name):
        """The model of the case, in eval mode."""
        return build_case(name)

    @torch.no_grad()
    def test_same_seed_gives_the_same_output(self, model, name):
        x = images()
        outputs = []
        for _ in range(2):
            seed_streams(model, 7)
            resample(model)
            outputs.append(model(x))
        assert torch.equal(*outputs)
        twin = build_case(name)
        seed_streams(twin, 7)
        resample(twin)
        assert torch.equal(twin(x), outputs[0])

    @torch.no_grad()
    def test_forward_never_draws_and_another_draw_gives_another_output(self, model, name):
        x = images()
        first = model(x)
        assert torch.equal(model(x), first)
        other = different_draw(model, x)
        assert torch.equal(model(x), other)

    @torch.no_grad()
    def test_frozen_is_constant_also_through_an_exception(self, model, name):
        x = images()
        before = model(x)

        def inside():
            with frozen(model):
                resample(model)
                assert torch.equal(model(x), before)
                raise RuntimeError("inside")

        with pytest.raises(RuntimeError, match="inside"):
            inside()
        assert torch.equal(model(x), before)
        different_draw(model, x)

    @torch.no_grad()
    def test_a_copy_made_while_frozen_is_not_frozen(self, model, name):
        x = images()
        with frozen(model):
            twin = copy.deepcopy(model)
        different_draw(twin, x)

    @torch.no_grad()
    def test_seeded_leaves_no_trace_and_determines_what_happens_inside(self, model, name):
        x = images()
        reference = copy.deepcopy(model)
        inside = []
        for seed in (3, 3, 4):
            with seeded(model, seed):
                drawn = [model(x)]
                for _ in range(12):
                    resample(model)
                    drawn.append(model(x))
                inside.append(torch.stack(drawn))
        assert torch.equal(inside[0], inside[1])
        assert not torch.equal(inside[0], inside[2])
        assert torch.equal(model(x), reference(x))
        resample(model)
        resample(reference)
        assert torch.equal(model(x), reference(x)), "the outer stream must go on unchanged"

    @torch.no_grad()
    def test_training_flag_does_not_touch_the_draw(self, model, name):
        before = {site: state["draw"] for site, state in randomness_state(model).items()}
        model.train()
        model.eval()
        after = {site: state["draw"] for site, state in randomness_state(model).items()}
        for site in before:
            for buffer in before[site]["buffers"]:
                assert torch.equal(before[site]["buffers"][buffer], after[site]["buffers"][buffer])
        x = images()
        outputs = [model(x)]
        for _ in range(20):
            resample(model)
            outputs.append(model(x))
        assert any(not torch.equal(outputs[0], other) for other in outputs[1:]), "random in eval mode too"

    @torch.no_grad()
    def test_global_generators_have_no_effect_and_are_not_consumed(self, model, name):
        x = images()
        outputs = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            random.seed(seed)
            state = torch.get_rng_state()
            seed_streams(model, 5)
            resample(model)
            outputs.append(model(x))
            assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(*outputs)

    def test_gradients_reach_the_input_and_the_parameters_under_a_frozen_draw(self, model, name):
        x = images().requires_grad_(True)
        model.train()
        with frozen(model):
            torch.nn.functional.cross_entropy(model(x), labels()).backward()
        assert x.grad is not None
        assert x.grad.abs().sum() > 0
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.grad is not None]
        assert sum((parameter.grad != 0).any().item() for parameter in trained) > 3

    @torch.no_grad()
    def test_deepcopy_and_pickle_keep_draw_and_stream(self, model, name):
        x = images()
        resample(model)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            reference = copy.deepcopy(model)
            assert torch.equal(twin(x), reference(x))
            for _ in range(3):
                resample(twin)
                resample(reference)
                assert torch.equal(twin(x), reference(x))

    @torch.no_grad()
    def test_state_round_trip(self, model, name):
        x = images()
        resample(model)
        state = randomness_state(model)
        output = model(x)
        following = []
        for _ in range(3):
            resample(model)
            following.append(model(x))
        load_randomness_state(model, state)
        assert torch.equal(model(x), output)
        for expected in following:
            resample(model)
            assert torch.equal(model(x), expected)

    def test_draws_are_not_weights(self, model, name):
        weights = model.state_dict().keys()
        for site_name, site in random_sites(model):
            for draw in site.draw_names:
                assert f"{site_name}.{draw}".lstrip(".") not in weights

    def test_recomputation_sees_the_same_draw(self, model, name):
        x = images().requires_grad_(True)
        plain = torch.autograd.grad(model(x).square().sum(), x)[0]
        recomputed = torch.autograd.grad(checkpoint(model, x, use_reentrant=False).square().sum(), x)[0]
        assert torch.equal(plain, recomputed)

    @torch.no_grad()
    def test_resample_on_forward_redraws_at_each_call(self, model, name):
        x = images()
        wrapped = ResampleOnForward(model, seed=3)
        outputs = [wrapped(x) for _ in range(20)]
        assert any(not torch.equal(outputs[0], other) for other in outputs[1:])
        again = ResampleOnForward(model, seed=3)
        assert all(torch.equal(again(x), expected) for expected in outputs)

    @torch.no_grad()
    def test_a_draw_does_not_depend_on_the_batch_size(self, model, name):
        x = images(6)
        whole = model(x)[:2]
        # Relative to the largest logit: generated weights of an untrained network make logits of about a hundred.
        assert torch.allclose(whole, model(x[:2]), rtol=0, atol=1e-5 * max(1.0, float(whole.abs().max())))

    @torch.no_grad()
    def test_an_explicit_generator_is_the_only_source(self, model, name):
        x = images()
        outputs = []
        for start in (1, 2):
            seed_streams(model, start)
            generator = torch.Generator().manual_seed(11)
            drawn = []
            for _ in range(5):
                resample(model, generator)
                drawn.append(model(x))
            outputs.append(torch.stack(drawn))
        assert torch.equal(*outputs)

    @torch.no_grad()
    def test_configurations_can_be_enumerated_where_they_are_finite(self, model, name):
        count = num_configurations(model)
        if count == math.inf:
            with pytest.raises(TypeError, match="infinitely many"):
                set_configuration(model, 0)
            return
        x = images()
        shown = min(count, 6)
        outputs = []
        for index in range(shown):
            set_configuration(model, index)
            outputs.append(model(x))
            set_configuration(model, index)
            assert torch.equal(model(x), outputs[-1])
        assert any(not torch.equal(outputs[0], other) for other in outputs[1:])
        with pytest.raises(IndexError):
            set_configuration(model, count)
