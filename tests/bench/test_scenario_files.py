"""Files of scenarios: read strictly, with file:line; nothing outside their folder is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from efficli.bench.scenario import load_scenario
from efficli.errors import EffiError, SecurityError, UsageError
from tests.bench.plain_engine import PLAIN, READER

NO_PROMPTS = "expected prompts or prompts_file, one of them"
NO_OBJECTIVES = "objectives is empty, expected ttft_ms, tpot_ms or total_ms"
NO_START = "prompts belongs to requests, and kind is start; n_gen is 4, and a start ends with its first token"


def error_of(path: Path) -> tuple[str, str | None]:
    """What follows the folder in the error's line, and the hint."""
    with pytest.raises(UsageError) as caught:
        load_scenario(str(path))
    return caught.value.line.replace(f"{path.parent}/", ""), caught.value.hint


@pytest.mark.parametrize(
    ("text", "line", "hint"),
    [
        (PLAIN + "promts: []\n", "s.yaml:7: unknown key 'promts'", "did you mean 'prompts' or 'prompts_file'?"),
        (
            PLAIN.replace("ttft", "tftt"),
            "s.yaml:6: unknown key 'objectives.tftt_ms'",
            "did you mean 'ttft_ms' or 'tpot_ms' or 'total_ms'?",
        ),
        (PLAIN.replace("kind: request\n", ""), "s.yaml:1: key 'kind' is missing", None),
        (PLAIN.replace(": request", ": chat"), "s.yaml:2: kind: 'chat', expected 'request' or 'start'", None),
        (PLAIN + "chat: yes\n", "s.yaml:7: chat: 'yes' is a word, expected true or false", "chat: true"),
        (PLAIN.replace("s: 5", "s: 4"), "s.yaml:4: requests: 4, expected greater than or equal to 5", None),
        (
            PLAIN.replace("n: 4", "n: 0").replace("s: 5", "s: 1.5"),
            "s.yaml:3: n_gen: 0, expected greater than or equal to 1",
            None,
        ),
        (PLAIN.replace("[one two, three four five]", "x"), "s.yaml:5: prompts: expected a list of texts", None),
        (PLAIN.replace("[one two, three four five]", "[a, ' ']"), "s.yaml:5: prompts: prompt 2 is empty", None),
        (PLAIN.replace("[one two, three four five]", "[]"), f"s.yaml:1: {NO_PROMPTS}", None),
        (PLAIN.replace("{ttft_ms: 10}", "{}"), f"s.yaml:1: {NO_OBJECTIVES}", None),
        (PLAIN.replace("10}", "0}"), "s.yaml:6: objectives.ttft_ms: 0, expected greater than 0", None),
        (
            PLAIN.replace("n_gen: 4", "n_gen: 1").replace("ttft", "tpot"),
            "s.yaml:1: tpot_ms is of the tokens after the first, and n_gen is 1",
            None,
        ),
        (
            PLAIN.replace("request\n", "start\n"),
            f"s.yaml:1: {NO_START}",
            None,
        ),
        (PLAIN + "document: text.txt\n", "s.yaml:1: document and document_tokens go together", None),
        (
            READER.replace("least: 10", "least: 41"),
            "s.yaml:1: document_tokens: least 41 is more than most 40",
            None,
        ),
        (READER.replace("a {document} b", "a b"), "s.yaml:7: prompts: prompt 1 has no {document}", None),
        (
            PLAIN.replace("one two", "'{document}'"),
            "s.yaml:5: prompts: prompt 1 has {document}, and there is no document",
            None,
        ),
        (READER.replace("text.txt", "txt"), "s.yaml:5: document: no such file: txt", None),
        (PLAIN + "name: b\n", "s.yaml:7: duplicate key 'name' (first on line 1)", None),
        ("", "s.yaml:1: expected keys such as name, kind, n_gen, requests and objectives", None),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_file_is_said_with_file_and_line(write_scenario, text, line, hint):
    assert error_of(write_scenario(text)) == (line, hint)


def test_an_unknown_name_is_answered_with_the_nearest(tmp_path):
    with pytest.raises(UsageError, match=r"^no such scenario: caht$") as caught:
        load_scenario("caht")
    assert caught.value.hint == "did you mean 'chat'?"
    with pytest.raises(UsageError, match=r"^no such scenario: xyz$") as caught:
        load_scenario("xyz")
    assert caught.value.hint.startswith("one of chat, code-completion, ")
    with pytest.raises(UsageError, match=r"^no such scenario: .*nothing\.yaml$"):
        load_scenario(str(tmp_path / "nothing.yaml"))


@pytest.mark.parametrize("name", ["../text.txt", "/etc/hostname", "link.txt", "folder/../../text.txt"])
def test_a_document_outside_the_folder_is_refused(tmp_path, name):
    inside = tmp_path / "inside"
    (inside / "folder").mkdir(parents=True)
    (tmp_path / "text.txt").write_text("secret\n" * 100)
    (inside / "link.txt").symlink_to(tmp_path / "text.txt")
    (inside / "s.yaml").write_text(READER.replace("text.txt", name))
    with pytest.raises(SecurityError) as caught:
        load_scenario(str(inside / "s.yaml"))
    assert caught.value.line == f"{inside}/s.yaml:5: document: {name} leaves the scenario's folder"
    assert caught.value.exit_code == 6


def test_a_document_in_a_folder_below_and_prompts_of_a_file_are_read(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "text.txt").write_text("é\n" * 20)
    (tmp_path / "p.jsonl").write_text('{"text": "{document} x"}\n{"text": "y {document}"}\n')
    text = (
        READER.replace("text.txt", "below/text.txt")
        .replace("prompts: [", "#")
        .replace("requests", "prompts_file: p.jsonl\nrequests")
    )
    (tmp_path / "s.yaml").write_text(text)
    scenario = load_scenario(str(tmp_path / "s.yaml"))
    assert scenario.prompts == ("{document} x", "y {document}")
    assert scenario.document == "é\n" * 20
    (tmp_path / "below" / "text.txt").write_bytes(b"ab\xff")
    line, _ = error_of(tmp_path / "s.yaml")
    assert line == "s.yaml:6: document: below/text.txt is not UTF-8 (byte 2)"


def test_bad_files_end_in_one_line(tmp_path):
    for name, content in (("a.yaml", b"\xff\xfe"), ("b.yaml", b"a: &a [*a]"), ("c.yaml", b"[" * 500)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(EffiError) as caught:
            load_scenario(str(tmp_path / name))
        assert "\n" not in caught.value.line
