"""Sampling: greedy, temperature and nucleus against their definitions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from efficli.errors import UsageError
from efficli.ops.sampling import Completion, Sampling, complete, pick

LOGITS = np.log(np.array([0.05, 0.5, 0.3, 0.15], np.float32))


def drawn(how: Sampling, n: int = 20000) -> NDArray[np.float64]:
    """Relative frequencies of n draws."""
    random = how.generator()
    return np.bincount([pick(LOGITS, how, random) for _ in range(n)], minlength=4) / n


def test_greedy() -> None:
    """The largest; the first of equals."""
    assert pick(LOGITS, Sampling(), Sampling().generator()) == 1
    assert pick(np.zeros(4, np.float32), Sampling(), Sampling().generator()) == 0


def test_temperature() -> None:
    """Probabilities to the power of 1 / temperature."""
    assert np.abs(drawn(Sampling(temperature=1, top_p=1)) - [0.05, 0.5, 0.3, 0.15]).max() < 0.015
    squared = np.array([0.05, 0.5, 0.3, 0.15]) ** 2
    assert np.abs(drawn(Sampling(temperature=0.5, top_p=1)) - squared / squared.sum()).max() < 0.015


def test_nucleus() -> None:
    """The fewest tokens that reach top_p, in proportion."""
    assert np.abs(drawn(Sampling(temperature=1, top_p=0.7)) - [0, 0.625, 0.375, 0]).max() < 0.015
    assert drawn(Sampling(temperature=1, top_p=0.1), 100).tolist() == [0, 1, 0, 0]


def test_refusals() -> None:
    """What cannot be sampled."""
    for wrong in ({"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.1}):
        with pytest.raises(UsageError):
            Sampling(**wrong)


@dataclass
class Counter:
    """Writes 1, 2, 3 ... after any prompt, and ends after 5; spells two tokens at a time."""

    ctx: int = 100

    def read(self, ids: Sequence[int], at: int) -> NDArray[np.float32]:
        """The next number."""
        return np.eye(8, dtype=np.float32)[1 if at == 0 else min(ids[-1] + 1, 7)]

    def spell(self, tokens: Sequence[int]) -> str:
        """Pairs."""
        return "".join(map(str, tokens[: len(tokens) // 2 * 2]))

    def ends(self, token: int) -> bool:
        """At six."""
        return token == 6


def run(*args: object, **options: object) -> tuple[list[str], Completion]:
    """The pieces and the result of a completion."""
    writing, pieces = complete(*args, **options), list[str]()  # type: ignore[arg-type]
    while True:
        try:
            pieces.append(next(writing))
        except StopIteration as end:
            return pieces, end.value


def test_completion() -> None:
    """Pieces come when they are spelt; the end token is not part of the text."""
    assert run(Counter(), [0, 0], 50) == (["12", "34"], Completion((1, 2, 3, 4, 5), "1234", "end"))
    assert run(Counter(), [0, 0], 3) == (["12"], Completion((1, 2, 3), "12", "length"))
    assert run(Counter(ctx=5), [0, 0], 50)[1] == Completion((1, 2, 3, 4), "1234", "context")
    assert run(Counter(), [0, 0], 8, stop_at_end=False)[1].tokens == (1, 2, 3, 4, 5, 6, 7, 7)
