"""RED, PS-RED and the ensembles they are compared with: what their sweeps search."""

from __future__ import annotations

from orchestration.catalogue import Defence, Paper
from orchestration.search_space import Dimension

RED = Paper(
    title="RED: Efficiently Boosting Ensemble Robustness via Random Sampling Inference",
    authors="anonymous",
    venue="submission to ICLR 2025",
)
MEMBERS = {"defence.num_members": Dimension(type="int", low=2, high=8)}
REGULARIZERS = {
    "training.objective.lambda_a": Dimension(type="float", low=0.1, high=100, log=True),
    "training.objective.lambda_b": Dimension(type="float", low=0.1, high=100, log=True),
}
INFERENCE = {"defence.inference": Dimension(type="choice", choices=("rsi_sample", "mean_prob"))}

DEFENCES = (
    Defence(
        name="red",
        summary="one of N diverse, smooth members answers",
        objective="red",
        paper=RED,
        search_space=MEMBERS | REGULARIZERS | INFERENCE,
        deviations=(
            "the minus sign printed in Eq. 4 would reward similar gradients; it is a plus",
            "how adversarial examples are made is not in the text: one per image, from an attack on the random ensemble",
            "input gradients are those of the mean loss of 128 images whatever the batch: with each image's own, the paper's weights "
            "learn to answer one class",
        ),
    ),
    Defence(
        name="ps_red",
        summary="RED whose convolutions come from hypernetworks",
        objective="red",
        paper=RED,
        search_space=MEMBERS | REGULARIZERS | {"defence.hidden_dim": Dimension(type="choice", choices=(32, 64, 128))},
        deviations=("structure and width of the hypernetwork are the only reading that gives the stated saving of 90 %",),
    ),
    Defence(
        name="gal",
        summary="ensemble whose input gradients are spread out",
        objective="gal",
        paper=Paper(
            title="Improving Adversarial Robustness of Ensembles with Diversity Training", authors="Kariyappa, Qureshi", venue="2019"
        ),
        search_space=MEMBERS,
    ),
    Defence(
        name="adp",
        summary="ensemble with diverse probabilities of wrong classes",
        objective="adp",
        paper=Paper(
            title="Improving Adversarial Robustness via Promoting Ensemble Diversity", authors="Pang, Xu, Du, Chen, Zhu", venue="ICML 2019"
        ),
        search_space=MEMBERS,
    ),
    Defence(
        name="dverge",
        summary="ensemble in which each member learns the others' distilled features",
        objective="dverge",
        paper=Paper(
            title="DVERGE: Diversifying Vulnerabilities for Enhanced Robust Generation of Ensembles",
            authors="Yang et al.",
            venue="NeurIPS 2020",
        ),
        search_space=MEMBERS,
    ),
    Defence(
        name="trs",
        summary="smooth ensemble of dissimilar gradients",
        objective="trs",
        paper=Paper(
            title="TRS: Transferability Reduced Ensemble via Promoting Gradient Diversity and Model Smoothness",
            authors="Yang et al.",
            venue="NeurIPS 2021",
        ),
        search_space=MEMBERS,
    ),
)
