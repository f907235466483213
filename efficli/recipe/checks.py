"""What in a recipe cannot be, though each value by itself could: types, targets, gates, files. Nothing is fetched."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from efficli.checkpoint import hub
from efficli.checkpoint.locate import EMBEDDED, locate
from efficli.errors import CheckpointError, UsageError, did_you_mean
from efficli.ops.ggml_types import NEED_IMATRIX, asked_type, file_type, main_type, tensor_type
from efficli.recipe.model import Export, Recipe
from efficli.strict_yaml import Document, Problem
from efficli.strict_yaml import Path as Keys
from efficli.target import Target, load_target

SCENARIOS = Path(__file__).resolve().parent.parent / "bench" / "scenarios"
"""The scenarios that come with efficli, which `bench` reads."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A problem, and the other keys that it comes from: where one of these is wrong, it may not be one."""

    problem: Problem
    with_keys: tuple[Keys, ...] = ()


def check(recipe: Recipe, document: Document) -> Iterator[Finding]:
    """All of them; `document` is what the recipe was read from."""
    yield from _model(recipe)
    yield from _exports(recipe, document)
    yield from _targets(recipe, document)
    yield from _gates(recipe)
    yield from _bench(recipe, document)
    yield from _files(recipe, document)


def scenario_names() -> tuple[str, ...]:
    """Those that come with efficli: the names of their files."""
    return tuple(sorted(path.stem for path in SCENARIOS.glob("*.yaml")))


def _found(path: Keys, message: str, hint: str | None = None, *, with_keys: tuple[Keys, ...] = ()) -> Finding:
    return Finding(Problem(path, message, hint), with_keys)


def _model(recipe: Recipe) -> Iterator[Finding]:
    """Models that are neither here nor, by their name, on the hub."""
    words: dict[Keys, str | None] = {("model",): recipe.model, ("certificate", "base"): recipe.certificate.base}
    for path, word in words.items():
        if word is None or word in EMBEDDED or _may_be_on_hub(word):
            continue
        try:
            locate(word)
        except CheckpointError as error:
            yield _found(path, error.line, error.hint)
            continue
        if path == ("model",) and recipe.revision is not None:
            yield _found(("revision",), f"revision {recipe.revision!r} of a directory, which has none: {word}")


def _may_be_on_hub(word: str) -> bool:
    """Whether the hub must be asked for this model: it is no directory, and no path by how it is written."""
    match = hub.HUB_ID.fullmatch(word)
    if match is None or os.path.lexists(word):
        return False
    return "/" in match["id"] or hub.cached(match["id"])


def _exports(recipe: Recipe, document: Document) -> Iterator[Finding]:
    """Names of types, and types that are written twice."""
    first: dict[tuple[str, str], Keys] = {}
    for index, export in enumerate(recipe.exports):
        for place, word in enumerate(export.type):
            path: Keys = ("exports", index, "type", place)
            try:
                name = asked_type(word)
            except UsageError as error:
                yield _found(path, error.message, error.hint)
                continue
            if (export.format, name) in first:
                where = document.where(first[export.format, name]).removeprefix(f"{document.name}:")
                where = f"line {where}" if where.isdecimal() else where
                yield _found(path, f"type {name} is there twice (first: {where})")
            first.setdefault((export.format, name), path)
            if name in NEED_IMATRIX and export.imatrix is None and not export.tensor_type:
                yield _found(path, f"{name} needs an importance matrix", "imatrix: auto")
        yield from _tensor_types(export, ("exports", index))


def _tensor_types(export: Export, at: Keys) -> Iterator[Finding]:
    words: list[tuple[Keys, str]] = []
    for key in ("output_tensor_type", "token_embedding_type"):
        if (word := getattr(export, key)) is not None:
            words.append(((*at, key), word))
    for place, wish in enumerate(export.tensor_type):
        path: Keys = (*at, "tensor_type", place)
        pattern, equals, kind = wish.rpartition("=")
        if not (pattern and equals and kind):
            yield _found(path, f"tensor_type: {wish!r}, expected REGEX=TYPE", "attn_v=Q6_K")
            continue
        try:
            re.compile(pattern)
        except re.error as error:
            yield _found(path, f"tensor_type: {pattern!r} is not a regular expression: {error}")
        words.append((path, kind))
    for path, word in words:
        try:
            tensor_type(word)
        except UsageError as error:
            yield _found(path, error.message, error.hint)


