"""How long a thread of PyTorch's CPU kernels waits at a barrier before it sleeps: decided before PyTorch is loaded.

GNU OpenMP lets it spin for milliseconds, which costs nothing on an idle machine and stops everything on a busy one: a step of a ResNet-18
with two threads took 1.84 s beside two other processes on two cores, 0.28 s with the count below, and as long as before on the idle machine
(0.053 s and 0.059 s; a thread that sleeps at once, `OMP_WAIT_POLICY=PASSIVE`, needs 0.073 s there).
"""

from __future__ import annotations

import os

SPIN_COUNT = "GOMP_SPINCOUNT"
_THE_USERS = (SPIN_COUNT, "OMP_WAIT_POLICY")
_SPINS = "10000"


def spin_briefly() -> None:
    """Set the spin count of this process and of those that it starts, unless the user's environment decides about it."""
    if not any(name in os.environ for name in _THE_USERS):
        os.environ[SPIN_COUNT] = _SPINS
