"""Gemma 3n's language model: per-layer embeddings, alternating updates (conversion/gemma.py, gemma3n.cpp)."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

import gguf
from gguf import MODEL_TENSOR

from efficli.errors import CheckpointError, UnsupportedError
from efficli.export.gguf.layout import Field, array, f32, u32
from efficli.planning.cache import CacheLayer
from efficli.planning.foreign.model import Described
from efficli.planning.foreign.parts import Parts
from efficli.planning.foreign.reading import Config, Sizes, shared_fields

DEFAULTS: dict[str, Any] = {
    "vocab_size": 262_400,
    "vocab_size_per_layer_input": 262_144,
    "hidden_size": 2048,
    "hidden_size_per_layer_input": 256,
    "intermediate_size": 16_384,
    "num_hidden_layers": 35,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": True,
    "sliding_window": 512,
    "final_logit_softcapping": 30.0,
    "altup_active_idx": 0,
    "altup_num_inputs": 4,
    "num_kv_shared_layers": 15,
    "laurel_rank": 64,
}
_CACHED_LAYERS = 20
"""llama.cpp's graph keeps keys and values of the first 20 layers, whatever the file says (n_layer_kv_from_start)."""
_ALTUP = 4
_GRAPH = (256, 64)  # n_embd_altup and laurel_rank of llama-hparams.h
_FULL, _SLIDING = "full_attention", "sliding_attention"


def describe(config: Config, sizes: Sizes) -> Described:
    """The embeddings of layers are one table, padded with zeros to the vocabulary; of it a token takes one row."""
    config.only("altup_num_inputs", _ALTUP)
    if not sizes.tied:
        raise UnsupportedError("an output matrix of its own is not planned for Gemma 3n", where="config.json")
    each = config.whole("hidden_size_per_layer_input")
    widths, windowed = _widths(config, sizes), _windowed(config, sizes)
    rows = config.whole("vocab_size_per_layer_input")
    parts = Parts(sizes)
    parts.embedding()
    parts.add(MODEL_TENSOR.PER_LAYER_TOKEN_EMBD, max(sizes.vocab, rows), sizes.layers * each)
    kept = [parts.add(MODEL_TENSOR.PER_LAYER_MODEL_PROJ, sizes.layers * each, sizes.hidden)]
    parts.add(MODEL_TENSOR.PER_LAYER_PROJ_NORM, each)
    for kind in (MODEL_TENSOR.ALTUP_PROJ, MODEL_TENSOR.ALTUP_UNEMBD_PROJ):
        kept.append(parts.add(kind, _ALTUP - 1, sizes.hidden, sizes.hidden))
    for parts.layer, width in enumerate(widths):
        kept += _layer(parts, each, width, config.whole("laurel_rank"))
    parts.end()
    window = config.whole("sliding_window")
    near, full = CacheLayer("window", sizes.kv, sizes.kv, window), CacheLayer("full", sizes.kv, sizes.kv)
    return Described(
        gguf_arch="gemma3n",
        tensors=parts.tensors,
        fields=_fields(config, sizes, widths, windowed),
        cache=[near if has_window else full for has_window in windowed[:_CACHED_LAYERS]],
        num_padding=max(0, sizes.vocab - rows) * sizes.layers * each,
        as_source=tuple(kept),
        notes=_notes(config, each),
    )


def _notes(config: Config, each: int) -> tuple[str, ...]:
    """What is left out, and sizes that llama.cpp's graph takes for granted."""
    notes = []
    if config.architecture == "Gemma3nForConditionalGeneration":
        notes.append("the towers for pictures and sound are left out: the file is the language model")
    rank = config.whole("laurel_rank")
    if (each, rank) != _GRAPH:
        notes.append(
            f"llama.cpp does not load it: {each} values for each layer and laurel rank {rank}, "
            f"its graph has {_GRAPH[0]} and {_GRAPH[1]}"
        )
    return tuple(notes)


