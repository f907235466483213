"""What the cache of step results holds, and making room in it."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from efficli.errors import UsageError, did_you_mean
from efficli.ops.byte_size import binary_bytes
from efficli.ops.duration import duration_text
from efficli.store import Entry, Pruned, Store, default_root

Table = tuple[str, Sequence[str], list[list[str]]]
"""Title, headings, rows."""

STEPS = ("pass", "imatrix", "write", "certificate")
"""Steps of a run whose results are kept."""
_SHOWN_DIGITS = 8
_NAMES = ("method", "model", "format", "type", "types")
"""Ingredients that say what a result is, where nobody has given it a label."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheListing:
    """The results in the cache, the least recently used first."""

    root: Path
    entries: tuple[Entry, ...]
    damaged: tuple[Path, ...]
    """What cannot be read, and is removed by the next run that wants it, or by `prune`."""

    def to_json(self) -> dict[str, Any]:
        """As plain data; times in seconds since 1970."""
        return {
            "schema_version": 1,
            "command": "cache ls",
            "root": str(self.root),
            "bytes": _total(self.entries),
            "entries": [_to_json(entry) for entry in self.entries],
            "damaged": [path.name for path in self.damaged],
        }

    def table(self) -> Table:
        """The results, the last used first."""
        return _table(f"Results in {self.root}", self.entries[::-1])

    def lines(self) -> list[str]:
        """How many and how large, in words."""
        lines = [f"{_count(self.entries)} in {self.root}"]
        if self.damaged:
            lines.append(f"damaged and of no use: {', '.join(path.name[:_SHOWN_DIGITS] for path in self.damaged)}")
        return lines


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneResult:
    """What was removed from the cache, or in a dry run would be."""

    root: Path
    pruned: Pruned
    dry_run: bool

    def to_json(self) -> dict[str, Any]:
        """As plain data; times in seconds since 1970."""
        return {
            "schema_version": 1,
            "command": "cache prune",
            "root": str(self.root),
            "removed": [_to_json(entry) for entry in self.pruned.removed],
            "bytes": self.pruned.nbytes,
            "damaged": self.pruned.damaged,
            "kept": len(self.pruned.kept),
            "kept_bytes": _total(self.pruned.kept),
            "dry_run": self.dry_run,
        }

    def table(self) -> Table:
        """What goes, the least recently used first."""
        return _table(f"{'Would remove' if self.dry_run else 'Removed'} from {self.root}", self.pruned.removed)

    def lines(self) -> list[str]:
        """What went and what stays, in words."""
        lines = [f"{'would remove' if self.dry_run else 'removed'} {_count(self.pruned.removed)}"]
        if self.pruned.damaged:
            lines[0] += f", and {self.pruned.damaged} damaged"
        lines[0] += f"; {_count(self.pruned.kept)} {'would stay' if self.dry_run else 'left'} in {self.root}"
        return lines


def list_cache(root: Path | None = None) -> CacheListing:
    """The results in `root`, or where `efficli run` keeps them. Files are not hashed; `run` does that when it uses
    one."""
    store = Store(root or default_root())
    return CacheListing(root=store.root, entries=store.entries(), damaged=store.damaged())


def prune_cache(
    *,
    older_than_s: float | None = None,
    max_bytes: int | None = None,
    kinds: Collection[str] | None = None,
    everything: bool = False,
    dry_run: bool = False,
    root: Path | None = None,
) -> PruneResult:
    """Remove results, the least recently used first: see `Store.prune`; what is damaged or half written goes as well.

    UsageError if nothing says which or a kind is unknown, OutputError if a run uses the cache.
    """
    if older_than_s is None and max_bytes is None and not everything:
        raise UsageError(
            "nothing says what to remove, expected --older-than, --max-bytes or --all",
            hint="efficli cache prune --older-than 30d",
        )
    store = Store(root or default_root())
    known = {*STEPS, *(entry.kind for entry in store.entries())}
    for kind in sorted(set(kinds or ()) - known):
        near = did_you_mean(kind, sorted(known)) or f"one of {', '.join(sorted(known))}"
        raise UsageError(f"--kind {kind!r} is no step whose results are kept", hint=near)
    pruned = store.prune(
        older_than_s=older_than_s, max_bytes=max_bytes, kinds=kinds, everything=everything, dry_run=dry_run
    )
    return PruneResult(root=store.root, pruned=pruned, dry_run=dry_run)


def _to_json(entry: Entry) -> dict[str, Any]:
    files = [{"name": one.name, "bytes": one.nbytes, "sha256": one.sha256} for one in entry.files.values()]
    return {
        "key": entry.key,
        "kind": entry.kind,
        "what": _what(entry),
        "bytes": entry.nbytes,
        "created": round(entry.created, 3),
        "used": round(entry.used, 3),
        "files": files,
        "ingredients": dict(entry.ingredients),
    }


def _table(title: str, entries: Iterable[Entry]) -> Table:
    now = time.time()
    rows = [
        [
            " ".join(f"{entry.kind} {_what(entry)}".split()),
            entry.key[:_SHOWN_DIGITS],
            binary_bytes(entry.nbytes),
            duration_text(now - entry.created),
            duration_text(now - entry.used),
        ]
        for entry in entries
    ]
    return title, ("result of", "key", "size", "age", "not used for"), rows


def _what(entry: Entry) -> str:
    """Its label, or what its ingredients say by name."""
    if entry.label:
        return entry.label
    values = [entry.ingredients.get(name) for name in _NAMES]
    words = [part for value in values for part in (value if isinstance(value, list) else [value])]
    return " ".join(word for word in words if isinstance(word, str))


def _count(entries: Collection[Entry]) -> str:
    if not entries:
        return "no results"
    return f"{len(entries)} result{'s' if len(entries) > 1 else ''} ({binary_bytes(_total(entries))})"


def _total(entries: Iterable[Entry]) -> int:
    return sum(entry.nbytes for entry in entries)
