"""Markdown for a README: a table that renders, and its conditions."""

from __future__ import annotations

import re

import pytest

from efficli.bench.figures import BenchResult
from efficli.bench.markdown import to_markdown
from tests.bench.made_results import MACHINE, artifact, everything, several


def cells(line):
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def table(text, title=None):
    """Cells of the first table, or of the one with that title."""
    blocks = text.split("\n\n")
    block = blocks[0] if title is None else blocks[1 + next(i for i, found in enumerate(blocks) if title in found)]
    return [cells(line) for line in block.splitlines()]


def test_one_row_an_artifact_with_what_a_reader_chooses_by():
    heading, rule, *rows = table(to_markdown(several()))
    assert heading == [
        "artifact", "size", "decode 128 tokens, tokens/s", "prefill 512 tokens, tokens/s", "first token, ms",
        "load cold / warm, ms", "peak memory", "mean KL divergence",
    ]  # fmt: skip
    assert {len(row) for row in rows} == {len(heading)} == {len(rule)}
    assert rows[0] == [
        "`reference-Q4_K_M.gguf`", "5.47 MiB", "1101 (1091 - 1106)", "7715 (7707 - 7779)", "66.4", "60.0 / 20.0",
        "66.56 MiB", "0.00760",
    ]  # fmt: skip


def test_conditions_and_doubts_follow_and_no_star_becomes_a_list():
    text = to_markdown(several())
    below = text.rsplit("\n\n", 1)[1].splitlines()
    assert all(line.startswith("- ") for line in below)
    assert "2025-11-23" in below[-1] and "2 threads" in below[-1] and "llama-cpp-python 0.3.36" in below[-1]
    assert any("busy neighbour" in line for line in below) and r"- \* did not settle" in text
    assert not re.search(r"(?<!\\)\*", text)


def test_a_failure_has_its_row_and_its_reason():
    text = to_markdown(several())
    assert table(text)[-1][0] == "`huge.gguf`" and "failed" in table(text)[-1]
    assert "- `huge.gguf` failed: llama.cpp ran out of memory" in text


def test_columns_that_nobody_fills_are_left_out():
    one = artifact("a.gguf", 5, 100, kld=None)
    one.starts, one.memory = [], None
    heading = table(to_markdown(BenchResult(machine=MACHINE, artifacts=[one])))[0]
    assert heading == [
        "artifact",
        "size",
        "decode 128 tokens, tokens/s",
        "prefill 512 tokens, tokens/s",
        "first token, ms",
    ]


def test_signs_that_mean_something_in_markdown_are_escaped():
    result = everything()
    result.artifacts[-1].failure = type(result.artifacts[-1].failure)(
        message="a | b <i>\nc", where=None, hint=None, code=1
    )
    assert r"failed: a \| b \<i> c" in to_markdown(result)


def test_what_else_was_asked_for_has_tables_of_its_own():
    text = to_markdown(several())
    heading, _, *rows = table(text, "reference-Q2_K.gguf over reference-Q4_K_M.gguf: ratio of tokens/s, in turns")
    assert heading == ["", "ratio", "verdict", "pairs"]
    assert ["prefill 512 tokens", "1.14 (1.12 - 1.15)", "faster", "7"] in rows
    text = to_markdown(everything())
    assert "in time, %" in table(text, "Scenario chat")[0]
    assert "pi5-8gb (predicted)" in table(text, "Predictions, not measurements")[0]
    below = text.rsplit("\n\n", 1)[1]
    assert "- predicted by t_token" in below and "- in time: share of the requests" in below


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ("a|b.gguf", r"`a\|b.gguf`"),
        ("a`b.gguf", "`` a`b.gguf ``"),
        ("a\nb.gguf", r"`a\nb.gguf`"),
        ("a\udcffb.gguf", r"`a\udcffb.gguf`"),
    ],
)
def test_a_name_stays_in_its_cell(name, cell):
    result = BenchResult(machine=MACHINE, artifacts=[artifact(name, 5, 100)])
    assert table(to_markdown(result))[2][0] == cell
