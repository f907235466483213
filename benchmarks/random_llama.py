"""Write a Llama checkpoint of random bfloat16 weights, with a small SentencePiece vocabulary, in little memory."""

from __future__ import annotations

import json
import math
import shutil
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

TINYLLAMA = {"hidden": 2048, "ffn": 5632, "heads": 32, "kv_heads": 4, "vocab": 32000}
"""TinyLlama's shape: 22 layers make 1.1 billion weights, 2.2 GB."""

HUNDRED_MILLION = {"layers": 12, "hidden": 768, "ffn": 2048, "heads": 12, "kv_heads": 4, "vocab": 16000}
"""100.1 million weights: twice the caches of a small machine at 8 bits."""

_SLAB = 1 << 22


def write(
    folder: Path, *, layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, vocab: int, text: Path
) -> int:
    """Write the checkpoint (again unless it is complete); bytes of its weights. `text` trains the vocabulary."""
    tensors = _tensors(layers, hidden, ffn, heads, kv_heads, vocab)
    size = 2 * _count(tensors)
    done = folder / "config.json"
    if done.exists():
        return size
    folder.mkdir(parents=True, exist_ok=True)
    _weights(folder / "model.safetensors", tensors)
    tokens = _vocabulary(folder, text)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": max(vocab, tokens),
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    done.write_text(json.dumps(config, indent=2))
    return size


def write_apart(folder: Path, text: Path, shape: Mapping[str, int]) -> None:
    """`write` in a process of its own: the memory that it takes is not that of a process which measures memory."""
    told = json.dumps({"folder": str(folder), "text": str(text), "shape": dict(shape)})
    subprocess.run([sys.executable, __file__, told], check=True)


def count(*, layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, vocab: int) -> int:
    """Weights of the checkpoint; each takes two bytes."""
    return _count(_tensors(layers, hidden, ffn, heads, kv_heads, vocab))


def _count(tensors: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in tensors.values())


def _tensors(layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, vocab: int) -> dict[str, tuple[int, ...]]:
    keys = hidden // heads * kv_heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for n in range(layers):
        layer = f"model.layers.{n}."
        shapes[layer + "input_layernorm.weight"] = (hidden,)
        shapes[layer + "self_attn.q_proj.weight"] = (hidden, hidden)
        shapes[layer + "self_attn.k_proj.weight"] = (keys, hidden)
        shapes[layer + "self_attn.v_proj.weight"] = (keys, hidden)
        shapes[layer + "self_attn.o_proj.weight"] = (hidden, hidden)
        shapes[layer + "post_attention_layernorm.weight"] = (hidden,)
        shapes[layer + "mlp.gate_proj.weight"] = (ffn, hidden)
        shapes[layer + "mlp.up_proj.weight"] = (ffn, hidden)
        shapes[layer + "mlp.down_proj.weight"] = (hidden, ffn)
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def _weights(path: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    """Gaussian weights of sd 0.02 (norms: 1), each tensor from its own seed."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for seed, shape in enumerate(tensors.values()):
            generator = np.random.default_rng(seed)
            count = math.prod(shape)
            for start in range(0, count, _SLAB):
                size = min(_SLAB, count - start)
                values = generator.standard_normal(size, np.float32) * np.float32(0.02)
                if len(shape) == 1:
                    values += 1
                file.write((values.view(np.uint32) >> 16).astype(np.uint16).data)


def _vocabulary(folder: Path, text: Path) -> int:
    """Train a SentencePiece vocabulary of 4000 tokens with byte fallback; its size. Converters pad it."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=4000,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.9995,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        max_sentence_length=65536,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).vocab_size()


def remove(folder: Path) -> None:
    """Delete the checkpoint."""
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    write(Path(asked["folder"]), text=Path(asked["text"]), **asked["shape"])
