"""GGUF files of a checkpoint, by efficli's own converter, without the rest of an export."""

from __future__ import annotations

from pathlib import Path

from efficli.checkpoint import open_checkpoint
from efficli.export.gguf.job import prepare
from efficli.export.gguf.types import TypeRequest
from efficli.export.gguf.writer import write_files


def convert(model: str | Path, folder: Path, *types: str) -> list[Path]:
    """The files `TYPE.gguf` of a checkpoint in `folder`, in the order asked for."""
    ckpt = open_checkpoint(model)
    job = prepare(ckpt, [TypeRequest(type=type) for type in types], own={})
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{type}.gguf" for type in types]
    planned = [(path, job.metadata, file.choice) for path, file in zip(files, job.files, strict=True)]
    write_files(ckpt, job.tensors, planned, threads=1)
    return files
