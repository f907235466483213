"""Write an artifact so that it appears whole or not at all, whatever happens on the way.

The files are written in a temporary directory beside OUT, each synced; SHA256SUMS and `efficli.json` last; then one
rename (or exchange, if OUT is replaced) publishes them. Killed before it: OUT is as it was, and the next run removes
the rest. Killed after it: OUT is the new artifact.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from efficli.artifact import manifest as form
from efficli.artifact.checks import check_existing, check_place, check_space, check_writable
from efficli.artifact.lock import hold_lock
from efficli.artifact.manifest import Artifact, FileRecord
from efficli.artifact.temporary import aside_path, remove_dead, restore_aside, temporary_directory
from efficli.errors import OutputError
from efficli.ops.storage import (
    CAUSES,
    exchange,
    is_of_writing,
    remove_tree,
    sync_directory,
    sync_file,
    uninterrupted,
    write_error,
    writing,
)

_KEPT = " (previous artifact kept)"


@dataclass(slots=True)
class Draft:
    """An artifact or a checkpoint in the making: write files into `path`, then `commit` or `commit_folder`."""

    path: Path
    """The temporary directory."""
    out: Path
    """Where the artifact will be."""
    replaces: bool
    """Whether something at `out` stays until the commit and is gone after it."""
    published: bool = False

    def commit(
        self, manifest: Mapping[str, Any], run: Mapping[str, Any], *, hashed: Iterable[FileRecord] = ()
    ) -> Artifact:
        """Publish the files of the temporary directory with `efficli.json` (`manifest`, which gets the files' sizes
        and hashes) and `run.json` (`run`: timings, dates, host; not covered by any hash).

        `hashed` are records that a writer made while writing: those files are not read again, only their sizes are
        compared. Errors: OutputError, in which case `out` is as it was, or says that it was published.
        """
        if self.published:
            raise RuntimeError("a draft is committed once")
        files = _record_files(self.path, {record.name: record for record in hashed})
        entries = [{"name": record.name, "nbytes": record.nbytes, "sha256": record.sha256} for record in files]
        whole = {**manifest, "kind": form.KIND, "schema_version": form.SCHEMA_VERSION, "files": entries}
        content = form.to_json(whole)
        for record in files:
            sync_file(self.path / record.name)
        _write(self.path / form.RUN, form.to_json(run))
        _write(self.path / form.SUMS, form.sums_text([*files, form.record_of(form.MANIFEST, content)]))
        _write(self.path / form.MANIFEST, content)
        with _directory_errors(self.out):
            sync_directory(self.path)
        self._publish()
        return Artifact(self.out, whole, tuple(files))

    def commit_folder(self) -> None:
        """Publish the temporary directory as it is, for a checkpoint: its `efficli.json` is its own, and there are no
        sums. Errors: as of `commit`.
        """
        if self.published:
            raise RuntimeError("a draft is committed once")
        inside = sorted(self.path.rglob("*"))
        for path in inside:
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise ValueError(f"{path.name} is not a regular file")
            if path.is_file():
                sync_file(path)
        with _directory_errors(self.out):
            for folder in (*(path for path in inside if path.is_dir()), self.path):
                sync_directory(folder)
        self._publish()

    def _publish(self) -> None:
        """Give the directory its name; after the rename nothing can undo it, so failures say so."""
        with uninterrupted():
            with _directory_errors(self.out):
                if not (self.replaces and exchange(self.path, self.out)):
                    self._rename()
            self.published = True
            try:
                sync_directory(self.out.parent)
            except OSError as error:
                cause = CAUSES.get(error.errno or 0) or error.strerror
                raise OutputError(f"{self.out}: published, but durability not confirmed ({cause})") from error
            remove_tree(aside_path(self.out))

    def _rename(self) -> None:
        """Rename to `out`; where something must go first, in two steps that `restore_aside` can finish."""
        aside = aside_path(self.out)
        if not self.replaces:
            self.path.rename(self.out)
            return
        self.out.rename(aside)
        try:
            self.path.rename(self.out)
        except OSError as error:
            try:
                aside.rename(self.out)
            except OSError:
                self.replaces = False  # so that nobody says it was kept in its place
                told = write_error(error, self.out)
                raise OutputError(
                    f"{told.message}; what was there is now {aside}, the next run puts it back"
                ) from error
            raise


@contextlib.contextmanager
def draft(out: str | Path, *, inputs: Sequence[Path], needs_bytes: int, force: bool) -> Iterator[Draft]:
    """Check that `out` can be written, then give a Draft; what is not committed leaves no trace.

    `inputs` are the checkpoint's folder and other files that are read; `needs_bytes` the expected size of the artifact.
    Missing parent folders are made. Errors before anything is computed: UsageError (`out` overlaps an input),
    OutputError (exists and not `force`, not writable, another run is writing it), FitError (no space). Errors of the
    disk inside the block become one OutputError line, which says so if something at `out` was kept.
    """
    place = Path(os.path.realpath(out))
    check_place(place, inputs)
    with _parents(place.parent):
        check_writable(place.parent)
        with hold_lock(place):
            with _directory_errors(place):
                remove_dead(place.parent)
                restore_aside(place)
            check_existing(place, force)
            check_space(place.parent, needs_bytes)
            with _temporary(place) as path:
                drafted = Draft(path, place, replaces=_is_occupied(place))
                with _told(drafted):
                    yield drafted


@contextlib.contextmanager
def _temporary(place: Path) -> Iterator[Path]:
    """The temporary directory, with the failure to make it told."""
    with contextlib.ExitStack() as stack:
        with _directory_errors(place):
            path = stack.enter_context(temporary_directory(place.parent))
        yield path


@contextlib.contextmanager
def _parents(folder: Path) -> Iterator[None]:
    """Make missing parent folders; those that are still empty afterwards are removed if the block fails."""
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    made: list[Path] = []
    try:
        with writing(folder):
            for path in reversed(missing):
                with contextlib.suppress(FileExistsError):
                    path.mkdir()
                    made.append(path)
                sync_directory(path.parent)
        yield
    except BaseException:
        for path in reversed(made):
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


@contextlib.contextmanager
def _told(drafted: Draft) -> Iterator[None]:
    """Make errors of the block say what became of the output."""
    try:
        yield
    except OutputError as error:
        if drafted.published or not drafted.replaces:
            raise
        raise OutputError(error.message + _KEPT, hint=error.hint, where=error.where) from error
    except KeyboardInterrupt as error:
        if drafted.published:
            error.add_note(f"{drafted.out} was published")
        raise
    except OSError as error:
        if not is_of_writing(error, drafted.path):
            raise
        told = write_error(error, Path(str(error.filename or drafted.out)))
        raise OutputError(told.message + (_KEPT if drafted.replaces else "")) from error


@contextlib.contextmanager
def _directory_errors(out: Path) -> Iterator[None]:
    """Tell an OSError of making, syncing or renaming directories around `out`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise OutputError(
                f"{out} appeared while this run was writing", hint="use --force, or another -o"
            ) from error
        raise write_error(error, out) from error


