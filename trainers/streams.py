"""One root seed makes named, independent streams, anew at each epoch: their state at an epoch's start is (seed, epoch).

A run that is resumed after any epoch, on any number of workers, therefore needs no generator state from the checkpoint.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.randomness import derive_seed, seed_streams


class Streams:
    """The generators of a training run.

    Attributes:
        data_order, augmentation: CPU generators, the same on every rank, because each rank takes its rows of a global batch.
        attack: random starts; the same on every rank for the same reason. On the device.
        noise: of objectives (weight noise); the same on every rank, since a weight perturbation is shared. On the device.

    The streams of draws belong to the model and are seeded by `begin_epoch` as well; that of the initial weights to its builder.

    Args:
        seed: root seed of the run.
        rank: rank of this process.
        device: where `attack` and `noise` live: they fill tensors as large as a batch or the weights.
    """

    def __init__(self, seed: int, rank: int = 0, device: torch.device | str = "cpu") -> None:
        self.seed = seed
        self.rank = rank
        self.data_order = torch.Generator()
        self.augmentation = torch.Generator()
        self.attack = torch.Generator(device=device)
        self.noise = torch.Generator(device=device)

    def begin_epoch(self, model: nn.Module, epoch: int) -> None:
        """Seed everything for `epoch` (0-based), the model's streams of draws included."""
        for name in ("data_order", "augmentation", "attack", "noise"):
            getattr(self, name).manual_seed(derive_seed(self.seed, name, epoch))
        seed_streams(model, derive_seed(self.seed, "draws", epoch), self.rank)

    def state(self) -> tuple[Tensor, Tensor]:
        """Return where `attack` and `noise` stand."""
        return self.attack.get_state(), self.noise.get_state()

    def load_state(self, state: tuple[Tensor, Tensor]) -> None:
        """Let `attack` and `noise` begin again where `state` was taken."""
        self.attack.set_state(state[0])
        self.noise.set_state(state[1])
