"""One evaluation as files: a self-contained HTML page, figures, JSON, and Parquet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
from torch import Tensor

from analysis.evaluation.points import KeptPoints
from analysis.evaluation.protocols import PROTOCOL_TITLES
from analysis.reporting import tables
from analysis.reporting.conclusion import conclusion, headline_note, sentence
from analysis.reporting.figure_style import figure_as_png, save_figure
from analysis.reporting.figures import figures_of
from analysis.reporting.frames import frame_of_result, frame_of_samples, write_parquet
from analysis.reporting.survival import ImageRow, image_rows
from analysis.result import EvaluationResult, Row
from models.files import write_text

TEMPLATE_FOLDER = Path(__file__).with_name("templates")

_CAPTIONS = {
    "attacks": "Accuracy under every attack and protocol, with 95 % intervals.",
    "epsilon": "Accuracy over the radius; dotted: the threat model's. It must fall to nothing (C6).",
    "steps": "Accuracy when the attack's steps are doubled (C7).",
    "draws": "Accuracy when the draws per gradient are doubled: convergence of the averaged gradient (C7).",
    "loss": "Best mean loss of the images that survive, along the attack (C14).",
    "examples": "Images, perturbed images, and the change stretched to the full range.",
}


def render_html(
    name: str, result: EvaluationResult, images: Tensor | None = None, points: KeptPoints | None = None, description: str = ""
) -> str:
    """Return the page of an evaluation, with everything inlined: table, verdicts, curves, images by survival, origin.

    Args:
        name: of the model. description: what it is, in a line, as its recipe says it; empty: unknown.
        images: the test images (N, C, H, W), for their pictures. points: kept perturbed images, for theirs.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE_FOLDER), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    shown, num_images = image_rows(result, images, points)
    worst = sorted(result.headline_attacks.items(), key=lambda item: -item[1])[:3]
    return environment.get_template("evaluation.html").render(
        name=name,
        description=description,
        whose=_whose(result),
        result=result,
        conclusion=conclusion(name, result),
        rows=[_shown(row, result.marked) for row in result.rows],
        headline=tables.format_estimate(result.headline, marked=result.marked) if result.headline is not None else "",
        worst_attacks=", ".join(f"{attack} ({count})" for attack, count in worst if count),
        headline_note=headline_note(result),
        remarks=[sentence(remark) for remark in result.remarks],
        protocols=PROTOCOL_TITLES,
        figures=[{"png": figure_as_png(figure), "caption": _CAPTIONS[key]} for key, figure in figures_of(result).items()],
        images=[_shown_image(row) for row in shown],
        image_attacks=list(dict.fromkeys(attack for row in shown for attack in row.shares)),
        num_images=num_images,
        has_points=any(row.perturbed for row in shown),
        origin=_origin(result),
    )


def write_report(
    name: str,
    result: EvaluationResult,
    folder: str | Path,
    images: Tensor | None = None,
    points: KeptPoints | None = None,
    description: str = "",
) -> dict[str, Path]:
    """Write `report.html`, `result.json`, `result.parquet`, `samples.parquet` and `figures/` into a folder; return them by name.

    Args:
        images, points, description: as for `render_html`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = {
        "html": write_text(folder / "report.html", render_html(name, result, images, points, description)),
        "json": write_text(folder / "result.json", json.dumps(_as_json(name, result), indent=2, default=str) + "\n"),
        "parquet": write_parquet(frame_of_result(result, name=name), folder / "result.parquet"),
        "samples": write_parquet(frame_of_samples(result), folder / "samples.parquet"),
    }
    for key, figure in figures_of(result).items():
        save_figure(figure, folder / "figures" / key)
    written["figures"] = folder / "figures"
    return written


def _as_json(name: str, result: EvaluationResult) -> dict[str, Any]:
    return {
        "name": name,
        "conclusion": conclusion(name, result),
        "finished": result.finished,
        "marked": result.marked,
        "basis": result.basis,
        "headline": None if result.headline is None else result.headline.__dict__,
        "headline_note": headline_note(result) or None,
        "remarks": list(result.remarks),
        "headline_attacks": result.headline_attacks,
        "rows": result.frame(),
        "verdicts": [
            {"id": v.id, "title": v.title, "verdict": v.status.value, "seen": v.explanation, "advice": v.advice} for v in result.verdicts
        ],
        "header": result.header,
    }


def _shown(row: Row, marked: bool) -> dict[str, str]:
    spread = ""
    if row.draw_deviation is not None and row.draw_lowest is not None and row.draw_highest is not None:
        spread = " ".join(f"{100 * value:.1f}" for value in (row.draw_deviation, row.draw_lowest, row.draw_highest))
    return {
        "attack": row.attack + ("" if row.in_threat_model else " (outside the threat model)"),
        "protocol": row.protocol,
        "accuracy": tables.format_estimate(row.estimate, marked=marked) + ("" if row.finished else " unfinished"),
        "conditional": "" if row.conditional is None else tables.format_percent(row.conditional, marked=marked),
        "majority": "" if row.majority is None else tables.format_percent(row.majority, marked=marked),
        "spread": f"{spread} {tables.MARK}" if spread and marked else spread,
        "caption": row.caption,
    }


def _shown_image(row: ImageRow) -> dict[str, Any]:
    return {
        **vars(row),
        "survival": f"{100 * row.survival:.0f} %",
        "shares": {attack: f"{100 * share:.0f} %" for attack, share in row.shares.items()},
        "largest_change": "" if row.largest_change is None else f"{row.largest_change:.3g}",
    }


def _whose(result: EvaluationResult) -> str:
    header = result.header
    threat_model = header["threat_model"]
    count = header["num_configurations"]
    space = {None: "infinitely many draws", 1: "deterministic"}.get(count, f"{count} draws")
    return f"defence {header['defence'] or 'unknown'}, {space}; suite {header['suite']}; {threat_model['norm']} {threat_model['epsilon']}"


def _origin(result: EvaluationResult) -> dict[str, str]:
    measured = [record["measured"] for record in result.records]
    versions = {f"{name} {version}" for each in measured for name, version in each["versions"].items()}
    return {
        "weights": result.header["checkpoint"],
        "seed": str(result.header["seed"]),
        "blocks": str(len(result.records)),
        "devices": ", ".join(sorted({each["device"] for each in measured})),
        "versions": ", ".join(sorted(versions)),
        "seconds of work": f"{sum(each['seconds'] for each in measured):.0f}",
    }
