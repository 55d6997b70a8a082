"""Checks that say when an evaluation must not be believed. One failed check marks every number of the evaluation.

A check is a function from the measurements to a status, what was seen, and what to do. Checks are data: `CHECKS` lists them. They
read records only, so they can be repeated later without a model. Those that need blocks of their own are in `study_verdicts`.
"""

from __future__ import annotations

import numpy as np
from scipy import stats

from analysis.attacks.registry import attack_entry
from analysis.checks.evidence import Check, Evidence, Finding, Meaning, Status, Verdict, difference, does_not_apply, exceeds, skipped
from analysis.checks.study_verdicts import STUDY_CHECKS
from analysis.evaluation.measurements import Measurement, common_rows
from analysis.evaluation.protocols import SAMPLED
from analysis.statistics import paired_difference

__all__ = ["CHECKS", "Finding", "Status", "Verdict", "run_checks"]


def run_checks(evidence: Evidence) -> list[Verdict]:
    """Return the verdict of every check."""
    verdicts = []
    for check in CHECKS:
        finding = check.run(evidence)
        needs_advice = finding.status in (Status.WARN, Status.FAIL)
        advice = check.advice if needs_advice else ""
        verdicts.append(
            Verdict(check.id, check.title, finding.status, finding.explanation, advice, finding.attacks, finding.applies, check.meaning)
        )
    return verdicts


def _randomness_alive(evidence: Evidence) -> Finding:
    differing, unrepeatable = [], []
    for measurement in evidence.all:
        for record in measurement.records:
            for moment in ("before", "after"):
                live = record["block"]["liveness"][moment]
                differing.append(live["differing"])
                unrepeatable.append(live["unrepeatable"])
    if not differing:
        return skipped("no block is finished")
    if max(unrepeatable) > 0:
        share = max(unrepeatable)
        return Finding(
            Status.FAIL,
            f"two forwards under the same draw differ in {share:.0%} of samples: the model has randomness outside its random sites",
        )
    company = evidence.examination.get("company", {})  # records of earlier versions do not know it
    depends = [f"{text} ({company[name]:.0%} of samples)" for name, text in _COMPANY.items() if company.get(name, 0) > 0]
    if depends:
        return Finding(
            Status.FAIL, f"an image's logits depend on {', on '.join(depends)}: the number belongs to these batches, not to the model"
        )
    if evidence.randomized and min(differing) < 0.99:
        return Finding(
            Status.FAIL,
            f"the model is declared random, but new draws change the logits of only {min(differing):.0%} of samples",
        )
    if not evidence.randomized:
        return Finding(Status.PASS, "the model is deterministic, before and after every attack: T0 = T1 = T2, one pass")
    return Finding(Status.PASS, f"new draws change the logits of {min(differing):.0%} of samples, before and after every attack")


_COMPANY = {
    "calls": "how often the model was called before",
    "batch_size": "the size of its batch",
    "companions": "the other images of its batch",
    "order": "its place in the batch",
    "autograd": "whether gradients are recorded",
}
"""What an image's logits must not depend on, by the fact that tells."""


def _draw_scope(evidence: Evidence) -> Finding:
    if not evidence.examination:
        return skipped("the block that examines the model is missing")
    if not evidence.randomized:
        return does_not_apply("the model is deterministic")
    if evidence.examination["shares_draw_in_batch"]:
        return Finding(Status.PASS, "all samples of a batch share a draw: draws are columns of the statistics")
    return Finding(Status.PASS, "each sample of a batch has its own draw; intervals over draws are conservative")


