"""Sums over the inputs of matrices, against slow definitions: hooks that keep every input, and experts one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from efficli.checkpoint import open_checkpoint
from efficli.errors import CheckpointError, FitError
from efficli.network.model import Network
from efficli.network.statistics import Statistic, collect, cut, in_passes
from efficli.surgery import Matrix
from tests import models
from tests.network.checkpoints import STACKED, altered, stacked

Float64 = NDArray[np.float64]
CHUNK = 24
LAYER = "model.layers.1."


def network_of(family: str, folder: Path, **overrides: Any) -> Network:
    return Network(open_checkpoint(models.save(models.build(family, **overrides), folder / "model")), threads=1)


def text(chunks: int = 3) -> list[list[int]]:
    return cut(np.random.default_rng(0).integers(3, models.VOCAB, chunks * CHUNK + 5).tolist(), CHUNK)


def watched(network: Network) -> list[str]:
    return [name for name in network.matrices if name not in network.unwatched]


def inputs(model: Any, chunks: Sequence[Sequence[int]]) -> dict[str, Float64]:
    """Every row that every module with a weight is given: the parameter's name -> (rows, columns)."""
    import torch

    kept: dict[str, list[Float64]] = {}

    def keep(name: str) -> Any:
        def hook(_module: Any, args: tuple[Any, ...]) -> None:
            kept.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]).double().numpy().copy())

        return hook

    for name, module in model.named_modules():
        if hasattr(module, "weight") and "Embedding" not in type(module).__name__:
            module.register_forward_pre_hook(keep(f"{name}.weight"))
    with torch.no_grad():
        for chunk in chunks:
            model(torch.tensor([list(chunk)]))
    return {name: np.concatenate(rows) for name, rows in kept.items()}


def close(found: NDArray[Any], expected: NDArray[Any], rtol: float) -> None:
    """Each value of a sum, in proportion to the largest."""
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol * float(np.abs(expected).max()))


@pytest.mark.parametrize("family", [name for name in models.FAMILIES if name != "qwen3_moe"])
def test_sums_are_those_of_the_inputs(family: str, tmp_path: Path) -> None:
    """Of all matrices of every family, the head's and a tied table's too."""
    network, chunks = network_of(family, tmp_path), text()
    names = watched(network)
    found = collect(network, chunks, hessians=names)
    expected = inputs(models.build(family), chunks)
    assert list(found) == names
    for name in names:
        is_head = network.matrices[name].role in ("embedding", "output")
        x = expected["lm_head.weight" if is_head else name]
        assert found[name].counts.tolist() == [len(x)] == [3 * CHUNK]
        np.testing.assert_allclose(found[name].squares[0], (x * x).sum(0), rtol=1e-6)
        gram = found[name].gram
        assert gram is not None
        close(gram[0], x.T @ x, 1e-5)
    assert network.forward(chunks[0]).shape[0] == CHUNK  # nothing watches any more


def test_matrices_with_the_same_input_share_their_sums(tmp_path: Path) -> None:
    network = network_of("llama", tmp_path)
    found = collect(network, text(), hessians=watched(network))
    grams = {name.removeprefix(LAYER): id(s.gram) for name, s in found.items() if name.startswith(LAYER)}
    attention = {grams[f"self_attn.{part}_proj.weight"] for part in "qkv"}
    feed = {grams[f"mlp.{part}_proj.weight"] for part in ("gate", "up")}
    assert len(attention) == len(feed) == 1
    assert len(set(grams.values())) == 4
    one = found[LAYER + "mlp.up_proj.weight"]
    assert one.gram is not None
    for values in (one.squares, one.counts, one.gram):
        with pytest.raises(ValueError, match="read-only"):
            values[0] = 0


def gate_and_up(network: Network, layer: str, expert: int) -> tuple[Float64, Float64]:
    """Two matrices of an expert, in either layout."""
    base = f"{layer}mlp.experts."
    if f"{base}gate_up_proj" in network.matrices:
        gate, up = np.split(network.weight(f"{base}gate_up_proj", expert).astype(np.float64), 2)
        return gate, up
    gate, up = (network.weight(f"{base}{expert}.{part}_proj.weight").astype(np.float64) for part in ("gate", "up"))
    return gate, up


def expert_rows(network: Network, chunks: Sequence[Sequence[int]], layer: str) -> tuple[list[Float64], list[Float64]]:
    """What each of six experts of a layer is given, and what its down projection is: token by token, slot by slot."""
    router = network.weight(f"{layer}mlp.gate.weight").astype(np.float64)
    model = models.build("qwen3_moe")
    rows = inputs(model, chunks)[f"{layer}mlp.gate.weight"]
    given: list[list[Float64]] = [[] for _ in range(6)]
    for x in rows:
        for expert in np.argsort(router @ x)[-2:]:
            given[expert].append(x)
    made = []
    for expert, vectors in enumerate(given):
        x = np.array(vectors).reshape(-1, rows.shape[1])
        gate, up = (x @ matrix.T for matrix in gate_and_up(network, layer, expert))
        made.append(gate / (1 + np.exp(-gate)) * up)
    return [np.array(vectors).reshape(-1, rows.shape[1]) for vectors in given], made


