"""Error feedback against its slow definition (least squares solved anew after each column), its limits and promises."""

import itertools

import numpy as np
import pytest

from efficli.ops import ggml
from efficli.ops.block_layouts import LAYOUTS
from efficli.ops.blocks import SCALAR_TYPES, grid, levels, unpack
from efficli.ops.nearest import chooser
from efficli.ops.rounding import ROUNDED_TYPES, damped, prepare, round_encoded, round_with_feedback

# the encoder's tables of these take seconds to build: 3 and 6
SLOW = ("IQ2_XS", "IQ2_S")
FAST = [kind for kind in ROUNDED_TYPES if kind not in SLOW]
ALL = [*FAST, *(pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW)]


def problem(columns: int = 256, rows: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights, a Hessian of correlated inputs with a few large channels, and its diagonal."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((columns, columns)) / columns**0.5 + np.diag(rng.lognormal(0, 1, columns))
    inputs = rng.standard_normal((2 * columns, columns)) @ mixing
    hessian = inputs.T @ inputs / len(inputs)
    weight = rng.standard_normal((rows, columns)).astype(np.float32)
    return weight, hessian, np.ascontiguousarray(hessian.diagonal(), np.float32)


def encode(kind: str, weight: np.ndarray, imatrix: np.ndarray | None = None) -> np.ndarray:
    data = np.empty(len(weight) * ggml.row_bytes(kind, weight.shape[1]), np.uint8)
    if imatrix is None and kind in ggml.NEEDS_IMATRIX:
        imatrix = np.ones(weight.shape[1], np.float32)
    ggml.encode(kind, weight, data, imatrix)
    return data


def losses(kind: str, weight: np.ndarray, data: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    error = weight.astype(np.float64) - ggml.decode(kind, data, *weight.shape)
    return np.einsum("rc,cd,rd->r", error, hessian, error)


def candidates(kind: str, blocks) -> np.ndarray:
    """Every value that each weight may take (codes, rows, columns), decoded by ggml."""
    shape = blocks.codes.shape
    values = np.stack(
        [ggml.decode(kind, blocks.pack(np.full_like(blocks.codes, n)), *shape) for n in range(len(levels(kind)))]
    )
    if kind == "Q8_0":
        values[128] = np.inf  # -128, which the encoder does not use
    return values


def by_definition(values: np.ndarray, weight: np.ndarray, hessian: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Round a column to the nearest, then let least squares choose those not yet rounded; again for the next."""
    codes = np.zeros(weight.shape, np.uint32)
    error = np.zeros(weight.shape)
    for done, column in enumerate(order):
        fixed, free = order[:done], order[done:]
        # the errors of the free columns that make the loss least, given those of the fixed ones
        best = -np.linalg.solve(hessian[np.ix_(free, free)], hessian[np.ix_(free, fixed)] @ error[:, fixed].T).T
        aim = weight[:, column] - best[:, 0]
        codes[:, column] = np.abs(values[:, :, column] - aim).argmin(axis=0)
        error[:, column] = weight[:, column] - np.take_along_axis(values[:, :, column], codes[None, :, column], 0)[0]
    return codes


@pytest.mark.parametrize("order", ["natural", "diagonal"])
@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "IQ4_NL", "Q8_0", "Q2_K", "Q3_K"])
def test_equals_the_slow_definition(kind, order):
    columns = max(64, LAYOUTS[kind].block)
    weight, hessian, imatrix = problem(columns)
    data = encode(kind, weight, imatrix)
    blocks = unpack(kind, data, *weight.shape)
    raised = hessian + 0.01 * hessian.diagonal().mean() * np.eye(columns)
    turn = np.argsort(-hessian.diagonal()) if order == "diagonal" else np.arange(columns)
    slow = by_definition(candidates(kind, blocks), weight, raised, turn)
    kept = losses(kind, weight, blocks.pack(slow), raised) >= losses(kind, weight, data, raised)
    slow[kept] = blocks.codes[kept]
    assert kept.sum() <= 1
    fast = unpack(kind, round_with_feedback(kind, weight, hessian, imatrix, order=order, passes=0), *weight.shape)
    assert np.array_equal(fast.codes, slow)
    assert np.array_equal(fast.scales, blocks.scales)


@pytest.mark.parametrize("kind", ALL)
def test_no_row_is_worse_and_the_whole_is_far_better(kind):
    weight, hessian, imatrix = problem(512, rows=16)
    weight[3] = 0
    weight[5, :256] = 0
    before, dead = encode(kind, weight, imatrix), hessian.copy()
    dead[:, 32:64] = dead[32:64] = 0
    for h in (hessian, dead):
        after = round_with_feedback(kind, weight, h, imatrix)
        assert ggml.is_valid(kind, after)
        old, new = losses(kind, weight, before, h), losses(kind, weight, after, h)
        assert np.all(new <= old * (1 + 1e-6) + 1e-12)
        assert new.sum() < 0.8 * old.sum()
        first, second = (unpack(kind, data, *weight.shape) for data in (before, after))
        assert np.array_equal(first.scales, second.scales)
    unused = slice(32 // second.layout.group, 64 // second.layout.group)
    assert np.array_equal(first.codes[:, unused], second.codes[:, unused])
    assert np.array_equal(ggml.decode(kind, after, *weight.shape)[3], ggml.decode(kind, before, *weight.shape)[3])


@pytest.mark.parametrize("kind", ["Q4_0", "Q3_K", "IQ3_XXS"])
def test_no_pass_makes_it_worse(kind):
    weight, hessian, imatrix = problem(256, rows=16, seed=3)
    raised = damped(hessian, 0.01)[0]
    ways = [round_with_feedback(kind, weight, hessian, imatrix, passes=n) for n in range(4)]
    totals = [losses(kind, weight, data, raised) for data in ways]
    for fewer, more in itertools.pairwise(totals):
        assert np.all(more <= fewer * (1 + 1e-5))
    assert totals[-1].sum() < 0.99 * totals[0].sum()


@pytest.mark.parametrize("kind", SCALAR_TYPES)
def test_with_inputs_that_do_not_correlate_it_is_the_nearest(kind):
    weight, hessian, imatrix = problem(256)
    diagonal = np.diag(hessian.diagonal())
    data = encode(kind, weight, imatrix)
    values = candidates(kind, unpack(kind, data, *weight.shape))
    got = ggml.decode(kind, round_encoded(kind, data, weight, diagonal), *weight.shape)
    np.testing.assert_allclose(np.abs(got - weight), np.abs(values - weight).min(axis=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["IQ3_S", "IQ3_XXS", "IQ2_XXS", pytest.param("IQ2_S", marks=pytest.mark.slow)])
@pytest.mark.parametrize("correlated", [False, True])
def test_vectors_are_the_nearest_of_all(kind, correlated):
    """By brute force over the grid and all signs: exactly without correlations, nearly with them."""
    layout = LAYOUTS[kind]
    weight = problem(256, rows=20)[0]
    blocks = unpack(kind, encode(kind, weight), *weight.shape)
    unit, group = layout.unit_columns, layout.group
    factor = np.random.default_rng(4).standard_normal((unit, unit))
    metric = 0.05 * factor @ factor.T + np.eye(unit) if correlated else np.diag(np.arange(unit) / unit + 0.5)
    metric = metric.astype(np.float32)
    want = np.ascontiguousarray(weight[:, :unit].T)
    parts = unit // group
    codes, values = chooser(blocks, np.arange(256 // unit))(0, want, metric, blocks.codes[:, :parts].T)
    assert np.array_equal(blocks.decode(np.hstack([codes.T, blocks.codes[:, parts:]]))[:, :unit], values.T)

    signs = np.array(list(itertools.product((1, -1), repeat=group)), np.float32)
    vectors = (grid(kind)[:, None] * signs).reshape(-1, group)
    odd = np.tile((signs < 0).sum(axis=1) % 2, len(grid(kind)))
    ratio = []
    for aim, scale, got in zip(want.T, blocks.scales[:, 0], values.T, strict=True):
        pieces = [aim[at : at + group] - scale * vectors for at in range(0, unit, group)]
        if layout.parity and parts == 1:
            pieces = [pieces[0][odd == 0]]
        within = [metric[at : at + group, at : at + group] for at in range(0, unit, group)]
        costs = [np.einsum("nc,nc->n", piece @ m, piece) for piece, m in zip(pieces, within, strict=True)]
        least = costs[0].min()
        if parts == 2:
            # the best of each half with each parity; what is across the halves is left out
            least = min(sum(cost[odd == parity].min() for cost in costs) for parity in (0, 1))
        ratio.append((aim - got) @ metric @ (aim - got) / least)
    if correlated and parts == 2:
        assert np.mean(ratio) < 1.1
    else:
        assert min(ratio) > 1 - 1e-4
        assert np.mean(ratio) < (1.05 if correlated else 1.001)


def test_the_same_bytes_twice_and_in_parts(monkeypatch):
    weight, hessian, imatrix = problem(256, rows=10)
    whole = round_with_feedback("Q4_K", weight, hessian, imatrix)
    assert np.array_equal(whole, round_with_feedback("Q4_K", weight, hessian, imatrix))
    prepared = prepare(hessian, order="diagonal")
    assert np.array_equal(whole, round_with_feedback("Q4_K", weight, hessian, imatrix, prepared=prepared))
    monkeypatch.setattr("efficli.ops.rounding._ROWS", 4)
    parts = round_with_feedback("Q4_K", weight, hessian, imatrix)
    old, new = (losses("Q4_K", weight, data, hessian).sum() for data in (whole, parts))
    assert new == pytest.approx(old, rel=1e-3)


def test_a_singular_hessian_is_damped_until_it_can_be_factorized():
    weight, _, imatrix = problem(256)
    inputs = np.random.default_rng(5).standard_normal((3, 256))
    hessian = inputs.T @ inputs
    raised, upper, added = damped(hessian, 0.0)
    assert added > 0
    np.testing.assert_allclose(upper @ upper.T, raised, atol=1e-9)
    assert np.all(np.tril(upper, -1) == 0)
    before = losses("Q3_K", weight, encode("Q3_K", weight, imatrix), hessian)
    for damp in (0.0, 0.01):
        after = round_with_feedback("Q3_K", weight, hessian, imatrix, damp=damp)
        assert losses("Q3_K", weight, after, hessian).sum() < 0.1 * before.sum()


def test_nothing_known_changes_nothing():
    weight, hessian, _ = problem(256)
    for kind in ("Q4_K", "IQ3_XXS"):
        assert np.array_equal(round_with_feedback(kind, weight, 0 * hessian), encode(kind, weight))


def test_a_hessian_that_is_none_is_refused():
    weight, hessian, _ = problem(256)
    with pytest.raises(ValueError, match=r"shape \(128, 128\)"):
        round_with_feedback("Q4_0", weight, hessian[:128, :128])
    for value, match in ((np.nan, "not finite"), (-1.0, "negative")):
        broken = hessian.copy()
        broken[3, 3] = value
        with pytest.raises(ValueError, match=match):
            round_with_feedback("Q4_0", weight, broken)
