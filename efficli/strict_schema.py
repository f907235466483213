"""Strict YAML into pydantic models; what does not fit is one line with file:line and the nearest right word."""

from __future__ import annotations

import pathlib
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from efficli.errors import UsageError, did_you_mean
from efficli.strict_yaml import Document, Path, parse


class Part(BaseModel):
    """A mapping of a file: unknown keys are errors, values are not converted, nothing changes later."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class Refused(ValueError):
    """A value that a validator refuses, with something to do."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


Schema = TypeVar("Schema", bound=BaseModel)


def load(schema: type[Schema], path: pathlib.Path, what: str) -> Schema:
    """What the file holds; `what` it is, for the message "no such recipe". UsageError with file:line."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"no such {what}: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot be read ({error})", where=str(path)) from None
    return loads(schema, text, str(path))


def loads(schema: type[Schema], text: str, name: str) -> Schema:
    """What `text` holds; `name` is what errors call it."""
    document = parse(text, name)
    if not isinstance(document.values, dict):
        required = [key for key, field in schema.model_fields.items() if field.is_required()]
        raise UsageError(f"expected keys such as {_listed(required)}", where=document.where(()))
    return validate(schema, document)


def validate(schema: type[Schema], document: Document) -> Schema:
    """The document as `schema`; UsageError. A document without a name stands for a command line: keys are options."""
    try:
        return schema.model_validate(document.values)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=True)
        problems.sort(key=lambda problem: problem["type"] == "missing")  # a misspelt key says why another is missing
        first, *rest = [_explain(schema, problem, document) for problem in problems]
        message = first[0]
        if rest:
            message += f" (and {len(rest)} more: {'; '.join(text for text, _, _ in rest[:3])})"
        raise UsageError(message, where=first[1], hint=first[2]) from None


def _explain(schema: type[BaseModel], problem: ErrorDetails, document: Document) -> tuple[str, str | None, str | None]:
    """Message, place and hint of one of pydantic's findings, in the words of the file or of the command line."""
    path: Path = problem["loc"]
    if document.name:
        key, where = ".".join(str(part) for part in document.written(path)), document.where(path)
    else:
        key, where = _option(path), None
    kind, found = problem["type"], problem["input"]
    if kind == "extra_forbidden":
        return f"unknown key {key!r}", where, did_you_mean(str(path[-1]), _keys(schema, path[:-1]))
    if kind == "missing":
        return f"key {key!r} is missing", where, "version: 1" if key == "version" else None
    if kind == "bool_type" and isinstance(found, str) and found.lower() in ("yes", "no", "on", "off"):
        value = "true" if found.lower() in ("yes", "on") else "false"
        return f"{key}: {found!r} is a word, expected true or false", where, f"{path[-1]}: {value}"
    if kind == "literal_error":
        return f"{key}: {found!r}, expected {problem['ctx']['expected']}", where, None
    if kind == "too_short":
        return f"{key} is empty, expected at least one", where, None
    if kind == "value_error":  # a rule of ours over several keys
        error = problem["ctx"]["error"]
        return (f"{key}: {error}" if key else str(error)), where, getattr(error, "hint", None)
    if kind == "model_type":
        return f"{key}: {found!r}, expected keys ({', '.join(_keys(schema, path))})", where, None
    expected = problem["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    return f"{key}: {found!r}, expected {expected}", where, None


def _option(path: Path) -> str:
    """What the command line calls a key of the recipe: `export.type` is --type."""
    words = [part for part in path if isinstance(part, str)]
    return "--" + words[-1].replace("_", "-")


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
