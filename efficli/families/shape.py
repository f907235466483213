"""A model's shape: config.json of transformers 4 or 5, normalised, defaults filled in, contradictions refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from efficli.errors import CheckpointError, UnsupportedError, did_you_mean
from efficli.families.rope import FULL, SLIDING, Rope, read_rope
from efficli.families.table import FAMILIES, Family
from efficli.families.values import MAX_LAYERS, Values

_MAX_EXPERTS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Everything that the arithmetic of a model depends on, besides its weights."""

    family: str
    architecture: str
    """As config.json names it."""
    num_layers: int
    hidden_size: int
    intermediate_size: int
    """Width of the feed-forward; for mixtures of experts, that of one expert."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    """Rows of the embedding."""
    max_positions: int
    tied: bool
    """The output matrix is the embedding."""
    norm_eps: float
    activation: str
    """As config.json names it: silu, gelu_pytorch_tanh, gelu_new, gelu, relu2."""
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    rope: Rope | None = None
    local_rope: Rope | None = None
    """The rotary embedding of layers with a sliding window."""
    sliding_window: int | None = None
    """Positions that such layers see, themselves included; None where no layer has a window."""
    windowed: tuple[bool, ...] = ()
    """Per layer: has the sliding window."""
    rotary: tuple[bool, ...] = ()
    """Per layer: has the rotary embedding (SmolLM3 leaves some without)."""
    attention_scale: float = 1.0
    """Scores are q.k times this."""
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    """Outputs of attention and feed-forward are multiplied by it before the residual sum (Granite)."""
    logit_scale: float = 1.0
    """Logits are multiplied by it."""
    attention_softcap: float | None = None
    """c tanh(scores / c)."""
    logit_softcap: float | None = None
    dense_size: int = 0
    """Width of an ordinary feed-forward in a mixture of experts."""
    num_experts: int = 0
    experts_per_token: int = 0
    normalise_experts: bool = False
    """The chosen experts' weights are divided by their sum."""
    dense_layers: tuple[int, ...] = ()
    """Layers of a mixture of experts that have an ordinary feed-forward."""
    num_token_types: int = 0
    dtype: str = "unknown"
    """What config.json says of the stored weights."""

    @property
    def facts(self) -> Family:
        """The row of the table of families."""
        return FAMILIES[self.family]

    @property
    def window_active(self) -> bool:
        """Some layer's window is shorter than the context."""
        return any(self.windowed) and self.sliding_window is not None and self.sliding_window < self.max_positions


def known_architectures() -> tuple[str, ...]:
    """The names of config.json's `architectures` that are supported."""
    return tuple(name for family in FAMILIES.values() for name in family.architectures)


def family_of(config: Mapping[str, Any]) -> tuple[Family, str]:
    """The family and architecture that config.json names; `model_type` decides where `architectures` is missing."""
    names = config.get("architectures") or []
    if not isinstance(names, list):
        raise CheckpointError(f"'architectures' is {names!r}, expected a list", where="config.json")
    model_type = config.get("model_type")
    for family in FAMILIES.values():
        if names and names[0] in family.architectures:
            return family, str(names[0])
        if not names and model_type in family.model_types:
            return family, family.architectures[0]
    found = str(names[0] if names else model_type)
    known = known_architectures()
    raise UnsupportedError(
        f"architecture '{found}' is not supported",
        where="config.json",
        hint=did_you_mean(found, known) or f"known: {', '.join(known)}",
    )


class _Reader(Values):
    """config.json with a family's own names and defaults."""

    def __init__(self, config: Mapping[str, Any], family: Family) -> None:
        super().__init__(config, names=family.keys, defaults=family.defaults)
        self.family = family


def read_shape(config: Mapping[str, Any]) -> ModelShape:
    """The shape that a parsed config.json describes; a nested `text_config` counts as if it stood at the top.

    UnsupportedError for an architecture, quantization or rotary scaling that is not known, CheckpointError for a value
    that is missing or contradicts another.
    """
    family, architecture = family_of(config)
    text = config.get("text_config")
    if isinstance(text, Mapping):
        config = {**config, **text}
    read = _Reader(config, family)
    _refuse_variants(read)
    hidden, layers = read.whole("hidden_size"), read.whole("num_hidden_layers", most=MAX_LAYERS)
    positions = read.whole("max_position_embeddings")
    heads, kv_heads, head_dim = _heads(read, hidden)
    window, windowed = _windows(read, layers)
    rope = local = None
    if family.positions == "rope":
        rope = read_rope(config, family, FULL, head_dim=head_dim, max_positions=positions)
        local = read_rope(config, family, SLIDING, head_dim=head_dim, max_positions=positions)
    attention_bias = "attention_bias" in family.bias_flags and read.flag("attention_bias")
    mlp_bias = "mlp_bias" in family.bias_flags and read.flag("mlp_bias")
    granite = family.name == "granite"
    return ModelShape(
        family=family.name,
        architecture=architecture,
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=_feed_forward(read, hidden),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=read.whole("vocab_size"),
        max_positions=positions,
        tied=read.flag("tie_word_embeddings") or not family.head,
        norm_eps=read.positive("rms_norm_eps", 1e-6),
        activation=read.word("hidden_act", str(family.defaults.get("hidden_act", "silu"))),
        qkv_bias=attention_bias or "qkv" in family.biases,
        out_bias=attention_bias or "out" in family.biases,
        mlp_bias=mlp_bias or "mlp" in family.biases,
        rope=rope,
        local_rope=local if any(windowed) else None,
        sliding_window=window if any(windowed) else None,
        windowed=windowed,
        rotary=_rotary(read, layers),
        attention_scale=_attention_scale(read, head_dim),
        embedding_scale=math.sqrt(hidden) if family.scale_embedding else _scale(read, "embedding_multiplier", granite),
        residual_scale=_scale(read, "residual_multiplier", granite),
        logit_scale=1.0 / _scale(read, "logits_scaling", granite),
        attention_softcap=_softcap(read, "attn_logit_softcapping"),
        logit_softcap=_softcap(read, "final_logit_softcapping"),
        dense_size=read.whole("intermediate_size", 6144) if family.experts else 0,
        num_experts=read.whole("num_experts", most=_MAX_EXPERTS) if family.experts else 0,
        experts_per_token=read.whole("num_experts_per_tok") if family.experts else 0,
        normalise_experts=family.experts and read.flag("norm_topk_prob"),
        dense_layers=_dense_layers(read, layers) if family.experts else (),
        num_token_types=read.whole("type_vocab_size", 2) if family.name == "bert" else 0,
        dtype=read.word("dtype", read.word("torch_dtype", "unknown")),
    )


