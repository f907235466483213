"""Choose the next token from logits: greedy, or seeded with temperature and a nucleus.

Holtzman et al. 2020, arXiv:1904.09751 (nucleus sampling).  logits (vocab,) float32 -> one token id.  The same
function serves llama.cpp and PyTorch, so that a side-by-side comparison differs by the models only.
"""

from __future__ import annotations

from dataclasses import dataclass

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
