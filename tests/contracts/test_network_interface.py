"""What every network promises to whoever feeds it: images of another shape are refused, and `torch.export` gives a graph of it."""

from __future__ import annotations

import pytest
import torch

from models.ensemble import Ensemble
from models.errors import UserError
from models.randomness import ResampleOnForward, is_randomized
from tests.contracts.cases import IMAGE_SHAPE, build_case, case_names, images

QUICKLY_EXPORTED = ("at", "ctrw", "dcs", "rna", "single_normalization")


@pytest.mark.parametrize("name", case_names())
def test_images_of_another_shape_are_refused_with_the_expected_one(name):
    """One channel, or one pixel, would otherwise be broadcast to a whole image and answered."""
    model = build_case(name)
    channels, height, width = IMAGE_SHAPE
    for shape in (
        (2, 1, height, width),
        (2, channels, 1, 1),
        (2, channels, height, width + 1),
        IMAGE_SHAPE,
        (2, channels * height * width),
    ):
        for network in (model, ResampleOnForward(model)) if is_randomized(model) else (model,):
            with pytest.raises(UserError, match=rf"\(B, {channels}, {height}, {width}\)") as caught, torch.no_grad():
                network(torch.rand(shape))
            assert str(shape) in str(caught.value) or isinstance(model, Ensemble)
    with torch.no_grad():
        assert len(model(images(1))) == 1


@pytest.mark.parametrize(
    "name", [name if name in QUICKLY_EXPORTED else pytest.param(name, marks=pytest.mark.slow) for name in case_names()]
)
def test_an_exported_graph_answers_as_the_network_under_its_draw(name):
    model = build_case(name)
    if getattr(model, "inference", "") == "rsi_sample":
        pytest.skip("which member answers is decided on the host, outside any graph")
    x = images()
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},) if name in QUICKLY_EXPORTED else None)
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(x), model(x), rtol=1e-3, atol=1e-4)
        if name in QUICKLY_EXPORTED:
            torch.testing.assert_close(exported.module()(x[:2]), model(x[:2]), rtol=1e-3, atol=1e-4)
