"""Where results are kept between runs."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path

from efficli.errors import OutputError

VARIABLE = "EFFICLI_CACHE_DIR"


def default_root() -> Path:
    """The folder of step results: $EFFICLI_CACHE_DIR, $XDG_CACHE_HOME/efficli or ~/.cache/efficli, and `steps` in it.

    Who has no home directory gets one in the system's folder for temporary files, which nobody else may write to;
    OutputError where that name is taken by somebody else.
    """
    if chosen := os.environ.get(VARIABLE):
        return _expanded(chosen) / "steps"
    xdg = Path(os.environ.get("XDG_CACHE_HOME") or "relative")  # which the specification tells to ignore
    if xdg.is_absolute():
        return xdg / "efficli" / "steps"
    try:
        return Path.home() / ".cache" / "efficli" / "steps"
    except RuntimeError:  # no HOME, and no user with this id
        return _private() / "steps"


def _expanded(word: str) -> Path:
    with contextlib.suppress(RuntimeError):
        return Path(word).expanduser().absolute()
    return Path(word).absolute()


def _private() -> Path:
    """A folder for this user alone among everybody's temporary files."""
    path = Path(tempfile.gettempdir()) / f"efficli-cache-{os.geteuid()}"
    hint = f"set {VARIABLE} to a folder of your own"
    try:
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        info = os.lstat(path)
    except OSError as error:
        raise OutputError(f"no home directory, and {path} cannot be made: {error.strerror}", hint=hint) from error
    # results that somebody else could put there would be taken for ours
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o022:
        raise OutputError(f"no home directory, and {path} is not a folder that only this user can write to", hint=hint)
    return path
