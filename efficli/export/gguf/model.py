"""A model as GGUF: its metadata, its tensors with their transforms, and what llama.cpp does otherwise.

Names come from the `gguf` package, facts from `families` and `graphs`. Nothing of the weights is read here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import gguf
import numpy as np
from gguf import MODEL_TENSOR, Keys

from efficli.checkpoint import Checkpoint
from efficli.checkpoint.strict_json import parse
from efficli.errors import CheckpointError, UnsupportedError
from efficli.export.gguf.graphs import GRAPHS, check_graph, context_length, needs_factors, yarn_scale
from efficli.export.gguf.layout import Metadata, OutTensor, array, boolean, f32, string, u32
from efficli.families import ModelShape, Rope, TensorSpec, check_tensors, inverse_frequencies
from efficli.progress import Silent

_TENSORS = {
    "embedding": MODEL_TENSOR.TOKEN_EMBD,
    "positions": MODEL_TENSOR.POS_EMBD,
    "token_types": MODEL_TENSOR.TOKEN_TYPES,
    "embedding_norm": MODEL_TENSOR.TOKEN_EMBD_NORM,
    "output_norm": MODEL_TENSOR.OUTPUT_NORM,
    "output": MODEL_TENSOR.OUTPUT,
    "attn_norm": MODEL_TENSOR.ATTN_NORM,
    "attn_post_norm": MODEL_TENSOR.ATTN_POST_NORM,
    "attn_out_norm": MODEL_TENSOR.ATTN_OUT_NORM,
    "attn_sub_norm": MODEL_TENSOR.ATTN_SUB_NORM,
    "attn_q_norm": MODEL_TENSOR.ATTN_Q_NORM,
    "attn_k_norm": MODEL_TENSOR.ATTN_K_NORM,
    "attn_qkv": MODEL_TENSOR.ATTN_QKV,
    "attn_q": MODEL_TENSOR.ATTN_Q,
    "attn_k": MODEL_TENSOR.ATTN_K,
    "attn_v": MODEL_TENSOR.ATTN_V,
    "attn_out": MODEL_TENSOR.ATTN_OUT,
    "ffn_norm": MODEL_TENSOR.FFN_NORM,
    "ffn_post_norm": MODEL_TENSOR.FFN_POST_NORM,
    "ffn_sub_norm": MODEL_TENSOR.FFN_SUB_NORM,
    "ffn_gate": MODEL_TENSOR.FFN_GATE,
    "ffn_up": MODEL_TENSOR.FFN_UP,
    "ffn_gate_up": MODEL_TENSOR.FFN_UP,
    "ffn_down": MODEL_TENSOR.FFN_DOWN,
    "layer_out_norm": MODEL_TENSOR.LAYER_OUT_NORM,
    "router": MODEL_TENSOR.FFN_GATE_INP,
    "expert_gate": MODEL_TENSOR.FFN_GATE_EXP,
    "expert_up": MODEL_TENSOR.FFN_UP_EXP,
    "expert_down": MODEL_TENSOR.FFN_DOWN_EXP,
}
"""What a role of `families` is called; `expert_gate_up` becomes two tensors."""
_KEEP_F32 = frozenset({"router", "positions", "token_types"})
_POOLING = {
    "pooling_mode_mean_tokens": gguf.PoolingType.MEAN,
    "pooling_mode_cls_token": gguf.PoolingType.CLS,
    "pooling_mode_lasttoken": gguf.PoolingType.LAST,
    "mean": gguf.PoolingType.MEAN,
    "cls": gguf.PoolingType.CLS,
    "lasttoken": gguf.PoolingType.LAST,
}


def layout(shape: ModelShape, ckpt: Checkpoint, *, strict: bool = False) -> tuple[Metadata, list[OutTensor], list[str]]:
    """The `{arch}.*` metadata, all tensors of the file, and rows for the report.

    Checks the checkpoint's tensors against its config.json by their headers alone (`families.check_tensors`), and the
    shape against what llama.cpp computes. `general.*` and `tokenizer.*` belong to others, but for the number of token
    types, which llama.cpp wants of BERT.
    """
    rows = check_graph(shape)
    notes = Silent()
    found = check_tensors(ckpt.tensors, shape, strict=strict, progress=notes)
    rows += notes.notes
    metadata = _metadata(shape)
    if not shape.facts.causal:
        pooling, row = _pooling(ckpt)
        metadata[Keys.LLM.POOLING_TYPE.format(arch=shape.facts.gguf_arch)] = u32(pooling)
        rows += row
    if shape.architecture == "Gemma3ForConditionalGeneration" and any("vision_tower." in name for name in ckpt.tensors):
        rows.append("the vision tower and its projector are left out: the file is the language model")
    if shape.architecture == "BertForMaskedLM":
        rows.append("the head that predicts masked words is left out: the file gives embeddings")
    return metadata, list(_tensors(shape, found)), rows


def _metadata(shape: ModelShape) -> Metadata:
    """Every `{arch}.*` value but the pooling."""
    arch, facts = shape.facts.gguf_arch, shape.facts
    eps = Keys.Attention.LAYERNORM_EPS if facts.norm == "layer" else Keys.Attention.LAYERNORM_RMS_EPS
    values: Metadata = {
        Keys.LLM.BLOCK_COUNT: u32(shape.num_layers),
        Keys.LLM.CONTEXT_LENGTH: u32(context_length(shape)),
        Keys.LLM.EMBEDDING_LENGTH: u32(shape.hidden_size),
        Keys.LLM.FEED_FORWARD_LENGTH: u32(shape.dense_size or shape.intermediate_size),
        Keys.Attention.HEAD_COUNT: u32(shape.num_heads),
        Keys.Attention.HEAD_COUNT_KV: u32(shape.num_kv_heads),
        eps: f32(shape.norm_eps),
        Keys.LLM.VOCAB_SIZE: u32(shape.vocab_size),
    }
    if GRAPHS[arch].free_head_dim:
        values[Keys.Attention.KEY_LENGTH] = u32(shape.head_dim)
        values[Keys.Attention.VALUE_LENGTH] = u32(shape.head_dim)
    if shape.rope is not None:
        values |= _rope_metadata(shape, shape.rope)
    if shape.num_experts:
        values[Keys.LLM.EXPERT_COUNT] = u32(shape.num_experts)
        values[Keys.LLM.EXPERT_USED_COUNT] = u32(shape.experts_per_token)
        values[Keys.LLM.EXPERT_FEED_FORWARD_LENGTH] = u32(shape.intermediate_size)
    if shape.attention_softcap is not None:
        values[Keys.LLM.ATTN_LOGIT_SOFTCAPPING] = f32(shape.attention_softcap)
    if shape.logit_softcap is not None:
        values[Keys.LLM.FINAL_LOGIT_SOFTCAPPING] = f32(shape.logit_softcap)
    if facts.name == "granite":
        values[Keys.Attention.SCALE] = f32(shape.attention_scale)
        values[Keys.LLM.EMBEDDING_SCALE] = f32(shape.embedding_scale)
        values[Keys.LLM.RESIDUAL_SCALE] = f32(shape.residual_scale)
        values[Keys.LLM.LOGIT_SCALE] = f32(1.0 / shape.logit_scale)  # llama.cpp divides by it
    if not facts.causal:
        values[Keys.Attention.CAUSAL] = boolean(False)
        values[Keys.Tokenizer.TOKEN_TYPE_COUNT] = u32(shape.num_token_types)
    values |= _window_metadata(shape)
    return {key.format(arch=arch): value for key, value in values.items()}


def _rope_metadata(shape: ModelShape, rope: Rope) -> Metadata:
    """Rotary embedding: base, dimensions, scaling."""
    graph = GRAPHS[shape.facts.gguf_arch]
    values: Metadata = {Keys.Rope.FREQ_BASE: f32(rope.theta)}
    if graph.interleaved or rope.dim != shape.head_dim or shape.facts.name == "phi3":
        values[Keys.Rope.DIMENSION_COUNT] = u32(rope.dim)
    if shape.local_rope is not None and shape.local_rope.theta != rope.theta:
        values[Keys.Rope.FREQ_BASE_SWA] = f32(shape.local_rope.theta)
    if rope.scaling == "linear":
        values[Keys.Rope.SCALING_TYPE] = string("linear")
        values[Keys.Rope.SCALING_FACTOR] = f32(rope.factor)
    elif rope.scaling == "longrope" or shape.facts.name == "phi3":
        values[Keys.Rope.SCALING_ORIG_CTX_LEN] = u32(rope.original_positions)
        if rope.scaling == "longrope":
            values[Keys.Rope.SCALING_TYPE] = string("longrope")
            values[Keys.Rope.SCALING_ATTN_FACTOR] = f32(rope.attention_factor)
    elif rope.scaling == "yarn" and needs_factors(rope, graph):
        values[Keys.Rope.SCALING_ATTN_FACTOR] = f32(rope.attention_factor)
    elif rope.scaling == "yarn":
        values[Keys.Rope.SCALING_TYPE] = string("yarn")
        values[Keys.Rope.SCALING_FACTOR] = f32(rope.factor)
        values[Keys.Rope.SCALING_ORIG_CTX_LEN] = u32(rope.original_positions)
        extra = rope.attention_factor / yarn_scale(rope)
        if abs(extra - 1.0) > 1e-9:
            values[Keys.Rope.SCALING_ATTN_FACTOR] = f32(extra)
    return values


def _window_metadata(shape: ModelShape) -> Metadata:
    """Sliding windows, and which layers have one."""
    name = shape.facts.name
    if name == "phi3":  # 0 where there is none: how llama.cpp tells Phi-4 from Phi-3
        return {Keys.Attention.SLIDING_WINDOW: u32(shape.sliding_window or 0)}
    if not GRAPHS[shape.facts.gguf_arch].windows:
        return {}
    if shape.sliding_window is None or not any(shape.windowed):
        # gemma2's graph always has windows, and an all-false pattern ends the process: a window as long as the context
        return {Keys.Attention.SLIDING_WINDOW: u32(shape.max_positions)} if name == "gemma2" else {}
    values = {Keys.Attention.SLIDING_WINDOW: u32(shape.sliding_window)}
    step = 2 if name == "gemma2" else 6
    if shape.windowed != tuple(bool((i + 1) % step) for i in range(shape.num_layers)):
        values[Keys.Attention.SLIDING_WINDOW_PATTERN] = array(shape.windowed, gguf.GGUFValueType.BOOL)
    return values


def _tensors(shape: ModelShape, found: Mapping[str, TensorSpec]) -> Iterator[OutTensor]:
    """The file's tensors in the order of the network."""
    experts: dict[str, list[tuple[str, TensorSpec]]] = {}
    if shape.rope is not None:
        yield from _rope_tensors(shape, shape.rope)
    for source, spec in found.items():
        if spec.expert is not None:
            waiting = experts.setdefault(spec.role, [])
            waiting.append((source, spec))
            if len(waiting) == shape.num_experts:
                yield _stacked(shape, experts.pop(spec.role))
        elif spec.role == "expert_gate_up":
            yield from _split(shape, source, spec)
        else:
            yield _tensor(shape, source, spec)
    if shape.tied and GRAPHS[shape.facts.gguf_arch].head == "written":
        source, spec = next((name, spec) for name, spec in found.items() if spec.role == "embedding")
        yield OutTensor(name=_name("output", None), shape=spec.shape, sources=(source,))


