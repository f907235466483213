"""What a named device will do with a file: header and settings in, the target's prediction out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from efficli.bench.figures import MemoryResult, Settings
from efficli.export.gguf.parse import GgufHeader
from efficli.ops import ggml
from efficli.target import Prediction, Target, Work, active_bytes, predict


def predict_file(
    target: Target, header: GgufHeader, nbytes: int, settings: Settings, depth: int, memory: MemoryResult | None = None
) -> Prediction:
    """Predict for a target, with `depth` tokens in the cache.

    `memory`: what was measured here; without it the cache alone counts as anonymous memory.
    """
    tensors = {name: (tensor.type, tensor.nbytes, tensor.shape) for name, tensor in header.tensors.items()}
    cache = cache_bytes_per_token(header.metadata, settings.cache_type_k, settings.cache_type_v)
    work = Work.of(
        active_bytes(tensors, header.metadata),
        nbytes,
        kv_bytes_per_token=cache,
        depth=depth,
        peak_anon=None if memory is None else memory.peak_anon - memory.before_anon,
    )
    return predict(target, work)


def cache_bytes_per_token(metadata: Mapping[str, Any], type_k: str, type_v: str) -> float:
    """Bytes that one position takes in the KV cache: sum over layers of heads x (key bytes + value bytes).

    0 for a model without attention heads of its own naming, and for an encoder, which keeps nothing. Windowed layers
    count like the others: they stop growing at their window.
    """
    arch = metadata.get("general.architecture")

    def number(name: str) -> Any:
        return metadata.get(f"{arch}.{name}")

    layers, heads, width = number("block_count"), number("attention.head_count"), number("embedding_length")
    first = heads[0] if isinstance(heads, list) and heads else heads
    if number("attention.causal") is False:
        return 0.0
    if not (isinstance(layers, int) and isinstance(first, int) and first > 0 and isinstance(width, int)):
        return 0.0
    key = number("attention.key_length") or width // first
    value = number("attention.value_length") or width // first
    cached = number("attention.head_count_kv")
    cached = heads if cached is None else cached
    per_layer = cached if isinstance(cached, list) else [cached] * layers
    return float(sum(n * (_bytes(type_k, key) + _bytes(type_v, value)) for n in per_layer[:layers]))


def _bytes(type: str, width: int) -> float:
    name = type.upper()
    return ggml.row_bytes(name, ggml.block_size(name)) / ggml.block_size(name) * width
