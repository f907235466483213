"""Everything about a GGUF export that headers alone decide: metadata, tensors, types, sizes, names, objections.

`prepare` reads no weight. What it returns can be printed (`--dry-run`), checked against free space, and written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import Keys
from numpy.typing import NDArray

from efficli.checkpoint import Checkpoint, open_checkpoint
from efficli.errors import EffiError, UnsupportedError, UsageError
from efficli.export.gguf import packed
from efficli.export.gguf.chat_check import check_chat_templates
from efficli.export.gguf.general import file_name, general_metadata, model_card
from efficli.export.gguf.header import measure, pack
from efficli.export.gguf.layout import Metadata, OutTensor, string
from efficli.export.gguf.model import layout
from efficli.export.gguf.types import TypeChoice, TypeRequest, check_imatrix, choose_each
from efficli.export.gguf.vocab import compare_ids, read_vocab
from efficli.export.gguf.vocab_check import Mismatch
from efficli.families import ModelShape, read_shape
from efficli.ops.child import run_child
from efficli.ops.ggml_types import asked_type
from efficli.progress import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedFile:
    """One file before it is written: its name, the type of each tensor, its exact size in bytes."""

    name: str
    choice: TypeChoice
    nbytes: int

    @property
    def type(self) -> str:
        """llama.cpp's name of the file type, such as Q4_K_M, or MIXED."""
        return self.choice.type


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufJob:
    """What will be written from a checkpoint."""

    checkpoint: Checkpoint
    shape: ModelShape
    metadata: Metadata
    """Common to all files; `general.file_type` is added by the writer."""
    tensors: tuple[OutTensor, ...]
    files: tuple[PlannedFile, ...]
    report: tuple[str, ...]
    """What a user should know: what llama.cpp does otherwise, what was left out, which tensors fell back."""

    @property
    def num_weights(self) -> int:
        """Number of weights in the file."""
        return sum(t.num_elements for t in self.tensors)

    @property
    def embeds(self) -> bool:
        """Whether the model gives embeddings instead of tokens."""
        return not self.shape.facts.causal

    def with_imatrix(self, imatrix: Mapping[str, NDArray[np.float32]]) -> GgufJob:
        """The same job with the importance matrix that `prepare` was told would follow."""
        files = tuple(replace(f, choice=replace(f.choice, imatrix=imatrix)) for f in self.files)
        for file in files:
            check_imatrix(file.choice, self.tensors)
        return replace(self, files=files)


