"""WordPiece: the real tokenizer of all-MiniLM-L6-v2, and variants of it with and without case and accents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gguf import TokenType

from efficli.checkpoint import open_checkpoint
from efficli.errors import UnsupportedError
from efficli.export.gguf.vocab import PROBE, read_vocab
from efficli.export.gguf.vocab_check import SourceTokenizer
from tests.minilm import minilm_folder
from tests.vocabs import CORPUS, round_trip, unexplained, values, write_checkpoint

LIMITS = {"words of more than 100 characters", "llama.cpp does not take Hangul apart, and drops spacing marks"}


@pytest.fixture(scope="module")
def minilm() -> Path:
    """The model's folder in its package."""
    return minilm_folder()


def test_minilm(minilm: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    config = json.loads((minilm / "tokenizer_config.json").read_text())
    tokenizer = json.loads((minilm / "tokenizer.json").read_text())
    write_checkpoint(tmp_path, tokenizer, config, {"type_vocab_size": 2, "model_type": "bert"})
    vocab, mismatches, ckpt = round_trip(tmp_path, 30522, arch="bert")
    found = values(vocab)
    assert (vocab.kind, found["model"], found["token_type_count"]) == ("wordpiece", "bert", 2)
    assert (found["bos_token_id"], found["seperator_token_id"], found["unknown_token_id"]) == (101, 102, 100)
    assert (found["cls_token_id"], found["mask_token_id"], found["padding_token_id"]) == (101, 103, 0)
    assert (found["normalizer.lowercase"], found["normalizer.strip_accents"]) == (True, True)
    assert found["tokens"][1037] == "\u2581a" and found["token_type"][101] == TokenType.CONTROL
    assert found["tokens"][tokenizer["model"]["vocab"]["##ing"]] == "ing"
    assert unexplained(mismatches) == []
    assert {m.limit for m in mismatches} == LIMITS
    assert len(mismatches) == 8
    reference = AutoTokenizer.from_pretrained(str(minilm))
    source = SourceTokenizer(ckpt)
    assert [source.ids(text) for text in PROBE] == [reference(text)["input_ids"] for text in PROBE]


@pytest.mark.parametrize(("lowercase", "accents"), [(True, None), (True, False), (False, None), (False, True)])
def test_case_and_accents(lowercase: bool, accents: bool | None, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=accents)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=1500, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    config: dict[str, Any] = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    vocab, mismatches, _ = round_trip(write_checkpoint(tmp_path, tokenizer, config), arch="bert")
    assert unexplained(mismatches) == []
    assert {m.limit for m in mismatches} <= LIMITS
    assert values(vocab)["normalizer.lowercase"] is lowercase
    assert values(vocab)["normalizer.strip_accents"] is (lowercase if accents is None else accents)


def test_other_ways_of_cutting_words_are_refused(tmp_path: Path) -> None:
    model = {"type": "WordPiece", "vocab": {"[UNK]": 0}, "unk_token": "[UNK]", "continuing_subword_prefix": "##"}
    tokenizer = {"model": model, "pre_tokenizer": {"type": "Whitespace"}}
    with pytest.raises(UnsupportedError, match="WordPiece with Whitespace → characters, expected BertNormalizer"):
        read_vocab(open_checkpoint(write_checkpoint(tmp_path, tokenizer, {})), 1, "bert")
