"""Models that an earlier version exported still open and compute what they computed."""

from __future__ import annotations

import json
import keyword

import pytest
import torch
from safetensors.torch import save_file

from models.randomness import load_randomness_state, randomness_state
from models.registry import build_model
from models.weights import load_pretrained, save_pretrained

SMALL = {"backbone": "wrn16_4", "image_shape": (3, 8, 8), "num_classes": 4}
EVERYWHERE = {"normalization": "gn", "num_groups": 8, "last_normalization": "replaced"}


def without(value, name):
    """Return nested JSON without the keys called `name`."""
    if isinstance(value, dict):
        return {key: without(item, name) for key, item in value.items() if key != name}
    return [without(item, name) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    ("defence", "parameters"),
    [
        ("single_normalization", EVERYWHERE),
        ("stacked", {"defences": [{"name": "single_normalization", **EVERYWHERE}, {"name": "ctrw"}]}),
        ("red", {"num_members": 1, "member": {"name": "single_normalization", **EVERYWHERE}}),
    ],
)
def test_networks_whose_last_normalization_was_replaced(defence, parameters, tmp_path):
    model = build_model(defence, **SMALL, **parameters).eval()
    folder = save_pretrained(model, tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps(without(json.loads(path.read_text()), "last_normalization")))
    loaded = load_pretrained(folder, resample_on_forward=False)
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for module in (model, loaded):
        for child in module.modules():
            if hasattr(child, "sigma"):
                child.sigma.data.zero_()
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


def test_weights_whose_names_held_a_word_of_python(tmp_path):
    """RNA's instance normalization was `branches.in` in weights and resumable states; `in` cannot stand in an exported graph."""
    model = build_model("rna", backbone="resnet8", image_shape=(3, 8, 8), num_classes=4, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    state = model.state_dict()
    old = {name.replace("branches.in_.", "branches.in."): value for name, value in state.items()}
    assert "backbone.bn1.branches.in.weight" in old
    assert not any(keyword.iskeyword(part) for name in state for part in name.split("."))
    given = dict(old)
    fresh = build_model("rna", backbone="resnet8", image_shape=(3, 8, 8), num_classes=4)
    fresh.load_state_dict(old, strict=True)
    assert old.keys() == given.keys(), "the caller's dictionary stays as it was"
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, state[name]), name
    folder = save_pretrained(model, tmp_path)
    save_file({name: value.contiguous() for name, value in old.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    del config["weights_sha256"]  # which versions of that time did not write
    (folder / "config.json").write_text(json.dumps(config))
    loaded = load_pretrained(folder, resample_on_forward=False)
    load_randomness_state(loaded, randomness_state(model))
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded(x), model.eval()(x))
    site = fresh.backbone.bn1
    assert site.branches["in"] is site.branches.get_submodule("in_")
    assert "in" in site.branches
