"""config.json of models that people use, as far as their sizes go; none of their weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def _config(
    kind: tuple[str, str],
    sizes: tuple[int, int, int],
    heads: tuple[int, int, int],
    vocab_size: int,
    *,
    positions: int = 32768,
    tied: bool = True,
    **more: Any,
) -> dict[str, Any]:
    """Sizes: width, feed-forward, layers; heads: queries, keys, head size."""
    return {
        "architectures": [kind[0]],
        "model_type": kind[1],
        "hidden_size": sizes[0],
        "intermediate_size": sizes[1],
        "num_hidden_layers": sizes[2],
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": heads[2],
        "vocab_size": vocab_size,
        "max_position_embeddings": positions,
        "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
    } | more


_GEMMA: dict[str, Any] = {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256}
_LLAMA, _QWEN2, _QWEN3 = ("LlamaForCausalLM", "llama"), ("Qwen2ForCausalLM", "qwen2"), ("Qwen3ForCausalLM", "qwen3")
_MOE: dict[str, Any] = {
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}

SHAPES: Mapping[str, dict[str, Any]] = {
    "smollm2-135m": _config(_LLAMA, (576, 1536, 30), (9, 3, 64), 49152),
    "llama-3.2-3b": _config(_LLAMA, (3072, 8192, 28), (24, 8, 128), 128256),
    "qwen2.5-0.5b": _config(_QWEN2, (896, 4864, 24), (14, 2, 64), 151936),
    "qwen3-4b": _config(_QWEN3, (2560, 9728, 36), (32, 8, 128), 151936),
    "qwen3-30b-a3b": _config(
        ("Qwen3MoeForCausalLM", "qwen3_moe"), (2048, 6144, 48), (32, 4, 128), 151936, tied=False, **_MOE
    ),
    "gemma-2-2b": _config(
        ("Gemma2ForCausalLM", "gemma2"), (2304, 9216, 26), (8, 4, 256), 256000, sliding_window=4096, **_GEMMA
    ),
    "gemma-3-1b": _config(
        ("Gemma3ForCausalLM", "gemma3_text"), (1152, 6912, 26), (4, 1, 256), 262144, sliding_window=512, **_GEMMA
    ),
    "phi-3-mini": _config(
        ("Phi3ForCausalLM", "phi3"),
        (3072, 8192, 32),
        (32, 32, 96),
        32064,
        positions=4096,
        tied=False,
        original_max_position_embeddings=4096,
        sliding_window=2047,
    ),
    "olmo-2-1b": _config(("Olmo2ForCausalLM", "olmo2"), (2048, 8192, 16), (16, 16, 128), 100352, tied=False),
    "bitnet-2b": _config(("BitNetForCausalLM", "bitnet"), (2560, 6912, 30), (20, 5, 128), 128256),
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_positions": 1024,
        "vocab_size": 50257,
    },
}
