"""What the network is: random layers, backbones, defences as modules, saving and loading. PyTorch only."""

from typing import Any

__all__ = ["build_model", "list_backbones", "list_defences"]


def __getattr__(name: str) -> Any:
    # Imported on first use: the command line answers --help without loading PyTorch.
    if name in __all__:
        import models.registry

        return getattr(models.registry, name)
    raise AttributeError(f"module 'models' has no attribute {name!r}")
