"""Hybrids of attention with convolutions or Mamba 2: LFM2, Granite 4, Falcon-H1.

Source: llama.cpp's conversion/lfm2.py, granite.py, mamba.py, falcon_h1.py and the graphs of the same names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gguf
from gguf import MODEL_TENSOR

from efficli.errors import CheckpointError, UnsupportedError
from efficli.export.gguf.layout import Field, array, boolean, f32, u32
from efficli.planning.cache import CacheLayer, state_bytes
from efficli.planning.foreign.model import Described
from efficli.planning.foreign.parts import Parts
from efficli.planning.foreign.reading import (
    MAX_EXPERTS,
    Config,
    Sizes,
    expert_fields,
    rope_fields,
    rope_parameters,
    shared_fields,
)

LFM2_DEFAULTS: dict[str, Any] = {
    "vocab_size": 65536,
    "hidden_size": 2560,
    "intermediate_size": 12288,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 128_000,
    "norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": True,
    "conv_L_cache": 3,
    "block_multiple_of": 256,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": True,
}
_MAMBA: dict[str, Any] = {
    "mamba_n_heads": 128,
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_head": "auto",
    "mamba_d_conv": 4,
    "mamba_expand": 2,
}
GRANITE_DEFAULTS: dict[str, Any] = {
    **_MAMBA,
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "shared_intermediate_size": 1024,
}
FALCON_H1_DEFAULTS: dict[str, Any] = {
    **_MAMBA,
    "vocab_size": 128000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "mamba_d_ssm": 1024,
}


def lfm2(config: Config, sizes: Sizes) -> Described:
    """Short gated convolutions, some layers with attention; the last norm is called token_embd_norm."""
    config.only("conv_bias", False)
    length = config.whole("conv_L_cache")
    kinds = config.layer_words("layer_types", sizes.layers)
    chosen = config.get("full_attn_idxs")
    attends = [kind != "conv" for kind in kinds]
    if not kinds:
        attends = [chosen is None or i in config.entries("full_attn_idxs") for i in range(sizes.layers)]
    width = _lfm2_width(config)
    parts = Parts(sizes)
    parts.embedding()
    for parts.layer, attention in enumerate(attends):
        parts.norms()
        if attention:
            parts.attention(head_norms=True)
        else:
            parts.add(MODEL_TENSOR.SHORTCONV_CONV, sizes.hidden, length)
            parts.add(MODEL_TENSOR.SHORTCONV_INPROJ, 3 * sizes.hidden, sizes.hidden)
            parts.add(MODEL_TENSOR.SHORTCONV_OUTPROJ, sizes.hidden, sizes.hidden)
        parts.feed_forward(width)
    parts.end(MODEL_TENSOR.TOKEN_EMBD_NORM)
    fields = shared_fields(sizes, config) | rope_fields(rope_parameters(config), sizes.positions)
    fields |= {
        "feed_forward_length": u32(width),
        "attention.head_count_kv": _per_layer([sizes.kv_heads if attention else 0 for attention in attends]),
        "vocab_size": u32(sizes.vocab),
        "shortconv.l_cache": u32(length),
    }
    state = CacheLayer("state", state_bytes=state_bytes(sizes.hidden * (length - 1), 0))
    full = CacheLayer("full", sizes.kv, sizes.kv)
    cache = [full if attention else state for attention in attends]
    return Described(gguf_arch="lfm2", tensors=parts.tensors, fields=fields, cache=cache)


def _lfm2_width(config: Config) -> int:
    """Width of the feed-forward: two thirds of what is given, times a factor, rounded up."""
    width = config.whole("block_ff_dim" if config.get("block_ff_dim") is not None else "intermediate_size")
    if config.flag("block_auto_adjust_ff_dim"):
        multiple = config.whole("block_multiple_of")
        width = int(2 * width / 3)
        if config.get("block_ffn_dim_multiplier") is not None:
            factor = config.positive("block_ffn_dim_multiplier")
            if factor > MAX_FACTOR:
                raise config.wrong("block_ffn_dim_multiplier", factor, f"at most {MAX_FACTOR}")
            width = int(factor * width)
        width = multiple * ((width + multiple - 1) // multiple)
    return width


MAX_FACTOR = 1024
"""Of the feed-forward's width; more is damage."""


