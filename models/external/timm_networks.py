"""Networks of the library timm, without weights: these come from a file, nothing is downloaded."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from models.classifier import InputNormalization
from models.errors import UserError, unknown_name


class _WithNormalization(nn.Module):
    """Pixels of [0,1] to the input that a network of timm was trained on; names of weights are the network's own.

    Args:
        network: of timm. normalization: of its configuration.
    """

    def __init__(self, network: nn.Module, normalization: InputNormalization) -> None:
        super().__init__()
        self.network = network
        self.normalization = normalization

    def forward(self, x_BCHW: Tensor) -> Any:
        return self.network(self.normalization(x_BCHW))

    def state_dict(self, *arguments: Any, **options: Any) -> Any:
        return self.network.state_dict(*arguments, **options)

    def load_state_dict(self, *arguments: Any, **options: Any) -> Any:
        return self.network.load_state_dict(*arguments, **options)


def timm_version() -> str:
    """Return the version of timm.

    Raises:
        UserError: it is not installed.
    """
    return str(_timm().__version__)


def check_timm_name(name: str) -> None:
    """Raise a `UserError` with near names unless timm has a network of this name."""
    timm = _timm()
    if not timm.is_model(name):
        raise unknown_name("network of timm", name, timm.list_models())


def timm_network(name: str, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """Return an untrained network of timm for pixels of [0,1], with the normalization of its configuration inside.

    Args:
        num_classes: K. image_shape: (C, H, W). Where a network is made for one size of images, for this one.

    Raises:
        UserError: timm builds none with them.
    """
    timm = _timm()
    options: dict[str, Any] = {"pretrained": False, "num_classes": num_classes, "in_chans": image_shape[0]}
    given = timm.get_pretrained_cfg(name)
    if given is not None and given.fixed_input_size:
        options["img_size"] = image_shape[1:]
    try:
        network = timm.create_model(name, **options)
    except Exception as error:  # another's code: any kind, and it is told
        raise UserError(f"timm builds no {name} for images of shape {image_shape}: {type(error).__name__}: {error}") from None
    configuration = network.pretrained_cfg
    mean, std = (configuration.get(key) for key in ("mean", "std"))
    if mean is None or std is None or len(mean) != image_shape[0]:  # grey images: timm has no numbers for them
        return network
    return _WithNormalization(network, InputNormalization(mean, std))


def _timm() -> Any:
    try:
        import timm
    except ImportError:
        raise UserError("timm:NAME needs the library timm: `pip install timm`") from None
    return timm