def _heads(read: _Reader, hidden: int) -> tuple[int, int, int]:
    """Heads, key/value heads, values in each."""
    heads = read.whole("num_attention_heads")
    head_dim = read.get("head_dim")
    if head_dim is None and hidden % heads:
        raise CheckpointError(f"hidden_size {hidden} is not a multiple of {heads} heads", where="config.json")
    head_dim = hidden // heads if head_dim is None else read.whole("head_dim")
    kv_heads = read.whole("num_key_value_heads", heads) if read.family.grouped else heads
    if heads % kv_heads:
        raise CheckpointError(f"{heads} heads are not a multiple of {kv_heads} key/value heads", where="config.json")
    return heads, kv_heads, head_dim


def _refuse_variants(read: _Reader) -> None:
    """What the table of families does not describe, and weights that are already codes of another method."""
    for key, allowed in read.family.only.items():
        value = read.get(key, allowed[0])
        if value not in allowed:
            raise UnsupportedError(
                f"'{key}' is {value!r}, which is not supported for {read.family.name}", where="config.json"
            )
    quantization = read.config.get("quantization_config")
    if isinstance(quantization, Mapping) and quantization:
        method = quantization.get("quant_method", "unknown")
        raise UnsupportedError(
            f"the checkpoint is already quantized ('{method}')",
            where="config.json",
            hint="start from the checkpoint in bfloat16 or float16",
        )


def _feed_forward(read: _Reader, hidden: int) -> int:
    """Width of the feed-forward; GPT-2's default is four times the hidden size."""
    if read.family.experts:
        return read.whole("moe_intermediate_size", 768)
    return read.whole("intermediate_size", 4 * hidden if read.family.name == "gpt2" else None)


def _scale(read: _Reader, key: str, applies: bool) -> float:
    """A multiplier that one family has."""
    return read.positive(key, 1.0) if applies else 1.0


def _attention_scale(read: _Reader, head_dim: int) -> float:
    """What scores are multiplied by."""
    if read.family.name == "granite":
        return read.positive("attention_multiplier", 1.0)
    if read.family.scale_from_query_scalar:
        return 1.0 / math.sqrt(read.positive("query_pre_attn_scalar", 256.0))
    return 1.0 / math.sqrt(head_dim)


def _softcap(read: _Reader, key: str) -> float | None:
    """A soft cap, None where there is none."""
    if not read.family.scale_embedding:  # only Gemma's modelling code applies them
        return None
    return None if read.get(key) is None else read.positive(key)


def _windows(read: _Reader, layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """The sliding window and which layers have it."""
    kind = read.family.windows
    none = (False,) * layers
    window = read.get("sliding_window")
    if kind == "none" or window is None:
        return None, none
    window = read.whole("sliding_window")
    if read.family.name in ("qwen2", "qwen3", "qwen3_moe", "smollm3") and not read.flag("use_sliding_window"):
        return None, none
    types = read.entries("layer_types")
    if types and kind != "all":
        if len(types) != layers:
            raise CheckpointError(f"{len(types)} layer_types for {layers} layers", where="config.json")
        return window, tuple(kind == SLIDING for kind in types)
    if kind == "all":
        return window, (True,) * layers
    if kind == "from_layer":
        first = read.real("max_window_layers", layers)
        return window, tuple(i >= first for i in range(layers))
    if kind == "alternate":
        return window, tuple(i % 2 == 0 for i in range(layers))
    if kind == "every_sixth_full":
        step = read.whole("sliding_window_pattern", read.whole("_sliding_window_pattern", 6))
        return window, tuple(bool((i + 1) % step) for i in range(layers))
    return window, tuple(not rotary for rotary in _rotary(read, layers))


def _rotary(read: _Reader, layers: int) -> tuple[bool, ...]:
    """Which layers rotate queries and keys."""
    if read.family.positions != "rope":
        return (False,) * layers
    if read.family.name != "smollm3":
        return (True,) * layers
    pattern = read.entries("no_rope_layers")  # 1: this layer does rotate
    if not pattern:
        step = read.whole("no_rope_layer_interval")
        return tuple((i + 1) % step != 0 for i in range(layers))
    if len(pattern) < layers:
        raise CheckpointError(f"{len(pattern)} no_rope_layers for {layers} layers", where="config.json")
    return tuple(bool(flag) for flag in pattern[:layers])


def _dense_layers(read: _Reader, layers: int) -> tuple[int, ...]:
    """Layers of a mixture of experts without experts."""
    only = read.entries("mlp_only_layers")
    step = read.whole("decoder_sparse_step", 1)
    return tuple(i for i in range(layers) if i in only or (i + 1) % step)
