"""Steps of a run: each result is looked up in the cache by what it was made from, and made only where it is not there.

A step's key has everything that decides its bytes: digests of its inputs, its options, the source code of its method
with all that this imports of efficli, and versions of the libraries that compute (`efficli.store.key`).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from efficli.artifact import FileRecord
from efficli.errors import OutputError
from efficli.progress import Progress
from efficli.store import Entry, Store, default_root, step_key

Ingredients = Callable[[], Mapping[str, Any]]
"""Made only where there is a cache: hashing a model's weights takes time."""


class Clock:
    """Seconds of each part of a run, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Time a block."""
        began = time.monotonic()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.monotonic() - began


@contextmanager
def kept_steps(wanted: bool, progress: Progress) -> Iterator[Store | None]:
    """The cache where it is wanted, in use until the end of the block."""
    if not wanted:
        yield None
        return
    store = Store(default_root(), progress)
    with store.using():
        yield store


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRun:
    """One step as it went."""

    kind: str
    """pass, imatrix, write, load, certificate, bench."""
    what: str
    """The method, the file types, the file."""
    key: str | None
    """In the cache; None for what is not kept there."""
    cached: bool
    seconds: float
    changed: tuple[str, ...] = ()
    """What it was made from that differs from the most similar kept result; () if none of its kind is kept."""

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self) | {"seconds": round(self.seconds, 3)}


@dataclass(slots=True, kw_only=True)
class Steps:
    """Runs the steps of one recipe and remembers how they went."""

    store: Store | None
    """None: nothing is kept, as for a single export."""
    scratch: Path
    """A folder of this run, for results that are not kept."""
    progress: Progress
    clock: Clock
    done: list[StepRun] = field(default_factory=list)
    entries: dict[Path, Entry] = field(default_factory=dict)
    """Of the results that are kept, by their folders."""

    def produce(
        self,
        kind: str,
        what: str,
        ingredients: Ingredients,
        fill: Callable[[Path], None],
        *,
        needs_bytes: int = 0,
        hashed: Collection[FileRecord] = (),
        here: Path | None = None,
    ) -> Path:
        """The folder with the step's result, which `fill` writes into an empty one where it is not in the cache.

        `hashed` is looked at after `fill`: files in it are not read again to hash them. `here` is where the result is
        written if there is no cache; by default a folder of the run.
        """
        with self.timed(kind, what) as step:
            if self.store is None:
                folder = here or Path(tempfile.mkdtemp(prefix=f"{kind}-", dir=self.scratch))
                fill(folder)
                return folder
            made_from = ingredients()
            key = step_key(kind, made_from)
            found = self.store.get(key)
            step.update(key=key, cached=found is not None)
            if found is None:
                step["changed"] = self.store.why_not(kind, made_from)
                with self.store.filling(
                    key, kind=kind, ingredients=made_from, label=what, needs_bytes=needs_bytes, hashed=hashed
                ) as folder:
                    fill(folder)
                found = self.store.get(key)
            if found is None:
                raise OutputError(
                    f"what was just written is read back otherwise ({kind} of {what})",
                    where=str(self.store.root),
                    hint="the disk of the cache is faulty: name another with EFFICLI_CACHE_DIR, or use --no-cache",
                )
            self.entries[found.path] = found
            return found.path

    def copy(self, folder: Path, name: str, destination: Path) -> None:
        """Copy a file out of a kept result, and hold the copy against its hash."""
        if self.store is None:
            raise ValueError("nothing is kept")
        self.store.copy(self.entries[folder], name, destination)

    def has(self, kind: str, ingredients: Ingredients) -> bool:
        """Whether the cache holds the step's result, whole."""
        return self.store is not None and self.store.get(step_key(kind, ingredients())) is not None

    @contextmanager
    def timed(self, kind: str, what: str) -> Iterator[dict[str, Any]]:
        """Time a block as a step; its dictionary takes `key`, `cached` and `changed`."""
        told: dict[str, Any] = {"key": None, "cached": False, "changed": ()}
        began = time.monotonic()
        with self.clock(kind):
            yield told
        self.done.append(StepRun(kind=kind, what=what, seconds=time.monotonic() - began, **told))
