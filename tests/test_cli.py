"""The command line: help, error lines and exit codes verbatim; what goes to stdout and what to stderr."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

import efficli.pipeline
from efficli import cli, errors
from tests.cli_docs import PAGE, page
from tests.pico import write_llama

EFFICLI = [sys.executable, "-m", "efficli"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("model") / "tiny", layers=1)


@pytest.fixture(scope="module")
def artifact(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("artifact") / "out"
    assert cli.main(["export", str(model), "-o", str(out), "--type", "Q8_0", "--no-certificate"]) == 0
    return out


def run(capsys, *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command line, in this process."""
    capsys.readouterr()
    code = cli.main(list(words))
    out, err = capsys.readouterr()
    return code, out, err


# Parsing


@pytest.mark.parametrize(
    ("words", "line", "hint"),
    [
        ("exprot", "no such command 'exprot'", "did you mean 'export'?"),
        (
            "export m --typ x",
            "no such option: --typ (Possible options: --fit, --output, --type)",
            "efficli export --help",
        ),
        ("export m", "missing option '--output' / '-o'", "efficli export --help"),
        (
            "try a -p x -n 0",
            "invalid value for '--n-gen' / '-n': Input should be greater than or equal to 1",
            "efficli try --help",
        ),
        (
            "export m -o o --tensor-type attn",
            "--tensor-type 'attn', expected REGEX=TYPE",
            "--tensor-type 'attn_v=Q6_K'",
        ),
    ],
)
def test_usage_errors_are_one_line_and_a_hint(capsys, words, line, hint):
    assert run(capsys, *words.split()) == (2, "", f"error: {line}\nhint: {hint}\n")


def test_usage_errors_are_json_with_json(capsys):
    code, out, err = run(capsys, "export", "m", "--json")
    assert json.loads(out)["error"] == {
        "code": 2, "where": None, "message": "missing option '--output' / '-o'", "hint": "efficli export --help",
    }  # fmt: skip
    assert code == 2
    assert err.startswith("error: missing option")


def test_without_a_command_help_is_shown(capsys):
    code, out, err = run(capsys)
    assert (code, err) == (0, "")
    assert "Usage: efficli" in out


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"efficli {efficli.__version__}\n", "")


@pytest.mark.parametrize("words", [["--help"], ["export", "-h"], ["try", "--help"]])
def test_every_help_has_examples_that_parse(capsys, words, monkeypatch):
    code, out, _ = run(capsys, *words)
    assert code == 0
    assert "Examples:" in out
    lines = [line.strip() for line in out.splitlines() if re.match(r"\s+efficli ", line)]
    assert lines
    for line in lines:
        assert parses(line.partition(" && ")[0]), line


def parses(line: str) -> bool:
    """Whether a line of help or README is a command line of today's efficli."""
    import shlex

    words = shlex.split(line)
    assert words[0] == "efficli"
    return isinstance(cli.app(words[1:], prog_name="efficli", standalone_mode=False), cli.Job)


