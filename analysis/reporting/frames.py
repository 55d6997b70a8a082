"""What was computed, as tidy frames: from the records of evaluations, and from an MLflow server; and frames as Parquet files.

A frame is a list of dictionaries, one observation per row, one variable per key, as `analysis.reporting.tables` takes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from analysis.evaluation.records import Record, read_records
from analysis.reporting.tables import Frame, columns_of
from analysis.result import EvaluationResult, collect
from models.errors import UserError
from models.files import whole_file


def frame_of_records(paths: Iterable[str | Path]) -> list[dict[str, Any]]:
    """Return one row per checkpoint, seed, attack and protocol of all evaluations in these files.

    Records of one file may belong to several evaluations (suites, seeds, threat models); each is collected for itself.

    Raises:
        UserError: a file cannot be read, or holds no record.
    """
    rows: list[dict[str, Any]] = []
    for path in paths:
        known = read_records(path)
        if not known:
            raise UserError(f"{path} holds no records of an evaluation")
        groups: dict[str, list[Record]] = {}
        for record in known.values():
            header = record["header"]
            name = "|".join(str(header[part]) for part in ("checkpoint", "suite", "seed", "threat_model", "scoring", "format_version"))
            groups.setdefault(name, []).append(record)
        for records in groups.values():
            rows += frame_of_result(collect(records), source=str(path))
    return rows


def frame_of_result(result: EvaluationResult, **facts: Any) -> list[dict[str, Any]]:
    """Return the rows of a result with whose they are: checkpoint, defence, suite, seed, threat model, and any `facts`."""
    header = result.header
    whose = {
        **facts,
        "checkpoint": header["checkpoint"],
        "defence": header["defence"],
        "suite": header["suite"],
        "seed": header["seed"],
        "norm": header["threat_model"]["norm"],
        "epsilon": header["threat_model"]["epsilon"],
    }
    return [{**whose, **row} for row in result.frame()]


def frame_of_samples(result: EvaluationResult) -> list[dict[str, Any]]:
    """Return one row per sample, attack and protocol: counts of correct draws, mean margin, distances and passes."""
    rows: list[dict[str, Any]] = []
    for record in result.records:
        header, samples, block = record["header"], record["samples"], record["block"]
        if header["kind"] not in ("clean", "attack"):
            continue
        whose = {
            "checkpoint": header["checkpoint"],
            "seed": header["seed"],
            "attack": header["item"]["name"] if header["item"] else "clean",
            "protocol": header["protocol"],
            "block": header["block"],
            "num_draws": block["num_draws"]["evaluation"],
            "num_forward": block["num_forward"],
            "num_backward": block["num_backward"],
            "marked": result.marked,
        }
        columns = zip(
            samples["ids"],
            samples["labels"],
            samples["num_correct"]["evaluation"],
            samples["margin"],
            samples["linf"],
            samples["l2"],
            samples["num_unchanged"],
            strict=True,
        )
        for sample, label, correct, margin, linf, l2, unchanged in columns:
            rows.append(
                {
                    **whose,
                    "sample": sample,
                    "label": label,
                    "num_correct": correct,
                    "margin": margin,
                    "linf": linf,
                    "l2": l2,
                    "num_unchanged": unchanged,
                }
            )
    return rows


def frame_of_runs(tracking_uri: str, experiment: str, filter_string: str = "") -> list[dict[str, Any]]:
    """Return one row per run of an MLflow experiment: `run_id`, `status`, times, and metrics, parameters and tags by their names.

    Args:
        tracking_uri: of the store or server. experiment: its name.
        filter_string: in MLflow's language, e.g. `tags.defence = 'ctrw'`.

    A name that is both a metric and a parameter or tag keeps the metric; the other appears as `param:NAME` or `tag:NAME`. MLflow's
    own tags are left out, and missing values are None.

    Raises:
        UserError: there is no such experiment.
    """
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=tracking_uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        others = ", ".join(sorted(each.name for each in client.search_experiments()))
        raise UserError(f"{tracking_uri} has no experiment {experiment!r}; it has: {others or 'none'}")
    rows: list[dict[str, Any]] = []
    token = None
    while True:
        page = client.search_runs([found.experiment_id], filter_string=filter_string, page_token=token)
        rows += [_run_row(run) for run in page]
        token = page.token
        if not token:
            break
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name) for name in names} for row in rows]


def _run_row(run: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "run_id": run.info.run_id,
        "run_name": run.info.run_name,
        "status": run.info.status,
        "start_time": run.info.start_time,
        "end_time": run.info.end_time,
    }
    row |= {name: value for name, value in run.data.metrics.items() if not math.isnan(value)}
    for kind, values in (("param", run.data.params), ("tag", run.data.tags)):
        for name, value in values.items():
            if name.startswith("mlflow."):
                continue
            row[f"{kind}:{name}" if name in row else name] = value
    return row


def write_parquet(frame: Frame, path: str | Path, columns: Sequence[str] | None = None) -> Path:
    """Write a frame as a Parquet file, as a whole or not at all. Columns keep their types; mixed ones become text.

    Raises:
        ValueError: the frame is empty, or a column does not exist.
    """
    if not frame:
        raise ValueError("an empty frame has no columns to write")
    names = columns_of(frame, columns)
    table = pyarrow.table({name: _column([row.get(name) for row in frame]) for name in names})
    path = Path(path)
    with whole_file(path) as file:
        pyarrow.parquet.write_table(table, file)
    return path


def _column(values: list[Any]) -> pyarrow.Array:
    plain = [dict(value) if isinstance(value, Mapping) else value for value in values]
    try:
        return pyarrow.array(plain)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError):
        return pyarrow.array([None if value is None else str(value) for value in plain])
