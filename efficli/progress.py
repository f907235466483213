"""How long work tells what it is doing: a small protocol, so that no module below the console imports rich."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """What long-running functions report to; `console.py` draws it, tests ignore it."""

    def start(self, task: str, total: float, unit: str = "") -> None:
        """Begin a task of `total` units (bytes, tokens, tensors), 0 if that is not known; only one runs at a time."""

    def advance(self, amount: float) -> None:
        """`amount` more units of the current task are done."""

    def finish(self) -> None:
        """The current task is over."""

    def note(self, message: str) -> None:
        """A line that a user should read: a fallback, a warning, a decision."""


class Silent:
    """Reports nothing, and keeps the notes for whoever asks."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def start(self, task: str, total: float, unit: str = "") -> None:
        """Do nothing."""

    def advance(self, amount: float) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""

    def note(self, message: str) -> None:
        """Keep the message."""
        self.notes.append(message)