def _validity(evidence: Evidence) -> Finding:
    problems, num_replaced, num_points = [], 0.0, 0.0
    for each in [*evidence.attacks, *evidence.epsilon_zero]:
        num_replaced += each.total("num_not_finite")
        num_points += sum(len(record["samples"]["ids"]) * record["block"]["num_points"] for record in each.records)
        lowest = min(record["block"]["lowest"] for record in each.records)
        highest = max(record["block"]["highest"] for record in each.records)
        if lowest < 0 or highest > 1 or each.total("num_out_of_range"):
            problems.append(f"{each.name} ({each.protocol}) left the pixel range [0,1]")
        if each.bounded:
            norm, radius = each.header["threat_model"]["norm"], each.header["radius"]
            allowed = radius + 1e-6 if norm == "linf" else radius * (1 + 1e-4) + 1e-6
            farthest = max(each.column(norm))
            if farthest > allowed:
                problems.append(f"{each.name} ({each.protocol}) moved {farthest:.6f} in {norm}, allowed is {radius:.6f}")
    if problems:
        return Finding(Status.FAIL, "; ".join(problems))
    if not num_points:
        return skipped("no attack is finished")
    if num_replaced:
        status = Status.FAIL if num_replaced > 0.01 * num_points else Status.WARN
        return Finding(status, f"{num_replaced:.0f} of {num_points:.0f} images came back with NaN and were replaced by the clean ones")
    return Finding(Status.PASS, "all perturbed images are finite, in [0,1] and within the radius")


def _nothing_skipped(evidence: Evidence) -> Finding:
    problems, names = [], []
    for each in evidence.attacks:
        if attack_entry(each.attack or "").requires is not None and (not each.randomized or each.protocol == "T2"):
            continue  # the library returns the image where it fails; harmless where the attacked function is the scored one
        points = sum(len(record["samples"]["ids"]) * record["block"]["num_points"] for record in each.records)
        unchanged = sum(each.column("num_unchanged")) / points
        allowed = evidence.skippable_share(each) + 0.01
        if unchanged > allowed and each.header["radius"] > 0:
            problems.append(f"{each.name} ({each.protocol}) returned {unchanged:.1%} of images unchanged, at most {allowed:.1%} may be")
            names.append(each.name)
    if problems:
        return evidence.masking("; ".join(problems), tuple(dict.fromkeys(names)))
    if not evidence.attacks:
        return skipped("no attack is finished")
    return Finding(Status.PASS, "every attack perturbed every image it had a reason to perturb")


def _zero_radius(evidence: Evidence) -> Finding:
    if not evidence.epsilon_zero or evidence.clean is None:
        return skipped("no attack was run with radius 0 (the suite has none that can be, or its block is missing)")
    measured = evidence.epsilon_zero[0]
    rows, clean_rows = common_rows(measured, evidence.clean)
    if rows.size == 0:
        return skipped("the clean block of the same samples is missing")
    moved = paired_difference(measured.matrix()[rows], evidence.clean.matrix()[clean_rows], common_draws=True, exact=measured.exact)
    allowed = max(3 * moved.standard_error, 1 / rows.size)
    text = f"with radius 0 accuracy differs from the clean one by {100 * moved.value:+.2f} points on {rows.size} samples"
    return Finding(Status.PASS if abs(moved.value) <= allowed + 1e-12 else Status.FAIL, text)


def _iterative_beats_one_step(evidence: Evidence) -> Finding:
    problems, num_compared = [], 0
    # Not T0: a transfer attack may well gain by taking fewer steps, and its draws are not shared.
    for one_step in (each for each in evidence.attacks if each.one_step and each.protocol != "T0"):
        for iterative in evidence.attacks:
            if iterative.one_step or not iterative.in_threat_model or iterative.protocol != one_step.protocol:
                continue
            entry = attack_entry(iterative.attack or "")
            if entry.is_transfer or not (entry.uses_gradients and entry.climbs_a_loss):
                continue  # not more of the same step; C9 and C10 compare some of them
            num_compared += 1
            excess, error = difference(iterative, one_step)
            if exceeds(excess, error):
                problems.append(
                    f"{iterative.name} ({iterative.protocol}) leaves {100 * excess:.1f} points more accuracy than {one_step.name}"
                )
    if problems:
        return evidence.masking("; ".join(problems))
    if not num_compared:
        return skipped("the suite has no one-step and iterative attack under the same protocol")
    return Finding(Status.PASS, "no iterative attack is weaker than the one-step attack")


