"""Headers of graphs that `export` does not write: MLA with experts (deepseek2), convolutions and attention (lfm2)."""

from __future__ import annotations

from pathlib import Path

from gguf import GGUFValueType

from efficli.export.gguf.layout import Metadata, array, f32, string, u32
from tests.planning.sparse import write_header

Shapes = dict[str, tuple[int, ...]]
Tensors = dict[str, tuple[str, tuple[int, ...]]]


def _common(arch: str, layers: int, width: int, ffn: int, heads: int, vocab: int) -> Metadata:
    values = {
        "block_count": u32(layers),
        "context_length": u32(32768),
        "embedding_length": u32(width),
        "feed_forward_length": u32(ffn),
        "attention.head_count": u32(heads),
        "attention.layer_norm_rms_epsilon": f32(1e-6),
        "vocab_size": u32(vocab),
    }
    return {"general.architecture": string(arch)} | {f"{arch}.{key}": value for key, value in values.items()}


def _mixture(width: int, expert: int, experts: int, shared: int) -> Shapes:
    """A feed-forward of experts, and of those that every token takes."""
    inner = shared * expert
    shapes: Shapes = {"ffn_gate_inp": (experts, width)}
    shapes |= {f"ffn_{name}_exps": (experts, expert, width) for name in ("gate", "up")}
    shapes |= {"ffn_down_exps": (experts, width, expert), "ffn_down_shexp": (width, inner)}
    return shapes | {f"ffn_{name}_shexp": (inner, width) for name in ("gate", "up")}


def _block(layer: int, shapes: Shapes, weights: str) -> Tensors:
    """One layer's tensors; vectors, routers and convolutions are F32."""
    plain = ("ffn_gate_inp", "shortconv.conv")
    return {
        f"blk.{layer}.{name}.weight": ("F32" if len(shape) == 1 or name in plain else weights, shape)
        for name, shape in shapes.items()
    }


def write_mla(
    path: Path,
    *,
    layers: int = 3,
    width: int = 64,
    heads: int = 4,
    rank: int = 32,
    rope: int = 8,
    nope: int = 16,
    value: int = 16,
    ffn: int = 96,
    expert: int = 48,
    experts: int = 4,
    used: int = 2,
    shared: int = 1,
    vocab: int = 96,
    weights: str = "F16",
) -> Metadata:
    """A DeepSeek-V2 whose queries have a low rank too: one dense layer, then experts; its metadata."""
    arch, query = "deepseek2", 2 * rank
    more = {
        "attention.head_count_kv": u32(1),
        "attention.q_lora_rank": u32(query),
        "attention.kv_lora_rank": u32(rank),
        "attention.key_length": u32(rank + rope),
        "attention.value_length": u32(rank),
        "attention.key_length_mla": u32(nope + rope),
        "attention.value_length_mla": u32(value),
        "rope.dimension_count": u32(rope),
        "leading_dense_block_count": u32(1),
        "expert_count": u32(experts),
        "expert_used_count": u32(used),
        "expert_shared_count": u32(shared),
        "expert_feed_forward_length": u32(expert),
    }
    metadata = _common(arch, layers, width, ffn, heads, vocab) | {f"{arch}.{key}": one for key, one in more.items()}
    tensors: Tensors = {
        "token_embd.weight": (weights, (vocab, width)),
        "output_norm.weight": ("F32", (width,)),
        "output.weight": (weights, (vocab, width)),
    }
    attention: Shapes = {
        "attn_norm": (width,),
        "attn_q_a_norm": (query,),
        "attn_kv_a_norm": (rank,),
        "attn_q_a": (query, width),
        "attn_q_b": (heads * (nope + rope), query),
        "attn_kv_a_mqa": (rank + rope, width),
        "attn_k_b": (heads, rank, nope),
        "attn_v_b": (heads, value, rank),
        "attn_output": (width, heads * value),
        "ffn_norm": (width,),
    }
    dense: Shapes = {"ffn_gate": (ffn, width), "ffn_up": (ffn, width), "ffn_down": (width, ffn)}
    for i in range(layers):
        shapes = attention | (_mixture(width, expert, experts, shared) if i else dense)
        tensors |= _block(i, shapes, weights)
    write_header(path, metadata, tensors)
    return metadata


def write_hybrid(
    path: Path,
    *,
    kv_heads: tuple[int, ...] = (0, 0, 2, 0, 2),
    width: int = 64,
    heads: int = 4,
    kernel: int = 3,
    ffn: int = 96,
    vocab: int = 96,
    weights: str = "F16",
) -> Metadata:
    """An LFM2: attention in layers that have key/value heads, a short convolution in the others; its metadata."""
    arch, head = "lfm2", width // heads
    metadata = _common(arch, len(kv_heads), width, ffn, heads, vocab)
    metadata[f"{arch}.attention.head_count_kv"] = array(kv_heads, GGUFValueType.INT32)
    metadata[f"{arch}.shortconv.l_cache"] = u32(kernel)
    tensors: Tensors = {
        "token_embd.weight": (weights, (vocab, width)),
        "token_embd_norm.weight": ("F32", (width,)),
    }
    for i, shared in enumerate(kv_heads):
        shapes: Shapes = {"attn_norm": (width,), "ffn_norm": (width,)}
        shapes |= {"ffn_gate": (ffn, width), "ffn_up": (ffn, width), "ffn_down": (width, ffn)}
        if shared:
            shapes |= {"attn_q_norm": (head,), "attn_k_norm": (head,)}
            shapes |= {"attn_q": (width, width), "attn_output": (width, width)}
            shapes |= {f"attn_{name}": (shared * head, width) for name in ("k", "v")}
        else:
            shapes |= {"shortconv.conv": (width, kernel), "shortconv.in_proj": (3 * width, width)}
            shapes |= {"shortconv.out_proj": (width, width)}
        tensors |= _block(i, shapes, weights)
    write_header(path, metadata, tensors)
    return metadata
