"""Are the token ids of a GGUF file those of the source tokenizer? Compared on texts that tokenizers get wrong.

Needs the `gguf` extra: llama-cpp-python, tokenizers, and sentencepiece for checkpoints without tokenizer.json. A
checkpoint's regular expressions run here: call `compare_ids` in a child process with a time limit (`ops/child.py`).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType

from efficli.checkpoint import Checkpoint
from efficli.errors import CheckpointError, MissingExtra
from efficli.export.gguf.pretokenizer import UNICODE_FORMS, read_structure
from efficli.export.gguf.pretokenizer_table import TABLE
from efficli.export.gguf.vocab_source import Source, read_source, token_type
from efficli.export.gguf.vocab_special import Specials, read_specials
from efficli.ops.llama import LlamaFile

PROBE: tuple[str, ...] = (
    "",
    " ",
    "Hello, world!",
    " leading and trailing  ",
    "The quick brown fox jumps over the lazy dog.",
    "I'm sure they've said it's what we'd do; you'll see, she's 'RE, 'LL and 'tis. DON'T WE'VE",
    "1 12 123 1234 12345 123456 1234567890 3.14 1,000,000 0x1F 1e-9 ½ ² ٣٤ Ⅷ",
    "tabs\tand\t\tmore \t mixed\n\n\nlines \n  indented\r\nCRLF\r\n\r\n\rCR",
    " \t\n  \n\t \n    x\n        y\n\n   ",
    "a  b   c    d     e      f       g        h",
    "nbsp\u00a0here thin\u2009space zero\u200bwidth ideographic\u3000space bom\ufeff em\u2003",
    "ctrl \x01\x02\x1f\x7f \x0b\x0c end",
    "cafe\u0301 re\u0301sume\u0301 A\u030a n\u0303 q\u0323\u0307 \u1e9b\u0323",
    "café résumé Ångström ñandú Straße İstanbul ŒUVRE ǅ ﬁ",
    "Zażółć gęślą jaźń. Příliš žluťoučký kůň. Øre Æble",
    "Съешь ещё этих мягких французских булок. ΑΒΓ αβγ ς",
    "中文字符测试，你好！日本語のテキスト。カタカナ ひらがな 한국어 문장입니다.",
    "العربية نص مُشَكَّل ١٢٣ עברית שָׁלוֹם",
    "हिन्दी में पाठ ภาษาไทย বাংলা தமிழ் ខ្មែរ",
    "😀 👍🏽 👨‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 ❤️ ✅ ☺",
    "… — – “quotes” ‘single’ «guillemets» · • † ‡ § ¶ © ® ™ € £ ¥ ∑ ∫ √ ≠ ∞ → ⇒",
    "𝒜𝓁𝑔𝑒𝒷𝓇𝒶 𐍈 \U0001f9ff \U00020000 ﷽",
    "def f(x: int = 3) -> list[str]:\n    return [f'{i!r}' for i in range(x) if i % 2 == 0]  # ok\n",
    "for(int i=0;i<n;++i){a[i]+=b[i]*c;}\t// done\n#include <stdio.h>\n",
    '{"key": [1, 2.5, null, true], "nested": {"a\\n": "\\u00e9"}}',
    "<html><body class='x'>&amp; &lt;</body></html>",
    "https://example.com/path/to?q=a+b&lang=en#frag user@mail.org C:\\dir\\file.txt ~/.bashrc",
    "camelCase PascalCase snake_case SCREAMING_CASE kebab-case HTMLParser iPhone XMLHttpRequest2",
    "!!! ??? ... --- === *** /// \\\\\\ ``` ''' \"\"\" ((())) [[]] {{}} <<>> ++ -- && || :: -> => $100 50% #1 @me ^_^",
    "<s> </s> <unk> <pad> [CLS] [SEP] [MASK] [PAD] <|endoftext|> <|im_start|>user<|im_end|> <bos><eos> <0x0A>",
    "\u2581under \u2581\u2581two Ġspace Ċnewline ##ing",
    "don't" * 3 + " " + "ha" * 12 + "!" * 17 + "\n" * 5 + "." * 9,
    "x" * 3000,
    "Pneumonoultramicroscopicsilicovolcanoconiosis" + "Donaudampfschifffahrtsgesellschaft" * 4,
)
"""Texts for comparing token ids: Unicode, white space, numbers, contractions, code, special tokens, long words."""

_OWN_TOKENS = 24  # added tokens of the checkpoint that are probed inside text
_CASE_PROBE = re.compile(
    r"[^\W\d_a-zA-Z]|[\u0300-\u036f\u0590-\u05cf\u0600-\u06ff\u0900-\u0eff\u1780-\u17ff\ufe0f\u200d]"
)


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A text whose ids differ."""

    text: str
    special: bool
    """Special tokens in the text are recognised, and those round it are added."""
    expected: tuple[int, ...]
    found: tuple[int, ...]
    limit: str = ""
    """The known difference that explains it (a row for the report); empty: a wrong vocabulary (an error)."""

    def to_json(self) -> dict[str, Any]:
        """For the pipe of a child process."""
        out = {"text": self.text, "special": self.special, "expected": list(self.expected), "found": list(self.found)}
        return out | {"limit": self.limit}

    def describe(self) -> str:
        """One line: the text and the first ids that differ."""
        at = next((i for i, (a, b) in enumerate(zip(self.expected, self.found, strict=False)) if a != b), None)
        at = min(len(self.expected), len(self.found)) if at is None else at
        shown = self.text if len(self.text) <= 40 else self.text[:37] + "..."
        there = [list(ids[at : at + 4]) for ids in (self.expected, self.found)]
        return f"token ids of {shown!r} differ from id {at} on: source {there[0]}, GGUF {there[1]}"


