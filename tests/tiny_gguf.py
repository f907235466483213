"""A Llama of 25 thousand weights as a GGUF file, written by gguf-py: for tests of the runtime, not of the converter."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

VOCAB = 64


def write_tiny(
    path: Path, *, arch: str = "llama", without: str | None = None, seed: int = 0, vocab: int = VOCAB
) -> Path:
    """Two layers, 32 wide, no tokenizer: token ids in, token ids out. `without` leaves a tensor out."""
    random, width, ffn = np.random.default_rng(seed), 32, 64
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(2)
    writer.add_context_length(256)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("none")
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (vocab, width),
        "output_norm.weight": (width,),
        "output.weight": (vocab, width),
    }
    for layer in ("blk.0.", "blk.1."):
        shapes |= {f"{layer}{name}.weight": (width,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"{layer}attn_{name}.weight": (width, width) for name in ("q", "k", "v", "output")}
        shapes |= {f"{layer}ffn_{name}.weight": (ffn, width) for name in ("gate", "up")}
        shapes |= {f"{layer}ffn_down.weight": (width, ffn)}
    for name, shape in shapes.items():
        values = 0.3 * random.standard_normal(shape, dtype=np.float32)
        if name != without:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