def _layer(parts: Parts, each: int, width: int, rank: int) -> list[str]:
    """One block; the names of matrices that the quantizer leaves as they are."""
    hidden = parts.sizes.hidden
    parts.norms()
    parts.attention(head_norms=True)
    parts.feed_forward(width)
    for kind in (MODEL_TENSOR.ATTN_POST_NORM, MODEL_TENSOR.FFN_POST_NORM, MODEL_TENSOR.PER_LAYER_POST_NORM):
        parts.add(kind, hidden)
    parts.add(MODEL_TENSOR.PER_LAYER_INP_GATE, each, hidden)
    parts.add(MODEL_TENSOR.PER_LAYER_PROJ, hidden, each)
    parts.add(MODEL_TENSOR.ALTUP_CORRECT_COEF, _ALTUP, _ALTUP)
    parts.add(MODEL_TENSOR.ALTUP_CORRECT_SCALE, hidden)
    parts.add(MODEL_TENSOR.ALTUP_PREDICT_COEF, _ALTUP * _ALTUP, _ALTUP)
    parts.add(MODEL_TENSOR.ALTUP_ROUTER_NORM, hidden)
    parts.add(MODEL_TENSOR.LAUREL_POST_NORM, hidden)
    return [
        parts.add(MODEL_TENSOR.ALTUP_ROUTER, _ALTUP, hidden),
        parts.add(MODEL_TENSOR.LAUREL_L, rank, hidden),
        parts.add(MODEL_TENSOR.LAUREL_R, hidden, rank),
    ]


def _widths(config: Config, sizes: Sizes) -> list[int]:
    """Width of each layer's feed-forward."""
    given = config.get("intermediate_size")
    if not isinstance(given, list):
        return [config.whole("intermediate_size")] * sizes.layers
    if len(given) != sizes.layers:
        raise CheckpointError(f"{len(given)} intermediate_size for {sizes.layers} layers", where="config.json")
    return [
        Config({"intermediate_size": n}, config.architecture, defaults={}).whole("intermediate_size") for n in given
    ]


def _windowed(config: Config, sizes: Sizes) -> list[bool]:
    """Which layers have a window: four of five."""
    kinds = config.layer_words("layer_types", sizes.layers)
    if kinds:
        return [kind == _SLIDING for kind in kinds]
    return [bool((i + 1) % 5) for i in range(sizes.layers)]


def _fields(config: Config, sizes: Sizes, widths: list[int], windowed: list[bool]) -> dict[str, Field]:
    """Windows, alternating updates and how sparse activations are, for each layer."""
    sparse = config.entries("activation_sparsity_pattern")
    if not sparse:
        first = 10 if sizes.layers > 10 else 0
        sparse = [0.95] * first + [0.0] * (sizes.layers - first)
    checked = [
        Config({"activation_sparsity_pattern": s}, "", defaults={}).real("activation_sparsity_pattern") for s in sparse
    ]
    if len(checked) != sizes.layers or not all(0.0 <= share < 1.0 for share in checked):
        raise config.wrong("activation_sparsity_pattern", sparse, f"{sizes.layers} shares from 0 to 1")
    scales = [NormalDist().inv_cdf(share) if share else float("-inf") for share in checked]
    theta, local = _thetas(config)
    fields = shared_fields(sizes, config) | {
        "feed_forward_length": array(widths, gguf.GGUFValueType.INT32),
        "attention.key_length": u32(sizes.head_dim),
        "attention.value_length": u32(sizes.head_dim),
        "attention.sliding_window": u32(config.whole("sliding_window")),
        "attention.sliding_window_pattern": array(windowed, gguf.GGUFValueType.BOOL),
        "attention.shared_kv_layers": u32(config.count("num_kv_shared_layers")),
        "rope.freq_base": f32(theta),
        "rope.freq_base_swa": f32(local),
        "altup.active_idx": u32(config.count("altup_active_idx")),
        "altup.num_inputs": u32(_ALTUP),
        "embedding_length_per_layer_input": u32(config.whole("hidden_size_per_layer_input")),
        "activation_sparsity_scale": array(scales, gguf.GGUFValueType.FLOAT32),
    }
    if config.get("final_logit_softcapping") is not None:
        fields["final_logit_softcapping"] = f32(config.positive("final_logit_softcapping"))
    return fields


def _thetas(config: Config) -> tuple[float, float]:
    """Bases of the rotary embedding, of layers that see everything and of those with a window."""
    given = config.get("rope_parameters")
    nested = given if isinstance(given, Mapping) else {}
    found = []
    for kind, key, usual in ((_FULL, "rope_theta", 1e6), (_SLIDING, "rope_local_base_freq", 1e4)):
        inner = nested.get(kind)
        inner = inner if isinstance(inner, Mapping) else {}
        found.append(
            Config({"rope_theta": config.positive(key, usual), **inner}, "", defaults={}).positive("rope_theta")
        )
    return found[0], found[1]
