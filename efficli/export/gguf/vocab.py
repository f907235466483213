"""A checkpoint's tokenizer as GGUF metadata (`tokenizer.*`), found out before a tensor is read.

llama.cpp has four tokenizers: byte pairs on bytes (`gpt2`), SentencePiece byte pairs (`llama`), unigram (`t5`) and
WordPiece (`bert`). Every id that llama.cpp would get otherwise than the source is refused, or said in `Vocab.notes`;
after writing, `vocab_check.compare_ids` compares ids on a probe text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gguf import GGUFValueType, TokenType

from efficli.checkpoint import Checkpoint
from efficli.errors import CheckpointError, UnsupportedError
from efficli.export.gguf.layout import Metadata, array, string, u32
from efficli.export.gguf.vocab_bpe import read_bpe
from efficli.export.gguf.vocab_check import PROBE, Mismatch, compare_ids, source_ids
from efficli.export.gguf.vocab_source import AddedToken, Kind, Parts, Source, read_source
from efficli.export.gguf.vocab_special import read_chat_templates, read_specials, template_metadata
from efficli.export.gguf.vocab_spm import read_spm, read_unigram
from efficli.export.gguf.vocab_wordpiece import read_wordpiece

__all__ = ["PHI3", "PROBE", "Mismatch", "Vocab", "compare_ids", "read_vocab", "source_ids"]

PHI3 = ("<unk>", "<s>", "<|endoftext|>", "</s>")
"""Tokens that llama.cpp looks for, and dies without, where `general.name` contains "phi-3" or "phi3"."""


@dataclass(frozen=True, slots=True)
class Vocab:
    """A vocabulary ready to be written."""

    metadata: Metadata
    """All `tokenizer.*` fields, the chat template among them."""
    size: int
    """Number of ids: the rows of the embedding."""
    kind: Kind
    notes: tuple[str, ...] = ()
    """What llama.cpp does otherwise than the source tokenizer: rows for the report."""
    strips_like_phi3: bool = False
    """White space after special tokens is dropped; llama.cpp does so where `general.name` contains "phi-3"."""


def read_vocab(ckpt: Checkpoint, vocab_rows: int, arch: str, *, pre_tokenizer: str | None = None) -> Vocab:
    """Read the tokenizer of `ckpt` for an embedding of `vocab_rows` rows and the GGUF architecture `arch`.

    `pre_tokenizer` forces llama.cpp's name of one. Raises CheckpointError (no tokenizer, more ids than rows),
    UnsupportedError (a tokenizer that llama.cpp lacks). Reads no tensor and runs no code of the checkpoint.
    """
    source, notes = _fit(read_source(ckpt), vocab_rows, arch)
    parts = _read(source, vocab_rows, pre_tokenizer)
    _pad(parts)
    specials = read_specials(ckpt, source, vocab_rows)
    fields: Metadata = {
        "tokenizer.ggml.model": string(parts.model),
        "tokenizer.ggml.pre": string(parts.pre),
        "tokenizer.ggml.tokens": array(parts.texts, GGUFValueType.STRING),
        "tokenizer.ggml.token_type": array([int(kind) for kind in parts.types], GGUFValueType.INT32),
    }
    if parts.scores is not None:
        fields["tokenizer.ggml.scores"] = array(parts.scores, GGUFValueType.FLOAT32)
    if parts.merges is not None:
        fields["tokenizer.ggml.merges"] = array(parts.merges, GGUFValueType.STRING)
    if arch == "bert":
        fields["tokenizer.ggml.token_type_count"] = u32(int(ckpt.config.get("type_vocab_size", 1)))
    fields |= parts.fields | specials.metadata()
    fields |= template_metadata(read_chat_templates(ckpt, source))
    phi3 = _strips_like_phi3(source.added, parts.texts)
    notes += [*parts.notes, *specials.notes, *_flag_notes(source.added, phi3=phi3)]
    return Vocab(fields, vocab_rows, parts.kind, tuple(notes), phi3)


def _read(source: Source, rows: int, force: str | None) -> Parts:
    if source.kind == "bpe":
        return read_bpe(source, rows, force=force)
    if source.kind == "spm":
        return read_spm(source, rows, force=force)
    if force is not None:
        raise UnsupportedError(
            f"--pre-tokenizer {force!r}: only byte pair vocabularies have pre-tokenizers, this one is {source.kind}"
        )
    return read_unigram(source, rows) if source.kind == "unigram" else read_wordpiece(source, rows)


def _fit(source: Source, rows: int, arch: str) -> tuple[Source, list[str]]:
    """Check that every id has a row. Gemma 3's image token, which text models have no row for, is left out."""
    pieces = source.pieces
    count = max(pieces, default=-1) + 1
    if count == 0:
        raise CheckpointError("tokenizer.json: no tokens")
    if count <= rows:
        return source, []
    beyond = {token.id for token in source.added if token.id >= rows and token.special}
    if arch == "gemma3" and all(number in beyond for number in pieces if number >= rows):
        names = ", ".join(repr(pieces[number]) for number in sorted(beyond))
        return source, [f"special tokens without an embedding row are left out: {names}"]
    raise CheckpointError(
        f"tokenizer has {count} ids, embedding {rows} rows",
        hint="model.resize_token_embeddings(len(tokenizer)) of transformers adds the rows; or remove the added tokens",
    )


def _pad(parts: Parts) -> None:
    """Fill ids without a token with [PADn], and check what llama.cpp takes for granted."""
    texts = parts.texts
    empty = [i for i, kind in enumerate(parts.types) if kind is TokenType.UNUSED and not texts[i]]
    if empty:
        taken = {text for text, kind in zip(texts, parts.types, strict=True) if kind != TokenType.UNUSED}
        for i in empty:
            text = f"[PAD{i}]"
            while text in taken:
                text += "_"
            texts[i] = text
            taken.add(text)
    if "\0" not in "".join(texts) and len(set(texts)) == len(texts):
        return
    seen: dict[str, int] = {}
    for i, text in enumerate(texts):
        if "\0" in text:
            raise UnsupportedError(f"tokenizer: token {i} contains a NUL character, GGUF cannot hold it")
        if seen.setdefault(text, i) != i:
            raise UnsupportedError(
                f"tokenizer: ids {seen[text]} and {i} are both {text!r}, llama.cpp needs distinct texts"
            )


def _strips_like_phi3(added: Sequence[AddedToken], texts: Sequence[str]) -> bool:
    """Whether special tokens drop white space after them exactly as llama.cpp's rule for Phi-3 does."""
    if not any(token.rstrip for token in added) or not set(PHI3) <= set(texts):
        return False
    return all(token.rstrip != (token.content in PHI3[:3]) for token in added)


def _flag_notes(added: Sequence[AddedToken], *, phi3: bool) -> list[str]:
    """Rows for flags of added tokens that GGUF cannot hold."""
    notes = []
    for flag, what in (
        ("lstrip", "white space before them is dropped"),
        ("rstrip", "white space after them is dropped"),
        ("single_word", "they match whole words only"),
    ):
        names = [token.content for token in added if getattr(token, flag)]
        if names and not (flag == "rstrip" and phi3):
            shown = ", ".join(map(repr, names[:4])) + (", ..." if len(names) > 4 else "")
            notes.append(f"{len(names)} added tokens ({shown}): {what} by the source tokenizer, not by llama.cpp")
    return notes
