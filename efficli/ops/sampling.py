"""Choose the next token from logits, and write a completion: greedy, or seeded with temperature and a nucleus.

Holtzman et al. 2020, arXiv:1904.09751 (nucleus sampling).  logits (vocab,) float32 -> one token id.  The same
functions serve llama.cpp and PyTorch, so that a side-by-side comparison differs by the models only.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from efficli.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to choose: temperature 0 is greedy; `top_p` keeps the likeliest tokens that together reach it."""

    temperature: float = 0.0
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be sampled."""
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature {self.temperature}, expected a number of 0 or more")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p {self.top_p}, expected a number above 0, at most 1")

    def generator(self) -> np.random.Generator:
        """The random numbers of one completion."""
        return np.random.default_rng(self.seed)


def pick(logits: NDArray[np.float32], how: Sampling, generator: np.random.Generator) -> int:
    """The next token id; one uniform number is drawn a token, so equal logits and seeds give equal texts."""
    if how.temperature == 0:
        return int(np.argmax(logits))
    scaled = logits.astype(np.float64) / how.temperature
    probability = np.exp(scaled - scaled.max())
    probability /= probability.sum()
    order = np.argsort(-probability, kind="stable")
    cumulative = np.cumsum(probability[order])
    kept = int(np.searchsorted(cumulative, how.top_p)) + 1
    cumulative = cumulative[:kept] / cumulative[min(kept, len(cumulative)) - 1]
    return int(order[min(int(np.searchsorted(cumulative, generator.random(), side="right")), len(cumulative) - 1)])


@dataclass(frozen=True, slots=True)
class Completion:
    """What a model wrote after a prompt: token ids, their text, and why it stopped ("end", "length" or "context")."""

    tokens: tuple[int, ...]
    text: str
    stopped: str


class Writer(Protocol):
    """A language model with a cache, as `complete` needs it."""

    ctx: int
    """Tokens of context, prompt included."""

    def read(self, ids: Sequence[int], at: int) -> NDArray[np.float32]:
        """Read tokens at positions at.. (0 begins a new text) and return the last one's logits: (vocab,)."""

    def spell(self, tokens: Sequence[int]) -> str:
        """The text of the tokens written so far; an unfinished character at the end is left out."""

    def ends(self, token: int) -> bool:
        """Whether this token ends a text."""


def complete(
    model: Writer, ids: Sequence[int], max_tokens: int, how: Sampling | None = None, *, stop_at_end: bool = True
) -> Generator[str, None, Completion]:
    """Continue a prompt by up to `max_tokens`; yields each piece of text as it comes, returns the whole."""
    how = how or Sampling()
    random, tokens, text, stopped = how.generator(), list[int](), "", "length"
    logits = model.read(ids, 0)
    while len(tokens) < max_tokens:
        token = pick(logits, how, random)
        if stop_at_end and model.ends(token):
            stopped = "end"
            break
        tokens.append(token)
        spelt = model.spell(tokens)
        if len(spelt) > len(text):
            yield spelt[len(text) :]
            text = spelt
        if len(ids) + len(tokens) > model.ctx:
            stopped = "context"
            break
        if len(tokens) < max_tokens:
            logits = model.read([token], len(ids) + len(tokens) - 1)
    return Completion(tuple(tokens), text, stopped)
