"""The divergence of a network from itself, against a plain one: all layers, one chunk at a time, in numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from efficli.checkpoint import open_checkpoint
from efficli.errors import CheckpointError
from efficli.network.divergence import Divergence
from efficli.network.model import Network
from tests import models
from tests.network.checkpoints import altered

CHUNK, CHUNKS = 32, 3
FIRST = CHUNK // 4
FAMILIES = ("llama", "gpt2", "gemma3", "qwen3_moe", "bert")
CHUNK_IDS = np.random.default_rng(0).integers(3, models.VOCAB, (CHUNKS, CHUNK)).tolist()


@pytest.fixture(scope="module", params=FAMILIES)
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Network:
    """Of two layers of full attention, and of Gemma with a layer that sees a window."""
    more = {"gpt2": {"n_layer": 2}, "gemma3": {"sliding_window": 8}}.get(request.param, {"num_hidden_layers": 2})
    model = models.build(request.param, **more)
    return Network(open_checkpoint(models.save(model, tmp_path_factory.mktemp("in") / "model")), threads=1)


def outputs(network: Network) -> list[NDArray[np.float64]]:
    """Logits or hidden states of the scored positions of every chunk."""
    return [network.forward(ids)[FIRST:].astype(np.float64) for ids in CHUNK_IDS]


def log_softmax(values: NDArray[np.float64]) -> NDArray[np.float64]:
    values = values - values.max(-1, keepdims=True)
    found: NDArray[np.float64] = values - np.log(np.exp(values).sum(-1, keepdims=True))
    return found


def plain(network: Network, base: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """The definition: mean KL divergence of each chunk, or 1 - cosine of hidden states."""
    means = []
    for old, new in zip(base, outputs(network), strict=True):
        if network.causal:
            p, q = log_softmax(old), log_softmax(new)
            means.append((np.exp(p) * (p - q)).sum(-1).mean())
        else:
            norms = np.linalg.norm(old, axis=-1) * np.linalg.norm(new, axis=-1)
            means.append((1 - (old * new).sum(-1) / norms).mean())
    return np.array(means)


def disturb(network: Network, name: str, scale: float = 0.2) -> None:
    """Replace a matrix by itself and noise."""
    draw = np.random.default_rng(list(name.encode()))
    for index in range(network.matrices[name].count):
        values = network.weight(name, index)
        network.replace(name, values + scale * values.std() * draw.standard_normal(values.shape).astype("f4"), index)


def close(found: NDArray[np.float64], expected: NDArray[np.float64]) -> None:
    assert expected.min() > 1e-6
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-6)


def of_layer(network: Network, layer: int | None) -> str:
    """The largest matrix of a layer; None: the table of tokens."""
    found = {name: matrix for name, matrix in network.matrices.items() if matrix.layer == layer}
    if layer is None:
        return next(name for name, matrix in found.items() if matrix.role == "embedding")
    return max(found, key=lambda name: found[name].rows * found[name].columns)


def test_it_is_the_mean_over_scored_positions_whatever_is_skipped(network: Network) -> None:
    base, divergence = outputs(network), Divergence(network, CHUNK_IDS)
    layers = len(network.layers())
    assert divergence.positions == CHUNKS * (CHUNK - FIRST)
    np.testing.assert_allclose(divergence.measure(), 0, atol=1e-6)
    for layer in (None, *range(layers)):
        name = of_layer(network, layer)
        disturb(network, name)
        expected = plain(network, base)
        for first in range(-1, 0 if layer is None else layer + 1):
            close(divergence.measure(first), expected)
        assert divergence.mean(-1) == pytest.approx(expected.mean(), rel=2e-3)
        network.restore(name)
    np.testing.assert_allclose(divergence.measure(), 0, atol=1e-6)
    np.testing.assert_array_equal(outputs(network), base)
    assert len(network.layers()) == layers and not any("StandIn" in type(x).__name__ for x in network.layers())


def test_what_is_held_may_be_skipped_and_the_base_stays(network: Network) -> None:
    base, divergence = outputs(network), Divergence(network, CHUNK_IDS)
    last = len(network.layers()) - 1
    disturb(network, of_layer(network, 0))
    held = divergence.hold()
    assert held == pytest.approx(plain(network, base).mean(), rel=2e-3)
    disturb(network, of_layer(network, last))
    close(divergence.measure(last), plain(network, base))
    network.restore(of_layer(network, last))
    close(divergence.measure(last + 1), plain(network, base))  # nothing but the first layer differs, as held
    network.restore(of_layer(network, 0))


def test_a_head_alone_is_all_that_is_computed(tmp_path: Path) -> None:
    network = Network(open_checkpoint(models.save(models.build("llama"), tmp_path / "model")), threads=1)
    base, divergence = outputs(network), Divergence(network, CHUNK_IDS)
    seen: list[str] = []
    for layer in network.layers():
        layer.self_attn.register_forward_hook(lambda *_: seen.append("layer"))
    disturb(network, "lm_head.weight")
    found = divergence.measure(len(network.layers()))
    assert not seen
    close(found, plain(network, base))
    assert len(seen) == CHUNKS * len(network.layers())


def test_more_chunks_than_are_computed_side_by_side(tmp_path: Path) -> None:
    """The same numbers as one by one, in the order of the chunks."""
    model = models.build("llama", num_hidden_layers=1)
    network = Network(open_checkpoint(models.save(model, tmp_path / "model")), threads=1)
    ids = np.random.default_rng(1).integers(3, models.VOCAB, (19, 12)).tolist()
    alone = [Divergence(network, [chunk]) for chunk in ids]
    together = Divergence(network, ids)
    assert together.positions == sum(one.positions for one in alone) == 19 * 9
    disturb(network, of_layer(network, 0))
    close(together.measure(), np.concatenate([one.measure() for one in alone]))
    close(together.measure(0), together.measure(-1))


def test_a_network_that_computes_nothing_finite(tmp_path: Path) -> None:
    def broken(arrays: dict[str, Any]) -> dict[str, Any]:
        arrays["model.norm.weight"][:] = np.nan
        return arrays

    folder = models.save(models.build("llama", num_hidden_layers=1), tmp_path / "model")
    network = Network(open_checkpoint(altered(folder, tmp_path / "broken", broken)), threads=1)
    with pytest.raises(CheckpointError, match="the network computes NaN or infinite values"):
        Divergence(network, CHUNK_IDS).measure()
