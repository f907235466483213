"""The rules behind the names that llama.cpp gives to pre-tokenizers: a table of facts, no logic.

Each row holds the splits in the order in which the tokenizers of that name make them (canonical spelling, see
`pretokenizer.canonical`), as read from their tokenizer.json files and from llama.cpp 0c1e570 (src/llama-vocab.cpp).
"""

from __future__ import annotations

from dataclasses import dataclass

ANY_CASE = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
"""English contractions; every spelling of this group is brought to this one."""
_GAPS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GAP_LINE = r"\s*[\r\n]|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_OTHER = r" ?[^\s\p{L}\p{N}]+"
_DIGIT, _DIGITS_3 = r"\p{N}", r"\p{N}{1,3}"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""The rule of GPT-2, which `ByteLevel` applies where its `use_regex` is true."""


def _words(digits: str = _DIGIT, *, other: str = _OTHER + r"[\r\n]*", gaps: str = _GAPS) -> str:
    """The rule of Llama 3 and Qwen 2: contractions, words with one character before, digits, the rest, gaps."""
    return rf"{ANY_CASE}|{_LEAD}\p{{L}}+|{digits}|{other}|{gaps}"


def _cased(upper: str, lower: str, contractions: str, digits: str, line_ends: str = r"[\r\n/]*") -> str:
    """The rule of o200k and Tekken: words end where lower case turns into upper case."""
    return (
        rf"{_LEAD}{upper}*{lower}+{contractions}|{_LEAD}{upper}+{lower}*{contractions}|{digits}"
        rf"|{_OTHER}{line_ends}|{_GAPS}"
    )


_O200K = _cased(_UPPER, _LOWER, ANY_CASE + "?", _DIGITS_3)
_PUNCTUATION_WORD = "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+"
_LETTERS_MARKS = r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
_DEEPSEEK3 = rf"{_PUNCTUATION_WORD}|{_LETTERS_MARKS}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_GAPS}"
_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_CJK_HANGUL = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_ASIAN = (
    r"(?:[\u4E00-\u9FFF\u3040-\u309F\u30A0-\u30FF\u3400-\u4DBF\uf900-\uFAFF\uFF65-\uFF9F\u2F00-\u2FDF]+|[\u0E00-\u0E7F]+"
    r"|[\u0E80-\u0EFF]+|[\u1780-\u17FF]+|[\u1000-\u109F\uAA60-\uAA7F\uA9E0-\uA9FF]+|[\uAC00-\uD7AF\u1100-\u11FF]+)"
)
_GROUPS_OF_3 = (
    r"\p{Nd}{1,510}(?=(?>\p{Nd}{510})*(?:\P{Nd}|$))|\G\p{Nd}{510}",
    r"\A\p{Nd}{1,2}(?=\p{Nd}{3}+\z)",
    r"\A\p{Nd}{3}|\G\p{Nd}{3}",
)
_YOUTU_SCRIPTS = (
    "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
    "|[\u3105-\u312f]+|[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
)
_BLOOM = " ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+"
_THREES = r"\d{1,3}(?=(?:\d{3})*\b)"
_LINES = r"[^\n]+|[\n]+"
_CASED_SCRIPTS = (
    "A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-"
    "\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-"
    "\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d"
    "\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-"
    "\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-"
    "\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2"
    "\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-"
    "\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb"
    "\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreTokenizer:
    """One of llama.cpp's names and the rule behind it."""

    name: str
    splits: tuple[str, ...]
    whole_words: bool = False
    """A word that is in the vocabulary is taken as it is (`ignore_merges` of tokenizer.json)."""
    byte_level: bool = True
    """Bytes are spelled as GPT-2 does; otherwise text is raw UTF-8 with `<0x..>` tokens."""
    limit: str = ""
    """What llama.cpp's version of the rule is known to do otherwise."""


_CASE_LIMIT = (
    "llama.cpp tells upper from lower case for the letters A-Z only, and does not join combining marks to words"
)
_HAN_LIMIT = "llama.cpp does not tell upper from lower case, nor join combining marks to words"

