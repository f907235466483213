"""Writers for the fault sweep: the real one at its smallest, and wrong ones that the sweep has to catch."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from pathlib import Path
from unittest import mock

from efficli.artifact import atomic, draft, writing
from efficli.export.gguf.verify import Verified


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


def export(out: Path, text: str) -> None:
    """A real export; "old" and "new" differ in the type. What only reads (loading, token ids) is left out here, as it
    changes no file; `export_whole` has it."""
    with (
        mock.patch("efficli.pipeline.execution.verify_file", _not_verified),
        mock.patch("efficli.pipeline.execution.compare_tokens", lambda path, ckpt, progress: []),
    ):
        export_whole(out, text)


def export_whole(out: Path, text: str) -> None:
    """A real export with everything but the certificate: its children load the file and compare token ids."""
    import efficli

    types = {"old": ("Q4_0",), "new": ("Q8_0", "F16")}[text]
    efficli.export(os.environ["SWEEP_MODEL"], out, types=types, certificate=False, force=True, threads=1)


def _not_verified(path: Path, *, threads: int | None = None, progress: object = None) -> Verified:
    return Verified(architecture="llama", tokens=(), text="", embedding=False, seconds=0.0)
