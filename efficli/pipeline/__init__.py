"""The only orchestrator: joins checkpoints, exporters and measurements; every command's body is a function here."""

from __future__ import annotations

from efficli.bench.figures import BenchResult
from efficli.pipeline.attempt import Tried, try_artifact
from efficli.pipeline.bench import bench
from efficli.pipeline.compress import compress
from efficli.pipeline.export import export, run_export
from efficli.pipeline.inspect import inspect
from efficli.pipeline.recipe_run import run
from efficli.pipeline.result import CompressResult, ExportedFile, ExportResult
from efficli.planning.plan import PlanResult, plan

__all__ = [
    "BenchResult", "CompressResult", "ExportResult", "ExportedFile", "PlanResult", "Tried", "bench", "compress",
    "export", "inspect", "plan", "run", "run_export", "try_artifact",
]  # fmt: skip
