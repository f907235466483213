"""Random text of every Unicode category: llama.cpp's ids are the source tokenizer's.

Code points of Unicode 15 and later are left out: llama.cpp and the tokenizers package know different versions of it.
"""

from __future__ import annotations

import random
import unicodedata
from pathlib import Path

import pytest

from efficli.checkpoint import open_checkpoint
from efficli.export.gguf.pretokenizer_table import TABLE
from efficli.export.gguf.vocab import compare_ids, read_vocab
from efficli.export.gguf.vocab_check import PROBE, source_ids
from tests.vocabs import round_trip, train_bpe, train_sentencepiece, unexplained, values, write_checkpoint, write_vocab

NUMBER = 400
_COMMON = " \n\t\r'\"abcABC123.,!?-_sdtmrelv  "


def texts(seed: int) -> list[str]:
    """Random texts: mostly common characters, for the rest every category alike."""
    rng = random.Random(seed)
    known = unicodedata.ucd_3_2_0  # assigned since 2002: every version agrees on their categories, nearly
    categories: dict[str, list[str]] = {}
    for code in [*range(1, 0x3400), *range(0xAC00, 0xAC80), *range(0xF900, 0x10000), *range(0x10000, 0x1D800, 3)]:
        name = unicodedata.category(chr(code))
        if known.category(chr(code)) == name and name not in ("Cn", "Cs"):
            categories.setdefault(name, []).append(chr(code))
    names = sorted(categories)

    def character() -> str:
        return rng.choice(_COMMON) if rng.random() < 0.6 else rng.choice(categories[rng.choice(names)])

    def text() -> str:
        return "".join(character() for _ in range(rng.randint(1, 25)))

    return [text() for _ in range(NUMBER)]


@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe", "qwen2", "smollm", "deepseek-v3"])
def test_byte_level(name: str, tmp_path: Path) -> None:
    row = next(row for row in TABLE if row.name == name)
    ckpt = open_checkpoint(write_checkpoint(tmp_path, train_bpe(row)))
    vocab = read_vocab(ckpt, 1500, "llama")
    path = write_vocab(tmp_path / "vocab.gguf", vocab)
    assert compare_ids(path, ckpt, texts=texts(1)) == []


def test_sentencepiece(tmp_path: Path) -> None:
    train_sentencepiece(tmp_path)
    ckpt = open_checkpoint(write_checkpoint(tmp_path, None, {}))
    path = write_vocab(tmp_path / "vocab.gguf", read_vocab(ckpt, 1200, "llama"))
    assert compare_ids(path, ckpt, texts=texts(2)) == []


@pytest.mark.parametrize("name", ["reference", "reference-twin"])
def test_reference_checkpoints(name: str, tmp_path: Path) -> None:
    ckpt = open_checkpoint(name)
    vocab = read_vocab(ckpt, ckpt.config["vocab_size"], "llama")
    path = write_vocab(tmp_path / "vocab.gguf", vocab)
    assert compare_ids(path, ckpt) == []
    assert compare_ids(path, ckpt, texts=texts(3)) == []
    assert vocab.notes == ()
    assert (values(vocab)["pre"], values(vocab)["add_bos_token"]) == ("gpt-2", True)
    assert source_ids(ckpt, PROBE[0]) == [values(vocab)["bos_token_id"]]


def test_the_comparison_finds_a_single_missing_merge(tmp_path: Path) -> None:
    row = next(row for row in TABLE if row.name == "gpt-2")
    folder = write_checkpoint(tmp_path, train_bpe(row))
    vocab, mismatches, ckpt = round_trip(folder)
    assert mismatches == []
    del vocab.metadata["tokenizer.ggml.merges"].value[300]
    assert unexplained(compare_ids(write_vocab(tmp_path / "wrong.gguf", vocab), ckpt))
