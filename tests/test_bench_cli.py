"""`efficli bench` as it is typed: its lines, its exit codes, and the forms of its result."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import efficli
from efficli import cli
from efficli.bench.figures import BenchResult
from efficli.bench.wording import number
from efficli.console import Terminal
from efficli.tables import BenchView
from tests.pico import write_llama
from tests.tiny_architectures import write_encoder
from tests.tiny_gguf import write_tiny

ONCE = ["-r", "5", "--max-repetitions", "5", "-t", "1"]
QUICK = [*ONCE, "--no-starts", "-p", "8", "-n", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, and what is none."""
    made = tmp_path_factory.mktemp("bench")
    good = write_tiny(made / "tiny.gguf").read_bytes()
    write_tiny(made / "other.gguf", seed=1)
    write_tiny(made / "newer.gguf", arch="newer")
    write_tiny(made / "hole.gguf", without="blk.1.ffn_up.weight")
    (made / "cut.gguf").write_bytes(good[: len(good) // 2])
    (made / "text.gguf").write_text("a text that is long enough for a header")
    (made / "empty").mkdir()
    os.mkfifo(made / "pipe.gguf")
    (made / "there.png").touch()
    return made


@pytest.fixture(autouse=True)
def _there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `efficli bench`, in this process."""
    capsys.readouterr()
    code = cli.main(["bench", *words])
    out, err = capsys.readouterr()
    return code, out, err


# What cannot be measured

MAKE = "hint: give what `efficli export` wrote, or a .gguf file\n"
AGAIN = "hint: copy or make the whole file again\n"
BROKEN = [
    ("text.gguf", 1, "text.gguf: not a GGUF v2/v3 file",
     "hint: give a file that `efficli export` or llama.cpp wrote\n"),
    ("cut.gguf", 1, "cut.gguf: tensor 'blk.0.ffn_up.weight' ends 896 bytes past the file", AGAIN),
    ("newer.gguf", 5, "newer.gguf: llama.cpp refused it: unknown model architecture: 'newer'",
     "hint: a newer llama-cpp-python may know it\n"),
    ("hole.gguf", 1, "hole.gguf: llama.cpp refused it: tensor 'blk.1.ffn_up.weight' not found", ""),
    ("empty", 1, "empty: no .gguf file in it, expected an artifact", MAKE),
    ("gone.gguf", 1, "gone.gguf: no such file or directory, expected an artifact", MAKE),
    ("reference", 1, "reference: no such file or directory, expected an artifact",
     "hint: `efficli export reference -o out` makes one\n"),
    ("pipe.gguf", 1, "pipe.gguf: not a regular file", ""),
    ("tiny.gguf -p 300", 2, "tiny.gguf: a prompt of 300 tokens is longer than the context of 256 that the model was "
     "trained for", "hint: --ctx-size 300 measures it all the same\n"),
    ("tiny.gguf -p 65 -c 64", 2, "a prompt of 65 tokens is longer than the context of 64 (--ctx-size)", ""),
    ("tiny.gguf --time-limit 0.0001", 4, "running tiny.gguf took more than 0.0001 s, and was stopped",
     "hint: --time-limit SECONDS gives it longer\n"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "code", "line", "hint"), BROKEN)
def test_what_cannot_be_measured_is_one_line(capsys, words, code, line, hint):
    assert run(capsys, *QUICK, *words.split()) == (code, "", f"error: {line}\n{hint}")


@pytest.mark.parametrize("form", ["--csv", "--jsonl", "--markdown"])
def test_no_form_has_anything_of_what_was_not_measured(capsys, form):
    assert run(capsys, "text.gguf", form) == (1, "", f"error: {BROKEN[0][2]}\n{BROKEN[0][3]}")


def test_nothing_to_measure(capsys, tmp_path):
    line = "tiny.gguf: nothing to measure: no test, no start, no scenario"
    assert run(capsys, "tiny.gguf", "-p", "0", "-n", "0", "--no-starts") == (2, "", f"error: {line}\n")
    write_encoder(tmp_path / "tiny.gguf")
    hint = "an embedding model reads and does not write: --n-prompt N"
    told = f"error: {tmp_path}/{line}\nhint: {hint}\n"
    assert run(capsys, str(tmp_path), "-p", "0", "-n", "9", "--no-starts") == (2, "", told)


def test_each_failure_is_a_line_and_what_is_sound_is_measured(capsys):
    broken = [row for row in BROKEN if " " not in row[0]]
    broken.insert(0, broken.pop(2))
    code, out, err = run(capsys, "tiny.gguf", *(row[0] for row in broken), *QUICK)
    assert code == 5  # of the first that failed
    assert err == "".join(f"error: {line}\n{hint}" for _, _, line, hint in broken)
    decode = out[out.index("Decode") :].split("\n\n")[0]
    assert re.search(r"^tiny\.gguf +[\d.]+ \S", decode, re.MULTILINE)
    assert len(re.findall(r"^\S+ +failed", decode, re.MULTILINE)) == len(broken)
    assert "error" not in out


def test_json_is_one_object_with_the_errors_and_what_was_measured(capsys):
    code, out, err = run(capsys, "cut.gguf", "tiny.gguf", *QUICK, "--json")
    assert (code, err) == (1, f"error: {BROKEN[1][2]}\n{AGAIN}")
    cut, tiny = json.loads(out)["artifacts"]
    assert cut["error"] == {
        "code": 1, "where": "cut.gguf", "hint": "copy or make the whole file again",
        "message": "tensor 'blk.0.ffn_up.weight' ends 896 bytes past the file",
    }  # fmt: skip
    assert (tiny["error"], [test["label"] for test in tiny["tests"]]) == (None, ["pp8", "tg4"])


def test_a_file_is_named_as_it_was_given(capsys, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.gguf").write_bytes(Path("newer.gguf" if name == "b" else "cut.gguf").read_bytes())
    _, _, err = run(capsys, str(tmp_path / "a/model.gguf"), str(tmp_path / "b"), *QUICK)
    assert f"error: {tmp_path}/a/model.gguf: tensor" in err
    assert f"error: {tmp_path}/b/model.gguf: llama.cpp refused it" in err


def test_memory_that_does_not_suffice(capsys):
    code, out, err = run(capsys, "tiny.gguf", *QUICK, "--memory-limit", "20MiB")
    assert (code, out) == (4, "")
    assert re.fullmatch(
        r"error: out of memory while (running|loading) tiny\.gguf: [\d.]+ MiB of its own and [\d.]+ MiB of files, "
        r"the limit is 20\.00 MiB\nhint: a smaller type, a shorter context \(-c\), or a larger --memory-limit\n",
        err,
    )


def test_gates_come_after_the_figures(capsys):
    code, out, err = run(capsys, "tiny.gguf", *QUICK, "--max-bytes", "4kB")
    assert (code, err) == (4, "error: tiny.gguf: 98.25 KiB, at most 3.91 KiB wanted\n")
    assert "Decode" in out
    code, out, err = run(capsys, "tiny.gguf", *QUICK, "--max-kld", "0.1")
    known = "error: tiny.gguf: no KL divergence is known of it, and a gate asks for one\nhint: --base MODEL measures it"
    assert (code, err) == (3, f"{known}\n")
    assert "Decode" in out


@pytest.mark.parametrize(("words", "code", "line", "hint"), [
    ("", 2, "missing argument 'ARTIFACT'", "efficli bench --help"),
    ("tiny.gguf -t 0", 2, "--threads 0, expected a number from 1", None),
    ("tiny.gguf -t two", 2, "--threads 'two', expected numbers with commas between them", "--threads 128,512"),
    ("tiny.gguf -r 3", 2, "--repetitions 3, expected 5 or more",
     "fewer repeats give a number without knowing how far it is off"),
    ("tiny.gguf -ctk q8", 2, "--cache-type-k 'q8' is no type of the KV cache", "did you mean 'q8_0'?"),
    ("tiny.gguf -ctv q8_0 -fa off", 2, "--cache-type-v q8_0 needs flash attention", "--flash-attn on"),
    ("tiny.gguf -fa maybe", 2, "--flash-attn 'maybe', expected one of auto, on, off", None),
    ("tiny.gguf --target pi5-8b", 2, "unknown target 'pi5-8b'", "did you mean 'pi5-8gb' or 'pi5-4gb' or 'pi4-8gb'?"),
    ("tiny.gguf --scenario chatt", 2, "no such scenario: chatt", "did you mean 'chat'?"),
    ("tiny.gguf --json --csv", 2, "--json and --csv both write to stdout, expected one of them", None),
    ("tiny.gguf --jsonl --markdown", 2, "--jsonl and --markdown both write to stdout, expected one of them", None),
    ("tiny.gguf --chart speed.svg", 2, "--chart speed.svg, expected a name that ends in .png", None),
    ("tiny.gguf --chart gone/speed.png", 1, "gone: no such directory", None),
    ("tiny.gguf --chart there.png", 1, "there.png: exists", "--force replaces it"),
    ("tiny.gguf --memory-limit much", 2, "--memory-limit: 'much' is not a number of bytes",
     "a number and B, kB, MB, GB, TB (1000s) or KiB, MiB, GiB, TiB (1024s), as in 350MiB"),
    ("tiny.gguf --time-limit 0", 2, "--time-limit 0, expected more than 0 seconds", None),
    ("tiny.gguf --text a.txt", 2, "--text without --base: there is no model to compare with", "--base MODEL"),
    ("tiny.gguf --base gone", 1, "no such checkpoint: gone",
     "give a directory, a hub id such as org/name, or 'reference'"),
    ("tiny.gguf --power-command no-such-meter", 2,
     "--power-command: 'no-such-meter' cannot be run: No such file or directory", None),
    ("--compare tiny.gguf", 2, "--compare takes two artifacts or more", None),
    ("--compare tiny.gguf other.gguf --scenario chat", 2,
     "--compare and --scenario: scenarios are not run in turns", "run them without --compare"),
])  # fmt: skip
def test_what_makes_no_sense_is_said_before_anything_runs(capsys, words, code, line, hint):
    told = f"error: {line}\n" + (f"hint: {hint}\n" if hint else "")
    if "--json" not in words:
        assert run(capsys, *words.split()) == (code, "", told)
    if "--jsonl" not in words:
        found, out, err = run(capsys, *words.split(), *([] if "--json" in words else ["--json"]))
        assert (found, err) == (code, told)
        error = json.loads(out)["error"]
        assert ": ".join(filter(None, [error["where"], error["message"]])) == line
        assert (error["code"], error["hint"]) == (code, hint)


# What is shown


def test_tables_are_the_data_and_lists_have_commas_or_come_again(capsys):
    code, out, err = run(capsys, "tiny.gguf", *ONCE, "--no-starts", "-p", "8", "-p", "16,24", "-n", "0", "-q")
    assert (code, err) == (0, "")
    assert out.startswith("Prefill (reading a prompt): tiny.gguf\n")
    assert re.findall(r"^(\d+) tokens ", out, re.MULTILINE) == ["8", "16", "24"]
    assert out.endswith("\n") and "\n\n\n" not in out and "\x1b" not in out


def test_compare_has_a_ratio_an_interval_and_a_verdict(capsys):
    code, out, _ = run(capsys, "--compare", "tiny.gguf", "other.gguf", *QUICK)
    table = out[out.index("other.gguf over tiny.gguf: ratio of tokens/s, in turns") :].split("\n\n")[0]
    ratio = r"(?:[\d.]+ \([\d.]+ - [\d.]+\)|[\d.]+ - [\d.]+ \*)"
    verdict = "(?:faster|slower|no difference shown)"
    assert code == 0
    for test in ("prefill 8 tokens", "decode 4 tokens"):
        assert re.search(rf"^{test} +{ratio} +{verdict} +5$", table, re.MULTILINE), table


@pytest.mark.parametrize("form", ["--csv", "--jsonl"])
def test_what_has_no_place_in_a_form_is_said(capsys, form):
    words = ["--compare", "tiny.gguf", "other.gguf", *QUICK, "--target", "pi5-8gb", form]
    code, out, err = run(capsys, *words)
    assert (code, len(out.splitlines())) == (0, 5 if form == "--csv" else 4)
    assert err == f"note: {form} has the speed tests, and not: ratios, predictions; --json has all\n"


def test_llama_cpps_short_options_and_what_they_set(capsys):
    words = ["tiny.gguf", *QUICK, "-ctk", "F32", "-ctv", "bf16", "-fa", "on", "-c", "128", "-d", "3"]
    code, out, err = run(capsys, *words, "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    settings = told["artifacts"][0]["settings"]
    wanted = {"cache_type_k": "f32", "cache_type_v": "bf16", "flash_attn": "on", "ctx": 128, "threads": 1}
    assert settings | wanted == settings
    row = told["results"][0]
    assert [row[name] for name in ("type_k", "type_v", "flash_attn", "n_depth")] == ["f32", "bf16", 1, 3]


@pytest.fixture(scope="module")
def measured(folder: Path) -> BenchResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        options = {"n_prompt": (8,), "n_gen": (4,), "threads": (1,), "max_repetitions": 5, "starts": False}
        return efficli.bench(["tiny.gguf", "cut.gguf"], **options)


def shown(capsys, result: BenchResult, **form: Any) -> str:
    """What the command prints of a result in one of its forms."""
    terminal = Terminal(as_json=form.pop("as_json", False))
    forms = {"csv": False, "jsonl": False, "markdown": False, "chart": None, "force": False} | form
    assert BenchView(terminal=terminal, **forms).finished(result, dry_run=False) == 1
    return capsys.readouterr().out


def test_every_form_has_the_same_figures(capsys, measured):
    told = json.loads(shown(capsys, measured, as_json=True))
    lines = [json.loads(line) for line in shown(capsys, measured, jsonl=True).splitlines()]
    sheet = list(csv.DictReader(io.StringIO(shown(capsys, measured, csv=True))))
    table, markdown = shown(capsys, measured), shown(capsys, measured, markdown=True)
    tests = told["artifacts"][0]["tests"]
    assert [len(rows) for rows in (tests, told["results"], lines, sheet)] == [2] * 4
    for test, result, line, cells in zip(tests, told["results"], lines, sheet, strict=True):
        assert line == result
        assert list(cells) == [name for name in line if not name.startswith("samples_")]
        assert (line["n_prompt"], line["n_gen"]) == (test["n_prompt"], test["n_gen"])
        assert line["samples_ns"] == test["samples_ns"]
        assert line["avg_ns"] == int(cells["avg_ns"]) == pytest.approx(sum(test["samples_ns"]) / 5, abs=1)
        assert line["median_ts"] == pytest.approx(test["rate"]["median"], rel=1e-6)
        assert float(cells["avg_ts"]) == pytest.approx(line["avg_ts"], rel=1e-6)
        low, high = (number(test["rate"][end], test["rate"]["median"]) for end in ("low", "high"))
        assert f"{low} - {high}" in table
        assert f"{low} - {high}" in markdown
    assert {"model_filename", "model_type", "model_size", "n_threads", "type_k", "test_time"} <= lines[0].keys()


def test_what_is_interrupted_says_what_had_failed(capsys, measured):
    view = BenchView(terminal=Terminal(), csv=False, jsonl=False, markdown=False, chart=None, force=False)
    assert view.interrupted(measured)
    out, err = capsys.readouterr()
    assert "Decode" in out
    assert err == f"error: {BROKEN[1][2]}\n{AGAIN}"


def test_a_chart_is_a_picture(capsys, tmp_path):
    path = tmp_path / "speed.png"
    path.touch()
    code, out, err = run(capsys, "tiny.gguf", *QUICK, "--chart", str(path), "--force", "--markdown")
    assert (code, err) == (0, f"note: the chart is {path}\n")
    assert out.startswith("| artifact |")
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert 1000 <= width <= 2400 and 600 <= height <= 1600
    assert [entry.name for entry in tmp_path.iterdir()] == ["speed.png"]


def test_a_chart_without_a_speed_takes_no_figures_with_it(capsys, tmp_path):
    words = [*ONCE, "-p", "0", "-n", "0", "--chart", str(tmp_path / "a.png")]
    code, out, err = run(capsys, "tiny.gguf", *words, "--json")
    assert code == 2
    assert "error: " in err and "no artifact has a speed to draw" in err
    assert len(json.loads(out)["artifacts"][0]["starts"]) == 2


def test_a_dry_run_starts_no_process():
    program = (
        "import sys; from efficli.cli import main\n"
        "watched = ('subprocess.Popen', 'os.fork', 'os.posix_spawn', 'os.system', 'os.exec')\n"
        "sys.addaudithook(lambda event, _: event in watched and sys.exit('started a process'))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    words = "bench --dry-run tiny.gguf cut.gguf -d 0,16 -n 0 --scenario chat --power-command false --target pi5-8gb"
    done = subprocess.run([sys.executable, "-c", program, *words.split()], capture_output=True, text=True)
    plan, conditions = done.stdout.splitlines()
    tests = "prefill 128 tokens, prefill 256 tokens, prefill 128 tokens after 16, prefill 240 tokens after 16"
    assert plan == f"would measure tiny.gguf: cold and warm starts, {tests}, scenario chat"
    assert "context 256" in conditions
    assert (done.returncode, done.stderr) == (1, f"error: {BROKEN[1][2]}\n{AGAIN}")


SCENARIO = """
name: short
about: three words in, four tokens out
kind: request
chat: false
n_gen: 4
requests: 5
objectives: {ttft_ms: 100000, tpot_ms: 0.000001}
prompts: [one two three]
"""


def test_scenarios_and_targets(capsys, tmp_path):
    cli.main(["export", str(write_llama(tmp_path / "m", layers=1)), "-o", str(tmp_path / "o"), "--type", "Q8_0",
              "--no-certificate"])  # fmt: skip
    (tmp_path / "short.yaml").write_text(SCENARIO)
    words = [*QUICK, "--scenario", str(tmp_path / "short.yaml"), "--target", "pi5-8gb,pi4-4gb"]
    code, out, err = run(capsys, str(tmp_path / "o"), "tiny.gguf", *words)
    assert (code, err) == (5, "error: tiny.gguf: short: the file has no tokenizer, so no text can be sent\n")
    scenario = out[out.index("Scenario short") :].split("\n\n")[0]
    assert re.search(r"first token within 100 s +\n.*100 \(57 - 100\) +5\n +tiny.gguf +failed", scenario)
    assert re.search(r"goodput\) +\n.* 0 \(0 - 43\) +5\n +tiny.gguf +failed", scenario)
    predicted = out[out.index("Predictions, not measurements") :]
    assert "measured here   pi5-8gb (predicted)\n" in predicted
    assert "measured here   pi4-4gb (predicted)\n" in predicted
