"""A network computes with the matrices that the checkpoint names, and with those put in their place."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from efficli.checkpoint import open_checkpoint
from efficli.errors import UnsupportedError
from efficli.families import family_of
from efficli.network.model import Network
from efficli.network.places import find_places
from efficli.surgery import matrices
from tests import models
from tests.network.checkpoints import STACKED, altered, stacked, whole_gemma3

IDS = list(range(3, 43))
CASES = (*models.FAMILIES, "llama tied", "gemma3 whole", *(f"qwen3_moe {form}" for form in STACKED))


def saved(case: str, folder: Path) -> Path:
    """A checkpoint of a family, in the form that the second word asks for."""
    family, _, form = case.partition(" ")
    if form == "whole":
        return whole_gemma3(folder / "model")
    overrides = {"tie_word_embeddings": True} if form == "tied" else {}
    made = models.save(models.build(family, **overrides), folder / "model")
    return altered(made, folder / "stacked", stacked) if form == "stacked" else made


@pytest.fixture(params=CASES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A checkpoint of every family and layout."""
    yield saved(request.param, tmp_path)


def test_other_values(folder: Path, tmp_path: Path) -> None:
    """With every matrix replaced it computes what a checkpoint saved with these values does; restored, what it did."""
    file = next(folder.glob("*.safetensors"))
    before = hashlib.sha256(file.read_bytes()).digest()
    network = Network(open_checkpoint(folder), threads=1)
    first = network.forward(IDS)
    found = matrices(network.checkpoint)
    assert network.matrices == found  # all of them are found
    generator = np.random.default_rng(0)
    changed = {}
    for name, matrix in found.items():
        own = network.checkpoint.read(name).reshape((-1, *network.checkpoint.tensors[name].shape[-2:]))
        new = (own + 0.05 * generator.standard_normal(own.shape)).astype(np.float32)
        for index in range(matrix.count):
            held = network.weight(name, index)
            assert held.shape == (matrix.rows, matrix.columns)
            assert np.array_equal(held.T if matrix.transposed else held, own[index])
            network.replace(name, new[index].T if matrix.transposed else new[index], index)
        changed[name] = new.reshape(network.checkpoint.tensors[name].shape)
    copy = altered(folder, tmp_path / "copy", lambda arrays: arrays | changed)
    second = network.forward(IDS)
    assert np.array_equal(second, Network(open_checkpoint(copy), threads=1).forward(IDS))
    assert not np.allclose(first, second, rtol=0.01)
    for name in found:
        network.restore(name)
    assert np.array_equal(network.forward(IDS), first)
    assert hashlib.sha256(file.read_bytes()).digest() == before  # the weights may be mapped from it


@pytest.mark.parametrize("form", STACKED)
def test_one_of_a_stack(form: str, tmp_path: Path) -> None:
    """One expert of a stack is replaced and restored alone."""
    network = Network(open_checkpoint(saved(f"qwen3_moe {form}", tmp_path)), threads=1)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    held = [network.weight(name, index) for index in range(6)]
    network.replace(name, held[2] + 1, 2)
    network.replace(name, held[4] * 0, 4)
    network.restore(name, 4)
    after = [network.weight(name, index) for index in range(6)]
    assert [i for i in range(6) if not np.array_equal(held[i], after[i])] == [2]
    with pytest.raises(ValueError, match=r"gate_up_proj: \(64, 96\) for \(96, 64\)"):
        network.replace(name, held[0].T)


def test_logits_are_transformers(tmp_path: Path) -> None:
    """As the model that was saved gives them; from a position on, and in blocks."""
    import torch

    model = models.build("qwen2")
    network = Network(open_checkpoint(models.save(model, tmp_path / "model")), threads=1)
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0].numpy()
    assert np.array_equal(network.forward(IDS), expected)
    np.testing.assert_allclose(network.forward(IDS, first=30), expected[30:], rtol=1e-5, atol=1e-5)
    blocks = list(network.logit_blocks(IDS, first=10, rows=12))
    assert [(at, len(block)) for at, block in blocks] == [(10, 12), (22, 12), (34, 6)]
    assert network.vocab_size == models.VOCAB


def test_an_encoder_gives_its_last_hidden_states(tmp_path: Path) -> None:
    import torch

    model = models.build("bert")
    network = Network(open_checkpoint(models.save(model, tmp_path / "model")), threads=1)
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).last_hidden_state[0].numpy()
    assert np.array_equal(network.forward(IDS), expected)
    with pytest.raises(UnsupportedError, match="an encoder has no logits"):
        next(network.logit_blocks(IDS))


def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    """A network with a layer less, a smaller one, and a module of another kind: a reason for each matrix."""
    import torch

    ckpt = open_checkpoint(models.save(models.build("llama"), tmp_path / "model"))
    family, _ = family_of(ckpt.config)
    found = matrices(ckpt)
    model = models.build("llama", num_hidden_layers=2, intermediate_size=80)
    model.model.layers[0].self_attn.o_proj = torch.nn.Bilinear(2, 2, 2)
    model.model.layers[1].self_attn.o_proj = type("Doubled", (torch.nn.Linear,), {})(96, 64)
    places = find_places(model, found, family)
    assert list(places) == list(found)
    assert places["model.layers.2.self_attn.q_proj.weight"].reason == "the network has no parameter of its name"
    assert places["model.layers.1.mlp.up_proj.weight"].reason == "the network holds 1 of 80×64 under its name"
    assert places["model.layers.0.self_attn.o_proj.weight"].views == ()
    doubled = places["model.layers.1.self_attn.o_proj.weight"]
    assert doubled.site is None and doubled.reason == "what its module computes is not known: Doubled"
    told = Network(ckpt, threads=1)
    assert dict(told.unwatched) == {
        "model.embed_tokens.weight": "its rows are looked up, nothing is multiplied with it"
    }
    with pytest.raises(KeyError, match="no matrix of the checkpoint"):
        told.weight("model.norm.weight")