def test_the_reference_page_is_what_the_help_says():
    # In its own process: the width of help is read when Typer is imported.
    done = subprocess.run([sys.executable, "-m", "tests.cli_docs", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert PAGE.read_text().count("## `efficli") == page().count("## `efficli") == 16


@pytest.mark.parametrize("words", [["methods"], ["targets"], ["--version"]])
def test_a_full_disk_behind_stdout_is_no_bug(words):
    with open("/dev/full", "w") as full:  # noqa: PTH123 (a device)
        done = subprocess.run([*EFFICLI, *words], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "error: cannot write to stdout: no space left on device\n")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_offered_and_works(shell):
    environment = {**os.environ, "_EFFICLI_COMPLETE": f"source_{shell}"}
    shown = subprocess.run(EFFICLI, env=environment, capture_output=True, text=True)
    assert "efficli" in shown.stdout, shown.stderr


def test_completion_names_the_commands():
    environment = {**os.environ, "_EFFICLI_COMPLETE": "complete_bash", "COMP_WORDS": "efficli ex", "COMP_CWORD": "1"}
    shown = subprocess.run(EFFICLI, env=environment, capture_output=True, text=True)
    assert shown.stdout.split() == ["export"]


# The error table


@pytest.mark.parametrize(
    ("error", "code", "stderr"),
    [
        (errors.CheckpointError("a", where="b", hint="c"), 1, "error: b: a\nhint: c\n"),
        (errors.OutputError("/out is not writable"), 1, "error: /out is not writable\n"),
        (errors.UsageError("a"), 2, "error: a\n"),
        (
            errors.GateError("mean is 3, expected at most 2 (--max-kld)"),
            3,
            "error: mean is 3, expected at most 2 (--max-kld)\n",
        ),
        (errors.FitError("needs 812 MB, 1 MB free on /out"), 4, "error: needs 812 MB, 1 MB free on /out\n"),
        (
            errors.MissingExtra("llama-cpp-python", "gguf"),
            5,
            "error: this needs llama-cpp-python\nhint: pip install 'efficli[gguf]'\n",
        ),
        (errors.SecurityError("refusing pickle"), 6, "error: refusing pickle\n"),
        (MemoryError(), 4, None),
        (KeyboardInterrupt(), 130, "interrupted; nothing was changed\n"),
        (BrokenPipeError(), 0, ""),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, BaseException) else "",
)
@pytest.mark.parametrize("as_json", [False, True])
def test_each_error_has_its_code_and_its_line(capsys, monkeypatch, error, code, stderr, as_json):
    monkeypatch.setattr(efficli.pipeline, "export", raising(error))
    monkeypatch.setattr("efficli.interrupt.discard", lambda descriptor: None)  # it would close pytest's own
    found, out, err = run(capsys, "export", "m", "-o", "o", *(["--json"] if as_json else []))
    assert found == code
    assert err == stderr if stderr is not None else err.startswith("error: out of memory")
    if as_json and isinstance(error, errors.EffiError):
        told = {"code": code, "where": error.where, "message": error.message, "hint": error.hint}
        assert json.loads(out) == {"error": told}
    elif not isinstance(error, MemoryError):
        assert out == ""


def test_anything_else_is_a_bug_with_its_traceback(capsys, monkeypatch):
    monkeypatch.setattr(efficli.pipeline, "export", raising(ZeroDivisionError("by nothing")))
    code, out, err = run(capsys, "export", "m", "-o", "o")
    assert (code, out) == (70, "")
    assert err.startswith("Traceback")
    assert "ZeroDivisionError: by nothing\nerror: this is a bug of efficli\nhint: report it" in err


def raising(error: BaseException):
    def body(*_: object, **__: object):
        raise error

    return body


# Real runs


def test_export_says_paths_on_stdout_and_tables_on_stderr(capsys, model, tmp_path):
    out_dir = tmp_path / "out"
    code, out, err = run(capsys, "export", str(model), "-o", str(out_dir), "--type", "q8_0,Q4_0", "--no-certificate")
    assert code == 0, err
    paths = [Path(line) for line in out.splitlines()]
    assert [p.suffix for p in paths] == [".gguf", ".gguf"]
    assert all(p.is_file() and p.parent == out_dir for p in paths)
    assert f"Wrote {out_dir} from tiny" in err
    assert "bits/weight" in err
    assert "Tensors whose rows do not fill the blocks of their type" in err  # Q4_0 makes token_embd Q6_K, 64 wide
    assert "\x1b" not in err


def test_a_dry_run_writes_nothing_and_knows_the_size(capsys, model, tmp_path):
    dry = run(capsys, "export", str(model), "-o", str(tmp_path / "a"), "--type", "Q8_0", "--dry-run", "--json")
    assert not (tmp_path / "a").exists()
    wet = run(capsys, "export", str(model), "-o", str(tmp_path / "a"), "--type", "Q8_0", "--no-certificate", "--json")
    (planned,), (written,) = (json.loads(result[1])["files"] for result in (dry, wet))
    path = Path(written["path"])
    assert planned["bytes"] == written["bytes"] == path.stat().st_size
    assert planned["sha256"] is None
    assert written["sha256"] == __import__("hashlib").sha256(path.read_bytes()).hexdigest()


def test_quiet_leaves_data_alone(capsys, model, tmp_path):
    words = ["export", str(model), "-o", str(tmp_path / "a"), "--type", "Q4_0", "--no-certificate", "-q"]
    code, out, err = run(capsys, *words)
    assert (code, err) == (0, "")
    assert out.endswith("Q4_0.gguf\n")


def test_verbose_says_what_each_task_took(capsys, model, tmp_path):
    _, _, err = run(capsys, "export", str(model), "-o", str(tmp_path / "a"), "--type", "Q8_0", "--no-certificate", "-v")
    assert re.search(r"^writing: \d+\.\d s$", err, re.MULTILINE)


def test_a_misspelt_model_suggests_the_near_one(capsys, tmp_path):
    code, _, err = run(capsys, "export", "refrence", "-o", str(tmp_path / "a"))
    assert code == 1
    assert err.startswith("error: no such checkpoint: refrence\nhint: did you mean 'reference'")


def test_an_unknown_type_is_a_usage_error(capsys, model, tmp_path):
    code, _, err = run(capsys, "export", str(model), "-o", str(tmp_path / "a"), "--type", "Q4_K_N")
    assert code == 2
    assert "Q4_K_N" in err
    assert "did you mean" in err


def test_try_continues_the_prompt_on_stdout(capsys, artifact):
    code, out, err = run(capsys, "try", str(artifact), "-p", "ab", "-n", "4")
    assert (code, err) == (0, "")
    assert out.startswith("ab")
    assert len(out) > len("ab\n")


def test_try_beside_its_base(capsys, artifact, model):
    code, out, _ = run(capsys, "try", str(artifact), "--base", str(model), "-p", "ab", "-n", "4")
    assert code == 0
    head, first, second = re.split(r"--- .*\n", out)
    assert head == ""
    assert first.startswith("ab")
    assert second.startswith("ab")


def test_try_with_what_is_not_there_shows_only_the_error(capsys, tmp_path):
    code, out, err = run(capsys, "try", str(tmp_path / "none"), "-p", "ab")
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {tmp_path / 'none'}: no such file")


def test_try_with_json_holds_both_sides(capsys, artifact):
    code, out, _ = run(capsys, "try", str(artifact), "--base", str(artifact), "-p", "ab", "-n", "4", "--json")
    sides = json.loads(out)["sides"]
    assert code == 0
    assert sides["artifact"]["text"] == sides["base"]["text"]
    assert len(sides["base"]["tokens"]) == 4


def test_the_recipe_beside_the_artifact_is_the_command_line(artifact, model):
    from efficli.recipe import load

    recipe = load(artifact / "recipe.yaml")
    assert (recipe.model, recipe.exports[0].type, recipe.certificate.enabled) == (str(model), ("Q8_0",), False)


def test_a_reader_that_leaves_is_no_error(artifact):
    program = f"{sys.executable} -m efficli try {artifact} -p ab -n 16 | head -c 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "a", "")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("export none -o {out} --json | head -c 0", 1),
        ("export none -o {out} --json 2>&1 | head -c 0", 1),
        ("export none -o {out} 2>&1 | head -c 0", 1),
        ("exprot --json 2>&1 | head -c 0", 2),
        ("export {model} -o {out} --type Q4_0 --no-certificate -v --json 2>&1 | head -c 0", 0),
        ("export {model} -o {out} --type Q4_0 --no-certificate -v 2>&1 | head -c 0", 0),
        ("export {model} -o {out} --type Q4_0 --no-certificate -v 2> >(head -c 0)", 0),
    ],
)
def test_readers_that_leave_hide_no_error_and_stop_no_work(model, tmp_path, words, code):
    out = tmp_path / "out"
    shell = f"{sys.executable} -m efficli {words.format(model=model, out=out)}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert out.exists() == (code == 0)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_error(model, tmp_path, closed):
    out = tmp_path / "out"
    words = f"{sys.executable} -m efficli export {model} -o {out} --type Q8_0 --no-certificate {closed}"
    assert subprocess.run(["bash", "-c", words], capture_output=True).returncode == 0
    assert (out / "SHA256SUMS").is_file()


