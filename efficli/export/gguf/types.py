"""Which type each tensor gets: llama.cpp's file types by name, and its own choice per tensor.

The choice is llama.cpp's, not ours: its quantizer's dry run reads a file that holds our metadata and tensor table and
nothing else (`ops.dry_run`). What is added: refusals where llama.cpp would abort, drop a wish or write garbage. Types
that a pass allocated (MIXED) are checked, and llama.cpp is not asked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import numpy as np
from gguf import GGUFValueType
from numpy.typing import NDArray

from efficli.artifact.temporary import scratch_directory
from efficli.errors import CheckpointError, EffiError, UnsupportedError, UsageError, did_you_mean
from efficli.export.gguf.header import StoredTensor, lay_out
from efficli.export.gguf.layout import Metadata, OutTensor, u32
from efficli.ops.dry_run import Answer, Question, ask
from efficli.ops.ggml import block_size, row_bytes, type_id
from efficli.ops.ggml_types import (
    FILE_TYPES,
    MIXED,
    NEED_IMATRIX,
    TYPE_IDS,
    file_type,
    is_mixed,
    mostly,
    tensor_type,
)
from efficli.ops.storage import writing

TERNARY = frozenset({"TQ1_0", "TQ2_0", "Q2_0", "Q1_0"})
"""Types that pack weights of two or three values a block, and ruin others."""

_PLAIN = frozenset({"F32", "F16", "BF16"})
_LOW_BIT_OUTPUT = frozenset({"IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ2_S", "IQ2_M", "IQ1_M"})
_ENDS = frozenset({"token_embd.weight", "output.weight"})


@dataclass(frozen=True, slots=True, kw_only=True)
class TypeRequest:
    """What the user asked for: a file type, and exceptions from it."""

    type: str
    """A name of `FILE_TYPES` or `ALIASES`, or MIXED, any case."""
    given: Mapping[str, str] | None = None
    """For MIXED: tensor's name -> its type; those that keep F32 in every file may be left out."""
    overrides: tuple[tuple[str, str], ...] = ()
    """(regular expression, type): searched in the tensor's name, the first that matches wins."""
    output_tensor_type: str | None = None
    token_embedding_type: str | None = None
    pure: bool = False
    """Every tensor the same type, no mixture."""
    imatrix: Mapping[str, NDArray[np.float32]] | None = None
    """Importance matrix: tensor name -> mean square of each input column (experts one after the other)."""
    imatrix_follows: bool = False
    """An importance matrix will be computed: types are chosen as if it were there."""
    allow_non_ternary: bool = False


