"""Randomness as one abstraction: draws, streams and redraws.

A *draw* is one concrete set of random values. A *stream* is a seeded sequence of draws. A *site* is a module that holds a draw.
`forward` of every model is a deterministic function of (input, parameters, current draw): it never draws. New draws are taken by
`resample`. Draws live in non-persistent buffers, so they are in no checkpoint's weights, and neither `.training`, nor the global
random number generators, nor copying or pickling a model has any influence on them.

How a draw comes about: a stream of seed s yields at position k the 63-bit key mix(s, k); the site draws from a private
`torch.Generator` seeded with that key, always on the CPU, so that a GPU sees the same draw; it receives those of all sites in one copy.
The state of a stream is therefore two integers, and sites whose `stream_name` agrees make the same choice.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from models.draw_transfer import destination, send, sent_together
from models.host_mirror import UNKNOWN, HostMirror
from models.profiling import timed

DrawScope = Literal["global", "per_rank", "per_example"]

_KEY_BITS = 63
_EXAMPLE_ROWS = 64  # rows of per-example values are made in blocks of this many, so that row b does not depend on the batch size


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on all `parts` and their order; different parts give independent seeds."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


class Stream:
    """A seeded sequence of draws; its whole state is `(seed, position)`."""

    __slots__ = ("position", "seed")

    def __init__(self, seed: int, position: int = 0) -> None:
        self.seed = seed
        self.position = position

    def next_key(self) -> int:
        """Return the key of the next draw and step on."""
        key = derive_seed(self.seed, self.position)
        self.position += 1
        return key

    def next_generator(self) -> torch.Generator:
        """Return a fresh private generator for the next draw and step on."""
        return _generator(self.next_key())

    def __repr__(self) -> str:
        return f"Stream(seed={self.seed}, position={self.position})"


class RandomModule(nn.Module, ABC):
    """A random site: a module that holds one draw. Layers derive from it.

    A subclass registers its values by `register_draw`, implements `draw(generator)` which replaces them by `set_draw`, states
    `num_configurations`, and takes a first draw with `self.take_first_draw()` at the end of its constructor.

    Args:
        draw_scope: `global`: every rank of a distributed run holds the same draw (what the official codes do);
            `per_rank`: each rank its own; `per_example`: each example of a batch its own (implies per rank).
    """

    def __init__(self, draw_scope: DrawScope = "global") -> None:
        super().__init__()
        self.draw_scope: DrawScope = draw_scope
        self.stream = Stream(0)
        self.stream_name: str | None = None
        self.draw_key = 0
        self._on_host: dict[str, HostMirror] = {}

    @property
    @abstractmethod
    def num_configurations(self) -> int | float:
        """Size of the space of draws of this site; `math.inf` for a continuum."""

    @abstractmethod
    def draw(self, generator: torch.Generator) -> None:
        """Replace the draw by a new one taken from `generator`, a CPU generator used for nothing else."""

    def draw_after_attack(self, generator: torch.Generator) -> None:
        """Draw for a training step whose attack used the current draw. Independent of it unless a method says otherwise."""
        self.draw(generator)

    def set_configuration(self, index: int) -> None:
        """Set the draw to configuration `index` in [0, num_configurations). Only for finite spaces."""
        raise TypeError(f"{type(self).__name__} has infinitely many configurations; they cannot be enumerated")

    def configuration_probability(self, index: int) -> float | None:
        """Return the probability with which a draw is configuration `index` in [0, num_configurations); None: it is not known.

        Where every site knows it, expectations over a small space of draws are computed exactly, by enumeration; else they are estimated
        from draws. An enumeration is checked against draws (C17), so a wrong probability is found.
        """
        del index
        return None

    def distance(self, first: dict[str, Any], second: dict[str, Any]) -> float:
        """Return how far apart two draws of this site are, given as `draw_state` returns them: 0 where they are equal.

        1 where they differ, unless a layer has a measure of its own; draws per example count with the mean over the examples.
        """
        mine, others = first["buffers"], second["buffers"]
        return float(any(not torch.equal(mine[name], others[name]) for name in mine))

    def register_draw(self, name: str, value: Tensor) -> None:
        """Register a buffer that holds (part of) the draw: it moves with the module and is in no state dict."""
        self.register_buffer(name, value, persistent=False)
        self._on_host[name] = HostMirror()

    def set_draw(self, name: str, value: Tensor, on_host: Any = UNKNOWN) -> None:
        """Replace a draw buffer. The tensor is exchanged, not overwritten: graphs built on the old draw stay valid.

        Args:
            on_host: what `draw_on_host(name)` is to return, where it is known without asking the device.
        """
        old, key = getattr(self, name), (id(self), name)
        dtype = old.dtype if old.is_floating_point() else None
        # A draw taken, or restored, inside inference_mode must still serve a gradient afterwards.
        with torch.inference_mode(False):
            value = value.clone() if value.is_inference() else value
            value = value if dtype is None else value.to(dtype)
            value = send(key, value, destination(key, old), lambda sent: self._arrived(name, sent))
            setattr(self, name, value)
        if on_host is not UNKNOWN:
            self._on_host[name].remember(value, on_host)

    def _arrived(self, name: str, sent: Tensor) -> None:
        mirror, waiting = self._on_host[name], getattr(self, name)
        known = mirror.knows(waiting)
        setattr(self, name, sent)
        if known:
            mirror.remember(sent, mirror.read(waiting))

    def draw_on_host(self, name: str) -> Any:
        """Return a draw buffer's value for Python: what `set_draw` was told, else its numbers, for which the device is waited for once."""
        return self._on_host[name].read(getattr(self, name))

    def knows_on_host(self, name: str) -> bool:
        """Return whether `draw_on_host(name)` needs no device."""
        return self._on_host[name].knows(getattr(self, name))

    def take_first_draw(self) -> None:
        """Give a newly built site a valid draw (that of seed 0)."""
        self._draw_from_key(self.stream.next_key(), after_attack=False)

    def _draw_from_key(self, key: int, *, after_attack: bool) -> None:
        self.draw_key = key
        generator = _generator(key)
        with torch.no_grad():
            if after_attack:
                self.draw_after_attack(generator)
            else:
                self.draw(generator)

    def draw_state(self) -> dict[str, Any]:
        """Return the current draw as copies: its buffers, what is known of them on the host, and its key."""
        return {
            "key": self.draw_key,
            "buffers": {name: getattr(self, name).detach().clone() for name in self._on_host},
            "on_host": {name: self.draw_on_host(name) for name in self._on_host if self.knows_on_host(name)},
        }

    def load_draw_state(self, state: dict[str, Any]) -> None:
        """Restore a draw from `draw_state`."""
        self.draw_key = state["key"]
        for name in self._on_host:
            self.set_draw(name, state["buffers"][name].clone(), on_host=state["on_host"].get(name, UNKNOWN))

    @property
    def draw_names(self) -> tuple[str, ...]:
        """Names of the buffers that hold the draw."""
        return tuple(self._on_host)


