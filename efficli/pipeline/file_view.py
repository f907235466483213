"""A checkpoint as the GGUF file that it becomes, for methods that choose the types of its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from gguf import Keys
from numpy.typing import NDArray

from efficli import __version__
from efficli.checkpoint import Checkpoint
from efficli.errors import EffiError, FitError, UsageError
from efficli.export.gguf.imatrix import Imatrix, Sums, read_imatrix, write_imatrix
from efficli.export.gguf.job import Described, GgufJob, PlannedFile, Sizer, describe
from efficli.export.gguf.layout import OutTensor
from efficli.export.gguf.types import TypeChoice, TypeRequest, choose_each
from efficli.ops.byte_size import binary_bytes
from efficli.ops.ggml import block_size
from efficli.pipeline.fits import fit_of
from efficli.planning.fit import copied_bytes
from efficli.precision.curves import nbytes
from efficli.precision.view import FileTensor, Part
from efficli.surgery import Matrix, matrices
from efficli.target import load_target

_PACKABLE = ("copy", "permute", "stack", "transpose")
"""Transforms through which exact codes of the sources go into the file."""
_NO_HASH = "0" * 64
"""In the place of the recipe's hash, which has as many digits and is not known yet."""
_NAME_BYTES = 384
"""Left free for the name of the folder that the checkpoint will lie in: a file has it up to four times."""


