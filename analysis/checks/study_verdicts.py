"""Checks that compare kinds of attacks, or need blocks of their own (studies)."""

from __future__ import annotations

import itertools
import math

import numpy as np

from analysis.checks.evidence import (
    Check,
    Evidence,
    Finding,
    Meaning,
    Status,
    clearly_more,
    difference,
    does_not_apply,
    exceeds,
    shares,
    skipped,
)
from analysis.evaluation.measurements import Measurement, common_rows
from analysis.evaluation.studies import full_range, half_range
from models.threat_model import ThreatModel, format_pixel_fraction

_NOISE_SHARE = 0.01  # of images on which an attack at a radius that holds everything may get stuck
_OF_SURVIVORS = 0.1  # of the images that survive gradients: what a black box may break before the number cannot be trusted
_LOST_TO_NOISE = 0.3  # of images that survive: where uniform noise may lead further than gradients
_SHORT = 200  # queries: a black box that has hardly begun
_MISSED = 0.5  # of the planted points: an attack that misses more gains little over chance
_NO_STUDY = "the suite does not ask for it; suites `standard` and `full` do"


def _epsilon_curve(evidence: Evidence) -> Finding:
    curve = sorted(evidence.studies("epsilon"), key=lambda each: each.header["study"]["level"])
    if not curve or evidence.clean is None:
        return skipped(_NO_STUDY)
    problems = []
    for weaker, stronger in zip([evidence.clean, *curve], curve, strict=False):
        rise, error = difference(stronger, weaker)
        if exceeds(rise, error):
            problems.append(f"accuracy rises by {100 * rise:.1f} points at radius {_radius(stronger)}")
    threat_model = ThreatModel(**curve[0].header["threat_model"])
    num_pixels = evidence.examination.get("num_pixels", 1)
    for each in curve:
        level = each.header["study"]["level"]
        limit = _provable_limit(evidence, each, level, threat_model, num_pixels)
        right = float(shares(each).sum())
        if limit is not None and clearly_more(round(right), len(each.ids), limit):
            share = right / len(each.ids)
            problems.append(f"{share:.1%} are right at radius {_radius(each)}, where the truth is at most {limit:.1%} for any model")
    if problems:
        return evidence.masking("; ".join(problems))
    return Finding(Status.PASS, f"accuracy falls from radius to radius, to {100 * curve[-1].estimate.value:.1f} % at {_radius(curve[-1])}")


def _provable_limit(evidence: Evidence, measurement: Measurement, level: float, threat_model: ThreatModel, num_pixels: int) -> float | None:
    """Return what no model's accuracy can be above at a radius, up to chance, or None where nothing is known for sure.

    From half of the range on every ball holds the same grey image: its one answer is right for one class only, and under a random model
    the chances of all classes sum to one. Where all is allowed, every ball holds the images of the other classes, too: a model that is
    right on images of two classes has an answer that is wrong for each.
    """
    if level < half_range(threat_model, num_pixels) * (1 - 1e-9):
        return None
    labels = np.array(measurement.column("labels"))
    _, counts = np.unique(labels, return_counts=True)
    most_frequent = float(counts.max() / counts.sum())
    everything = full_range(threat_model, num_pixels)
    is_whole = math.isclose(level, everything) and math.isclose(everything, 2 * half_range(threat_model, num_pixels))
    if not is_whole or evidence.randomized or evidence.clean is None:
        return most_frequent
    rows, clean_rows = common_rows(measurement, evidence.clean)
    answers = np.unique(labels[rows][shares(evidence.clean)[clean_rows] > 0.5])
    return _NOISE_SHARE if len(answers) > 1 else most_frequent


def _radius(measurement: Measurement) -> str:
    value = format_pixel_fraction(measurement.header["study"]["level"])
    return value if isinstance(value, str) else f"{value:.3g}"