def _tensor(shape: ModelShape, source: str, spec: TensorSpec) -> OutTensor:
    """One tensor from one source."""
    facts, graph = shape.facts, GRAPHS[shape.facts.gguf_arch]
    size = spec.shape
    keep = len(size) == 1 or spec.role in _KEEP_F32 or spec.role.endswith("_norm")
    name = _name(spec.role, spec.layer, "bias" if source.endswith((".bias", ".beta")) else "weight")
    if graph.interleaved and spec.role in ("attn_q", "attn_k"):
        heads = shape.num_heads if spec.role == "attn_q" else shape.num_kv_heads
        return OutTensor(
            name=name, shape=size, sources=(source,), transform="permute", heads=heads, keep_f32=keep
        )  # fmt: skip
    if facts.norm_offset == 1.0 and spec.role.endswith("_norm"):
        return OutTensor(name=name, shape=size, sources=(source,), transform="add_one", keep_f32=True)
    if facts.transposed and spec.layer is not None and len(size) == 2:
        return OutTensor(name=name, shape=size[::-1], sources=(source,), transform="transpose")
    return OutTensor(name=name, shape=size, sources=(source,), keep_f32=keep)


def _stacked(shape: ModelShape, parts: list[tuple[str, TensorSpec]]) -> OutTensor:
    """The same matrix of all experts of a layer."""
    spec = parts[0][1]
    return OutTensor(
        name=_name(spec.role, spec.layer),
        shape=(shape.num_experts, *spec.shape),
        sources=tuple(name for name, _ in parts),
        transform="stack",
    )


