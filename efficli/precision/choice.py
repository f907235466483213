"""Which types a tensor may have, and the choice among them within a budget of bytes: no weights, no measurements."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from efficli.errors import FitError, UnsupportedError, UsageError
from efficli.ops.allocate import Choice, Item, allocate, harmonize, saturating_cost, smallest_cost
from efficli.ops.byte_size import binary_bytes
from efficli.ops.ggml import block_size
from efficli.ops.ggml_types import NEED_IMATRIX
from efficli.precision.curves import nbytes
from efficli.precision.view import FileTensor, FileView

RMSE: Mapping[str, float] = {
    "IQ1_S": 0.486, "IQ1_M": 0.452, "IQ2_XXS": 0.344, "IQ2_XS": 0.300, "IQ2_S": 0.249, "Q2_K": 0.268, "IQ3_XXS": 0.182,
    "Q3_K": 0.145, "IQ3_S": 0.137, "MXFP4": 0.114, "IQ4_XS": 0.0757, "Q4_0": 0.0817, "Q4_K": 0.0709, "IQ4_NL": 0.0750,
    "Q4_1": 0.0720, "Q5_0": 0.0400, "Q5_K": 0.0354, "Q5_1": 0.0350, "Q6_K": 0.0174, "Q8_0": 0.0054, "BF16": 0.0017,
    "F16": 0.0002, "F32": 1e-6,
}  # fmt: skip
"""Relative root mean square error of ggml's types on Gaussian weights, measured: what is planned with."""
UNASKED = ("IQ1_S", "IQ1_M", "IQ2_XS")
"""Left out unless they are asked for: types of one bit ruin most models, and their tables take 12 s to build; IQ2_XS
takes five times as long to encode as its neighbours, and lies between them."""
LARGEST = "F16"
"""What a budget that has room for everything buys."""
FULL = 0.995
"""Share of the budget below which it is said why the file is not larger."""
GROUPS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "qkv": (("attn_q", "attn_k", "attn_v"),),
    "gate-up": (("ffn_gate", "ffn_up"), ("expert_gate", "expert_up"), ("expert_gate_up",)),
}

Types = dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """The types of each tensor with their bytes in the file, cheapest first."""

    nbytes: Mapping[str, Mapping[str, int]]
    notes: tuple[str, ...]
    copies: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Bytes that a target's runtime copies, where it copies any: they count like those of the file."""

    def cost(self, name: str, kind: str) -> int:
        """Bytes of a type of a tensor, copies among them."""
        return self.nbytes[name][kind] + self.copies.get(name, {}).get(kind, 0)

    @property
    def costs(self) -> dict[str, dict[str, int]]:
        """Bytes of each type of each tensor, copies among them."""
        return {name: {kind: self.cost(name, kind) for kind in sizes} for name, sizes in self.nbytes.items()}

    def copied(self, types: Mapping[str, str]) -> int:
        """Bytes that are copied of a file of these types."""
        return sum(self.copies.get(name, {}).get(kind, 0) for name, kind in types.items())

    @property
    def kinds(self) -> dict[str, tuple[str, ...]]:
        """The types alone."""
        return {name: tuple(sizes) for name, sizes in self.nbytes.items()}


class Limit(Protocol):
    """Bytes that a file and the copies of its weights may have, which can depend on its types."""

    def __call__(self, types: Mapping[str, str]) -> int:
        """For a file of these types."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Types for all tensors, and how they were chosen."""

    types: Types
    losses: Mapping[str, float]
    """Predicted, of each tensor."""
    nbytes: int
    """Of the whole file."""
    limit: int
    """Bytes that it may have."""
    tensor_budget: int
    """Bytes of the tensors whose types were chosen, and of their copies."""
    gap: float
    """Proven relative distance from the least loss within the budget."""
    model: str
    """The loss model."""
    report: tuple[str, ...] = ()

    @property
    def loss(self) -> float:
        """Predicted, of all tensors together."""
        return math.fsum(self.losses.values())


def choices(
    view: FileView,
    wanted: Sequence[str],
    *,
    weighed: Collection[str],
    lacking: Collection[str],
    slow: Collection[str],
    holder: str | None = None,
) -> Choices:
    """The types that tensors can have: rows fill their blocks, the target's runtime loads them and is fast with them.

    `wanted`: () for all that llama.cpp encodes well. `weighed`: tensors that an importance matrix has something for;
    the others get none of the types that need one. `holder`: the target whose memory is the budget; what its runtime
    copies counts twice. UsageError: a wanted type that a target lacks, or that no tensor can have. UnsupportedError: no
    tensor's type can be chosen.
    """
    refused = [kind for kind in wanted if kind in lacking]
    if refused:
        raise UsageError(f"types: {', '.join(refused)}: the target's runtime cannot load them", hint="leave them out")
    offered = [kind for kind in (wanted or RMSE) if kind not in lacking and kind != "F32"]
    offered = [kind for kind in offered if wanted or kind not in {*slow, *UNASKED}]
    unused = [k for k in wanted if not any(t.columns % block_size(k) == 0 for t in view.tensors)]
    if unused:
        columns = view.tensors[0].columns
        raise UsageError(
            f"types: no tensor can be {unused[0]}: rows of {columns} do not fill its blocks of {block_size(unused[0])}"
        )
    copies = view.copies(holder, [*offered, "F16"]) if holder else {}
    found = {}
    for tensor in view.tensors:
        own = [kind for kind in offered if tensor.name in weighed or kind not in NEED_IMATRIX]
        sizes = {kind: nbytes(tensor, kind) for kind in own if tensor.columns % block_size(kind) == 0}
        sizes = sizes or {"F16": nbytes(tensor, "F16")}
        if not wanted:
            sizes = _without_dominated(sizes, copies.get(tensor.name, {}))
        found[tensor.name] = dict(sorted(sizes.items(), key=lambda item: (item[1], item[0])))
    if not found:
        raise UnsupportedError("the file has no matrix whose type can be chosen")
    fallen = [t.name for t in view.tensors if wanted and list(found[t.name]) == ["F16"] and "F16" not in wanted]
    notes = [f"{name}: none of the types is for it, it stays F16" for name in fallen]
    if slow and not wanted:
        notes.append(f"left out, as the target computes them more slowly than it reads them: {', '.join(sorted(slow))}")
    return Choices(nbytes=found, notes=tuple(notes), copies=copies)


