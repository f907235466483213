"""What files should be, by SHA256SUMS and efficli.json beside them; names in those that lead elsewhere are refused."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from efficli.artifact import read_artifact
from efficli.artifact.manifest import KIND, MANIFEST, SUMS, hash_file
from efficli.checkpoint import strict_json
from efficli.checkpoint.files import contained, read_bytes
from efficli.errors import CheckpointError, EffiError
from efficli.inspection.report import Finding, printable

CHECK = "hashes"
_SUMS_BYTES = 16 << 20
_LINE = re.compile(r"\\?([0-9a-fA-F]{64}) [ *](.+)")
_AGAIN = "copy or fetch it again, and trust neither until you know which was changed"


@dataclass(slots=True)
class Expected:
    """Names of a folder's files with the SHA-256 that they should have, and of tensors where the manifest has them."""

    files: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, dict[str, str]] = field(default_factory=dict)
    """File -> tensor -> SHA-256."""
    sources: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    manifest: Mapping[str, Any] | None = None


def read_expected(folder: Path) -> Expected:
    """What SHA256SUMS and an artifact's efficli.json in a folder say; what is wrong with them as findings."""
    out = Expected()
    if _is_artifact(folder):
        try:
            artifact = read_artifact(folder)
        except EffiError as error:
            out.findings.append(Finding.of(error, CHECK))
        else:
            out.manifest = artifact.manifest
            out.files |= {record.name: record.sha256 for record in artifact.files}
            out.tensors = _tensor_hashes(artifact.manifest)
        out.sources.append(MANIFEST)
    if os.path.lexists(folder / SUMS):
        out.sources.append(SUMS)
        try:
            _add_sums(folder, out)
        except EffiError as error:
            out.findings.append(Finding.of(error, CHECK))
    return out


def check_files(folder: Path, expected: Expected, passed: Collection[str], *, large: bool) -> list[Finding]:
    """Compare files with their hashes, but for those in `passed`, which are judged elsewhere.

    Without `large`, those of more than 16 MiB are not read.
    """
    found = []
    for name, wanted in sorted(expected.files.items()):
        if name in passed:
            continue
        try:
            path = contained(folder, name)
            if not path.is_file():
                raise CheckpointError(f"{printable(name)} is missing", where=folder.name, hint="fetch it too")
        except EffiError as error:
            found.append(Finding.of(error, CHECK))
            continue
        if (large or path.stat().st_size <= _SUMS_BYTES) and hash_file(path) != wanted:
            found.append(differs(name, "sha256 differs"))
    return found


def differs(name: str, what: str) -> Finding:
    """The finding for a file that is not what its hash says."""
    return Finding(check=CHECK, message=f"verify: {what}", where=printable(name), hint=_AGAIN, code=6)


def _is_artifact(folder: Path) -> bool:
    """Whether there is a manifest that is not that of a compressed checkpoint; a damaged one counts."""
    path = folder / MANIFEST
    if not os.path.lexists(path):
        return False
    try:
        kind = strict_json.parse_object(read_bytes(path, MANIFEST, 64 << 20), MANIFEST).get("kind")
    except EffiError:
        return True
    return bool(kind == KIND)


def _tensor_hashes(manifest: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """The manifest's `tensors`: file -> tensor -> sha256; what is no such thing is left out."""
    listed = manifest.get("tensors")
    out: dict[str, dict[str, str]] = {}
    for file, tensors in listed.items() if isinstance(listed, dict) else ():
        if isinstance(tensors, dict):
            rows = {name: row.get("sha256") for name, row in tensors.items() if isinstance(row, dict)}
            out[file] = {name: sha for name, sha in rows.items() if isinstance(sha, str)}
    return out


def _add_sums(folder: Path, out: Expected) -> None:
    text = read_bytes(folder / SUMS, SUMS, _SUMS_BYTES).decode("utf-8", "surrogateescape")
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise CheckpointError("not a line of sha256sum", where=f"{SUMS}:{number}", hint="sha256sum * >SHA256SUMS")
        sha, name = match[1].lower(), match[2].removeprefix("./")
        contained(folder, name)
        known = out.files.setdefault(name, sha)
        if known != sha:
            out.findings.append(differs(name, f"{SUMS} and {MANIFEST} have different hashes of it"))
