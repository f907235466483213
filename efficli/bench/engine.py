"""The interface between what is measured and what runs it: one artifact, open in a child process of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from efficli.bench.figures import ModelFacts, RequestTimes, SpeedTest, StartTimes


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


class Starter(Protocol):
    """Starts fresh processes of an artifact."""

    def start(self, *, cold: bool) -> StartTimes:
        """Start a process, load, compute one token, and end the process."""
