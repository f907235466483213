"""Typed look-ups in config.json: what is missing has a default, what is absurd is an error that names it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from efficli.errors import CheckpointError

MAX_LAYERS = 1024
"""More than any runtime takes; a larger number is damage, and would only fill memory."""
_MAX_WHOLE = 1 << 40


class Values:
    """A JSON object with other names and defaults for some of its keys; an explicit null counts as missing."""

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        names: Mapping[str, tuple[str, ...]] | None = None,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        self.config, self.names, self.defaults = config, names or {}, defaults or {}

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it is, None for a null; without the key its default."""
        for name in self.names.get(key, (key,)):
            if name in self.config:
                return self.config[name]
        return self.defaults.get(key, default)

    def whole(self, key: str, default: int | None = None, *, most: int = _MAX_WHOLE) -> int:
        """A positive whole number."""
        value = self._given(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise self.wrong(key, value, "a positive whole number")
        if value > most:
            raise self.wrong(key, value, f"at most {most}")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A finite number."""
        value = self._given(key, default)
        if not _is_number(value):
            raise self.wrong(key, value, "a number")
        return float(value)

    def positive(self, key: str, default: float | None = None) -> float:
        """A finite number above zero."""
        value = self.real(key, default)
        if value <= 0:
            raise self.wrong(key, value, "a positive number")
        return value

    def reals(self, key: str) -> tuple[float, ...]:
        """A list of positive numbers, empty where there is none."""
        value = self.entries(key)
        if not all(_is_number(number) and number > 0 for number in value):
            raise self.wrong(key, value, "a list of positive numbers")
        return tuple(float(number) for number in value)

    def entries(self, key: str) -> list[Any]:
        """A list, empty where there is none."""
        value = self.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.wrong(key, value, "a list")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self._given(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, value, "true or false")
        return value

    def word(self, key: str, default: str) -> str:
        """A string that is not empty."""
        value = self._given(key, default)
        if not isinstance(value, str) or not value:
            raise self.wrong(key, value, "a word")
        return value

    def wrong(self, key: str, value: object, expected: str) -> CheckpointError:
        """The error for a value that makes no sense."""
        shown = repr(value)
        shown = shown if len(shown) <= 40 else f"{shown[:37]}..."
        name = self.names.get(key, (key,))[0]
        return CheckpointError(f"'{name}' is {shown}, expected {expected}", where="config.json")

    def _given(self, key: str, default: Any) -> Any:
        value = self.get(key)
        value = default if value is None else value
        if value is None:
            raise CheckpointError(f"'{self.names.get(key, (key,))[0]}' is missing", where="config.json")
        return value


def _is_number(value: object) -> bool:
    """A finite JSON number that fits a double."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False
