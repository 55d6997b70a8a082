"""Putting an exported model on the Hugging Face hub: weights, configuration, and a card that says T1, its interval and its mark in the
hub's own metadata."""

from __future__ import annotations

import tempfile
from pathlib import Path
from shutil import copyfile
from typing import Any

from models.errors import EnvironmentProblem, UserError
from models.weights import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, read_config
from orchestration.trained_models.hub import hub_library, repository_of


def push_model(folder: Path, address: str) -> str:
    """Upload an exported folder to `hf://OWNER/NAME` in one commit and return the address with its revision.

    Raises:
        UserError: no such address, or the hub refuses (it names a token that may write). EnvironmentProblem: it does not answer.
    """
    name, revision = repository_of(address)
    hub = hub_library()
    with tempfile.TemporaryDirectory() as scratch:
        for file in (WEIGHTS_FILE, CONFIG_FILE):
            copyfile(folder / file, Path(scratch, file))
        Path(scratch, CARD_FILE).write_text(card_with_metadata(folder, name))
        client = hub.HfApi(library_name="rayndom")
        try:
            client.create_repo(name, exist_ok=True)
            done = client.upload_folder(repo_id=name, folder_path=scratch, revision=revision, commit_message="A model of Rayndom")
        except hub.errors.HfHubHTTPError as error:
            status = getattr(error.response, "status_code", 0)
            if status in (401, 403):
                raise UserError(f"the hub does not let you write to {address}: `hf auth login`, or set HF_TOKEN") from None
            raise EnvironmentProblem(f"cannot upload to {address}: {str(error).strip().splitlines()[0][:300]}") from None
        except OSError as error:
            raise EnvironmentProblem(f"cannot upload to {address}: {str(error).strip().splitlines()[0][:300]}") from None
    return f"hf://{name}@{done.oid}"


def card_with_metadata(folder: Path, name: str) -> str:
    """Return the card of an exported folder with the hub's metadata in front: what it is, and how robust it was measured to be."""
    hub, config = hub_library(), read_config(folder)
    details: dict[str, Any] = config["details"]
    evaluation = details.get("evaluation") or {}
    model = config["model"]
    results = _results(hub, evaluation) if evaluation.get("headline") else None
    data = hub.ModelCardData(
        library_name="rayndom",
        tags=["adversarial-robustness", "image-classification", str(model["defence"]), *(["randomized"] if config["randomized"] else [])],
        pipeline_tag="image-classification",
        model_name=name if results else None,
        eval_results=results,
    )
    card = (folder / CARD_FILE).read_text(encoding="utf-8")
    return f"---\n{data.to_yaml()}\n---\n\n{card}"


def _results(hub: Any, evaluation: dict[str, Any]) -> list[Any]:
    """Return the headline as the hub's evaluation results: T1, and the ends of its interval, each with whether a check failed."""
    headline, asked = evaluation["headline"], evaluation.get("settings", {})
    data = (asked.get("data") or {}).get("name", "unknown")
    threat_model = asked.get("threat_model") or {}
    conditions = {
        "suite": evaluation["suite"],
        "norm": threat_model.get("norm"),
        "epsilon": threat_model.get("epsilon"),
        "num_samples": headline["num_samples"],
        "num_draws": headline["num_draws"],
        "low": headline["low"],
        "high": headline["high"],
        "marked": evaluation["marked"],
        "basis": evaluation.get("basis"),
    }
    mark = " (a check failed: do not quote)" if evaluation["marked"] else ""
    return [
        hub.EvalResult(
            task_type="image-classification",
            dataset_type=data,
            dataset_name=data,
            dataset_split="test",
            metric_type="accuracy",
            metric_name=f"robust accuracy under the worst attack, unknown draw (T1){mark}",
            metric_value=headline["accuracy"],
            metric_args={key: value for key, value in conditions.items() if value is not None},
        )
    ]
