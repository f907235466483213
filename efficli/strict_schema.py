"""Strict YAML into pydantic models; what does not fit is one line with file:line and the nearest right word."""

from __future__ import annotations

import copy
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from efficli.errors import UsageError, did_you_mean
from efficli.strict_yaml import Document, Path, Problem, read


class Part(BaseModel):
    """A mapping of a file: unknown keys are errors, values are not converted, nothing changes later."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class Refused(ValueError):
    """A value that a validator refuses, with something to do; `at`: the key inside, whose line is meant."""

    def __init__(self, message: str, hint: str | None = None, *, at: Path = ()) -> None:
        super().__init__(message)
        self.hint = hint
        self.at = at


class Inner(ValueError):
    """The findings of another schema, for a mapping whose keys depend on one of its values."""

    def __init__(self, schema: type[BaseModel], error: ValidationError) -> None:
        super().__init__(str(error))
        self.schema = schema
        self.error = error


Schema = TypeVar("Schema", bound=BaseModel)

_QUOTED = 60
"""Characters of a wrong value that a message repeats."""


def load(schema: type[Schema], path: pathlib.Path, what: str) -> Schema:
    """What the file holds; `what` it is, for the message "no such recipe". UsageError with file:line."""
    return loads(schema, read_text(path, what), str(path))


def read_text(path: pathlib.Path, what: str) -> str:
    """The text of a file; UsageError if it is not there ("no such recipe", as `what` it is) or is no text."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"no such {what}: {path}") from None
    except UnicodeDecodeError:
        raise UsageError("is no text in UTF-8", where=str(path), hint=f"give a {what} in YAML") from None
    except OSError as error:
        cause = "is a folder" if path.is_dir() else f"cannot be read ({error.strerror})"
        raise UsageError(cause, where=str(path), hint=f"give a {what} in YAML") from None


def loads(schema: type[Schema], text: str, name: str) -> Schema:
    """What `text` holds; `name` is what errors call it."""
    return validate(schema, read(text, name))


def validate(schema: type[Schema], document: Document) -> Schema:
    """The document as `schema`; UsageError with all that is wrong.

    A document without a name stands for a command line: keys are options.
    """
    value, problems = examine(schema, document)
    if value is None or document.problems:
        raise document.error([*document.problems, *problems])
    return value


def examine(schema: type[Schema], document: Document) -> tuple[Schema | None, list[Problem]]:
    """The document as `schema` if it is one, and what is wrong with it apart from its YAML."""
    if not isinstance(document.values, dict):
        required = [key for key, field in schema.model_fields.items() if field.is_required()]
        wanted = Problem((), f"expected keys such as {_listed(required)}")
        return None, [] if any(not problem.path for problem in document.problems) else [wanted]
    try:
        return schema.model_validate(document.values), []
    except ValidationError as error:
        return None, list(_problems(schema, error, (), document))


def salvage(
    schema: type[Schema], values: Mapping[str, Any], bad: Iterable[Path], stand_ins: Mapping[str, Any]
) -> Schema | None:
    """What can be said of `values` without those at the `bad` paths; `stand_ins` for keys that must be there.

    For finding problems of other keys in the same run; None where too much is wrong.
    """
    kept, bad = copy.deepcopy(dict(values)), list(bad)
    for whole in (False, True):  # only what is wrong; then all of the top-level key around it
        for path in bad:
            _drop(kept, path[:1] if whole else path)
        kept = {**stand_ins, **kept}
        try:
            return schema.model_validate(kept)
        except ValidationError as error:
            bad = [problem["loc"] for problem in error.errors()]
    return None


def _drop(values: Any, path: Path) -> None:
    """Remove the key at `path`, if it is there; positions that the file leaves out are passed over."""
    for part in path[:-1]:
        inside = values.get(part) if isinstance(values, dict) else None
        if isinstance(values, list) and isinstance(part, int) and part < len(values):
            inside = values[part]
        values = inside if inside is not None or isinstance(part, str) else values
    if path and isinstance(values, dict):
        values.pop(path[-1], None)


