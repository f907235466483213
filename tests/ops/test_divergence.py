"""Divergence and its standard errors against slow definitions in double precision."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from efficli.ops.divergence import (
    Positions,
    clustered_mean,
    clustered_quantile,
    compare,
    cosine,
    join,
    perplexity,
    root_mean_square,
)

Float32 = NDArray[np.float32]


def slow(base: Float32, judged: Float32, following: NDArray[np.int64]) -> list[tuple[float, bool, float, float]]:
    """KL divergence, agreement and both losses from the definition, one position at a time."""
    out = []
    for a, b, token in zip(base.astype(np.float64), judged.astype(np.float64), following, strict=True):
        p, q = np.exp(a - a.max()), np.exp(b - b.max())
        p, q = p / p.sum(), q / q.sum()
        kld = sum(x * (np.log(x) - np.log(y)) for x, y in zip(p, q, strict=True) if x > 0)
        out.append((float(kld), bool(a.argmax() == b.argmax()), float(-np.log(p[token])), float(-np.log(q[token]))))
    return out


def pair(seed: int, noise: float, n: int = 40, vocab: int = 300) -> tuple[Float32, Float32, NDArray[np.int64]]:
    """Logits of two models that differ by `noise`, and tokens."""
    random = np.random.default_rng(seed)
    base = (4 * random.standard_normal((n, vocab))).astype(np.float32)
    judged = (base + noise * random.standard_normal((n, vocab)) + random.standard_normal((n, 1))).astype(np.float32)
    return base, judged, random.integers(0, vocab, n)


@pytest.mark.parametrize("noise", [0.003, 0.1, 1.0, 5.0])
def test_against_the_definition(noise: float) -> None:
    """Every number of every position."""
    base, judged, following = pair(0, noise)
    found = compare(base.copy(), judged.copy(), following)
    kld, agrees, loss_base, loss = zip(*slow(base, judged, following), strict=True)
    assert np.allclose(found.kld, kld, rtol=1e-4, atol=3e-8)
    assert found.agrees.tolist() == list(agrees)
    assert np.allclose(found.loss_base, loss_base, rtol=1e-6, atol=1e-6)
    assert np.allclose(found.loss, loss, rtol=1e-6, atol=1e-6)
    assert 0 < np.mean(found.agrees) < 1 or noise < 1


def test_equal_models_and_shifted_logits() -> None:
    """Equal logits have exactly none; a constant added to a row changes nothing; inputs are not written to."""
    base, _, following = pair(1, 0)
    before = base.copy()
    same = compare(base, base, following)
    assert not same.kld.any() and same.agrees.all() and np.array_equal(same.loss, same.loss_base)
    assert compare(base, base + np.float32(64), following).kld.max() < 1e-5
    assert np.array_equal(base, before)


def test_extreme_logits() -> None:
    """Predictions that are certain in float32: no overflow, no NaN."""
    base = np.array([[1000, 0, -1000], [0, 1000, 0]], np.float32)
    judged = np.array([[1000, 0, -1000], [1000, 0, 0]], np.float32)
    found = compare(base, judged, np.array([0, 0]))
    assert found.kld.tolist() == [0, 1000] and found.agrees.tolist() == [True, False]
    assert found.loss_base.tolist() == [0, 1000] and found.loss.tolist() == [0, 0]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.0, 1e-6, 1e-3, 0.5, 20.0]), st.integers(1, 5), st.integers(1, 40))
def test_never_negative(seed: int, noise: float, n: int, vocab: int) -> None:
    """A divergence; also of one position, and of a vocabulary of one token."""
    found = compare(*pair(seed, noise, n, vocab))
    assert (found.kld >= 0).all() and len(found) == n


def test_join() -> None:
    """Blocks of positions are the positions."""
    base, judged, following = pair(2, 0.5)
    whole = compare(base, judged, following)
    parts = [compare(base[i : i + 7], judged[i : i + 7], following[i : i + 7]) for i in range(0, 40, 7)]
    joined = join(parts)
    for name in Positions.__dataclass_fields__:
        assert np.array_equal(getattr(joined, name), getattr(whole, name))


def correlated(seed: int, chunks: int = 60, size: int = 50) -> list[NDArray[np.float64]]:
    """Chunks whose values share a part of their own: variance 1 between chunks and 1 within."""
    random = np.random.default_rng(seed)
    return [random.standard_normal() + random.standard_normal(random.integers(size // 2, size)) for _ in range(chunks)]


def test_clustered_error_is_the_spread_over_repetitions() -> None:
    """The estimated error is the standard deviation of the mean over fresh data, which the naive one is not."""
    means, errors = zip(*(clustered_mean(correlated(seed)) for seed in range(400)), strict=True)
    spread = float(np.std(means))
    assert np.mean(errors) == pytest.approx(spread, rel=0.1)
    values = np.concatenate(correlated(0))
    assert values.std() / np.sqrt(len(values)) < 0.4 * spread


def test_clustered_error_is_the_bootstrap() -> None:
    """Formula and resampling of chunks agree; equal chunks of one value give the textbook error."""
    chunks = correlated(3)
    mean, error = clustered_mean(chunks)
    assert mean == pytest.approx(float(np.concatenate(chunks).mean()))
    random = np.random.default_rng(0)
    draws = [[chunks[i] for i in random.integers(0, len(chunks), len(chunks))] for _ in range(2000)]
    assert error == pytest.approx(float(np.std([np.concatenate(draw).mean() for draw in draws])), rel=0.1)
    single = np.random.default_rng(5).standard_normal(30)
    assert clustered_mean(list(single[:, None]))[1] == pytest.approx(float(single.std(ddof=1) / np.sqrt(30)))
    assert clustered_mean([single]) == (pytest.approx(float(single.mean())), None)


def test_quantile() -> None:
    """The value is exact; the error is the spread over repetitions, about."""
    many = [[chunk.astype(np.float32) for chunk in correlated(seed)] for seed in range(150)]
    found = [clustered_quantile(chunks, 0.99) for chunks in many]
    assert found[0][0] == float(np.quantile(np.concatenate(many[0]), 0.99))
    assert found[0] == clustered_quantile(many[0], 0.99)
    errors = [error for _, error in found if error is not None]
    assert np.mean(errors) == pytest.approx(float(np.std([value for value, _ in found])), rel=0.25)
    assert clustered_quantile(many[0][:1], 0.99)[1] is None


def test_perplexity_and_root_mean_square() -> None:
    """Values from the definition, errors from the bootstrap."""
    losses = [1 + 0.1 * chunk for chunk in correlated(7)]
    random = np.random.default_rng(0)
    draws = [[losses[i] for i in random.integers(0, len(losses), len(losses))] for _ in range(2000)]
    together = np.concatenate(losses)
    value, error = perplexity(losses)
    assert value == pytest.approx(float(np.exp(together.mean())))
    assert error == pytest.approx(float(np.std([np.exp(np.concatenate(d).mean()) for d in draws])), rel=0.1)
    value, error = root_mean_square(losses)
    assert value == pytest.approx(float(np.sqrt(np.mean(together**2))))
    assert error == pytest.approx(float(np.std([np.sqrt(np.mean(np.concatenate(d) ** 2)) for d in draws])), rel=0.1)
    assert root_mean_square([np.zeros(3), np.zeros(4)]) == (0.0, 0.0)
    assert root_mean_square([np.ones(3)]) == (1.0, None)


def test_cosine() -> None:
    """Of parallel, opposite, orthogonal and zero vectors."""
    x = np.array([3, 4], np.float32)
    values = [cosine(x, y) for y in (2 * x, -x, np.array([-4, 3], np.float32), 0 * x)]
    assert values == [pytest.approx(1), pytest.approx(-1), pytest.approx(0), 0]
