"""Which results go when room is made."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from efficli.store.entry import Entry


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """What `prune` removed, or in a dry run would remove."""

    removed: tuple[Entry, ...]
    damaged: int
    """Entries that could not be read, and went as well."""
    kept: tuple[Entry, ...]

    @property
    def nbytes(self) -> int:
        """The size of the removed entries' files."""
        return sum(entry.nbytes for entry in self.removed)


def choose(
    entries: Iterable[Entry],
    older_than_s: float | None,
    max_bytes: int | None,
    kinds: Collection[str] | None,
    everything: bool,
) -> tuple[Entry, ...]:
    """Which of the entries, the least recently used first, `prune` removes."""
    entries, now = list(entries), time.time()
    rest = sum(entry.nbytes for entry in entries)
    chosen = []
    for entry in entries:
        if kinds is not None and entry.kind not in kinds:
            continue
        old = older_than_s is not None and now - entry.used > older_than_s
        if everything or old or (max_bytes is not None and rest > max_bytes):
            chosen.append(entry)
            rest -= entry.nbytes
    return tuple(chosen)
