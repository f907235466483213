"""Builds shim.c and runs sweeps with it; no ptrace, no privileges, so that it works wherever there is a C compiler."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@functools.cache
def shim() -> Path:
    """The compiled shim, in a directory that ends with this process."""
    folder = tempfile.mkdtemp(prefix="efficli-shim-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = Path(folder) / "shim.so"
    command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-O1", "-o", str(path), str(HERE / "shim.c"), "-ldl"]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return path


def sweep(writer: str, *, program: str = "tests.faults.sweep", **plan: Any) -> dict[str, Any]:
    """Run a plan (see sweep.Plan) in a process with the shim loaded; its table. A `writer` without a module is one of
    tests/faults/writers.py; `program` judges what it leaves.
    """
    # memory, where there is any: a sweep syncs thousands of times
    folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    environment = {**os.environ, "LD_PRELOAD": str(shim()), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    if folder:
        environment["SWEEP_DIR"] = folder
    whole = writer if ":" in writer else f"tests.faults.writers:{writer}"
    text = json.dumps({"writer": whole, "previous": False, **plan})
    ran = subprocess.run(
        [sys.executable, "-m", program, text], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    table: dict[str, Any] = json.loads(ran.stdout)
    return table
