"""Anonymous memory that llama.cpp needs besides the cache and repacked weights: compute buffers, vocabulary, the rest.

Two sizes of a compute buffer differ by a factor of up to twenty. llama.cpp *reserves* it for logits of every position
of a micro-batch (512 x vocabulary x 4 bytes: 250 MiB for 128 k tokens), but what a prompt's last logits need is much
less, and pages that are never written take no memory. What counts for fitting is what is *written*: the buffer of a
graph with one output. RssAnon of sixteen runs of a C program with one thread on x86-64 (the reference, SmolLM2-135M,
GPT-2, Qwen2.5-0.5B, Qwen3-0.6B, Gemma 3 1B; F16 to Q4_0; prompts that fill contexts of 512 to 2048) was within 1 MiB of
what is reckoned here, 16 to 150 MiB. All but the reference were without a tokenizer (41 bytes per token counted);
vocabularies were measured alone.

There are two ways to the compute buffers' size. `reserve` asks llama.cpp itself, which plans its buffers for a file
that is only a header (0.2 s of CPU time for any number of contexts): exact. `compute_bytes` is a formula, for a table
of many contexts. Between two contexts, both shorter or both longer than a window, the size is on the line between
theirs to 1 MiB: masks grow with the context, and the rest does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from efficli.artifact.temporary import scratch_directory
from efficli.export.gguf.header import StoredTensor, lay_out
from efficli.export.gguf.layout import Metadata, string, u32
from efficli.ops.child import run_child
from efficli.ops.dry_context import Reservation, question
from efficli.ops.ggml_types import TYPE_IDS
from efficli.ops.storage import writing
from efficli.planning.cache import CacheLayer, kv_bytes
from efficli.target.profile import Range

FORMULA_ERROR, FORMULA_ERROR_PLAIN = 0.1, 0.15
"""Of `compute_bytes`, with flash attention and without.

Measured for one output against llama.cpp's own planning, 15 shapes of 13 architectures that it was made from and 17
that it was not, at 4 contexts each: median 0.0001 %, largest 4.5 % (experts); quantized cache: 4 %, largest 8.9 %;
without flash attention: 0.4 %, largest 12.6 %; there MLA at short contexts is reckoned up to 39 % too large.
"""
_MIB = 1 << 20
_PROCESS = 1.3 * _MIB
"""A C program that has loaded the libraries and a model's table of tensors (0.9 + 0.4 MiB measured, x86-64, glibc)."""
_GRAPH, _GRAPH_LOW, _GRAPH_HIGH = 1.2 * _MIB, 0.2 * _MIB, 2.2 * _MIB
"""Nodes of the graph, hash tables and heap: what sixteen runs had beyond all that is reckoned here."""
_TABLES, _PER_TOKEN, _PER_MERGE = 1.7 * _MIB, 114, 174
"""Bytes of the vocabulary: Unicode tables, tokens, merges; fitted on the 18 vocabularies of llama.cpp's models/ folder

and the reference's (4 k to 262 k tokens), as RssAnon counts them after loading.
"""
_VOCABULARY_ERROR = 0.2
"""Of that fit: -16 % to +20 %."""
_UNGATED = frozenset(
    {"gpt2", "bert", "nomic-bert", "starcoder", "starcoder2", "falcon", "mpt", "bloom", "gptneox", "phi2"}
)
_THREE_ROWS = frozenset({"phi3", "bitnet", "bert", "lfm2"})
_TILE = 64  # GGML_FA_TILE_Q, GGML_FA_TILE_KV of ggml-cpu/common.h
_BYTES_OF_ACTIVATION = {"F32": 0.0, "F16": 2.0, "BF16": 2.0}
_ACTIVATION_Q8_0, _ACTIVATION_Q8_K = 34 / 32, 292 / 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """The widths that decide how large the tensors between the weights are."""

    arch: str
    width: int
    """Of the residual stream."""
    inner: int
    """Of the widest dense feed-forward; 0 where all layers have experts."""
    heads: int
    query: int
    """Heads x head size."""
    kv: int
    """Key/value heads x head size."""
    vocab_size: int
    head: int
    rank: int = 0
    """Of the latent cache (MLA)."""
    experts_used: int = 0
    expert_inner: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scratch:
    """Bytes of anonymous memory besides cache and repacked weights."""

    compute: int
    """What is written of the compute buffers when a prompt fills the context."""
    work: int
    """A micro-batch's values, converted for the product with quantized weights, and tiles of attention."""
    vocabulary: int
    process: int
    """Program, libraries, graph, logits of one position."""
    total: Range

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        parts = {name: getattr(self, name) for name in ("compute", "work", "vocabulary", "process")}
        return parts | {"total": {name: round(getattr(self.total, name)) for name in ("value", "low", "high")}}


