"""The README.md of an artifact: what it is, what it cost, how to run it; and what comes along from the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from efficli.checkpoint import Checkpoint
from efficli.checkpoint.files import read_bytes
from efficli.ops.storage import write_file

CARRIED = ("LICENSE", "LICENSE.txt", "LICENSE.md", "COPYING", "NOTICE", "NOTICE.txt", "USE_POLICY.md")
"""Files of the checkpoint that go with every copy of its weights."""

SOURCE_CARD = "SOURCE_MODEL_CARD.md"
"""What the checkpoint's own README.md is called in the artifact."""

MAX_BYTES = 1 << 26
"""A larger licence or card is an error: it is something else."""


@dataclass(frozen=True, slots=True)
class Row:
    """One file of the card's table, in words."""

    file: str
    type: str
    size: str
    bits: str
    quality: str


def carry_along(ckpt: Checkpoint, folder: Path) -> list[str]:
    """Copy licence, notice and model card of the checkpoint into `folder`; the names that were written."""
    written = []
    for name, target in [*((n, n) for n in CARRIED), ("README.md", SOURCE_CARD)]:
        source = ckpt.file(name)
        if source is not None:
            write_file(folder / target, read_bytes(source, name, MAX_BYTES))
            written.append(target)
    return written


def write_card(
    folder: Path, ckpt: Checkpoint, rows: Sequence[Row], report: Sequence[str], *, embeds: bool, license_id: str | None
) -> None:
    """Write README.md: front matter that the hub understands, a table of the files, how to run them, the report."""
    front: dict[str, object] = {"base_model": ckpt.name, "library_name": "gguf", "tags": ["gguf", "efficli"]}
    if license_id:
        front["license"] = license_id
    told = yaml.safe_dump(front, sort_keys=True, allow_unicode=True).strip()
    lines = ["---", told, "---", f"# {ckpt.name}, GGUF", ""]
    revision = f" at revision `{ckpt.revision}`" if ckpt.revision else ""
    lines += [f"Made by efficli from `{ckpt.name}`{revision}. `efficli.json` says how, and holds every hash.", ""]
    lines += ["| file | type | size | bits per weight | against the source |", "|---|---|---|---|---|"]
    lines += [f"| {r.file} | {r.type} | {r.size} | {r.bits} | {r.quality} |" for r in rows]
    first = rows[0].file
    run = f"llama-embedding -m {first} -p 'a sentence'" if embeds else f"llama-cli -m {first} -p 'Once upon a time'"
    lines += ["", "```sh", "sha256sum -c SHA256SUMS", run, "```"]
    if report:
        lines += ["", "What to know:", "", *(f"- {row}" for row in report)]
    if (folder / SOURCE_CARD).exists():
        lines += ["", f"The source's own card is [{SOURCE_CARD}]({SOURCE_CARD})."]
    write_file(folder / "README.md", "\n".join(lines) + "\n")
