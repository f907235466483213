"""Writers for the fault sweep: the real one at its smallest, and wrong ones that the sweep has to catch."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from pathlib import Path
from unittest import mock

from efficli.artifact import atomic, draft, writing


def _files(text: str) -> dict[str, bytes]:
    return {"model.gguf": text.encode() * 5000, "tokenizer.json": b'{"of": "%s"}' % text.encode()}


def toy(out: Path, text: str) -> None:
    """Two files by `draft` and `commit`, the larger one in three writes."""
    with draft(out, inputs=[], needs_bytes=1000, force=True) as made:
        for name, data in _files(text).items():
            with writing(made.path / name), (made.path / name).open("wb", buffering=0) as file:
                for start in range(0, len(data), 6000):
                    view = memoryview(data[start : start + 6000])
                    while view:
                        view = view[file.write(view) :]
        made.commit({"text": text}, {"at": time.time()})


def naive(out: Path, text: str) -> None:
    """Writes straight into OUT, as most programs do."""
    if out.exists():
        shutil.rmtree(out)
    out.mkdir()
    for name, data in _files(text).items():
        (out / name).write_bytes(data)


def unsynced(out: Path, text: str) -> None:
    """The real writer without fsync of the files: whole after a kill, not after a power failure."""
    with mock.patch.object(atomic, "sync_file", lambda path: None):
        toy(out, text)


def unsynced_names(out: Path, text: str) -> None:
    """The real writer without fsync of the directory."""
    with mock.patch.object(atomic, "sync_directory", lambda path: None):
        toy(out, text)


def two_renames(out: Path, text: str) -> None:
    """Temporary directory and rename, but the old artifact is removed first."""
    temporary = out.with_name(f".efficli-tmp-{os.getpid()}-0123abcd")
    with contextlib.suppress(FileExistsError):
        temporary.mkdir()
    for name, data in _files(text).items():
        (temporary / name).write_bytes(data)
    if out.exists():
        shutil.rmtree(out)
    temporary.rename(out)