def _split(shape: ModelShape, source: str, spec: TensorSpec) -> Iterator[OutTensor]:
    """Gate and up of all experts, from one tensor (experts, gate rows then up rows, columns)."""
    half = shape.intermediate_size
    for role, first in (("expert_gate", 0), ("expert_up", half)):
        yield OutTensor(
            name=_name(role, spec.layer),
            shape=(shape.num_experts, half, spec.shape[-1]),
            sources=(source,),
            transform="slice",
            span=(first, first + half),
        )


def _rope_tensors(shape: ModelShape, rope: Rope) -> Iterator[OutTensor]:
    """One factor for each rotated pair, by which llama.cpp divides its frequency."""
    factors = []
    if needs_factors(rope, GRAPHS[shape.facts.gguf_arch]):
        plain = rope.theta ** -(np.arange(0, rope.dim, 2, dtype=np.float64) / rope.dim)
        factors.append((MODEL_TENSOR.ROPE_FREQS, tuple((plain / inverse_frequencies(rope)).tolist())))
    if rope.scaling == "longrope":
        factors.append((MODEL_TENSOR.ROPE_FACTORS_LONG, rope.long_factors))
        factors.append((MODEL_TENSOR.ROPE_FACTORS_SHORT, rope.short_factors))
    for tensor, values in factors:
        yield OutTensor(
            name=f"{gguf.TENSOR_NAMES[tensor]}.weight",
            shape=(rope.dim // 2,),
            sources=(),
            transform="constant",
            values=values,
            keep_f32=True,
        )


def _name(role: str, layer: int | None, kind: str = "weight") -> str:
    """The file's name for a role."""
    return f"{gguf.TENSOR_NAMES[_TENSORS[role]].format(bid=layer)}.{kind}"


def _pooling(ckpt: Checkpoint) -> tuple[int, list[str]]:
    """How token vectors become one vector, as sentence-transformers writes it."""
    file = ckpt.file("modules.json")
    modules = parse(file.read_text("utf-8")) if file else []
    found = [m for m in modules if isinstance(m, dict)] if isinstance(modules, list) else []
    folder = next((str(m.get("path")) for m in found if str(m.get("type")).endswith("Pooling")), "1_Pooling")
    name = f"{folder}/config.json"
    settings = ckpt.json(name) if ckpt.file(name) else None
    if settings is None:
        return gguf.PoolingType.MEAN, ["no 1_Pooling/config.json: the mean of all tokens is taken"]
    chosen = [key for key in _POOLING if settings.get(key) is True] or [str(settings.get("pooling_mode"))]
    if len(chosen) > 1:
        raise UnsupportedError(f"{len(chosen)} poolings at once: {', '.join(chosen)}", where=name)
    pooling = _POOLING.get(chosen[0])
    if pooling is None:
        raise CheckpointError("no pooling that is known: mean, cls or lasttoken", where=name)
    return pooling, []
