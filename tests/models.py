"""Tiny models of every family, built by transformers from a config, every parameter perturbed; no tokenizer."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

VOCAB = 96
POSITIONS = 512
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 256}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}


def longrope(pairs: int, original: int, *, factor: float | None = None) -> dict[str, Any]:
    """LongRoPE parameters for `pairs` rotated pairs."""
    parameters = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.05 * i for i in range(pairs)],
        "long_factor": [1.5 + 0.4 * i for i in range(pairs)],
        "original_max_position_embeddings": original,
    }
    return parameters | ({"factor": factor} if factor else {})


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"head_dim": 24}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "head_dim": 32,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "norm_topk_prob": True,
        },
    ),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 64,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 9.0,
        },
    ),
    "gemma3": (
        "Gemma3Text",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64, "num_hidden_layers": 7},
    ),
    "phi3": ("Phi3", {"original_max_position_embeddings": 1024}),
    "gpt2": ("GPT2", {}),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.15,
            "logits_scaling": 5.0,
        },
    ),
    "olmo2": ("Olmo2", {}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 5, "use_sliding_window": False, "pad_token_id": 0}),
    "bitnet": ("BitNet", {"hidden_act": "silu", "tie_word_embeddings": True}),
    "bert": ("Bert", {}),
}
"""Family -> the stem of transformers' class names, and what its config says besides SMALL."""


def build(family: str, **overrides: Any) -> Any:
    """A model of the family in float32, eager attention, evaluation mode; parameters are the same in every call."""
    import torch
    import transformers

    stem, extra = FAMILIES[family]
    values = SMALL | extra | overrides
    if family == "gpt2":
        kept = ("vocab_size", "bos_token_id", "eos_token_id")
        sizes = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": POSITIONS, "n_inner": 160}
        values = {key: values[key] for key in kept} | sizes | overrides
    if family == "bert":
        del values["num_key_value_heads"]
    if int(transformers.__version__.partition(".")[0]) < 5:
        values = as_transformers_4({"model_type": family} | values)
        del values["model_type"]
    config = getattr(transformers, f"{stem}Config")(**copy.deepcopy(values))
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    kind = {"gpt2": "GPT2LMHeadModel", "gemma3": "Gemma3ForCausalLM", "bert": "BertModel"}
    model = getattr(transformers, kind.get(family, f"{stem}ForCausalLM"))(config).float().eval()
    perturb(model)
    return model


def perturb(model: Any, *, seed: int = 0, sd: float = 0.1) -> None:
    """Add noise to every parameter, norms and biases too, so that none can be left out or mixed up unnoticed."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * sd)


def watch_routers(model: Any, chosen: int) -> list[Any]:
    """A list that, once the model has run on one text, holds every layer's margins (positions,): how much likelier

    the last of the `chosen` experts was than the first that was not.
    """
    margins: list[Any] = []

    def note(router: Any, inputs: tuple[Any, ...], _: Any) -> None:
        found = (inputs[0].reshape(-1, inputs[0].shape[-1]) @ router.weight.T).softmax(-1)
        found = found.sort(-1, descending=True).values
        margins.append((found[:, chosen - 1] - found[:, chosen]).numpy())

    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(note)
    return margins


def save(model: Any, folder: Path, *, layout: int = 5, dtype: str = "float32") -> Path:
    """Save without a tokenizer, config.json as transformers 5 or 4 writes it."""
    import torch

    model.to(getattr(torch, dtype)).save_pretrained(folder)
    if layout == 4:
        file = folder / "config.json"
        file.write_text(json.dumps(as_transformers_4(json.loads(file.read_text())), indent=2))
    return folder


def as_transformers_4(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of transformers 5 rewritten as transformers 4 wrote it: rope_theta, rope_scaling, torch_dtype."""
    old = {key: value for key, value in config.items() if key not in ("rope_parameters", "dtype", "text_config")}
    if "dtype" in config:
        old["torch_dtype"] = config["dtype"]
    if "text_config" in config:
        old["text_config"] = as_transformers_4(config["text_config"])
    parameters = config.get("rope_parameters")
    if parameters and "full_attention" in parameters:
        old["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
        parameters = parameters["full_attention"]
    if parameters:
        scaling = {
            key: value for key, value in parameters.items() if key not in ("rope_theta", "partial_rotary_factor")
        }
        old["rope_theta"] = parameters["rope_theta"]
        old["rope_scaling"] = scaling if scaling.get("rope_type", "default") != "default" else None
        if parameters.get("partial_rotary_factor") not in (None, 1.0):
            old["partial_rotary_factor"] = parameters["partial_rotary_factor"]
        if scaling.get("rope_type") == "longrope":
            old["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
            if config.get("model_type") == "phi3":  # it takes these three and no more
                factors = {key: scaling[key] for key in ("short_factor", "long_factor")}
                old["rope_scaling"] = factors | {"type": "longrope"}
    if old.get("tie_word_embeddings") and config.get("model_type") in ("gemma2", "gemma3_text", "gpt2", "smollm3"):
        del old["tie_word_embeddings"]  # their default, which transformers 4 did not write
    return old
