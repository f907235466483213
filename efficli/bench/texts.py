"""Which text a certificate is made on, and which chunks of it: the committed evaluation slices, or a user's file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from efficli.data import committed, documents
from efficli.errors import UsageError

SLICES = ("evaluation-code", "evaluation-prose")
"""The held-out slices that come with efficli (`efficli/reference/text`)."""

MIN_TOKENS = 32
"""A text of fewer tokens says nothing."""


@dataclass(frozen=True, slots=True)
class Text:
    """A text and what it is called in a report."""

    name: str
    content: str

    @property
    def sha256(self) -> str:
        """Of its UTF-8 bytes."""
        return hashlib.sha256(self.content.encode()).hexdigest()


def evaluation_texts(file: str | Path | None) -> list[Text]:
    """The user's text (a UTF-8 file, JSON lines with `text`), or the committed held-out slices of code and prose."""
    if file is None:
        return [Text(name, committed(name)) for name in SLICES]
    path = Path(file)
    between = "\n\n" if path.suffix in (".jsonl", ".ndjson") else ""  # pieces of a text file follow each other
    content = between.join(documents(path))
    if not content.strip():
        raise UsageError("the text is empty", where=str(file))
    return [Text(path.name, content)]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens start..stop-1 of one text; those from `first` on (counted in the chunk) are predicted and scored."""

    text: int
    start: int
    stop: int

    @property
    def first(self) -> int:
        """The first position whose prediction is scored: half of the chunk is context, as in llama-perplexity."""
        return (self.stop - self.start) // 2

    @property
    def positions(self) -> int:
        """Scored positions: first .. length - 2 (the last token has no successor in the chunk)."""
        return self.stop - self.start - 1 - self.first


def choose_chunks(num_tokens: Sequence[int], ctx: int, max_positions: int | None, seed: int) -> list[Chunk]:
    """Whole chunks of `ctx` tokens, in order; where the budget of positions is less, a random sample of them.

    Texts share the budget evenly, and what a short text leaves goes to the others. A text shorter than `ctx` is one
    chunk by itself; the rest of a text that does not fill a chunk is left out, as in llama-perplexity.
    """
    whole: list[list[Chunk]] = []
    for text, n in enumerate(num_tokens):
        if n < ctx:
            whole.append([Chunk(text, 0, n)] if n >= MIN_TOKENS else [])
        else:
            whole.append([Chunk(text, start, start + ctx) for start in range(0, n - ctx + 1, ctx)])
    if not any(whole):
        raise UsageError(f"a text of {max(num_tokens, default=0)} tokens is too short, expected {MIN_TOKENS} or more")
    if max_positions is None:
        return [chunk for chunks in whole for chunk in chunks]
    random, left, chosen = np.random.default_rng(seed), max_positions, dict[int, list[Chunk]]()
    waiting = sorted((i for i in range(len(whole)) if whole[i]), key=lambda i: len(whole[i]))  # shortest first
    for done, i in enumerate(waiting):
        share = left // (len(waiting) - done)
        n = min(len(whole[i]), max(1, share // whole[i][0].positions))
        kept = sorted(random.choice(len(whole[i]), n, replace=False))
        chosen[i] = [whole[i][k] for k in kept]
        left -= sum(chunk.positions for chunk in chosen[i])
    return [chunk for i in sorted(chosen) for chunk in chosen[i]]