def _converged(evidence: Evidence) -> Finding:
    second = _second_starts(evidence)
    found = [each for name in ("steps", "draws") for each in evidence.studies(name)]
    if not found and not second:
        return skipped(_NO_STUDY)
    open_ones = [text for text, is_open in second if is_open]
    seen = [text for text, _ in second]
    for each in found:
        name = each.header["study"]["name"]
        before, after = each.matrix("previous").mean(1), shares(each)
        gain = float((before - after).mean())
        error = float((before - after).std(ddof=1) / math.sqrt(before.size)) if before.size > 1 else 0.0
        level = max(fact["levels"][-1] for fact in evidence.facts(name))
        seen.append(f"doubling the {name} to {level} changes accuracy by {-100 * gain:+.1f} points")
        if gain >= max(0.01, 2 * error):
            open_ones.append(f"{seen[-1]}, and more was not tried")
    if open_ones:
        return Finding(Status.WARN, f"accuracies are upper bounds only: {'; '.join(open_ones)}")
    return Finding(Status.PASS, "; ".join(seen))


def _second_starts(evidence: Evidence) -> list[tuple[str, bool]]:
    """Return, for attacks that the suite runs twice with other seeds, what the second run adds and whether that is too much."""
    found = []
    for first, second in itertools.combinations(evidence.under("T1", lambda entry: entry.uses_gradients and not entry.is_transfer), 2):
        items = [{name: each.header["item"][name] for name in ("attack", "parameters", "num_draws")} for each in (first, second)]
        if items[0] != items[1]:
            continue
        rows, other_rows = common_rows(first, second)
        noise = 0.0 if first.exact else 1 / math.sqrt(first.matrix().shape[1])
        survives = shares(first)[rows] > 0.5 + noise
        added, survivors = int((survives & (shares(second)[other_rows] < 0.5)).sum()), int(survives.sum())
        text = f"{second.name} breaks {added} of {survivors} images that survive {first.name}, which differs in its start alone"
        found.append((text, clearly_more(added, survivors, 0.01)))
    return found


def _black_box(evidence: Evidence) -> Finding:
    black = evidence.under("T1", lambda entry: not entry.uses_gradients)
    white = evidence.under("T1", lambda entry: entry.uses_gradients and not entry.is_transfer and not entry.one_step)
    if not black or not white:
        return skipped("the suite has no black-box and gradient attack under T1")
    seen: list[tuple[float, int, int, int, Measurement]] = []
    for each in black:
        noise = 0.0 if each.exact else 1 / math.sqrt(each.matrix().shape[1])  # two standard errors of a share near one half
        lowest, margins = np.ones(len(each.ids)), np.full(len(each.ids), np.inf)
        for other in white:
            rows, other_rows = common_rows(each, other)
            lowest[rows] = np.minimum(lowest[rows], shares(other)[other_rows])
            margins[rows] = np.minimum(margins[rows], np.array(other.column("margin"))[other_rows])
        survives = lowest > 0.5 + noise
        leads = int((survives & (np.array(each.column("margin")) < margins)).sum())
        broken = int(((shares(each) < 0.5) & survives).sum())
        seen.append((broken / len(each.ids), broken, int(survives.sum()), leads, each))
    share, broken, survivors, leads, worst = max(seen, key=lambda entry: entry[0])
    text = f"{worst.name} breaks {broken} of {len(worst.ids)} images that no gradient attack breaks ({survivors} survive those)"
    # Where gradients are seen to lead nowhere, every image that only a black box breaks is a sign of many that it does not; where they
    # lead somewhere (k-winners-take-all, say), a few are no more than that. A search so short must not be ahead of gradients already.
    queries = worst.header["item"]["parameters"].get("num_queries", math.inf)
    is_ahead = queries <= _SHORT and broken > 0.05 * survivors and clearly_more(leads, survivors, _LOST_TO_NOISE)
    if clearly_more(broken, survivors, _OF_SURVIVORS) or is_ahead or (share > 0.01 and _lead_nowhere(evidence)):
        return evidence.masking(text)
    if share > 0.002:
        return Finding(
            Status.WARN, f"{text}: the number counts them; where {worst.name} was not run it may be {100 * share:.1f} points high"
        )
    return Finding(Status.PASS, text)


def _lead_nowhere(evidence: Evidence) -> bool:
    """Return whether gradients miss planted points, or lead no further than noise."""
    return any(found is not None and found.status is Status.FAIL for found in (_attack_unit_test(evidence), _beaten_noise(evidence)))


