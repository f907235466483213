"""An interpreter without torch and transformers: what a CI step with `pip install efficli[gguf]` has."""

from __future__ import annotations

import os
import site
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HIDDEN = ("torch", "torchgen", "functorch", "transformers", "accelerate", "datasets", "optimum", "onnxruntime")


def light_site(folder: Path, *more: str) -> Path:
    """A folder of links to everything that is installed but HIDDEN, and `more` that is hidden."""
    folder.mkdir()
    for packages in site.getsitepackages():
        for entry in Path(packages).iterdir():
            hidden = entry.name.partition("-")[0] in (*HIDDEN, *more)
            if not hidden and entry.suffix != ".pth" and not (folder / entry.name).exists():
                (folder / entry.name).symlink_to(entry)
    return folder


def run_light(packages: Path, arguments: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m efficli ...` with those packages only (-S: the real ones are not on the path)."""
    repository = Path(__file__).parent.parent
    path = os.pathsep.join([str(repository), str(packages)])
    return subprocess.run(
        [sys.executable, "-S", "-m", "efficli", *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
