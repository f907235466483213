"""config.json of a foreign family, with transformers' defaults; sizes that contradict each other are refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from efficli.errors import CheckpointError, UnsupportedError
from efficli.export.gguf.layout import Field, f32, string, u32
from efficli.families.values import MAX_LAYERS, Values

MAX_EXPERTS = 4096
MAX_LENGTH = (1 << 31) - 1
"""Longer axes, contexts and vocabularies are damage."""


class Config(Values):
    """config.json with a family's defaults."""

    def __init__(self, config: Mapping[str, Any], architecture: str, *, defaults: Mapping[str, Any]) -> None:
        super().__init__(config, defaults=defaults)
        self.architecture = architecture

    def whole(self, key: str, default: int | None = None, *, most: int = MAX_LENGTH) -> int:
        """A positive whole number that GGUF's 32 bits hold."""
        return super().whole(key, default, most=most)

    def count(self, key: str, default: int = 0, *, most: int = MAX_LENGTH) -> int:
        """A whole number that may be zero."""
        value = self.get(key)
        value = default if value is None else value
        return 0 if value == 0 and not isinstance(value, bool | float) else self.whole(key, default, most=most)

    def layer_words(self, key: str, layers: int) -> list[str]:
        """One word for each layer, empty where there are none."""
        words = self.entries(key)
        if not all(isinstance(word, str) for word in words):
            raise self.wrong(key, words, "a list of words")
        if words and len(words) != layers:
            raise CheckpointError(f"{len(words)} {key} for {layers} layers", where="config.json")
        return words

    def only(self, key: str, *allowed: object) -> None:
        """UnsupportedError unless the value is one that llama.cpp's graph computes; the first is the default."""
        value = self.get(key, allowed[0])
        if not any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in allowed):
            raise UnsupportedError(
                f"'{key}' is {value!r}, which llama.cpp does not compute for {self.architecture}", where="config.json"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What every family has."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    positions: int
    tied: bool
    eps: float

    @property
    def q(self) -> int:
        """Rows of the query matrix."""
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        """Rows of the key matrix, and values of a key in the cache."""
        return self.kv_heads * self.head_dim


def read_sizes(config: Config) -> Sizes:
    """Hidden size, layers, heads and vocabulary; CheckpointError where they do not fit each other."""
    hidden, heads = config.whole("hidden_size"), config.whole("num_attention_heads")
    kv_heads = config.whole("num_key_value_heads", heads)
    if heads % kv_heads:
        raise CheckpointError(f"{heads} heads are not a multiple of {kv_heads} key/value heads", where="config.json")
    given = config.get("head_dim")
    if given is None and hidden % heads:
        raise CheckpointError(f"hidden_size {hidden} is not a multiple of {heads} heads", where="config.json")
    return Sizes(
        hidden=hidden,
        layers=config.whole("num_hidden_layers", most=MAX_LAYERS),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=hidden // heads if given is None else config.whole("head_dim"),
        vocab=config.whole("vocab_size"),
        positions=config.whole("max_position_embeddings"),
        tied=config.flag("tie_word_embeddings"),
        eps=config.positive("rms_norm_eps", 1e-6),
    )


def shared_fields(sizes: Sizes, config: Config) -> dict[str, Field]:
    """What the converter writes for every model, without the feed-forward's length and the rotary embedding."""
    fields = {
        "block_count": u32(sizes.layers),
        "context_length": u32(sizes.positions),
        "embedding_length": u32(sizes.hidden),
        "attention.head_count": u32(sizes.heads),
        "attention.head_count_kv": u32(sizes.kv_heads),
        "attention.layer_norm_rms_epsilon": f32(sizes.eps),
    }
    if config.get("head_dim") is not None:
        fields |= {"attention.key_length": u32(sizes.head_dim), "attention.value_length": u32(sizes.head_dim)}
    return fields


def expert_fields(config: Config, count_key: str) -> tuple[int, int, dict[str, Field]]:
    """Experts, how many a token takes, and their fields; CheckpointError where it takes more than there are."""
    count, used = config.whole(count_key, most=MAX_EXPERTS), config.whole("num_experts_per_tok", most=MAX_EXPERTS)
    if used > count:
        raise CheckpointError(f"num_experts_per_tok is {used} of {count} experts", where="config.json")
    return count, used, {"expert_count": u32(count), "expert_used_count": u32(used)}


def rope_parameters(config: Config) -> Config:
    """What describes the rotary embedding, `rope_theta` and `rope_type` among it, from either transformers' layout."""
    for key in ("rope_scaling", "rope_parameters"):
        found = config.get(key)
        if found is None or found == {}:
            continue
        if not isinstance(found, Mapping):
            raise config.wrong(key, found, "an object")
        kind = found.get("rope_type", found.get("type", "default"))
        found = {"rope_theta": config.positive("rope_theta", 10_000.0), **found, "rope_type": kind}
        return Config(found, config.architecture, defaults={})
    theta = config.positive("rope_theta", 10_000.0)
    return Config({"rope_theta": theta, "rope_type": "default"}, config.architecture, defaults={})


def rope_fields(rope: Config, positions: int) -> dict[str, Field]:
    """The rotary embedding as the converter writes it; UnsupportedError for a scaling that it leaves out."""
    fields = {"rope.freq_base": f32(rope.positive("rope_theta"))}
    kind = rope.word("rope_type", "default")
    if kind not in ("default", "linear", "yarn", "llama3"):
        raise UnsupportedError(f"rope type '{kind}' is not planned for {rope.architecture}", where="config.json")
    if kind in ("linear", "yarn"):
        fields |= {"rope.scaling.type": string(kind), "rope.scaling.factor": f32(rope.positive("factor"))}
    if kind == "yarn":
        original = rope.whole("original_max_position_embeddings", positions)
        fields["rope.scaling.original_context_length"] = u32(original)
        for name, keys in (
            ("yarn_ext_factor", ("extrapolation_factor",)),
            ("yarn_attn_factor", ("attention_factor", "attn_factor")),
            ("yarn_beta_fast", ("beta_fast",)),
            ("yarn_beta_slow", ("beta_slow",)),
        ):
            given = next((key for key in keys if rope.get(key) is not None), None)
            if given:
                fields[f"rope.scaling.{name}"] = f32(rope.real(given))
    return fields
