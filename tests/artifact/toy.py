"""A toy artifact of two files, published as exporters do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from efficli.artifact import Artifact, FileRecord, draft


def publish(
    out: Path,
    text: str = "one",
    *,
    force: bool = False,
    inputs: Sequence[Path] = (),
    needs_bytes: int = 0,
    hashed: Iterable[FileRecord] = (),
) -> Artifact:
    """Write an artifact whose content follows from `text`."""
    with draft(out, inputs=list(inputs), needs_bytes=needs_bytes, force=force) as made:
        (made.path / "model.gguf").write_bytes(text.encode() * 1000)
        (made.path / "README.md").write_text(text)
        return made.commit({"tool": {"name": "efficli"}, "text": text}, {"date": "2026-01-01"}, hashed=hashed)
