"""Run all benchmarks, one after the other: `python -m benchmarks [NAME ...]`. Fails if one of them missed a bar that applies here.

Those of `HOURS` run only by name.
"""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import benchmarks

HELPERS = {
    "__main__",
    "broken_models",
    "coverage_simulation",
    "coverage_tables",
    "honest_models",
    "interval_candidates",
    "kept_state",
    "results",
    "small_networks",
    "stopping_coverage",
    "timing",
    "turns",
}
HOURS = {"checks", "coverage", "growth", "kills", "learning", "plan"}


def main(names: list[str]) -> int:
    """Run the named benchmarks, or all; return 1 if any failed."""
    known = [info.name for info in pkgutil.iter_modules(benchmarks.__path__) if info.name not in HELPERS]
    unknown = set(names) - set(known)
    if unknown:
        sys.stderr.write(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(known)}\n")
        return 2
    failed = [name for name in names or sorted(set(known) - HOURS) if subprocess.call([sys.executable, "-m", f"benchmarks.{name}"])]
    if failed:
        sys.stderr.write(f"missed a bar: {', '.join(failed)}\n")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
