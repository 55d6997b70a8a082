"""A pretend accelerator: a device named `pretend` whose tensors are computed on the CPU, so that device paths run without a GPU.

PyTorch has a spare device type for backends written in Python (experimental; seen in 2.15). Every tensor on it wraps one on the CPU.
As on a GPU, an operation on tensors of both devices is an error. What would cost time on a GPU is counted, with the line of this project
that asked for it: a value that is read back (the host waits for the device), and a copy between the two.

What it cannot show: streams, several devices, kernels that differ from the CPU's, a generator with numbers of its own.

Registering it changes PyTorch for the whole process, so tests run it in one of their own: `tests/devices/conformance.py`.
"""

from __future__ import annotations

import collections
import sys
from pathlib import Path
from typing import Any

import torch
import torch.utils.backend_registration as registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

NAME = "pretend"
_PROJECT = Path(__file__).parents[2]
_TESTS = Path(__file__).parents[1]
_aten = torch.ops.aten
_READS = {
    _aten._local_scalar_dense.default,
    _aten.is_nonzero.default,
    _aten.equal.default,
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten._unique2.default,
}


class Ledger:
    """What would have cost time on a GPU since the last `clear`: lines of the project, and how often."""

    def __init__(self) -> None:
        self.reads: collections.Counter[str] = collections.Counter()
        self.copies: collections.Counter[str] = collections.Counter()

    def clear(self) -> None:
        """Forget everything."""
        self.reads.clear()
        self.copies.clear()


LEDGER = Ledger()


def _asking_line() -> str:
    """Return the line of the product that is running, innermost first."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(_PROJECT) and not path.is_relative_to(_TESTS) and "site-packages" not in path.parts:
            return f"{path.relative_to(_PROJECT)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment] # None ends the loop
    return "?"


class PretendTensor(torch.Tensor):
    """A tensor on the device; `raw` holds its values on the CPU."""

    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> PretendTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=torch.device(NAME, 0),
        )
        made.raw = raw
        return made

    def tolist(self) -> Any:
        LEDGER.reads[_asking_line()] += 1
        return self.raw.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _dispatch(func, args, kwargs or {})


class PretendDevice(TorchDispatchMode):
    """Within it, factories and `to` know the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _dispatch(func, args, kwargs or {})


def _raw(value: Any) -> Any:
    return value.raw if isinstance(value, PretendTensor) else value


def _wrapped(value: Any) -> Any:
    return PretendTensor(value) if isinstance(value, torch.Tensor) and not isinstance(value, PretendTensor) else value


def _is_here(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _note_copy(source_here: bool, target_here: bool) -> None:
    if source_here and not target_here:
        LEDGER.reads[_asking_line()] += 1
    elif target_here and not source_here:
        LEDGER.copies[_asking_line()] += 1


def _dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func is _aten._to_copy.default:
        return _move(args[0], kwargs)
    if func is _aten.copy_.default:
        target, source = args[:2]
        _note_copy(isinstance(source, PretendTensor), isinstance(target, PretendTensor))
        _raw(target).copy_(_raw(source))
        return target
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    here = [tensor for tensor in tensors if isinstance(tensor, PretendTensor)]
    if here and func in _READS:
        LEDGER.reads[_asking_line()] += 1
    # As on CUDA: numbers in a tensor of no dimensions may come from the host, and so may indices.
    if here and any(tensor.dim() and not isinstance(tensor, PretendTensor) for tensor in tensors) and "index" not in str(func):
        raise RuntimeError(f"tensors on two devices in {func}, asked for at {_asking_line()}")
    options = dict(kwargs)
    wanted = options.get("device")
    if _is_here(wanted):
        options["device"] = torch.device("cpu")
    out = func(*tree_map(_raw, args), **tree_map(_raw, options))
    if (wanted is not None and not _is_here(wanted)) or not (here or _is_here(wanted)):
        return out
    wrapped = tree_map(_wrapped, out)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if here and _keeps_aliases(func) else wrapped


def _keeps_aliases(func: Any) -> bool:
    """Return whether some result of an operation is, or looks into, one of its arguments."""
    return any(result.alias_info is not None for result in func._schema.returns)


def _move(source: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    was_here = isinstance(source, PretendTensor)
    wanted = options.get("device")
    is_here = was_here if wanted is None else _is_here(wanted)
    _note_copy(was_here, is_here)
    plain = {name: value for name, value in options.items() if name not in ("device", "non_blocking", "pin_memory")}
    out = _aten._to_copy.default(_raw(source), **plain)
    return PretendTensor(out) if is_here else out


class _Backend(registration._DummyBackendModule):
    """What `torch.pretend` is: what PyTorch asks a device's module for."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def is_available(self) -> bool:
        return True

    def synchronize(self, *_device: Any) -> None:
        LEDGER.reads[_asking_line()] += 1


class _DeviceGenerator(torch.Generator):
    """A generator of the device; its numbers are the CPU's, so that a run sees those of a run on the CPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override] # a field of PyTorch's
        return torch.device(NAME, 0)


class _GeneratorType(type):
    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, _PLAIN_GENERATOR)


_PLAIN_GENERATOR = torch.Generator


class _Generator(metaclass=_GeneratorType):
    """`torch.Generator`, which knows no spare device by itself."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return _DeviceGenerator() if _is_here(device) else _PLAIN_GENERATOR(device)


_library: list[Any] = []  # operations are registered for as long as this lives


def register() -> None:
    """Make the device known to PyTorch, for the rest of the process."""
    registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
    library = torch.library.Library("aten", "IMPL")
    _library.append(library)

    def empty(size: Any, dtype: Any = None, **_options: Any) -> PretendTensor:
        return PretendTensor(torch.empty(size, dtype=dtype or torch.get_default_dtype()))

    def empty_strided(size: Any, stride: Any, dtype: Any = None, **_options: Any) -> PretendTensor:
        return PretendTensor(torch.empty_strided(size, stride, dtype=dtype or torch.get_default_dtype()))

    def copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        _raw(target).copy_(_raw(source))
        return target

    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("empty_strided", empty_strided, "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")
    # A module's parameters cannot change their type in place: exchange them instead.
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch.Generator = _Generator  # type: ignore[misc, assignment]
