"""What a checkpoint consists of, as hashes: weights and configuration, and every small file beside them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from efficli.checkpoint.files import read_bytes, single_name
from efficli.checkpoint.reader import Checkpoint
from efficli.errors import CheckpointError, SecurityError
from efficli.progress import Progress

SMALL_BYTES = 1 << 28
"""Larger files beside the weights are not a tokenizer or a card; they are told by their size alone."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".msgpack", ".h5", ".data")


@dataclass(frozen=True, slots=True)
class Digest:
    """Hashes of a checkpoint's parts."""

    fingerprint: str
    """`sha256:...` of configuration and tensors, as `Checkpoint.fingerprint`."""
    files: Mapping[str, str]
    """SHA-256 of each small file, by its name in the folder."""

    @property
    def value(self) -> str:
        """One SHA-256 of all of it, in hexadecimal."""
        return hashlib.sha256(json.dumps([self.fingerprint, dict(sorted(self.files.items()))]).encode()).hexdigest()


def digest_of(ckpt: Checkpoint, progress: Progress | None = None) -> Digest:
    """The hashes of a checkpoint; reads all of its weights once."""
    return Digest(ckpt.fingerprint(progress), small_files(ckpt))


def small_files(ckpt: Checkpoint) -> dict[str, str]:
    """SHA-256 of every file of the checkpoint that is not weights: tokenizer, templates, card, pooling."""
    found = {}
    for name in small_file_names(ckpt):
        path = ckpt.root / name
        nbytes = path.stat().st_size
        told = f"{nbytes} bytes".encode() if nbytes > SMALL_BYTES else read_bytes(path, name, SMALL_BYTES)
        found[name] = hashlib.sha256(told).hexdigest()
    return found


def small_file_names(ckpt: Checkpoint) -> list[str]:
    """Names of the files beside the weights that may be read, sorted; `folder/name` of those one folder down."""
    found = []
    for name in sorted(_names(ckpt.root)):
        try:
            if ckpt.file(name) is not None:
                found.append(name)
        except (CheckpointError, SecurityError):
            continue  # whoever needs it says why it is refused
    return found


def _names(root: Path) -> Iterator[str]:
    """Names of files in the folder and in its folders, hidden ones and weights apart."""
    for path in root.iterdir():
        if path.name.startswith(".") or not single_name(path.name):
            continue
        if path.is_file() and path.suffix not in _WEIGHTS:
            yield path.name
        elif path.is_dir() and not path.is_symlink():
            for inner in path.iterdir():
                if inner.is_file() and single_name(inner.name) and inner.suffix not in _WEIGHTS:
                    yield f"{path.name}/{inner.name}"