def _is_occupied(place: Path) -> bool:
    """Whether a rename to `place` needs what is there to go: anything but nothing or an empty directory."""
    if not os.path.lexists(place):
        return False
    return not place.is_dir() or next(place.iterdir(), None) is not None


def _record_files(folder: Path, hashed: Mapping[str, FileRecord]) -> list[FileRecord]:
    """Every file of the folder with its size and hash, sorted by name."""
    records = []
    for path in sorted(folder.iterdir()):
        if path.name in form.OWN_FILES or not form.is_plain_name(path.name):
            raise ValueError(f"an artifact cannot have a file named {path.name!r}")
        if path.is_symlink() or not path.is_file():
            raise ValueError(f"{path.name} is not a regular file")
        size = path.stat().st_size
        record = hashed.get(path.name)
        if record is None:
            record = FileRecord(path.name, size, form.hash_file(path))
        if record.nbytes != size:
            raise OutputError(f"{path.name}: {size} bytes on disk, {record.nbytes} were written")
        records.append(record)
    if strangers := sorted(set(hashed) - {record.name for record in records}):
        raise OutputError(f"{strangers[0]}: was written, but is not on disk")
    return records


def _write(path: Path, content: bytes) -> None:
    """Write a small file and wait until it is on the device."""
    with writing(path), path.open("xb") as file:
        file.write(content)
    sync_file(path)