def _without_dominated(sizes: Mapping[str, int], copies: Mapping[str, int]) -> dict[str, int]:
    """Without types that take no fewer bytes than another one of smaller typical error."""
    costs = {kind: size + copies.get(kind, 0) for kind, size in sizes.items()}
    kept = {}
    for kind, size in sizes.items():
        better = (k for k in sizes if costs[k] <= costs[kind] and RMSE[k] < RMSE[kind])
        if next(better, None) is None:
            kept[kind] = size
    return kept


def typical(view: FileView, found: Choices) -> dict[str, dict[str, float]]:
    """Losses by size alone, for planning: the mean square error of Gaussian weights of the same spread everywhere."""
    weights = {tensor.name: tensor.num_weights or tensor.rows * tensor.columns for tensor in view.tensors}
    return {name: {k: weights[name] * RMSE[k] ** 2 for k in sizes} for name, sizes in found.nbytes.items()}


def groups(tensors: Sequence[FileTensor], words: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Names of tensors that share a type, by the name of their group; UsageError where a word ties nothing."""
    found: dict[str, tuple[str, ...]] = {}
    for word in words:
        tied = 0
        for roles in GROUPS[word]:
            for layer in sorted({t.layer for t in tensors if t.layer is not None}):
                members = tuple(t.name for t in tensors if t.layer == layer and t.group in roles)
                if len(members) > 1:
                    found[f"{word}.{layer}"] = members
                    tied += 1
        if not tied:
            hint = "they are one tensor in this model, or are not there"
            raise UsageError(f"harmonize: {word} ties no two tensors of this model", hint=hint)
    return found


def decide(
    view: FileView,
    found: Choices,
    limit: Limit,
    losses: Mapping[str, Mapping[str, float]],
    model: str,
    tied: Mapping[str, Sequence[str]],
) -> Decision:
    """The allocation of least loss within the limit. FitError below the smallest file, whose size is named."""
    items = [
        Item(name, tuple(Choice(kind, cost, max(0.0, losses[name][kind])) for kind, cost in costs.items()))
        for name, costs in found.costs.items()
    ]
    together = harmonize(items, tied)
    smallest = {item.name: min(item.choices, key=lambda c: (c.cost, c.name)).name for item in together.items}
    least = {name: smallest[item] for item, members in together.members.items() for name in members}
    fixed = view.nbytes(least) + found.copied(least) - smallest_cost(together.items)
    types, budget, most = least, 0, 0
    spare = 0
    for _ in range(8):
        most = limit(types)
        budget = most - fixed - spare
        if budget < smallest_cost(together.items):
            raise _too_small(most, view.nbytes(least), found.copied(least))
        solution = together.expand(allocate(together.items, budget))
        types = dict(solution.picks)
        over = view.nbytes(types) + found.copied(types) - limit(types)
        if over <= 0:
            break
        spare += over
    else:
        raise FitError("no types were found whose file is within what fits beside them", hint="a fixed --max-bytes")
    nbytes, most = view.nbytes(types), limit(types)
    decision = Decision(
        types=types,
        losses={name: losses[name][kind] for name, kind in types.items()},
        nbytes=nbytes,
        limit=most - found.copied(types),
        tensor_budget=most - fixed,
        gap=solution.gap,
        model=model,
    )
    return replace(decision, report=_rows(decision, saturating_cost(together.items) <= budget, found))


def _too_small(limit: int, smallest: int, copied: int) -> FitError:
    copies = f" and copies of {binary_bytes(copied)} in memory" if copied else ""
    return FitError(
        f"the smallest possible file has {binary_bytes(smallest)} ({smallest} bytes){copies}, above the budget of "
        f"{binary_bytes(limit)} ({limit} bytes)",
        hint="a larger budget, a smaller model, or fewer layers (efficli methods)",
    )


def _rows(decision: Decision, saturated: bool, found: Choices) -> tuple[str, ...]:
    """What a reader should know of the choice."""
    rows = list(found.notes)
    used = decision.nbytes / decision.limit
    if saturated and used < FULL:
        best = sorted(set(decision.types.values()))
        rows.append(
            f"the budget of {binary_bytes(decision.limit)} is above {binary_bytes(decision.nbytes)}, the size with the "
            f"best types that are allowed ({', '.join(best)}), which is what is written"
        )
    elif used < FULL:
        rows.append(f"the types allow no file between {used:.2%} of the budget and all of it that would lose less")
    rows.append(
        f"predicted loss {decision.loss:.4g} ({decision.model}), proven within {decision.gap:.3%} of the least possible"
    )
    return tuple(rows)
