"""SentencePiece vocabularies, trained here: byte pairs and unigram, with tokenizer.model, tokenizer.json, or both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gguf import TokenType

from efficli.checkpoint import open_checkpoint
from efficli.errors import CheckpointError, UnsupportedError
from efficli.export.gguf.vocab import PROBE, read_vocab
from efficli.export.gguf.vocab_check import SourceTokenizer
from efficli.export.gguf.vocab_source import parse_sentencepiece
from tests.vocabs import round_trip, train_sentencepiece, unexplained, values, write_checkpoint

LLAMA = {"model_type": "llama"}
SPACE = "\u2581"
LEGACY = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    ],
}
UNIGRAM = {
    "model_type": "unigram",
    "byte_fallback": False,
    "normalization_rule_name": "nmt_nfkc",
    "remove_extra_whitespaces": True,
    "allow_whitespace_only_pieces": False,
}


def by_transformers(folder: Path, name: str, **options: Any) -> Any:
    """Write tokenizer.json with transformers, and return its tokenizer."""
    import transformers

    # In transformers 4 the plain name is the one without a tokenizer.json.
    kind = getattr(transformers, f"{name}Fast", None) or getattr(transformers, name)
    tokenizer = kind.from_pretrained(str(folder), **options)
    tokenizer.save_pretrained(str(folder))
    return tokenizer


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer.model as Llama 2's."""
    return write_checkpoint(train_sentencepiece(tmp_path_factory.mktemp("llama")), None, {}, LLAMA)


def copy(source: Path, target: Path) -> Path:
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_file() and path.name != "vocab.gguf":
            (target / path.name).write_bytes(path.read_bytes())
    return target


def edit(folder: Path, **changes: Any) -> None:
    """Change keys of tokenizer.json."""
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_model_alone(llama: Path, tmp_path: Path) -> None:
    vocab, mismatches, ckpt = round_trip(copy(llama, tmp_path))
    found = values(vocab)
    assert (vocab.kind, found["model"], found["pre"]) == ("spm", "llama", "default")
    assert mismatches == []
    assert (found["unknown_token_id"], found["bos_token_id"], found["eos_token_id"]) == (0, 1, 2)
    assert (found["add_bos_token"], found["add_eos_token"], found["add_space_prefix"]) == (True, False, True)
    assert found["token_type"][:4] == [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, TokenType.BYTE]
    assert found["tokens"][-1].startswith("[PAD") and found["token_type"][-1] == TokenType.UNUSED
    assert SourceTokenizer(ckpt).ids("</s>x")[:2] == [1, 2]


def test_model_parser_agrees_with_the_sentencepiece_package(llama: Path) -> None:
    import sentencepiece

    read = parse_sentencepiece((llama / "tokenizer.model").read_bytes())
    package = sentencepiece.SentencePieceProcessor(model_file=str(llama / "tokenizer.model"))
    assert len(read.pieces) == package.get_piece_size()
    for i, piece in enumerate(read.pieces):
        assert (piece.text, piece.score) == (package.id_to_piece(i), package.get_score(i))
        assert (piece.type == 6, piece.type == 3) == (package.is_byte(i), package.is_control(i))
    assert read.ids == {"unk": 0, "bos": 1, "eos": 2}
    assert (read.unigram, read.charsmap, read.add_dummy_prefix, read.remove_extra_whitespaces) == (
        False,
        b"",
        True,
        False,
    )


