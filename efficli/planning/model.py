"""The files that an export would write, to the byte, from a checkpoint's small files: no weight is needed or read.

What decides is `export`'s own code (`efficli.export.gguf`) on the tensors that config.json stands for, or on the
headers where the weights are here. llama.cpp chooses the types, for all files in one child process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from gguf import GGUFValueType

from efficli.checkpoint import open_without_weights
from efficli.errors import EffiError, UsageError
from efficli.export.gguf.job import Sizer
from efficli.export.gguf.layout import Metadata
from efficli.export.gguf.types import TERNARY, Fallback, TypeChoice, TypeRequest, choose_each
from efficli.ops.ggml_types import FILE_TYPES, file_type
from efficli.planning.cache import CacheLayer
from efficli.planning.subject import Subject, read_subject
from efficli.progress import Progress, Silent

TYPES = tuple(name for name in FILE_TYPES if name != "F32")
"""What is planned unless types are named."""

_MAY_NEED_IMATRIX = frozenset(name for name in TYPES if name.startswith(("IQ1", "IQ2", "IQ3"))) | {"Q2_K_S"}
"""File types that give some tensor a type which needs an importance matrix, in some models."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedFile:
    """One file that could be written."""

    type: str
    """llama.cpp's name of the file type, such as Q4_K_M."""
    nbytes: int
    """Of the whole file: metadata, vocabulary, tensor table, data, alignment."""
    data_nbytes: int
    """Of the tensors' data alone."""
    bits_per_weight: float
    fallbacks: tuple[Fallback, ...]
    """Tensors that cannot take the type that they should have."""
    tensors: Mapping[str, tuple[str, int, tuple[int, ...]]]
    """Name -> ggml's type, bytes, shape (rows, columns)."""
    needs_imatrix: bool
    """Is not written without an importance matrix; the types are those that it has with one."""
    ternary: bool
    """Packs weights of two or three values, and ruins others: `export` refuses those."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedModel:
    """What a model would be as GGUF files."""

    name: str
    """What to call it: hub id, the directory's name, or "reference"."""
    model: str
    """The user's word for it."""
    revision: str | None
    architecture: str
    """As config.json names it."""
    gguf_arch: str
    num_weights: int
    """In the file."""
    tied: bool
    """The output matrix is the embedding."""
    basis: Literal["headers", "config"]
    """Whether the tensors are those of the weights' headers, or those that config.json stands for."""
    metadata: Mapping[str, Any]
    """The files' metadata as plain values, without the arrays of the vocabulary."""
    vocab_size: int
    num_merges: int
    """Of a BPE vocabulary; 0 in others."""
    hidden_size: int
    unread_nbytes: int
    """Bytes that are reckoned for a vocabulary which could not be read: sizes are exact where this is 0."""
    max_positions: int
    """The longest context that llama.cpp computes right, as the file says it."""
    cache: tuple[CacheLayer, ...]
    files: tuple[PlannedFile, ...]
    """In the order of the types."""
    refused: Mapping[str, str]
    """Types that this model cannot have, and why."""
    exportable: bool
    why_not: str | None
    """Why `export` does not write it, where it is planned all the same."""
    notes: tuple[str, ...]
    """What a user should know of it, and what the figures rest on."""