def _gradient_exists(evidence: Evidence) -> Finding:
    if not evidence.examination:
        return skipped("the block that examines the model is missing")
    if evidence.examination.get("has_gradient") is False:
        names = ", ".join(dict.fromkeys(each.name for each in evidence.attacks)) or "nothing"
        return Finding(
            Status.FAIL,
            "no gradient leads from the logits to the pixels (an argmax, a comparison, a cast or another library cuts it), so that the "
            f"attacks that follow it could not run; what ran instead: {names}",
        )
    shares = evidence.examination["missing_gradients"]
    where, worst = max(shares.items(), key=lambda entry: entry[1])
    text = f"the input gradient is zero or not finite in {worst:.1%} of samples ({where}) of {evidence.examination['num_samples']}"
    predicts = _gradient_predicts(evidence)
    if predicts is not None and (predicts.status is Status.FAIL or worst <= 0.005):
        return predicts
    if worst <= 0.005:
        return Finding(Status.PASS, text)
    # A saturated cross-entropy has no gradient where the margin has one: an attack on the margin is then as strong as ever.
    of_margin = max((share for name, share in shares.items() if name.startswith("margin")), default=worst)
    if worst > 0.05 and of_margin <= 0.05 and any(not _on_cross_entropy(each) for each in _gradient_attacks(evidence)):
        return Finding(Status.WARN, f"{text}; attacks on the margin have one, and the suite has such attacks")
    return Finding(Status.WARN, text) if worst <= 0.05 else evidence.masking(text)


_LEAST_PREDICTED = 0.25
"""Part of what the gradient predicts that a step must do; trained networks, k-winners-take-all too, do 0.9 or more over some step."""

_MOST_PREDICTED = 10


def _gradient_predicts(evidence: Evidence) -> Finding | None:
    """Return whether a step along the gradient does what the gradient predicts; None where nobody looked (records of earlier versions)."""
    steps = evidence.examination.get("prediction", {})
    for point, medians in steps.items():
        if max(medians) < _LEAST_PREDICTED:
            seen = f"steps along the gradient ({point}) move the margin by {max(medians):.2g} times what the gradient predicts"
            return evidence.masking(f"{seen}: it is that of a wave, or of another function")
        if min(medians) > _MOST_PREDICTED:
            seen = f"steps along the gradient ({point}) move the margin by {min(medians):.0f} times what the gradient predicts"
            return Finding(Status.WARN, f"{seen}: the forward pass does something that the backward pass leaves out")
    if not steps:
        return None
    worst = min(max(medians) for medians in steps.values())
    return Finding(Status.PASS, f"the input gradient exists; steps along it move the margin by {worst:.2f} times what it predicts")


def _gradient_attacks(evidence: Evidence) -> list[Measurement]:
    return evidence.under("T1", lambda entry: entry.uses_gradients and not entry.is_transfer and not entry.one_step)


def _on_cross_entropy(measurement: Measurement) -> bool:
    name, parameters = measurement.attack or "", measurement.header["item"]["parameters"]
    return name == "apgd_ce" or (name == "pgd" and parameters.get("loss", "cross_entropy") == "cross_entropy")


def _state_hygiene(evidence: Evidence) -> Finding:
    problems: set[str] = set()
    for each in evidence.all:
        for record in each.records:
            hygiene = record["block"]["hygiene"]
            if not hygiene["same_weights"]:
                problems.add(f"{each.name}: weights or statistics changed")
            if hygiene["training_modules"]:
                problems.add(f"{each.name}: {hygiene['training_modules']} modules were left in train mode")
            problems.update(f"{each.name}: {item} changed" for item in hygiene["changed"])
    if problems:
        return Finding(Status.FAIL, "; ".join(sorted(problems)))
    return Finding(Status.PASS, "weights, buffers, modes, gradients and global generators are as before each attack")