def test_damaged_model(llama: Path) -> None:
    data = (llama / "tokenizer.model").read_bytes()
    for length in (1, 7, 100, len(data) // 2, len(data) - 1):
        with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
            parse_sentencepiece(data[:length])
    for junk in (
        b"",
        b"not a model",
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"\x0b\x0c",
        b"\xff" * 40,
        b"\x0a\x02\x0a\xff",
    ):
        with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
            parse_sentencepiece(junk)


@pytest.mark.parametrize("model", [True, False], ids=["with tokenizer.model", "tokenizer.json alone"])
@pytest.mark.parametrize("form", ["legacy", "metaspace"])
def test_llama_by_transformers(form: str, model: bool, llama: Path, tmp_path: Path) -> None:
    copy(llama, tmp_path)
    tokenizer = by_transformers(tmp_path, "LlamaTokenizer", add_bos_token=True, legacy=form == "legacy")
    if form == "legacy":
        edit(tmp_path, normalizer=LEGACY, pre_tokenizer=None)
    if not model:
        (tmp_path / "tokenizer.model").unlink()
    vocab, mismatches, ckpt = round_trip(tmp_path)
    assert (vocab.kind, values(vocab)["add_space_prefix"], values(vocab)["add_bos_token"]) == ("spm", True, True)
    assert unexplained(mismatches) == []
    if form == "legacy":
        assert mismatches == []
    else:
        source = SourceTokenizer(ckpt)
        assert [source.ids(text) for text in PROBE] == [tokenizer(text)["input_ids"] for text in PROBE]
        assert {m.limit for m in mismatches} == {
            "llama.cpp also puts a space before text that begins with one",
            "llama.cpp puts a space after special tokens",
        }


def test_scores_from_merges_order_tokens_as_the_model_does(llama: Path, tmp_path: Path) -> None:
    copy(llama, tmp_path)
    by_transformers(tmp_path, "LlamaTokenizer")
    with_model = values(read_vocab(open_checkpoint(tmp_path), 1200, "llama"))
    (tmp_path / "tokenizer.model").unlink()
    without = values(read_vocab(open_checkpoint(tmp_path), 1200, "llama"))
    assert with_model["tokens"] == without["tokens"]
    made = [
        i for i, score in enumerate(without["scores"]) if score > -1e5 and len(without["tokens"][i]) > 1 and i > 258
    ]
    assert len(made) > 300
    assert sorted(made, key=lambda i: -with_model["scores"][i]) == sorted(made, key=lambda i: -without["scores"][i])


def test_a_model_of_another_vocabulary_is_not_used(llama: Path, tmp_path: Path) -> None:
    copy(llama, tmp_path)
    by_transformers(tmp_path, "LlamaTokenizer")
    train_sentencepiece(tmp_path, vocab_size=1000)  # overwrites tokenizer.model
    _, mismatches, _ = round_trip(tmp_path)
    assert unexplained(mismatches) == []


@pytest.mark.parametrize("model", [True, False], ids=["with tokenizer.model", "tokenizer.json alone"])
def test_gemma(model: bool, tmp_path: Path) -> None:
    train_sentencepiece(
        tmp_path,
        add_dummy_prefix=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        control_symbols=["<start_of_turn>", "<end_of_turn>"],
        user_defined_symbols=["\n\n", "\n\n\n", SPACE * 2, SPACE * 4],
    )
    write_checkpoint(tmp_path, None, {}, {"model_type": "gemma"})
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "mask_token": None}
    tokenizer = by_transformers(tmp_path, "GemmaTokenizer", **names)
    if not model:
        (tmp_path / "tokenizer.model").unlink()
    vocab, mismatches, ckpt = round_trip(tmp_path, arch="gemma2")
    found = values(vocab)
    assert mismatches == []
    assert (vocab.kind, found["add_space_prefix"], found["model"]) == ("spm", False, "llama")
    assert found["token_type"][found["tokens"].index(SPACE * 2)] == TokenType.USER_DEFINED
    source = SourceTokenizer(ckpt)
    assert [source.ids(text) for text in PROBE] == [tokenizer(text)["input_ids"] for text in PROBE]


def test_merges_that_leave_pairs_out(llama: Path, tmp_path: Path) -> None:
    """Trained by the tokenizers package on characters: not every pair that is a token may be joined."""
    from tokenizers import Tokenizer, models, normalizers, trainers

    from tests.vocabs import CORPUS

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    trainer = trainers.BpeTrainer(
        vocab_size=1100,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))],
        limit_alphabet=150,
        show_progress=False,
    )
    lines = [line for text in CORPUS for line in text.splitlines() if len(line) < 2000]
    tokenizer.train_from_iterator(lines, trainer)
    parsed = json.loads(tokenizer.to_str())
    parsed["added_tokens"] = parsed["added_tokens"][:3]  # bytes are pieces of the model, not added tokens
    vocab, mismatches, _ = round_trip(write_checkpoint(tmp_path / "raw", parsed, {}))
    assert (vocab.kind, values(vocab)["pre"]) == ("bpe", "sarvam-moe")
    assert unexplained(mismatches) == []
    assert vocab.notes[0].startswith("written as raw-text BPE")
    prefixed = {**parsed, "normalizer": LEGACY}
    with pytest.raises(UnsupportedError, match="a space before the text and merges other than SentencePiece's"):
        read_vocab(open_checkpoint(write_checkpoint(tmp_path / "prefixed", prefixed, {})), 1200, "llama")


