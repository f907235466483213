"""The store of step results: found by key, checked by hash, written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from efficli.artifact.checks import check_space
from efficli.artifact.manifest import FileRecord
from efficli.artifact.temporary import remove_dead, temporary_directory, unused_name
from efficli.checkpoint.files import Stamp
from efficli.errors import FitError, OutputError
from efficli.ops.storage import CAUSES, is_of_writing, remove_tree, sync_directory, sync_file, write_error, writing
from efficli.progress import Progress, Silent
from efficli.store import lock
from efficli.store.copying import copy_file
from efficli.store.entry import FILES, MANIFEST, Damaged, Entry, hash_file, manifest_bytes, read_entry, walk
from efficli.store.key import differences, step_key
from efficli.store.pruning import Pruned, choose

_KEY = re.compile(r"[0-9a-f]{64}")
_MAKE_ROOM = "make room with `efficli cache prune --older-than 30d`, set EFFICLI_CACHE_DIR, or use --no-cache"
_ELSEWHERE = "set EFFICLI_CACHE_DIR to a folder that you can write to, or use --no-cache"
_SHOWN_DIGITS = 8


class Store:
    """The results in the folder `root`, which is made when it is first written to.

    `get` and `filling` need a surrounding `using`, so that nobody removes what a run relies on.
    """

    def __init__(self, root: Path, progress: Progress | None = None) -> None:
        self.root = Path(os.path.realpath(root))
        self.progress: Progress = progress or Silent()
        self._users = 0
        self._checked: dict[tuple[str, str], Stamp] = {}
        """Files of (key, name) whose content had its hash when they had this stamp."""
        self._distrusted: set[Path] = set()
        """Damaged entries that could not be removed when they were found."""

    @contextlib.contextmanager
    def using(self) -> Iterator[None]:
        """Keep others from removing entries, and remove what killed runs left half written. OutputError."""
        with contextlib.ExitStack() as stack:
            if self._users == 0:
                with self._told():
                    self.root.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(lock.shared(self.root))
                    remove_dead(self.root)
            self._users += 1
            try:
                yield
            finally:
                self._users -= 1

    def look(self, key: str) -> Entry | None:
        """The entry, its files not read and nothing changed: for saying what a run would find."""
        try:
            return read_entry(self._place(key))
        except Damaged:
            return None

    def get(self, key: str) -> Entry | None:
        """The entry if every file has the size and hash that were written; it is then the last used one.

        One that is damaged is noted and removed. Files that this process has hashed and nobody has touched since are
        not read again.
        """
        self._need_use()
        place = self._place(key)
        try:
            seen = os.lstat(place)
        except OSError:
            return None
        entry = None
        try:
            entry = read_entry(place)
            self._check(entry)
        except Damaged as damage:
            of = f" of step {entry.kind}" if entry else ""
            self.progress.note(f"cache entry {key[:_SHOWN_DIGITS]}{of} is damaged ({damage}) and is computed anew")
            self._discard(place, seen)
            return None
        with contextlib.suppress(OSError):  # a store that cannot be written to can be read
            os.utime(place / MANIFEST)
        return replace(entry, used=time.time())

    def why_not(self, kind: str, ingredients: Mapping[str, Any]) -> tuple[str, ...]:
        """Why there is no such result: the ingredients in which the most similar one of its kind differs; () if none
        is kept. Of several that are as similar, the last used."""
        found = [
            differences(entry.ingredients, ingredients) for entry in reversed(self.entries()) if entry.kind == kind
        ]
        return min(found, key=len, default=())

    @contextlib.contextmanager
    def filling(
        self,
        key: str,
        *,
        kind: str,
        ingredients: Mapping[str, Any],
        label: str = "",
        needs_bytes: int = 0,
        hashed: Collection[FileRecord] = (),
    ) -> Iterator[Path]:
        """A new folder for the files of a result; at the end of the block they are the entry `key`.

        `key` is `step_key(kind, ingredients)`. `label` says in a few words what it is. `hashed` is looked at when the
        block is done, so it may be a list that the block fills: files in it are not read again to hash them. If another
        run was faster its entry stays. If the block raises, nothing does. OutputError (the store cannot be written),
        FitError (not `needs_bytes` free).
        """
        self._need_use()
        if key != step_key(kind, ingredients):
            raise ValueError("the key is not that of the ingredients")
        self._check_space(needs_bytes)
        with contextlib.ExitStack() as stack:
            with self._told():
                temporary = stack.enter_context(temporary_directory(self.root))
                (temporary / FILES).mkdir()
            with self._told(temporary):
                yield temporary / FILES
            with self._told():
                stamps = self._finish(temporary, kind, ingredients, label, hashed)
                if self._publish(temporary, self._place(key)):
                    self._checked.update({(key, name): stamp for name, stamp in stamps.items()})

    def copy(self, entry: Entry, name: str, destination: Path) -> None:
        """Copy a file of the entry to a new file; what was copied has the file's hash. OutputError."""
        record = entry.files[name]
        self.progress.start(f"copying {name}", record.nbytes, "B")
        try:
            copy_file(entry.file(name), destination, record.sha256, self._checked.get((entry.key, name)), self.progress)
        except (Damaged, FileNotFoundError) as error:
            raise OutputError(
                f"cache entry {entry.key[:_SHOWN_DIGITS]} of step {entry.kind} was changed during the run",
                where=str(self.root),
                hint="run it again",
            ) from error
        finally:
            self.progress.finish()

    def entries(self) -> tuple[Entry, ...]:
        """All entries that can be read, the least recently used first; their files are not hashed."""
        found = [entry for entry in map(_readable, self._places()) if entry is not None]
        return tuple(sorted(found, key=lambda entry: (entry.used, entry.key)))

    def damaged(self) -> tuple[Path, ...]:
        """Entries that cannot be read; the run that wants one, or `prune`, removes it."""
        found = [place for place in self._places() if _readable(place) is None]
        return tuple(place for place in found if os.path.lexists(place))

    def prune(
        self,
        *,
        older_than_s: float | None = None,
        max_bytes: int | None = None,
        kinds: Collection[str] | None = None,
        everything: bool = False,
        dry_run: bool = False,
    ) -> Pruned:
        """Remove entries, the least recently used first, and whatever is damaged or half written.

        Removed is what was not used for `older_than_s` seconds; then more until what stays has at most `max_bytes`; or
        `everything`; of `kinds` only, if given. OutputError if a run uses the store.
        """
        if not self.root.is_dir():
            return Pruned(removed=(), damaged=0, kept=())
        with contextlib.ExitStack() as stack:
            if not dry_run:
                with self._told():
                    stack.enter_context(lock.alone(self.root))
            entries, damaged = self.entries(), self.damaged()
            chosen = choose(entries, older_than_s, max_bytes, kinds, everything)
            if not dry_run:
                with self._told():
                    remove_dead(self.root)
                    for place in (*(entry.path.parent for entry in chosen), *damaged):
                        _remove(place)
                    sync_directory(self.root)
        gone = {entry.key for entry in chosen}
        kept = tuple(entry for entry in entries if entry.key not in gone)
        return Pruned(removed=chosen, damaged=len(damaged), kept=kept)

    def _place(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise ValueError(f"{key!r} is not a key")
        return self.root / key

    def _places(self) -> list[Path]:
        """Where entries are; foreign names in the folder are nobody's business."""
        try:
            return sorted(path for path in self.root.iterdir() if _KEY.fullmatch(path.name))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise OutputError(f"cannot be read: {error.strerror}", where=str(self.root)) from error

    def _need_use(self) -> None:
        if self._users == 0:
            raise RuntimeError("results are got and filled inside `with store.using()`")

    def _check(self, entry: Entry) -> None:
        """Damaged if a file's content is not what was written."""
        waiting = []
        for name, record in entry.files.items():
            known = self._checked.get((entry.key, name))
            if known is None or known != Stamp.of(os.lstat(entry.file(name))):
                waiting.append(record)
        if not waiting:
            return
        self.progress.start(f"checking the kept {entry.kind}", sum(record.nbytes for record in waiting), "B")
        try:
            for record in waiting:
                found, stamp = hash_file(entry.file(record.name), self.progress)
                if found != record.sha256:
                    raise Damaged(f"sha256 differs in {record.name}")
                self._checked[entry.key, record.name] = stamp
        except OSError as error:
            raise Damaged(f"{Path(str(error.filename or entry.path)).name}: {error.strerror}") from error
        finally:
            self.progress.finish()

    def _check_space(self, needs_bytes: int) -> None:
        try:
            check_space(self.root, needs_bytes)
        except FitError as error:
            raise FitError(error.message, where="cache", hint=_MAKE_ROOM) from None

    def _finish(
        self,
        temporary: Path,
        kind: str,
        ingredients: Mapping[str, Any],
        label: str,
        hashed: Iterable[FileRecord],
    ) -> dict[str, Stamp]:
        """Sync and record the files, and write entry.json last; the stamp of each file."""
        records, stamps = _record(temporary / FILES, {record.name: record for record in hashed}, self.progress)
        for record in records:
            sync_file(temporary / FILES / record.name)
        for folder in sorted({(temporary / FILES / record.name).parent for record in records} | {temporary / FILES}):
            sync_directory(folder)
        content = manifest_bytes(
            key=step_key(kind, ingredients),
            kind=kind,
            ingredients=ingredients,
            label=label,
            created=time.time(),
            files=records,
        )
        with writing(temporary / MANIFEST), (temporary / MANIFEST).open("xb") as file:
            file.write(content)
        sync_file(temporary / MANIFEST)
        sync_directory(temporary)
        return stamps

    def _publish(self, temporary: Path, place: Path) -> bool:
        """Give the folder its name; False if a sound entry is there already, which stays."""
        while True:
            try:
                temporary.rename(place)
                break
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
            if place not in self._distrusted and _readable(place) is not None:
                return False
            _remove(place)
        self._distrusted.discard(place)
        with contextlib.suppress(OSError):  # whole already; a power failure now costs the entry at worst
            sync_directory(self.root)
        return True

    def _discard(self, place: Path, seen: os.stat_result) -> None:
        """Remove a damaged entry, unless another run has replaced it meanwhile; one that cannot be removed stays."""
        try:
            now = os.lstat(place)
            # the number of an inode is given again at once, so its time has to agree as well
            if (now.st_ino, now.st_ctime_ns) == (seen.st_ino, seen.st_ctime_ns):
                _remove(place)
        except FileNotFoundError:
            pass
        except OSError:
            self._distrusted.add(place)

    @contextlib.contextmanager
    def _told(self, folder: Path | None = None) -> Iterator[None]:
        """Tell failures to write the store; of a block that also reads elsewhere, those of writing in `folder`."""
        try:
            yield
        except OutputError as error:
            hint = error.hint or _hint(error.__cause__)
            raise OutputError(error.message, where=error.where or str(self.root), hint=hint) from error
        except OSError as error:
            if folder is not None and not is_of_writing(error, folder):
                raise
            if folder is not None and error.filename is not None:
                message = write_error(error, Path(str(error.filename))).message
            else:
                message = f"cannot write to the cache: {CAUSES.get(error.errno or 0) or error.strerror}"
            raise OutputError(message, where=str(self.root), hint=_hint(error)) from error


def _hint(cause: BaseException | None) -> str:
    """What to do about a failure to write."""
    full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
    return _MAKE_ROOM if full else _ELSEWHERE


def _readable(place: Path) -> Entry | None:
    try:
        return read_entry(place)
    except Damaged:
        return None


def _remove(place: Path) -> None:
    """Remove an entry, or what has its name: out of sight in one step, so that no half of it is ever found."""
    if place.is_symlink() or not place.is_dir():
        place.unlink()
        return
    aside = unused_name(place.parent)
    place.rename(aside)
    remove_tree(aside)


def _record(
    files: Path, hashed: Mapping[str, FileRecord], progress: Progress
) -> tuple[list[FileRecord], dict[str, Stamp]]:
    """Size, hash and stamp of every file of a result."""
    try:
        present = dict(walk(files))
    except Damaged as damage:
        raise ValueError(f"a result cannot be kept: {damage}") from None
    if strangers := sorted(set(hashed) - set(present)):
        raise OutputError(f"{strangers[0]}: was written, but is not on disk")
    records, stamps = [], {}
    progress.start("hashing", sum(info.st_size for name, info in present.items() if name not in hashed), "B")
    for name, info in present.items():
        if (known := hashed.get(name)) is None:
            digest, stamps[name] = hash_file(files / name, progress)
            records.append(FileRecord(name, info.st_size, digest))
            continue
        if known.nbytes != info.st_size:
            raise OutputError(f"{name}: {info.st_size} bytes on disk, {known.nbytes} were written")
        records.append(known)
        stamps[name] = Stamp.of(info)
    progress.finish()
    return records, stamps
