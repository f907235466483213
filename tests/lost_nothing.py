"""The check that a run lost nothing: inputs as they were, the output old, new or absent, and no stray files."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path


def fingerprint(path: Path) -> dict[str, str]:
    """What is at `path`: relative name -> kind and content; {} if nothing is."""
    if not os.path.lexists(path):
        return {}
    found = {}
    for one in [path, *sorted(path.rglob("*") if path.is_dir() and not path.is_symlink() else [])]:
        mode = os.lstat(one).st_mode
        if stat.S_ISREG(mode):
            content = hashlib.sha256(one.read_bytes()).hexdigest()
        elif stat.S_ISLNK(mode):
            content = str(one.readlink())
        else:
            content = str(stat.S_IFMT(mode))
        found[str(one.relative_to(path))] = content
    return found


def strays(folder: Path, known: Sequence[str]) -> list[str]:
    """Names in the folder that are neither known nor a temporary directory that the next run removes."""
    return sorted(p.name for p in folder.iterdir() if p.name not in known and not p.name.startswith(".efficli-tmp-"))


@contextlib.contextmanager
def lost_nothing(folder: Path, *, published: Sequence[str] = (), temporary: bool = False) -> Iterator[None]:
    """Assert that the block changes nothing in `folder` but the names in `published`; `temporary` allows what a
    killed run may leave: `.efficli-tmp-*` directories and a lock without holder.
    """
    before = {path.name: fingerprint(path) for path in folder.iterdir()}
    yield
    after = {path.name: fingerprint(path) for path in folder.iterdir()}
    left = set(after) - set(before) - set(published)
    if temporary:
        left = {name for name in left if not name.startswith(".efficli-tmp-") and not name.endswith(".lock")}
    assert not left, f"stray files: {sorted(left)}"
    for name, content in before.items():
        if name not in published:
            assert after.get(name) == content, f"{name} was changed"