class GgufView:
    """What `precision.view.FileView` asks of a format, for GGUF."""

    def __init__(self, ckpt: Checkpoint, *, pre_tokenizer: str | None = None) -> None:
        self._ckpt, self._pre_tokenizer = ckpt, pre_tokenizer

    @cached_property
    def tensors(self) -> tuple[FileTensor, ...]:
        """Those whose types can be chosen."""
        found = matrices(self._ckpt)
        return tuple(
            _file_tensor(tensor, found)
            for tensor in self._described.tensors
            if len(tensor.shape) > 1 and not tensor.keep_f32
        )

    @property
    def multiplied(self) -> frozenset[str]:
        """Names of those that something is multiplied with: of the others the rows are looked up."""
        tied = self._described.shape.facts.causal and all(tensor.group != "output" for tensor in self.tensors)
        return frozenset(tensor.name for tensor in self.tensors if tied or tensor.group != "embedding")

    @property
    def num_weights(self) -> int:
        """Of the whole file."""
        return sum(tensor.num_elements for tensor in self._described.tensors)

    @property
    def bos(self) -> int | None:
        """The token that llama.cpp puts before a text, if it does."""
        fields = self._described.metadata
        added, token = fields.get(Keys.Tokenizer.ADD_BOS), fields.get(Keys.Tokenizer.BOS_ID)
        return int(token.value) if token is not None and added is not None and added.value else None

    @cached_property
    def native(self) -> str:
        """The type that holds the checkpoint's own values."""
        dtypes = {self._ckpt.tensors[part.name].dtype for tensor in self.tensors for part in tensor.parts}
        return dtypes.pop() if dtypes in ({"BF16"}, {"F16"}) else "F32"

    def nbytes(self, types: Mapping[str, str]) -> int:
        """Bytes of the whole file, under a name of up to about 64 letters."""
        return self._sizer.nbytes(self._choice(types))

    def data_nbytes(self, types: Mapping[str, str]) -> int:
        """Bytes of its tensors alone."""
        return self._choice(types).nbytes(self._described.tensors)

    def presets(self, names: Sequence[str]) -> dict[str, dict[str, str]]:
        """What llama.cpp's file types choose; those that it refuses are left out."""
        requests = [TypeRequest(type=name, imatrix_follows=True) for name in names]
        answers = choose_each(self._described.metadata, list(self._described.tensors), requests)
        free = {tensor.name for tensor in self.tensors}
        return {
            name: {tensor: kind for tensor, kind in answer.types.items() if tensor in free}
            for name, answer in zip(names, answers, strict=True)
            if not isinstance(answer, EffiError)
        }

    def most_bytes(self, target: str, ctx: int | None, types: Mapping[str, str]) -> int:
        """Bytes that a file of about these types, with what is copied of it, may take on a target."""
        choice = self._choice(types)
        file = PlannedFile(name="model.gguf", choice=choice, nbytes=self._sizer.nbytes(choice))
        job = GgufJob(
            checkpoint=self._ckpt,
            shape=self._described.shape,
            metadata=self._described.metadata,
            tensors=tuple(self._described.tensors),
            files=(file,),
            report=(),
        )
        found = fit_of(load_target(target), job, ctx)
        if found.limited_by == "runtime":
            raise FitError(f"{found.target}: {found.reasons[0]}", hint="another target")
        beside = found.need_bytes - found.file_bytes - found.repacked_bytes
        room = found.comfortable_bytes - beside
        if room <= 0:
            taken = binary_bytes(beside)
            raise FitError(
                f"a context of {found.ctx} takes {taken} beside the file, of {binary_bytes(found.comfortable_bytes)}",
                where=found.target,
                hint="a shorter context with --ctx-size",
            )
        return room

    def copies(self, target: str, kinds: Sequence[str]) -> dict[str, dict[str, int]]:
        """Bytes that the runtime of a target copies of each tensor of each of these types, where it copies any."""
        profile, reads_only = load_target(target), not self._described.shape.facts.causal
        shapes = {tensor.name: tensor.shape for tensor in self._described.tensors}
        # whether there is an output matrix decides what the table of tokens is for; of one axis nothing is copied
        beside = {"output.weight": ("F32", 0, (1,))} if "output.weight" in shapes else {}
        found: dict[str, dict[str, int]] = {}
        for tensor in self.tensors:
            for kind in (kind for kind in kinds if tensor.columns % block_size(kind) == 0):
                own = {tensor.name: (kind, nbytes(tensor, kind), shapes[tensor.name])}
                if size := copied_bytes(profile, {**beside, **own}, reads_only=reads_only):
                    found.setdefault(tensor.name, {})[kind] = size
        return found

    def lacking(self, target: str) -> frozenset[str]:
        """Types that the runtime of a target cannot load."""
        return frozenset(load_target(target).lacks)

    def slow(self, target: str) -> frozenset[str]:
        """Types that a target computes more slowly than it reads them."""
        profile = load_target(target)
        return frozenset(kind for speed in profile.decode[:1] for floor in speed.floors for kind in floor.types)

    def read_imatrix(self, path: Path) -> Imatrix:
        """mean(x²) by tensor of the file; UsageError if it is of another model."""
        found = read_imatrix(path)
        known = {tensor.name: tensor for tensor in self.tensors}
        if not known.keys() & found.keys():
            raise UsageError(
                f"none of the {len(found)} tensors of the importance matrix is in this model, not {next(iter(found))}",
                where=path.name,
                hint="it was computed from another model",
            )
        for name in known.keys() & found.keys():
            expected = known[name].columns * len(known[name].parts)
            if found[name].size != expected:
                raise UsageError(
                    f"the importance matrix has {found[name].size} columns for {name}, which has {expected}",
                    where=path.name,
                    hint="it was computed from another model",
                )
        return {name: values for name, values in found.items() if name in known}

    def write_imatrix(
        self, path: Path, sums: Mapping[str, tuple[NDArray[np.float64], NDArray[np.int64]]], *, chunks: int, chunk: int
    ) -> None:
        """Write sums and counts as llama-imatrix does."""
        told = {name: Sums(squares.astype(np.float32), counts) for name, (squares, counts) in sums.items()}
        write_imatrix(path, told, dataset="calibration", chunk=chunk, chunks=chunks)

    @cached_property
    def _described(self) -> Described:
        own = {"version": __version__, "source": self._ckpt.name, "recipe": _NO_HASH}
        return describe(self._ckpt, own=own, pre_tokenizer=self._pre_tokenizer)

    @cached_property
    def _sizer(self) -> Sizer:
        return Sizer(self._described.metadata, self._described.tensors, more=_NAME_BYTES)

    def _choice(self, types: Mapping[str, str]) -> TypeChoice:
        whole = {tensor.name: types.get(tensor.name, "F32") for tensor in self._described.tensors}
        return TypeChoice(type="F16", types=whole)  # the number of a file type takes the same bytes, whichever it is


def _file_tensor(tensor: OutTensor, found: Mapping[str, Matrix]) -> FileTensor:
    """How a tensor of the file lies in the checkpoint."""
    rows, columns = tensor.shape[-2:]
    parts: list[Part] = []
    for source in tensor.sources:
        matrix = found.get(source)
        if matrix is None or matrix.columns != columns:
            continue
        start, stop = tensor.span if tensor.transform == "slice" else (0, matrix.rows)
        parts += [Part(name=source, index=index, start=start, stop=stop) for index in range(matrix.count)]
    first = found.get(tensor.sources[0]) if tensor.sources else None
    number = re.match(r"blk\.(\d+)\.", tensor.name)
    return FileTensor(
        name=tensor.name,
        rows=rows,
        columns=columns,
        parts=tuple(parts),
        group="output" if tensor.name == "output.weight" else first.role if first else "other",
        layer=int(number[1]) if number else None,
        packable=tensor.transform in _PACKABLE and sum(part.stop - part.start for part in parts) == _num_rows(tensor),
    )


def _num_rows(tensor: OutTensor) -> int:
    return tensor.num_elements // tensor.shape[-1]
