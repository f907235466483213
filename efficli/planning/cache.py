"""The cache that llama.cpp allocates for a context: keys and values, windows, latent vectors, recurrent states.

Source: llama.cpp's src/llama-context.cpp (padding of the context), src/llama-model.cpp (`create_memory`: which cache a
graph gets), src/llama-kv-cache.cpp, src/llama-kv-cache-iswa.cpp, src/llama-memory-recurrent.cpp and
src/llama-hparams.cpp, as vendored by llama-cpp-python 0.3.36. Everything is allocated when the context is opened,
however few positions are used later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from efficli.errors import UnsupportedError, UsageError
from efficli.export.gguf.graphs import GRAPHS
from efficli.families import ModelShape
from efficli.ops.ggml import block_size, row_bytes
from efficli.ops.ggml_types import TYPE_IDS

PAD = 256
"""Positions in a context, and in a window's cache, are a multiple of this."""
_ALIGNMENT = 32  # of a tensor in a CPU buffer, bytes: TENSOR_ALIGNMENT of ggml-impl.h

Kind = Literal["full", "window", "latent", "state"]


@dataclass(frozen=True, slots=True)
class CacheLayer:
    """What one layer keeps of what it has read. A layer that keeps nothing of its own is left out.

    full: `k` and `v` values per position (head size x key/value heads). window: the same, for the last `window`
    positions only. latent (MLA): `k` = kv_lora_rank + qk_rope_head_dim; llama.cpp keeps nothing for v, which is a part
    of k (`has_v = !is_mla`), so `v` is 0. state: `state_bytes` per sequence, however long the context.

    A layer may have both a cache and a state (Falcon-H1): then it is a full layer with `state_bytes`.
    """

    kind: Kind
    k: int = 0
    v: int = 0
    window: int = 0
    state_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class KvCache:
    """What is allocated."""

    nbytes: int
    full_cells: int
    """Positions of layers that see everything, over all sequences; 0 where there are none."""
    window_cells: int
    """Positions of layers with a window, over all sequences; 0 where there are none."""
    state_bytes: int
    """The part of `nbytes` that does not depend on the context."""


def state_bytes(conv: int, state: int) -> int:
    """Bytes of a recurrent layer's memory for one sequence: `conv` and `state` values in float32, aligned.

    `llama_memory_recurrent`: r (n_embd_r values) holds the inputs of the convolution, s (n_embd_s) the state, both
    always float32. LFM2: conv = hidden x (conv_L_cache - 1), no state. Mamba and Mamba 2: conv = (d_conv - 1) x
    (d_inner + 2 n_group d_state), state = d_state x d_inner (n_group is 0 in Mamba). Qwen3-Next: as Mamba, with
    d_inner = heads x head size of values, d_state = head size of keys, n_group = key heads.
    """
    return _aligned(4 * conv) + _aligned(4 * state)


def cache_layers(shape: ModelShape) -> tuple[CacheLayer, ...]:
    """The layers' caches as the graph that a file of this model runs on has them; none for a model that only reads.

    Windows are those of llama.cpp's graphs, not of config.json: Gemma 2 and 3 have them. Mistral, Qwen, SmolLM3 and
    Phi-3 run on graphs without (phi3 reads the key and leaves the window out, "currently disabled"), so that every
    layer keeps the whole context. Gemma 2's graph always has windows: as long as the context where config.json has
    none (as `export` writes them).
    """
    if not shape.facts.causal:
        return ()
    width = shape.num_kv_heads * shape.head_dim
    arch = shape.facts.gguf_arch
    windowed, window = shape.windowed, shape.sliding_window
    if not GRAPHS[arch].windows:
        windowed = ()
    elif window is None or not any(windowed):
        windowed, window = (), None
        if arch == "gemma2":
            windowed, window = tuple(i % 2 == 0 for i in range(shape.num_layers)), shape.max_positions
    full = CacheLayer("full", width, width)
    if window is None or not windowed:
        return (full,) * shape.num_layers
    near = CacheLayer("window", width, width, window)
    return tuple(near if has_window else full for has_window in windowed)


def kv_bytes(
    layers: Sequence[CacheLayer],
    ctx: int,
    *,
    type_k: str = "F16",
    type_v: str = "F16",
    ubatch: int = 512,
    sequences: int = 1,
    swa_full: bool = False,
) -> KvCache:
    """What llama.cpp allocates for a context of `ctx` positions, which `sequences` share; padding included.

    The context is padded to 256 positions, and each sequence's part of it again (`llama_context::llama_context`). A
    window's cache holds the window and one micro-batch, padded to 256, and no more than the context
    (`llama_kv_cache_iswa`); with `swa_full` the whole context. `ubatch` is the micro-batch asked for; llama.cpp cuts it
    to the context. Rows are encoded in `type_k` and `type_v` (F32, F16, BF16, Q8_0, Q5_1, Q5_0, Q4_1, Q4_0, IQ4_NL).

    UsageError for a context or number of sequences below 1, or an unknown type; UnsupportedError where the type's
    blocks do not divide a layer's values.
    """
    if ctx < 1 or sequences < 1 or ubatch < 1:
        raise UsageError(f"context {ctx}, micro-batch {ubatch}, sequences {sequences}: expected at least 1 of each")
    cells = _padded(_padded(ctx) // sequences)
    near = {layer.window for layer in layers if layer.kind == "window"}
    if len(near) > 1:
        raise UnsupportedError(f"windows of {sorted(near)} positions in one model: llama.cpp's cache has one length")
    window_cells = 0
    if near:
        window_cells = cells if swa_full else _padded(min(cells, near.pop() + min(ctx, ubatch)))
    held = states = 0
    for layer in layers:
        states += sequences * layer.state_bytes
        if layer.kind != "state":
            rows = window_cells if layer.kind == "window" else cells
            held += sequences * rows * (_row(type_k, layer.k, "k") + _row(type_v, layer.v, "v"))
    full = any(layer.kind in ("full", "latent") for layer in layers)
    return KvCache(
        nbytes=held + states,
        full_cells=sequences * cells if full else 0,
        window_cells=sequences * window_cells,
        state_bytes=states,
    )


def _row(type_name: str, values: int, which: str) -> int:
    """Bytes of one position."""
    name = type_name.upper()
    if name not in TYPE_IDS:
        raise UsageError(f"cache type {type_name!r} is no type of ggml", hint="F16, Q8_0 and Q4_0 are usual")
    if values % block_size(name):
        raise UnsupportedError(
            f"a cache of {name}: its blocks of {block_size(name)} do not divide the {values} values of {which}",
            hint="keep the cache in F16",
        )
    return row_bytes(name, values)


def _padded(cells: int) -> int:
    return -(-cells // PAD) * PAD


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
