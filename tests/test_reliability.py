"""docs/reliability.md names tests that exist, for every row that it promises, and what does not apply has a reason."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

from tests.test_rows import ROWS

ROOT = Path(__file__).resolve().parent.parent
WHOLE_COMMAND = "tests/test_rows.py::test_one_line_and_nothing_lost"
LINES = re.findall(r"^\| (\d+) \| (.+) \| (.*) \| (.+) \|$", (ROOT / "docs/reliability.md").read_text(), re.MULTILINE)
NAMED = {int(number): re.findall(r"`(tests/\S+?\.py)::(\w+)`", tests) for number, _, _, tests in LINES}


@functools.cache
def functions(path: str) -> set[str]:
    """The tests that a file defines."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_row_is_there_once():
    assert sorted(int(number) for number, *_ in LINES) == [*range(1, 43), *range(45, 59), 60]


@pytest.mark.parametrize("number", NAMED)
def test_the_named_tests_exist(number):
    for path, name in NAMED[number]:
        assert name in functions(path), f"{path} has no {name}"


def test_a_row_without_tests_has_a_reason():
    for number, _, _, tests in LINES:
        assert NAMED[int(number)] or tests.startswith("does not apply: ")


def test_what_the_page_says_of_the_whole_command_is_what_it_runs():
    """The rows that cite the table-driven test are those that it has, with their exit codes."""
    citing = {int(number): code for number, _, code, tests in LINES if WHOLE_COMMAND in tests}
    assert set(citing) == {row.number for row in ROWS}
    for row in ROWS:
        assert str(row.code) in citing[row.number].split(", ")
