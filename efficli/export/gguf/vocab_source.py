"""What a checkpoint's tokenizer files say, before it is put into llama.cpp's terms. No code of the checkpoint is run.

Reads tokenizer.json, tokenizer_config.json, special_tokens_map.json and SentencePiece's tokenizer.model (a protobuf,
parsed here within bounds: sentencepiece_model.proto of google/sentencepiece).
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from gguf import TokenType

from efficli.checkpoint import Checkpoint
from efficli.errors import CheckpointError, UnsupportedError
from efficli.export.gguf.layout import Metadata
from efficli.export.gguf.pretokenizer import read_structure

MAX_FILE_BYTES = 1 << 28
"""No tokenizer file may be larger (256 MiB)."""

ENDS_KNOWN = frozenset(
    [
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "</s>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<eos>",
    ]
)
"""Tokens that llama.cpp takes for the end of generation by their text."""
_CONTROL = (
    frozenset(("<pad>", "<mask>", "<2mass>", "[@BOS@]", "<PRE>", "<SUF>", "<MID>", "<PAD>", "[PAD]")) | ENDS_KNOWN
)

Kind = Literal["bpe", "spm", "unigram", "wordpiece"]


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that is cut out of the text before anything else."""

    id: int
    content: str
    special: bool
    lstrip: bool
    rstrip: bool
    normalized: bool
    single_word: bool


@dataclass(frozen=True, slots=True)
class Piece:
    """A row of a SentencePiece model; `type`: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte."""

    text: str
    score: float
    type: int


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """A parsed tokenizer.model."""

    pieces: tuple[Piece, ...]
    unigram: bool
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    ids: Mapping[str, int]
    """Ids of unk, bos, eos and pad, as far as it has them."""


@dataclass(frozen=True)
class Source:
    """The tokenizer files of a checkpoint; at least one of `tokenizer` and `spm` is there."""

    tokenizer: Mapping[str, Any] | None
    spm: SentencePieceModel | None
    config: Mapping[str, Any]
    special_map: Mapping[str, Any]
    added: tuple[AddedToken, ...]

    @property
    def model(self) -> Mapping[str, Any]:
        """The `model` of tokenizer.json."""
        return (self.tokenizer or {}).get("model") or {}

    @property
    def kind(self) -> Kind:
        """Which of llama.cpp's tokenizers it needs."""
        if self.tokenizer is None:
            assert self.spm is not None  # read_source refuses a checkpoint with neither
            return "unigram" if self.spm.unigram else "spm"
        name = self.model.get("type")
        if name == "BPE":
            return "spm" if _wants_scores(self.tokenizer) else "bpe"
        if name in ("Unigram", "WordPiece"):
            return "unigram" if name == "Unigram" else "wordpiece"
        raise UnsupportedError(f"tokenizer.json: model type {name!r}, expected BPE, Unigram or WordPiece")

    @cached_property
    def pieces(self) -> Mapping[int, str]:
        """Id -> text of the model's own vocabulary and the added tokens."""
        vocab = self.model.get("vocab")
        out: dict[int, str] = {}
        if self.tokenizer is None and self.spm is not None:
            out = {i: piece.text for i, piece in enumerate(self.spm.pieces)}
        elif isinstance(vocab, Mapping):
            out = dict(zip(_ids(vocab.values()), vocab, strict=True))
            if len(out) != len(vocab):
                raise CheckpointError("tokenizer.json: two tokens have the same id")
        elif isinstance(vocab, Sequence):
            out = {i: str(row[0]) for i, row in enumerate(vocab)}
        return out | {token.id: token.content for token in self.added}

    def special_text(self, name: str) -> str | None:
        """The text of a special token (`bos`, `eos`, `pad`, ...) by its name."""
        for holder in (self.config, self.special_map):
            entry = holder.get(f"{name}_token")
            if isinstance(entry, Mapping):
                entry = entry.get("content")
            if isinstance(entry, str):
                return entry
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """A vocabulary in llama.cpp's terms, before special ids and the chat template."""

    kind: Kind
    model: str
    pre: str = "default"
    texts: list[str]
    types: list[TokenType]
    scores: list[float] | None = None
    merges: list[str] | None = None
    fields: Metadata
    notes: tuple[str, ...] = ()


