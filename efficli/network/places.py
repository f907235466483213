"""Find in a network of transformers what each matrix of a checkpoint is: its parameter, and the module that uses it.

Names of a checkpoint have one of the family's prefixes, names of the network another; both end in the family's own.
transformers 5 keeps experts in two stacks of parameters, (experts, gate rows then up rows, in) and (experts, out, in),
transformers 4 each expert in a module; a checkpoint may hold them either way.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from efficli.families.table import Family
from efficli.surgery import Matrix

Kind = Literal["rows", "experts", "experts_down"]
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")
_STACK = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")
_LOOKED_UP = "its rows are looked up, nothing is multiplied with it"


@dataclass(frozen=True, slots=True)
class Site:
    """Where inputs of matrices can be seen: a module, and what its call tells.

    "rows": its first argument, (..., columns). "experts": its first argument, sent to the experts that the second one
    names, (tokens, slots). "experts_down": what these experts make of it before the down projection.
    """

    name: str
    module: Any
    kind: Kind
    columns: int
    count: int = 1
    """Matrices side by side: the number of experts, or 1."""


@dataclass(frozen=True, slots=True)
class Place:
    """A matrix in the network."""

    views: tuple[Any, ...]
    """The weights that it computes with, each (out, in) and writable: one for each matrix of a stack."""
    site: Site | None = None
    """Where its input is seen; None: nowhere."""
    index: int | None = None
    """Which of the site's experts; None: all of them."""
    reason: str = ""
    """Why no input is seen."""


def find_places(model: Any, found: Mapping[str, Matrix], family: Family) -> dict[str, Place]:
    """The place of every matrix; one that is nowhere has no views, and the reason.

    `model`: a model of transformers; `found`: the matrices of the checkpoint that it was loaded from.
    """
    finder = _Finder(model, family)
    return {name: finder.place(matrix) for name, matrix in found.items()}


class _Finder:
    """The parameters of a network by name."""

    def __init__(self, model: Any, family: Family) -> None:
        self._model, self._family = model, family
        table = model.get_input_embeddings()
        self._table = table
        self._head = model.get_output_embeddings() if family.causal else None
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._sites: dict[str, Site] = {}
        # a tower of another kind may hold layers of the same names: the table of tokens tells where the text's are
        stem = next(weight.name for weight in family.weights if weight.role == "embedding")
        names = [name for name, parameter in model.named_parameters() if parameter is table.weight]
        self._prefix = names[0].removesuffix(stem)

    def place(self, matrix: Matrix) -> Place:
        """Where a matrix is."""
        place = self._unchecked(matrix)
        shape = (matrix.rows, matrix.columns)
        if place.views and (len(place.views) != matrix.count or any(tuple(v.shape) != shape for v in place.views)):
            sizes = "×".join(map(str, place.views[0].shape))
            return Place((), reason=f"the network holds {len(place.views)} of {sizes} under its name")
        return place

    def _unchecked(self, matrix: Matrix) -> Place:
        """As `place`, whatever the shape is."""
        if matrix.role == "embedding":
            view = (self._table.weight,)
            if self._head is not None and self._head.weight is self._table.weight:
                return Place(view, self._site(f"{matrix.name} as head", self._head, matrix.columns))
            return Place(view, reason=_LOOKED_UP)
        if matrix.role == "output":
            if self._head is None:
                return Place((), reason="the network has no head")
            return Place((self._head.weight,), self._site("head", self._head, matrix.columns))
        name = self._prefix + self._stem(matrix.name)
        expert, stack = _EXPERT.fullmatch(name), _STACK.fullmatch(name)
        if expert:
            return self._expert(expert[1], int(expert[2]), expert[3], matrix)
        if stack and stack[1] in self._modules:
            return self._stack(stack[1], stack[2], matrix)
        return self._module(name, matrix)

    def _stem(self, name: str) -> str:
        """A name of the checkpoint without the prefix that it has there."""
        prefixes = sorted(self._family.prefixes, key=len, reverse=True)
        return name.removeprefix(next(prefix for prefix in prefixes if name.startswith(prefix)))

    def _site(self, name: str, module: Any, columns: int, kind: Kind = "rows", count: int = 1) -> Site:
        return self._sites.setdefault(name, Site(name, module, kind, columns, count))

    def _module(self, name: str, matrix: Matrix) -> Place:
        """A matrix that is the weight of its own module."""
        owner = name.removesuffix(".weight")
        module = self._modules.get(owner)
        weight = getattr(module, "weight", None)
        if weight is None:
            return Place((), reason="the network has no parameter of its name")
        kind = type(module).__name__
        if kind == "Embedding":
            return Place((weight,), reason=_LOOKED_UP)
        view = weight.T if matrix.transposed else weight
        if (kind == "Conv1D") != matrix.transposed or (kind not in ("Linear", "Conv1D") and matrix.role != "router"):
            return Place((view,), reason=f"what its module computes is not known: {kind}")
        return Place((view,), self._site(owner, module, matrix.columns))

    def _stack(self, owner: str, part: str, matrix: Matrix) -> Place:
        """A stack of experts in a network that holds it as such."""
        stack = getattr(self._modules[owner], part, None)
        if stack is None:
            return Place((), reason="the network holds its experts one by one")
        kind: Kind = "experts_down" if part == "down_proj" else "experts"
        return Place(
            tuple(stack), self._site(f"{owner} {kind}", self._modules[owner], matrix.columns, kind, len(stack))
        )

    def _expert(self, owner: str, index: int, part: str, matrix: Matrix) -> Place:
        """One expert's matrix: in its own module, or one of a stack."""
        alone = f"{owner}.{index}"
        if alone in self._modules:
            expert = self._modules[alone]
            # gate and up see what the expert's module is given
            down = part == "down_proj"
            site = self._site(f"{alone} down" if down else alone, expert.down_proj if down else expert, matrix.columns)
            return Place((getattr(expert, part).weight,), site)
        module = self._modules.get(owner)
        stack = getattr(module, "down_proj" if part == "down_proj" else "gate_up_proj", None)
        if stack is None or index >= len(stack):
            return Place((), reason="the network has no such expert")
        view = stack[index]
        if part != "down_proj":
            view = view[: matrix.rows] if part == "gate_proj" else view[matrix.rows :]
        kind: Kind = "experts_down" if part == "down_proj" else "experts"
        site = self._site(f"{owner} {kind}", module, matrix.columns, kind, len(stack))
        return Place((view,), site, index)
