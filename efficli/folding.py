"""Scales that one matrix can be multiplied with and the tensors before it divided by: the network computes the same.

    y = W x,  x = P z   ->   y = (W diag(s)) (diag(1/s) P z)

P is the weight (and bias) of a norm, or rows of a matrix with nothing but a product or a weighted mean between: the
value matrix (attention averages values), the up matrix of a gated feed-forward. Where a channel of P is read by several
query heads or by several matrices, they share its scale. What cannot be folded has a reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from efficli.checkpoint import Checkpoint
from efficli.checkpoint.reader import FLOATS, to_float32
from efficli.checkpoint.writer import NewTensor, as_stored, copied
from efficli.errors import CheckpointError
from efficli.families import ModelShape, check_tensors, read_shape
from efficli.families.tensors import TensorSpec
from efficli.progress import Silent
from efficli.surgery import matrices

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Divided:
    """Outputs [start, stop) of a tensor, which are divided: rows of a matrix (out, in), values of a norm or a bias."""

    tensor: str
    start: int
    stop: int
    index: int | None = None
    """Which matrix of a stack."""
    offset: float = 0.0
    """What is added to a norm's weight before it multiplies (Gemma: 1)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Multiplied:
    """A matrix (out, in) whose columns are multiplied."""

    tensor: str
    index: int | None = None
    """Which matrix of a stack; None: all of them."""
    role: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """One set of scales: what is divided by it and what is multiplied with it."""

    name: str
    """For a reader: `layer 3: attn_norm -> attn_q, attn_k, attn_v`."""
    kind: str
    """The same without the layer and the number of the expert."""
    width: int
    """How many scales."""
    divided: tuple[Divided, ...]
    multiplied: tuple[Multiplied, ...]
    run: int = 0
    """Columns are runs of so many (a head's); 0: each column has a scale of its own."""
    repeats: int = 1
    """How many runs in a row share their scales (query heads of a key/value head)."""

    @property
    def tensors(self) -> list[str]:
        """Names of all tensors that change."""
        return list(dict.fromkeys([one.tensor for one in self.divided] + [one.tensor for one in self.multiplied]))

    @property
    def num_columns(self) -> int:
        """Of the multiplied matrices."""
        return self.width * self.repeats

    def columns(self, scales: NDArray[Any]) -> NDArray[Any]:
        """The scale of each column of the multiplied matrices."""
        if self.repeats == 1:
            return scales
        return np.repeat(scales.reshape(-1, 1, self.run), self.repeats, axis=1).reshape(-1)

    def pooled(self, columns: Float64) -> Float64:
        """Mean over the columns that share a scale."""
        if self.repeats == 1:
            return columns
        mean: Float64 = columns.reshape(-1, self.repeats, self.run).mean(1).reshape(-1)
        return mean


def find_folds(ckpt: Checkpoint) -> tuple[list[Fold], list[str]]:
    """Every fold of a checkpoint's blocks in the order of the network, and why the other matrices have none.

    UnsupportedError: no known family. CheckpointError: tensors and config.json contradict each other.
    """
    shape = read_shape(ckpt.config)
    specs = check_tensors(ckpt.tensors, shape, strict=False, progress=Silent())
    folds: list[Fold] = []
    for layer in range(shape.num_layers):
        own = [(name, spec) for name, spec in specs.items() if spec.layer == layer]
        folds += _Layer(shape, own, layer).folds()
    return folds, _reasons(shape)


