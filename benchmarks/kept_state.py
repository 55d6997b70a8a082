"""What a home holds, in a form that can be held against another moment or another home: finished work, records, runs, trials, versions."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

Content = dict[str, str]
"""What is finished, by name -> a digest of what it is, without times and memory of computing."""

_TIMES = ("time/", "memory/", "model/latency_ms", "cost/")
_VOLATILE = {"seconds", "started", "host", "environment", "version", "wall_s", "passes_per_second"}


def finished(home: Path) -> Content:
    """Return finished trainings with their weights, blocks of evaluations, cells of reproductions, exported files."""
    found: Content = {}
    for path in home.glob("runs/*/result.json"):
        name = f"training {path.parent.name}"
        found[name] = _digest(_without_times(json.loads(path.read_text())))
        found[f"{name} weights"] = hashlib.blake2b((path.parent / "model" / "model.safetensors").read_bytes(), digest_size=8).hexdigest()
    for path in home.glob("evaluations/*/records.jsonl"):
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # a line that was cut is no record
                record = json.loads(line)
                name = record.get("key") or _digest(record.get("header"))
                found[f"block {path.parent.name[:8]} {name}"] = _digest(_without_times(record))
    for path in home.glob("reproductions/**/outcome.json"):
        outcome = json.loads(path.read_text())
        for cell in outcome.get("cells", []):
            values = [(cell.get(which) or {}).get("value") for which in ("paper", "honest")]
            if values != [None, None]:
                found[f"cell {path.parent.name} {cell['row']} {cell['column']}"] = _digest(values)
    for path in home.glob("out/*"):
        found[f"export {path.name}"] = _digest(_without_times(json.loads(path.read_text()))) if path.suffix == ".json" else _file(path)
    return found


def times_of(home: Path) -> dict[str, int]:
    """Return when each finished training was written, in nanoseconds: one that changes was trained twice."""
    return {path.parent.name: path.stat().st_mtime_ns for path in home.glob("runs/*/result.json")}


def duplicates(home: Path) -> list[str]:
    """Return what stands twice: blocks, MLflow runs of one training, epochs of a run, versions of one model."""
    found = []
    for path in home.glob("evaluations/*/records.jsonl"):
        keys = Counter(line[:200] for line in path.read_text().splitlines())
        found += [f"block {key[:60]}" for key, count in keys.items() if count > 1]
    store = home / "mlflow.db"
    if not store.is_file():
        return [*found, "no MLflow store"]
    with contextlib.closing(sqlite3.connect(store, timeout=60)) as database:
        twice = {
            "run": """SELECT k.value || ' ' || f.value || ' ' || coalesce(p.value, ''), count(*) FROM tags k JOIN tags f USING (run_uuid)
                LEFT JOIN tags p ON p.run_uuid = k.run_uuid AND p.key = 'mlflow.parentRunId'
                WHERE k.key = 'rayndom.kind' AND f.key IN ('rayndom.fingerprint', 'rayndom.sweep', 'rayndom.reproduction')
                AND (f.key = 'rayndom.fingerprint' OR k.value IN ('sweep', 'reproduction')) GROUP BY 1 HAVING count(*) > 1""",
            "epoch": """SELECT run_uuid || ' ' || key || ' ' || step, count(*) FROM metrics WHERE key = 'train/loss'
                GROUP BY 1 HAVING count(*) > 1""",
            "version": "SELECT name || ' ' || source, count(*) FROM model_versions GROUP BY 1 HAVING count(*) > 1",
        }
        for what, query in twice.items():
            found += [f"{what} {name}" for name, _ in database.execute(query)]
    return found


def unfinished(home: Path) -> list[str]:
    """Return what stays open in a home whose command has ended: MLflow runs, trials of a study, files that were being written."""
    queries = {home / "mlflow.db": "SELECT 'MLflow run', run_uuid, status FROM runs WHERE status != 'FINISHED'"}
    for path in home.glob("sweeps/*/study.db"):
        queries[path] = "SELECT 'trial', number, state FROM trials WHERE state IN ('RUNNING', 'WAITING')"
    found = []
    for path, query in queries.items():
        with contextlib.closing(sqlite3.connect(path, timeout=60)) as database:
            found += [" ".join(map(str, row)) for row in database.execute(query)]
    found += [f"file {path.relative_to(home)}" for path in home.rglob(".*.part*") if "tune" not in path.parts]
    return found


def epochs_in_mlflow(home: Path) -> dict[str, list[int]]:
    """Return the epochs that MLflow has of each training, by kind and fingerprint."""
    query = """SELECT k.value || ' ' || f.value, m.step FROM metrics m JOIN tags k ON k.run_uuid = m.run_uuid AND k.key = 'rayndom.kind'
        JOIN tags f ON f.run_uuid = m.run_uuid AND f.key = 'rayndom.fingerprint' WHERE m.key = 'train/loss' ORDER BY 1, 2"""
    epochs: dict[str, list[int]] = {}
    with contextlib.closing(sqlite3.connect(home / "mlflow.db", timeout=60)) as database:
        for name, step in database.execute(query):
            epochs.setdefault(name, []).append(step)
    return epochs


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_times(v) for k, v in value.items() if not k.startswith(_TIMES) and k not in _VOLATILE and "seconds" not in k}
    return [_without_times(each) for each in value] if isinstance(value, list) else value


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


def _file(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest() if path.is_file() else "folder"
