"""Distilled feature examples: an image changed a little so that inside one network it looks like another image.

Shapes: B batch, C channels, H and W pixels. Reference: Yang et al., "DVERGE: Diversifying Vulnerabilities for Enhanced Robust Generation of
Ensembles", Eq. 1; momentum as in Dong et al., "Boosting Adversarial Attacks with Momentum".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models.errors import UserError, unknown_name
from trainers.attacks import LinfBall

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Softplus)

OUTPUT_LAYER = "logits"


def feature_layers(network: nn.Module) -> list[str]:
    """Return the names of a network's feature layers, the logits last: 18 for ResNet-18.

    A feature is what enters an activation: the output of the stem's normalization, of those inside the blocks, and the sums that end
    blocks.

    Raises:
        UserError: the network has no activation modules.
    """
    names = [name for name, module in network.named_modules() if isinstance(module, ACTIVATIONS)]
    if not names:
        raise UserError(f"{type(network).__name__} has no activation modules, so its features cannot be distilled")
    return [*names, OUTPUT_LAYER]


def features_at(network: nn.Module, x_BCHW: Tensor, layer: str) -> Tensor:
    """Return what enters the activation called `layer`, or the logits; the rest of the network is not evaluated.

    Raises:
        UserError: there is no such layer.
    """
    if layer == OUTPUT_LAYER:
        return network(x_BCHW)
    modules = dict(network.named_modules())
    if layer not in modules:
        raise unknown_name("feature layer", layer, feature_layers(network))
    handle = modules[layer].register_forward_pre_hook(_stop)
    try:
        network(x_BCHW)
    except _Reached as reached:
        return reached.features
    finally:
        handle.remove()
    raise UserError(f"layer {layer!r} was not run by the network's forward")


def distilled_examples(
    network: nn.Module,
    source_BCHW: Tensor,
    target_BCHW: Tensor,
    layer: str,
    *,
    epsilon: float,
    steps: int = 10,
    step_size: float | None = None,
    momentum: float = 1.0,
) -> Tensor:
    """Return images within `epsilon` (every pixel) of the source whose features at `layer` approach the target's: (B, C, H, W), detached.

    Args:
        network: in the mode to use; its draw stays as it is.
        source_BCHW, target_BCHW: images in [0,1], row by row.
        layer: one of `feature_layers(network)`.
        epsilon: radius in pixels of [0,1]. steps: number of descent steps. step_size: length of a step; None: a tenth of the radius.
        momentum: mu; gradients are divided by their L1 norm before they add up.

    Starts at the source, without noise. An image whose features are the target's already does not move.
    """
    step_size = epsilon / 10 if step_size is None else step_size
    ball = LinfBall(source_BCHW, epsilon)
    with torch.no_grad():
        target = features_at(network, target_BCHW, layer)
    distilled_BCHW = source_BCHW.detach().clone()
    velocity_BCHW = torch.zeros_like(distilled_BCHW)
    for _ in range(steps):
        leaf_BCHW = distilled_BCHW.clone().requires_grad_()
        with torch.enable_grad():
            distance = (features_at(network, leaf_BCHW, layer) - target).float().square().sum()
            (gradient_BCHW,) = torch.autograd.grad(distance, leaf_BCHW)
        length_B111 = gradient_BCHW.abs().sum(dim=(1, 2, 3), keepdim=True).clamp_min(1e-12)
        velocity_BCHW.mul_(momentum).add_(gradient_BCHW / length_B111)
        distilled_BCHW = ball.ascend_(distilled_BCHW, -velocity_BCHW, step_size)
    return distilled_BCHW.detach()


class _Reached(Exception):
    def __init__(self, features: Tensor) -> None:
        self.features = features


def _stop(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
    raise _Reached(inputs[0])