class SourceTokenizer:
    """The checkpoint's own tokenizer, by the tokenizers package (or sentencepiece), without transformers."""

    def __init__(self, ckpt: Checkpoint) -> None:
        self.source = read_source(ckpt)
        size = max(self.source.pieces) + 1
        self.specials: Specials = read_specials(ckpt, self.source, size)
        self._sentencepiece: Any = None
        self._tokenizer: Any = None
        if self.source.tokenizer is None:
            self._open_sentencepiece(ckpt)
        else:
            self._open_tokenizers(ckpt)

    def _open_tokenizers(self, ckpt: Checkpoint) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise MissingExtra("tokenizers", "gguf") from error
        path = ckpt.file("tokenizer.json")
        assert path is not None
        try:
            self._tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:
            raise CheckpointError(f"tokenizer.json: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def _open_sentencepiece(self, ckpt: Checkpoint) -> None:
        try:
            import sentencepiece
        except ImportError as error:
            raise MissingExtra("sentencepiece", "gguf") from error
        path = ckpt.file("tokenizer.model")
        assert path is not None
        self._sentencepiece = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())

    def ids(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of `text`; with the tokens round it, and special tokens inside it recognised, or not."""
        if self._tokenizer is None:
            ids = self._pieces(text, parse_special=parse_special)
        else:
            self._tokenizer.encode_special_tokens = not parse_special
            encoded = self._tokenizer.encode(text, add_special_tokens=add_special)
            ids = list(encoded.ids)
            if (self.source.tokenizer or {}).get("post_processor"):
                return ids
        return self._wrap(ids) if add_special else ids

    def _wrap(self, ids: list[int]) -> list[int]:
        """What transformers adds where tokenizer.json has no post-processor."""
        add, known = self.specials.add, self.specials.ids
        before, after = ([known[name]] if add.get(name) else [] for name in ("bos", "eos"))
        return before + ids + after

    def _pieces(self, text: str, *, parse_special: bool) -> list[int]:
        added = {token.content: token.id for token in self.source.added if parse_special or not token.special}
        ids: list[int] = []
        pattern = "|".join(re.escape(content) for content in sorted(added, key=len, reverse=True) if content)
        for part in re.split(f"({pattern})", text) if pattern else [text]:
            ids += [added[part]] if part in added else self._sentencepiece.encode(part)
        return ids


def source_ids(ckpt: Checkpoint, text: str) -> list[int]:
    """Token ids that the checkpoint's own tokenizer gives to `text`, special tokens round it included."""
    return SourceTokenizer(ckpt).ids(text)


def compare_ids(
    gguf_path: Path, ckpt: Checkpoint, *, texts: Sequence[str] = PROBE, pre_tokenizer: str | None = None
) -> list[Mismatch]:
    """Compare llama.cpp's ids (`vocab_only`) with the source's, on `texts` and the checkpoint's own added tokens.

    Each text is tried with special tokens recognised and added, and with none. `pre_tokenizer` is what was forced.
    """
    source = SourceTokenizer(ckpt)
    out: list[Mismatch] = []
    with LlamaFile(gguf_path, vocab_only=True) as file:

        def differ(text: str, special: bool) -> tuple[list[int], list[int]] | None:
            expected = source.ids(text, add_special=special, parse_special=special)
            found = file.tokenize(text, add_special=special, parse_special=special)
            return None if expected == found else (expected, found)

        limits = list(_limits(source.source, file.metadata("tokenizer.ggml.pre") or pre_tokenizer or ""))
        for text in (*texts, *_own_texts(source.source)):
            for special in (True, False):
                if not special and _hidden(source.source, text):
                    continue
                if (pair := differ(text, special)) is not None:
                    limit = next(
                        (why for why, cut in limits if cut(text) != text and differ(cut(text), special) is None), ""
                    )
                    out.append(Mismatch(text, special, tuple(pair[0]), tuple(pair[1]), limit))
    return out


def _own_texts(source: Source) -> Iterator[str]:
    """The checkpoint's added tokens inside text; those that drop white space are said in the notes instead."""
    plain = [token for token in source.added if not (token.lstrip or token.rstrip or token.single_word)]
    for token in [*plain[: _OWN_TOKENS // 2], *plain[_OWN_TOKENS // 2 :][-_OWN_TOKENS // 2 :]]:
        yield f"a {token.content} b{token.content}c\n{token.content}{token.content}"


def _hidden(source: Source, text: str) -> bool:
    """Whether the source recognises a token in `text` that llama.cpp counts as special, even if it should not.

    It does so for tokens not marked as special (see `token_type`), and unigram models find all their tokens.
    """
    return any(
        (source.kind == "unigram" or not token.special)
        and token_type(token) == TokenType.CONTROL
        and token.content in text
        for token in source.added
    )


def _limits(source: Source, pre: str) -> Iterator[tuple[str, Callable[[str], str]]]:
    """Known differences: why, and a function that takes out of a text what llama.cpp does otherwise."""
    if source.tokenizer is None:
        return
    structure = read_structure(source.tokenizer)
    for form in UNICODE_FORMS:
        if form in structure.normalizers:
            yield f"llama.cpp does not bring text to {form}", lambda text, form=form: unicodedata.normalize(form, text)  # type: ignore[misc]
    if structure.prefix_space:
        yield "llama.cpp puts no space before the text", lambda text: " " + text.lstrip(" ")
    if source.kind == "spm" and any(split.startswith("Metaspace(") for split in structure.splits):
        tokens = [token.content for token in source.added]
        yield "llama.cpp also puts a space before text that begins with one", lambda text: text.lstrip(" \u2581")
        yield (
            "llama.cpp puts a space after special tokens",
            lambda text: _without(text, tokens).lstrip(" \u2581"),
        )
    if source.kind == "wordpiece":
        limit = int(source.model.get("max_input_chars_per_word", 100))
        yield f"words of more than {limit} characters", lambda text: re.sub(rf"\w{{{limit + 1},}}", "", text)
        yield "llama.cpp does not take Hangul apart, and drops spacing marks", _without_spacing_marks
    if source.kind == "unigram":
        yield "llama.cpp maps a letter and its combining marks one by one", _without_marks
    for row in TABLE:
        if row.name == pre and row.limit:
            yield row.limit, lambda text: _CASE_PROBE.sub("", text)


def _without_spacing_marks(text: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mc")


def _without_marks(text: str) -> str:
    return "".join(c for c in text if not unicodedata.category(c).startswith("M"))


def _without(text: str, tokens: Sequence[str]) -> str:
    for token in tokens:
        text = text.replace(token, "")
    return text


def from_json(rows: Sequence[Mapping[str, Any]]) -> list[Mismatch]:
    """What `Mismatch.to_json` wrote."""
    return [
        Mismatch(row["text"], row["special"], tuple(row["expected"]), tuple(row["found"]), row["limit"]) for row in rows
    ]