def folded(ckpt: Checkpoint, folds: Sequence[Fold], scales: Sequence[Float64]) -> list[NewTensor]:
    """Every tensor of the checkpoint after these folds; what one touches becomes F32, even where its scales are 1.

    Without `scales` the tensors have no values, and can be written as headers only. CheckpointError: a tensor is of a
    dtype that is no number, or (when it is written) not finite.
    """
    known = matrices(ckpt)
    by_tensor: dict[str, list[tuple[Fold, Float64]]] = {}
    for number, fold in enumerate(folds):
        for name in fold.tensors:
            by_tensor.setdefault(name, []).extend([(fold, scales[number])] if scales else [])
    tensors = []
    for tensor in ckpt.tensors.values():
        if tensor.name not in by_tensor:
            tensors.append(copied(tensor))
            continue
        if tensor.dtype not in FLOATS:
            raise CheckpointError(f"dtype {tensor.dtype}, expected F32, BF16, F16 or F64", where=tensor.name)
        transposed = tensor.name in known and known[tensor.name].transposed
        content = partial(_values, ckpt, tensor.name, transposed, by_tensor[tensor.name])
        tensors.append(
            NewTensor(name=tensor.name, dtype="F32", shape=tensor.shape, source=tensor.name, content=content)
        )
    return tensors


def _values(
    ckpt: Checkpoint, name: str, transposed: bool, folds: Sequence[tuple[Fold, Float64]]
) -> Iterator[NDArray[Any]]:
    """The values of a tensor after its folds, as it is stored; of a stack one matrix after the other."""
    tensor = ckpt.tensors[name]
    stack = len(tensor.shape) == 3
    for index in range(tensor.shape[0] if stack else 1):
        values = to_float32(ckpt.read_rows(name, index, index + 1)[0], tensor.dtype) if stack else ckpt.read(name)
        if not np.isfinite(values).all():
            raise CheckpointError("holds NaN or infinite values", where=name)
        yield as_stored(fold_values(values, name, index, transposed, folds), "F32", name)


def fold_values(
    values: Float32, name: str, index: int, transposed: bool, folds: Sequence[tuple[Fold, Float64]]
) -> Float32:
    """A copy of the values of tensor `name` (of a stack, matrix `index`) with these folds and their scales."""
    new = values.astype(np.float64)
    rows = new.T if transposed else new
    for fold, scales in folds:
        for one in fold.divided:
            if one.tensor == name and one.index in (None, index):
                by = scales if new.ndim == 1 else scales[:, None]
                part = slice(one.start, one.stop)
                rows[part] = (rows[part] + one.offset) / by - one.offset
        for other in fold.multiplied:
            if other.tensor == name and other.index in (None, index):
                rows *= fold.columns(scales)
    return new.astype(np.float32)


