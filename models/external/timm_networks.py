"""Networks of the library timm. Their weights come from a file: a user's, or what other programs left in a cache; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
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
        raise unknown_name("network of timm", name, timm.list_models(), listed="`timm.list_models()` names them")


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


def timm_weights_file(name: str) -> Path:
    """Return the file with timm's own weights of a network, where a cache of this machine has it: that of Hugging Face or of torch.hub.

    Raises:
        UserError: timm has no such network or no weights for it, or they are not here; says where they were looked for.
    """
    check_timm_name(name)
    configuration = _timm().get_pretrained_cfg(name)
    if configuration is None or not configuration.has_weights:
        raise UserError(f"timm:{name} has no weights of its own")
    looked: list[str] = []
    for found, where in (_in_hugging_face_cache(configuration), _in_torch_hub(configuration)):
        if found is not None:
            return found
        looked += where
    raise UserError(
        f"the weights of timm:{name} are not on this machine, and nothing is downloaded; looked for in {' and '.join(looked) or 'no cache'}"
    )


def _in_hugging_face_cache(configuration: Any) -> tuple[Path | None, list[str]]:
    if not configuration.hf_hub_id:
        return None, []
    from huggingface_hub import constants, try_to_load_from_cache

    names = [configuration.hf_hub_filename] if configuration.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    for name in names:
        found = try_to_load_from_cache(configuration.hf_hub_id, name)
        if isinstance(found, str):
            return Path(found), []
    return None, [f"{constants.HF_HUB_CACHE} ({configuration.hf_hub_id})"]


def _in_torch_hub(configuration: Any) -> tuple[Path | None, list[str]]:
    if not configuration.url:
        return None, []
    path = Path(torch.hub.get_dir()) / "checkpoints" / configuration.url.rpartition("/")[2]
    return (path if path.is_file() else None), [str(path)]


def timm_state(name: str, file: Path, image_shape: tuple[int, int, int]) -> dict[str, Tensor]:
    """Return timm's weights of a network as tensors by timm's names, fitted by timm to images of this shape: the first convolution to the
    number of channels, embeddings of positions to the size.

    Args:
        file: from `timm_weights_file`; it is read without executing code.
        image_shape: (C, H, W).

    Raises:
        UserError: timm cannot load the file.
    """
    timm = _timm()
    given = timm.get_pretrained_cfg(name)
    options: dict[str, Any] = {"in_chans": image_shape[0]}
    if given is not None and given.fixed_input_size:
        options["img_size"] = image_shape[1:]
    try:
        overlay = {"file": str(file), "custom_load": False, "hf_hub_id": None, "url": ""}
        network = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    except Exception as error:  # another's code: any kind, and it is told
        said = " ".join(str(error).split())[:300]
        raise UserError(f"timm cannot load its weights of {name} from {file}: {type(error).__name__}: {said}") from None
    return dict(network.state_dict())


def _timm() -> Any:
    try:
        import timm
    except ImportError:
        raise UserError("timm:NAME needs the library timm: `pip install timm`") from None
    return timm
