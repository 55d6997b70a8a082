"""What a block costs, in forward passes of one image; a backward pass counts as two."""

from __future__ import annotations

from analysis.attacks.registry import attack_entry, parse_attack_parameters
from analysis.evaluation.block_task import BlockTask
from analysis.evaluation.studies import study_passes

_BACKWARD_COST = 2.0  # a backward pass to the pixels costs about two forward passes


def estimated_cost(task: BlockTask) -> float:
    """Return the work of a block in forward passes of one image."""
    if task.item is None:
        return scoring_cost(task)
    entry = attack_entry(task.item.attack)
    parameters = parse_attack_parameters(task.item.attack, task.item.parameters_for(task.randomized, task.threat_model.norm))
    gradient_draws = task.item.num_draws if task.randomized and task.protocol == "T1" else 1
    # Where no more draws are asked for than there are, each gradient takes all of them.
    takes_all = task.num_configurations is not None and task.num_configurations <= min(gradient_draws, task.scoring.enumerate_up_to)
    gradient_draws = task.num_configurations if takes_all and task.num_configurations is not None else gradient_draws
    cost = entry.cost(parameters, gradient_draws, task.num_classes, takes_all or gradient_draws == 1)
    passes = cost.forward + _BACKWARD_COST * cost.backward
    if task.study is not None:
        return study_passes(task.study, passes, gradient_draws, _scoring_draws(task), len(task.ids))
    return len(task.ids) * _runs(task) * passes + scoring_cost(task)


def scoring_cost(task: BlockTask) -> float:
    """Return the work of scoring a block's points, in forward passes of one image."""
    draws = _scoring_draws(task)
    return len(task.ids) * (draws if task.item is None or task.protocol == "T1" else 2 * _runs(task))


def _scoring_draws(task: BlockTask) -> int:
    """Return the draws that score a block under T1."""
    scoring = task.scoring
    if not task.randomized:
        return 1
    if task.num_configurations is not None and task.num_configurations <= scoring.enumerate_up_to:
        return task.num_configurations + scoring.num_selection_draws
    return scoring.num_evaluation_draws + scoring.num_selection_draws


def _runs(task: BlockTask) -> int:
    """Return how often the attack of a block runs, in units of its cost under T1."""
    repeats = {"T0": task.scoring.num_repetitions, "T2": task.scoring.num_known_draws, "T4": task.scoring.num_averaged_draws}
    return repeats.get(task.protocol, 1) if task.randomized else 1
