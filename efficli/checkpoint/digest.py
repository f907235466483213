"""What a checkpoint consists of, as hashes: weights and configuration, and every small file beside them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from efficli.checkpoint.carry import MAX_SMALL_BYTES, small_names
from efficli.checkpoint.files import slabs
from efficli.checkpoint.reader import Checkpoint
from efficli.errors import CheckpointError, SecurityError
from efficli.progress import Progress

SMALL_BYTES = MAX_SMALL_BYTES
"""Larger files beside the weights are not a tokenizer or a card: no pass takes them over, their size alone counts."""


@dataclass(frozen=True, slots=True)
class Digest:
    """Hashes of a checkpoint's parts."""

    fingerprint: str
    """`sha256:...` of configuration and tensors, as `Checkpoint.fingerprint`."""
    files: Mapping[str, str]
    """SHA-256 of each file that goes along with the weights, by its name in the folder."""

    @property
    def value(self) -> str:
        """One SHA-256 of all of it, in hexadecimal."""
        return hashlib.sha256(json.dumps([self.fingerprint, dict(sorted(self.files.items()))]).encode()).hexdigest()


def digest_of(ckpt: Checkpoint, progress: Progress | None = None) -> Digest:
    """The hashes of a checkpoint; reads all of its weights once."""
    return Digest(ckpt.fingerprint(progress), small_files(ckpt))


def small_files(ckpt: Checkpoint) -> dict[str, str]:
    """SHA-256 of every file that goes along with the weights: tokenizer, templates, card, pooling and its weights."""
    found = {}
    for name in small_file_names(ckpt):
        path = ckpt.root / name
        nbytes = path.stat().st_size
        if nbytes > SMALL_BYTES and not name.endswith(".safetensors"):
            found[name] = hashlib.sha256(f"{nbytes} bytes".encode()).hexdigest()
        else:
            found[name] = _sha256(path, name)
    return found


def small_file_names(ckpt: Checkpoint) -> list[str]:
    """Names of the files beside the weights that may be read, sorted: all that a pass takes over, and configuration."""
    found = []
    for name in sorted(small_names(ckpt.root)):
        try:
            if ckpt.file(name) is not None:
                found.append(name)
        except (CheckpointError, SecurityError):
            continue  # whoever needs it says why it is refused
    return found


def _sha256(path: Path, name: str) -> str:
    digest = hashlib.sha256()
    for piece in slabs(path, name):
        digest.update(piece)
    return digest.hexdigest()
