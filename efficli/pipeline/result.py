"""What a run wrote, or would write: the values behind the tables and behind --json."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from efficli.bench.figures import BenchResult
from efficli.bench.quality import Certificate
from efficli.export.gguf.job import GgufJob, PlannedFile
from efficli.export.gguf.types import Fallback
from efficli.ops.ggml_types import is_mixed
from efficli.pipeline.steps import StepRun

if TYPE_CHECKING:
    from efficli.pipeline.gates import Judgement


_KNOWN = ("format", "type", "bytes", "bits_per_weight", "types")
"""Of a file that is not written yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TypeGroup:
    """Tensors of one kind, whatever their blocks, that have the same type."""

    group: str
    """Their name with `*` for the number of the block."""
    type: str
    tensors: int
    nbytes: int
    loss: float | None = None
    """What the pass that chose the types predicts that they lose, all together."""

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        told = {"group": self.group, "type": self.type, "tensors": self.tensors, "bytes": self.nbytes}
        return told if self.loss is None else {**told, "predicted_loss": self.loss}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedFile:
    """One file of an artifact; what is not known before writing is None in a dry run."""

    name: str
    type: str
    nbytes: int
    bits_per_weight: float
    fallbacks: tuple[Fallback, ...]
    """Tensors that could not take the type."""
    weights: Mapping[str, int] = field(default_factory=dict, repr=False)
    """How many weights have which of ggml's types."""
    groups: tuple[TypeGroup, ...] = field(default=(), repr=False)
    """The types of a file in which every tensor has its own; vectors apart."""
    sha256: str | None = None
    sample: str | None = None
    """What the runtime wrote when the file was tried; empty for an embedding model."""
    certificate: Certificate | None = None

    def to_json(self, folder: Path) -> dict[str, Any]:
        """As plain data; `folder` is where the file is."""
        return {
            "path": str(folder / self.name),
            "format": "gguf",
            "type": self.type,
            "bytes": self.nbytes,
            "sha256": self.sha256,
            "bits_per_weight": round(self.bits_per_weight, 4),
            **({"types": [group.to_json() for group in self.groups]} if self.groups else {}),
            "fallbacks": [asdict(fallback) for fallback in self.fallbacks],
            "sample": self.sample,
            "certificate": None if self.certificate is None else self.certificate.to_json(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportResult:
    """What `export` or `run` wrote, or in a dry run would write."""

    output: Path
    model: str
    num_weights: int
    files: tuple[ExportedFile, ...]
    report: tuple[str, ...]
    dry_run: bool
    command: str = "export"
    passes: tuple[str, ...] = ()
    """Methods of the passes, in their order."""
    steps: tuple[StepRun, ...] = ()
    """As they went; of a dry run, as they would go."""
    gates: tuple[Judgement, ...] = ()
    bench: BenchResult | None = None
    targets: tuple[Mapping[str, Any], ...] = ()
    """What each target is predicted to do with each file."""
    seconds: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "schema_version": 1,
            "command": self.command,
            "artifact": str(self.output),
            "model": self.model,
            "num_weights": self.num_weights,
            "passes": list(self.passes),
            "files": [file.to_json(self.output) for file in self.files],
            "report": list(self.report),
            "gates": [gate.to_json() for gate in self.gates],
            "targets": [{key: value for key, value in target.items() if key != "cells"} for target in self.targets],
            "bench": self.bench and self.bench.to_json(),
            "steps": [step.to_json() for step in self.steps],
            "dry_run": self.dry_run,
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressResult:
    """The checkpoint that was written, or in a dry run would be."""

    output: Path
    model: str
    method: str
    nbytes: int
    """Of its tensors."""
    file: ExportedFile | None
    """What its allocation of types makes of it, where it has one."""
    report: tuple[str, ...]
    dry_run: bool
    steps: tuple[StepRun, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "schema_version": 1,
            "command": "quantize",
            "checkpoint": str(self.output),
            "model": self.model,
            "method": self.method,
            "bytes": self.nbytes,
            "file": self.file and {key: value for key, value in self.file.to_json(Path()).items() if key in _KNOWN},
            "report": list(self.report),
            "steps": [step.to_json() for step in self.steps],
            "dry_run": self.dry_run,
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
        }


def planned(job: GgufJob, file: PlannedFile) -> ExportedFile:
    """A file as it is known before it is written."""
    data = file.choice.nbytes(job.tensors)
    weights: dict[str, int] = {}
    for tensor in job.tensors:
        kind = file.choice.types[tensor.name]
        weights[kind] = weights.get(kind, 0) + tensor.num_elements
    return ExportedFile(
        name=file.name,
        type=file.type,
        nbytes=file.nbytes,
        bits_per_weight=data * 8 / job.num_weights,
        fallbacks=file.choice.fallbacks,
        weights=weights,
        groups=_groups(job, file) if is_mixed(file.type) else (),
    )


def _groups(job: GgufJob, file: PlannedFile) -> tuple[TypeGroup, ...]:
    """Types by kind of tensor, in the order of the file and of what they hold."""
    found: dict[str, dict[str, list[str]]] = {}
    sidecar = job.checkpoint.sidecar
    losses = sidecar.allocation.losses if sidecar is not None and sidecar.allocation is not None else {}
    stored = {tensor.name: tensor.nbytes for tensor in file.choice.stored(job.tensors)}
    for tensor in job.tensors:
        if not tensor.keep_f32:
            group = found.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", tensor.name), {})
            group.setdefault(file.choice.types[tensor.name], []).append(tensor.name)
    return tuple(
        TypeGroup(
            group=name,
            type=kind,
            tensors=len(members),
            nbytes=sum(stored[member] for member in members),
            loss=math.fsum(losses[member] for member in members) if losses.keys() >= set(members) else None,
        )
        for name, kinds in found.items()
        for kind, members in sorted(kinds.items(), key=lambda item: (-sum(stored[m] for m in item[1]), item[0]))
    )
