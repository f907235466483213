"""Every pre-tokenizer of llama.cpp: trained with its rule, a tokenizer is recognised and keeps its ids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from efficli.errors import UnsupportedError, UsageError
from efficli.export.gguf.pretokenizer import ALIASES, canonical, detect, nearest, read_structure
from efficli.export.gguf.pretokenizer_table import ANY_CASE, GPT2, TABLE, PreTokenizer
from tests.vocabs import pre_tokenizer, round_trip, train_bpe, unexplained, values, write_checkpoint

ROWS = {f"{row.name}-{i}": row for i, row in enumerate(TABLE) if row.byte_level}
BY_NAME = {row.name: row for row in TABLE}


@pytest.mark.parametrize("key", ROWS)
def test_rule_is_recognised_and_ids_agree(key: str, tmp_path: Path) -> None:
    row = ROWS[key]
    vocab, mismatches, _ = round_trip(write_checkpoint(tmp_path, train_bpe(row)))
    assert values(vocab)["pre"] == row.name
    assert len(values(vocab)["merges"]) > 900
    assert unexplained(mismatches) == []
    assert bool(row.limit) or not mismatches  # a rule without a known limit agrees on every text
    assert all(row.limit in note for note in vocab.notes)


@pytest.mark.parametrize(("source", "forced"), [("llama-bpe", "qwen2"), ("smollm", "gpt-2"), ("qwen2", "smollm")])
def test_a_wrong_rule_shows_in_the_ids(source: str, forced: str, tmp_path: Path) -> None:
    vocab, mismatches, _ = round_trip(write_checkpoint(tmp_path, train_bpe(BY_NAME[source])), force=forced)
    assert values(vocab)["pre"] == forced
    assert unexplained(mismatches)
    assert f"pre-tokenizer {forced} was forced" in vocab.notes[0]


def test_forcing_the_right_rule_agrees(tmp_path: Path) -> None:
    _, mismatches, _ = round_trip(write_checkpoint(tmp_path, train_bpe(BY_NAME["smollm"])), force="starcoder")
    assert mismatches == []


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        (r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
         r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+", "smaug-bpe"),
        (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
         "bailingmoe"),
        ("(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1}| ?[^\\s\\p{L}\\p{N}\r\n]+|\\s*[\r\n]+"
         "|\\s+(?!\\S)|\\s+", "seed-coder"),
        (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)", "gpt-2"),
        (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", "gpt-2"),
    ],
)  # fmt: skip
def test_other_spellings_of_a_rule(spelling: str, name: str, tmp_path: Path) -> None:
    tokenizer = train_bpe(PreTokenizer(name="", splits=(spelling,)))
    vocab, mismatches, _ = round_trip(write_checkpoint(tmp_path, tokenizer))
    assert values(vocab)["pre"] == name
    assert mismatches == []


def test_removing_what_does_not_match_is_the_same_rule(tmp_path: Path) -> None:
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(BY_NAME["qwen2"].splits[0]), "removed", invert=True)
    steps = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    vocab, mismatches, _ = round_trip(write_checkpoint(tmp_path, train_bpe(BY_NAME["qwen2"], steps=steps)))
    assert values(vocab)["pre"] == "qwen2"
    assert mismatches == []


def test_unknown_rule_says_what_was_found_the_nearest_and_what_to_do(tmp_path: Path) -> None:
    two_digits = BY_NAME["llama-bpe"].splits[0].replace("{1,3}", "{1,2}")
    tokenizer = json.loads(train_bpe(PreTokenizer(name="", splits=(two_digits,))).to_str())
    with pytest.raises(UnsupportedError) as caught:
        detect(tokenizer)
    assert caught.value.exit_code == 5
    assert caught.value.message.startswith("tokenizer.json: no pre-tokenizer of llama.cpp cuts text by")
    assert two_digits in caught.value.message
    assert "the nearest, llama-bpe, cuts by" in caught.value.message
    assert caught.value.hint is not None and caught.value.hint.startswith("--pre-tokenizer llama-bpe")


def test_what_llama_cpp_cannot_do_is_named() -> None:
    base = {"model": {"type": "BPE", "vocab": {}, "merges": []}}
    space = {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}
    with pytest.raises(UnsupportedError, match=r"cannot do a space put before the text \(add_prefix_space\)"):
        detect({**base, "pre_tokenizer": space})
    lower = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}
    with pytest.raises(UnsupportedError, match="cannot do normalizer Lowercase"):
        detect({**base, "pre_tokenizer": {**space, "add_prefix_space": False}, "normalizer": lower})


def test_unknown_name_to_force() -> None:
    with pytest.raises(UsageError, match=r"--pre-tokenizer 'qwen-2': not a name that llama\.cpp knows") as caught:
        detect({"model": {}}, force="qwen-2")
    assert caught.value.hint is not None and "qwen2" in caught.value.hint


def test_unicode_form_is_noted_and_explains_the_difference(tmp_path: Path) -> None:
    from tokenizers import normalizers

    tokenizer = train_bpe(BY_NAME["qwen2"], normalizer=normalizers.NFC())
    vocab, mismatches, _ = round_trip(write_checkpoint(tmp_path, tokenizer))
    assert vocab.notes == (
        "the source tokenizer brings text to Unicode NFC first, llama.cpp does not: give it NFC text",
    )
    assert mismatches and {m.limit for m in mismatches} == {"llama.cpp does not bring text to NFC"}
    assert all("e\u0301" in m.text for m in mismatches)


def test_ignore_merges_matters_only_for_words_that_merges_do_not_make() -> None:
    row = PreTokenizer(name="", splits=BY_NAME["qwen2"].splits, whole_words=True)
    tokenizer = json.loads(train_bpe(row, size=600).to_str())
    assert detect(tokenizer).notes == ()
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]
    assert "ignore_merges" in detect(tokenizer).notes[0]


def test_prefers_the_rule_with_the_same_ignore_merges() -> None:
    for name in ("llama-bpe", "smaug-bpe", "gpt-4o", "granite-embed-multi-97m"):
        assert detect(json.loads(train_bpe(BY_NAME[name]).to_str())).name == name


def test_table_is_canonical_and_aliases_lead_into_it() -> None:
    for row in TABLE:
        for split in row.splits:
            assert canonical(split) == split
    names = {row.name for row in TABLE}
    assert set(ALIASES.values()) <= names
    assert not names & set(ALIASES)
    assert ANY_CASE in BY_NAME["qwen2"].splits[0] and BY_NAME["gpt-2"].splits == (GPT2,)


def test_structure_survives_a_tokenizer_json() -> None:
    for row in TABLE:
        steps = json.loads(pre_tokenizer(row.splits, byte_level=row.byte_level).__getstate__())
        structure = read_structure({"pre_tokenizer": steps})
        assert (structure.splits, structure.byte_level, structure.prefix_space) == (row.splits, row.byte_level, False)
        assert not row.byte_level or nearest(structure).splits == row.splits