@dataclass(frozen=True, slots=True)
class Fallback:
    """A tensor whose rows do not fill the blocks of the type that it should have."""

    tensor: str
    wanted: str
    got: str
    columns: int

    def __str__(self) -> str:
        block = block_size(self.wanted)
        why = f"rows of {self.columns} do not fill the blocks of {block} of {self.wanted}"
        return f"{self.tensor} is {self.got}: {why}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TypeChoice:
    """The types of one file: ggml's type name of every tensor, and what differs from the wish."""

    type: str
    """A name of `FILE_TYPES`, or MIXED."""
    types: Mapping[str, str]
    fallbacks: tuple[Fallback, ...] = ()
    imatrix: Mapping[str, NDArray[np.float32]] | None = field(default=None, repr=False)
    allow_non_ternary: bool = False
    mostly: str | None = None
    """For MIXED: the file type that the metadata names."""

    @property
    def file_type(self) -> int:
        """The value of `general.file_type`."""
        return FILE_TYPES[self.mostly or self.type]

    @property
    def fields(self) -> Metadata:
        """The metadata that differs between files of one model."""
        return {"general.file_type": u32(self.file_type), "general.quantization_version": u32(2)}

    def nbytes(self, tensors: Iterable[OutTensor]) -> int:
        """Bytes of the tensors' data, without alignment."""
        return sum(tensor.nbytes for tensor in self.stored(tensors))

    def stored(self, tensors: Iterable[OutTensor]) -> list[StoredTensor]:
        """The tensors as the file holds them."""
        return [
            StoredTensor(t.name, t.shape, type_id(kind), t.num_elements // t.shape[-1] * row_bytes(kind, t.shape[-1]))
            for t in tensors
            for kind in (self.types[t.name],)
        ]


def choose_types(metadata: Metadata, tensors: list[OutTensor], request: TypeRequest) -> TypeChoice:
    """The type of every tensor, as llama.cpp's quantizer chooses from F32, or as they are given.

    UsageError: unknown type, an override that no tensor takes, rows that an explicitly given type cannot hold, a type
    that needs an importance matrix and has none. UnsupportedError: llama.cpp has no types for these rows. MissingExtra
    without llama-cpp-python. CheckpointError: given types that are not for these tensors.
    """
    (choice,) = choose_each(metadata, tensors, [request])
    if isinstance(choice, EffiError):
        raise choice
    return choice


def choose_each(
    metadata: Metadata, tensors: list[OutTensor], requests: Sequence[TypeRequest]
) -> list[TypeChoice | EffiError]:
    """`choose_types` for several files at the price of one child process; an error in the place of what it refuses.

    Raises only what concerns all of them: MissingExtra, and FitError where llama.cpp does not answer.
    """
    out: list[TypeChoice | EffiError] = []
    with scratch_directory() as folder:
        header = folder / "header.gguf"
        asked: list[Question | TypeChoice | EffiError] = []
        for request in requests:
            try:
                asked.append(
                    _given(tensors, request) if is_mixed(request.type) else _question(header, tensors, request)
                )
            except EffiError as error:
                asked.append(error)
        questions = [question for question in asked if isinstance(question, Question)]
        if questions:
            _write_header(header, metadata, tensors)
        answers = iter(ask(questions) if questions else [])
    for request, question in zip(requests, asked, strict=True):
        if not isinstance(question, Question):
            out.append(question)
            continue
        try:
            out.append(_choice(request, question, next(answers), tensors))
        except EffiError as error:
            out.append(error)
    return out


def _question(header: Path, tensors: list[OutTensor], request: TypeRequest) -> Question:
    """What llama.cpp is asked for one file; UsageError for a wish that makes no sense."""
    name = file_type(request.type)
    output = tensor_type(request.output_tensor_type) if request.output_tensor_type else None
    embedding = tensor_type(request.token_embedding_type) if request.token_embedding_type else None
    overrides = tuple((pattern, tensor_type(kind)) for pattern, kind in request.overrides)
    _check_patterns(overrides, tensors)
    _check_rows("output.weight", output, tensors)
    _check_rows("token_embd.weight", embedding, tensors)
    ftype, pure = FILE_TYPES[name], request.pure
    if overrides and name in _PLAIN:
        # llama.cpp ignores overrides for these; asked as "all Q8_0, but the rest of it F16" it applies them
        ftype, pure, overrides = FILE_TYPES["Q8_0"], True, (*overrides, (".*", name))
    return Question(
        header=str(header),
        ftype=ftype,
        pure=pure,
        output_tensor_type=output,
        token_embedding_type=embedding,
        overrides=overrides,
        with_imatrix=request.imatrix is not None or request.imatrix_follows,
    )


def _choice(request: TypeRequest, question: Question, answer: Answer, tensors: list[OutTensor]) -> TypeChoice:
    """The types of one file from llama.cpp's answer."""
    if answer.refused is not None:
        raise UnsupportedError(answer.refused, hint=answer.hint)
    name = file_type(request.type)
    types: dict[str, str] = {t.name: "F32" if t.keep_f32 else answer.types[t.name] for t in tensors}
    given = [pattern for pattern, _ in question.overrides]
    given += ["output"] * (question.output_tensor_type is not None)
    given += ["embd"] * (question.token_embedding_type is not None)
    choice = TypeChoice(
        type=name,
        types=types,
        fallbacks=_fallbacks(name, tensors, types, answer.fallbacks, given),
        imatrix=request.imatrix,
        allow_non_ternary=request.allow_non_ternary,
    )
    if not request.imatrix_follows:
        check_imatrix(choice, tensors)
    return choice


def _given(tensors: Sequence[OutTensor], request: TypeRequest) -> TypeChoice:
    """The types of one file as a pass allocated them; CheckpointError where they are not for these tensors."""
    if request.given is None:
        hint = "efficli quantize --max-bytes SIZE makes an allocation; or name another --type"
        raise UsageError(f"type {MIXED} of a checkpoint without an allocation of types", hint=hint)
    if request.pure or request.overrides or request.output_tensor_type or request.token_embedding_type:
        wish = "--pure" if request.pure else "a type for some tensors"
        hint = "name a --type that they are exceptions from, or leave them out"
        raise UsageError(f"{wish} and type {MIXED}, which says the type of every tensor", hint=hint)
    names = {tensor.name for tensor in tensors}
    if strangers := [name for name in request.given if name not in names]:
        raise CheckpointError(f"the allocation names {strangers[0]!r}, which the file does not have")
    types, held = dict[str, str](), dict[str, int]()
    for tensor in tensors:
        kind = types[tensor.name] = _given_type(tensor, request.given)
        held[kind] = held.get(kind, 0) + tensor.num_elements
    choice = TypeChoice(
        type=MIXED,
        types=types,
        imatrix=request.imatrix,
        allow_non_ternary=request.allow_non_ternary,
        mostly=mostly(held),
    )
    if not request.imatrix_follows:
        check_imatrix(choice, tensors)
    return choice


def _given_type(tensor: OutTensor, given: Mapping[str, str]) -> str:
    """The allocated type of one tensor, in capitals."""
    kind = given.get(tensor.name, "F32" if tensor.keep_f32 else "").upper()
    if not kind:
        raise CheckpointError("has no type in the allocation", where=tensor.name)
    if kind not in TYPE_IDS:
        raise CheckpointError(
            f"its allocated type is {kind!r}, expected one of {', '.join(TYPE_IDS)}", where=tensor.name
        )
    if tensor.keep_f32 and kind != "F32":
        raise CheckpointError(f"its allocated type is {kind}, and it stays F32 in every file", where=tensor.name)
    if tensor.shape[-1] % block_size(kind):
        told = f"rows of {tensor.shape[-1]} do not fill the blocks of {block_size(kind)} of its allocated type {kind}"
        raise CheckpointError(told, where=tensor.name)
    return kind


def _write_header(path: Path, metadata: Metadata, tensors: list[OutTensor]) -> None:
    """A file with our metadata and F32 tensors of two rows, their data a hole; of the vocabulary only the size is told.

    llama.cpp looks at names, columns and the number of axes longer than one. It maps the file: with all rows, a large
    model would not fit an address space that is limited.
    """
    arch = metadata["general.architecture"].value
    kept = {
        key: value
        for key, value in metadata.items()
        if key == "general.architecture" or not (key.startswith(("general.", "tokenizer.")) and _is_long(value.type))
    }
    if f"{arch}.vocab_size" not in kept:
        rows = [t.shape[0] for t in tensors if t.name == "token_embd.weight"]
        kept[f"{arch}.vocab_size"] = u32(rows[0] if rows else 1)
    shapes = {t.name: (*(min(n, 2) for n in t.shape[:-1]), t.shape[-1]) for t in tensors}
    stored = [StoredTensor(name, shape, TYPE_IDS["F32"], 4 * prod(shape)) for name, shape in shapes.items()]
    layout = lay_out(kept, stored)
    with writing(path), path.open("wb") as file:
        file.write(layout.head)
        file.truncate(layout.nbytes)


def _is_long(kind: GGUFValueType) -> bool:
    return kind in (GGUFValueType.ARRAY, GGUFValueType.STRING)


def _check_patterns(overrides: tuple[tuple[str, str], ...], tensors: list[OutTensor]) -> None:
    """An override that no weight takes is a wish that would be dropped silently."""
    weights = [t.name for t in tensors if len(t.shape) > 1 and not t.keep_f32]
    for pattern, _ in overrides:
        try:
            expression = re.compile(pattern)
        except re.error as error:
            raise UsageError(f"'{pattern}' is not a regular expression: {error}") from None
        if not any(expression.search(name) for name in weights):
            hint = did_you_mean(pattern, weights) or f"names look like {', '.join(repr(n) for n in weights[1:4])}"
            raise UsageError(f"'{pattern}' matches no weight of this model", hint=hint)


def _check_rows(tensor: str, kind: str | None, tensors: list[OutTensor]) -> None:
    """An explicit type for the ends of the model gets no fallback: llama.cpp would abort."""
    for columns in [t.shape[-1] for t in tensors if t.name == tensor and kind is not None]:
        if columns % block_size(str(kind)):
            raise UsageError(f"{tensor}: rows of {columns}, {kind} needs a multiple of {block_size(str(kind))}")


def _fallbacks(
    name: str,
    tensors: list[OutTensor],
    types: Mapping[str, str],
    told: Mapping[str, tuple[str, str]],
    given: list[str],
) -> tuple[Fallback, ...]:
    """What llama.cpp tells, and what it does without telling: output matrices whose rows do not fit become Q8_0.

    `given` are patterns of tensors whose type the user chose.
    """
    found = []
    silent = "Q5_K" if name in _LOW_BIT_OUTPUT else "Q6_K"
    for tensor in tensors:
        columns, got = tensor.shape[-1], types[tensor.name]
        if tensor.name in told and not tensor.keep_f32:
            found.append(Fallback(tensor.name, told[tensor.name][0], got, columns))
        elif (
            tensor.name in _ENDS
            and got == "Q8_0"
            and name not in {*_PLAIN, "Q8_0", "MXFP4_MOE"}
            and columns % 256
            and not any(re.search(pattern, tensor.name) for pattern in given)
        ):
            found.append(Fallback(tensor.name, silent, got, columns))
    return tuple(found)


def check_imatrix(choice: TypeChoice, tensors: Sequence[OutTensor]) -> None:
    """Refuse very low bits without an importance matrix (garbage, says llama.cpp), and a matrix of another model.

    Of its own accord llama.cpp gives such a type to neither end of the model; an allocation may.
    """
    spared = frozenset[str]() if choice.type == MIXED else _ENDS
    for tensor in tensors:
        kind = choice.types[tensor.name]
        needs = kind in NEED_IMATRIX or (kind == "Q2_K" and choice.type == "Q2_K_S")
        if choice.imatrix is None:
            if needs and tensor.name not in spared:
                raise UsageError(
                    f"{choice.type} needs an importance matrix: {tensor.name} becomes {kind}",
                    hint="give one with --imatrix FILE, or have it computed with --imatrix auto",
                )
            continue
        if kind in _PLAIN:
            continue
        weights = choice.imatrix.get(tensor.name)
        if weights is None:
            if needs and tensor.name not in spared:
                raise UsageError(f"the importance matrix has nothing for {tensor.name}, which becomes {kind}")
            continue
        expected = tensor.shape[-1] * (tensor.shape[0] if len(tensor.shape) == 3 else 1)
        if weights.size != expected and tensor.name not in spared:
            raise UsageError(
                f"the importance matrix has {weights.size} columns for {tensor.name}, which has {expected}",
                hint="it was computed from another model",
            )
