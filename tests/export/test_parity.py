"""Each family's file computes what transformers computes: float32 GGUF in llama.cpp against PyTorch, eager, float32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
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
from tests.models import DYNAMIC, LINEAR, LLAMA3, YARN, longrope

GELU = ("gemma2", "gemma3", "gpt2")  # llama.cpp looks GELU up in a table of half-precision numbers
STEEP_YARN = YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False, "attention_factor": 1.2}
LOCAL = {"sliding_attention": {"rope_type": "default", "rope_theta": 7000.0}}
FULL, SLIDING = "full_attention", "sliding_attention"

CASES: list[tuple[str, str, dict[str, Any]]] = [
    *((family, "plain", {}) for family in models.FAMILIES if family != "bert"),
    ("llama", "biases", {"attention_bias": True, "mlp_bias": True}),
    ("llama", "tied", {"tie_word_embeddings": True}),
    ("llama", "llama3", {"rope_parameters": LLAMA3}),
    ("llama", "linear", {"rope_parameters": LINEAR}),
    ("llama", "dynamic", {"rope_parameters": DYNAMIC}),
    ("llama", "yarn", {"rope_parameters": YARN}),
    ("llama", "yarn, own ramp", {"rope_parameters": STEEP_YARN}),
    ("llama", "longrope, long", {"head_dim": 16, "rope_parameters": longrope(8, 256, factor=4.0)}),
    ("mistral", "window as long as the text", {"sliding_window": 512}),
    ("mistral", "llama3", {"rope_parameters": LLAMA3}),
    ("mistral", "linear", {"rope_parameters": LINEAR}),
    ("mistral", "yarn", {"rope_parameters": YARN, "head_dim": 16}),
    ("granite", "biases", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
    ("granite", "llama3", {"rope_parameters": LLAMA3}),
    ("granite", "linear", {"rope_parameters": LINEAR}),
    ("granite", "yarn", {"rope_parameters": YARN}),
    ("qwen2", "tied", {"tie_word_embeddings": True}),
    (
        "qwen2",
        "window as long as the text",
        {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 1},
    ),
    ("qwen2", "linear", {"rope_parameters": LINEAR}),
    ("qwen2", "yarn", {"rope_parameters": YARN}),
    ("qwen3", "linear", {"rope_parameters": LINEAR}),
    ("qwen3", "yarn, own attention factor", {"rope_parameters": YARN | {"attention_factor": 1.3}}),
    ("qwen3_moe", "linear", {"rope_parameters": LINEAR}),
    ("qwen3_moe", "yarn", {"rope_parameters": YARN}),
    ("olmo2", "tied", {"tie_word_embeddings": True}),
    ("olmo2", "linear", {"rope_parameters": LINEAR}),
    ("olmo2", "yarn", {"rope_parameters": YARN}),
    ("smollm3", "linear", {"rope_parameters": LINEAR}),
    ("smollm3", "yarn", {"rope_parameters": YARN}),
    ("bitnet", "linear", {"rope_parameters": LINEAR}),
    ("bitnet", "yarn", {"rope_parameters": YARN}),
    ("phi3", "longrope, short", {"rope_parameters": longrope(8, 1024)}),
    ("phi3", "longrope, long", {"rope_parameters": longrope(8, 256), "original_max_position_embeddings": 256}),
    (
        "phi3",
        "longrope, three quarters of a head",
        {
            "rope_parameters": longrope(6, 256) | {"partial_rotary_factor": 0.75},
            "original_max_position_embeddings": 256,
        },
    ),
    ("gemma2", "linear", {"rope_parameters": LINEAR}),
    ("gemma2", "yarn", {"rope_parameters": YARN}),
    ("gemma2", "own pattern", {"layer_types": [SLIDING, FULL, FULL]}),
    ("gemma2", "no window", {"layer_types": [FULL] * 3}),
    ("gemma3", "linear", {"rope_parameters": LOCAL | {FULL: LINEAR | {"rope_theta": 1e6}}}),
    ("gemma3", "yarn", {"rope_parameters": LOCAL | {FULL: YARN | {"rope_theta": 1e6}}}),
    ("gemma3", "own pattern", {"layer_types": [FULL, SLIDING] * 3 + [FULL]}),
    ("gemma3", "no window", {"layer_types": [FULL] * 7}),
    ("gemma3", "logit cap", {"final_logit_softcapping": 2.0}),
    ("gpt2", "untied", {"tie_word_embeddings": False}),
]


@dataclass(frozen=True)
class Pair:
    """A file and what PyTorch says: logits (positions, vocabulary) for `ids`."""

    file: Path
    ids: list[int]
    expected: NDArray[np.float32]
    margins: NDArray[np.float32]
    """Mixtures of experts: how close the last chosen and the first rejected expert are, at the closest layer."""


def relative(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """||found - expected|| / ||expected||."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def agreement(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Share of positions with the same most likely token."""
    return float((found.argmax(axis=1) == expected.argmax(axis=1)).mean())


