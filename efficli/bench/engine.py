"""The interface between what is measured and what runs it: one artifact, open in a child process of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from efficli.bench.figures import MemoryResult, ModelFacts, RequestTimes, Settings, SpeedTest, StartTimes
from efficli.ops.worker import Limits


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeat:
    """One repeat of a SpeedTest; nanoseconds."""

    ns: int
    """Of the tokens that count: reading the prompt, or writing the tokens."""
    first_token_ns: int | None = None
    """Of a prompt: until the first token is chosen."""
    token_ns: tuple[int, ...] = ()
    """Of generation: each token's own time."""


class Engine(Protocol):
    """An open artifact. Every method may raise FitError (time, memory), UnsupportedError (crash) and UsageError."""

    @property
    def facts(self) -> ModelFacts:
        """What the runtime says of the file."""

    def repeat(self, test: SpeedTest) -> Repeat:
        """Run one SpeedTest once."""

    def count_tokens(self, text: str, *, chat: bool) -> int:
        """Tokens that `request` would read: with the file's chat template around the text where it has one."""

    def request(self, text: str, *, chat: bool, n_gen: int) -> RequestTimes:
        """Answer one request from an empty cache, greedily; the end token does not end it."""

    @property
    def pid(self) -> int:
        """Of the process that runs the model."""

    def memory(self) -> MemoryResult | None:
        """Its peaks so far; None where the system does not tell."""

    def __enter__(self) -> Self:
        """Itself."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End the process."""


class Starter(Protocol):
    """Starts fresh processes of an artifact."""

    def start(self, *, cold: bool) -> StartTimes:
        """Start a process, load, compute one token, and end the process."""


class ModelFile(Protocol):
    """A file of a format, and how its runtime runs it: one class a format."""

    @property
    def path(self) -> Path:
        """Of the file."""

    @property
    def generates(self) -> bool:
        """False for an embedding model."""

    def open(self, settings: Settings, limits: Limits) -> Engine:
        """The file, open in a process of its own."""

    def starter(self, settings: Settings, limits: Limits) -> Starter:
        """Fresh processes of it."""
