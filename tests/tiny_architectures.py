"""GGUF files of a few thousand weights whose caches differ from a Llama's: windows, a recurrent state, none at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np

VOCAB, WIDTH, CONTEXT, WINDOW = 64, 32, 512, 32


def _writer(path: Path, arch: str) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(2)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(2 * WIDTH)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("none")
    return writer


def _finish(writer: gguf.GGUFWriter, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        values = 0.3 * random.standard_normal(shape, dtype=np.float32)
        if "ssm_a" in name:  # a state that decays
            values = -np.abs(values) - 0.1
        writer.add_tensor(name, values + ("norm" in name and name.endswith("weight")))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_windowed(path: Path) -> Path:
    """A Gemma 2: every other layer sees the last WINDOW tokens only."""
    writer = _writer(path, "gemma2")
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(8)
    writer.add_value_length(8)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_sliding_window(WINDOW)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCAB, WIDTH), "output_norm.weight": (WIDTH,)}
    for layer in ("blk.0.", "blk.1."):
        norms = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
        shapes |= {f"{layer}{name}.weight": (WIDTH,) for name in norms}
        shapes |= {f"{layer}attn_{name}.weight": (WIDTH, WIDTH) for name in ("q", "output")}
        shapes |= {f"{layer}attn_{name}.weight": (WIDTH // 2, WIDTH) for name in ("k", "v")}
        shapes |= {f"{layer}ffn_{name}.weight": (2 * WIDTH, WIDTH) for name in ("gate", "up")}
        shapes |= {f"{layer}ffn_down.weight": (WIDTH, 2 * WIDTH)}
    return _finish(writer, path, shapes)


def write_recurrent(path: Path) -> Path:
    """A Mamba: what it has read is a state that cannot be cut."""
    inner, state, rank, kernel = 2 * WIDTH, 16, 2, 4
    writer = _writer(path, "mamba")
    writer.add_head_count(0)
    writer.add_ssm_conv_kernel(kernel)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(state)
    writer.add_ssm_time_step_rank(rank)
    writer.add_layer_norm_rms_eps(1e-5)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCAB, WIDTH), "output_norm.weight": (WIDTH,)}
    for layer in ("blk.0.", "blk.1."):
        shapes |= {
            f"{layer}attn_norm.weight": (WIDTH,),
            f"{layer}ssm_in.weight": (2 * inner, WIDTH),
            f"{layer}ssm_conv1d.weight": (inner, kernel),
            f"{layer}ssm_conv1d.bias": (inner,),
            f"{layer}ssm_x.weight": (rank + 2 * state, inner),
            f"{layer}ssm_dt.weight": (inner, rank),
            f"{layer}ssm_dt.bias": (inner,),
            f"{layer}ssm_a": (inner, state),
            f"{layer}ssm_d": (inner,),
            f"{layer}ssm_out.weight": (WIDTH, inner),
        }
    return _finish(writer, path, shapes)


def write_encoder(path: Path) -> Path:
    """A BERT with mean pooling: it reads, and writes nothing."""
    writer = _writer(path, "bert")
    writer.add_head_count(4)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    writer.add_token_type_count(2)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (VOCAB, WIDTH),
        "token_types.weight": (2, WIDTH),
        "position_embd.weight": (CONTEXT, WIDTH),
        "token_embd_norm.weight": (WIDTH,),
        "token_embd_norm.bias": (WIDTH,),
    }
    for layer in ("blk.0.", "blk.1."):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            shapes |= {f"{layer}{name}.weight": (WIDTH, WIDTH), f"{layer}{name}.bias": (WIDTH,)}
        for name in ("attn_output_norm", "layer_output_norm"):
            shapes |= {f"{layer}{name}.weight": (WIDTH,), f"{layer}{name}.bias": (WIDTH,)}
        shapes |= {f"{layer}ffn_up.weight": (2 * WIDTH, WIDTH), f"{layer}ffn_up.bias": (2 * WIDTH,)}
        shapes |= {f"{layer}ffn_down.weight": (WIDTH, 2 * WIDTH), f"{layer}ffn_down.bias": (WIDTH,)}
    return _finish(writer, path, shapes)
