"""How far one model's predictions are from another's: KL divergence, top-1 agreement, perplexity, with standard errors.

Kullback & Leibler 1951; the figures and their names are those of llama-perplexity.  Shapes: logits (n, vocab) float32
of the same n positions from the base and from the model that is judged; `following` (n,) the tokens that really came
next.  Positions in one chunk of text depend on each other, so standard errors treat the *chunk* as the unit of
sampling (cluster-robust errors, Liang & Zeger 1986); with a single chunk there is none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

RESAMPLES = 200
"""Bootstrap resamples of a quantile's standard error."""


@dataclass(frozen=True, slots=True)
class Positions:
    """What is kept of each position, (n,) each: nats, and whether both models' likeliest token is the same."""

    kld: Float32
    agrees: NDArray[np.bool_]
    loss_base: Float32
    """-log p of the token that came next, by the base."""
    loss: Float32
    """The same by the judged model."""

    def __len__(self) -> int:
        return len(self.kld)


def compare(base: Float32, judged: Float32, following: NDArray[np.int64]) -> Positions:
    """Reduce two blocks of logits (n, vocab) to a few numbers a position.

    KL(base || judged) = sum p (a - b) - (log sum e^a - log sum e^b), a and b the logits less their maxima: the
    differences are taken in float32 where they are exact, sums in float64. Rounding below 0 is cut off at 0.
    """
    a, sum_a, best_a = _shifted(base)
    b, sum_b, best_b = _shifted(judged)
    rows = np.arange(len(a))
    loss_base = np.log(sum_a) - a[rows, following]
    loss = np.log(sum_b) - b[rows, following]
    weight = np.exp(a)
    np.subtract(a, b, out=a)
    mean_difference = np.einsum("nv,nv->n", weight, a, dtype=np.float64) / sum_a
    kld = np.maximum(mean_difference - (np.log(sum_a) - np.log(sum_b)), 0)
    return Positions(kld.astype(np.float32), best_a == best_b, loss_base.astype(np.float32), loss.astype(np.float32))


def _shifted(logits: Float32) -> tuple[Float32, Float64, NDArray[np.int64]]:
    """Logits less the row's maximum, the float64 sum of their exponentials, and the column of the maximum."""
    best = logits.argmax(axis=1)
    shifted = logits - logits[np.arange(len(logits)), best][:, None]
    return shifted, np.exp(shifted).sum(axis=1, dtype=np.float64), best


def join(parts: Sequence[Positions]) -> Positions:
    """Positions one after the other."""
    return Positions(
        np.concatenate([p.kld for p in parts]),
        np.concatenate([p.agrees for p in parts]),
        np.concatenate([p.loss_base for p in parts]),
        np.concatenate([p.loss for p in parts]),
    )


def clustered_mean(chunks: Sequence[NDArray[np.generic]]) -> tuple[float, float | None]:
    """Mean of all values and its standard error, the chunk being the unit of sampling; None for a single chunk."""
    sums = np.array([np.sum(chunk, dtype=np.float64) for chunk in chunks])
    sizes = np.array([len(chunk) for chunk in chunks], dtype=np.float64)
    mean = float(sums.sum() / sizes.sum())
    if len(chunks) < 2:
        return mean, None
    residuals = sums - mean * sizes
    c = len(chunks)
    return mean, float(math.sqrt(c / (c - 1) * np.square(residuals).sum()) / sizes.sum())


def clustered_quantile(chunks: Sequence[Float32], q: float, seed: int = 0) -> tuple[float, float | None]:
    """Quantile over all values (exact, linear between neighbours) and its standard error by resampling chunks."""
    return _bootstrap(chunks, lambda values: float(np.quantile(values, q)), seed)


def _bootstrap(
    chunks: Sequence[Float32], statistic: Callable[[Float32], float], seed: int
) -> tuple[float, float | None]:
    """A statistic of all values, and the standard deviation of it over resampled sets of chunks."""
    value = statistic(np.concatenate(chunks))
    if len(chunks) < 2:
        return value, None
    random = np.random.default_rng(seed)
    draws = random.integers(0, len(chunks), (RESAMPLES, len(chunks)))
    return value, float(np.std([statistic(np.concatenate([chunks[i] for i in draw])) for draw in draws], ddof=1))


def perplexity(losses: Sequence[NDArray[np.floating]]) -> tuple[float, float | None]:
    """exp of the mean loss and its standard error (delta method); of differences of losses: a ratio of perplexities."""
    mean, error = clustered_mean(losses)
    value = math.exp(mean)
    return value, None if error is None else value * error


def root_mean_square(chunks: Sequence[NDArray[np.floating]]) -> tuple[float, float | None]:
    """Root of the mean square and its standard error (delta method)."""
    mean, error = clustered_mean([np.square(chunk, dtype=np.float64) for chunk in chunks])
    value = math.sqrt(mean)
    return value, None if error is None else error / (2 * value) if value else 0.0


def cosine(a: Float32, b: Float32) -> float:
    """Cosine between two vectors (width,), in float64; 0 where one of them is 0."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    norms = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / norms if norms else 0.0
