"""Parts of a long text that a number of tokens holds, cut at line ends."""

from __future__ import annotations

from collections.abc import Callable


class Excerpts:
    """A text as lines. `count_tokens` may be slow: it is asked for a few texts of about the wanted length."""

    def __init__(self, text: str, count_tokens: Callable[[str], int]) -> None:
        self._lines = text.splitlines(keepends=True)
        self._count_tokens = count_tokens

    @property
    def num_lines(self) -> int:
        """Of the whole text."""
        return len(self._lines)

    def text(self, part: range) -> str:
        """The lines of a part."""
        return "".join(self._lines[part.start : part.stop])

    def part(self, start: int, room: int) -> range:
        """The lines from `start` on that `room` tokens hold; where the text ends first, lines before it fill up."""
        n = self._most(self.num_lines - start, room, lambda n: range(start, start + n))
        if start + n == self.num_lines:
            n = self._most(self.num_lines, room, lambda n: range(self.num_lines - n, self.num_lines))
            start = self.num_lines - n
        return range(start, start + n)

    def _most(self, limit: int, room: int, lines: Callable[[int], range]) -> int:
        """The largest n up to `limit` whose lines fit, as more lines are more tokens."""

        def fits(n: int) -> bool:
            return n == 0 or self._count_tokens(self.text(lines(n))) <= room

        low, high = 0, 1
        while high <= limit and fits(high):  # doubling first: a text much longer than the room is never counted whole
            low, high = high, 2 * high
        high = min(high, limit + 1)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low
