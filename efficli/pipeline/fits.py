"""What the targets of a recipe will do with its files, before any is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from efficli.pipeline.result import ExportResult
from efficli.progress import Progress
from efficli.recipe import Recipe


def check_fit(recipe: Recipe, planned: ExportResult, progress: Progress) -> tuple[Mapping[str, Any], ...]:
    """One row a target and file."""
    return ()
