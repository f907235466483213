"""Mixtures of experts with ordinary attention: Mixtral, Qwen2-MoE, gpt-oss.

Source: llama.cpp's conversion/llama.py, qwen.py, gpt_oss.py and the graphs llama, qwen2moe, openai-moe.
"""

from __future__ import annotations

from gguf import MODEL_TENSOR

from efficli.errors import UnsupportedError
from efficli.export.gguf.layout import Field, u32
from efficli.planning.cache import CacheLayer
from efficli.planning.foreign.model import Described
from efficli.planning.foreign.parts import Parts
from efficli.planning.foreign.reading import (
    Config,
    Sizes,
    expert_fields,
    rope_fields,
    rope_parameters,
    shared_fields,
)

MIXTRAL_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
QWEN2_MOE_DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 32768,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts": 60,
    "num_experts_per_tok": 4,
}
GPT_OSS_DEFAULTS = {
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150_000.0,
    "sliding_window": 128,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 4096,
    },
}


def _full(sizes: Sizes) -> list[CacheLayer]:
    return [CacheLayer("full", sizes.kv, sizes.kv)] * sizes.layers


def _needs_output(config: Config, sizes: Sizes) -> None:
    if sizes.tied:
        raise UnsupportedError(
            f"the output matrix is the embedding: llama.cpp wants one of its own for {config.architecture}",
            where="config.json",
        )


def _fields(config: Config, sizes: Sizes, width: int) -> dict[str, Field]:
    fields = shared_fields(sizes, config) | rope_fields(rope_parameters(config), sizes.positions)
    return fields | {"feed_forward_length": u32(width)}


def mixtral(config: Config, sizes: Sizes) -> Described:
    """A Llama whose feed-forward is a mixture; its graph has no window, so every layer keeps the whole context."""
    count, used, fields = expert_fields(config, "num_local_experts")
    width = config.whole("intermediate_size")
    parts = Parts(sizes)
    factors = 0
    if rope_parameters(config).get("rope_type") == "llama3":
        factors = sizes.head_dim // 2
        parts.add(MODEL_TENSOR.ROPE_FREQS, factors)
    parts.embedding()
    for parts.layer in range(sizes.layers):
        parts.norms()
        parts.attention()
        parts.experts(count, width)
    parts.end()
    return Described(
        gguf_arch="llama",
        tensors=parts.tensors,
        fields=_fields(config, sizes, width)
        | fields
        | {"vocab_size": u32(sizes.vocab), "rope.dimension_count": u32(sizes.head_dim)},
        cache=_full(sizes),
        num_experts=count,
        experts_per_token=used,
        num_padding=factors,
    )


def qwen2_moe(config: Config, sizes: Sizes) -> Described:
    """Beside the chosen experts one that every token takes, weighted by a gate."""
    config.only("decoder_sparse_step", 1)
    config.only("mlp_only_layers", None, [])
    _needs_output(config, sizes)
    count, used, fields = expert_fields(config, "num_experts")
    width, shared = config.whole("moe_intermediate_size"), config.whole("shared_expert_intermediate_size")
    parts = Parts(sizes)
    parts.embedding()
    for parts.layer in range(sizes.layers):
        parts.norms()
        parts.attention(biases=config.flag("qkv_bias", True))
        parts.experts(count, width)
        parts.add(MODEL_TENSOR.FFN_GATE_INP_SHEXP, 1, sizes.hidden)
        parts.feed_forward(shared, "shared")
    parts.end()
    fields |= {"expert_feed_forward_length": u32(width), "expert_shared_feed_forward_length": u32(shared)}
    return Described(
        gguf_arch="qwen2moe",
        tensors=parts.tensors,
        fields=_fields(config, sizes, config.whole("intermediate_size")) | fields,
        cache=_full(sizes),
        num_experts=count,
        experts_per_token=used,
    )


def gpt_oss(config: Config, sizes: Sizes) -> Described:
    """Biases everywhere, attention sinks, every other layer with a window; published with experts in MXFP4."""
    config.only("attention_bias", True)
    _needs_output(config, sizes)
    alternate = ["full_attention" if i % 2 else "sliding_attention" for i in range(sizes.layers)]
    if (config.layer_words("layer_types", sizes.layers) or alternate) != alternate:
        raise UnsupportedError("layer_types do not alternate: llama.cpp's gpt-oss graph does", where="config.json")
    count, used, fields = expert_fields(config, "num_local_experts")
    width, window = config.whole("intermediate_size"), config.whole("sliding_window")
    parts = Parts(sizes)
    parts.embedding()
    for parts.layer in range(sizes.layers):
        parts.norms(MODEL_TENSOR.ATTN_POST_NORM)
        parts.attention(biases=True, out_bias=True)
        parts.add(MODEL_TENSOR.ATTN_SINKS, sizes.heads)
        parts.experts(count, width, biases=True)
    parts.end()
    fields |= {"expert_feed_forward_length": u32(width), "attention.sliding_window": u32(window)}
    near, full = CacheLayer("window", sizes.kv, sizes.kv, window), CacheLayer("full", sizes.kv, sizes.kv)
    stored = config.get("quantization_config") is not None
    return Described(
        gguf_arch="gpt-oss",
        tensors=parts.tensors,
        fields=_fields(config, sizes, width) | fields,
        cache=[full if i % 2 else near for i in range(sizes.layers)],
        num_experts=count,
        experts_per_token=used,
        only_types=("MXFP4_MOE",) if stored else None,
        notes=("experts are stored in MXFP4 and stay as they are",) if stored else (),
    )
