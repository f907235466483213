"""Families that `plan` knows and `export` does not: what llama.cpp's own converter would write of them.

MLA (DeepSeek V2 and V3), mixtures (Mixtral, Qwen2-MoE, gpt-oss), hybrids (LFM2, Granite 4, Falcon-H1, Qwen3-Next),
per-layer embeddings (Gemma 3n). Source: conversion/*.py and src/models/*.cpp of llama.cpp as vendored by
llama-cpp-python 0.3.36; defaults are those of transformers' configuration classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from efficli.errors import CheckpointError, UnsupportedError
from efficli.planning.foreign import delta_net, gemma3n, hybrids, mixtures, mla
from efficli.planning.foreign.model import Describe, ForeignModel, complete
from efficli.planning.foreign.reading import Config, read_sizes

__all__ = ["FOREIGN", "ForeignModel", "read_foreign"]

FOREIGN: Mapping[str, tuple[str, Mapping[str, Any], Describe]] = MappingProxyType(
    {
        "DeepseekV2ForCausalLM": ("deepseek_v2", mla.V2_DEFAULTS, mla.describe),
        "DeepseekV3ForCausalLM": ("deepseek_v3", mla.V3_DEFAULTS, mla.describe),
        "MixtralForCausalLM": ("mixtral", mixtures.MIXTRAL_DEFAULTS, mixtures.mixtral),
        "Qwen2MoeForCausalLM": ("qwen2_moe", mixtures.QWEN2_MOE_DEFAULTS, mixtures.qwen2_moe),
        "GptOssForCausalLM": ("gpt_oss", mixtures.GPT_OSS_DEFAULTS, mixtures.gpt_oss),
        "Lfm2ForCausalLM": ("lfm2", hybrids.LFM2_DEFAULTS, hybrids.lfm2),
        "GraniteMoeHybridForCausalLM": ("granitemoehybrid", hybrids.GRANITE_DEFAULTS, hybrids.granite_hybrid),
        "FalconH1ForCausalLM": ("falcon_h1", hybrids.FALCON_H1_DEFAULTS, hybrids.falcon_h1),
        "Qwen3NextForCausalLM": ("qwen3_next", delta_net.DEFAULTS, delta_net.describe),
        "Gemma3nForCausalLM": ("gemma3n_text", gemma3n.DEFAULTS, gemma3n.describe),
        "Gemma3nForConditionalGeneration": ("gemma3n", gemma3n.DEFAULTS, gemma3n.describe),
    }
)
"""Architecture -> model_type, transformers' defaults, reader."""
_UNPACKED = {"fp8": None, "mxfp4": "GptOssForCausalLM"}
"""Methods of stored weights that the converter reads; the architecture if it is of one only."""


def read_foreign(config: Mapping[str, Any]) -> ForeignModel | None:
    """The model that a parsed config.json describes, or None if it is of no family in this table.

    CheckpointError for a value that is missing, absurd or contradicts another; UnsupportedError for what llama.cpp's
    converter or graph does not know.
    """
    names = config.get("architectures") or []
    if not isinstance(names, list):
        raise CheckpointError(f"'architectures' is {names!r}, expected a list", where="config.json")
    kind = config.get("model_type")
    found = [name for name, row in FOREIGN.items() if (name == names[0] if names else row[0] == kind)]
    if not found:
        return None
    architecture = found[0]
    _, defaults, describe = FOREIGN[architecture]
    text = config.get("text_config")
    if isinstance(text, Mapping):
        config = {**config, **text}
    read = Config(_old_names(config, architecture), architecture, defaults=defaults)
    _check_stored(read)
    sizes = read_sizes(read)
    return complete(read, sizes, describe(read, sizes))


def _old_names(config: Mapping[str, Any], architecture: str) -> Mapping[str, Any]:
    """LFM2's first names for values that every family has."""
    if architecture != "Lfm2ForCausalLM":
        return config
    renamed = {"tie_embedding": "tie_word_embeddings", "norm_eps": "rms_norm_eps", "block_norm_eps": "rms_norm_eps"}
    given = {renamed[key]: value for key, value in config.items() if key in renamed}
    return {"rms_norm_eps": 1e-5, **config, **given}


def _check_stored(read: Config) -> None:
    """Refuse weights that are already codes of a method that the converter does not read."""
    stored = read.get("quantization_config")
    if not isinstance(stored, Mapping) or not stored:
        return
    method = str(stored.get("quant_method", "unknown"))
    if method not in _UNPACKED or _UNPACKED[method] not in (None, read.architecture):
        raise UnsupportedError(
            f"the checkpoint is already quantized ('{method}')",
            where="config.json",
            hint="start from the checkpoint in bfloat16 or float16",
        )