def _targets(recipe: Recipe, document: Document) -> Iterator[Finding]:
    """Names of targets, and exports for which a target has no runtime or no kernels."""
    first: dict[str, Keys] = {}
    for index, word in enumerate(recipe.target):
        path: Keys = ("target", index)
        try:
            target = load_target(word)
        except UsageError as error:
            for one in (error, *error.others):
                near = _near(Path(word)) if one.line.startswith("no such target") else None
                yield _found(path, one.line, one.hint or near)
            continue
        if target.name in first:
            yield _found(path, f"target {target.name} is there twice")
            continue
        first[target.name] = path
        for number, export in enumerate(recipe.exports):
            yield from _runs(target, export, ("exports", number), path, document)


def _runs(target: Target, export: Export, at: Keys, chosen: Keys, document: Document) -> Iterator[Finding]:
    if export.format not in target.runs:
        runs = f"runs {' and '.join(target.runs)}, not {export.format}" if target.runs else f"runs no {export.format}"
        path = (*at, "format")
        path = path if document.written(path) in document.lines else chosen  # what is not written is not to blame
        yield _found(path, f"{target.name} {runs}: {target.why_not}", with_keys=(chosen, at))
        return
    for place, word in enumerate(export.type):
        try:
            kind = main_type(file_type(word))
        except UsageError:
            continue
        if kind in target.lacks:
            message = f"{kind} is not for {target.name}: {target.lacks_source}"
            yield _found((*at, "type", place), message, with_keys=(chosen,))


def _gates(recipe: Recipe) -> Iterator[Finding]:
    """Wishes about what is not measured."""
    if not recipe.certificate.enabled:
        wishes: dict[Keys, object] = {
            ("gates", "max_kld"): recipe.gates.max_kld,
            ("gates", "min_top1"): recipe.gates.min_top1,
            ("certificate", "base"): recipe.certificate.base,
            ("certificate", "text"): recipe.certificate.text,
        }
        for path, wish in wishes.items():
            if wish is not None:
                message = f"{path[-1]} needs the certificate, and certificate.enabled is false"
                yield _found(path, message, with_keys=(("certificate",), ("certificate", "enabled")))
    if recipe.gates.min_decode is not None:
        path = ("gates", "min_decode")
        if recipe.bench is None:
            yield _found(path, "min_decode needs bench", "bench: {}", with_keys=(("bench",),))
        elif recipe.bench.n_gen is not None and not any(recipe.bench.n_gen):
            yield _found(
                path, "min_decode needs tokens to write, and bench.n_gen is 0", with_keys=(("bench", "n_gen"),)
            )


def _bench(recipe: Recipe, document: Document) -> Iterator[Finding]:
    bench = recipe.bench
    if bench is None:
        is_there = ("bench",) in document.lines or ("bench",) in document.elsewhere
        if is_there and document.values["bench"] is None:
            yield _found(("bench",), "bench is empty, expected keys", "bench: {} measures with the defaults")
        return
    if bench.max_repetitions < bench.repetitions:
        message = f"max_repetitions {bench.max_repetitions} is less than repetitions {bench.repetitions}"
        written = ("bench", "max_repetitions") in document.lines
        yield _found(("bench", "max_repetitions" if written else "repetitions"), message)
    if bench.n_prompt == (0,) and bench.n_gen == (0,) and not (bench.starts or bench.scenario):
        yield _found(("bench",), "nothing to measure: no prompt, no tokens to write, no start, no scenario")
    known = scenario_names()
    for place, word in enumerate(bench.scenario):
        path: Keys = ("bench", "scenario", place)
        if word in known or word == "all" or _is_file(word):
            continue
        if word.endswith((".yaml", ".yml")):
            yield _found(path, f"no such scenario: {word}", _near(Path(word)))
        else:
            near = did_you_mean(word, known) or f"one of {', '.join(known)}, all, or a YAML file"
            yield _found(path, f"unknown scenario {word!r}", near)


def _files(recipe: Recipe, document: Document) -> Iterator[Finding]:
    """Files that are not there; `document` may lie beside what was meant."""
    words: dict[Keys, str | None] = {
        ("calibration", "text"): recipe.calibration.text,
        ("certificate", "text"): recipe.certificate.text,
    }
    for index, export in enumerate(recipe.exports):
        words["exports", index, "imatrix"] = None if export.imatrix == "auto" else export.imatrix
    for path, word in words.items():
        if word is None or _is_file(word):
            continue
        beside = Path(document.name).parent / word
        hint = f"paths are relative to the current directory: {beside}" if _is_file(beside) else _near(Path(word))
        yield _found(path, f"no such file: {word}", hint)


def _is_file(path: str | Path) -> bool:
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # a name that no file system can hold
        return False


def _near(path: Path) -> str | None:
    """A hint with the files beside `path` whose names are most like its own."""
    try:
        names = [entry.name for entry in os.scandir(path.expanduser().parent) if entry.is_file()]
    except (OSError, ValueError):
        return None
    return did_you_mean(path.name, [str(path.parent / name) if path.parent != Path() else name for name in names])