def _independence(evidence: Evidence) -> Finding:
    problems, compared = [], []
    for each in evidence.attacks:
        if any(record["block"]["draws_disjoint"] is False for record in each.records):
            problems.append(f"{each.name} ({each.protocol}) was scored on a draw that its attack had seen")
        if each.protocol == "T1" and each.has("selection") and not each.exact:
            compared.append(each)
    for each in compared:
        first, second = each.matrix("selection").mean(0), each.matrix().mean(0)
        if first.size < 2 or second.size < 2:
            continue
        degrees = first.size + second.size - 2
        pooled = ((first.size - 1) * first.var(ddof=1) + (second.size - 1) * second.var(ddof=1)) / degrees
        error = float(np.sqrt(pooled * (1 / first.size + 1 / second.size)))
        # Three standard errors in the sense of Student, shared between the comparisons: few draws know their spread badly.
        limit = float(stats.t.ppf(1 - stats.norm.sf(3) / len(compared), degrees)) * error
        moved = float(first.mean() - second.mean())
        if abs(moved) > limit + 1e-12:
            problems.append(f"{each.name}: a second set of draws moves accuracy by {100 * moved:+.2f} points, {100 * limit:.2f} allowed")
    shown = [*evidence.attacks] if evidence.clean is None else [evidence.clean, *evidence.attacks]
    enumerated = [each for each in shown if each.protocol == "T1" and each.has(SAMPLED)]
    for each in enumerated:
        correct = each.matrix()
        columns, sampled = correct.mean(0), each.matrix(SAMPLED).mean(0)
        # All configurations are known, so the spread of a mean over sampled ones is too: of one draw for all images, or of one for each.
        by_image = correct.mean(1)
        spread = max(columns.std(), np.sqrt((by_image * (1 - by_image)).sum()) / by_image.size)
        limit = float(stats.norm.isf(stats.norm.sf(3) / len(enumerated)) * spread / np.sqrt(sampled.size))
        moved = float(sampled.mean() - columns.mean())
        if abs(moved) > limit + 1e-12:
            problems.append(
                f"{each.name}: {sampled.size} draws as inference takes them give {moved * 100:+.2f} points compared with the mean over all "
                f"{columns.size} configurations, {100 * limit:.2f} allowed: they are not equally likely, or not all there are"
            )
    if problems:
        return Finding(Status.FAIL, "; ".join(problems))
    if not evidence.randomized:
        return does_not_apply("the model is deterministic")
    if not compared and not enumerated:
        return skipped("nothing was scored on two sets of draws")
    if enumerated:
        return Finding(Status.PASS, "draws as inference takes them give the same accuracies as the mean over all configurations")
    return Finding(Status.PASS, "a second, disjoint set of draws gives the same accuracies")


def _outputs_are_logits(evidence: Evidence) -> Finding:
    if not evidence.examination:
        return skipped("the block that examines the model is missing")
    outputs = evidence.examination["outputs"]
    if not outputs["finite"]:
        return Finding(Status.FAIL, "the model returns values that are not finite")
    if outputs["are_probabilities"]:
        return Finding(Status.WARN, "the model returns probabilities, not logits: cross-entropy on them has the wrong gradient")
    if 0 < outputs["median_margin"] < _SMALL_MARGIN and evidence.all[0].header["num_classes"] > 2:
        return _small_logits(evidence, outputs["median_margin"])
    if outputs["median_margin"] > 50:
        return Finding(Status.WARN, f"the median margin of the logits is {outputs['median_margin']:.0f}: cross-entropy saturates")
    return Finding(Status.PASS, f"outputs are logits of a usable scale (median margin {outputs['median_margin']:.2g})")


_SMALL_MARGIN = 0.05  # where softmax is as good as uniform; networks that were trained have medians of order one


def _small_logits(evidence: Evidence, median_margin: float) -> Finding:
    """Return the finding for logits so small that cross-entropy pushes towards all classes alike instead of the nearest one."""
    text = (
        f"the median margin of the logits is {median_margin:.2g}: at so small a scale cross-entropy pulls towards all wrong classes alike"
    )
    # A short search without gradients, or one on some of the images, is no substitute for gradients that point somewhere.
    size = max((len(each.ids) for each in evidence.attacks), default=0)
    indifferent = [each.name for each in _gradient_attacks(evidence) if len(each.ids) == size and _ignores_scale(each)]
    if indifferent:
        return Finding(Status.WARN, f"{text}; {', '.join(dict.fromkeys(indifferent))} does not depend on the scale")
    dependent = tuple(dict.fromkeys(each.name for each in evidence.attacks if not _ignores_scale(each)))
    return evidence.masking(f"{text}, and every attack along gradients of all images depends on the scale", dependent)