def prepare(
    ckpt: Checkpoint,
    requests: Sequence[TypeRequest],
    *,
    own: Mapping[str, str],
    pre_tokenizer: str | None = None,
    strict: bool = False,
) -> GgufJob:
    """Decide everything that needs no weight; `own` are values for keys under `efficli.`.

    Raises what its parts raise: UnsupportedError (family, tokenizer, type), CheckpointError (tensors that do not fit
    config.json), UsageError (types); with `strict` also where a tensor falls back to another type.
    """
    described = describe(ckpt, own=own, pre_tokenizer=pre_tokenizer, strict=strict)
    templates = check_chat_templates(ckpt)
    metadata, tensors = described.metadata, described.tensors
    kinds = [asked_type(request.type) for request in requests]
    if twice := sorted({kind for kind in kinds if kinds.count(kind) > 1}):
        raise UsageError(f"type {twice[0]} is asked for twice")
    sizer = Sizer(metadata, tensors)
    files, report = [], list(described.report)
    for choice in choose_each(metadata, tensors, requests):
        if isinstance(choice, EffiError):
            raise choice
        files.append(PlannedFile(name=file_name(metadata, choice.type), choice=choice, nbytes=sizer.nbytes(choice)))
        report += [f"{choice.type}: {fallback}" for fallback in choice.fallbacks]
        report += [f"{choice.type}: {note}" for note in packed.notes(ckpt, tensors, choice)]
        if strict and choice.fallbacks:
            raise UnsupportedError(
                f"{len(choice.fallbacks)} tensors cannot take {choice.type}, the first is {choice.fallbacks[0]}",
                hint="choose a type with blocks of 32 (Q8_0, Q4_0, IQ4_NL), or leave out --strict",
            )
    return GgufJob(
        checkpoint=ckpt,
        shape=described.shape,
        metadata=metadata,
        tensors=tuple(tensors),
        files=tuple(files),
        report=(*ckpt.notes, *model_card(ckpt).notes, *report, *described.vocab_notes, *templates),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """What all files of a checkpoint share, whatever their types."""

    shape: ModelShape
    metadata: Metadata
    tensors: list[OutTensor]
    report: tuple[str, ...]
    """What llama.cpp does otherwise, and what was left out."""
    vocab_notes: tuple[str, ...]


def describe(
    ckpt: Checkpoint, *, own: Mapping[str, str], pre_tokenizer: str | None = None, strict: bool = False
) -> Described:
    """Metadata and tensors of a checkpoint's files, from its configuration, tokenizer and headers; see `prepare`.

    Chat templates are taken as they are, and not tried.
    """
    shape = read_shape(ckpt.config)
    arch = shape.facts.gguf_arch
    vocab = read_vocab(ckpt, shape.vocab_size, arch, pre_tokenizer=pre_tokenizer)
    model, tensors, report = layout(shape, ckpt, strict=strict)
    # the matrices of experts are the only ones with three axes, however many tensors the checkpoint has them in
    general = general_metadata(
        ckpt,
        num_weights=sum(t.num_elements for t in tensors),
        expert_weights=sum(t.num_elements for t in tensors if len(t.shape) == 3),
        num_experts=shape.num_experts,
        strips_like_phi3=vocab.strips_like_phi3,
    )
    metadata: Metadata = {Keys.General.ARCHITECTURE: string(arch)} | general | model | vocab.metadata
    metadata |= {f"efficli.{key}": string(value) for key, value in own.items()}
    return Described(shape=shape, metadata=metadata, tensors=tensors, report=tuple(report), vocab_notes=vocab.notes)


class Sizer:
    """The exact size of files that differ in their types alone."""

    def __init__(self, metadata: Metadata, tensors: Sequence[OutTensor], *, more: int = 0) -> None:
        """`more`: bytes of fields that are not in `metadata`."""
        self._metadata, self._tensors, self._more = metadata, tensors, more
        self._packed: int | None = None

    def nbytes(self, choice: TypeChoice) -> int:
        """Bytes of the whole file: metadata, tensor table, data, alignment."""
        if self._packed is None:  # once: a vocabulary is megabytes, and what differs are numbers of fixed width
            self._packed = len(pack(self._metadata | choice.fields)) + self._more
        return measure(self._packed, choice.stored(self._tensors))


def compare_tokens(path: Path, ckpt: Checkpoint, progress: Progress) -> list[str]:
    """Compare token ids of a written file with the source tokenizer's, in a child process.

    Returns rows for known differences; UnsupportedError for one that nothing explains: the vocabulary is wrong.
    """
    argument = {"path": str(path.absolute()), "checkpoint": str(ckpt.root.absolute())}
    told = run_child(
        "efficli.export.gguf.job:compare", argument, what="comparing tokens", timeout_s=300, progress=progress
    )
    found = [Mismatch(m["text"], m["special"], tuple(m["expected"]), tuple(m["found"]), m["limit"]) for m in told]
    wrong = [mismatch for mismatch in found if not mismatch.limit]
    if wrong:
        raise UnsupportedError(
            wrong[0].describe(),
            where=path.name,
            hint="the pre-tokenizer was recognised wrongly: force another with --pre-tokenizer NAME",
        )
    return sorted({mismatch.limit for mismatch in found})


def compare(argument: dict[str, Any], progress: Progress) -> list[dict[str, Any]]:
    """The child's part of `compare_tokens`."""
    # what its configuration says of code was judged by the parent; none is run
    ckpt = open_checkpoint(Path(argument["checkpoint"]), trust_remote_code=True)
    return [mismatch.to_json() for mismatch in compare_ids(Path(argument["path"]), ckpt)]