class _Layer:
    """The folds of one layer."""

    def __init__(self, shape: ModelShape, own: Sequence[tuple[str, TensorSpec]], layer: int) -> None:
        self._shape, self._layer = shape, layer
        self._matrices: dict[str, list[tuple[str, TensorSpec]]] = {}
        self._vectors: dict[str, list[tuple[str, TensorSpec]]] = {}
        for name, spec in own:
            kind = self._matrices if len(spec.shape) > 1 else self._vectors
            kind.setdefault(spec.role, []).append((name, spec))

    def folds(self) -> Iterator[Fold]:
        """All of them, in the order of the network."""
        facts = self._shape.facts
        if "attn_norm" in self._vectors:
            yield self._after_norm("attn_norm", ("attn_q", "attn_k", "attn_v", "attn_qkv"))
        if facts.sub_norms:
            yield self._after_norm("attn_sub_norm", ("attn_out",))
        else:
            yield self._values()
        if "ffn_norm" in self._vectors:
            readers = ("ffn_gate", "ffn_up", "ffn_gate_up", "router", "expert_gate", "expert_up", "expert_gate_up")
            yield self._after_norm("ffn_norm", readers)
        if facts.sub_norms:
            yield self._after_norm("ffn_sub_norm", ("ffn_down",))
        elif facts.experts:
            yield from self._experts()
        elif facts.gated:
            yield self._up()

    def _fold(
        self,
        before: str,
        after: Sequence[Multiplied],
        divided: Sequence[Divided],
        expert: int | None = None,
        run: int = 0,
        repeats: int = 1,
    ) -> Fold:
        kind = f"{before} -> {', '.join(dict.fromkeys(one.role for one in after))}"
        place = f"layer {self._layer}" if expert is None else f"layer {self._layer}, expert {expert}"
        return Fold(
            name=f"{place}: {kind}",
            kind=kind,
            width=divided[0].stop - divided[0].start,
            divided=tuple(divided),
            multiplied=tuple(after),
            run=run,
            repeats=repeats,
        )

    def _after_norm(self, norm: str, readers: Sequence[str]) -> Fold:
        """A norm's weight, and bias, and all matrices that read it."""
        offset = self._shape.facts.norm_offset
        divided = [
            Divided(tensor=name, start=0, stop=spec.shape[0], offset=0.0 if _is_bias(name) else offset)
            for name, spec in self._vectors[norm]
        ]
        after = [Multiplied(tensor=name, role=role) for role in readers for name, _ in self._matrices.get(role, ())]
        return self._fold(norm, after, divided)

    def _rows(self, role: str, start: int, stop: int) -> list[Divided]:
        """Rows of the matrix of a role, and of its bias."""
        found = [*self._matrices[role], *self._vectors.get(role, ())]
        return [Divided(tensor=name, start=start, stop=stop) for name, _ in found]

    def _values(self) -> Fold:
        """Rows of the value matrix; attention takes means of them, for each query head of the group."""
        shape = self._shape
        keys, queries = shape.num_kv_heads * shape.head_dim, shape.num_heads * shape.head_dim
        if "attn_qkv" in self._matrices:
            divided = self._rows("attn_qkv", queries + keys, queries + 2 * keys)
        else:
            divided = self._rows("attn_v", 0, keys)
        after = [Multiplied(tensor=name, role="attn_out") for name, _ in self._matrices["attn_out"]]
        return self._fold("attn_v", after, divided, run=shape.head_dim, repeats=shape.num_heads // shape.num_kv_heads)

    def _up(self) -> Fold:
        """Rows of the up matrix, which its product with the activation leaves as factors."""
        width = self._shape.intermediate_size
        fused = "ffn_gate_up" in self._matrices
        divided = self._rows("ffn_gate_up", width, 2 * width) if fused else self._rows("ffn_up", 0, width)
        after = [Multiplied(tensor=name, role="ffn_down") for name, _ in self._matrices["ffn_down"]]
        return self._fold("ffn_up", after, divided)

    def _experts(self) -> Iterator[Fold]:
        """Each expert's up matrix and down matrix."""
        width, count = self._shape.intermediate_size, self._shape.num_experts
        downs = self._matrices["expert_down"]
        stacked = "expert_gate_up" in self._matrices
        ups = self._matrices["expert_gate_up" if stacked else "expert_up"]
        for expert in range(count):
            index = expert if stacked else None
            place = 0 if stacked else expert
            start = width if stacked else 0
            up = Divided(tensor=ups[place][0], start=start, stop=start + width, index=index)
            down = Multiplied(tensor=downs[place][0], index=index, role="expert_down")
            yield self._fold("expert_up", [down], [up], expert=expert)


def _is_bias(name: str) -> bool:
    return name.endswith((".bias", ".beta"))


def _reasons(shape: ModelShape) -> list[str]:
    """A row for each kind of matrix in the blocks that keeps its columns."""
    facts, rows = shape.facts, list[str]()
    if facts.norm_place == "after":
        rows.append(
            "attn_q, attn_k, attn_v, ffn_up: not folded, the norm before them is added to the residual stream too"
        )
    if facts.norm_place == "output":
        rows.append(
            "attn_q, attn_k, attn_v, ffn_gate, ffn_up: not folded, they read the residual stream without a norm"
        )
    if not facts.gated:
        rows.append(f"ffn_down: not folded, the activation before it ({shape.activation}) is not linear")
    return rows
