"""The command line: signatures and help only. Each command calls one public function and prints what it says."""

from __future__ import annotations

from efficli.cli.app import Job, app, main

from efficli.cli import export, quantize, run, bench, attempt, inspect, plan, methods, recipe_schema, targets, cache  # isort: skip  (the order in which help lists them)

__all__ = [
    "Job", "app", "attempt", "bench", "cache", "export", "inspect", "main", "methods", "plan", "quantize",
    "recipe_schema", "run", "targets",
]  # fmt: skip
