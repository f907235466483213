"""What each model family is, as data: weights, norms, activations, windows, scales, defaults.

The names are those that Hugging Face checkpoints use, the defaults those that transformers applies to a config.json
that leaves a key out. Only `gguf_arch` belongs to an output format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from efficli.families import weights
from efficli.families.weights import Weight

NormPlace = Literal["before", "after", "both", "output"]
"""Where a block normalises: before each sub-layer (Llama); after its residual sum (BERT); before it and on its output
(Gemma); only on its output, before the residual sum (OLMo 2)."""

Windows = Literal["none", "all", "from_layer", "alternate", "every_sixth_full", "layer_types"]
"""Which layers see a sliding window where config.json has no `layer_types`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One model family. Values that a config.json can change are its defaults here."""

    name: str
    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    gguf_arch: str
    weights: tuple[Weight, ...]
    prefixes: tuple[str, ...] = ("model.", "")
    """What may stand before the names of `weights` (but not before `head`), the usual one first."""
    head: str = "lm_head.weight"
    """Name of the output matrix (V, D); empty: there is none."""
    ignored: tuple[str, ...] = ()
    """Regular expressions of tensors that a checkpoint may hold and no runtime needs."""
    keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """config.json's names for a value, the first one found counts; where they differ from the Llama one."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    norm: Literal["rms", "layer"] = "rms"
    norm_offset: float = 0.0
    """Added to a norm's weight before it multiplies (Gemma: 1)."""
    norm_place: NormPlace = "before"
    qk_norm: Literal["", "head", "all"] = ""
    """RMS norm of queries and keys before the rotary embedding: per head, or over all heads together."""
    sub_norms: bool = False
    """A norm before the output projection of attention and before the down projection (BitNet)."""
    gated: bool = True
    """Feed-forward is down(act(gate x) * up x); otherwise down(act(up x))."""
    fused: bool = False
    """q, k, v are one matrix, in this order; with `gated`, gate and up too."""
    transposed: bool = False
    """Matrices inside blocks are stored (in, out), as Conv1D does."""
    positions: Literal["rope", "learned"] = "rope"
    causal: bool = True
    scale_embedding: bool = False
    """Embeddings are multiplied by sqrt(hidden size)."""
    scale_from_query_scalar: bool = False
    """Attention scores are scaled by 1/sqrt(query_pre_attn_scalar), not by 1/sqrt(head_dim)."""
    windows: Windows = "none"
    bias_flags: tuple[str, ...] = ()
    """Which of attention_bias (q, k, v and output) and mlp_bias config.json may set."""
    biases: frozenset[str] = frozenset()
    """Biases that the family always has: "qkv", "out", "mlp"."""
    experts: bool = False
    grouped: bool = True
    """Several query heads may share a key/value head."""
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Values of config.json other than these choose code that this table does not describe."""


_ROTARY = (r"rotary_emb\.inv_freq$",)
_GEMMA_DEFAULTS = {
    "head_dim": 256,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
    "hidden_act": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}

LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM", "LLaMAForCausalLM"),
    model_types=("llama",),
    gguf_arch="llama",
    weights=weights.LLAMA,
    ignored=_ROTARY,
    bias_flags=("attention_bias", "mlp_bias"),
)
MISTRAL = Family(
    name="mistral",
    architectures=("MistralForCausalLM",),
    model_types=("mistral",),
    gguf_arch="llama",
    weights=weights.LLAMA,
    ignored=_ROTARY,
    defaults={"num_key_value_heads": 8, "sliding_window": 4096},
    windows="all",
)
QWEN2 = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    model_types=("qwen2",),
    gguf_arch="qwen2",
    weights=weights.LLAMA,
    ignored=_ROTARY,
    defaults={"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    windows="from_layer",
    biases=frozenset({"qkv"}),
)
QWEN3 = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    model_types=("qwen3",),
    gguf_arch="qwen3",
    weights=weights.QWEN3,
    ignored=_ROTARY,
    defaults={"head_dim": 128, "num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    qk_norm="head",
    windows="from_layer",
    bias_flags=("attention_bias",),
)
QWEN3_MOE = Family(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    model_types=("qwen3_moe",),
    gguf_arch="qwen3moe",
    weights=weights.QWEN3_MOE,
    ignored=_ROTARY,
    keys={"num_experts": ("num_experts", "num_local_experts")},
    defaults={"num_key_value_heads": 4, "sliding_window": 4096, "num_experts": 128, "num_experts_per_tok": 8},
    qk_norm="head",
    windows="all",
    bias_flags=("attention_bias",),
    experts=True,
)
GEMMA2 = Family(
    name="gemma2",
    architectures=("Gemma2ForCausalLM",),
    model_types=("gemma2",),
    gguf_arch="gemma2",
    weights=weights.GEMMA2,
    ignored=_ROTARY,
    keys={"hidden_act": ("hidden_activation",)},
    defaults={**_GEMMA_DEFAULTS, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    norm_offset=1.0,
    norm_place="both",
    scale_embedding=True,
    scale_from_query_scalar=True,
    windows="alternate",
    bias_flags=("attention_bias",),
    only={"use_bidirectional_attention": (None, False)},
)
GEMMA3 = Family(
    name="gemma3",
    architectures=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    model_types=("gemma3_text", "gemma3"),
    gguf_arch="gemma3",
    weights=weights.GEMMA3,
    prefixes=("model.", "language_model.model.", "model.language_model.", ""),
    ignored=(*_ROTARY, r"(^|\.)vision_tower\.", r"(^|\.)multi_modal_projector\."),
    keys={"hidden_act": ("hidden_activation",)},
    defaults={
        **_GEMMA_DEFAULTS,
        "hidden_size": 2304,
        "num_hidden_layers": 26,
        "intermediate_size": 9216,
        "num_attention_heads": 8,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
    },
    norm_offset=1.0,
    norm_place="both",
    qk_norm="head",
    scale_embedding=True,
    scale_from_query_scalar=True,
    windows="every_sixth_full",
    bias_flags=("attention_bias",),
    only={"use_bidirectional_attention": (None, False)},
)
PHI3 = Family(
    name="phi3",
    architectures=("Phi3ForCausalLM",),
    model_types=("phi3",),
    gguf_arch="phi3",
    weights=weights.PHI3,
    ignored=_ROTARY,
    defaults={"original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    fused=True,
    windows="all",
)
GPT2 = Family(
    name="gpt2",
    architectures=("GPT2LMHeadModel",),
    model_types=("gpt2",),
    gguf_arch="gpt2",
    weights=weights.GPT2,
    prefixes=("transformer.", ""),
    ignored=(r"\.attn\.(masked_)?bias$",),
    keys={
        "hidden_size": ("n_embd", "hidden_size"),
        "num_hidden_layers": ("n_layer", "num_hidden_layers"),
        "num_attention_heads": ("n_head", "num_attention_heads"),
        "max_position_embeddings": ("n_positions", "max_position_embeddings"),
        "intermediate_size": ("n_inner",),
        "hidden_act": ("activation_function",),
        "rms_norm_eps": ("layer_norm_epsilon",),
    },
    defaults={
        "hidden_act": "gelu_new",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "max_position_embeddings": 1024,
    },
    norm="layer",
    gated=False,
    fused=True,
    transposed=True,
    positions="learned",
    biases=frozenset({"qkv", "out", "mlp"}),
    grouped=False,
    only={
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
)
GRANITE = Family(
    name="granite",
    architectures=("GraniteForCausalLM",),
    model_types=("granite",),
    gguf_arch="granite",
    weights=weights.LLAMA,
    ignored=_ROTARY,
    bias_flags=("attention_bias", "mlp_bias"),
)
OLMO2 = Family(
    name="olmo2",
    architectures=("Olmo2ForCausalLM",),
    model_types=("olmo2",),
    gguf_arch="olmo2",
    weights=weights.OLMO2,
    ignored=_ROTARY,
    defaults={"rms_norm_eps": 1e-5},
    norm_place="output",
    qk_norm="all",
    bias_flags=("attention_bias",),
)
SMOLLM3 = Family(
    name="smollm3",
    architectures=("SmolLM3ForCausalLM",),
    model_types=("smollm3",),
    gguf_arch="smollm3",
    weights=weights.LLAMA,
    ignored=_ROTARY,
    defaults={
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "rope_theta": 2_000_000.0,
        "no_rope_layer_interval": 4,
    },
    windows="layer_types",
    bias_flags=("attention_bias", "mlp_bias"),
)
BITNET = Family(
    name="bitnet",
    architectures=("BitNetForCausalLM", "BitnetForCausalLM"),
    model_types=("bitnet",),
    gguf_arch="bitnet",
    weights=weights.BITNET,
    ignored=_ROTARY,
    defaults={"num_key_value_heads": 5, "hidden_act": "relu2", "rms_norm_eps": 1e-5, "rope_theta": 500_000.0},
    sub_norms=True,
    bias_flags=("attention_bias",),
)
BERT = Family(
    name="bert",
    architectures=("BertModel", "BertForMaskedLM"),
    model_types=("bert",),
    gguf_arch="bert",
    weights=weights.BERT,
    prefixes=("", "bert."),
    head="",
    ignored=(r"embeddings\.position_ids$", r"(^|\.)pooler\.", r"^cls\."),
    keys={"rms_norm_eps": ("layer_norm_eps",)},
    defaults={"hidden_act": "gelu", "rms_norm_eps": 1e-12, "tie_word_embeddings": True, "max_position_embeddings": 512},
    norm="layer",
    norm_place="after",
    gated=False,
    positions="learned",
    causal=False,
    biases=frozenset({"qkv", "out", "mlp"}),
    grouped=False,
    only={"position_embedding_type": ("absolute",), "is_decoder": (False,), "add_cross_attention": (False,)},
)

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        family.name: family
        for family in (
            LLAMA, MISTRAL, QWEN2, QWEN3, QWEN3_MOE, GEMMA2, GEMMA3, PHI3, GPT2, GRANITE, OLMO2, SMOLLM3, BITNET, BERT,
        )
    }
)  # fmt: skip
"""Every supported family by name."""