def make_pair(folder: Path, family: str, overrides: dict[str, Any]) -> Pair:
    """Build, save, convert, and run in PyTorch."""
    import torch

    model = models.build(family, **overrides)
    models.save(model, folder / "model")
    ckpt = open_checkpoint(folder / "model")
    shape = read_shape(ckpt.config)
    metadata, tensors, _ = layout(shape, ckpt, strict=True)
    file = write_f32(folder / "model.gguf", shape.facts.gguf_arch, metadata, tensors, ckpt)
    ids = np.random.default_rng(0).integers(3, models.VOCAB, models.POSITIONS).tolist()
    margins = models.watch_routers(model, shape.experts_per_token) if shape.num_experts else []
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    return Pair(file, ids, expected, np.min(margins, axis=0) if margins else np.ones(len(ids), np.float32))


@pytest.fixture(scope="module", params=CASES, ids=[f"{family}: {what}" for family, what, _ in CASES])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Pair]]:
    """One family in one variant."""
    family, what, overrides = request.param
    if family == "olmo2" and what in ("linear", "yarn"):
        import transformers

        if transformers.__version__.startswith("4."):
            pytest.skip("transformers 4: Olmo2Config takes no scaling in the words of the other families")
    yield family, make_pair(tmp_path_factory.mktemp(family), family, overrides)


def test_exact_context(case: tuple[str, Pair]) -> None:
    """float32 KV cache, flash attention off: only the order of sums differs (and the GELU table)."""
    family, pair = case
    with LlamaFile(pair.file, ctx=len(pair.ids), exact=True, threads=1) as model:
        found = model.logits(pair.ids)
    assert relative(found, pair.expected) <= (2e-3 if family in GELU else 1e-5)
    assert agreement(found, pair.expected) >= 0.995


def test_default_context(case: tuple[str, Pair]) -> None:
    """float16 KV cache, flash attention as llama.cpp likes."""
    family, pair = case
    with LlamaFile(pair.file, ctx=len(pair.ids), threads=1) as model:
        found = model.logits(pair.ids)
    assert agreement(found, pair.expected) >= 0.995
    error = relative(found, pair.expected)
    if error <= 2e-3 or family != "qwen3_moe":
        assert error <= 2e-3
        return
    # Half precision in the cache swaps two experts where the router likes both equally, and later tokens see that one.
    by_position = np.linalg.norm(found - pair.expected, axis=1) / np.linalg.norm(pair.expected, axis=1)
    swapped = int(np.argmax(by_position > 2e-3))
    assert swapped > 0 and pair.margins[swapped] < 1e-3
    assert relative(found[:swapped], pair.expected[:swapped]) <= 2e-3


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "llama"])
def test_in_pieces(family: str, tmp_path: Path) -> None:
    """A text longer than the window, given in pieces shorter than it: the cache forgets what it must and no more."""
    pair = make_pair(tmp_path, family, {})
    with LlamaFile(pair.file, ctx=len(pair.ids), exact=True, threads=1) as model:
        found = np.concatenate([rows for _, rows in model.logit_blocks(pair.ids, rows=40)])
    assert relative(found, pair.expected) <= (2e-3 if family in GELU else 1e-5)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "phi3"])
def test_why_the_context_is_capped(family: str, tmp_path: Path) -> None:
    """Beyond a window that the graph does not have, the file computes something else: up to it, it does not."""
    window = {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 128}
    pair = make_pair(tmp_path, family, window if family == "qwen2" else {"sliding_window": 128})
    with LlamaFile(pair.file, ctx=len(pair.ids), exact=True, threads=1) as model:
        assert model.trained_ctx == 128
        found = model.logits(pair.ids)
    assert relative(found[:128], pair.expected[:128]) <= 1e-5
    assert relative(found[128:], pair.expected[128:]) > 1e-2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "qwen3_moe"])
def test_half_precision_checkpoints(family: str, dtype: str, tmp_path: Path) -> None:
    """Weights stored as bfloat16 or float16 mean the same numbers."""
    import torch

    model = models.build(family)
    ids = np.random.default_rng(1).integers(3, models.VOCAB, 96).tolist()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(getattr(torch, dtype)))
        expected = model(torch.tensor([ids])).logits[0].numpy()
    models.save(model, tmp_path / "model", dtype=dtype)
    ckpt = open_checkpoint(tmp_path / "model")
    shape = read_shape(ckpt.config)
    metadata, tensors, _ = layout(shape, ckpt, strict=True)
    file = write_f32(tmp_path / "model.gguf", shape.facts.gguf_arch, metadata, tensors, ckpt)
    with LlamaFile(file, ctx=96, exact=True, threads=1) as runtime:
        assert relative(runtime.logits(ids), expected) <= (2e-3 if family in GELU else 1e-5)
