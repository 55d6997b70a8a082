"""Images as text: PNG in base64, for records and self-contained pages."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image
from torch import Tensor

_CHANNELS_OF_PNG = (1, 3)


def encode_png(image_CHW: Tensor) -> str:
    """Return pixels in [0,1] of shape (C, H, W) as an 8-bit PNG in base64; of other than 1 or 3 channels the first is shown."""
    pixels = image_CHW.detach().cpu().float()
    if pixels.shape[0] not in _CHANNELS_OF_PNG:
        pixels = pixels[:1]
    array_HWC = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(array_HWC[:, :, 0] if array_HWC.shape[2] == 1 else array_HWC)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def decode_png(text: str) -> np.ndarray:
    """Return the pixels that `encode_png` wrote, uint8 of shape (H, W) or (H, W, 3)."""
    with Image.open(io.BytesIO(base64.b64decode(text))) as picture:
        return np.asarray(picture)
