"""What an artifact says about itself: `efficli.json`, read strictly, and its files checked against it."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from efficli.checkpoint import strict_json
from efficli.checkpoint.files import read_bytes
from efficli.errors import CheckpointError, SecurityError, UnsupportedError

SCHEMA_VERSION = 1
KIND = "artifact"
"""Tells an artifact's manifest from the efficli.json of a compressed checkpoint."""
MANIFEST = "efficli.json"
SUMS = "SHA256SUMS"
RUN = "run.json"
OWN_FILES = (MANIFEST, SUMS, RUN)
"""What `Draft.commit` writes itself; SUMS covers the manifest and every other file but RUN."""

_MANIFEST_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, order=True)
class FileRecord:
    """One file of an artifact: its plain name, its size in bytes and its SHA-256 in hexadecimal."""

    name: str
    nbytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Artifact:
    """A published directory: its manifest as parsed, and the files that it names."""

    root: Path
    manifest: Mapping[str, Any]
    files: tuple[FileRecord, ...]

    @property
    def nbytes(self) -> int:
        """The size of the files together, without the manifest."""
        return sum(record.nbytes for record in self.files)

    def file(self, name: str) -> Path:
        """The path of one of its files; KeyError if the manifest does not name it."""
        if all(record.name != name for record in self.files):
            raise KeyError(name)
        return self.root / name

    def verify(self) -> None:
        """Hash every file and compare, SHA256SUMS too; SecurityError names the first that differs."""
        for record in self.files:
            if hash_file(self.root / record.name) != record.sha256:
                raise SecurityError("sha256 differs from the manifest's", where=str(self.root / record.name))
        text = (self.root / MANIFEST).read_bytes()
        sums = self.root / SUMS
        if not sums.is_file() or sums.read_bytes() != sums_text([*self.files, record_of(MANIFEST, text)]):
            raise SecurityError(f"does not agree with {MANIFEST}", where=str(sums))


def read_artifact(path: str | Path) -> Artifact:
    """Read the manifest of a directory made by efficli and check that its files exist with their sizes.

    CheckpointError: no such directory, no manifest, or one that is damaged; SecurityError: a file differs from it.
    """
    root = Path(path)
    if not root.is_dir():
        raise CheckpointError("no such artifact directory", where=str(root))
    manifest = _read_manifest(root / MANIFEST)
    files = tuple(_read_record(root, entry) for entry in manifest["files"])
    names = [record.name for record in files]
    if len(set(names)) != len(names):
        raise CheckpointError("names a file twice", where=str(root / MANIFEST))
    for record in files:
        _check_size(root, record)
    return Artifact(root, manifest, files)


def is_made_by_efficli(path: Path) -> bool:
    """Whether the directory holds an artifact or a checkpoint that efficli wrote: whether its manifest says so."""
    manifest = path / MANIFEST
    try:
        kind = strict_json.parse_object(read_bytes(manifest, MANIFEST, _MANIFEST_BYTES), MANIFEST).get("kind")
    except CheckpointError:
        return False
    return kind in (KIND, "checkpoint")


def is_plain_name(name: str) -> bool:
    """Whether the name is that of a file in the directory itself, printable and without a separator."""
    return bool(name) and name not in (".", "..") and not any(c in "/\\" or ord(c) < 32 or ord(c) == 127 for c in name)


def to_json(value: Mapping[str, Any]) -> bytes:
    """Stable JSON: sorted keys, no NaN, one newline at the end; names that are no UTF-8 as escapes."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    # a lone surrogate becomes \udcXX, which is also how JSON writes it
    return (text + "\n").encode("utf-8", "backslashreplace")


def sums_text(records: Iterable[FileRecord]) -> bytes:
    """The content of SHA256SUMS, as `sha256sum -c` reads it, sorted by name."""
    lines = (f"{record.sha256}  {record.name}\n" for record in sorted(records))
    return "".join(lines).encode("utf-8", "surrogateescape")


def record_of(name: str, content: bytes) -> FileRecord:
    """The record of a file with this content."""
    return FileRecord(name, len(content), hashlib.sha256(content).hexdigest())


def hash_file(path: Path) -> str:
    """SHA-256 of the file in hexadecimal, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    where = str(path)
    if not os.path.lexists(path):
        raise CheckpointError(f"{path.name} not found: not made by efficli", where=str(path.parent))
    if path.is_symlink():
        raise SecurityError("is a link", where=where)
    manifest = strict_json.parse_object(read_bytes(path, where, _MANIFEST_BYTES), where)
    if manifest.get("kind") != KIND:
        raise CheckpointError(f"kind is {manifest.get('kind')!r}, expected {KIND!r}", where=where)
    version = manifest.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:
        raise UnsupportedError(
            f"schema_version is {version!r}, expected {SCHEMA_VERSION}",
            where=where,
            hint="pip install --upgrade efficli",
        )
    if not isinstance(manifest.get("files"), list):
        raise CheckpointError("no list of files", where=where)
    return manifest


def _read_record(root: Path, entry: object) -> FileRecord:
    where = str(root / MANIFEST)
    if not isinstance(entry, dict) or set(entry) != {"name", "nbytes", "sha256"}:
        raise CheckpointError("a file needs name, nbytes and sha256", where=where)
    name, nbytes, sha256 = entry["name"], entry["nbytes"], entry["sha256"]
    if not isinstance(name, str) or not is_plain_name(name) or name in OWN_FILES:
        raise SecurityError(f"file name {name!r} is not a plain name in the directory", where=where)
    if type(nbytes) is not int or nbytes < 0:
        raise CheckpointError(f"{name}: nbytes is {nbytes!r}, expected a number of bytes", where=where)
    if not isinstance(sha256, str) or len(sha256) != 64 or set(sha256) - set("0123456789abcdef"):
        raise CheckpointError(f"{name}: sha256 is {sha256!r}, expected 64 hexadecimal digits", where=where)
    return FileRecord(name, nbytes, sha256)


def _check_size(root: Path, record: FileRecord) -> None:
    path = root / record.name
    try:
        info = os.lstat(path)
    except FileNotFoundError:
        raise CheckpointError(f"{record.name} is missing", where=str(root)) from None
    if not stat.S_ISREG(info.st_mode):
        raise SecurityError("not a regular file", where=str(path))
    if info.st_size != record.nbytes:
        raise SecurityError(f"{info.st_size} bytes, the manifest says {record.nbytes}", where=str(path))
