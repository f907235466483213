"""WordPiece vocabularies (BERT): llama.cpp's tokenizer model `bert`, where a word starts with a phantom space."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gguf import TokenType

from efficli.errors import CheckpointError, UnsupportedError
from efficli.export.gguf.layout import boolean
from efficli.export.gguf.pretokenizer import read_structure
from efficli.export.gguf.vocab_bpe import base_tokens
from efficli.export.gguf.vocab_source import Parts, Source

SPACE = "\u2581"


def read_wordpiece(source: Source, size: int) -> Parts:
    """The vocabulary of a WordPiece tokenizer.json, ids 0 to `size` - 1.

    llama.cpp searches the longest pieces of `▁word`: pieces that continue a word lose their `##`, the others get `▁`.
    UnsupportedError for tokenizers that do not cut text as BERT does.
    """
    assert source.tokenizer is not None
    prefix = source.model.get("continuing_subword_prefix", "##")
    if not isinstance(source.model.get("vocab"), Mapping):
        raise CheckpointError("tokenizer.json: model.vocab expected")
    normalizer, notes = _normalizer(source)
    texts, types = base_tokens(source, size)
    for i, text in enumerate(texts):
        if types[i] == TokenType.NORMAL and text:
            texts[i] = text[len(prefix) :] if text.startswith(prefix) and text != prefix else SPACE + text
    return Parts(
        kind="wordpiece",
        model="bert",
        texts=texts,
        types=types,
        fields={f"tokenizer.ggml.normalizer.{name}": boolean(value) for name, value in normalizer.items()},
        notes=tuple(notes),
    )


def _normalizer(source: Source) -> tuple[dict[str, bool], list[str]]:
    """llama.cpp's normalizer switches, and what it does otherwise than the source."""
    assert source.tokenizer is not None
    structure = read_structure(source.tokenizer)
    if structure.splits != ("BertPreTokenizer",) or structure.normalizers not in (("BertNormalizer",), ()):
        raise UnsupportedError(
            f"tokenizer.json: WordPiece with {structure.describe()}, expected BertNormalizer → BertPreTokenizer"
        )
    step: Mapping[str, Any] = source.tokenizer.get("normalizer") or {"lowercase": False, "clean_text": False}
    lowercase = bool(step.get("lowercase", True))
    accents = step.get("strip_accents")
    notes = []
    if not step.get("clean_text", True) or not step.get("handle_chinese_chars", True):
        notes.append("WordPiece: llama.cpp always removes control characters and separates Chinese characters")
    limit = source.model.get("max_input_chars_per_word", 100)
    notes.append(f"WordPiece: words of more than {limit} characters are one unknown token, in llama.cpp their pieces")
    notes.append("WordPiece: llama.cpp does not take Hangul apart, and drops spacing marks (as in Hindi) with accents")
    return {"lowercase": lowercase, "strip_accents": lowercase if accents is None else bool(accents)}, notes
