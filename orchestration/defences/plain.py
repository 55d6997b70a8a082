"""Natural training and adversarial training: the two references every defence is held against."""

from __future__ import annotations

from orchestration.catalogue import Defence, Paper
from orchestration.search_space import Dimension

_TRAINING = {
    "training.optimizer.learning_rate": Dimension(type="float", low=0.01, high=0.3, log=True),
    "training.optimizer.weight_decay": Dimension(type="float", low=1e-5, high=5e-3, log=True),
}

DEFENCES = (
    Defence(name="natural", summary="no defence: the lower reference", objective="natural", search_space=_TRAINING),
    Defence(
        name="at",
        summary="adversarial training on PGD examples",
        paper=Paper(
            title="Towards Deep Learning Models Resistant to Adversarial Attacks",
            authors="Madry, Makelov, Schmidt, Tsipras, Vladu",
            venue="ICLR 2018",
        ),
        search_space=_TRAINING,
    ),
)