def by_expert(network: Network, found: Mapping[str, Statistic], part: str) -> list[Statistic]:
    """The statistic of each expert of layer 1, in either layout."""
    base = f"{LAYER}mlp.experts."
    apart = f"{base}0.{part}_proj.weight" in found
    if apart:
        return [found[f"{base}{expert}.{part}_proj.weight"] for expert in range(6)]
    whole = found[f"{base}{'down' if part == 'down' else 'gate_up'}_proj"]
    gram = whole.gram
    assert gram is not None
    matrix: Matrix = network.matrices[f"{base}{'down' if part == 'down' else 'gate_up'}_proj"]
    assert whole.squares.shape == (matrix.count, matrix.columns)
    return [Statistic(whole.squares[e : e + 1], whole.counts[e : e + 1], gram[e : e + 1]) for e in range(6)]


@pytest.mark.parametrize("layout", ["apart", *STACKED])
@pytest.mark.parametrize("tokens", [2, CHUNK])
def test_experts(layout: str, tokens: int, tmp_path: Path) -> None:
    """Each expert has the sums of the tokens sent to it; one that saw none has zeros, and is counted so."""
    folder = models.save(models.build("qwen3_moe"), tmp_path / "model")
    if layout == "stacked":
        folder = altered(folder, tmp_path / "stacked", stacked)
    network = Network(open_checkpoint(folder), threads=1)
    chunks = [chunk[:tokens] for chunk in text(1 if tokens == 2 else 3)]
    names = watched(network)
    found = collect(network, chunks, hessians=names)
    assert list(found) == names
    given, made = expert_rows(network, chunks, LAYER)
    for part, rows in (("gate", given), ("up", given), ("down", made)):
        for statistic, x in zip(by_expert(network, found, part), rows, strict=True):
            assert statistic.counts.tolist() == [len(x)]
            close(statistic.squares[0], (x * x).sum(0), 2e-5)
            assert statistic.gram is not None
            close(statistic.gram[0], x.T @ x, 2e-5)
    assert tokens > 2 or min(map(len, given)) == 0
    assert all(np.isfinite(s.squares).all() for s in found.values())


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_in_passes(family: str, tmp_path: Path) -> None:
    """Under a limit of memory each matrix comes once, in the network's order within its run, with the same sums."""
    network, chunks = network_of(family, tmp_path), text()
    names = watched(network)
    asked = [name for name in names if "layers.0." not in name]
    whole = collect(network, chunks, hessians=asked)
    assert {name for name, s in whole.items() if s.gram is not None} == set(asked)
    largest = max(s.gram.nbytes for s in whole.values() if s.gram is not None)
    several = list(in_passes(network, chunks, hessians=asked, memory_bytes=2 * largest))
    assert len(several) > 2
    assert sorted(name for found in several for name in found) == sorted(names)
    assert set(several[0]) >= set(names) - set(asked)
    for found in several:
        distinct = {id(s.gram): s.gram.nbytes for s in found.values() if s.gram is not None}
        assert sum(distinct.values()) <= 2 * largest
        for name, statistic in found.items():
            assert np.array_equal(statistic.squares, whole[name].squares)
            if statistic.gram is not None:
                expected = whole[name].gram
                assert expected is not None and np.array_equal(statistic.gram, expected)
    with pytest.raises(FitError, match=r"takes .* more than"):
        next(in_passes(network, chunks, hessians=asked, memory_bytes=largest - 1))
    with pytest.raises(FitError, match=r"inputs take .* more than"):
        collect(network, chunks, hessians=asked, memory_bytes=2 * largest)


def test_cut() -> None:
    assert cut(range(10), 4) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert cut(range(8), 4, bos=99) == [[99, 1, 2, 3], [99, 5, 6, 7]]
    with pytest.raises(CheckpointError, match="has 3 tokens, expected at least 4"):
        cut(range(3), 4)


def test_what_cannot_be_summed(tmp_path: Path) -> None:
    network = network_of("llama", tmp_path)
    with pytest.raises(CheckpointError, match="fills no chunk"):
        collect(network, [])
    with pytest.raises(KeyError, match="embed_tokens"):
        collect(network, text(), hessians=["model.embed_tokens.weight"])
    name = LAYER + "self_attn.v_proj.weight"
    network.replace(name, np.full((48, 64), np.inf, np.float32))
    with pytest.raises(CheckpointError, match=r"inputs of model.layers.1.self_attn.o_proj.weight are not finite"):
        collect(network, text())