def read_network(metadata: Mapping[str, Any], vocab_size: int) -> Network:
    """From plain GGUF metadata; where a value is a list, its largest counts."""
    arch = str(metadata.get("general.architecture", ""))

    def number(key: str, default: int = 0) -> int:
        value = metadata.get(f"{arch}.{key}", default)
        return max((int(one) for one in value), default=default) if isinstance(value, list | tuple) else int(value)

    width, heads = number("embedding_length"), max(1, number("attention.head_count", 1))
    head = number("attention.key_length", width // heads)
    experts = number("expert_used_count")
    dense = not experts or number("leading_dense_block_count")
    return Network(
        arch=arch,
        width=width,
        inner=number("feed_forward_length") if dense else 0,
        heads=heads,
        query=heads * head,
        kv=number("attention.head_count_kv", heads) * head,
        vocab_size=vocab_size,
        head=head,
        rank=number("attention.kv_lora_rank"),
        experts_used=experts,
        expert_inner=number("expert_feed_forward_length"),
    )


def compute_bytes(
    network: Network,
    layers: Sequence[CacheLayer],
    ctx: int,
    *,
    ubatch: int = 512,
    outputs: int = 1,
    flash_attn: bool = True,
) -> int:
    """Bytes of llama.cpp's compute buffers by a formula; `outputs`: positions of a micro-batch with logits.

    The largest of what is alive at once: in the feed-forward gate, up, their product and four rows of the residual
    stream (three in some graphs); in attention queries, keys, values and, without flash attention, all scores; the
    logits. To this the masks. Tensors are float32, masks with flash attention float16 (`build_attn_inp_kq_mask`).
    Error: FORMULA_ERROR.
    """
    tokens = min(ctx, ubatch)
    cache = kv_bytes(layers, ctx, ubatch=ubatch)
    columns = cache.full_cells + cache.window_cells or (0 if layers else tokens)
    masks = columns * tokens * (2 if flash_attn else 4)
    attention = _attention(network)
    if not flash_attn:
        scores = network.heads * max(cache.full_cells, cache.window_cells, 0 if layers else tokens)
        attention = scores + max(attention, 3 * network.width + 2 * network.query + 2 * network.kv)
    body = masks + 4 * tokens * max(_feed_forward(network), _experts(network), attention)
    logits = 4 * min(tokens, outputs or tokens) * (network.vocab_size + 2 * network.width) if layers else 0
    return max(body, logits) + 24 * tokens


def _feed_forward(net: Network) -> int:
    """Values per position."""
    rows = (3 if net.arch in _THREE_ROWS else 4) * net.width
    return net.inner * (1 if net.arch in _UNGATED else 3) + rows if net.inner else 0


def _experts(net: Network) -> int:
    """Values per position: the chosen experts' outputs find room where gate and up were, or come on top."""
    inner, outer = net.experts_used * net.expert_inner, net.experts_used * net.width
    return 3 * inner + (5 * net.width if outer <= 2 * inner else outer + 4 * net.width) if inner else 0


def _attention(net: Network) -> int:
    """Values per position, without scores; MLA's queries are as wide as the latent vector, for every head."""
    if net.rank:
        return 2 * net.heads * net.head + net.heads * net.rank
    return 2 * net.width + 2 * net.query + max(net.query, 2 * net.kv)


def reserve(
    metadata: Metadata,
    shapes: Mapping[str, tuple[int, ...]],
    vocab_size: int,
    contexts: Sequence[int],
    *,
    ubatch: int = 512,
    outputs: int = 1,
    type_k: str = "F16",
    type_v: str = "F16",
    flash_attn: bool = True,
) -> dict[int, int]:
    """Bytes of the compute buffers for each context, by llama.cpp's own planning (to 5 KiB); in a child process.

    `metadata`: the model's, with or without its vocabulary, which is left out. `shapes`: of all tensors, in numpy
    order; their types do not matter. `outputs` 0: as llama.cpp's tools reserve it. UnsupportedError where llama.cpp
    does not take the model; FitError after a minute.
    """
    with scratch_directory() as folder:
        header = folder / "header.gguf"
        _write_header(header, metadata, shapes, vocab_size)
        asked = Reservation(
            header=str(header),
            contexts=tuple(contexts),
            type_k=type_k,
            type_v=type_v,
            ubatch=ubatch,
            outputs=outputs,
            flash_attn=flash_attn,
        )
        told = run_child(
            "efficli.ops.dry_context:reserve", question(asked), what="planning compute buffers", timeout_s=60
        )
    return dict(zip(contexts, told, strict=True))


def _write_header(path: Path, metadata: Metadata, shapes: Mapping[str, tuple[int, ...]], vocab_size: int) -> None:
    """A file with the metadata and F32 tensors whose data is a hole."""
    arch = metadata["general.architecture"].value
    kept = {
        key: field for key, field in metadata.items() if not key.startswith(("general.", "tokenizer.ggml.", "efficli."))
    }
    kept |= {
        key: metadata[key] for key in ("general.architecture", "tokenizer.ggml.token_type_count") if key in metadata
    }
    kept |= {f"{arch}.vocab_size": u32(vocab_size), "tokenizer.ggml.model": string("none")}
    stored = [StoredTensor(name, shape, TYPE_IDS["F32"], 4 * prod(shape)) for name, shape in shapes.items()]
    layout = lay_out(kept, stored)
    with writing(path), path.open("wb") as file:
        file.write(layout.head)
        file.truncate(layout.nbytes)


def vocabulary_bytes(tokens: int, merges: int = 0) -> int:
    """Bytes of llama.cpp's tables for a vocabulary of so many tokens and BPE merges, within 20 %.

    A BPE vocabulary has about as many merges as tokens (Llama 3 and Gemma 4 twice as many). One of the T5 kind (UGM)
    takes three times as much as this.
    """
    return round(_TABLES + _PER_TOKEN * tokens + _PER_MERGE * merges)


def scratch_bytes(
    network: Network,
    layers: Sequence[CacheLayer],
    ctx: int,
    *,
    ubatch: int = 512,
    flash_attn: bool = True,
    threads: int = 4,
    types: Iterable[str] = ("Q8_0",),
    merges: int = 0,
    compute: int | None = None,
) -> Scratch:
    """Anonymous memory of a llama.cpp process besides the cache and repacked weights, when a prompt fills the context.

    `types`: of the file's weights; they decide how a micro-batch is converted (`ggml_graph_plan`). `merges`: of a BPE
    vocabulary. `compute`: what `reserve` found, instead of the formula. The range holds the errors of the parts.
    """
    exact = compute is not None
    found = (
        compute if compute is not None else compute_bytes(network, layers, ctx, ubatch=ubatch, flash_attn=flash_attn)
    )
    work = _work_bytes(network, min(ctx, ubatch), threads, types)
    vocabulary = vocabulary_bytes(network.vocab_size, merges)
    logits = 8 * network.vocab_size  # of one position, and `token_ids_full_vocab`
    process = round(_PROCESS + _GRAPH + logits)
    error = 0.0 if exact else (FORMULA_ERROR if flash_attn else FORMULA_ERROR_PLAIN) * found
    total = found + work + vocabulary + process
    wide = _VOCABULARY_ERROR * vocabulary
    spread = Range(total, total - error - wide - (_GRAPH - _GRAPH_LOW), total + error + wide + (_GRAPH_HIGH - _GRAPH))
    return Scratch(compute=found, work=work, vocabulary=vocabulary, process=process, total=spread)


def _work_bytes(net: Network, tokens: int, threads: int, types: Iterable[str]) -> int:
    """`ggml_graph_plan`: the larger of a product's converted input and the tiles of flash attention."""
    widest = max(net.inner, net.width, net.query, net.experts_used * net.expert_inner)
    converted = max((_activation(kind) for kind in types), default=0.0) * tokens * widest
    tiles = 4 * threads * (4 * _TILE * net.head + 2 * _TILE * _TILE)
    return round(max(converted, tiles))


def _activation(kind: str) -> float:
    """Bytes of a value in the type that a weight of this type is multiplied with (`vec_dot_type`)."""
    name = kind.upper()
    by_256 = name.endswith("_K") or name.startswith(("IQ1", "IQ2", "IQ3", "TQ")) or name == "IQ4_XS"
    return _BYTES_OF_ACTIVATION.get(name, _ACTIVATION_Q8_K if by_256 else _ACTIVATION_Q8_0)
