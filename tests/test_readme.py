"""The README is true: its commands parse, its functions run, its files exist."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from efficli import cli, errors
from tests.pico import write_llama

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DECISIONS = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs" / "decisions").glob("*.md"))]
PAGES = ["README.md", "benchmarks/README.md", "docs/ci.md", "docs/log.md", "CHANGELOG.md", *DECISIONS]


def blocks(language: str) -> list[str]:
    """Fenced blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


COMMANDS = [line for block in blocks("sh") for line in block.splitlines() if re.match("efficli [a-z]", line)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("readme") / "model", layers=1)


WORKLOAD = ("-p", "-n", "-d", "-t", "-r")
SIZES = {"4MiB": "60kB", "3.5": "9", "qkv,gate-up": "gate-up"}
"""For budgets: what a model of a few thousand weights can have."""
SHORT = ["-r", "5", "--max-repetitions", "5", "-p", "8", "-n", "4", "--no-starts"]
"""For bench: what takes long, and what takes no time."""


def test_there_are_commands():
    assert len(COMMANDS) >= 5


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_is_a_command_line(line):
    assert isinstance(cli.app(shlex.split(line)[1:], prog_name="efficli", standalone_mode=False), cli.Job)


def test_the_commands_run_on_a_small_model(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    text = tmp_path / "text.txt"
    text.write_text("def read(path):\n    return open(path).read()\n" * 200)
    for line in COMMANDS:
        words = shlex.split(line)[1:]
        words = [str(model) if word in ("./SmolLM2-135M", "org/name", "reference") else word for word in words]
        if words[0] == "export" and "--dry-run" not in words:
            words += ["--no-certificate", "--force"]
        # random weights meet no gate, a folder has no revision
        for option in (
            "--max-kld",
            "--min-top1",
            "--revision",
            "--imatrix",
            *(WORKLOAD if words[0] == "bench" else ()),
            *(("--ctx-size",) if words[0] == "plan" else ()),  # longer than the small model's
        ):
            if option in words:
                del words[words.index(option) : words.index(option) + 2]
        if words[0] == "quantize" or {"--max-bytes", "--bpw", "--fit"} & set(words):
            words = [SIZES.get(word, word) for word in words]
        if words[0] == "quantize" and not Path("small").exists():
            words += ["--calibration", str(text), "--swaps", "0"]
        elif words[0] == "quantize" or {"--max-bytes", "--bpw", "--fit"} & set(words):
            words += ["--dry-run"]  # the slices in efficli have 100 000 tokens
        if words[0] == "run":
            words = [word for word in words if word not in ("--dry-run", "--rehearse")]
            words += ["--set", f"model={model}", "--dry-run"]
        files = [str(path) for path in sorted(Path("out").glob("*.gguf"))]
        if words[0] == "try":
            words[1] = files[0]
        if words[0] == "bench":
            words += [*SHORT, *(files[:1] if "--compare" in words and len(files) < 2 else [])]
        assert cli.main(words) == 0, (line, capsys.readouterr().err)


def test_the_python_example_runs(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (example,) = blocks("python")
    exec(compile(example.replace('"reference"', repr(str(model))), "README.md", "exec"), {})
    assert float(capsys.readouterr().out) >= 0


def test_the_make_targets_exist():
    targets = set(re.findall(r"`make ([a-z-]+)`|^    make ([a-z-]+)", "\n".join(_read(p) for p in PAGES), re.MULTILINE))
    for target in {a or b for a, b in targets}:
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", _read(page)):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target


def test_the_picture_of_the_house_names_what_is_there():
    (picture,) = blocks("text")
    named = set(re.findall(r"[a-z_]+(?:\.py|/)", picture))
    assert {name for name in named if not (ROOT / "efficli" / name).exists()} == set()
    shown = {path.name for path in (ROOT / "efficli").glob("[a-z]*.py")} | {"checkpoint/", "export/", "bench/", "ops/"}
    small = {
        "chat.py",
        "interrupt.py",
        "strict_yaml.py",
        "strict_schema.py",
        "schema_types.py",
    }  # parts of what is named
    assert shown - named - small == set()


def test_the_exit_codes_are_those_of_the_errors():
    told = {int(code) for code in re.findall(r"\| (\d+) \|", README)}
    raised = {
        kind.exit_code for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)
    }
    assert told == raised | {0, 70}


def test_the_version_is_in_the_changelog_or_unreleased():
    from efficli import __version__

    text = _read("CHANGELOG.md")
    assert "## [Unreleased]" in text or f"## [{__version__}]" in text


def _read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")