def _problems(schema: type[BaseModel], error: ValidationError, at: Path, document: Document) -> Iterator[Problem]:
    """Each of pydantic's findings, in the words of the file; `at` is where the schema begins."""
    found = error.errors(include_url=False, include_context=True)
    lost = [problem.path for problem in document.problems if problem.lost]
    meant = [
        problem.hint or ""
        for problem in (_explain(schema, one, at, document) for one in found if one["type"] == "extra_forbidden")
    ]
    for one in found:
        path = (*at, *one["loc"])
        inner = one.get("ctx", {}).get("error")
        if any(document.written(path)[: len(place)] == place for place in lost):
            continue
        if one["type"] == "too_short" and len(one["input"]) >= one["ctx"]["min_length"]:
            continue  # pydantic does not count the items that are wrong, which have problems of their own
        if isinstance(inner, Inner):
            yield from _problems(inner.schema, inner.error, path, document)
        elif one["type"] != "missing" or not any(repr(path[-1]) in hint for hint in meant):  # it is there, misspelt
            yield _explain(schema, one, at, document)


def _explain(schema: type[BaseModel], found: ErrorDetails, at: Path, document: Document) -> Problem:
    """One of pydantic's findings in the words of the file or of the command line."""
    own: Path = found["loc"]
    path = (*at, *own)
    key = ".".join(str(part) for part in document.written(path)) if document.name else _option(path)
    kind, value = found["type"], found["input"]
    if kind == "extra_forbidden":
        return Problem(path, f"unknown key {key!r}", did_you_mean(str(path[-1]), _keys(schema, own[:-1])))
    if kind == "missing":
        return Problem(path, f"key {key!r} is missing", "version: 1" if key == "version" else None)
    if kind == "bool_type" and isinstance(value, str) and value.lower() in ("yes", "no", "on", "off"):
        meant = "true" if value.lower() in ("yes", "on") else "false"
        return Problem(path, f"{key}: {value!r} is a word, expected true or false", f"{path[-1]}: {meant}")
    if kind == "literal_error":
        return Problem(path, f"{key}: {_shown(value)}, expected {found['ctx']['expected']}")
    if kind == "too_short":
        return Problem(path, f"{key} is empty, expected at least one")
    if kind == "value_error":  # a rule of ours
        error = found["ctx"]["error"]
        inside: Path = getattr(error, "at", ())
        message = str(error) if inside or not key else f"{key}: {error}"
        return Problem((*path, *inside), message, getattr(error, "hint", None))
    if kind == "model_type":
        return Problem(path, f"{key}: {_shown(value)}, expected keys ({', '.join(_keys(schema, own))})")
    expected = found["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    return Problem(path, f"{key}: {_shown(value)}, expected {expected}")


def _shown(value: Any) -> str:
    """A value as a message quotes it: of a long one the beginning."""
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= _QUOTED else f"{text[:_QUOTED]}..."


def _option(path: Path) -> str:
    """What the command line calls a key of the recipe: `export.type` is --type."""
    words = [part for part in path if isinstance(part, str)]
    return "--" + words[-1].replace("_", "-") if words else ""


def _keys(schema: type[BaseModel], path: Path) -> list[str]:
    """The keys that the schema knows at `path`."""
    model: Any = schema
    for part in path:
        fields = _fields(model)
        if isinstance(part, str) and fields:  # positions in a list, and keys of a free mapping, keep the annotation
            model = fields[part].annotation if part in fields else None
    return list(_fields(model))


def _fields(annotation: Any) -> dict[str, FieldInfo]:
    """Of the model in an annotation, also inside `| None`, tuple[...] or dict[str, ...]."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation.model_fields
    return next((found for inner in get_args(annotation) if (found := _fields(inner))), {})


def _listed(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else "".join(words)
