"""SentencePiece vocabularies: byte pairs (llama.cpp's tokenizer model `llama`) and unigram (`t5`)."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from gguf import GGUFValueType, TokenType

from efficli.errors import CheckpointError, UnsupportedError
from efficli.export.gguf.layout import Metadata, array, boolean
from efficli.export.gguf.pretokenizer import Structure, read_structure, require_bpe
from efficli.export.gguf.vocab_bpe import base_tokens, merge_lines
from efficli.export.gguf.vocab_source import Parts, Source

SPACE = "\u2581"
_TO_SPACE = f"Replace(' ', {SPACE!r})"
_PREPEND = f"Prepend({SPACE!r})"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_RAW_TEXT = ("sarvam-moe", "gemma4")
_ADDED_SCORE = -1000.0  # never joined from pieces: what llama.cpp's converter gives to added tokens


def read_spm(source: Source, size: int, *, force: str | None = None) -> Parts:
    """The vocabulary of a SentencePiece BPE, ids 0 to `size` - 1.

    llama.cpp joins the neighbours whose union has the highest score, whatever the merges say. Scores come from
    tokenizer.model, or from the order of the merges; where a vocabulary was not made that way (a pair that may not
    be joined), llama.cpp's raw-text BPE takes it if the tokenizer puts no space before the text.
    """
    texts, types = base_tokens(source, size)
    for i, text in enumerate(texts):
        if types[i] == TokenType.NORMAL and _BYTE.fullmatch(text):
            types[i] = TokenType.BYTE
    prefix, notes = _space_prefix(source)
    _need_bytes(types)
    merges = merge_lines(source.model.get("merges") or ())
    scores = None if force else _model_scores(source, size) or _merge_scores(source, merges, size)
    if scores is None:
        return _raw_text_bpe(texts, types, merges, prefix, force, notes)
    for i, kind in enumerate(types):
        if kind == TokenType.CONTROL:
            scores[i] = _ADDED_SCORE
    if source.tokenizer is None and source.spm is not None:
        _mark_unknown(source, types)
    fields: Metadata = {"tokenizer.ggml.add_space_prefix": boolean(prefix)}
    return Parts(kind="spm", model="llama", texts=texts, types=types, scores=scores, fields=fields, notes=tuple(notes))


def _raw_text_bpe(
    texts: list[str], types: list[TokenType], merges: list[str], prefix: bool, force: str | None, notes: list[str]
) -> Parts:
    """Byte pairs on raw text, whose merges llama.cpp follows; it puts no space before the text."""
    if force not in (None, *_RAW_TEXT):
        raise UnsupportedError(f"--pre-tokenizer {force!r}: for SentencePiece BPE it is one of {', '.join(_RAW_TEXT)}")
    if prefix:
        raise UnsupportedError(
            "tokenizer.json: BPE on characters, a space before the text and merges other than SentencePiece's: "
            "llama.cpp joins every pair that is a token",
            hint="train the tokenizer with the sentencepiece package, or as byte-level BPE",
        )
    note = "written as raw-text BPE: the merges leave out pairs that are tokens"
    return Parts(
        kind="bpe",
        model="gpt2",
        pre=force or _RAW_TEXT[0],
        texts=texts,
        types=types,
        merges=merges,
        fields={},
        notes=(*notes, note),
    )


def _mark_unknown(source: Source, types: list[TokenType]) -> None:
    for i, piece in enumerate(source.spm.pieces if source.spm else ()):
        if piece.type == 2 and i < len(types):
            types[i] = TokenType.UNKNOWN


def _need_bytes(types: Sequence[TokenType]) -> None:
    count = sum(kind == TokenType.BYTE for kind in types)
    if count < 256:
        raise UnsupportedError(
            f"tokenizer: {count} of the 256 byte tokens <0x00> to <0xFF>, llama.cpp needs all of them",
            hint="train the tokenizer with byte_fallback",
        )


def _space_prefix(source: Source) -> tuple[bool, list[str]]:
    """Whether a space goes before the text, and notes; UnsupportedError for normalizers that llama.cpp lacks."""
    if source.tokenizer is None:
        assert source.spm is not None
        if source.spm.charsmap or source.spm.remove_extra_whitespaces:
            raise UnsupportedError(
                "tokenizer.model: BPE that normalizes text or removes white space, llama.cpp's does neither",
                hint="train it with normalization_rule_name=identity and remove_extra_whitespaces=false",
            )
        return source.spm.add_dummy_prefix, []
    require_bpe(source.tokenizer)
    structure = read_structure(source.tokenizer)
    notes = []
    match structure:
        case Structure(normalizers=(prepend, to_space), splits=()) if (prepend, to_space) == (_PREPEND, _TO_SPACE):
            prefix = True
        case Structure(normalizers=(to_space,), splits=() | ("split ' ' mergedwithprevious",)) if to_space == _TO_SPACE:
            prefix = False
        case Structure(normalizers=(), splits=(metaspace,)) if metaspace.endswith(", no split)"):
            prefix = "never" not in metaspace
            if "first" in metaspace:
                notes.append("llama.cpp puts a space after special tokens too, the source before the text only")
        case _:
            raise UnsupportedError(
                f"tokenizer.json: SentencePiece BPE with {structure.describe()}, expected spaces become {SPACE}",
                hint="llama.cpp does not normalize text for this kind of tokenizer; retrain it with the identity rule",
            )
    return prefix, notes


def _model_scores(source: Source, size: int) -> list[float] | None:
    """Scores of tokenizer.model, if it holds the same pieces as tokenizer.json."""
    if source.spm is None or source.spm.unigram:
        return None
    pieces = source.spm.pieces
    added = {token.id for token in source.added}
    texts = source.pieces
    if any(texts.get(i) != piece.text for i, piece in enumerate(pieces) if i not in added):
        return None
    return [pieces[i].score if i < len(pieces) else _ADDED_SCORE for i in range(size)]


def _merge_scores(source: Source, merges: Sequence[str], size: int) -> list[float] | None:
    """Scores that make llama.cpp join pairs in the order of `merges`; None where no scores can.

    They can where every split of a token into two tokens is a merge, and the merges that make a token come before
    all merges of the next one.
    """
    vocab: Mapping[str, int] = source.model.get("vocab") or {}
    ranks = {tuple(line.split(" ")): rank for rank, line in enumerate(merges)}
    # Added words are cut out of the text before; those of spaces come about by joining too, spaces being spelled anew.
    added = {token.id for token in source.added if SPACE not in token.content}
    joined = [left + right for left, right in ranks]
    runs = 1 + sum(a != b for a, b in pairwise(joined))
    if runs != len(set(joined)) and joined:
        return None
    if any(token not in vocab for token in joined):
        raise CheckpointError("tokenizer.json: a merge makes a token that is not in the vocabulary")
    normal = {text for text, i in vocab.items() if i not in added and not _BYTE.fullmatch(text)}
    if any((text[:k], text[k:]) not in ranks for text in normal for k in _cuts(text, normal)):
        return None
    scores = [_ADDED_SCORE * 1000] * size
    for rank, token in enumerate(dict.fromkeys(joined)):
        if vocab[token] < size:
            scores[vocab[token]] = -float(rank)
    return scores


def _cuts(text: str, vocab: set[str]) -> Iterator[int]:
    return (k for k in range(1, len(text)) if text[:k] in vocab and text[k:] in vocab)


def read_unigram(source: Source, size: int) -> Parts:
    """The vocabulary of a SentencePiece unigram model, ids 0 to `size` - 1."""
    texts, types = base_tokens(source, size)
    scores = [0.0] * size
    if source.tokenizer is None:
        assert source.spm is not None
        charsmap, prefix = source.spm.charsmap, source.spm.add_dummy_prefix
        collapse = source.spm.remove_extra_whitespaces
        unknown: Any = None
        rows: Sequence[Any] = [(piece.text, piece.score) for piece in source.spm.pieces]
        _mark_unknown(source, types)
    else:
        if source.model.get("byte_fallback"):
            raise UnsupportedError(
                "tokenizer.json: unigram with byte_fallback, llama.cpp has no bytes for unigram models"
            )
        charsmap, collapse, prefix = _unigram_structure(source)
        unknown = source.model.get("unk_id")
        rows = source.model.get("vocab") or ()
    for i, (_, score) in enumerate(rows):
        if i < size:
            scores[i] = float(score)
    if isinstance(unknown, int) and 0 <= unknown < size:
        types[unknown] = TokenType.UNKNOWN
    fields: Metadata = {
        "tokenizer.ggml.add_space_prefix": boolean(prefix),
        "tokenizer.ggml.remove_extra_whitespaces": boolean(collapse),
    }
    if charsmap:
        fields["tokenizer.ggml.precompiled_charsmap"] = array(charsmap, GGUFValueType.UINT8)
    return Parts(kind="unigram", model="t5", texts=texts, types=types, scores=scores, fields=fields)


def _unigram_structure(source: Source) -> tuple[bytes, bool, bool]:
    """The character map, whether white space is collapsed, and whether a space goes before the text."""
    assert source.tokenizer is not None
    structure = read_structure(source.tokenizer)
    charsmap, collapse = b"", "WhitespaceSplit" in structure.splits
    for step in _steps(source.tokenizer.get("normalizer")):
        kind = step.get("type")
        if kind == "Precompiled":
            try:
                charsmap = base64.b64decode(step.get("precompiled_charsmap") or "", validate=True)
            except binascii.Error as error:
                raise CheckpointError("tokenizer.json: precompiled_charsmap is not base64") from error
        elif kind == "Replace" and _pattern(step) == " {2,}":
            collapse = True
        elif kind not in ("Strip", "Sequence"):
            raise UnsupportedError(
                f"tokenizer.json: unigram with normalizer {kind}, llama.cpp has a character map only"
            )
    metaspace = [split for split in structure.splits if split.startswith("Metaspace(")]
    if len(metaspace) != 1 or set(structure.splits) - {"WhitespaceSplit", metaspace[0]}:
        raise UnsupportedError(
            f"tokenizer.json: unigram with {structure.describe()}, llama.cpp cuts text by Metaspace alone"
        )
    return charsmap, collapse, "never" not in metaspace[0]


def _pattern(step: Mapping[str, Any]) -> str:
    return str((step.get("pattern") or {}).get("Regex"))


def _steps(node: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    if not node:
        return
    for child in node.get("normalizers") or (node,):
        if child is node:
            yield node
        else:
            yield from _steps(child)
