"""RNA: what its sweeps search, and where the code knowingly differs from the paper."""

from __future__ import annotations

from orchestration.catalogue import Defence, Paper
from orchestration.search_space import Dimension

PAPER = Paper(title="Random Normalization Aggregation for Adversarial Defense", authors="Dong, Chen, Wang, Xu", venue="NeurIPS 2022")

DEFENCES = (
    Defence(
        name="rna",
        summary="each layer draws one of several normalizations",
        paper=PAPER,
        search_space={
            "defence.pool": Dimension(
                type="choice",
                choices=(
                    ("bn", "in"),
                    ("gn_groups_32", "bgn_groups_32"),
                    ("gn_groups_32", "ln"),
                    ("ln", "bn"),
                    ("gn_size_2", "bgn_size_2"),
                    ("gn_size_1", "bgn_size_1", "gn_size_2", "bgn_size_2"),
                ),
            ),
            "defence.choice": Dimension(type="choice", choices=("per_layer", "per_network")),
        },
        deviations=(
            "BGN is batch normalization over groups with the usual momentum; the official code inverts its momentum",
            "parameters of normalizations that a step did not use are left alone; `optimizer.gradients_when_unused: zero` gives the "
            "official behaviour, in which weight decay still moves them",
            "the attack sees batch statistics and leaves the running ones alone (`attack.mode: train_without_update`); the official code "
            "attacks in training mode, so that each attack step moves them",
            "a group size above a layer's channels is refused, as in the official code; a number of groups above them becomes one group "
            "per channel, also as there",
            "gradients of the attack are taken at the perturbed image, as in the official code; Algorithm 1 takes them at the image",
        ),
    ),
    Defence(
        name="single_normalization",
        summary="one normalization in place of batch normalization, adversarially trained: the baselines of RNA",
        paper=PAPER,
        search_space={"defence.normalization": Dimension(type="choice", choices=("bn", "bgn", "in", "gn", "ln"))},
    ),
)