def random_sites(model: nn.Module) -> Iterator[tuple[str, RandomModule]]:
    """Yield `(dotted name, site)` of every random site of `model`, in module order."""
    for name, module in model.named_modules():
        if isinstance(module, RandomModule):
            yield name, module


def is_randomized(model: nn.Module) -> bool:
    """Return whether `model` has more than one configuration."""
    return num_configurations(model) > 1


# Kept outside the modules, so that a copy made inside `frozen` is not frozen for ever.
_frozen_depth: WeakKeyDictionary[RandomModule, int] = WeakKeyDictionary()


def resample(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Take one new draw at every random site of `model`.

    Args:
        model: any module; one without random sites is left as it is.
        generator: source of the new draw. None: the model's own streams, which `seed_streams` seeds. Never the global generator.

    Inside `frozen(model)` this does nothing.
    """
    _resample(model, generator, after_attack=False)


def resample_after_attack(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Take the draw of a training step, given that the current draw was attacked.

    The same as `resample`, except for methods that condition the one on the other (GSAT draws from the taps that the attack
    did not use).
    """
    _resample(model, generator, after_attack=True)


@timed("draws")
def _resample(model: nn.Module, generator: torch.Generator | None, *, after_attack: bool) -> None:
    keys: dict[str, int] = {}
    with sent_together():
        for name, site in random_sites(model):
            if _frozen_depth.get(site):
                continue
            if generator is None:
                key = site.stream.next_key()
            else:
                group = site.stream_name or name
                if group not in keys:
                    keys[group] = _key_from(generator)
                key = keys[group]
            site._draw_from_key(key, after_attack=after_attack)


def seed_streams(model: nn.Module, seed: int, rank: int = 0) -> None:
    """Seed the streams of every site of `model` and take a first draw.

    Args:
        seed: any integer; each site's stream depends on it and on the site's name.
        rank: rank of this process. Sites of scope `global` ignore it, so that all ranks hold the same draw.
    """
    for name, site in random_sites(model):
        parts: list[int | str] = [seed, site.stream_name or name]
        if site.draw_scope != "global":
            parts.append(rank)
        site.stream = Stream(derive_seed(*parts))
    resample(model)


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within, no site of `model` redraws; the draw before is in place afterwards, also after an exception."""
    sites = [site for _, site in random_sites(model)]
    states = [site.draw_state() for site in sites]
    for site in sites:
        _frozen_depth[site] = _frozen_depth.get(site, 0) + 1
    try:
        yield
    finally:
        with sent_together():
            for site, state in zip(sites, states, strict=True):
                _frozen_depth[site] -= 1
                site.load_draw_state(state)


@contextlib.contextmanager
def seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """Within, draws come from `seed`, beginning with the one in place on entry; afterwards draw and streams are as before."""
    state = randomness_state(model)
    try:
        seed_streams(model, seed)
        yield
    finally:
        load_randomness_state(model, state)


class ResampleOnForward(nn.Module):
    """A model that takes a new draw at each call: for attack libraries, deployment and export.

    Args:
        model: the randomized model; its modes, parameters and buffers stay reachable through this module.
        seed: seed of the draws; None: the model's own streams.
    """

    def __init__(self, model: nn.Module, seed: int | None = None) -> None:
        super().__init__()
        self.model = model
        self.stream = None if seed is None else Stream(seed)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        resample(self.model, None if self.stream is None else self.stream.next_generator())
        return self.model(x, *args, **kwargs)


def num_configurations(model: nn.Module) -> int | float:
    """Return the size of the space of draws: 1 for a deterministic model, `math.inf` for a continuum, an exact int otherwise.

    Sites that share a stream choose together and count once.
    """
    counts: dict[str, int | float] = {}
    for name, site in random_sites(model):
        counts[site.stream_name or name] = site.num_configurations
    if any(count == math.inf for count in counts.values()):
        return math.inf
    return math.prod(int(count) for count in counts.values())


def set_configuration(model: nn.Module, index: int) -> None:
    """Set the draw of a model with a finite space of draws to configuration `index`.

    Raises:
        TypeError: some site has infinitely many configurations.
        IndexError: `index` is outside [0, num_configurations(model)).
    """
    total = num_configurations(model)
    if not 0 <= index < total:
        raise IndexError(f"configuration {index} is outside [0, {total})")
    digits: dict[str, int] = {}
    with sent_together():
        for name, site in random_sites(model):
            group = site.stream_name or name
            if group not in digits:
                if site.num_configurations == math.inf:
                    site.set_configuration(index)  # raises the explanation
                index, digits[group] = divmod(index, int(site.num_configurations))
            site.set_configuration(digits[group])


def randomness_state(model: nn.Module) -> dict[str, Any]:
    """Return draws and streams of all sites: what a resumable state needs beside the weights."""
    return {
        name: {"seed": site.stream.seed, "position": site.stream.position, "draw": site.draw_state()} for name, site in random_sites(model)
    }


def load_randomness_state(model: nn.Module, state: dict[str, Any]) -> None:
    """Restore what `randomness_state` returned.

    Raises:
        KeyError: the model's random sites are not those of the state.
    """
    sites = dict(random_sites(model))
    if sites.keys() != state.keys():
        raise KeyError(f"random sites differ: model has {sorted(sites)}, state has {sorted(state)}")
    with sent_together():
        for name, site in sites.items():
            entry = state[name]
            site.stream = Stream(entry["seed"], entry["position"])
            site.load_draw_state(entry["draw"])


def rows_held_by_both(first: dict[str, Any], second: dict[str, Any], rows: str, shared: str) -> tuple[Tensor, Tensor]:
    """Return what two draw states hold for the examples that both of them know, or for the whole batch.

    Args:
        rows: buffer with a value per example, if the site has one. shared: buffer with the value that a batch shares.
    """
    mine, others = first["buffers"], second["buffers"]
    if rows not in mine:
        return mine[shared], others[shared]
    count = min(len(mine[rows]), len(others[rows]))
    return mine[rows][:count], others[rows][:count]


def draw_buffer_names(model: nn.Module) -> list[str]:
    """Return the dotted names of all draw buffers: what a distributed wrapper must not broadcast."""
    return [f"{name}.{draw}" if name else draw for name, site in random_sites(model) for draw in site.draw_names]


def per_example_rows(key: int, num_examples: int, make_block: Any) -> Tensor:
    """Return values of `num_examples` rows that depend on `key` and the row alone.

    Args:
        key: the draw's key.
        num_examples: B.
        make_block: `(generator, rows) -> tensor` of shape (rows, ...), called for blocks of a fixed number of rows.
    """
    with torch.inference_mode(False), torch.no_grad():
        blocks = [
            make_block(_generator(derive_seed(key, block)), _EXAMPLE_ROWS)
            for block in range((num_examples + _EXAMPLE_ROWS - 1) // _EXAMPLE_ROWS)
        ]
        return torch.cat(blocks)[:num_examples]


def _generator(key: int) -> torch.Generator:
    generator = torch.Generator()
    generator.manual_seed(key)
    return generator


def _key_from(generator: torch.Generator) -> int:
    high = torch.randint(0, 2**31, (2,), generator=generator, device=generator.device).tolist()
    return (high[0] << 31 | high[1]) & (2**_KEY_BITS - 1)
