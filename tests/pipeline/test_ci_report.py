"""Reports for CI: JUnit XML that its schema takes, Markdown that shows every name as it is, files that end as told."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from html import unescape
from pathlib import Path
from xml.etree import ElementTree

import pytest
from markdown_it import MarkdownIt

from efficli.bench.quality import Certificate, Row
from efficli.cli import main
from efficli.errors import EffiError, FitError, GateError, OutputError, UsageError
from efficli.pipeline.ci_report import STEP_SUMMARY, UNENDED, Ending, junit, summary, write_reports
from efficli.pipeline.gates import Judgement, judge_quality, judge_sizes
from efficli.pipeline.result import ExportedFile, ExportResult
from efficli.pipeline.steps import StepRun
from efficli.progress import Silent
from efficli.recipe import Gates

SCHEMA = {
    "testsuites": (set(), {"name", "time", "tests", "failures", "errors"}, {"testsuite"}),
    "testsuite": (
        {"name", "tests", "failures", "errors"},
        {"group", "time", "skipped", "timestamp", "hostname", "id", "package", "file", "log", "url"},
        {"testsuite", "properties", "testcase", "system-out", "system-err"},
    ),
    "testcase": (
        {"name"},
        {"time", "classname", "group"},
        {"skipped", "error", "failure", "rerunFailure", "rerunError", "system-out", "system-err"},
    ),
    "failure": (set(), {"message", "type"}, set()),
    "error": (set(), {"message", "type"}, set()),
    "system-out": (set(), set(), set()),
}
"""junit-10.xsd of the Jenkins xUnit plugin: element -> attributes that it must have, may have, and children."""

ODD = "a|b`c*d_e_<f>[g](h)\\i~~j~~ &lt; $k$ \U0001f600 \x00\x1b\udc80 \n# é __init__ _x_ https://e.org"
SEEN = "a|b`c*d_e_<f>[g](h)\\i~~j~~ &lt; $k$ \U0001f600 \ufffd\ufffd\ufffd # é __init__ _x_ https://e.org"
"""How Markdown can show it: without what is no character of XML or UTF-8, on one line."""

BARE = {0: "\ufffd", 0x1B: "\ufffd", 0xDC80: "\ufffd"}
"""What XML cannot hold."""


def certificate(file: str, **figures: float) -> Certificate:
    figures = figures or {"kld_mean": 0.02, "kld_mean_stderr": 0.001, "top1_agreement": 0.9}
    rows = tuple(Row(text, 100, 4, figures) for text in ("prose", "all"))
    kind = "embedding" if "cosine_mean" in figures else "divergence"
    return Certificate(artifact=file, origin=ODD, kind=kind, rows=rows)


def result(*files: ExportedFile, gates: tuple[Judgement, ...] = (), **told) -> ExportResult:
    values = {"output": Path("out"), "num_weights": 10, "report": (), "dry_run": False, "command": "run"}
    return ExportResult(**values | {"model": ODD, "files": files, "gates": gates} | told)


def file(name: str = ODD, found: Certificate | None = None, nbytes: int = 3 << 20) -> ExportedFile:
    return ExportedFile(name=name, type="Q4_K_M", nbytes=nbytes, bits_per_weight=4.5, fallbacks=(), certificate=found)


def judged(**limits) -> ExportResult:
    """One file against gates."""
    one = file(found=certificate(ODD))
    gates = Gates(**limits)
    return result(one, gates=(*judge_sizes(gates, [one]), *judge_quality(gates, [one])))


def cases(xml: bytes) -> dict[str, ElementTree.Element]:
    """Test cases by name, of XML that the schema takes and whose sums are right."""
    root = ElementTree.fromstring(xml)
    assert root.tag == "testsuites"
    for element in root.iter():
        needed, allowed, children = SCHEMA[element.tag]
        assert needed <= set(element.attrib) <= needed | allowed
        assert {child.tag for child in element} <= children
    (suite,) = root
    found = {case.get("name"): case for case in suite}
    assert len(found) == len(suite) == int(suite.get("tests"))
    for word, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        assert int(suite.get(word)) == sum(case.find(tag) is not None for case in suite)
    assert float(suite.get("time")) >= 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", suite.get("timestamp"))
    return found


def tables(markdown: bytes) -> list[list[list[str]]]:
    """The cells of every table as a renderer shows them; nothing else of the text is markup but what is meant."""
    html = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(markdown.decode())
    assert set(re.findall(r"</?([a-z0-9]+)", html)) <= {
        "h2", "h3", "p", "strong", "table", "thead", "tbody", "tr", "th", "td"
    }, html  # fmt: skip
    plain = re.sub("</?strong>", "", html)
    rows = [re.findall("<tr>(.*?)</tr>", part, re.DOTALL) for part in re.findall("<table>(.*?)</table>", plain, re.S)]
    return [[[unescape(c) for c in re.findall("<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in part] for part in rows]


def heading(markdown: bytes) -> str:
    return unescape(re.search("<h2>(.*?)</h2>", MarkdownIt().render(markdown.decode()))[1])


def test_met_and_unmet_gates():
    found = judged(max_kld=0.01, min_top1=0.5, max_bytes="4MiB")
    told = cases(junit(found, Ending("x", "GateError", None, found.gates[1].error)))
    assert list(told) == ["run", "max_bytes", "max_kld", "min_top1"]
    assert not len(told["run"]) and told["run"].get("classname") == ODD.translate(BARE)
    failure = told["max_kld"].find("failure")
    assert failure.get("type") == "GateError" and "0.02" in failure.get("message")
    assert failure.text == "limit 0.01, found 0.02"
    assert told["min_top1"].find("system-out").text == "0.9, at least 0.5"
    files, gates, figures = tables(summary(found, None))
    assert files[1] == [SEEN, "Q4_K_M", "3.00 MiB", "4.50"]
    assert [(row[0], row[1], row[3]) for row in gates[1:]] == [
        ("max_bytes", SEEN, "met"), ("max_kld", SEEN, "not met"), ("min_top1", SEEN, "met"),
    ]  # fmt: skip
    assert gates[1][2] == "3.00 MiB, at most 4.00 MiB"
    assert figures[0] == ["", "prose", "all"] and figures[2] == [
        "mean KL divergence",
        "0.0200 ± 0.0010",
        "0.0200 ± 0.0010",
    ]


def test_names_are_shown_as_they_are():
    markdown = summary(judged(max_kld=1), Ending(ODD, "FitError", ODD))
    assert heading(markdown) == f"efficli: {SEEN}"
    shown = unescape(re.sub("<[^>]+>", "", MarkdownIt().render(markdown.decode())))
    assert f"error: {SEEN}\n" in shown and f"hint: {SEEN}\n" in shown
    assert f"Certificate of {SEEN} against {SEEN}\n" in shown
    for word in ("max_kld", "Q4_K_M"):  # also as plain text
        assert word in markdown.decode()


def test_a_run_that_fails_before_any_gate_is_an_error():
    for ending in (Ending("line", "FitError", "hint", FitError("line")), UNENDED):
        told = cases(junit(None, ending))
        assert list(told) == ["run"]
        assert told["run"].find("error").get("message") == ending.line
        assert told["run"].find("error").text in (ending.hint, None)
        assert heading(summary(None, ending)) == "efficli: the recipe" and tables(summary(None, ending)) == []


def test_an_error_after_gates_that_are_met_is_one_of_the_run():
    error = OutputError("no space left")
    told = cases(junit(judged(max_kld=1), Ending(error.line, "OutputError", None, error)))
    assert told["run"].find("error") is not None and told["max_kld"].find("failure") is None


def test_what_could_not_be_measured_is_an_unmet_gate():
    one = file(found=Certificate(artifact="f", origin=None, status="origin absent"))
    found = result(one, gates=tuple(judge_quality(Gates(max_kld=1), [one])))
    told = cases(junit(found, None))
    assert told["max_kld"].find("failure").text == "limit 1, found nothing"
    assert b"origin absent" in summary(found, None)
    plain = result(file())
    assert list(cases(junit(plain, None))) == ["run"] and len(tables(summary(plain, None))) == 1


def test_certificates_of_embedding_models():
    one = file("e.gguf", certificate("e.gguf", cosine_mean=0.99, cosine_min=0.9))
    shown = tables(summary(result(one), None))[-1]
    assert [row[0] for row in shown] == ["", "texts", "mean cosine", "smallest cosine"]
    assert shown[2][1] == "0.99"
    unfit = result(one, gates=tuple(judge_quality(Gates(max_kld=1), [one])))
    assert cases(junit(unfit, None))["max_kld"].find("failure").get("type") == "UsageError"


def test_a_rehearsal_and_a_dry_run_do_not_look_like_a_run():
    steps = (StepRun(kind="write", what="Q8_0", key=None, cached=False, seconds=1.0),)
    rehearsed = summary(result(file(), command="rehearse", steps=steps), None)
    assert heading(rehearsed) == f"efficli: rehearsal of {SEEN}"
    assert tables(rehearsed) == [[["step", "of"], ["write", "Q8_0"]]]
    assert heading(summary(result(file(), dry_run=True), None)) == f"efficli: {SEEN}, not run: as predicted"


def test_targets_are_a_table():
    row = {"cells": ["pi5-8gb", "a.gguf", "TIGHT: KV cache", "1.00 GiB", "7.00 GiB", "5 to 9"]}
    assert tables(summary(result(file(), targets=(row,)), None))[1][1] == row["cells"]


# Files


def write(folder, block=lambda heard: None, **places):
    names = {"summary_file": folder / "s.md", "junit_file": folder / "j.xml"} | places
    with write_reports(**names, output=folder / "out", progress=Silent()) as heard:
        block(heard)


def test_from_the_start_on_the_reports_say_that_the_run_has_not_ended(tmp_path):
    (tmp_path / "j.xml").write_bytes(junit(judged(max_kld=1), None))

    def look(heard):
        assert "not ended" in cases((tmp_path / "j.xml").read_bytes())["run"].find("error").get("message")
        assert "not ended" in (tmp_path / "s.md").read_text()
        heard(judged(max_kld=1))

    write(tmp_path, look)
    assert cases((tmp_path / "j.xml").read_bytes())["max_kld"].find("failure") is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["j.xml", "s.md"]


@pytest.mark.parametrize("ending", [GateError("g", hint="h"), KeyboardInterrupt(), ZeroDivisionError("z")])
def test_however_it_ends_the_reports_tell(tmp_path, ending):
    def end(heard):
        heard(judged(max_kld=1))
        raise ending

    with pytest.raises(type(ending)):
        write(tmp_path, end)
    line = {GateError: "g", KeyboardInterrupt: "interrupted"}.get(
        type(ending), "a bug of efficli: ZeroDivisionError: z"
    )
    assert cases((tmp_path / "j.xml").read_bytes())["run"].find("error").get("message") == line
    assert f"**error:** {line}\n" in (tmp_path / "s.md").read_text()


def unreached(heard):
    raise AssertionError("the run has begun")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("folder", "{0}/folder: this is a folder, expected the name of a file"),
        ("none/s.md", "{0}/none/s.md: no such folder: {0}/none"),
        ("x" * 300, "cannot write"),
        ("out/s.md", "{0}/out/s.md: a report inside the artifact, which appears as a whole and is hashed"),
        ("j.xml", "{0}/j.xml: --summary and --junit are the same file"),
    ],
)
def test_a_place_that_cannot_be_is_told_before_the_run(tmp_path, name, line):
    for folder in ("folder", "out"):
        (tmp_path / folder).mkdir()
    with pytest.raises(EffiError) as caught:
        write(tmp_path, unreached, summary_file=tmp_path / name)
    assert caught.value.line.startswith(line.format(tmp_path))
    assert caught.value.exit_code == (2 if isinstance(caught.value, UsageError) else 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "out"]


def test_the_command_ends_with_1_before_it_reads_the_recipe(tmp_path, capsys):
    assert main(["run", "none.yaml", "--junit", str(tmp_path)]) == 1
    assert f"error: {tmp_path}: this is a folder" in capsys.readouterr().err
    assert main(["run", str(tmp_path / "none.yaml"), "--junit", str(tmp_path / "j.xml")]) == 2
    assert "no such recipe" in cases((tmp_path / "j.xml").read_bytes())["run"].find("error").get("message")


def test_the_summary_of_a_step_is_appended_to_and_any_other_file_is_replaced(tmp_path, monkeypatch):
    shared, own = tmp_path / "step", tmp_path / "s.md"
    for path in (shared, own):
        path.write_text("# before")
    monkeypatch.setenv(STEP_SUMMARY, str(shared))
    for path in (shared, shared, own):
        write(tmp_path, lambda heard: heard(judged(max_kld=1)), summary_file=path)
    assert shared.read_text().startswith("# before\n## efficli") and shared.read_text().count("\n## efficli") == 2
    assert "not ended" not in shared.read_text()
    assert own.read_text().startswith("## efficli")
    shared.unlink()
    write(tmp_path, summary_file=shared)
    assert shared.read_text().startswith("## efficli")


def test_devices_pipes_and_links_stay_what_they_are(tmp_path):
    pipe, link, behind = tmp_path / "pipe", tmp_path / "link", tmp_path / "behind"
    os.mkfifo(pipe)
    link.symlink_to(behind)
    got = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    write(tmp_path, summary_file=pipe, junit_file=link)
    reader.join()
    assert got[0].startswith(b"## efficli") and pipe.is_fifo()
    assert link.is_symlink() and cases(behind.read_bytes())
    write(tmp_path, summary_file="/dev/null", junit_file=None)
    assert Path("/dev/null").is_char_device()


def test_a_report_that_cannot_be_written_at_last(tmp_path):
    with pytest.raises(OutputError, match="no space left") as caught:
        write(tmp_path, lambda heard: heard(judged(max_kld=1)), summary_file="/dev/full", junit_file=None)
    assert caught.value.hint == f"the run is done, and in {tmp_path / 'out'}"
    progress = Silent()
    with (
        pytest.raises(GateError),
        write_reports("/dev/full", tmp_path / "j.xml", output=tmp_path / "out", progress=progress),
    ):
        raise GateError("g")  # counts for more
    assert any("no space left" in note for note in progress.notes)
    assert cases((tmp_path / "j.xml").read_bytes())["run"].find("error").get("message") == "g"


def test_a_killed_run_leaves_no_older_report(tmp_path):
    (tmp_path / "j.xml").write_bytes(junit(judged(max_kld=1), None))
    code = (
        "import os, signal; from pathlib import Path; from efficli.progress import Silent\n"
        "from efficli.pipeline.ci_report import write_reports\n"
        f"with write_reports(None, {str(tmp_path / 'j.xml')!r}, output=Path('out'), progress=Silent()):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert "not ended" in cases((tmp_path / "j.xml").read_bytes())["run"].find("error").get("message")
