"""The tensors of each family: Hugging Face names, roles and shapes.

A role says what a tensor does; exporters map roles to their own names.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor of a family: its name (`{i}` layer, `{e}` expert), what it is, and its shape in letters.

    Letters: V vocabulary, D hidden, F feed-forward, Q heads x head_dim, K key/value heads x head_dim, H head_dim,
    P positions, T token types, E experts, M feed-forward of an expert; "3D", "2F" multiply; "Q+2K" adds.
    """

    name: str
    role: str
    shape: tuple[str, ...]
    when: str = ""
    """The `ModelShape` attribute that must be true for the tensor to exist; empty: always."""


_EMBEDDING = Weight("embed_tokens.weight", "embedding", ("V", "D"))
_OUTPUT_NORM = Weight("norm.weight", "output_norm", ("D",))
_ATTENTION = (
    Weight("layers.{i}.self_attn.q_proj.weight", "attn_q", ("Q", "D")),
    Weight("layers.{i}.self_attn.q_proj.bias", "attn_q", ("Q",), "qkv_bias"),
    Weight("layers.{i}.self_attn.k_proj.weight", "attn_k", ("K", "D")),
    Weight("layers.{i}.self_attn.k_proj.bias", "attn_k", ("K",), "qkv_bias"),
    Weight("layers.{i}.self_attn.v_proj.weight", "attn_v", ("K", "D")),
    Weight("layers.{i}.self_attn.v_proj.bias", "attn_v", ("K",), "qkv_bias"),
    Weight("layers.{i}.self_attn.o_proj.weight", "attn_out", ("D", "Q")),
    Weight("layers.{i}.self_attn.o_proj.bias", "attn_out", ("D",), "out_bias"),
)
_HEAD_NORMS = (
    Weight("layers.{i}.self_attn.q_norm.weight", "attn_q_norm", ("H",)),
    Weight("layers.{i}.self_attn.k_norm.weight", "attn_k_norm", ("H",)),
)
_MLP = (
    Weight("layers.{i}.mlp.gate_proj.weight", "ffn_gate", ("F", "D")),
    Weight("layers.{i}.mlp.gate_proj.bias", "ffn_gate", ("F",), "mlp_bias"),
    Weight("layers.{i}.mlp.up_proj.weight", "ffn_up", ("F", "D")),
    Weight("layers.{i}.mlp.up_proj.bias", "ffn_up", ("F",), "mlp_bias"),
    Weight("layers.{i}.mlp.down_proj.weight", "ffn_down", ("D", "F")),
    Weight("layers.{i}.mlp.down_proj.bias", "ffn_down", ("D",), "mlp_bias"),
)
_EXPERTS = (
    Weight("layers.{i}.mlp.gate.weight", "router", ("E", "D")),
    Weight("layers.{i}.mlp.experts.{e}.gate_proj.weight", "expert_gate", ("M", "D")),
    Weight("layers.{i}.mlp.experts.{e}.up_proj.weight", "expert_up", ("M", "D")),
    Weight("layers.{i}.mlp.experts.{e}.down_proj.weight", "expert_down", ("D", "M")),
)
FUSED_EXPERTS = (
    Weight("layers.{i}.mlp.experts.gate_up_proj", "expert_gate_up", ("E", "2M", "D")),
    Weight("layers.{i}.mlp.experts.down_proj", "expert_down", ("E", "D", "M")),
)
"""How transformers 5 holds experts in memory; some tools save them so."""
_PRE_NORMS = (
    Weight("layers.{i}.input_layernorm.weight", "attn_norm", ("D",)),
    Weight("layers.{i}.post_attention_layernorm.weight", "ffn_norm", ("D",)),
)
_SANDWICH_NORMS = (
    Weight("layers.{i}.input_layernorm.weight", "attn_norm", ("D",)),
    Weight("layers.{i}.post_attention_layernorm.weight", "attn_post_norm", ("D",)),
    Weight("layers.{i}.pre_feedforward_layernorm.weight", "ffn_norm", ("D",)),
    Weight("layers.{i}.post_feedforward_layernorm.weight", "ffn_post_norm", ("D",)),
)
LLAMA = (_EMBEDDING, *_PRE_NORMS, *_ATTENTION, *_MLP, _OUTPUT_NORM)
GEMMA3 = (_EMBEDDING, *_SANDWICH_NORMS, *_ATTENTION, *_HEAD_NORMS, *_MLP, _OUTPUT_NORM)
GEMMA2 = (_EMBEDDING, *_SANDWICH_NORMS, *_ATTENTION, *_MLP, _OUTPUT_NORM)
QWEN3_MOE = (_EMBEDDING, *_PRE_NORMS, *_ATTENTION, *_HEAD_NORMS, *_EXPERTS, _OUTPUT_NORM)
QWEN3 = (_EMBEDDING, *_PRE_NORMS, *_ATTENTION, *_HEAD_NORMS, *_MLP, _OUTPUT_NORM)
PHI3 = (
    _EMBEDDING,
    *_PRE_NORMS,
    Weight("layers.{i}.self_attn.qkv_proj.weight", "attn_qkv", ("Q+2K", "D")),
    Weight("layers.{i}.self_attn.o_proj.weight", "attn_out", ("D", "Q")),
    Weight("layers.{i}.mlp.gate_up_proj.weight", "ffn_gate_up", ("2F", "D")),
    Weight("layers.{i}.mlp.down_proj.weight", "ffn_down", ("D", "F")),
    _OUTPUT_NORM,
)
GPT2 = (
    Weight("wte.weight", "embedding", ("V", "D")),
    Weight("wpe.weight", "positions", ("P", "D")),
    Weight("h.{i}.ln_1.weight", "attn_norm", ("D",)),
    Weight("h.{i}.ln_1.bias", "attn_norm", ("D",)),
    Weight("h.{i}.attn.c_attn.weight", "attn_qkv", ("D", "3D")),
    Weight("h.{i}.attn.c_attn.bias", "attn_qkv", ("3D",)),
    Weight("h.{i}.attn.c_proj.weight", "attn_out", ("D", "D")),
    Weight("h.{i}.attn.c_proj.bias", "attn_out", ("D",)),
    Weight("h.{i}.ln_2.weight", "ffn_norm", ("D",)),
    Weight("h.{i}.ln_2.bias", "ffn_norm", ("D",)),
    Weight("h.{i}.mlp.c_fc.weight", "ffn_up", ("D", "F")),
    Weight("h.{i}.mlp.c_fc.bias", "ffn_up", ("F",)),
    Weight("h.{i}.mlp.c_proj.weight", "ffn_down", ("F", "D")),
    Weight("h.{i}.mlp.c_proj.bias", "ffn_down", ("D",)),
    Weight("ln_f.weight", "output_norm", ("D",)),
    Weight("ln_f.bias", "output_norm", ("D",)),
)
OLMO2 = (
    _EMBEDDING,
    Weight("layers.{i}.post_attention_layernorm.weight", "attn_post_norm", ("D",)),
    Weight("layers.{i}.post_feedforward_layernorm.weight", "ffn_post_norm", ("D",)),
    *_ATTENTION,
    Weight("layers.{i}.self_attn.q_norm.weight", "attn_q_norm", ("Q",)),
    Weight("layers.{i}.self_attn.k_norm.weight", "attn_k_norm", ("K",)),
    *_MLP,
    _OUTPUT_NORM,
)
BITNET = (
    _EMBEDDING,
    *_PRE_NORMS,
    *_ATTENTION,
    Weight("layers.{i}.self_attn.attn_sub_norm.weight", "attn_sub_norm", ("D",)),
    *_MLP,
    Weight("layers.{i}.mlp.ffn_sub_norm.weight", "ffn_sub_norm", ("F",)),
    _OUTPUT_NORM,
)
BERT = (
    Weight("embeddings.word_embeddings.weight", "embedding", ("V", "D")),
    Weight("embeddings.position_embeddings.weight", "positions", ("P", "D")),
    Weight("embeddings.token_type_embeddings.weight", "token_types", ("T", "D")),
    Weight("embeddings.LayerNorm.weight", "embedding_norm", ("D",)),
    Weight("embeddings.LayerNorm.bias", "embedding_norm", ("D",)),
    Weight("encoder.layer.{i}.attention.self.query.weight", "attn_q", ("D", "D")),
    Weight("encoder.layer.{i}.attention.self.query.bias", "attn_q", ("D",)),
    Weight("encoder.layer.{i}.attention.self.key.weight", "attn_k", ("D", "D")),
    Weight("encoder.layer.{i}.attention.self.key.bias", "attn_k", ("D",)),
    Weight("encoder.layer.{i}.attention.self.value.weight", "attn_v", ("D", "D")),
    Weight("encoder.layer.{i}.attention.self.value.bias", "attn_v", ("D",)),
    Weight("encoder.layer.{i}.attention.output.dense.weight", "attn_out", ("D", "D")),
    Weight("encoder.layer.{i}.attention.output.dense.bias", "attn_out", ("D",)),
    Weight("encoder.layer.{i}.attention.output.LayerNorm.weight", "attn_out_norm", ("D",)),
    Weight("encoder.layer.{i}.attention.output.LayerNorm.bias", "attn_out_norm", ("D",)),
    Weight("encoder.layer.{i}.intermediate.dense.weight", "ffn_up", ("F", "D")),
    Weight("encoder.layer.{i}.intermediate.dense.bias", "ffn_up", ("F",)),
    Weight("encoder.layer.{i}.output.dense.weight", "ffn_down", ("D", "F")),
    Weight("encoder.layer.{i}.output.dense.bias", "ffn_down", ("D",)),
    Weight("encoder.layer.{i}.output.LayerNorm.weight", "layer_out_norm", ("D",)),
    Weight("encoder.layer.{i}.output.LayerNorm.bias", "layer_out_norm", ("D",)),
)
