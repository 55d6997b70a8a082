"""Checks that compare kinds of attacks, or need blocks of their own (studies)."""

from __future__ import annotations

import math

import numpy as np

from analysis.checks.evidence import Check, Evidence, Finding, Status, difference, shares, skipped
from analysis.evaluation.measurements import Measurement, common_rows
from analysis.evaluation.studies import full_range, large_epsilon
from models.threat_model import ThreatModel, format_pixel_fraction

_NO_STUDY = "the suite does not ask for it; suites `standard` and `full` do"


def _epsilon_curve(evidence: Evidence) -> Finding:
    curve = sorted(evidence.studies("epsilon"), key=lambda each: each.header["study"]["level"])
    if not curve or evidence.clean is None:
        return skipped(_NO_STUDY)
    problems = []
    for weaker, stronger in zip([evidence.clean, *curve], curve, strict=False):
        rise, error = difference(stronger, weaker)
        if rise > 2 * error + 1e-12:
            problems.append(f"accuracy rises by {100 * rise:.1f} points at radius {_radius(stronger)}")
    threat_model = ThreatModel(**curve[0].header["threat_model"])
    large, full = large_epsilon(threat_model), full_range(threat_model, evidence.examination.get("num_pixels", 1))
    chance = 1 / curve[0].header["num_classes"]
    for each in curve:
        level, estimate = each.header["study"]["level"], each.estimate
        if level >= large and not math.isclose(level, full) and estimate.value > 0.05:
            problems.append(f"{100 * estimate.value:.1f} % are right at radius {_radius(each)}, at most 5 % may be")
        if math.isclose(level, full):
            allowed = max(0.01, chance + 3 * estimate.standard_error) if evidence.randomized else 0.01
            if estimate.value > allowed:
                problems.append(f"{100 * estimate.value:.1f} % are right although every image is allowed")
    if problems:
        return Finding(Status.FAIL, "; ".join(problems))
    return Finding(Status.PASS, f"accuracy falls from radius to radius, to {100 * curve[-1].estimate.value:.1f} % where all is allowed")


def _radius(measurement: Measurement) -> str:
    value = format_pixel_fraction(measurement.header["study"]["level"])
    return value if isinstance(value, str) else f"{value:.3g}"


def _converged(evidence: Evidence) -> Finding:
    found = [each for name in ("steps", "draws") for each in evidence.studies(name)]
    if not found:
        return skipped(_NO_STUDY)
    open_ones, seen = [], []
    for each in found:
        name = each.header["study"]["name"]
        before, after = each.matrix("previous").mean(1), shares(each)
        gain = float((before - after).mean())
        error = float((before - after).std(ddof=1) / math.sqrt(before.size)) if before.size > 1 else 0.0
        level = max(fact["levels"][-1] for fact in evidence.facts(name))
        seen.append(f"doubling the {name} to {level} changes accuracy by {-100 * gain:+.1f} points")
        if gain >= max(0.01, 2 * error):
            open_ones.append(seen[-1])
    if open_ones:
        return Finding(Status.WARN, f"accuracies are upper bounds only: {'; '.join(open_ones)}, and more was not tried")
    return Finding(Status.PASS, "; ".join(seen))


def _black_box(evidence: Evidence) -> Finding:
    black = evidence.under("T1", lambda entry: not entry.uses_gradients)
    white = evidence.under("T1", lambda entry: entry.uses_gradients and not entry.is_transfer and not entry.one_step)
    if not black or not white:
        return skipped("the suite has no black-box and gradient attack under T1")
    worst, worst_share = "", -1.0
    for each in black:
        noise = 0.0 if each.exact else 1 / math.sqrt(each.matrix().shape[1])  # two standard errors of a share near one half
        lowest = np.ones(len(each.ids))
        for other in white:
            rows, other_rows = common_rows(each, other)
            lowest[rows] = np.minimum(lowest[rows], shares(other)[other_rows])
        share = float(((shares(each) < 0.5) & (lowest > 0.5 + noise)).mean())
        if share > worst_share:
            worst, worst_share = each.name, share
    text = f"{worst} breaks {worst_share:.1%} of samples that no gradient attack breaks"
    if worst_share > 0.01:
        return Finding(Status.FAIL, text)
    return Finding(Status.WARN if worst_share > 0.002 else Status.PASS, text)


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
        if lead > 2 * error + 1e-12:
            problems.append(f"{each.name}, made on another function, leaves {100 * lead:.1f} points less accuracy than {best.name}")
    if problems:
        return Finding(Status.FAIL, "; ".join(problems))
    between_draws = _transfer_between_draws(evidence)
    if between_draws:
        return Finding(Status.WARN, "; ".join(between_draws))
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
    facts = evidence.facts("random_search")
    if not facts:
        return skipped(_NO_STUDY)
    searched, flipped = (sum(fact[name] for fact in facts) for name in ("num_searched", "num_flipped"))
    if not searched:
        return Finding(Status.PASS, "no image survives the attack, so there is none to search around")
    text = (
        f"{facts[0]['num_points']} random points flip {flipped} of {searched} images that survive the attack"
        f" (majority of {facts[0]['num_votes']} draws)"
    )
    return Finding(Status.FAIL if flipped > 0.01 * searched else Status.PASS, text)


def _gradient_resolved(evidence: Evidence) -> Finding:
    facts = evidence.facts("gradient_resolution")
    if not facts:
        return skipped(_NO_STUDY if evidence.randomized else "the model is deterministic")
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
        return Finding(Status.FAIL, f"{silent} of {samples} images erred on the way, but the point returned is right again")
    late = max((fact["late_share"] for fact in facts if "late_share" in fact), default=0.0)
    text = f"the last 10 points looked at add {late:.1%} to the rise of the loss of surviving images"
    return Finding(Status.WARN if late > 0.05 else Status.PASS, text)


def _attack_unit_test(evidence: Evidence) -> Finding:
    facts = evidence.facts("unit_test")
    if not facts:
        return skipped(_NO_STUDY)
    usable = [fact for fact in facts if fact.get("num_separated")]
    if not usable:
        return skipped(facts[0].get("reason", "no image could be tested"))
    total, found, at_random = (sum(fact[name] for fact in usable) for name in ("num_separated", "num_found", "num_found_at_random"))
    text = f"the attack finds {found} of {total} points that are known to exist, random search {at_random}"
    if at_random >= 0.5 * total:
        return Finding(Status.WARN, f"{text}: the test is too easy to say anything")
    return Finding(Status.PASS if found >= 0.95 * total else Status.FAIL, text)


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
    ),
)
