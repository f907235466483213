"""Try: an artifact continues a text, and its base beside it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from efficli.artifact.temporary import scratch_directory
from efficli.bench import compare
from efficli.bench.compare import Side
from efficli.checkpoint import Checkpoint, open_checkpoint
from efficli.checkpoint.sidecar import IMATRIX
from efficli.network.loading import torch_is_installed
from efficli.ops.sampling import Completion
from efficli.pipeline.plain_file import write_plain
from efficli.progress import Progress, Silent


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """What each side wrote after `prompt`."""

    prompt: str
    names: Mapping[Side, str]
    completions: Mapping[Side, Completion]

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "schema_version": 1,
            "command": "try",
            "prompt": self.prompt,
            "sides": {side: {"name": self.names[side], **asdict(c)} for side, c in self.completions.items()},
        }


def try_artifact(
    artifact: str | os.PathLike[str],
    prompt: str,
    *,
    base: str | None = None,
    max_tokens: int = 64,
    threads: int | None = None,
    trust_remote_code: bool = False,
    on_piece: Callable[[Side, str], None] | None = None,
    progress: Progress | None = None,
) -> Tried:
    """Continue `prompt` with an artifact (directory or GGUF file) and, beside it, with `base`; both choose greedily.

    `base` is a checkpoint (run by PyTorch in float32, by an F32 GGUF file of it where PyTorch is not installed) or
    another artifact. `on_piece(side, text)` hears every piece as it is written. Errors are those of `efficli.errors`.
    """
    file = compare.model_file(Path(artifact))
    names: dict[Side, str] = {"artifact": file.name}
    with ExitStack() as stack:
        other: Checkpoint | Path | None = None
        if base is not None:
            names["base"] = base
            other = open_base(base, stack, threads, trust_remote_code, progress or Silent())
        written = compare.try_artifact(
            file, prompt, base=other, max_tokens=max_tokens, threads=threads, on_piece=on_piece
        )
    return Tried(prompt=prompt, names=names, completions=written)


def open_base(
    base: str, stack: ExitStack, threads: int | None, trust_remote_code: bool, progress: Progress
) -> Checkpoint | Path:
    """A base to compare with: an artifact's file, a checkpoint, or without PyTorch a temporary F32 file of one."""
    path = Path(base)
    if path.suffix == ".gguf" or (path.is_dir() and any(file.name != IMATRIX for file in path.glob("*.gguf"))):
        return compare.model_file(path)
    if torch_is_installed():
        return open_checkpoint(base, trust_remote_code=trust_remote_code)
    progress.note(f"{base} is run by llama.cpp from an F32 file: PyTorch is not installed")
    folder = stack.enter_context(scratch_directory())
    ckpt = open_checkpoint(base, trust_remote_code=trust_remote_code)
    return write_plain(ckpt, "F32", folder, threads=threads, progress=progress)
