"""The static model behind a randomized one: every random value at its mean."""

from __future__ import annotations

from torch import Tensor, nn

from analysis.attacked_model.draws import ONLY_DRAW, Draw, seeded_draws, set_draw
from analysis.attacked_model.model import Predictor
from models.randomness import random_sites

_NUM_DRAWS = 256


def has_mean_draw(model: nn.Module) -> bool:
    """Return whether a mean of draws exists: every site holds floating-point values (weights, masks), shared by the batch.

    Choices of a member or of a normalization have no mean.
    """
    sites = [site for _, site in random_sites(model)]
    return bool(sites) and all(
        site.draw_scope != "per_example" and any(getattr(site, name).is_floating_point() for name in site.draw_names) for site in sites
    )


class MeanDrawPredictor(Predictor):
    """The model with the mean of its draws in place: CTRW's weights at mu, DCS's taps all kept with weight n / k^2.

    Args:
        model: one that `has_mean_draw`.
        seed: of the draws whose mean is taken.
    """

    def __init__(self, model: nn.Module, seed: int) -> None:
        super().__init__(model)
        sums: dict[str, Tensor] = {}
        for draw in seeded_draws(_NUM_DRAWS, seed, "mean draw"):
            set_draw(model, draw)
            for name, values in _floating_values(model).items():
                sums[name] = sums.get(name, 0.0) + values.double()
        self._means = {name: total / _NUM_DRAWS for name, total in sums.items()}

    def members(self, draw: Draw) -> tuple[Draw, ...]:
        del draw
        return (ONLY_DRAW,)

    def logits(self, x_BCHW: Tensor, draw: Draw) -> Tensor:
        del draw
        for site_name, site in random_sites(self.model):
            for name in site.draw_names:
                mean = self._means.get(f"{site_name}.{name}")
                if mean is not None:
                    site.set_draw(name, mean.to(getattr(site, name).dtype))
        return self.model(x_BCHW)


def _floating_values(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{site_name}.{name}": getattr(site, name)
        for site_name, site in random_sites(model)
        for name in site.draw_names
        if getattr(site, name).is_floating_point()
    }


__all__ = ["MeanDrawPredictor", "has_mean_draw"]
