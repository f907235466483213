"""The sums are llama-imatrix's: llama.cpp's own callback on an F32 file of the checkpoint, the same tokens.

With its KV cache in float32 only the order of sums differs. In float16, as llama-imatrix has it, so do inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from efficli.checkpoint import Checkpoint, open_checkpoint
from efficli.data import committed
from efficli.export.gguf.job import prepare
from efficli.export.gguf.layout import OutTensor, string
from efficli.export.gguf.model import layout
from efficli.export.gguf.types import TypeRequest, choose_types
from efficli.export.gguf.writer import write_files
from efficli.families import read_shape
from efficli.network.model import Network
from efficli.network.statistics import Statistic, collect, cut
from efficli.ops import collect as by_llama
from efficli.ops.llama import LlamaFile
from efficli.pipeline.plain_file import write_plain
from efficli.progress import Silent
from tests import models
from tests.network.checkpoints import STACKED, altered, stacked

CHUNK, CHUNKS = 64, 4
HEADS = {"lm_head.weight", "model.embed_tokens.weight", "transformer.wte.weight"}
"""What llama-imatrix leaves out by default."""
GELU = ("gemma2", "gemma3", "gpt2", "bert")
"""Numbers on either side of a rounding boundary of the table that llama.cpp looks GELU up in differ by 1/2048."""


def float_file(ckpt: Checkpoint, folder: Path) -> tuple[Path, list[OutTensor]]:
    """An F32 file without a tokenizer."""
    shape = read_shape(ckpt.config)
    metadata, tensors, _ = layout(shape, ckpt)
    metadata |= {"general.architecture": string(shape.facts.gguf_arch), "tokenizer.ggml.model": string("none")}
    choice = choose_types(metadata, tensors, TypeRequest(type="F32"))
    (written,) = write_files(ckpt, tensors, [(folder / "f32.gguf", metadata, choice)])
    return written.path, tensors


def llama_sums(file: Path, ids: list[int], chunk: int, *, exact: bool) -> dict[str, NDArray[Any]]:
    """What the child process of `compute_imatrix` stores."""
    out = file.with_suffix(".npz")
    argument = {"gguf": str(file), "text": ids, "chunk": chunk, "max_chunks": None, "threads": 1, "exact": exact}
    by_llama.collect(argument | {"out": str(out)}, Silent())
    with np.load(out) as stored:
        return dict(stored)


def largest_difference(
    expected: dict[str, NDArray[Any]], found: dict[str, Statistic], tensors: Sequence[OutTensor]
) -> float:
    """Of mean(x²) of any channel of any tensor, relative to itself; counts must be equal, and no tensor left out."""
    worst = 0.0
    seen: set[str] = set()
    for tensor in tensors:
        if f"{tensor.name}.in_sum2" not in expected:
            continue
        seen.update(tensor.sources)
        squares = np.concatenate([found[name].squares for name in tensor.sources])
        counts = np.concatenate([found[name].counts for name in tensor.sources])
        assert np.array_equal(counts, expected[f"{tensor.name}.counts"])
        sums = expected[f"{tensor.name}.in_sum2"]
        assert squares.shape == sums.shape
        assert not squares[counts == 0].any() and not sums[counts == 0].any()
        worst = max(worst, float((np.abs(squares - sums)[counts > 0] / sums[counts > 0]).max()))
    assert {name.rpartition(".")[0] for name in expected} <= {tensor.name for tensor in tensors}
    assert found.keys() - seen <= HEADS
    return worst


def look_up_gelu(model: Any) -> None:
    """Let a model of transformers compute GELU as ggml does, from a table of half-precision numbers."""
    import torch

    class Table(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            found = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
            return torch.where(x <= -10, 0.0, torch.where(x >= 10, x, found))

    for module in list(model.modules()):
        for name, child in module.named_children():
            if "gelu" in type(child).__name__.lower():
                setattr(module, name, Table())


@pytest.mark.parametrize("family", [*models.FAMILIES, *(f"qwen3_moe {form}" for form in STACKED)])
def test_every_family(family: str, tmp_path: Path) -> None:
    family, _, form = family.partition(" ")
    folder = models.save(models.build(family), tmp_path / "model")
    ckpt = open_checkpoint(altered(folder, tmp_path / "stacked", stacked) if form else folder)
    file, tensors = float_file(ckpt, tmp_path)
    ids = np.random.default_rng(0).integers(3, models.VOCAB, CHUNK * CHUNKS + 7).tolist()
    network = Network(ckpt, threads=1)
    look_up_gelu(network._model)
    found = collect(network, cut(ids, CHUNK))
    assert largest_difference(llama_sums(file, ids, CHUNK, exact=True), found, tensors) < (
        5e-4 if family in GELU else 2e-5
    )


@pytest.mark.slow
def test_the_reference(tmp_path: Path) -> None:
    """In float32, and as llama-imatrix runs: its cache of half precision is what differs."""
    ckpt = open_checkpoint("reference")
    file = write_plain(ckpt, "F32", tmp_path, threads=1)
    tensors = prepare(ckpt, [TypeRequest(type="F32")], own={}).tensors
    with LlamaFile(file, vocab_only=True) as vocabulary:
        ids = vocabulary.tokenize(committed("calibration-code"), add_special=True)[: 40 * 512]
        bos = vocabulary.bos if vocabulary.add_bos else None
    found = collect(Network(ckpt, threads=1), cut(ids, 512, bos=bos))
    for exact, bound in ((True, 2e-5), (False, 5e-4)):
        assert largest_difference(llama_sums(file, ids, 512, exact=exact), found, tensors) < bound
