"""What the records of a large evaluation cost: written, read, merged and judged.

    python -m benchmarks.record_growth [--images 10000] [--attacks 20] [--draws 100]

One block of each attack is really run, on a tiny random network, and stands for the others: their records are the same but for their
place, their images and which draws answered correctly. CPU seconds and the peak of memory, of a process that does nothing else.
"""

from __future__ import annotations

import argparse
import copy
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

MOST_SECONDS, MOST_GB = 30.0, 1.0
SIDE = 8


def suite_file(folder: Path, attacks: int, draws: int) -> Path:
    """Write a suite of so many attacks and return its path."""
    lines = [f"scoring: {{num_selection_draws: 2, num_evaluation_draws: {draws}, num_known_draws: 2, num_retries: 1}}", "attacks:"]
    lines += [f"  - {{name: pgd_{index}, attack: pgd, parameters: {{steps: 1}}, protocols: [T1]}}" for index in range(attacks)]
    path = folder / "records.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


def plan_and_templates(folder: Path, images: int, attacks: int, draws: int) -> tuple[list[Any], list[dict[str, Any]]]:
    """Return the blocks of the evaluation and, for each, the record of a block of the same attack that was really run."""
    import torch

    from analysis.evaluate import plan_blocks, run_block
    from models import build_model

    model = build_model("ctrw", backbone="resnet8", num_classes=10, image_shape=(1, SIDE, SIDE), seed=0)
    generator = torch.Generator().manual_seed(0)
    x_BCHW = torch.rand(images, 1, SIDE, SIDE, generator=generator)
    y_B = torch.arange(images) % 10
    plan = plan_blocks(model, x_BCHW, y_B, suite_file(folder, attacks, draws))
    run: dict[tuple[str, str], dict[str, Any]] = {}
    templates = []
    for task in plan:
        name = (task.item.name if task.item else "clean", task.protocol)
        if name not in run:
            run[name] = run_block(model, x_BCHW, y_B, task)
        templates.append(run[name])
    return plan, templates


def fabricated(task: Any, template: dict[str, Any], seed: int) -> dict[str, Any]:
    """Return the record of a block, made of the one that was run for its attack."""
    import numpy as np

    from analysis.evaluation.records import pack_rows

    record = copy.deepcopy(template)
    record["key"] = task.key
    record["header"] |= {name: value for name, value in task.model_dump(mode="json").items() if name in record["header"]}
    count, generator = len(task.ids), np.random.default_rng(seed)
    for name, column in record["samples"].items():
        if isinstance(column, list):
            record["samples"][name] = [column[row % len(column)] for row in range(count)]
    record["samples"]["ids"] = list(task.ids)
    shares = np.random.default_rng(0).beta(2, 1, 10**6)[np.array(task.ids)][:, None]  # some images are hard under every draw
    for name in record["samples"]["correct"]:
        draws = record["block"]["num_draws"][name]
        record["samples"]["correct"][name] = pack_rows(generator.random((count, draws)) < shares)
    return record


def write(folder: Path, images: int, attacks: int, draws: int) -> None:
    """Run one block of each attack, then write the records of all, and say what the writing took."""
    import pickle

    from analysis.evaluation.records import append_record

    plan, templates = plan_and_templates(folder, images, attacks, draws)
    (folder / "plan.pickle").write_bytes(pickle.dumps(plan))
    seconds = 0.0
    for index, (task, template) in enumerate(zip(plan, templates, strict=True)):
        record = fabricated(task, template, index)
        before = time.process_time()
        append_record(folder / "records.jsonl", record)
        seconds += time.process_time() - before
    print(seconds)


def judge(folder: Path) -> None:
    """Read the records, collect them, and say what that took."""
    import pickle

    from analysis.evaluation.records import read_records
    from analysis.result import collect

    plan = pickle.loads((folder / "plan.pickle").read_bytes())
    before = time.process_time()
    records = read_records(folder / "records.jsonl")
    read = time.process_time()
    result = collect(records.values(), plan)
    judged = time.process_time()
    assert result.finished and result.headline is not None
    print(read - before, judged - read, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def main() -> int:
    """Write, read and judge in processes of their own; return 1 if it took too long or too much memory."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--attacks", type=int, default=20)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--in-process", nargs=2, metavar=("WHAT", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = (arguments.images, arguments.attacks, arguments.draws)
    if arguments.in_process:
        what, folder = arguments.in_process[0], Path(arguments.in_process[1])
        write(folder, *sizes) if what == "write" else judge(folder)
        return 0
    with tempfile.TemporaryDirectory() as temporary:

        def done(what: str) -> list[float]:
            flags = [f"--{name}={size}" for name, size in zip(("images", "attacks", "draws"), sizes, strict=True)]
            command = [sys.executable, "-m", "benchmarks.record_growth", *flags, "--in-process", what, temporary]
            return [float(word) for word in subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()]

        (written,) = done("write")
        read, judged, memory = done("judge")
        size = (Path(temporary) / "records.jsonl").stat().st_size / 1e6
    total = written + read + judged
    missed = sizes == (10_000, 20, 100) and (total > MOST_SECONDS or memory > MOST_GB)
    print(f"{sizes[0]:,} images x {sizes[1]} attacks x {sizes[2]} draws, {size:.0f} MB: written {written:.1f} s, read {read:.1f} s, merged")
    print(f"and judged {judged:.1f} s, together {total:.1f} of {MOST_SECONDS:g} s; memory {memory:.2f} of {MOST_GB:g} GB")
    print("MISSED" if missed else "met")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