def _id(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 31:
        raise CheckpointError(f"tokenizer.json: {value!r} is not a token id")
    return value


def _ids(values: Collection[Any]) -> Collection[int]:
    """All of them checked as by `_id`; a hundred thousand at once, where nothing is wrong."""
    if set(map(type, values)) == {int} and min(values) >= 0 and max(values) < 1 << 31:
        return values
    return [_id(value) for value in values]


def read_source(ckpt: Checkpoint) -> Source:
    """Read the tokenizer files of `ckpt`; CheckpointError where there are none or they are damaged."""
    tokenizer = ckpt.json("tokenizer.json")
    spm_file = ckpt.file("tokenizer.model")
    if tokenizer is None and spm_file is None:
        raise CheckpointError(
            "tokenizer.json not found",
            where=ckpt.name,
            hint="AutoTokenizer.from_pretrained(...).save_pretrained(...) of transformers writes it from older files",
        )
    spm = None
    if spm_file is not None and (tokenizer is None or _wants_scores(tokenizer)):
        if spm_file.stat().st_size > MAX_FILE_BYTES:
            raise CheckpointError("tokenizer.model is larger than 256 MiB")
        try:
            spm = parse_sentencepiece(spm_file.read_bytes())
        except CheckpointError:
            if tokenizer is None:
                raise  # beside a tokenizer.json it is a bonus: some checkpoints keep another format under that name
    config = ckpt.json("tokenizer_config.json") or {}
    added = _added_tokens(tokenizer) if tokenizer is not None else _added_from_config(config, spm)
    return Source(tokenizer, spm, config, ckpt.json("special_tokens_map.json") or {}, added)


def _wants_scores(tokenizer: Mapping[str, Any]) -> bool:
    """Whether it is a SentencePiece BPE: merges of characters, with tokens for bytes."""
    model = tokenizer.get("model")
    if not isinstance(model, Mapping) or model.get("type") != "BPE" or not model.get("byte_fallback"):
        return False
    return not read_structure(tokenizer).byte_level


def _added_tokens(tokenizer: Mapping[str, Any]) -> tuple[AddedToken, ...]:
    rows = tokenizer.get("added_tokens") or []
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise CheckpointError("tokenizer.json: added_tokens is not a list of tokens")
    return tuple(sorted((_added(row.get("id"), row) for row in rows), key=lambda token: token.id))


def _added(number: Any, row: Mapping[str, Any]) -> AddedToken:
    special = bool(row.get("special"))
    return AddedToken(
        id=_id(number),
        content=str(row.get("content", "")),
        special=special,
        lstrip=bool(row.get("lstrip")),
        rstrip=bool(row.get("rstrip")),
        normalized=bool(row.get("normalized", not special)),
        single_word=bool(row.get("single_word")),
    )


def _added_from_config(config: Mapping[str, Any], spm: SentencePieceModel | None) -> tuple[AddedToken, ...]:
    """Added tokens of a checkpoint without tokenizer.json: those of tokenizer_config.json and the control pieces."""
    found: dict[int, AddedToken] = {}
    for i, piece in enumerate(spm.pieces if spm else ()):
        if piece.type in (2, 3, 4):
            found[i] = AddedToken(i, piece.text, piece.type != 4, False, False, False, False)
    for number, row in (config.get("added_tokens_decoder") or {}).items():
        if not str(number).isdecimal() or not isinstance(row, Mapping):
            raise CheckpointError(f"tokenizer_config.json: added_tokens_decoder has {number!r}, expected a token id")
        found[int(number)] = _added(int(number), row)
    return tuple(found[number] for number in sorted(found))


def parse_sentencepiece(data: bytes) -> SentencePieceModel:
    """Parse a tokenizer.model; CheckpointError for anything that is not one."""
    pieces: list[Piece] = []
    trainer: dict[int, int] = {3: 1, 40: 0, 41: 1, 42: 2, 43: -1}  # the fields' defaults in the protobuf
    spec = SentencePieceModel((), True, b"", True, True, {})
    for number, value in _fields(data):
        if number == 1:
            pieces.append(_piece(_bytes(value)))
        elif number == 2:
            trainer |= {n: v for n, v in _fields(_bytes(value)) if n in trainer and isinstance(v, int)}
        elif number == 3:
            for n, v in _fields(_bytes(value)):
                if n == 2:
                    spec = replace(spec, charsmap=_bytes(v))
                elif n == 3:
                    spec = replace(spec, add_dummy_prefix=bool(v))
                elif n == 4:
                    spec = replace(spec, remove_extra_whitespaces=bool(v))
    if not pieces:
        raise CheckpointError("tokenizer.model: no pieces, expected a SentencePiece model")
    model_type = trainer[3]
    if model_type not in (1, 2):
        raise UnsupportedError(
            f"tokenizer.model: SentencePiece model type {model_type}, expected unigram (1) or BPE (2)"
        )
    named = {name: trainer[number] for name, number in (("unk", 40), ("bos", 41), ("eos", 42), ("pad", 43))}
    ids = {name: number for name, number in named.items() if 0 <= number < len(pieces)}  # -1 stands for none
    return replace(spec, pieces=tuple(pieces), unigram=model_type == 1, ids=ids)


def _piece(data: bytes) -> Piece:
    text, score, kind = "", 0.0, 1
    for number, value in _fields(data):
        if number == 1:
            try:
                text = _bytes(value).decode()
            except UnicodeDecodeError as error:
                raise CheckpointError("tokenizer.model: a piece is not UTF-8") from error
        elif number == 2 and isinstance(value, bytes):
            score = struct.unpack("<f", value)[0]
        elif number == 3 and isinstance(value, int):
            kind = value
    return Piece(text, score, kind)


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise CheckpointError("tokenizer.model: not a SentencePiece model")
    return value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise CheckpointError("tokenizer.model: truncated or not a SentencePiece model")


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field number and value of each field of a protobuf message, in order; lengths are checked against the data."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire == 2:
            length, at = _varint(data, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise CheckpointError("tokenizer.model: not a SentencePiece model")
        if length > len(data) - at:
            raise CheckpointError("tokenizer.model: truncated")
        yield key >> 3, data[at : at + length]
        at += length


def token_type(token: AddedToken) -> TokenType:
    """CONTROL for what a chat template or the runtime places, USER_DEFINED for words that were added.

    Some checkpoints do not mark `</s>` or tokens of the form `<|name|>` as special; llama.cpp and its converter treat
    them as control tokens all the same, so that a user's text cannot contain them.
    """
    text = token.content
    looks = (text.startswith("<|") and text.endswith("|>")) or (text.startswith("<\uff5c") and text.endswith("\uff5c>"))
    looks = looks or (text.startswith("<unused") and text.endswith(">")) or text in _CONTROL
    return TokenType.CONTROL if token.special or looks else TokenType.USER_DEFINED
