"""DCS with GSAT, and its baseline DCN: what their sweeps search, and where the code knowingly differs from the paper."""

from __future__ import annotations

from orchestration.catalogue import Defence, Paper
from orchestration.search_space import Dimension

PAPER = Paper(
    title="Adversarial Robustness via Deformable Convolution with Stochasticity",
    authors="Ma, Huang, Dong, You, Xu",
    venue="ICML 2025",
)

DEFENCES = (
    Defence(
        name="dcs",
        summary="a convolution keeps n of its k*k taps per draw; GSAT trains on taps that the attack did not use",
        paper=PAPER,
        search_space={
            "defence.kernel_size": Dimension(type="choice", choices=(3, 5, 7, 9)),
            "defence.num_taps": Dimension(type="int", low=1, high=4),
            "defence.gsat": Dimension(type="choice", choices=("off", "attack", "chain")),
            # Those that every convolutional backbone has (Fig. 7, Table 9).
            "defence.positions": Dimension(type="choice", choices=((2,), (3,), (4,), (5,))),
        },
        deviations=(
            "p_s = n / k^2: the n / k of sections 4.2 and A.3 holds only if k means the area",
            "the attack sees batch statistics and leaves the running ones alone (`attack.mode: train_without_update`); the official code "
            "attacks in training mode, so that each attack step moves them",
            "evaluation draws are independent of the attack's, never forced to be disjoint",
            "the training mask is drawn from the complement of the attack's mask; `gsat: chain` is the official code's chain of exclusions",
        ),
    ),
    Defence(
        name="dcn",
        summary="deformable convolution with learned offsets, deterministic: the baseline of DCS",
        paper=PAPER,
        search_space={"training.optimizer.learning_rate": Dimension(type="float", low=0.01, high=0.3, log=True)},
    ),
)
