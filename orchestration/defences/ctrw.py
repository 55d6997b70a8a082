"""CTRW: what its sweeps search, and where the code knowingly differs from the paper."""

from __future__ import annotations

from orchestration.catalogue import Defence, Paper
from orchestration.search_space import Dimension

DEFENCES = (
    Defence(
        name="ctrw",
        summary="constrained trainable random weights on a feature map",
        paper=Paper(title="Adversarial Robustness through Random Weight Sampling", authors="Ma, Dong, Xu", venue="NeurIPS 2023"),
        search_space={
            # The official floor is not searched: sigma starts at 1, far above most floors, so that most of them train the same network.
            "defence.constraint": Dimension(type="choice", choices=("project", "fixed")),
            # A = 1000 and B = 2400 are the paper's; its Fig. 3b goes up to 6144.
            "defence.lower_bound": Dimension(type="float", low=64, high=3072, log=True),
            "defence.upper_bound": Dimension(
                type="float", low=1024, high=6144, log=True, above="defence.lower_bound", when={"defence.constraint": ("project",)}
            ),
            # Positions that every convolutional backbone has (Fig. 3d).
            "defence.position": Dimension(type="int", low=0, high=3),
        },
        deviations=(
            "alpha of Lemma 1 is taken as -1e-3: the stated 1e-3 gives no positive lower bound",
            "two draws per iteration, as in the official code; Algorithm 1 draws once",
            "A and B are kept per element when the feature map is not of a CIFAR image's size",
            "attacks in training use batch statistics without moving the running ones; `attack.mode: train` gives the official behaviour",
        ),
    ),
)