@dataclass(frozen=True, slots=True)
class _Mamba:
    """The sizes of a Mamba 2 layer."""

    inner: int
    heads: int
    groups: int
    state: int
    kernel: int
    conv_bias: bool

    @property
    def conv(self) -> int:
        """Channels of the convolution."""
        return self.inner + 2 * self.groups * self.state

    @property
    def state_bytes(self) -> int:
        """Of one layer, for one sequence."""
        return state_bytes((self.kernel - 1) * self.conv, self.state * self.inner)

    @property
    def fields(self) -> dict[str, Field]:
        return {
            "ssm.conv_kernel": u32(self.kernel),
            "ssm.state_size": u32(self.state),
            "ssm.group_count": u32(self.groups),
            "ssm.inner_size": u32(self.inner),
            "ssm.time_step_rank": u32(self.heads),
        }


def _read_mamba(config: Config, inner: int) -> _Mamba:
    """Heads, groups and the state; CheckpointError where they do not divide each other."""
    config.only("mamba_proj_bias", False)
    heads, groups = config.whole("mamba_n_heads"), config.whole("mamba_n_groups")
    given = config.get("mamba_d_head")
    head = inner // heads if given in (None, "auto") else config.whole("mamba_d_head")
    if head * heads != inner or inner % groups:
        raise CheckpointError(
            f"{heads} Mamba heads of {head} in {groups} groups do not make {inner}", where="config.json"
        )
    state, kernel = config.whole("mamba_d_state"), config.whole("mamba_d_conv")
    return _Mamba(inner, heads, groups, state, kernel, config.flag("mamba_conv_bias", True))


