"""Tables on a terminal of 80 columns: names are folded, figures stay in one piece, nothing is cut."""

from __future__ import annotations

import io

import pytest

from efficli.console import Terminal


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def shown(monkeypatch):
    """What a table looks like on 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("NO_COLOR", "1")

    def show(columns: list[str], rows: list[list[str]]) -> list[str]:
        monkeypatch.setattr("sys.stdout", screen := Screen())
        Terminal().table("t", columns, rows, is_data=True)
        return [line.rstrip() for line in screen.getvalue().splitlines()]

    return show


def test_figures_are_not_folded_where_folding_the_name_is_enough(shown):
    figure = "2.028e-04 ± 8.4e-06"
    lines = shown(["", "code", "prose", "all"], [["99th percentile KL divergence", figure, figure, figure]])
    assert sum(line.count(figure) for line in lines) == 3
    assert max(map(len, lines)) <= 80
    assert " ".join(line[:14].strip() for line in lines[3:]).split() == ["99th", "percentile", "KL", "divergence"]


def test_where_it_is_not_enough_all_is_folded_and_nothing_is_lost(shown):
    words = ["a" * 40, "b" * 40, "c" * 40]
    lines = shown(["x", "y", "z"], [words])
    assert [sum(line.count(sign) for line in lines) for sign in "abc"] == [40, 40, 40]
    assert max(map(len, lines)) <= 80
