"""Replacing layers by rule and by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models.errors import UserError
from models.layer_replacement import get_module, of_type, replace_modules, replace_named, set_module


class Doubled(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.inner(x)


def small_network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(3, 3),
        nn.ReLU(),
        nn.ModuleDict({"a": nn.Sequential(nn.Linear(3, 3), nn.ReLU()), "b": nn.ReLU()}),
    )


def wrap(name: str, module: nn.Module) -> nn.Module:
    return Doubled(module)


def test_every_match_is_replaced_in_place_and_in_order() -> None:
    root = small_network()
    old = get_module(root, "2.a.1")
    seen = []

    def factory(name: str, module: nn.Module) -> nn.Module:
        seen.append((name, module))
        return nn.Softplus()

    assert replace_modules(root, of_type(nn.ReLU), factory) == ["1", "2.a.1", "2.b"]
    assert [name for name, _ in seen] == ["1", "2.a.1", "2.b"]
    assert seen[1][1] is old, "the factory gets the old module and can keep its weights"
    assert [type(get_module(root, name)) for name in ("1", "2.a.1", "2.b")] == [nn.Softplus] * 3
    assert list(root._modules) == ["0", "1", "2"]


def test_rule_sees_the_name() -> None:
    root = small_network()
    assert replace_modules(root, lambda name, module: name.startswith("2.") and name.endswith("0"), wrap) == ["2.a.0"]
    assert isinstance(get_module(root, "2.a.0.inner"), nn.Linear)


def test_a_replaced_module_is_not_entered() -> None:
    root = small_network()
    rule = of_type(nn.Sequential, nn.ReLU)
    assert replace_modules(root, rule, wrap) == ["1", "2.a", "2.b"]
    assert isinstance(get_module(root, "2.a.inner.1"), nn.ReLU), "layers inside a replacement stay as they are"


def test_weights_and_function_survive_a_wrapper() -> None:
    root = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    x = torch.randn(4, 3)
    expected = root[1](2 * root[0](x))
    replace_named(root, ["0"], wrap)
    assert torch.equal(root(x), expected)


def test_a_shared_module_stays_shared() -> None:
    shared = nn.ReLU()
    root = nn.Sequential(shared, nn.Linear(3, 3), shared)
    calls = []

    def factory(name: str, module: nn.Module) -> nn.Module:
        calls.append(name)
        return nn.Softplus()

    assert replace_modules(root, of_type(nn.ReLU), factory) == ["0", "2"]
    assert root[0] is root[2]
    assert calls == ["0"]


def test_replacements_take_over_the_mode() -> None:
    root = small_network().eval()
    replace_modules(root, of_type(nn.ReLU), lambda name, module: nn.Dropout(0.5))
    assert not any(module.training for module in root.modules())


def test_no_match_says_what_was_looked_for_and_what_is_there() -> None:
    with pytest.raises(UserError, match=r"in Sequential: looked for modules of type BatchNorm2d; it holds 3 ReLU, 2 Lin"):
        replace_modules(small_network(), of_type(nn.BatchNorm2d), wrap)

    def is_stem(name: str, module: nn.Module) -> bool:
        return name == "stem"

    with pytest.raises(UserError, match="is_stem accepts"):
        replace_modules(small_network(), is_stem, wrap)


def test_a_factory_that_fails_changes_nothing() -> None:
    root = small_network()
    before = [id(module) for module in root.modules()]

    def factory(name: str, module: nn.Module) -> nn.Module:
        if name == "2.b":
            raise ZeroDivisionError
        return nn.Softplus()

    with pytest.raises(ZeroDivisionError):
        replace_modules(root, of_type(nn.ReLU), factory)
    assert [id(module) for module in root.modules()] == before


def test_names_find_and_set_modules() -> None:
    root = small_network()
    new = nn.Tanh()
    set_module(root, "2.a.1", new)
    assert get_module(root, "2.a.1") is new
    assert list(root[2]["a"]._modules) == ["0", "1"]
    with pytest.raises(UserError, match=r"Sequential has no layer '2\.a\.2'\. Did you mean '2\.a\.[01]'"):
        set_module(root, "2.a.2", nn.Tanh())
    for name in ("", "2.weight", "0.weight"):
        with pytest.raises(UserError, match="has no layer"):
            get_module(root, name)


def test_named_replacement_is_checked_before_anything_changes() -> None:
    root = small_network()
    assert replace_named(root, ["2.b", "0"], wrap) == ["2.b", "0"]
    assert isinstance(root[0], Doubled)
    with pytest.raises(UserError, match="the list of names is empty"):
        replace_named(root, [], wrap)
    with pytest.raises(UserError, match="'1' is named 2 times"):
        replace_named(root, ["1", "1"], wrap)
    with pytest.raises(UserError, match=r"'2\.a\.0' lies inside '2'"):
        replace_named(root, ["2.a.0", "2"], wrap)
    with pytest.raises(UserError, match="has no layer '3'"):
        replace_named(root, ["1", "3"], wrap)
    assert isinstance(root[1], nn.ReLU)