def _add_mamba(parts: Parts, mamba: _Mamba, *, norm: bool) -> None:
    """One Mamba 2 mixer."""
    hidden = parts.sizes.hidden
    parts.add(MODEL_TENSOR.SSM_IN, mamba.inner + mamba.conv + mamba.heads, hidden)
    parts.add(MODEL_TENSOR.SSM_CONV1D, mamba.conv, mamba.kernel)
    if mamba.conv_bias:
        parts.add(MODEL_TENSOR.SSM_CONV1D, mamba.conv, ending=".bias")
    parts.add(MODEL_TENSOR.SSM_DT, mamba.heads, ending=".bias")
    parts.add(MODEL_TENSOR.SSM_A, mamba.heads, 1, ending="")
    parts.add(MODEL_TENSOR.SSM_D, mamba.heads, 1, ending="")
    if norm:
        parts.add(MODEL_TENSOR.SSM_NORM, mamba.groups, mamba.inner // mamba.groups)
    parts.add(MODEL_TENSOR.SSM_OUT, hidden, mamba.inner)


def granite_hybrid(config: Config, sizes: Sizes) -> Described:
    """Mamba 2 or attention in each layer, and a feed-forward or a mixture with a shared expert.

    Models whose layers all attend are written as granite or granitemoe, as the converter does.
    """
    config.only("hidden_act", "silu")
    config.only("attention_bias", False)
    kinds = config.layer_words("layer_types", sizes.layers) or ["mamba"] * sizes.layers
    attends = [kind in ("attention", "full_attention") for kind in kinds]
    mamba = _read_mamba(config, config.whole("mamba_expand") * sizes.hidden)
    if 2 * sizes.hidden != mamba.inner and not all(attends):
        raise UnsupportedError("mamba_expand is not 2: llama.cpp's granitehybrid graph has 2", where="config.json")
    count, used = 0, 0
    fields = {"expert_count": u32(0), "expert_used_count": u32(config.count("num_experts_per_tok"))}
    if config.count("num_local_experts", most=MAX_EXPERTS):
        count, used, fields = expert_fields(config, "num_local_experts")
    width, shared = config.whole("intermediate_size"), config.whole("shared_intermediate_size")
    parts = Parts(sizes)
    parts.embedding()
    for parts.layer, attention in enumerate(attends):
        parts.norms()
        if attention:
            parts.attention()
        else:
            _add_mamba(parts, mamba, norm=True)
        if count:
            parts.experts(count, width)
        parts.feed_forward(shared, "shared" if count else "")
    parts.end()
    fields |= _granite_fields(config, sizes, attends) | mamba.fields
    fields |= {"feed_forward_length": u32(width), "expert_shared_feed_forward_length": u32(shared)}
    full, state = CacheLayer("full", sizes.kv, sizes.kv), CacheLayer("state", state_bytes=mamba.state_bytes)
    arch = "granitehybrid"
    if all(attends):
        arch = "granitemoe" if config.count("num_experts_per_tok") else "granite"
    return Described(
        gguf_arch=arch,
        tensors=parts.tensors,
        fields=fields,
        cache=[full if attention else state for attention in attends],
        num_experts=count,
        experts_per_token=used,
    )


def _granite_fields(config: Config, sizes: Sizes, attends: list[bool]) -> dict[str, Field]:
    """Granite's scales, and which layers attend; a hybrid has no rotary embedding, and its context no limit."""
    fields = shared_fields(sizes, config) | rope_fields(rope_parameters(config), sizes.positions)
    fields |= {
        "vocab_size": u32(sizes.vocab),
        "rope.dimension_count": u32(sizes.head_dim),
        "rope.scaling.finetuned": boolean(all(attends)),
        "attention.head_count_kv": _per_layer([sizes.kv_heads if attention else 0 for attention in attends]),
    }
    if not all(attends):
        fields["context_length"] = u32(1 << 20)
    for key, name in (
        ("attention_multiplier", "attention.scale"),
        ("embedding_multiplier", "embedding_scale"),
        ("residual_multiplier", "residual_scale"),
        ("logits_scaling", "logit_scale"),
    ):
        if config.get(key) is not None:
            fields[name] = f32(config.positive(key))
    return fields


def falcon_h1(config: Config, sizes: Sizes) -> Described:
    """Attention and Mamba 2 side by side in every layer."""
    config.only("hidden_act", "silu")
    for key in ("attention_bias", "mlp_bias", "projectors_bias"):
        config.only(key, False)
    expanded = config.get("mamba_d_ssm") is None
    inner = config.whole("mamba_expand") * sizes.hidden if expanded else config.whole("mamba_d_ssm")
    mamba = _read_mamba(config, inner)
    width = config.whole("intermediate_size")
    parts = Parts(sizes)
    parts.embedding()
    for parts.layer in range(sizes.layers):
        parts.norms(ending="")  # the converter writes blk.N.ffn_norm, without .weight
        _add_mamba(parts, mamba, norm=config.flag("mamba_rms_norm"))
        parts.attention()
        parts.feed_forward(width)
    parts.end()
    fields = shared_fields(sizes, config) | rope_fields(rope_parameters(config), sizes.positions) | mamba.fields
    fields |= {
        "feed_forward_length": u32(width),
        "vocab_size": u32(sizes.vocab),
        "attention.key_length": u32(sizes.head_dim),
        "attention.value_length": u32(sizes.head_dim),
    }
    both = CacheLayer("full", sizes.kv, sizes.kv, state_bytes=mamba.state_bytes)
    return Described(
        gguf_arch="falcon-h1", tensors=parts.tensors, fields=fields, cache=[both] * sizes.layers
    )  # fmt: skip


def _per_layer(values: list[int]) -> Field:
    return array(values, gguf.GGUFValueType.INT32)
