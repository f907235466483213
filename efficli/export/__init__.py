"""Compressed -> file that a stock runtime loads. Called, this package is the command: `efficli.export(model, out)`.

`efficli.export` names this package as soon as anything in it is imported, and the command's function by the public
interface: a package that can be called is both. The function itself is `efficli.pipeline.export`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from efficli.pipeline import ExportResult


class _Command(ModuleType):
    @property
    def __call__(self) -> Callable[..., ExportResult]:
        """`efficli.pipeline.export`, with its own signature."""
        from efficli.pipeline import export  # noqa: PLC0415 - upwards, so only when called

        return export


sys.modules[__name__].__class__ = _Command
