"""The value of a small draw buffer on the host, so that eager code can branch on it without waiting for the device."""

from __future__ import annotations

from typing import Any

from torch import Tensor

UNKNOWN: Any = object()
"""In place of a value that nobody told."""


class HostMirror:
    """Remembers the Python value of one tensor object.

    A tensor is recognized by identity: whoever exchanges the buffer (a restored draw, `functional_call`, a move to another
    device) makes the mirror read it anew, once.
    """

    __slots__ = ("_tensor", "_value")

    def __init__(self) -> None:
        self._tensor: Tensor | None = None
        self._value: Any = None

    def remember(self, tensor: Tensor, value: Any) -> None:
        """Note that `tensor` holds `value` (what `tensor.tolist()` would return)."""
        self._tensor = tensor
        self._value = value

    def knows(self, tensor: Tensor) -> bool:
        """Return whether `tensor` is the one remembered."""
        return tensor is self._tensor

    def read(self, tensor: Tensor) -> Any:
        """Return `tensor.tolist()`; it waits for the device only if `tensor` is not the one remembered."""
        if tensor is not self._tensor:
            self.remember(tensor, tensor.tolist())
        return self._value
