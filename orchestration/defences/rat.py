"""Randomized adversarial training via Taylor expansion, with TRADES, AWP and the controls: what their sweeps search."""

from __future__ import annotations

from orchestration.catalogue import Defence, Paper
from orchestration.search_space import Dimension

RAT = Paper(title="Randomized Adversarial Training via Taylor Expansion", authors="Jin, Yi, Wu, Mu, Huang", venue="CVPR 2023")
BETA = {"training.objective.beta": Dimension(type="float", low=1, high=12, log=True)}
GAMMA = {"training.objective.weight_perturbation.gamma": Dimension(type="float", low=0.001, high=0.02, log=True)}
SIGMA = {"training.objective.sigma": Dimension(type="float", low=1e-4, high=0.05, log=True)}

DEFENCES = (
    Defence(
        name="trades",
        summary="clean accuracy traded against the divergence of adversarial examples",
        objective="trades",
        paper=Paper(
            title="Theoretically Principled Trade-off between Robustness and Accuracy",
            authors="Zhang, Yu, Jiao, Xing, El Ghaoui, Jordan",
            venue="ICML 2019",
        ),
        search_space=BETA,
    ),
    Defence(
        name="awp",
        summary="adversarial weight perturbation, on AT or TRADES",
        objective="trades",
        paper=Paper(title="Adversarial Weight Perturbation Helps Robust Generalization", authors="Wu, Xia, Wang", venue="NeurIPS 2020"),
        search_space=GAMMA,
        deviations=("the perturbation is computed without a proxy model: its learning rate cancels in the normalization",),
    ),
    Defence(
        name="rat",
        summary="TRADES with first- and second-order Taylor terms of Gaussian noise on the weights",
        objective="rat_taylor",
        paper=RAT,
        search_space={
            "training.objective.order": Dimension(type="choice", choices=(1, 2)),
            "training.objective.eta": Dimension(type="float", low=0.05, high=0.4),
        }
        | BETA
        | SIGMA,
        deviations=(
            "the terms are the paper's derivatives; the public code trains gradient-derived soft labels, which is `rat_surrogate`",
            "sigma is a standard deviation; paper and public code differ by its square",
        ),
    ),
    Defence(
        name="rat_surrogate",
        summary="what the public code of RAT trains: gradient-gap soft labels on TRADES or AWP",
        objective="rat_surrogate",
        paper=RAT,
        search_space={"training.objective.alpha": Dimension(type="float", low=0.05, high=0.4)} | BETA,
    ),
    Defence(
        name="label_smoothing",
        summary="control of rat_surrogate: plain label smoothing on TRADES",
        objective="label_smoothing",
        search_space={"training.objective.alpha": Dimension(type="float", low=0.05, high=0.4)} | BETA,
    ),
    Defence(
        name="direct_weight_noise",
        summary="control of rat: one sample of weight noise per step, no Taylor expansion",
        objective="rat_direct",
        search_space=BETA | SIGMA,
    ),
)
