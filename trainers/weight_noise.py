"""Gaussian noise u on the weights: which weights it touches, how large it is, and how to stand at w + u for a while.

Reference: Jin et al., "Randomized Adversarial Training via Taylor Expansion", CVPR 2023, Eq. 2 and Algorithm 1.
Deviation: the public code picks weights by the letters "conv" in their name, which leaves out the shortcuts of some networks; here the type
of the layer decides. "Noise variance, e.g. sigma = 0.01" of the paper is read as the standard deviation; the public code uses 1e-4.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from models.configuration import Config
from models.errors import UserError

NoiseScope = Literal["conv", "conv_fc", "all"]
SigmaMode = Literal["absolute", "relative", "relative_per_filter"]


class WeightNoiseConfig(Config):
    """How the noise on the weights is drawn.

    At sigma = 0.01 deep networks are far from linear in u (`analysis.theory.flatness.expansion_errors` measures it).
    """

    sigma: float = Field(0.01, ge=0, le=1000, description="Standard deviation sigma of u (paper: 0.01; public code: 1e-4).")
    sigma_mode: SigmaMode = Field(
        "absolute",
        description="`absolute`: sigma itself; `relative`: sigma times the root mean square of the weight tensor; "
        "`relative_per_filter`: of each filter (row of the tensor). `absolute` is the paper's; not measured.",
    )
    noise_scope: NoiseScope = Field(
        "conv",
        description="Which weights have noise: those of convolutions (`conv`), of linear layers too (`conv_fc`), or every parameter "
        "(`all`). The paper says weights, its code takes convolutions; not measured.",
    )

    def names(self, model: nn.Module) -> list[str]:
        """Return the names of the parameters in scope."""
        return noisy_parameters(model, self.noise_scope)

    def sample(self, model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        """Return one draw of u by parameter name, at the current weights; parameters out of scope are left out (u = 0)."""
        return sample_weight_noise(model, generator, sigma=self.sigma, sigma_mode=self.sigma_mode, noise_scope=self.noise_scope)


def noisy_parameters(model: nn.Module, scope: NoiseScope) -> list[str]:
    """Return the names of the parameters in `scope`, in module order, shared ones once.

    Raises:
        UserError: there are none.
    """
    if scope == "all":
        return [name for name, _ in model.named_parameters()]
    kinds = (_ConvNd,) if scope == "conv" else (_ConvNd, nn.Linear)
    chosen = {id(module.weight) for module in model.modules() if isinstance(module, kinds)}
    names = [name for name, parameter in model.named_parameters() if id(parameter) in chosen]
    if not names:
        raise UserError(f"noise_scope {scope!r} selects no weight of {type(model).__name__}")
    return names


@torch.no_grad()
def sample_weight_noise(
    model: nn.Module,
    generator: torch.Generator,
    *,
    sigma: float,
    sigma_mode: SigmaMode = "absolute",
    noise_scope: NoiseScope = "conv",
) -> dict[str, Tensor]:
    """Return u ~ N(0, sigma^2) by parameter name, each of its parameter's shape, type and device.

    Args:
        model: its weights set the scale in the relative modes.
        generator: the only source of randomness.
        sigma, sigma_mode, noise_scope: see `WeightNoiseConfig`.
    """
    parameters = dict(model.named_parameters())
    noise = {}
    for name in noisy_parameters(model, noise_scope):
        parameter = parameters[name]
        draw = torch.randn(parameter.shape, generator=generator, device=generator.device, dtype=parameter.dtype)
        scale: float | Tensor = sigma
        if sigma_mode != "absolute":
            axes = tuple(range(1, parameter.ndim)) if sigma_mode == "relative_per_filter" and parameter.ndim > 1 else None
            scale = sigma * parameter.square().mean(axes, keepdim=True).sqrt()
        u = torch.empty_like(parameter)
        noise[name] = torch.mul(draw.to(parameter.device), scale, out=u)
    return noise


@contextlib.contextmanager
def perturbed(model: nn.Module, noise: dict[str, Tensor]) -> Iterator[None]:
    """Within, the weights are w + u; afterwards they are exactly w again, also after an exception."""
    parameters = [model.get_parameter(name) for name in noise]
    saved = [parameter.detach().clone() for parameter in parameters]
    try:
        with torch.no_grad():
            for parameter, u in zip(parameters, noise.values(), strict=True):
                parameter.add_(u)
        yield
    finally:
        with torch.no_grad():
            for parameter, weight in zip(parameters, saved, strict=True):
                parameter.copy_(weight)
