"""The few errors that a user can act on; each knows its exit code. Anything else is a bug of ours (70).

EffiError
├── CheckpointError   1  the input is missing, damaged or contradicts itself
├── OutputError       1  the output could not be written
├── UsageError        2  the command line or recipe asks for something that makes no sense
├── GateError         3  a quality gate was not met
├── FitError          4  does not fit: disk, memory, device
├── UnsupportedError  5  a family, type or feature that the format or runtime cannot do
│   └── MissingExtra  5  a package that is not installed
└── SecurityError     6  refused: path escape, pickle, remote code, hash mismatch
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class EffiError(Exception):
    """A problem stated in the user's own terms: `where: what was found, what was expected`, and a hint to act on."""

    exit_code = 1
    others: tuple[EffiError, ...] = ()
    """More problems of the same kind, where all of them are found at once."""

    def __init__(self, message: str, *, hint: str | None = None, where: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.where = where

    @property
    def line(self) -> str:
        """The one line that a user reads."""
        return f"{self.where}: {self.message}" if self.where else self.message


class CheckpointError(EffiError):
    """The input is missing, damaged or contradicts itself."""


class OutputError(EffiError):
    """The output could not be written; what was there before is untouched."""


class UsageError(EffiError):
    """The command line or recipe asks for something that makes no sense; `others`: what else is wrong with it."""

    exit_code = 2

    def __init__(
        self, message: str, *, hint: str | None = None, where: str | None = None, others: Sequence[UsageError] = ()
    ) -> None:
        super().__init__(message, hint=hint, where=where)
        self.others = tuple(others)


class GateError(EffiError):
    """A quality gate was not met."""

    exit_code = 3


class FitError(EffiError):
    """Something does not fit: disk, memory or device."""

    exit_code = 4


class UnsupportedError(EffiError):
    """A family, type or feature that the format or its runtime cannot do."""

    exit_code = 5


class MissingExtra(UnsupportedError):
    """A package is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"this needs {package}", hint=f"pip install 'efficli[{extra}]'")


class SecurityError(EffiError):
    """Refused for integrity or security."""

    exit_code = 6


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """A hint that names the nearest known words, or None."""
    near = difflib.get_close_matches(word.lower(), list(known), n=3, cutoff=0.6)
    return f"did you mean {' or '.join(repr(n) for n in near)}?" if near else None
