"""Computing quantities of a trained model, and keeping them: in the home folder and in MLflow."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from analysis.fingerprints import weights_hash
from analysis.quantities.quantity import MOST_IMAGES, Subject
from analysis.quantities.report import Record, choose, compute, metrics_of
from models.accelerator import accelerator
from models.errors import UserError
from models.files import write_text
from models.json_text import read_json
from models.threat_model import ThreatModel
from models.weights import load_pretrained
from orchestration import console
from orchestration.evaluating.evaluation_run import test_images
from orchestration.home import Home, Workplace
from orchestration.single_process import ENDING_S, only_process
from orchestration.tracking.tracker import Tracker
from orchestration.trained_models.origin import training_run_of
from orchestration.trained_models.targets import Target

ARTIFACT = "analysis/quantities.json"


@dataclass(frozen=True)
class AnalysisSettings:
    """What is asked of an analysis.

    Attributes:
        names: of quantities; none: the cheap ones that apply. num_samples, num_draws: None: each quantity's own. seed: root of all seeds.
        device: `cpu` or `cuda`.
    """

    names: tuple[str, ...] = ()
    num_samples: int | None = None
    num_draws: int | None = None
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        for flag, value in (("--samples", self.num_samples), ("--draws", self.num_draws)):
            if value is not None and value < 1:
                raise UserError(f"{flag} is {value}; it must be at least 1")
        found = accelerator()
        if self.device != "cpu" and (found is None or found.type != self.device):
            raise UserError(f"--device {self.device}: no such GPU is usable here; `--device cpu` works everywhere")


def subject_of(target: Target, settings: AnalysisSettings, data_root: Path | None) -> Subject:
    """Return the model of `target` with the test images of its data set, which are read when a quantity first needs them."""
    experiment = target.experiment
    model = load_pretrained(target.folder, resample_on_forward=False).to(settings.device).to(memory_format=torch.channels_last)

    def load_images() -> tuple[torch.Tensor, torch.Tensor]:
        if experiment is None:
            raise UserError(f"{target.folder} does not say what data it was trained on, so there are no images to measure on")
        return test_images(experiment.data, data_root, settings.num_samples or MOST_IMAGES)

    return Subject(
        model=model,
        load_images=load_images,
        threat_model=experiment.threat_model if experiment else ThreatModel(),
        num_samples=settings.num_samples,
        num_draws=settings.num_draws,
        seed=settings.seed,
        progress=lambda text: console.say(f"  {text}"),
    )


def analyse(target: Target, settings: AnalysisSettings, workplace: Workplace, *, wait: bool = False) -> tuple[list[Record], Path]:
    """Compute the quantities asked for; return their records and the file that holds them and those computed earlier.

    Each record is on disk as soon as it is computed, and replaces an earlier one of its quantity.

    Args:
        wait: for another process that analyses the same model, instead of refusing: the file has one writer.

    Raises:
        UserError: an unknown quantity, one that does not apply, or missing data; or another process analyses the model.
    """
    subject = subject_of(target, settings, workplace.data_root)
    chosen = choose(subject.model, settings.names)
    checkpoint = weights_hash(subject.model)
    path = workplace.home.root / "analyses" / f"{checkpoint[:16]}.json"
    what = f"the analysis of {target.folder}"
    with only_process(path.with_suffix(".lock"), what, advice="`--wait` waits for it.", patience_s=None if wait else ENDING_S):
        kept = _read(path)
        records = []
        for number, entry in enumerate(chosen, start=1):
            console.say(f"{entry.name} ({number} of {len(chosen)})")
            record = compute(entry, subject)
            records.append(record)
            if "error" not in record:
                kept[entry.name] = record
                whose = {"checkpoint": checkpoint, "defence": subject.spec.defence}
                write_text(path, json.dumps({**whose, "quantities": kept}, indent=2) + "\n")
    return records, path


def track(target: Target, records: Sequence[Record], path: Path, home: Home) -> str | None:
    """Write metrics and the file of records to the model's MLflow run; return its id, or None if it has none here."""
    if target.experiment is None or not path.is_file():
        return None
    tracker = Tracker(home, target.experiment.tracking.experiment)
    run_id = training_run_of(target, tracker, home)
    if run_id is None:
        return None
    tracker.log_metrics(run_id, metrics_of(records))
    tracker.log_json(run_id, read_json(path), ARTIFACT)
    return run_id


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    quantities = read_json(path).get("quantities")
    if not isinstance(quantities, dict):
        raise UserError(f"{path} is damaged: `quantities` should be an object; delete it to analyse again")
    return quantities