TABLE: tuple[PreTokenizer, ...] = (
    PreTokenizer(name="gpt-2", splits=(GPT2,)),
    PreTokenizer(name="smollm", splits=(_DIGIT, GPT2)),
    PreTokenizer(name="llama-bpe", splits=(_words(_DIGITS_3),), whole_words=True),
    PreTokenizer(name="smaug-bpe", splits=(_words(_DIGITS_3),)),
    PreTokenizer(name="qwen2", splits=(_words(),)),
    PreTokenizer(
        name="qwen35",
        splits=(rf"{ANY_CASE}|{_LEAD}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_GAPS}",),
    ),
    PreTokenizer(name="gpt-4o", splits=(_O200K,), limit=_CASE_LIMIT),
    PreTokenizer(
        name="granite-embed-multi-97m",
        splits=(_O200K,),
        whole_words=True,
        limit="llama.cpp tells upper from lower case for the letters A-Z only",
    ),
    PreTokenizer(name="tekken", splits=(_cased(_UPPER, _LOWER, "", _DIGIT),), whole_words=True, limit=_CASE_LIMIT),
    PreTokenizer(name="deepseek-v3", splits=(_DIGITS_3, _CJK, _DEEPSEEK3)),
    PreTokenizer(
        name="deepseek-llm",
        splits=(
            r"[\r\n]",
            r"\s?[" + _CASED_SCRIPTS + "]+",
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"\s+$",
            _CJK_HANGUL,
            _DIGIT,
        ),
    ),
    PreTokenizer(name="deepseek-coder", splits=(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK_HANGUL, _DIGIT)),
    PreTokenizer(name="falcon", splits=("contiguous punctuation", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    PreTokenizer(name="falcon", splits=("contiguous punctuation", GPT2, "[0-9][0-9][0-9]")),
    PreTokenizer(name="bloom", splits=(_BLOOM,)),
    PreTokenizer(name="viking", splits=(_BLOOM, _DIGIT)),
    PreTokenizer(
        name="bailingmoe",
        splits=(rf"{ANY_CASE}|{_LEAD}\p{{L}}+|\p{{N}}|{_OTHER}[\r\n]*|{_GAP_LINE}",),
    ),
    PreTokenizer(name="seed-coder", splits=(_words(other=r" ?[^\s\p{L}\p{N}\r\n]+"),)),
    PreTokenizer(name="ufakzeka", splits=(_words().removeprefix(ANY_CASE + "|"),)),
    PreTokenizer(
        name="exaone-moe",
        splits=(rf"{ANY_CASE}|{_LEAD}(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}|{_OTHER}[\r\n/]?|{_GAP_LINE}",),
    ),
    PreTokenizer(
        name="jais-2",
        splits=(
            _words(
                _DIGITS_3,
                gaps=r"\s*[\r\n]+|"
                + "".join(rf"\s{{{n}}}(?!\S)|" for n in (512, 256, 128, 64, 32, 16, 8, 4))
                + r"\s{1,2}(?!\S)|\s{1}",
            ),
        ),
    ),
    PreTokenizer(name="minicpm5", splits=(_DIGITS_3, _words(r"\p{N}+")), whole_words=True),
    PreTokenizer(name="laguna", splits=(_LINES, _words())),
    PreTokenizer(name="superbpe", splits=(r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
    PreTokenizer(name="tiny_aya", splits=(_THREES, _O200K), limit=_CASE_LIMIT),
    PreTokenizer(
        name="afmoe",
        splits=(*_GROUPS_OF_3, _ASIAN, _DEEPSEEK3),
        limit="llama.cpp cuts Thai before its consonants",
    ),
    PreTokenizer(
        name="spark2_5",
        splits=(
            _DIGITS_3,
            _CJK,
            rf"{_PUNCTUATION_WORD}|{_LETTERS_MARKS}| ?[\p{{P}}\p{{S}}]+|[\r\n]|\s+(?!\S)|\s+",
            _DIGIT,
        ),
    ),
    PreTokenizer(
        name="youtu",
        splits=(_YOUTU_SCRIPTS, _cased(_UPPER, _LOWER, ANY_CASE + "?", _DIGIT)),
        whole_words=True,
        limit=_CASE_LIMIT,
    ),
    PreTokenizer(
        name="kimi-k2",
        splits=(
            "[\\p{Han}]+|"
            + _cased(
                _UPPER[:-1] + r"&&[^\p{Han}]]", _LOWER[:-1] + r"&&[^\p{Han}]]", ANY_CASE + "?", _DIGITS_3, r"[\r\n]*"
            ),
        ),
        limit=_HAN_LIMIT,
    ),
    PreTokenizer(
        name="chameleon",
        splits=(
            "<sentinel:[0-9]+>",
            "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
            r"([\t\n]|    |  )",
            _DIGIT,
            "punctuation",
            GPT2,
        ),
    ),
    PreTokenizer(name="sarvam-moe", splits=(), byte_level=False),
)
"""Every rule of llama.cpp 0c1e570; of names that share a rule, the best known. `default` and `whitespace` are left out:

the first stands for files without a name, the second belongs to a tokenizer model of its own.
"""
