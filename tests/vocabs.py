"""Tokenizers trained in the test, checkpoints round them, vocabulary-only GGUF files and their ids."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from efficli.checkpoint import Checkpoint, open_checkpoint
from efficli.export.gguf.header import lay_out
from efficli.export.gguf.layout import string
from efficli.export.gguf.pretokenizer_table import GPT2, PreTokenizer
from efficli.export.gguf.vocab import PROBE, Vocab, read_vocab
from efficli.export.gguf.vocab_check import Mismatch, compare_ids
from tests.pico import TEXT, write_safetensors

CORPUS = (*PROBE * 3, TEXT)
"""What is trained on: the probe itself, so that merges across wrongly cut words exist and a wrong cut shows."""
SPECIALS = ["<|endoftext|>", "<s>"]
CHAT_TEMPLATE = "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"


def write_checkpoint(
    folder: Path, tokenizer: Any = None, config: Mapping[str, Any] | None = None, model: Mapping[str, Any] | None = None
) -> Path:
    """A checkpoint of one tiny tensor round a tokenizer (a tokenizers.Tokenizer, or parsed JSON) and its config."""
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors", {"x": ("F32", (1,), bytes(4))})
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **(model or {})}))
    if tokenizer is not None:
        text = json.dumps(tokenizer) if isinstance(tokenizer, Mapping) else tokenizer.to_str()
        (folder / "tokenizer.json").write_text(text)
    settings = {"bos_token": "<s>", "eos_token": "<|endoftext|>"} if config is None else config
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def pre_tokenizer(splits: Iterable[str], *, byte_level: bool = True) -> Any:
    """The steps of a row of the table, as a tokenizer.json has them."""
    from tokenizers import Regex, pre_tokenizers

    steps: list[Any] = []
    for split in splits:
        if split == GPT2:
            steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True))
        elif split == r"\p{N}":
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        elif split.endswith("punctuation"):
            steps.append(pre_tokenizers.Punctuation("contiguous" if split.startswith("contiguous") else "isolated"))
        else:
            steps.append(pre_tokenizers.Split(Regex(split), "isolated"))
    if byte_level and GPT2 not in splits:
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    return pre_tokenizers.Sequence(steps)


def train_bpe(row: PreTokenizer, *, size: int = 1500, normalizer: Any = None, steps: Any = None) -> Any:
    """A byte-level BPE tokenizer that cuts words as `row` says."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=row.whole_words))
    tokenizer.pre_tokenizer = pre_tokenizer(row.splits) if steps is None else steps
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=1,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def train_sentencepiece(folder: Path, **options: Any) -> Path:
    """Write folder/tokenizer.model; SentencePiece BPE with bytes, as Llama's, unless `options` say otherwise."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    lines = [line for text in CORPUS for line in text.split("\n") if line.strip() and len(line) < 2000]
    settings: dict[str, Any] = {
        "vocab_size": 1200,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
        "character_coverage": 0.995,
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, **{**settings, **options}
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


def write_vocab(path: Path, vocab: Vocab, name: str = "test") -> Path:
    """A GGUF file of the vocabulary alone."""
    own = {"general.architecture": string("llama"), "general.name": string(name)}
    path.write_bytes(lay_out(own | vocab.metadata, []).head)
    return path


def values(vocab: Vocab) -> dict[str, Any]:
    """Key without `tokenizer.` -> value."""
    return {key.removeprefix("tokenizer.").removeprefix("ggml."): field.value for key, field in vocab.metadata.items()}


def round_trip(
    folder: Path, rows: int | None = None, *, arch: str = "llama", force: str | None = None, name: str = "test"
) -> tuple[Vocab, list[Mismatch], Checkpoint]:
    """Read the vocabulary of a checkpoint, write it, and compare ids with llama.cpp's; 3 rows of padding by default."""
    from efficli.export.gguf.vocab_source import read_source

    ckpt = open_checkpoint(folder)
    vocab = read_vocab(ckpt, rows or max(read_source(ckpt).pieces) + 4, arch, pre_tokenizer=force)
    return vocab, compare_ids(write_vocab(folder / "vocab.gguf", vocab, name), ckpt), ckpt


def unexplained(mismatches: Iterable[Mismatch]) -> list[str]:
    """Those that no known difference explains."""
    return [mismatch.describe() for mismatch in mismatches if not mismatch.limit]