def test_what_llama_cpp_lacks_for_byte_pairs(llama: Path, tmp_path: Path) -> None:
    copy(llama, tmp_path / "a")
    by_transformers(tmp_path / "a", "LlamaTokenizer")
    edit(tmp_path / "a", normalizer={"type": "NFKC"})
    with pytest.raises(UnsupportedError, match="SentencePiece BPE with NFKC"):
        read_vocab(open_checkpoint(tmp_path / "a"), 1200, "llama")
    nfkc = train_sentencepiece(tmp_path / "b", normalization_rule_name="nmt_nfkc")
    with pytest.raises(UnsupportedError, match="BPE that normalizes text"):
        read_vocab(open_checkpoint(write_checkpoint(nfkc, None, {})), 1200, "llama")
    no_bytes = train_sentencepiece(tmp_path / "c", byte_fallback=False)
    with pytest.raises(UnsupportedError, match="0 of the 256 byte tokens"):
        read_vocab(open_checkpoint(write_checkpoint(no_bytes, None, {})), 1200, "llama")
    words = train_sentencepiece(tmp_path / "d", model_type="word", byte_fallback=False)
    with pytest.raises(UnsupportedError, match="model type 3"):
        read_vocab(open_checkpoint(write_checkpoint(words, None, {})), 1200, "llama")


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("T5Tokenizer", {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}),
        ("XLMRobertaTokenizer", {}),
    ],
)
def test_unigram_by_transformers(name: str, ids: dict[str, int], tmp_path: Path) -> None:
    train_sentencepiece(tmp_path, **UNIGRAM, **ids)
    write_checkpoint(tmp_path, None, {}, {"model_type": "t5" if name.startswith("T5") else "xlm-roberta"})
    if name.startswith("XLM"):
        (tmp_path / "tokenizer.model").rename(tmp_path / "sentencepiece.bpe.model")
    tokenizer = by_transformers(tmp_path, name)
    vocab, mismatches, ckpt = round_trip(tmp_path, arch="bert")
    found = values(vocab)
    assert (vocab.kind, found["model"], found["add_space_prefix"]) == ("unigram", "t5", True)
    assert len(found["precompiled_charsmap"]) > 1000
    assert (found["add_bos_token"], found["add_eos_token"]) == (name.startswith("XLM"), True)
    assert found["token_type"][found["unknown_token_id"]] == TokenType.UNKNOWN
    assert unexplained(mismatches) == []
    assert {m.limit for m in mismatches} <= {"llama.cpp maps a letter and its combining marks one by one"}
    source = SourceTokenizer(ckpt)
    assert [source.ids(text) for text in PROBE] == [tokenizer(text)["input_ids"] for text in PROBE]


def test_unigram_model_alone(tmp_path: Path) -> None:
    write_checkpoint(train_sentencepiece(tmp_path, **UNIGRAM), None, {})
    vocab, mismatches, _ = round_trip(tmp_path)
    assert vocab.kind == "unigram"
    assert values(vocab)["remove_extra_whitespaces"] is True
    assert unexplained(mismatches) == []


def test_what_llama_cpp_lacks_for_unigram(tmp_path: Path) -> None:
    base = {"type": "Unigram", "vocab": [["<unk>", 0.0], ["a", -1.0]], "unk_id": 0}
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "always", "split": True}
    for number, (change, message) in enumerate(
        (
            ({"model": {**base, "byte_fallback": True}}, "unigram with byte_fallback"),
            ({"normalizer": {"type": "Lowercase"}}, "unigram with normalizer Lowercase"),
            ({"pre_tokenizer": {"type": "Whitespace"}}, "unigram with Whitespace"),
            ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "?"}}, "not base64"),
        )
    ):
        tokenizer = {"model": base, "pre_tokenizer": metaspace, **change}
        folder = write_checkpoint(tmp_path / str(number), tokenizer, {})
        with pytest.raises((UnsupportedError, CheckpointError), match=message):
            read_vocab(open_checkpoint(folder), 2, "llama")
