"""Write the committed held-out slices: `python -m efficli.reference.slices`.

The texts are copied once from one machine's standard library and documentation, so that every machine
calibrates and certifies on the same bytes; `slices.json` keeps size, SHA-256 and the Python they came from.
"""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path
from typing import get_args

from efficli.reference.corpus import Kind, Slice, documents, slice_text

TEXT = Path(__file__).parent / "text"
MAX_BYTES = 300_000


def main() -> None:
    """Write the four slice files and slices.json."""
    found = documents()
    TEXT.mkdir(exist_ok=True)
    index: dict[str, dict[str, object]] = {}
    for part in get_args(Slice):
        for kind in get_args(Kind):
            if part == "train":
                continue
            data = slice_text(found, kind, part, MAX_BYTES).encode()
            name = f"{part}-{kind}.txt"
            (TEXT / name).write_bytes(data)
            index[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    source = f"CPython {platform.python_version()} standard library; python3.11-doc of Debian 12"
    (TEXT / "slices.json").write_text(json.dumps({"source": source, "files": index}, indent=2) + "\n")


if __name__ == "__main__":
    main()
