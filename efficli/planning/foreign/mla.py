"""DeepSeek V2 and V3: multi-head latent attention and a mixture of experts.

Source: llama.cpp's conversion/deepseek.py and src/models/deepseek2.cpp.
"""

from __future__ import annotations

from gguf import MODEL_TENSOR, ExpertGatingFuncType

from efficli.errors import CheckpointError
from efficli.export.gguf.layout import Field, boolean, f32, u32
from efficli.planning.cache import CacheLayer
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

V2_DEFAULTS = {
    "vocab_size": 102400,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "first_k_dense_replace": 0,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": False,
    "moe_intermediate_size": 1407,
}
V3_DEFAULTS = {
    **V2_DEFAULTS,
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "max_position_embeddings": 4096,
    "first_k_dense_replace": 3,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "routed_scaling_factor": 2.5,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "moe_intermediate_size": 2048,
}
_LITE = (26, 27)
"""Numbers of layers of models without a low rank of queries (`is_lite` of deepseek2.cpp)."""
_GATING = {"softmax": ExpertGatingFuncType.SOFTMAX, "sigmoid": ExpertGatingFuncType.SIGMOID}


def describe(config: Config, sizes: Sizes) -> Described:
    """Keys and values are one latent vector; the matrix that expands it is split in two, as llama.cpp multiplies them.

    Blocks that predict further tokens (`num_nextn_predict_layers`) are left out, as the converter does.
    """
    config.only("attention_bias", False)
    config.only("moe_layer_freq", 1, None)
    if sizes.kv_heads != sizes.heads:
        raise CheckpointError(f"{sizes.kv_heads} key/value heads for {sizes.heads} heads of MLA", where="config.json")
    latent, rotary = config.whole("kv_lora_rank"), config.whole("qk_rope_head_dim")
    count, used, fields = expert_fields(config, "n_routed_experts")
    parts = Parts(sizes)
    parts.embedding()
    dense = config.count("first_k_dense_replace")
    shared, width = config.count("n_shared_experts", most=MAX_EXPERTS), config.whole("moe_intermediate_size")
    for parts.layer in range(sizes.layers):
        parts.norms()
        _attention(parts, config, latent, rotary)
        if parts.layer < dense:
            parts.feed_forward(config.whole("intermediate_size"))
            continue
        parts.experts(count, width)
        if config.architecture == "DeepseekV3ForCausalLM":
            parts.add(MODEL_TENSOR.FFN_EXP_PROBS_B, count, ending=".bias")
        if shared:
            parts.feed_forward(shared * width, "shared")
    parts.end()
    return Described(
        gguf_arch="deepseek2",
        tensors=parts.tensors,
        fields=_fields(config, sizes, latent, rotary) | fields | _expert_details(config, dense, shared, width),
        cache=[CacheLayer("latent", latent + rotary)] * sizes.layers,
        num_experts=count,
        experts_per_token=used,
        notes=_notes(config, sizes),
    )


def _notes(config: Config, sizes: Sizes) -> tuple[str, ...]:
    """llama.cpp tells models without a low rank of queries by their number of layers."""
    lite = sizes.layers in _LITE or (sizes.layers, sizes.vocab) == (48, 128256)
    if lite == (config.get("q_lora_rank") is None):
        return ()
    has = "no low rank of queries" if lite else "a low rank of queries"
    return (f"llama.cpp does not load it: it expects {has} in a model of {sizes.layers} layers",)


def _attention(parts: Parts, config: Config, latent: int, rotary: int) -> None:
    """Queries, through a narrow matrix or not; the latent vector; what expands it; output."""
    sizes = parts.sizes
    plain, value = config.whole("qk_nope_head_dim"), config.whole("v_head_dim")
    queries = sizes.heads * (plain + rotary)
    if config.get("q_lora_rank") is None:
        parts.add(MODEL_TENSOR.ATTN_Q, queries, sizes.hidden)
    else:
        rank = config.whole("q_lora_rank")
        parts.add(MODEL_TENSOR.ATTN_Q_A, rank, sizes.hidden)
        parts.add(MODEL_TENSOR.ATTN_Q_A_NORM, rank)
        parts.add(MODEL_TENSOR.ATTN_Q_B, queries, rank)
    parts.add(MODEL_TENSOR.ATTN_KV_A_MQA, latent + rotary, sizes.hidden)
    parts.add(MODEL_TENSOR.ATTN_KV_A_NORM, latent)
    parts.add(MODEL_TENSOR.ATTN_K_B, sizes.heads, latent, plain)
    parts.add(MODEL_TENSOR.ATTN_V_B, sizes.heads, value, latent)
    parts.add(MODEL_TENSOR.ATTN_OUT, sizes.hidden, sizes.heads * value)


def _fields(config: Config, sizes: Sizes, latent: int, rotary: int) -> dict[str, Field]:
    """Attention: one key/value head as wide as the latent vector and the rotated part."""
    rope = rope_parameters(config)
    fields = shared_fields(sizes, config) | rope_fields(rope, sizes.positions)
    fields |= {
        "feed_forward_length": u32(config.whole("intermediate_size")),
        "vocab_size": u32(sizes.vocab),
        "attention.head_count_kv": u32(1),
        "attention.kv_lora_rank": u32(latent),
        "attention.key_length": u32(latent + rotary),
        "attention.value_length": u32(latent),
        "attention.key_length_mla": u32(config.whole("qk_nope_head_dim") + rotary),
        "attention.value_length_mla": u32(config.whole("v_head_dim")),
        "rope.dimension_count": u32(rotary),
    }
    if config.get("q_lora_rank") is not None:
        fields["attention.q_lora_rank"] = u32(config.whole("q_lora_rank"))
    if rope.get("mscale_all_dim") is not None:
        fields["rope.scaling.yarn_log_multiplier"] = f32(0.1 * rope.real("mscale_all_dim"))
    return fields


def _expert_details(config: Config, dense: int, shared: int, width: int) -> dict[str, Field]:
    """How experts are chosen and weighted."""
    fields = {
        "leading_dense_block_count": u32(dense),
        "expert_feed_forward_length": u32(width),
        "expert_shared_count": u32(shared),
        "expert_weights_scale": f32(config.positive("routed_scaling_factor")),
    }
    if config.flag("norm_topk_prob"):
        fields["expert_weights_norm"] = boolean(True)
    for key, name in (("n_group", "expert_group_count"), ("topk_group", "expert_group_used_count")):
        if config.get(key) is not None:
            fields[name] = u32(config.whole(key))
    if config.get("scoring_func") is not None:
        scoring = config.word("scoring_func", "softmax")
        if scoring not in _GATING:
            raise config.wrong("scoring_func", scoring, " or ".join(_GATING))
        fields["expert_gating_func"] = u32(_GATING[scoring].value)
    return fields
