"""What methods there are, and what each understands, as data and as lines for a reader."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from efficli import catalog
from efficli.method import Kind

Block = tuple[int, list[str]]
"""Where further lines of a folded one begin, in columns; and the lines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One key of a method in a recipe."""

    name: str
    type: str
    """In words: "whole number >= 1"."""
    required: bool
    default: Any
    about: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodInfo:
    """A method as its page says it."""

    name: str
    kind: Kind
    about: str
    """One line."""
    description: str
    """The rest: equations, papers, what it costs."""
    keys: tuple[Key, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self) | {"keys": [asdict(key) for key in self.keys]}


def list_methods() -> list[dict[str, str]]:
    """Name, kind and one-liner of every method; none is imported."""
    return [
        {"name": name, "kind": catalog.kind_of(name), "about": catalog.about(name)} for name in catalog.method_names()
    ]


def describe_method(name: str) -> MethodInfo:
    """All that there is to know of one method; UsageError if there is none of that name."""
    name = catalog.canonical(name)
    schema = catalog.config_of(name).model_json_schema()
    required = schema.get("required", ())
    about, _, description = catalog.description(name).partition("\n")
    keys = tuple(
        Key(
            name=key,
            type=_words(value),
            required=key in required,
            default=value.get("default"),
            about=" ".join(value.get("description", "").split()),
        )
        for key, value in schema.get("properties", {}).items()
    )
    return MethodInfo(
        name=name, kind=catalog.kind_of(name), about=about, description=description.strip("\n"), keys=keys
    )


def list_lines() -> Block:
    """A line for each method."""
    rows = [("method", "kind", "what it does")]
    rows += [(row["name"], row["kind"], row["about"]) for row in list_methods()]
    return _aligned(rows)


def method_lines(method: MethodInfo) -> Iterator[Block]:
    """A method's page: what it does, and its keys."""
    paragraphs = [f"{method.name}: {method.about}", *method.description.split("\n\n")]
    yield 0, [line for paragraph in paragraphs for line in (" ".join(paragraph.split()), "")]
    rows = [("key", "type", "default", "")]
    rows += [
        (key.name, key.type, "required" if key.required else _shown(key.default), key.about) for key in method.keys
    ]
    yield _aligned(rows)


def _aligned(rows: Sequence[tuple[str, ...]]) -> Block:
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append("  ".join([*cells, row[-1]]).rstrip())
    return sum(widths) + 2 * len(widths), lines


def _words(schema: Mapping[str, Any]) -> str:
    """A JSON schema of one value in words."""
    if "anyOf" in schema:
        return " or ".join(_words(part) for part in schema["anyOf"] if part.get("type") != "null")
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    if schema.get("type") == "array":
        return "list of " + _words(schema["items"])
    words = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false"}
    limits = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[key]:g}" for key, sign in limits.items() if key in schema]
    return " ".join([words.get(str(schema.get("type")), "value"), ", ".join(bounds)]).strip()


def _shown(value: Any) -> str:
    if value is None or value == []:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
