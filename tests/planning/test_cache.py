"""The cache is what llama.cpp allocates, by its own count of bytes, for files that efficli writes and for others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from efficli.errors import UnsupportedError, UsageError
from efficli.families import read_shape
from efficli.ops.ggml_types import TYPE_IDS
from efficli.planning.cache import CacheLayer, cache_layers, kv_bytes, state_bytes
from tests.planning.graphs import write_hybrid, write_mla
from tests.planning.sparse import allocated, exported, opened
from tests.tiny_architectures import write_recurrent

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "max_position_embeddings": 32768,
    "vocab_size": 96,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
WIDE = {"head_dim": 32, "query_pre_attn_scalar": 32, "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 300}


def config(architecture: str, model_type: str, **more: Any) -> dict[str, Any]:
    """A small config.json."""
    return SMALL | {"architectures": [architecture], "model_type": model_type} | more


CONFIGS: Mapping[str, dict[str, Any]] = {
    "llama, grouped": config("LlamaForCausalLM", "llama", head_dim=32),
    "qwen2, a window in config.json": config(
        "Qwen2ForCausalLM", "qwen2", use_sliding_window=True, sliding_window=300, max_window_layers=1
    ),
    "mistral, a window in config.json": config("MistralForCausalLM", "mistral", sliding_window=300),
    "phi3, a window in config.json": config(
        "Phi3ForCausalLM", "phi3", sliding_window=300, original_max_position_embeddings=32768
    ),
    "smollm3, layers without positions": config("SmolLM3ForCausalLM", "smollm3", num_hidden_layers=5),
    "gemma2, every other layer": config("Gemma2ForCausalLM", "gemma2", **WIDE),
    "gemma2, no window": config("Gemma2ForCausalLM", "gemma2", **WIDE | {"sliding_window": None}),
    "gemma3, every sixth full": config("Gemma3ForCausalLM", "gemma3_text", num_hidden_layers=7, **WIDE),
    "gemma3, a pattern of its own": config(
        "Gemma3ForCausalLM",
        "gemma3_text",
        **WIDE,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
    ),
    "gemma3, no window": config("Gemma3ForCausalLM", "gemma3_text", **WIDE | {"sliding_window": None}),
    "bert": config("BertModel", "bert", hidden_act="gelu", max_position_embeddings=512),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_cache_of_exported_files_is_llama_cpps(name: str, tmp_path: Path) -> None:
    shape = exported(tmp_path / "x.gguf", CONFIGS[name])
    layers = cache_layers(shape)
    with opened(tmp_path / "x.gguf") as model:
        for ctx in (100, 512, 1000, 5000):
            assert kv_bytes(layers, ctx).nbytes == allocated(model, ctx).cache, ctx
        for ubatch in (32, 700):
            assert kv_bytes(layers, 2000, ubatch=ubatch).nbytes == allocated(model, 2000, n_ubatch=ubatch).cache
        assert kv_bytes(layers, 2000, swa_full=True).nbytes == allocated(model, 2000, swa_full=True).cache
        assert kv_bytes(layers, 5000, sequences=3).nbytes == allocated(model, 5000, n_seq_max=3).cache


def test_a_window_saves_memory() -> None:
    layers = cache_layers(read_shape(CONFIGS["gemma3, every sixth full"]))
    kept = kv_bytes(layers, 32768)
    assert (kept.full_cells, kept.window_cells) == (32768, 1024)
    assert kept.nbytes == (32768 + 6 * 1024) * 2 * 2 * 64
    assert [layer.kind for layer in layers] == ["window"] * 5 + ["full", "window"]


@pytest.mark.parametrize(("type_k", "type_v"), [("Q8_0", "Q8_0"), ("q4_0", "q4_0"), ("Q8_0", "F16"), ("F32", "BF16")])
@pytest.mark.parametrize("name", ["llama, grouped", "gemma2, every other layer"])
def test_quantized_cache(name: str, type_k: str, type_v: str, tmp_path: Path) -> None:
    layers = cache_layers(exported(tmp_path / "x.gguf", CONFIGS[name]))
    numbers = {"type_k": TYPE_IDS[type_k.upper()], "type_v": TYPE_IDS[type_v.upper()]}
    with opened(tmp_path / "x.gguf") as model:
        for ctx in (300, 3000):
            assert kv_bytes(layers, ctx, type_k=type_k, type_v=type_v).nbytes == allocated(model, ctx, **numbers).cache


@pytest.mark.parametrize("type_k", ["F16", "Q8_0"])
def test_latent_cache_has_no_values(type_k: str, tmp_path: Path) -> None:
    write_mla(tmp_path / "x.gguf", layers=3, rank=64, rope=32)
    layers = (CacheLayer("latent", k=64 + 32),) * 3
    with opened(tmp_path / "x.gguf") as model:
        for ctx in (300, 3000):
            found = allocated(model, ctx, type_k=TYPE_IDS[type_k], type_v=TYPE_IDS[type_k])  # of one type only
            assert kv_bytes(layers, ctx, type_k=type_k, type_v=type_k).nbytes == found.cache


def test_hybrid_has_caches_and_states(tmp_path: Path) -> None:
    write_hybrid(tmp_path / "x.gguf", kv_heads=(0, 0, 2, 0, 2), width=64, heads=4, kernel=3)
    state = CacheLayer("state", state_bytes=state_bytes(64 * 2, 0))
    full = CacheLayer("full", k=2 * 16, v=2 * 16)
    layers = (state, state, full, state, full)
    with opened(tmp_path / "x.gguf") as model:
        for ctx, sequences in ((300, 1), (3000, 1), (3000, 4)):
            found = allocated(model, ctx, n_seq_max=sequences)
            assert kv_bytes(layers, ctx, sequences=sequences).nbytes == found.cache


def test_recurrent_state_does_not_grow(tmp_path: Path) -> None:
    write_recurrent(tmp_path / "x.gguf")  # 64 inner, 16 state, kernel 4
    layers = (CacheLayer("state", state_bytes=state_bytes(3 * 64, 16 * 64)),) * 2
    with opened(tmp_path / "x.gguf") as model:
        for ctx in (300, 3000):
            assert kv_bytes(layers, ctx).nbytes == allocated(model, ctx).cache
    assert kv_bytes(layers, 300) == kv_bytes(layers, 100_000)
    assert kv_bytes(layers, 300).full_cells == 0


def test_a_model_that_reads_only_has_no_cache() -> None:
    assert cache_layers(read_shape(CONFIGS["bert"])) == ()
    assert kv_bytes((), 512).nbytes == 0


def test_what_cannot_be_allocated_is_refused() -> None:
    layers = (CacheLayer("full", 24, 24),)
    with pytest.raises(UnsupportedError, match="blocks of 32 do not divide the 24 values of k"):
        kv_bytes(layers, 512, type_k="Q8_0")
    with pytest.raises(UsageError, match="'Q9_0' is no type"):
        kv_bytes(layers, 512, type_v="Q9_0")
    with pytest.raises(UsageError, match="context 0"):
        kv_bytes(layers, 0)
    with pytest.raises(UnsupportedError, match="one length"):
        kv_bytes((CacheLayer("window", 8, 8, 64), CacheLayer("window", 8, 8, 32)), 512)
