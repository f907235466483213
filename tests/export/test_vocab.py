"""Byte-level vocabularies, special ids, added tokens, padding, chat templates: what is written, and equal ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gguf import TokenType

from efficli.checkpoint import open_checkpoint
from efficli.errors import CheckpointError, SecurityError, UnsupportedError
from efficli.export.gguf.chat_check import check_chat_templates
from efficli.export.gguf.pretokenizer_table import TABLE
from efficli.export.gguf.vocab import PROBE, read_vocab, source_ids
from efficli.export.gguf.vocab_check import Mismatch, SourceTokenizer, from_json
from efficli.export.gguf.vocab_special import ENDS_KNOWN
from tests.pico import write_llama
from tests.vocabs import CHAT_TEMPLATE, round_trip, train_bpe, unexplained, values, write_checkpoint

BY_NAME = {row.name: row for row in TABLE}


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    """A tokenizer.json with GPT-2's rule, parsed."""
    return json.loads(train_bpe(BY_NAME["gpt-2"], size=1000).to_str())


def with_added(trained: dict[str, Any], *rows: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer with further added tokens, at the next free ids."""
    size = max(trained["model"]["vocab"].values()) + 1
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": False}
    added = [{**plain, "id": size + i, **row} for i, row in enumerate(rows)]
    return {**trained, "added_tokens": [*trained["added_tokens"], *added]}


def template(first: str | None, last: str | None) -> dict[str, Any]:
    """A post-processor that puts tokens before and after a text."""
    from tokenizers import processors

    ids = {"<|endoftext|>": 0, "<s>": 1}
    single = " ".join(part for part in (first, "$A", last) if part)
    used = [(name, ids[name]) for name in dict.fromkeys((first, last)) if name]
    built = processors.TemplateProcessing(single=single, pair=f"{single} $B:1", special_tokens=used)
    return json.loads(built.__getstate__())


@pytest.mark.parametrize("rule", ["gpt-2", "llama-bpe", "qwen2", "smollm", "tekken"])
def test_ids_are_those_of_transformers(rule: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = json.loads(train_bpe(BY_NAME[rule]).to_str())
    tokenizer = with_added(tokenizer, {"content": "<|im_start|>", "special": True}, {"content": "<think>"})
    tokenizer["post_processor"] = template("<s>", None) if rule != "qwen2" else None
    config = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    write_checkpoint(tmp_path, tokenizer, config)
    reference = AutoTokenizer.from_pretrained(str(tmp_path))
    vocab, mismatches, ckpt = round_trip(tmp_path)
    source = SourceTokenizer(ckpt)
    for text in (*PROBE, "<|im_start|>user\nhi<think> x"):
        assert source.ids(text) == reference(text)["input_ids"]
    assert source_ids(ckpt, PROBE[4]) == reference(PROBE[4])["input_ids"]
    assert unexplained(mismatches) == []
    assert vocab.kind == "bpe"
    assert values(vocab)["add_bos_token"] is (rule != "qwen2")


def test_a_pico_checkpoint(tmp_path: Path) -> None:
    vocab, mismatches, _ = round_trip(write_llama(tmp_path), rows=384)
    assert mismatches == []
    assert vocab.notes == ()
    found = values(vocab)
    assert (found["model"], found["pre"], found["bos_token_id"], found["padding_token_id"]) == ("gpt2", "gpt-2", 0, 1)
    assert found["token_type"][:3] == [TokenType.CONTROL, TokenType.CONTROL, TokenType.NORMAL]


def test_reference_checkpoint_tokenizer_form(trained: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = {**trained, "post_processor": template("<|endoftext|>", None)}
    write_checkpoint(tmp_path, tokenizer, {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"})
    vocab, mismatches, _ = round_trip(tmp_path)
    found = values(vocab)
    assert mismatches == []
    assert (found["pre"], found["bos_token_id"], found["eos_token_id"]) == ("gpt-2", 0, 0)
    assert (found["add_bos_token"], found["add_eos_token"]) == (True, False)


def test_both_forms_of_merges(trained: dict[str, Any], tmp_path: Path) -> None:
    pairs = [merge if isinstance(merge, list) else merge.split(" ") for merge in trained["model"]["merges"]]
    found = []
    for name, merges in (("pairs", pairs), ("lines", [" ".join(pair) for pair in pairs])):
        tokenizer = {**trained, "model": {**trained["model"], "merges": merges}}
        vocab, mismatches, _ = round_trip(write_checkpoint(tmp_path / name, tokenizer))
        assert mismatches == []
        found.append(values(vocab)["merges"])
    assert found[0] == found[1] == [" ".join(pair) for pair in pairs]


@pytest.mark.parametrize("merge", ["one", ["a", "b", "c"], ["a", 1], ["", "b"]])
def test_damaged_merge(merge: Any, trained: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = {**trained, "model": {**trained["model"], "merges": [merge]}}
    with pytest.raises(CheckpointError, match="is not a pair of tokens"):
        read_vocab(open_checkpoint(write_checkpoint(tmp_path, tokenizer)), 2000, "llama")


def test_padding_gaps_and_rows(trained: dict[str, Any], tmp_path: Path) -> None:
    model = trained["model"]
    gone = next(text for text, i in model["vocab"].items() if i == 998)  # a late merge: no other is made of it
    vocab = {text: i for text, i in model["vocab"].items() if text != gone}
    merges = [merge for merge in model["merges"] if "".join(merge) != gone]
    tokenizer = {**trained, "model": {**model, "vocab": vocab, "merges": merges}}
    tokenizer["added_tokens"] = [
        *tokenizer["added_tokens"],
        {**trained["added_tokens"][0], "content": "<late>", "id": 999},
    ]
    last = next(text for text, i in vocab.items() if i == 999)
    tokenizer["model"]["vocab"] = {**{t: i for t, i in vocab.items() if t != last}, "<late>": 999, "[PAD1001]": 1000}
    tokenizer["model"]["merges"] = [merge for merge in merges if "".join(merge) != last]
    read, mismatches, ckpt = round_trip(write_checkpoint(tmp_path, tokenizer), rows=1010)
    found = values(read)
    assert mismatches == []
    assert read.size == len(found["tokens"]) == len(found["token_type"]) == 1010
    assert found["tokens"][998:1003] == ["[PAD998]", "<late>", "[PAD1001]", "[PAD1001]_", "[PAD1002]"]
    kinds = [TokenType.UNUSED, TokenType.CONTROL, TokenType.NORMAL, TokenType.UNUSED, TokenType.UNUSED]
    assert found["token_type"][998:1003] == kinds
    with pytest.raises(CheckpointError, match=r"^tokenizer has 1001 ids, embedding 1000 rows$") as caught:
        read_vocab(ckpt, 1000, "llama")
    assert caught.value.exit_code == 1


def test_gemma3_leaves_out_its_image_token(trained: dict[str, Any], tmp_path: Path) -> None:
    ckpt = open_checkpoint(write_checkpoint(tmp_path, with_added(trained, {"content": "<image>", "special": True})))
    assert "'<image>'" in read_vocab(ckpt, 1000, "gemma3").notes[0]
    with pytest.raises(CheckpointError, match="1001 ids, embedding 1000 rows"):
        read_vocab(ckpt, 1000, "llama")


def test_no_tokenizer(tmp_path: Path) -> None:
    ckpt = open_checkpoint(write_checkpoint(tmp_path / "bare"))
    with pytest.raises(CheckpointError) as caught:
        read_vocab(ckpt, 10, "llama")
    assert (caught.value.line, caught.value.exit_code) == ("bare: tokenizer.json not found", 1)


def test_bad_json(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    (folder / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {"a": 0, "a": 1}, "merges": []}}')
    with pytest.raises(CheckpointError, match="duplicate key 'a'"):
        read_vocab(open_checkpoint(folder), 10, "llama")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": []}, "two tokens have the same id"),
        ({"type": "BPE", "vocab": {"a": -1}, "merges": []}, "-1 is not a token id"),
        ({"type": "BPE", "vocab": {"a": "0"}, "merges": []}, "'0' is not a token id"),
        ({"type": "BPE", "vocab": {}, "merges": []}, "no tokens"),
        ({"type": "BPE", "vocab": {"a": 0}}, "model.vocab and model.merges expected"),
    ],
)
def test_damaged_models(model: dict[str, Any], message: str, tmp_path: Path) -> None:
    ckpt = open_checkpoint(write_checkpoint(tmp_path, {"model": model}))
    with pytest.raises(CheckpointError, match=message):
        read_vocab(ckpt, 10, "llama")


def test_models_that_llama_cpp_lacks(trained: dict[str, Any], tmp_path: Path) -> None:
    for name, change, message in (
        ("word", {"type": "WordLevel"}, "model type 'WordLevel'"),
        ("clip", {"end_of_word_suffix": "</w>"}, "end_of_word_suffix '</w>'"),
    ):
        tokenizer = {**trained, "model": {**trained["model"], **change}}
        with pytest.raises(UnsupportedError, match=message):
            read_vocab(open_checkpoint(write_checkpoint(tmp_path / name, tokenizer)), 2000, "llama")


def test_texts_that_gguf_cannot_hold(trained: dict[str, Any], tmp_path: Path) -> None:
    nul = open_checkpoint(write_checkpoint(tmp_path / "nul", with_added(trained, {"content": "a\0b"})))
    with pytest.raises(UnsupportedError, match="token 1000 contains a NUL"):
        read_vocab(nul, 1001, "llama")
    twice = open_checkpoint(write_checkpoint(tmp_path / "twice", with_added(trained, {"content": "!"})))
    with pytest.raises(UnsupportedError, match=r"ids \d+ and 1000 are both '!'"):
        read_vocab(twice, 1001, "llama")


def test_flags_of_added_tokens_are_noted(trained: dict[str, Any], tmp_path: Path) -> None:
    rows = (
        {"content": "<mask>", "lstrip": True},
        {"content": "<r>", "rstrip": True},
        {"content": "w", "single_word": True},
    )
    vocab, mismatches, _ = round_trip(write_checkpoint(tmp_path, with_added(trained, *rows[:2])))
    assert unexplained(mismatches) == []
    assert vocab.notes == (
        "1 added tokens ('<mask>'): white space before them is dropped by the source tokenizer, not by llama.cpp",
        "1 added tokens ('<r>'): white space after them is dropped by the source tokenizer, not by llama.cpp",
    )


def test_phi3_strips_after_special_tokens_by_its_name(trained: dict[str, Any], tmp_path: Path) -> None:
    names = ("<unk>", "</s>", "<|user|>", "<|end|>", "<|assistant|>")
    rows = [{"content": n, "special": n != "</s>", "rstrip": n not in ("<unk>",)} for n in names]
    tokenizer = with_added(trained, *rows)
    vocab, mismatches, ckpt = round_trip(write_checkpoint(tmp_path, tokenizer), name="My Phi-3")
    text = "<s> a<|user|>\n Hi <|end|>\n<|assistant|>  x</s> y"
    source = SourceTokenizer(ckpt)
    assert vocab.strips_like_phi3
    assert not vocab.notes
    assert unexplained(mismatches) == []
    from efficli.ops.llama import LlamaFile

    with LlamaFile(tmp_path / "vocab.gguf", vocab_only=True) as file:
        assert file.tokenize(text, add_special=True, parse_special=True) == source.ids(text)
    other = read_vocab(open_checkpoint(write_checkpoint(tmp_path / "other", trained)), 1000, "phi3")
    assert not other.strips_like_phi3


def test_special_tokens_that_are_not_marked_so(trained: dict[str, Any], tmp_path: Path) -> None:
    rows = ({"content": "<|fim_prefix|>"}, {"content": "<tool_call>"}, {"content": "<unused7>"})
    vocab, mismatches, _ = round_trip(write_checkpoint(tmp_path, with_added(trained, *rows)))
    assert unexplained(mismatches) == []
    kinds = [TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.CONTROL]
    assert values(vocab)["token_type"][1000:1003] == kinds


@pytest.mark.parametrize(
    ("first", "last", "config", "expected"),
    [
        (None, None, {}, (False, False, 1, 0)),
        ("<s>", "<|endoftext|>", {}, (True, True, 1, 0)),
        (None, "<|endoftext|>", {"eos_token": "<s>"}, (False, True, None, 0)),
        ("<s>", None, {"bos_token": "<|endoftext|>"}, (True, False, 1, 0)),
        (None, None, {"add_bos_token": True}, (False, False, 1, 0)),
    ],
)
def test_what_is_put_round_a_text(
    first: str | None,
    last: str | None,
    config: dict[str, Any],
    expected: tuple[Any, ...],
    trained: dict[str, Any],
    tmp_path: Path,
) -> None:
    settings = {"bos_token": "<s>", "eos_token": "<|endoftext|>"} | config
    if expected[2] is None:
        settings.pop("bos_token")
    tokenizer = {**trained, "post_processor": template(first, last)}
    vocab, mismatches, _ = round_trip(write_checkpoint(tmp_path, tokenizer, settings))
    found = values(vocab)
    keys = ("add_bos_token", "add_eos_token", "bos_token_id", "eos_token_id")
    assert tuple(found.get(key) for key in keys) == expected
    assert mismatches == []


def test_an_eos_that_the_template_replaces_becomes_eot(trained: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = {**trained, "post_processor": template(None, "<|endoftext|>")}
    vocab = read_vocab(open_checkpoint(write_checkpoint(tmp_path, tokenizer, {"eos_token": "<s>"})), 1000, "llama")
    assert (values(vocab)["eos_token_id"], values(vocab)["eot_token_id"]) == (0, 1)


def test_more_ends_of_a_text(trained: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"content": text, "special": True} for text in ("<|im_end|>", "<stop>", "<halt>", "<over>")]
    folder = write_checkpoint(tmp_path, with_added(trained, *rows))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 1000, 1001, 1002, 1003, 9999]}))
    vocab = read_vocab(open_checkpoint(folder), 1004, "llama")
    assert "<|im_end|>" in ENDS_KNOWN
    assert (values(vocab)["eot_token_id"], values(vocab)["eom_token_id"]) == (1001, 1002)
    assert vocab.notes == ("token 1003 also ends a text, GGUF has no more places for such tokens",)


def test_special_ids_from_config_json(trained: dict[str, Any], tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, trained, {}, {"eos_token_id": [1, 0], "pad_token_id": 7, "bos_token_id": 99999})
    found = values(read_vocab(open_checkpoint(folder), 1000, "llama"))
    assert (found["eos_token_id"], found["padding_token_id"], found.get("bos_token_id")) == (1, 7, None)


def test_config_that_wants_bos_without_post_processor(trained: dict[str, Any], tmp_path: Path) -> None:
    config = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "add_bos_token": True}
    vocab, mismatches, _ = round_trip(write_checkpoint(tmp_path, trained, config))
    assert mismatches == []
    assert values(vocab)["add_bos_token"] is True
    assert "transformers 5" in vocab.notes[0]


@pytest.mark.parametrize("form", ["text", "list", "jinja", "json", "folder"])
def test_chat_templates(form: str, trained: dict[str, Any], tmp_path: Path) -> None:
    config: dict[str, Any] = {"bos_token": "<s>"}
    if form == "text":
        config["chat_template"] = CHAT_TEMPLATE
    if form == "list":
        config["chat_template"] = [{"name": n, "template": t} for n, t in (("default", CHAT_TEMPLATE), ("rag-2", "x"))]
    if form in ("jinja", "folder"):
        config["chat_template"] = "old"
    folder = write_checkpoint(tmp_path, trained, config)
    if form in ("jinja", "folder"):
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    if form == "folder":
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "rag-2.jinja").write_text("x")
    if form == "json":
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    ckpt = open_checkpoint(folder)
    found = values(read_vocab(ckpt, 1000, "llama"))
    assert found["chat_template"] == CHAT_TEMPLATE
    if form in ("list", "folder"):
        assert (found["chat_templates"], found["chat_template.rag_2"]) == (["rag_2"], "x")
    assert check_chat_templates(ckpt) == []


def test_no_chat_template(trained: dict[str, Any], tmp_path: Path) -> None:
    ckpt = open_checkpoint(write_checkpoint(tmp_path, trained))
    assert not [key for key in values(read_vocab(ckpt, 1000, "llama")) if "template" in key]
    assert check_chat_templates(ckpt) == []


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (
            "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
            SecurityError,
            "did not render",
        ),
        ("{{ ''.__class__.__mro__ }}", SecurityError, "sandbox"),
        ("{{ 'x' * 10000000000 }}", SecurityError, "MiB"),
        ("{% if %}", CheckpointError, "chat template failed"),
        ("{{ raise_exception('no') }}", CheckpointError, "chat template failed: no"),
    ],
    ids=["endless", "escape", "huge", "syntax", "refuses"],
)
def test_chat_templates_that_do_not_render(
    text: str, error: type[Exception], message: str, trained: dict[str, Any], tmp_path: Path
) -> None:
    ckpt = open_checkpoint(write_checkpoint(tmp_path, trained, {"chat_template": text}))
    with pytest.raises(error, match=message):
        check_chat_templates(ckpt)


def test_a_template_for_user_messages_only_renders(trained: dict[str, Any], tmp_path: Path) -> None:
    picky = "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('user only') }}{% endif %}{% endfor %}"
    listed = [{"name": "default", "template": picky}, {"name": "tool_use", "template": "{{ tools[0].name.first }}"}]
    ckpt = open_checkpoint(write_checkpoint(tmp_path, trained, {"chat_template": listed}))
    (note,) = check_chat_templates(ckpt)
    assert note.startswith("chat template 'tool_use' does not take plain messages")


def test_chat_template_too_large(trained: dict[str, Any], tmp_path: Path) -> None:
    ckpt = open_checkpoint(write_checkpoint(tmp_path, trained, {"chat_template": "x" * (1 << 20) + "x"}))
    with pytest.raises(CheckpointError, match="larger than 1 MiB"):
        read_vocab(ckpt, 1000, "llama")


def test_forcing_needs_byte_pairs(tmp_path: Path) -> None:
    model = {"type": "Unigram", "vocab": [["<unk>", 0.0]], "unk_id": 0}
    ckpt = open_checkpoint(write_checkpoint(tmp_path, {"model": model}))
    with pytest.raises(UnsupportedError, match="only byte pair vocabularies"):
        read_vocab(ckpt, 1, "llama", pre_tokenizer="qwen2")


def test_mismatch_is_said_in_one_line_and_travels_as_json() -> None:
    mismatch = Mismatch("a" * 50, True, (1, 2, 3), (1, 9, 3), "")
    assert mismatch.describe() == f"token ids of {'a' * 37 + '...'!r} differ from id 1 on: source [2, 3], GGUF [9, 3]"
    assert from_json(json.loads(json.dumps([mismatch.to_json()]))) == [mismatch]