def _transfer(evidence: Evidence) -> Finding:
    transfers = evidence.under("T1", lambda entry: entry.is_transfer)
    white = evidence.under("T1", lambda entry: entry.uses_gradients and not entry.is_transfer and not entry.one_step)
    problems, seen = [], []
    best = min(white, key=lambda each: each.estimate.value, default=None)
    for each in transfers:
        if best is None:
            break
        lead, error = difference(best, each)
        seen.append(f"{each.name} leaves {100 * -lead:+.1f} points compared with {best.name}")
        if exceeds(lead, error):
            problems.append(f"{each.name}, made on another function, leaves {100 * lead:.1f} points less accuracy than {best.name}")
    if problems:
        return evidence.masking("; ".join(problems))
    between_draws = _transfer_between_draws(evidence)
    if between_draws:
        return Finding(Status.WARN, "; ".join(between_draws))
    if not seen and not evidence.randomized:
        return does_not_apply("the model has one draw, and no other model was named to transfer from (`--surrogate`)")
    if not seen:
        return skipped("the suite has no transfer attack for this model")
    return Finding(Status.PASS, "; ".join(seen))


def _transfer_between_draws(evidence: Evidence) -> list[str]:
    """Return why numbers under T0 flatter: on a randomized model they come from a transfer attack between two draws."""
    if not evidence.randomized:
        return []
    frozen = [each for each in evidence.attacks if each.protocol == "T0" and each.header["scoring"]["attacked_draw"] == "frozen"]
    unknown = [each for each in evidence.attacks if each.protocol == "T1" and each.in_threat_model]
    if frozen and not unknown:
        return ["T0 attacks one draw and scores another: every attack of this suite is a transfer attack between draws"]
    reasons = []
    for paper, honest in evidence.pairs("T0", "T1"):
        if paper.header["scoring"]["attacked_draw"] != "frozen":
            continue
        excess, error = difference(paper, honest)
        if excess > max(0.01, 2 * error):
            reasons.append(
                f"{paper.name} under T0 is a transfer attack between draws: it leaves {100 * excess:.1f} points more than under T1"
            )
    return reasons


def _random_search(evidence: Evidence) -> Finding:
    beaten = _beaten_noise(evidence)
    facts = evidence.facts("random_search")
    if not facts:
        return beaten or skipped(_NO_STUDY)
    searched, flipped = (sum(fact[name] for fact in facts) for name in ("num_searched", "num_flipped"))
    if beaten is not None and beaten.status is not Status.PASS:
        return beaten
    if not searched:
        return Finding(Status.PASS, "no image survives the attack, so there is none to search around")
    text = (
        f"{facts[0]['num_points']} random points flip {flipped} of {searched} images that survive the attack"
        f" (majority of {facts[0]['num_votes']} draws)"
    )
    # A flip was confirmed on draws of its own, so two are no chance; a single one of few images says little.
    return evidence.masking(text) if flipped > max(1, 0.01 * searched) else Finding(Status.PASS, text)


def _beaten_noise(evidence: Evidence) -> Finding | None:
    """Return whether gradients lead further than uniform noise of the same radius; None without an attack that tries noise.

    On images that survive the strongest gradient attack it must leave a smaller margin than the worst random point. Where gradients lead
    nowhere it does so as often as chance, or never.
    """
    noises = evidence.under("T1", lambda entry: entry.name == "uniform_noise")
    gradients = evidence.under("T1", lambda entry: entry.uses_gradients and not entry.is_transfer)
    if not noises or not gradients:
        return None
    noise, best = noises[0], min(gradients, key=lambda each: each.estimate.value)
    rows, noise_rows = common_rows(best, noise)
    survives = shares(best)[rows] > 0.5
    lost_rows = np.array(best.column("margin"))[rows] >= np.array(noise.column("margin"))[noise_rows]
    lost, total = int((lost_rows & survives).sum()), int(survives.sum())
    if not total:
        return Finding(Status.PASS, f"no image survives {best.name}, so there is none on which noise could lead further")
    points = noise.header["item"]["parameters"].get("num_points", 20)
    text = f"{points} points of uniform noise lead further than {best.name} on {lost} of {total} images that survive it"
    return evidence.masking(text) if clearly_more(lost, total, _LOST_TO_NOISE) else Finding(Status.PASS, text)


