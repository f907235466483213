"""File -> numbers. Called, this package is the command: `efficli.bench(["model.gguf"])`; see `efficli.export`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from efficli.pipeline import BenchResult


class _Command(ModuleType):
    @property
    def __call__(self) -> Callable[..., BenchResult]:
        """`efficli.pipeline.bench`, with its own signature."""
        from efficli.pipeline import bench  # noqa: PLC0415 - upwards, so only when called

        return bench


sys.modules[__name__].__class__ = _Command
