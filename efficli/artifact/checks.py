"""Whether an output can be written where the user wants it, asked before anything is computed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from efficli.artifact.manifest import is_made_by_efficli
from efficli.errors import FitError, OutputError, UsageError
from efficli.ops.storage import byte_text, free_bytes, is_mount

_ELSEWHERE = "choose another folder with -o"


def check_output(out: str | Path, inputs: Sequence[Path], force: bool) -> None:
    """What `draft` will object to at first sight, asked before anything is read: place, permission, what is there."""
    place = Path(os.path.realpath(out))
    check_place(place, inputs)
    check_writable(next(folder for folder in place.parents if os.path.lexists(folder)))
    check_existing(place, force)


def check_place(out: Path, inputs: Sequence[Path]) -> None:
    """UsageError if `out` is, contains or lies in an input, or would replace where the user works or lives."""
    for path in inputs:
        if _is_within(out, path.resolve()) or _is_within(path.resolve(), out):
            raise UsageError(f"output {out} would overwrite the input {path}", hint="choose another folder with -o")
    for what, place in (("the current directory", _here()), ("your home directory", _home())):
        if place is not None and _is_within(place, out):
            raise UsageError(f"output {out} would replace {what}", hint="give the name of a new folder to -o")


def check_writable(directory: Path) -> None:
    """OutputError if no file can be made in the directory."""
    if not directory.is_dir():
        raise OutputError(f"{directory} is not a directory", hint=_ELSEWHERE)
    if not os.access(directory, os.W_OK | os.X_OK):
        raise OutputError(f"{directory} is not writable", hint=_ELSEWHERE)


def check_existing(out: Path, force: bool) -> None:
    """OutputError if there is something at `out` that only --force may replace; an empty directory may be used."""
    if is_mount(out):
        raise OutputError(f"{out} is a mount point, which cannot be replaced", hint=f"-o {out / 'model'}")
    if force or not os.path.lexists(out):
        return
    if not out.is_dir():
        raise OutputError(f"{out} exists and is a file", hint="use --force to replace it, or another -o")
    if is_made_by_efficli(out):
        raise OutputError(f"{out} exists already", hint="use --force to replace it, or another -o")
    try:
        empty = next(out.iterdir(), None) is None
    except OSError:
        empty = False
    if not empty:
        raise OutputError(
            f"{out} exists and was not made by efficli",
            hint="use --force to replace it with everything in it, or another -o",
        )


def check_space(directory: Path, needs_bytes: int) -> None:
    """FitError if the file system of the directory has less free space than `needs_bytes`."""
    free = free_bytes(directory)
    if free is not None and free < needs_bytes:
        raise FitError(
            f"needs {byte_text(needs_bytes)}, {byte_text(free)} free on {directory}",
            hint="make room there, or choose a folder on another disk with -o",
        )


def _here() -> Path | None:
    try:
        return Path.cwd()
    except FileNotFoundError:
        return None  # removed while somebody was in it


def _home() -> Path | None:
    try:
        return Path.home().resolve()
    except RuntimeError:
        return None  # no HOME, and no user with this id


def _is_within(path: Path, folder: Path) -> bool:
    """Whether `path` is `folder` or lies in it; by name, and by inode for bind mounts and names that differ in case."""
    if path.is_relative_to(folder):
        return True
    try:
        wanted = folder.stat()
    except OSError:
        return False
    return any(os.path.samestat(info, wanted) for info in _stats((path, *path.parents)))


def _stats(paths: Iterable[Path]) -> Iterable[os.stat_result]:
    for path in paths:
        try:
            yield path.stat()
        except OSError:
            continue
