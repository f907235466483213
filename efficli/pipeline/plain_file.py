"""A file of a checkpoint in one of the unquantized types: what llama.cpp runs where PyTorch is not there."""

from __future__ import annotations

from pathlib import Path

from efficli.checkpoint import Checkpoint
from efficli.export.gguf.job import prepare
from efficli.export.gguf.types import TypeRequest
from efficli.export.gguf.writer import write_files
from efficli.progress import Progress


def write_plain(
    ckpt: Checkpoint,
    kind: str,
    folder: Path,
    *,
    pre_tokenizer: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write `ckpt` as F32, F16 or BF16 into `folder`; nobody keeps it, so nothing is hashed."""
    job = prepare(ckpt, [TypeRequest(type=kind)], own={}, pre_tokenizer=pre_tokenizer)
    path = folder / job.files[0].name
    target = (path, job.metadata, job.files[0].choice)
    write_files(ckpt, job.tensors, [target], threads=threads, hashes=False, progress=progress)
    return path
