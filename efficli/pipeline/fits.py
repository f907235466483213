"""What the targets of a recipe will do with its files, before any is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from efficli.errors import FitError
from efficli.export.gguf.graphs import context_length
from efficli.export.gguf.job import GgufJob
from efficli.ops.byte_size import binary_bytes
from efficli.planning.cache import CacheLayer, cache_layers
from efficli.planning.fit import Fit, fit
from efficli.planning.model import num_merges, plain_values
from efficli.progress import Progress
from efficli.recipe import Recipe
from efficli.target import Range, Target, load_target

TARGET_COLUMNS = ("target", "file", "fits", "needs", "usable", "tokens/s")
"""Of a table of what each target does with each file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    """What `fit` needs to know of a model."""

    metadata: Mapping[str, Any]
    vocab_size: int
    num_merges: int
    max_positions: int
    cache: Sequence[CacheLayer]


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    """What `fit` needs to know of a file."""

    name: str
    type: str
    nbytes: int
    tensors: Mapping[str, tuple[str, int, tuple[int, ...]]]


def check_fit(recipe: Recipe, jobs: Sequence[GgufJob], progress: Progress) -> tuple[Mapping[str, Any], ...]:
    """For each target and file of a recipe what `plan` says of them, and `cells` for a table (`TARGET_COLUMNS`).

    The context is the recipe's, and no longer than the model was made for. FitError for a target that can hold none of
    the files.
    """
    rows: list[Mapping[str, Any]] = []
    for name in recipe.target:
        target = load_target(name)
        found = [
            (file, fit(target, model, file, min(recipe.ctx_size, model.max_positions)))
            for job in jobs
            for model in [_model(job)]
            for file in _files(job)
        ]
        longest = max(one.ctx for _, one in found)
        if longest < recipe.ctx_size and "ctx_size" in recipe.model_fields_set:
            progress.note(f"{target.name}: context of {longest} instead of {recipe.ctx_size}, the model's longest")
        if all(one.verdict == "NO" for _, one in found):
            raise _nothing_fits(target, *min(found, key=lambda pair: pair[1].need_bytes))
        for file, one in found:
            if one.verdict != "FIT":
                progress.note(f"{target.name}: {file.name} {_objection(one)}")
        rows += [one.to_json() | {"file": file.name, "cells": _cells(file, one)} for file, one in found]
    return tuple(rows)


def fit_of(target: Target, job: GgufJob, ctx: int | None) -> Fit:
    """What `plan` says of the first file of a job on a target; `ctx`: None for a recipe's usual one."""
    model = _model(job)
    wanted = ctx or int(Recipe.model_fields["ctx_size"].default)
    return fit(target, model, next(_files(job)), min(wanted, model.max_positions))


def _model(job: GgufJob) -> _Model:
    return _Model(
        metadata=plain_values(job.metadata),
        vocab_size=job.shape.vocab_size,
        num_merges=num_merges(job.metadata),
        max_positions=context_length(job.shape),
        cache=cache_layers(job.shape),
    )


def _files(job: GgufJob) -> Iterator[_File]:
    for file in job.files:
        tensors = {t.name: (file.choice.types[t.name], t.nbytes, t.shape) for t in file.choice.stored(job.tensors)}
        yield _File(name=file.name, type=file.type, nbytes=file.nbytes, tensors=tensors)


def _cells(file: _File, one: Fit) -> list[str]:
    verdict = one.verdict if one.verdict == "FIT" else f"{one.verdict}: {one.limited_by}"
    usable, decode = binary_bytes(one.usable_bytes.value), one.decode.text() if one.decode else "not known"
    return [one.target, file.name, verdict, binary_bytes(one.need_bytes), usable, decode]


def _objection(one: Fit) -> str:
    """Why it is tight, or does not fit."""
    why = f" ({one.reasons[0]})" if one.reasons else ""
    words = "is tight" if one.verdict == "TIGHT" else "does not fit"
    need, usable = binary_bytes(one.need_bytes), _usable(one.usable_bytes)
    return f"{words} with a context of {one.ctx}: {one.limited_by}, {need} of {usable}{why}"


def _usable(usable: Range) -> str:
    return f"{binary_bytes(usable.low)} to {binary_bytes(usable.high)}"


def _nothing_fits(target: Target, file: _File, one: Fit) -> FitError:
    """The error of the file that needs least."""
    hint = "a smaller type"
    if one.limited_by in ("runtime", "type"):
        return FitError(f"{file.name} {one.reasons[0]}", where=target.name, hint="another target, or another type")
    if one.largest_ctx:
        hint = f"--set ctx_size={one.largest_ctx}, or {hint}"
    elif one.limited_by == "KV cache":
        hint = f"--set ctx_size= with a shorter context, or {hint}"
    need = binary_bytes(one.need_bytes - one.repacked_bytes)
    return FitError(
        f"{file.name} with a context of {one.ctx} needs {need}, expected at most {binary_bytes(one.usable_bytes.high)};"
        f" limited by the {one.limited_by}",
        where=target.name,
        hint=hint,
    )
