"""One kept result: `KEY/entry.json`, which says what it is and covers itself by a hash, and `KEY/files/`."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from efficli.artifact.manifest import FileRecord, is_plain_name
from efficli.checkpoint import strict_json
from efficli.checkpoint.files import Stamp
from efficli.progress import Progress
from efficli.store.key import plain, step_key

MANIFEST = "entry.json"
FILES = "files"

_MANIFEST_BYTES = 64 << 20
_MAX_DEPTH = 8
_SLAB_BYTES = 1 << 20
_FIELDS = {"key", "kind", "ingredients", "label", "created", "files", "sha256"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """The result of a step."""

    key: str
    kind: str
    """Which step: "export"."""
    ingredients: Mapping[str, Any]
    """What the key was made of, as plain data."""
    label: str
    """What it is in a few words, for people; no part of the key."""
    path: Path
    """The folder with the result's files and nothing else; read only."""
    files: Mapping[str, FileRecord]
    """By name; that of a file in a sub-folder is `folder/file`."""
    created: float
    """Seconds since 1970."""
    used: float = field(compare=False)
    """When it was last given to a run, seconds since 1970."""

    @property
    def nbytes(self) -> int:
        """The size of the files together."""
        return sum(record.nbytes for record in self.files.values())

    def file(self, name: str) -> Path:
        """The path of one of its files; KeyError for another name."""
        return self.path / self.files[name].name


class Damaged(Exception):
    """An entry is not what was written; the message says in which way."""


def read_entry(folder: Path) -> Entry:
    """The entry in `folder` with the names and sizes of its files checked, but not their hashes; or Damaged."""
    try:
        for one in (folder, folder / FILES):
            if not stat.S_ISDIR(os.lstat(one).st_mode):
                raise Damaged(f"{one.name} is not a folder")
        values, used = _read_manifest(folder)
        entry = _entry(folder, values, used)
        present = dict(walk(entry.path))
    except OSError as error:
        raise Damaged(f"{Path(str(error.filename or folder)).name}: {error.strerror}") from error
    for name, record in entry.files.items():
        if name not in present:
            raise Damaged(f"{name} is missing")
        if present[name].st_size != record.nbytes:
            raise Damaged(f"{name} has {present[name].st_size} bytes, {record.nbytes} were written")
    if strangers := sorted(set(present) - set(entry.files)):
        raise Damaged(f"{strangers[0]} does not belong to it")
    return entry


def manifest_bytes(
    *, key: str, kind: str, ingredients: Mapping[str, Any], label: str, created: float, files: Iterable[FileRecord]
) -> bytes:
    """The content of entry.json."""
    rows = [{"name": record.name, "nbytes": record.nbytes, "sha256": record.sha256} for record in sorted(files)]
    values = {"key": key, "kind": kind, "ingredients": plain(ingredients), "label": label, "created": created}
    return _sealed({**values, "files": rows})


def walk(folder: Path, prefix: str = "") -> Iterator[tuple[str, os.stat_result]]:
    """Relative name and status of every file below; Damaged for what is neither a file nor a folder. No link is
    followed."""
    if prefix.count("/") > _MAX_DEPTH:
        raise Damaged(f"{prefix} is nested too deeply")
    with os.scandir(folder) as found:
        for one in sorted(found, key=lambda one: one.name):
            name, info = f"{prefix}{one.name}", one.stat(follow_symlinks=False)
            if not is_plain_name(one.name):
                raise Damaged(f"{name!r} is not a plain name")
            if stat.S_ISDIR(info.st_mode):
                yield from walk(Path(one.path), f"{name}/")
            elif stat.S_ISREG(info.st_mode):
                yield name, info
            else:
                raise Damaged(f"{name} is not a regular file")


def open_file(path: Path) -> int:
    """A descriptor for reading a regular file; OSError for a link, Damaged for what else is no file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise Damaged(f"{path.name} is not a regular file")


def hash_file(path: Path, progress: Progress) -> tuple[str, Stamp]:
    """SHA-256 of a file in hexadecimal, and the stamp that it had before it was read."""
    descriptor = open_file(path)
    try:
        stamp = Stamp.of(os.fstat(descriptor))
        digest = hashlib.sha256()
        while piece := os.read(descriptor, _SLAB_BYTES):
            digest.update(piece)
            progress.advance(len(piece))
    finally:
        os.close(descriptor)
    return digest.hexdigest(), stamp


def _sealed(values: Mapping[str, Any]) -> bytes:
    """JSON with the hash of its other fields: one text for the same values, so that no byte can change unseen."""
    inner = json.dumps(values, indent=1, sort_keys=True, allow_nan=False)
    sealed = {**values, "sha256": hashlib.sha256(inner.encode()).hexdigest()}
    return (json.dumps(sealed, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _read_manifest(folder: Path) -> tuple[dict[str, Any], float]:
    """The values of entry.json and when it was last touched."""
    descriptor = open_file(folder / MANIFEST)
    with os.fdopen(descriptor, "rb") as file:
        content, used = file.read(_MANIFEST_BYTES), os.fstat(descriptor).st_mtime
    try:
        values = strict_json.parse(content.decode())
    except UnicodeDecodeError:
        raise Damaged(f"{MANIFEST} is not text") from None
    if not isinstance(values, dict) or set(values) != _FIELDS:
        raise Damaged(f"{MANIFEST} is not whole")
    try:
        sealed = _sealed({name: value for name, value in values.items() if name != "sha256"})
    except RecursionError:
        raise Damaged(f"{MANIFEST} is nested too deeply") from None
    if sealed != content:
        raise Damaged(f"sha256 differs in {MANIFEST}")
    return values, used


def _entry(folder: Path, values: Mapping[str, Any], used: float) -> Entry:
    """The entry that these values describe, if they are of this folder and of this layout."""
    try:
        records = [FileRecord(row["name"], row["nbytes"], row["sha256"]) for row in values["files"]]
        same = folder.name == values["key"] == step_key(values["kind"], values["ingredients"])
        sound = all(_is_sound(record) for record in records) and isinstance(values["label"], str)
        created = float(values["created"])
    except (TypeError, ValueError, KeyError, AttributeError):
        sound = same = False
    if not sound:
        raise Damaged(f"{MANIFEST} is not of this layout")
    if not same:
        raise Damaged(f"{MANIFEST} is that of another entry")
    return Entry(
        key=values["key"],
        kind=values["kind"],
        ingredients=values["ingredients"],
        label=values["label"],
        path=folder / FILES,
        files={record.name: record for record in records},
        created=created,
        used=used,
    )


def _is_sound(record: FileRecord) -> bool:
    """Whether the name stays in the folder, and size and hash can be such."""
    parts = PurePosixPath(record.name).parts
    plain_name = "/".join(parts) == record.name and bool(parts) and all(is_plain_name(part) for part in parts)
    return plain_name and type(record.nbytes) is int and record.nbytes >= 0 and len(record.sha256) == 64