def test_ascii_terminals_and_strange_names_work(model, tmp_path):
    out = tmp_path / "été \udcff x"
    environment = {**os.environ, "LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = [*EFFICLI, "export", str(model), "-o", os.fsencode(out), "--type", "Q8_0", "--no-certificate"]
    done = subprocess.run(words, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert (out / "efficli.json").is_file()


def on_a_terminal(words: list[str], **environment: str) -> str:
    """What a command writes to a terminal of its own."""
    primary, secondary = pty.openpty()
    shell = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", **environment}
    with subprocess.Popen(words, stdin=secondary, stdout=secondary, stderr=secondary, env=shell) as process:
        os.close(secondary)
        written = bytearray()
        while True:
            try:
                piece = os.read(primary, 4096)
            except OSError:  # Linux says EIO when the last writer has gone
                break
            if not piece:
                break
            written += piece
        os.close(primary)
        assert process.wait() == 0, written
    return written.decode()


def test_a_terminal_gets_bars_and_colours_unless_it_does_not_want_them(model, tmp_path):
    words = [*EFFICLI, "export", str(model), "-o", str(tmp_path / "a"), "--type", "Q8_0", "--no-certificate", "--force"]
    colourful = on_a_terminal(words)
    assert "writing" in colourful  # the bar
    assert "\x1b[1m" in colourful
    assert not re.search(r"\x1b\[[0-9;]*3\dm", on_a_terminal(words, NO_COLOR="1"))
    assert not re.search(r"\x1b\[[0-9;]*3\dm", on_a_terminal([*words, "--no-color"]))


def test_two_columns_on_a_terminal(artifact):
    shown = on_a_terminal([*EFFICLI, "try", str(artifact), "--base", str(artifact), "-p", "ab", "-n", "3"])
    assert re.search(r"ab\S+ +ab\S+", shown)


def test_a_closed_stderr_does_not_lend_its_number_to_an_artifact():
    code = "import os; from efficli.interrupt import fill_closed_streams as f; f(); print(os.open('/dev/null', 0) > 2)"
    done = subprocess.run(["bash", "-c", f'{sys.executable} -c "{code}" <&- 2>&-'], capture_output=True, text=True)
    assert done.stdout == "True\n"
