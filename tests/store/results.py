"""A small result, kept in a store as the pipeline keeps them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from efficli.progress import Silent
from efficli.store import Entry, Store, step_key

FILES = {"model.gguf": b"weights " * 5000, "tokenizer/tokenizer.json": b'{"model": 1}', "empty": b""}
INGREDIENTS: dict[str, Any] = {"input": "sha256:12ab", "config": {"type": "Q4_K_M", "threads": 2}}
KEY = step_key("export", INGREDIENTS)


def write(folder: Path) -> None:
    """The step's work."""
    for name, data in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)


def fill(store: Store, *, kind: str = "export", label: str = "", **changed: Any) -> Entry:
    """Compute a result and keep it; `changed` are further ingredients."""
    ingredients = {**INGREDIENTS, **changed}
    key = step_key(kind, ingredients)
    with store.using():
        with store.filling(key, kind=kind, ingredients=ingredients, label=label) as folder:
            write(folder)
        entry = store.get(key)
    assert entry is not None
    return entry


def got(root: Path, key: str = KEY) -> tuple[Entry | None, list[str]]:
    """What another run finds, and its notes."""
    told = Silent()
    store = Store(root, told)
    with store.using():
        return store.get(key), told.notes


def assert_whole(entry: Entry | None) -> None:
    """The entry has the files that were written, and these alone."""
    assert entry is not None
    found = {path.relative_to(entry.path).as_posix(): path for path in entry.path.rglob("*") if path.is_file()}
    assert {name: path.read_bytes() for name, path in found.items()} == FILES
