"""Qwen3-Next: gated delta nets and attention with a mixture of experts (conversion/qwen.py, qwen3next.cpp)."""

from __future__ import annotations

from typing import Any

import gguf
from gguf import MODEL_TENSOR

from efficli.errors import CheckpointError
from efficli.export.gguf.layout import Field, array, u32
from efficli.planning.cache import CacheLayer, state_bytes
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

DEFAULTS: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "mtp_num_hidden_layers": 1,
    "full_attention_interval": 4,
    "partial_rotary_factor": 0.25,
}


def describe(config: Config, sizes: Sizes) -> Described:
    """Three layers of four keep a state, the fourth attends; one more block predicts a second token.

    config.json does not tell of that block; the published checkpoints have one, and the converter writes it.
    """
    config.only("decoder_sparse_step", 1)
    config.only("mlp_only_layers", None, [])
    config.only("attention_bias", False)
    interval = config.whole("full_attention_interval")
    kinds = config.layer_words("layer_types", sizes.layers)
    attends = [kind != "linear_attention" for kind in kinds]
    if not kinds:
        attends = [(i + 1) % interval == 0 for i in range(sizes.layers)]
    ahead = config.count("mtp_num_hidden_layers", 1, most=64)
    count, used, fields = expert_fields(config, "num_experts")
    width, shared = config.whole("moe_intermediate_size"), config.whole("shared_expert_intermediate_size")
    parts = Parts(sizes)
    parts.embedding()
    for parts.layer, attention in enumerate([*attends, *[True] * ahead]):
        parts.norms(MODEL_TENSOR.ATTN_POST_NORM)
        if attention:
            parts.attention(head_norms=True, twice=2)
        else:
            _delta_net(parts, config)
        parts.experts(count, width)
        parts.add(MODEL_TENSOR.FFN_GATE_INP_SHEXP, 1, sizes.hidden)
        parts.feed_forward(shared, "shared")
        if parts.layer == sizes.layers:
            parts.add(MODEL_TENSOR.NEXTN_EH_PROJ, sizes.hidden, 2 * sizes.hidden)
            for kind in (MODEL_TENSOR.NEXTN_ENORM, MODEL_TENSOR.NEXTN_HNORM, MODEL_TENSOR.NEXTN_SHARED_HEAD_NORM):
                parts.add(kind, sizes.hidden)
    parts.end()
    fields |= _fields(config, sizes, attends, ahead)
    fields |= {"expert_feed_forward_length": u32(width), "expert_shared_feed_forward_length": u32(shared)}
    return Described(
        gguf_arch="qwen3next",
        tensors=parts.tensors,
        fields=fields,
        cache=_cache(config, sizes, attends),
        num_experts=count,
        experts_per_token=used,
        notes=(f"{ahead} block that predicts a further token is counted, as published checkpoints have it",)
        if ahead and config.config.get("mtp_num_hidden_layers") is None
        else (),
    )


def _lengths(config: Config) -> tuple[int, int]:
    """All key heads together, all value heads together; CheckpointError where heads do not fit each other."""
    key_heads, value_heads = config.whole("linear_num_key_heads"), config.whole("linear_num_value_heads")
    key, value = config.whole("linear_key_head_dim"), config.whole("linear_value_head_dim")
    if value_heads % key_heads or key != value:
        raise CheckpointError(
            f"{value_heads} value heads of {value} for {key_heads} key heads of {key}: expected a multiple of the same",
            where="config.json",
        )
    return key_heads * key, value_heads * value


def _delta_net(parts: Parts, config: Config) -> None:
    """One gated delta net: q, k and v in one matrix, the gate z in another."""
    keys, values = _lengths(config)
    heads, hidden = config.whole("linear_num_value_heads"), parts.sizes.hidden
    parts.add(MODEL_TENSOR.ATTN_QKV, 2 * keys + values, hidden)
    parts.add(MODEL_TENSOR.ATTN_GATE, values, hidden)
    parts.add(MODEL_TENSOR.SSM_BETA_ALPHA, 2 * heads, hidden)
    parts.add(MODEL_TENSOR.SSM_CONV1D, 2 * keys + values, config.whole("linear_conv_kernel_dim"))
    parts.add(MODEL_TENSOR.SSM_DT, heads, ending=".bias")
    parts.add(MODEL_TENSOR.SSM_A, heads, ending="")
    parts.add(MODEL_TENSOR.SSM_NORM, config.whole("linear_value_head_dim"))
    parts.add(MODEL_TENSOR.SSM_OUT, hidden, values)


def _cache(config: Config, sizes: Sizes, attends: list[bool]) -> list[CacheLayer]:
    """The block that predicts a further token keeps nothing in an ordinary context."""
    keys, values = _lengths(config)
    conv = (config.whole("linear_conv_kernel_dim") - 1) * (values + 2 * keys)
    state = state_bytes(conv, config.whole("linear_key_head_dim") * values)
    full, linear = CacheLayer("full", sizes.kv, sizes.kv), CacheLayer("state", state_bytes=state)
    return [full if attention else linear for attention in attends]


def _fields(config: Config, sizes: Sizes, attends: list[bool], ahead: int) -> dict[str, Field]:
    """Linear attention in the words of Mamba, and which layers have it."""
    rope = rope_parameters(config)
    part = rope.positive("partial_rotary_factor", config.positive("partial_rotary_factor"))
    if part > 1.0:
        raise config.wrong("partial_rotary_factor", part, "at most 1")
    fields = shared_fields(sizes, config) | rope_fields(rope, sizes.positions)
    fields |= {
        "block_count": u32(sizes.layers + ahead),
        "feed_forward_length": u32(config.whole("intermediate_size")),
        "ssm.conv_kernel": u32(config.whole("linear_conv_kernel_dim")),
        "ssm.state_size": u32(config.whole("linear_key_head_dim")),
        "ssm.group_count": u32(config.whole("linear_num_key_heads")),
        "ssm.time_step_rank": u32(config.whole("linear_num_value_heads")),
        "ssm.inner_size": u32(_lengths(config)[1]),
        "full_attention_interval": u32(config.whole("full_attention_interval")),
        "rope.dimension_count": u32(int(sizes.head_dim * part)),
        "attention.recurrent_layers": array(
            [not attention for attention in attends] + [False] * ahead, gguf.GGUFValueType.BOOL
        ),
    }
    if ahead:
        fields["nextn_predict_layers"] = u32(ahead)
    return fields
