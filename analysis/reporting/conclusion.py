"""What an evaluation says: as a page of Markdown, and in one sentence, the last line that a person reads."""

from __future__ import annotations

from analysis.reporting import tables
from analysis.result import EvaluationResult
from analysis.statistics import Estimate
from analysis.statistics.stopping import Looks


def to_markdown(result: EvaluationResult) -> str:
    """Return the table, the headline and the verdicts as Markdown."""
    marked = result.marked
    shown = [
        {
            "attack": row.attack + ("" if row.in_threat_model else " (outside the threat model)"),
            "protocol": row.protocol,
            "accuracy": tables.format_estimate(row.estimate, marked=marked) + ("" if row.finished else " unfinished"),
            "how": row.caption,
        }
        for row in result.rows
    ]
    parts = [tables.to_markdown(shown)]
    if result.headline is not None:
        parts.append(f"Worst attack per sample, unknown draw (T1): {tables.format_estimate(result.headline, marked=marked)}\n")
        if note := headline_note(result):
            parts.append(f"{note}\n")
    parts += [f"{sentence(remark)}.\n" for remark in result.remarks]
    checks = [
        {"check": v.id, "title": v.title, "verdict": v.status.value, "seen": v.explanation, "what to do": v.advice or None}
        for v in result.verdicts
    ]
    parts.append(tables.to_markdown(checks))
    if marked:
        failed = ", ".join(verdict.id for verdict in result.failed)
        parts.append(f"{tables.MARK} These numbers must not be believed as they are: {failed} failed.\n")
    elif result.finished:
        parts.append(f"{sentence(_licence(result))}.\n")
    return "\n".join(parts)


def headline_note(result: EvaluationResult) -> str:
    """Return the sentence that explains why a listed attack is below the headline, or nothing where none is."""
    if not result.below_headline or result.headline is None:
        return ""
    lowest = result.below_headline[0]
    some, all_images = lowest.estimate.num_samples, result.headline.num_samples
    if some < all_images:
        return (
            f"{lowest.attack} alone is at {100 * lowest.estimate.value:.1f} %, below the worst attack per sample at "
            f"{100 * result.headline.value:.1f} %: it ran on {some} of the {all_images} images only."
        )
    return (
        f"{lowest.attack} alone is at {100 * lowest.estimate.value:.1f} %, below the worst attack per sample at "
        f"{100 * result.headline.value:.1f} %: which attack is worst is chosen per image on other draws than those that score, so that "
        "luck in choosing counts for nobody, and a choice among attacks of equal strength can lose by chance."
    )


def conclusion(name: str, result: EvaluationResult) -> str:
    """Return one sentence that says what may be believed."""
    if not result.finished:
        return f"{name}: the evaluation is not finished; start the same command again."
    if result.headline is None:
        return f"{name}: no bounded attack ran against an unknown draw, so there is no headline."
    if result.marked:
        failed = ", ".join(f"{verdict.id} ({verdict.title})" for verdict in result.failed)
        means = "; ".join(
            f"{', '.join(verdict.id for verdict in result.failed if verdict.meaning is meaning)}: {meaning.value}"
            for meaning in dict.fromkeys(verdict.meaning for verdict in result.failed)
        )
        return f"{name}: evaluation invalid. Do not quote these numbers: {failed} failed. {means}."
    shown = tables.format_estimate(result.headline)
    checks = _licence(result)
    if result.looks is not None:
        checks += f"; its interval holds although images were added until it was narrow ({_looks(result.looks)})"
    if result.headline.shortage:
        checks += f"; no claim can be made: {result.headline.shortage}"
    if result.header["num_configurations"] == 1:
        return f"{name}: {shown} against an attacker who knows the model; {checks}."
    against = f"{name}: {shown} against an attacker who knows that the model is random"
    return f"{against}{_below_paper(result.paper, result.headline)}; {checks}."


def _licence(result: EvaluationResult) -> str:
    """Return how many checks ran, what they say, and what that licenses."""
    warned = ", ".join(f"{verdict.id} ({verdict.title})" for verdict in result.warned)
    said = f"{result.checks_run} checks ran, none failed" + (f", warnings: {warned}" if warned else "")
    if not result.not_run:
        return f"{said}; the others do not apply" if any(not verdict.applies for verdict in result.verdicts) else said
    return f"a first look, no basis for a claim: {said}; not run: {', '.join(verdict.id for verdict in result.not_run)}"


def _looks(looks: Looks) -> str:
    return f"at most {looks.count} looks, each at {100 * looks.level_of_each:.2f} %, together {100 * looks.level:.0f} %"


def sentence(text: str) -> str:
    """Return the text with a capital at its beginning."""
    return text[:1].upper() + text[1:]


def _below_paper(paper: Estimate | None, headline: Estimate) -> str:
    """Return how the headline compares with the paper's protocol, which often scores a single draw: then little can be said of it."""
    if paper is None or paper.value <= headline.value:
        return ""
    points = f"{100 * (paper.value - headline.value):.1f} points below the paper's protocol (T0)"
    if paper.low > headline.high:
        return f", {points}"
    if paper.needed_draws is not None:
        return f", {points}, whose few draws cannot tell a difference from chance"
    return ""
