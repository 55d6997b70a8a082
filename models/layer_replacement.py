"""Replace layers of a finished network by rule or by name: how a defence puts its random layers into a backbone.

Every function works in place on the tree below `root` and addresses a module by its dotted name, as
`torch.nn.Module.named_modules` spells it. The root itself cannot be replaced: only its owner holds the reference to it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from models.errors import UserError, nearest

ModulePredicate = Callable[[str, nn.Module], bool]
ModuleFactory = Callable[[str, nn.Module], nn.Module]


@dataclass(frozen=True)
class OfType:
    """A predicate that accepts modules of the given classes, subclasses included, and can say so in an error."""

    types: tuple[type[nn.Module], ...]

    def __call__(self, name: str, module: nn.Module) -> bool:
        return isinstance(module, self.types)

    def __str__(self) -> str:
        return "modules of type " + " or ".join(kind.__name__ for kind in self.types)


def of_type(*types: type[nn.Module]) -> OfType:
    """Return the predicate "is an instance of one of `types`" for `replace_modules`."""
    return OfType(types)


def get_module(root: nn.Module, name: str) -> nn.Module:
    """Return the module at the dotted `name` below `root`.

    Raises:
        UserError: there is no module of that name; the message holds the nearest names.
    """
    if name:
        try:
            return root.get_submodule(name)
        except AttributeError:
            pass  # the message of PyTorch names no neighbours; ours does
    names = [candidate for candidate, _ in root.named_modules() if candidate]
    close = nearest(name, names) if name else []
    hint = f" Did you mean {' or '.join(repr(candidate) for candidate in close)}?" if close else ""
    raise UserError(f"{type(root).__name__} has no layer {name!r}.{hint} It holds {_inventory(root)}.")


def set_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where the dotted `name` below `root` stands now; the order of registration does not change.

    Raises:
        UserError: nothing stands at `name` yet.
    """
    get_module(root, name)
    parent_name, _, child_name = name.rpartition(".")
    parent = root.get_submodule(parent_name)
    parent.register_module(child_name, module)


def replace_modules(root: nn.Module, predicate: ModulePredicate, factory: ModuleFactory) -> list[str]:
    """Replace every module below `root` that `predicate(name, module)` accepts by `factory(name, module)`.

    The factory gets the old module and decides what to keep of it: weights, shapes, the module itself inside a wrapper.
    The walk goes in the order of registration and never descends into a module that is replaced, nor into its
    replacement. A module that stands at several places and is accepted there is replaced once and stays shared. The new
    module takes over the old one's train or eval mode. All new modules are built before the first one is put in place,
    so a factory that fails leaves `root` as it was.

    Returns:
        The dotted names of the replaced modules, in the order of registration.

    Raises:
        UserError: the predicate accepted nothing.
    """
    matches = list(_matches(root, predicate, prefix="", visited={id(root)}))
    if not matches:
        raise UserError(f"no layer to replace in {type(root).__name__}: looked for {_describe(predicate)}; it holds {_inventory(root)}.")
    _replace(root, matches, factory)
    return [name for name, _ in matches]


def replace_named(root: nn.Module, names: Iterable[str], factory: ModuleFactory) -> list[str]:
    """Replace the modules at the dotted `names` below `root` by `factory(name, module)`; all of them or none.

    Returns:
        The names, in the order given.

    Raises:
        UserError: no name was given, one does not exist, is given twice or lies inside another one.
    """
    chosen = list(names)
    if not chosen:
        raise UserError(f"no layer to replace in {type(root).__name__}: the list of names is empty.")
    for name, count in Counter(chosen).items():
        if count > 1:
            raise UserError(f"layer {name!r} is named {count} times; name each layer to replace once.")
        inside = next((other for other in chosen if name.startswith(f"{other}.")), None)
        if inside is not None:
            raise UserError(f"layer {name!r} lies inside {inside!r}, which is to be replaced as well; name one of the two.")
    _replace(root, [(name, get_module(root, name)) for name in chosen], factory)
    return chosen


def plain_convolution(name: str, module: nn.Module) -> nn.Conv2d:
    """Return the module called `name` if it is a plain convolution with zero padding, in whose place another layer loses nothing.

    Raises:
        UserError: it is another class, which adds something of its own (padding by size, standardized weights), or pads otherwise.
    """
    if type(module) is not nn.Conv2d:
        raise UserError(f"layer {name} is a {_kind(module)}, not a plain Conv2d: a layer in its place would lose what it adds")
    if module.padding_mode != "zeros":
        raise UserError(f"layer {name} pads by {module.padding_mode!r}; a layer in its place pads with zeros")
    return module


def plain_batch_norm(name: str, module: nn.Module) -> nn.BatchNorm2d:
    """Return the module called `name` if it is a plain batch normalization, in whose place another layer loses nothing.

    Raises:
        UserError: it is another class, which adds something of its own, or lacks affine parameters, running statistics or a momentum.
    """
    if type(module) is not nn.BatchNorm2d:
        raise UserError(f"layer {name} is a {_kind(module)}, not a plain BatchNorm2d: a layer in its place would lose what it adds")
    if not module.affine or not module.track_running_stats or module.momentum is None:
        raise UserError(f"layer {name} has no affine parameters, running statistics or momentum, and a layer in its place would")
    return module


def _kind(module: nn.Module) -> str:
    package = type(module).__module__.partition(".")[0]
    return f"{type(module).__name__} of {package}"


def _matches(parent: nn.Module, predicate: ModulePredicate, prefix: str, visited: set[int]) -> Iterator[tuple[str, nn.Module]]:
    for child_name, child in parent._modules.items():
        if child is None:
            continue
        name = f"{prefix}{child_name}"
        if predicate(name, child):
            yield name, child
        elif id(child) not in visited:
            visited.add(id(child))
            yield from _matches(child, predicate, f"{name}.", visited)


def _replace(root: nn.Module, matches: list[tuple[str, nn.Module]], factory: ModuleFactory) -> None:
    replacements: dict[int, nn.Module] = {}
    for name, old in matches:
        if id(old) not in replacements:
            new = factory(name, old)
            if new.training != old.training:
                new.train(old.training)
            replacements[id(old)] = new
    for name, old in matches:
        set_module(root, name, replacements[id(old)])


def _describe(predicate: ModulePredicate) -> str:
    if isinstance(predicate, OfType):
        return str(predicate)
    return f"modules that {getattr(predicate, '__qualname__', repr(predicate))} accepts"


def _inventory(root: nn.Module) -> str:
    leaves = (module for module in root.modules() if module is not root and not module._modules)
    kinds = Counter(type(leaf).__name__ for leaf in leaves)
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()) or "no layers"
