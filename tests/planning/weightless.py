"""Folders that hold everything but weights, and the files that an export writes once the weights are there."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np

import efficli
from efficli.checkpoint import open_checkpoint
from efficli.export.gguf.job import prepare
from efficli.export.gguf.types import TypeRequest
from efficli.export.gguf.writer import write_files

REFERENCE = Path(efficli.__file__).parent / "reference" / "checkpoint"


def copy_without_weights(source: Path, folder: Path) -> Path:
    """A copy of a checkpoint in which there is no weight to read."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.safetensors.index.json"))
    assert not list(folder.rglob("*.safetensors*"))
    return folder


def add_weights(source: Path, folder: Path) -> None:
    """Complete the copy."""
    for path in source.glob("*.safetensors*"):
        shutil.copy(path, folder)


def export_sizes(model: str | Path, folder: Path, types: Iterable[str], *, matrix: bool = False) -> dict[str, int]:
    """Bytes on disk of the files that `export` writes, by type; `matrix`: with an importance matrix, of ones."""
    ckpt = open_checkpoint(model)
    requests = [TypeRequest(type=kind, allow_non_ternary=True, imatrix_follows=matrix) for kind in types]
    own = {"version": efficli.__version__, "source": ckpt.name, "recipe": "f" * 64}
    job = prepare(ckpt, requests, own=own)
    if matrix:
        columns = {t.name: t.shape[-1] * (t.shape[0] if len(t.shape) == 3 else 1) for t in job.tensors}
        job = job.with_imatrix({name: np.ones(count, np.float32) for name, count in columns.items()})
    folder.mkdir(exist_ok=True)
    files = [(folder / f"{file.type}.gguf", job.metadata, file.choice) for file in job.files]
    write_files(ckpt, job.tensors, files, hashes=False, threads=1)
    return {file.type: (folder / f"{file.type}.gguf").stat().st_size for file in job.files}
