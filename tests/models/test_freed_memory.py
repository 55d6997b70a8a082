"""Memory that is freed stays with the process until it is given back."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource
from models.freed_memory import give_back_freed_memory, keep_freed_memory
import torch
kept = keep_freed_memory()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(2**24)  # 64 MB: more than the allocator keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1])

for _ in range(10):  # until the heap has holes of this size
    torch.ones(2**24)
pages, again = 2**26 // resource.getpagesize(), faults()
held = resident()
give_back_freed_memory()
print(kept, again < pages / 2, held - resident() > pages / 2)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux") or "glibc" not in os.confstr("CS_GNU_LIBC_VERSION"), reason="glibc only")
@pytest.mark.parametrize(
    ("environment", "expected"),
    [({}, "True True True"), ({"MALLOC_MMAP_THRESHOLD_": "1000000"}, "False False False")],
)
def test_what_is_freed_is_used_again_unless_the_user_decides(environment, expected):
    ours = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=ours | environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == expected
