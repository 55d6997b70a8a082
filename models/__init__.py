"""What the network is: random layers, backbones, defences as modules, saving and loading. PyTorch only."""

from typing import Any

from models.waiting_threads import spin_briefly

spin_briefly()  # here: every package imports this one, and PyTorch must not have been loaded before

__all__ = ["build_model", "list_backbones", "list_defences"]


def __getattr__(name: str) -> Any:
    # Imported on first use: the command line answers --help without loading PyTorch.
    if name in __all__:
        import models.registry

        return getattr(models.registry, name)
    raise AttributeError(f"module 'models' has no attribute {name!r}")
