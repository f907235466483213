"""Pico models: real Llama checkpoints of a few hundred kB with a real tokenizer, made without torch."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

TEXT = """def read(path, size=None):
    with open(path, "rb") as file:
        return file.read(size)

class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)
        return self

for number in range(10):
    if number % 2 == 0:
        print("even", number)
    else:
        print("odd", number)

The quick brown fox jumps over the lazy dog. The return value of the function is the number of items that
were read, or None when the end of the file was reached. It's what they've said; we'll see that 12345 is not 678.
"""
"""What the tokenizer is trained on, and a text for tests that need one."""

SPECIALS = ("<|endoftext|>", "<|pad|>")
TOKENIZER_SIZE = 384
SIZES = {"F32": 4, "BF16": 2, "F16": 2, "F64": 8}


def to_bytes(values: NDArray[np.floating[Any]], dtype: str) -> bytes:
    """Little-endian bytes of `values` as F32, F64, F16 or BF16 (rounded to nearest, ties to even)."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, dtype="<f4").view("<u4").astype(np.uint64)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
    return np.ascontiguousarray(values).astype({"F32": "<f4", "F16": "<f2", "F64": "<f8"}[dtype]).tobytes()


def write_safetensors(
    path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]], metadata: Mapping[str, str] | None = None
) -> None:
    """Write name -> (dtype, shape, bytes) as a safetensors file; nothing is checked: tests write wrong ones too."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    write_raw(path, json.dumps(header), b"".join(data for _, _, data in tensors.values()))


def write_raw(path: Path, header: str | bytes, data: bytes = b"", *, length: int | None = None) -> None:
    """Write a safetensors file from its header's text; `length` lies about the header's length."""
    text = header.encode() if isinstance(header, str) else header
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def write_tokenizer(folder: Path, size: int = TOKENIZER_SIZE, *, chat_template: str | None = None) -> None:
    """A byte-level BPE of `size` ids with GPT-2's pre-tokenizer, trained on TEXT, and its tokenizer_config.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=1,
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIALS[0],
        "eos_token": SPECIALS[0],
        "pad_token": SPECIALS[1],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 256,
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def llama_tensors(config: Mapping[str, Any], seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Random weights for a Llama `config`: every one differs from its default, norms and biases by sd 0.1."""
    rng = np.random.default_rng(seed)
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head_dim = config["head_dim"]
    queries, keys = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    out: dict[str, NDArray[np.float32]] = {}

    def linear(name: str, rows: int, columns: int, bias: bool) -> None:
        out[name + ".weight"] = (rng.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)
        if bias:
            out[name + ".bias"] = (0.1 * rng.standard_normal(rows)).astype(np.float32)

    def norm(name: str) -> None:
        out[name + ".weight"] = (1 + 0.1 * rng.standard_normal(hidden)).astype(np.float32)

    out["model.embed_tokens.weight"] = rng.standard_normal((vocab, hidden)).astype(np.float32)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        norm(prefix + "input_layernorm")
        for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            linear(prefix + "self_attn." + name, rows, hidden, config["attention_bias"])
        linear(prefix + "self_attn.o_proj", hidden, queries, config["attention_bias"])
        norm(prefix + "post_attention_layernorm")
        for name in ("gate_proj", "up_proj"):
            linear(prefix + "mlp." + name, ffn, hidden, config["mlp_bias"])
        linear(prefix + "mlp.down_proj", hidden, ffn, config["mlp_bias"])
    norm("model.norm")
    if not config["tie_word_embeddings"]:
        linear("lm_head", vocab, hidden, False)
    return out


def write_shards(folder: Path, tensors: Mapping[str, NDArray[np.float32]], dtype: str = "F32", shards: int = 1) -> None:
    """Write `tensors` as model.safetensors, or as `shards` files and their index."""
    coded = {name: (dtype, values.shape, to_bytes(values, dtype)) for name, values in tensors.items()}
    if shards == 1:
        write_safetensors(folder / "model.safetensors", coded, {"format": "pt"})
        return
    names = list(coded)
    weight_map: dict[str, str] = {}
    for i in range(shards):
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        write_safetensors(folder / file, {name: coded[name] for name in part}, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(len(data) for _, _, data in coded.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def write_llama(
    folder: Path,
    *,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    ffn: int = 128,
    vocab: int | None = None,
    tie: bool = True,
    dtype: str = "F32",
    seed: int = 0,
    shards: int = 1,
    chat_template: str | None = None,
    **config_overrides: Any,
) -> Path:
    """A Llama checkpoint in `folder` (made if need be), with tokenizer and model card; `vocab` >= 258 rows."""
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "vocab_size": vocab or TOKENIZER_SIZE,
        "max_position_embeddings": 256,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tie,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}[dtype],
    } | config_overrides
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    write_shards(folder, llama_tensors(config, seed), dtype, shards)
    write_tokenizer(folder, min(vocab or TOKENIZER_SIZE, TOKENIZER_SIZE), chat_template=chat_template)
    (folder / "generation_config.json").write_text('{"bos_token_id": 0, "eos_token_id": 0}')
    card = "---\nlicense: apache-2.0\nlanguage: en\n---\n# Pico\n\nRandom weights for tests.\n"
    (folder / "README.md").write_text(card)
    return folder
