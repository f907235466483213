"""Gates: what a recipe says must hold, held against what was found, one judgement a gate and file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from efficli.bench.figures import BenchResult
from efficli.bench.quality import Certificate
from efficli.errors import EffiError, FitError, GateError
from efficli.ops.byte_size import binary_bytes
from efficli.pipeline.result import ExportedFile
from efficli.recipe import Gates


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """One gate and one file."""

    gate: str
    """As the recipe calls it: max_kld."""
    file: str
    limit: float
    found: float | None
    """None where it could not be measured."""
    error: EffiError | None = None
    """None: the gate is met."""

    @property
    def met(self) -> bool:
        """Whether it holds."""
        return self.error is None

    @property
    def words(self) -> str:
        """What was found beside what was asked for."""
        if self.error is not None:
            return self.error.message
        bound = "at most" if self.gate.startswith("max") else "at least"
        if self.gate == "max_bytes":
            return f"{binary_bytes(int(self.found or 0))}, {bound} {binary_bytes(int(self.limit))}"
        return f"{self.found:.4g}, {bound} {self.limit:g}"

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "gate": self.gate,
            "file": self.file,
            "limit": self.limit,
            "found": self.found,
            "met": self.met,
            "message": self.words,
        }


def judge_sizes(gates: Gates, files: Sequence[ExportedFile]) -> list[Judgement]:
    """The gate that is decided before anything is written; exit 4 where it is not met, as in `bench`."""
    if gates.max_bytes is None:
        return []
    found = []
    for file in files:
        error = None
        if file.nbytes > gates.max_bytes:
            told = f"{binary_bytes(file.nbytes)}, expected at most {binary_bytes(gates.max_bytes)}"
            error = FitError(told, where=file.name, hint="take a type with fewer bits; nothing was written")
        found.append(Judgement(gate="max_bytes", file=file.name, limit=gates.max_bytes, found=file.nbytes, error=error))
    return found


def judge_quality(gates: Gates, files: Sequence[ExportedFile]) -> list[Judgement]:
    """Mean KL divergence and top-1 agreement, from each file's certificate."""
    wanted = (("max_kld", "kld_mean", gates.max_kld), ("min_top1", "top1_agreement", gates.min_top1))
    found = []
    for file in files:
        certificate = file.certificate or Certificate(artifact=file.name, origin=None, status="not measured")
        for gate, figure, limit in wanted:
            if limit is None:
                continue
            value = certificate.total.figures.get(figure) if certificate.rows else None
            error = None
            try:
                certificate.check(**{gate: limit})
            except EffiError as unmet:  # a figure that an embedding model does not have is wrong usage
                error = unmet
            found.append(Judgement(gate=gate, file=file.name, limit=limit, found=value, error=error))
    return found


def judge_speed(gates: Gates, files: Sequence[ExportedFile], result: BenchResult | None) -> list[Judgement]:
    """Decode tokens/s on this machine: the slowest of a file's medians."""
    if gates.min_decode is None or result is None:
        return []
    found = []
    for file, artifact in zip(files, result.artifacts, strict=True):
        speeds = [test.rate.estimate.median for test in artifact.tests if test.test.n_gen]
        slowest = min(speeds, default=None)
        error = None
        if slowest is None or slowest < gates.min_decode:
            told = "no decode speed was measured" if slowest is None else f"decode is {slowest:.4g} tokens/s"
            error = GateError(
                f"{told}, expected at least {gates.min_decode:g} tokens/s (min_decode)",
                where=file.name,
                hint="nothing was written; take a type with fewer bits, or another limit",
            )
        found.append(Judgement(gate="min_decode", file=file.name, limit=gates.min_decode, found=slowest, error=error))
    return found
