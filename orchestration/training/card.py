"""The README.md of an exported model: what it is, how robust it was measured to be and how, how to load it, what not to believe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from analysis.reporting import markdown
from orchestration.catalogue import catalogue
from orchestration.experiment import ExperimentConfig
from trainers.selection import AVERAGE_CHOSEN


def model_card(
    experiment: ExperimentConfig,
    record: Mapping[str, Any],
    class_names: Sequence[str],
    evaluation_markdown: str | None = None,
    chosen: str | None = None,
) -> str:
    """Return the card's Markdown.

    Args:
        experiment: the run's configuration.
        record: `metrics`, `selected_epoch`, `num_epochs` of training, and `initial_weights` where it did not begin fresh.
        class_names: of the data set.
        evaluation_markdown: table and verdicts of an evaluation; None: the model is not evaluated yet, and the card says so.
        chosen: why the weights are those of this epoch; None: it was selected.
    """
    entry = catalogue().get(experiment.defence.name)
    training = experiment.training
    paper = f"{entry.paper.authors}: {entry.paper.title}, {entry.paper.venue}" if entry and entry.paper else "no paper of its own"
    metrics = record["metrics"]
    validation_rows = "\n".join(
        f"| {name.removeprefix('validation/')} | {100 * value:.1f} % |"
        for name, value in sorted(metrics.items())
        if name.startswith("validation/") and name != "validation/robust_accuracy"
    )
    described = markdown.escape(f"{experiment.name}: {experiment.description}")
    shown = ", ".join(map(markdown.name, class_names[:12])) + (", ..." if len(class_names) > 12 else "")
    deviations = "".join(f"\n- {line}" for line in (entry.deviations if entry else ()))
    selected_on = training.validation.select_on
    copy = f"the average ({training.averaging.name})" if metrics.get(AVERAGE_CHOSEN) else "those"
    initial = record.get("initial_weights")
    begun = f"\n- initial weights: {markdown.escape(initial['sentence'])}" if initial else ""
    return f"""# {experiment.defence.name} on {experiment.backbone.name}, {experiment.data.name}

{entry.summary if entry else experiment.defence.name}. {paper}.

- recipe: {described}
- data: {experiment.data.name}, {len(class_names)} classes ({shown})
- threat model: {experiment.threat_model}, pixels in [0,1], normalization inside the model
- training: {training.objective.name}, {record["num_epochs"]} epochs, batch {training.batch_size}, seed {experiment.seed};
  the weights are {copy} of epoch {record["selected_epoch"]}, {chosen or f"selected on {selected_on} images"}{begun}
- fingerprint of the configuration: `{experiment.fingerprint}` (whole configuration in `config.json`)

## Accuracy during training

On {selected_on} images, a cheap attack in fp32; not a claim of robustness.

| metric | value |
|---|---|
{validation_rows}

## Evaluation on test images

{evaluation_markdown or "Not evaluated yet: run `rayndom evaluate` on this folder."}

## Loading

```python
from models.weights import load_pretrained

model = load_pretrained("path/of/this/folder")  # needs neither Ray nor MLflow
logits = model(images)  # images: float tensor (B, C, H, W) in [0,1]
```

A randomized model comes wrapped so that each call takes a new draw; `load_pretrained(..., resample_on_forward=False)` gives the bare
model, whose draws `models.randomness.resample` takes.

## Limits

A randomized defence mostly raises the cost of an attack. Believe the numbers under protocol T1 and T2 and their verdicts, not those of T0,
in which the attack does not know that the model is random.{" Differences from the paper:" if deviations else ""}{deviations}
"""