def _gradient_resolved(evidence: Evidence) -> Finding:
    facts = evidence.facts("gradient_resolution")
    if not facts:
        return skipped(_NO_STUDY) if evidence.randomized else does_not_apply("the model is deterministic")
    worst = min(facts, key=lambda fact: fact["cosines"][-1])
    level, cosine = worst["levels"][-1], worst["cosines"][-1]
    text = f"two independent means of {level} gradients have a median cosine of {cosine:.2f}"
    if cosine < 0.5:
        return Finding(Status.WARN, f"{text}: the gradient is not resolvable")
    return Finding(Status.PASS, text)


def _progress(evidence: Evidence) -> Finding:
    facts = evidence.facts("progress")
    if not facts:
        return skipped(_NO_STUDY)
    samples = sum(fact["num_samples"] for fact in facts)
    silent = sum(fact.get("num_silent", 0) for fact in facts)
    if silent:
        return evidence.masking(f"{silent} of {samples} images erred on the way, but the point returned is right again")
    late = max((fact["late_share"] for fact in facts if "late_share" in fact), default=0.0)
    text = f"the last 10 points looked at add {late:.1%} to the rise of the loss of surviving images"
    return Finding(Status.WARN if late > 0.05 else Status.PASS, text)


def _attack_unit_test(evidence: Evidence) -> Finding:
    facts = evidence.facts("unit_test")
    if not facts:
        return skipped(_NO_STUDY)
    usable = [fact for fact in facts if fact.get("num_separated")]
    if not usable:
        return does_not_apply(facts[0].get("reason", "no image could be tested"))
    total, found, at_random = (sum(fact[name] for fact in usable) for name in ("num_separated", "num_found", "num_found_at_random"))
    text = f"the attack finds {found} of {total} points that are known to exist, random search {at_random}"
    if at_random >= 0.5 * total:
        return Finding(Status.WARN, f"{text}: the test is too easy to say anything")
    if clearly_more(total - found, total, _MISSED):
        return evidence.masking(text)
    return Finding(Status.PASS if found >= 0.9 * total else Status.WARN, text)


def _calibrated(evidence: Evidence) -> Finding:
    facts = evidence.facts("calibration")
    if not facts:
        return skipped(_NO_STUDY)
    rows = [row for fact in facts for row in fact["toys"]]
    wrong = [f"{row['toy']}, {row['what']}: {row['measured']} instead of {row['expected']}" for row in rows if not row["met"]]
    if wrong:
        return Finding(Status.FAIL, "; ".join(wrong))
    return Finding(Status.PASS, f"{len(rows)} stored results on shipped toys are reproduced, and the masked toy is flagged")


STUDY_CHECKS: tuple[Check, ...] = (
    Check(
        "C6",
        "accuracy falls with the radius",
        "A sign of masked gradients, or of an attack that cannot use its radius: try the margin loss, more steps, square.",
        _epsilon_curve,
    ),
    Check(
        "C7",
        "steps and draws are converged",
        "Raise `steps` and `num_draws` of the suite's attacks, and `max_steps` and `max_draws` of its studies.",
        _converged,
    ),
    Check(
        "C9",
        "gradients beat the black box",
        "Gradients are masked: attack with the margin loss, more draws, or through a differentiable stand-in.",
        _black_box,
    ),
    Check(
        "C10",
        "no transfer attack beats the white box",
        "Read T1, not T0. Where a transfer attack beats the white box, its gradients are masked: raise draws and steps.",
        _transfer,
    ),
    Check(
        "C11",
        "random points find nothing new",
        "The attack misses what chance finds: gradients are masked, or there are too few draws.",
        _random_search,
    ),
    Check(
        "C13",
        "the gradient is resolved",
        "Average more draws, and trust square and transfer attacks more than gradients.",
        _gradient_resolved,
    ),
    Check(
        "C14",
        "the attack ran to its end",
        "Raise the steps; an attack must return the best point it has seen.",
        _progress,
    ),
    Check(
        "C15",
        "the attack passes a unit test",
        "The attack is too weak for this network: raise its steps, change its loss, or look for masked gradients.",
        _attack_unit_test,
    ),
    Check(
        "C19",
        "the installation is calibrated",
        "This installation computes other numbers than the stored ones: compare versions and devices, and report no number from it.",
        _calibrated,
        Meaning.ELSE,
    ),
)