def plan_files(
    model: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    types: Sequence[str] | None = None,
    pre_tokenizer: str | None = None,
    progress: Progress | None = None,
) -> PlannedModel:
    """Every file that an export of `model` (directory, hub id, `reference`) could write, with its exact size.

    `types` are llama.cpp's names, all but F32 by default. Of a hub id only the small files are fetched; weights that
    are here are read to their headers, which decide whether the output matrix is the embedding. Chat templates are not
    tried. Errors are those of `export` before it reads a weight, but for a family that only the plan knows
    (`exportable` is false), and for types that the model cannot have (`refused`).
    """
    progress = progress or Silent()
    asked = tuple(dict.fromkeys(file_type(name) for name in types)) if types is not None else TYPES
    if not asked:
        raise UsageError("no types to plan", hint=f"one or more of {', '.join(TYPES)}")
    progress.start("reading config and tokenizer", 0)
    ckpt, absent = open_without_weights(model, revision=revision, trust_remote_code=trust_remote_code)
    subject = read_subject(ckpt, absent, pre_tokenizer=pre_tokenizer)
    progress.start("asking llama.cpp for the types", 0)
    files, refused = _files(subject, asked)
    progress.finish()
    return PlannedModel(
        name=ckpt.name,
        model=str(model),
        revision=ckpt.revision,
        architecture=subject.architecture,
        gguf_arch=subject.gguf_arch,
        num_weights=subject.num_weights,
        tied=subject.tied,
        basis=subject.basis,
        metadata=plain_values(subject.metadata),
        vocab_size=subject.vocab_size,
        num_merges=num_merges(subject.metadata),
        hidden_size=subject.hidden_size,
        unread_nbytes=subject.unread_nbytes,
        max_positions=subject.max_positions,
        cache=subject.cache,
        files=files,
        refused=refused,
        exportable=subject.why_not is None,
        why_not=subject.why_not,
        notes=subject.notes,
    )


def _files(subject: Subject, types: Sequence[str]) -> tuple[tuple[PlannedFile, ...], dict[str, str]]:
    """The files of these types, and what llama.cpp or efficli says against the others."""
    only = subject.only_types
    stored = f"its weights are stored as {only[0]}, and llama.cpp's converter keeps them so" if only else ""
    refused = {name: stored for name in types if only and name not in only}
    types = [name for name in types if name not in refused]
    requests = [TypeRequest(type=name) for name in types]
    # which of them need an importance matrix shows only in the answer: each is asked both ways, in one child
    requests += [TypeRequest(type=name, imatrix_follows=True) for name in types if name in _MAY_NEED_IMATRIX]
    choices = choose_each(subject.metadata, list(subject.tensors), requests)
    told = {(r.type, r.imatrix_follows): choice for r, choice in zip(requests, choices, strict=True)}
    sizer = Sizer(subject.metadata, subject.tensors, more=subject.unread_nbytes)
    files = []
    for name in types:
        choice = told[name, False]
        needs_imatrix = isinstance(choice, UsageError) and (name, True) in told
        if needs_imatrix:
            choice = told[name, True]
        try:
            if isinstance(choice, EffiError):
                raise choice
            files.append(_file(choice, sizer, subject, needs_imatrix))
        except EffiError as error:
            refused[name] = error.message
    return tuple(files), refused


def _file(choice: TypeChoice, sizer: Sizer, subject: Subject, needs_imatrix: bool) -> PlannedFile:
    if subject.as_source:
        kept = dict.fromkeys(subject.as_source, "BF16" if choice.type == "BF16" else "F16")
        choice = replace(choice, types={**choice.types, **kept})
    stored = choice.stored(subject.tensors)
    data = sum(tensor.nbytes for tensor in stored)
    return PlannedFile(
        type=choice.type,
        nbytes=sizer.nbytes(choice),
        data_nbytes=data,
        bits_per_weight=data * 8 / subject.num_weights,
        fallbacks=choice.fallbacks,
        tensors={t.name: (choice.types[t.name], t.nbytes, t.shape) for t in stored},
        needs_imatrix=needs_imatrix,
        ternary=choice.type in TERNARY,
    )


def num_merges(metadata: Metadata) -> int:
    """Merges of the vocabulary in a file's metadata."""
    field = metadata.get("tokenizer.ggml.merges")
    return 0 if field is None else len(field.value)


def plain_values(metadata: Metadata) -> dict[str, Any]:
    """A file's metadata without the arrays of the vocabulary."""
    return {
        key: field.value
        for key, field in metadata.items()
        if not (key.startswith("tokenizer.") and field.type is GGUFValueType.ARRAY)
    }
