"""Kinds of values that recipes and methods have: sizes, lists that may be one word."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from efficli.errors import UsageError
from efficli.ops.byte_size import parse_bytes
from efficli.strict_schema import Refused


def words(value: Any) -> Any:
    """One word where a list of words is meant."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def _bytes(value: Any) -> Any:
    """A number of bytes, or "350MiB"."""
    if not isinstance(value, str):
        return value
    try:
        return parse_bytes(value)
    except UsageError as error:
        raise Refused(error.message, error.hint) from None


def or_list(kind: Any, read: Callable[[Any], Any], least: int = 1) -> BeforeValidator:
    """Takes one `kind` or a list of them; a JSON schema says so."""
    return BeforeValidator(read, json_schema_input_type=kind | Annotated[list[kind], Field(min_length=least)])


Words = Annotated[tuple[str, ...], or_list(str, words, 0)]
"""One word or several."""
_SIZE = r"^\s*([0-9]{1,30}(\.[0-9]{0,30})?|\.[0-9]{1,30})\s*([kKmMgGtT][iI]?[bB]|[bB])?\s*$"
"""What `parse_bytes` reads, for an editor."""
Bytes = Annotated[
    int,
    Field(ge=1),
    BeforeValidator(_bytes, json_schema_input_type=Annotated[int, Field(ge=1)] | Annotated[str, Field(pattern=_SIZE)]),
]
