"""Embedding models: llama.cpp's pooled vectors against transformers' mean over tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from efficli.checkpoint import open_checkpoint
from efficli.export.gguf.model import layout
from efficli.families import read_shape
from efficli.ops.llama import LlamaFile
from tests import models
from tests.gguf_plain import write_f32
from tests.minilm import minilm_folder

SENTENCES = (
    "A man is eating food.",
    "The girl is carrying a baby.",
    "How do I reset my password?",
    "def read(path): return open(path).read()",
    "Paris is the capital of France.",
    "Satellite attitude control uses reaction wheels and star trackers.",
    "The return value of the function is the number of items that were read, or None at the end of the file.",
)


def cosine(a: NDArray[Any], b: NDArray[Any]) -> float:
    """In double precision."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def convert(folder: Path, out: Path) -> Path:
    """The folder's model as a float32 file without a tokenizer."""
    ckpt = open_checkpoint(folder)
    shape = read_shape(ckpt.config)
    metadata, tensors, _ = layout(shape, ckpt, strict=True)
    return write_f32(out, shape.facts.gguf_arch, metadata, tensors, ckpt, step=4096)


def vectors(model: Any, texts: list[list[int]]) -> list[NDArray[np.float64]]:
    """Mean of the last hidden states, in double precision."""
    import torch

    model = model.double()
    with torch.no_grad():
        return [model(torch.tensor([ids])).last_hidden_state[0].numpy().mean(axis=0) for ids in texts]


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "default"])
def test_perturbed(exact: bool, tmp_path: Path) -> None:
    """Every parameter counts; the activation is the one that llama.cpp computes."""
    model = models.build("bert", hidden_act="gelu_new", max_position_embeddings=512)
    file = convert(models.save(model, tmp_path / "model"), tmp_path / "model.gguf")
    texts = [np.random.default_rng(n).integers(3, models.VOCAB, n).tolist() for n in (3, 40, 512)]
    with LlamaFile(file, ctx=512, embeddings=True, exact=exact, threads=1) as runtime:
        for ids, expected in zip(texts, vectors(model, texts), strict=True):
            assert cosine(runtime.embed(ids), expected) >= 0.999999


def test_minilm(tmp_path: Path) -> None:
    """all-MiniLM-L6-v2 on sentences: 0.999999 on average, what is left is llama.cpp's tanh approximation of GELU."""
    import tokenizers
    import transformers

    folder = minilm_folder()
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    texts = [tokenizer.encode(sentence).ids for sentence in SENTENCES]
    nonsense = [101, *np.random.default_rng(0).integers(1000, 20000, 400).tolist(), 102]
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    expected = vectors(model, [*texts, nonsense])
    for layer in model.encoder.layer:
        layer.intermediate.intermediate_act_fn = transformers.activations.ACT2FN["gelu_pytorch_tanh"]
    approximated = vectors(model, [*texts, nonsense])
    with LlamaFile(convert(folder, tmp_path / "m.gguf"), ctx=512, embeddings=True, exact=True, threads=1) as runtime:
        embedded = [runtime.embed(ids) for ids in [*texts, nonsense]]
    assert np.mean([cosine(a, b) for a, b in zip(embedded[:-1], expected[:-1], strict=True)]) >= 0.999999
    assert min(cosine(a, b) for a, b in zip(embedded, expected, strict=True)) >= 0.99998
    assert min(cosine(a, b) for a, b in zip(embedded, approximated, strict=True)) >= 0.9999997