def _ignores_scale(measurement: Measurement) -> bool:
    loss = measurement.header["item"]["parameters"].get("loss")
    if loss is None:
        return attack_entry(measurement.attack or "").ignores_scale
    return loss in ("margin", "difference_of_logits_ratio")


def _static_inference(evidence: Evidence) -> Finding:
    if not evidence.examination:
        return skipped("the block that examines the model is missing")
    calls = evidence.examination["gradient_calls_in_forward"]
    if calls:
        return Finding(Status.WARN, f"one forward computes gradients {calls} times: the model optimizes at test time")
    return Finding(Status.PASS, "forward computes no gradients")


def _known_draw_is_lower(evidence: Evidence) -> Finding:
    pairs = evidence.pairs("T2", "T1")
    if not pairs:
        if not evidence.randomized:
            return does_not_apply("the model is deterministic")
        return skipped("no attack was run under both T1 and T2")
    problems, seen = [], []
    for known, unknown in pairs:
        excess, error = difference(known, unknown)
        seen.append(f"{known.name}: knowing the draw changes accuracy by {100 * excess:+.1f} points")
        if exceeds(excess, error):
            problems.append(f"{known.name}: accuracy against an attacker who knows the draw is {100 * excess:.1f} points higher")
    return Finding(Status.FAIL, "; ".join(problems)) if problems else Finding(Status.PASS, "; ".join(seen))


_RECORD_CHECKS: tuple[Check, ...] = (
    Check(
        "C1",
        "randomness is alive before and after the attack",
        "Make every random part a random site that `resample` reaches (`as_random_model` makes one of a network that draws in forward), "
        "and leave no other randomness there, as dropout in train mode.",
        _randomness_alive,
        Meaning.ELSE,
    ),
    Check("C2", "who shares a draw", "", _draw_scope, Meaning.ELSE),
    Check(
        "C3",
        "perturbed images are valid",
        "Do not report this attack; mend its projection, or lower its step size if it produces NaN.",
        _validity,
        Meaning.ELSE,
    ),
    Check(
        "C4",
        "no sample is skipped",
        "This attack gives up on samples that one noisy forward misclassifies; read apgd_ce or pgd under T1 instead.",
        _nothing_skipped,
    ),
    Check(
        "C5",
        "radius 0 gives the clean accuracy",
        "Clean and perturbed images do not pass the same way through the model: compare modes, normalization and draws.",
        _zero_radius,
        Meaning.ELSE,
    ),
    Check(
        "C8",
        "iterative attacks are at least as strong as one step",
        "A sign of masked gradients: raise the number of draws, try the margin loss and square.",
        _iterative_beats_one_step,
    ),
    Check(
        "C12",
        "the input gradient exists and predicts what a step does",
        "Gradients are masked: attack with the margin loss, give the backward pass of the part that is not "
        "differentiable (`evaluate(..., backward=module)`), or use square.",
        _gradient_exists,
    ),
    Check(
        "C16",
        "the evaluation leaves no trace",
        "Find what writes to the model in forward or in the attack; numbers depend on the order of the blocks.",
        _state_hygiene,
        Meaning.ELSE,
    ),
    Check(
        "C17",
        "attack and scoring draws are independent",
        "Raise the number of evaluation draws; if it persists, draws leak from the attack into the score.",
        _independence,
        Meaning.ELSE,
    ),
    Check(
        "C18",
        "outputs are logits",
        "Return logits; with a large or a tiny scale use apgd_margin or apgd_dlr, which do not depend on it.",
        _outputs_are_logits,
        Meaning.ELSE,
    ),
    Check(
        "C20",
        "knowing the draw does not hurt the attacker",
        "The attack under T2 is too weak or the one under T1 was lucky: raise the steps of both.",
        _known_draw_is_lower,
    ),
    Check(
        "C21",
        "inference is static",
        "An adaptive attack is needed: attack through the optimization in forward, and transfer from the model without it.",
        _static_inference,
    ),
)

CHECKS: tuple[Check, ...] = tuple(sorted((*_RECORD_CHECKS, *STUDY_CHECKS), key=lambda check: int(check.id[1:])))
"""All checks, by number."""
