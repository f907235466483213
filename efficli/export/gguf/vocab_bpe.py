"""Byte-level byte pair vocabularies (GPT-2, Llama 3, Qwen, SmolLM, ...): llama.cpp's tokenizer model `gpt2`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gguf import TokenType

from efficli.errors import CheckpointError, UnsupportedError
from efficli.export.gguf.pretokenizer import detect, require_bpe
from efficli.export.gguf.vocab_source import Parts, Source, token_type


def read_bpe(source: Source, size: int, *, force: str | None = None) -> Parts:
    """The vocabulary of a byte-level BPE tokenizer.json, ids 0 to `size` - 1; ids without a token are left out.

    `force` names the pre-tokenizer. UnsupportedError where none of llama.cpp's fits.
    """
    assert source.tokenizer is not None
    require_bpe(source.tokenizer)
    found = detect(source.tokenizer, force=force)
    texts, types = base_tokens(source, size)
    return Parts(
        kind="bpe",
        model="gpt2",
        pre=found.name,
        texts=texts,
        types=types,
        merges=merge_lines(source.model["merges"]),
        fields={},
        notes=found.notes,
    )


def base_tokens(source: Source, size: int) -> tuple[list[str], list[TokenType]]:
    """Texts and types by id; an id without a token has the text "" and the type UNUSED."""
    texts, types = [""] * size, [TokenType.UNUSED] * size
    for number, text in source.pieces.items():
        if number < size:
            texts[number], types[number] = text, TokenType.NORMAL
    for token in source.added:
        if token.id < size:
            types[token.id] = token_type(token)
    return texts, types


def merge_lines(merges: Sequence[Any]) -> list[str]:
    """`left right` lines from either form of tokenizer.json: such strings, or pairs."""
    lines: list[str] = []
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2:
            raise _no_pair(merge)
        left, right = pair
        if not (isinstance(left, str) and isinstance(right, str) and left and right):
            raise _no_pair(merge)
        if " " in left or " " in right:
            raise UnsupportedError(f"tokenizer.json: merge {merge!r} has a space in a token, GGUF cannot hold it")
        lines.append(f"{left} {right}")
    return lines


def _no_pair(merge: object) -> CheckpointError:
    return CheckpointError(f"tokenizer.json: merge {merge!r} is not a pair of tokens")
