"""docs/ci.md is true: its shell lines run, its files parse, its commands are those of the program."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from efficli import cli
from efficli.artifact import read_artifact

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
SCRIPT, CODES = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
FILES = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]
QUICK = "--set certificate.text=text.txt --set certificate.ctx_size=128 --set bench.n_prompt=16 --set bench.n_gen=8"
"""What the test adds: less to measure."""


def bash(lines: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The lines in a folder with the recipes, with this interpreter's programs first."""
    if not (folder / "recipes").exists():
        (folder / "recipes").symlink_to(ROOT / "recipes")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    words = {"PATH": path, "EFFICLI_CACHE_DIR": str(folder / "kept"), "OMP_NUM_THREADS": "1"} | environment
    kept = {name: value for name, value in os.environ.items() if name != "GITHUB_STEP_SUMMARY"}
    return subprocess.run(["bash", "-c", lines], cwd=folder, env=kept | words, capture_output=True, text=True)


def test_the_exit_codes_as_they_are_told(tmp_path):
    done = bash(CODES, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "size: a smaller type; or a target, the disk or the memory\n"
    assert not (tmp_path / "small").exists()
    (suite,) = ElementTree.parse(tmp_path / "small.xml").getroot()
    assert [case.get("name") for case in suite if case.find("failure") is not None] == ["max_bytes"]
    missing = bash(CODES.replace("ci-gate", "none"), tmp_path)
    assert missing.returncode == 2 and missing.stdout == ""


@pytest.mark.slow
def test_the_script_compresses_and_gates_and_the_next_job_takes_what_is_kept(tmp_path):
    assert "-o out" in SCRIPT
    script = SCRIPT.replace("-o out", f"{QUICK} -o out")
    text = (ROOT / "efficli" / "reference" / "text" / "evaluation-prose.txt").read_text(encoding="utf-8")
    (tmp_path / "text.txt").write_text(text[:12000], encoding="utf-8")
    step = tmp_path / "step.md"
    for job in ("first", "second"):
        done = bash(script, tmp_path, GITHUB_STEP_SUMMARY=str(step))
        assert done.returncode == 0, done.stderr
        read_artifact(tmp_path / "out").verify()
        (suite,) = ElementTree.parse(tmp_path / "gates.xml").getroot()
        assert [case.get("name") for case in suite] == ["run", "max_bytes", "max_kld", "min_top1", "min_decode"]
        assert suite.get("failures") == suite.get("errors") == "0"
        taken = re.findall(r"^(write|certificate) .* from the cache$", done.stderr, re.MULTILINE)
        assert taken == ([] if job == "first" else ["write", "certificate"])
    assert step.read_text().count("## efficli: reference") == 2
    assert not (tmp_path / "summary.md").exists() and (tmp_path / "out.tar").stat().st_size > 9_000_000
    unmet = bash(script.replace("-o out", "--set gates.min_top1=1 -o out"), tmp_path)
    assert unmet.returncode == 3 and "**not met**" in (tmp_path / "summary.md").read_text()
    read_artifact(tmp_path / "out").verify()  # that of the second job


def commands(lines: str) -> list[list[str]]:
    joined = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", lines.replace("\\\n", " "))
    return [shlex.split(line.partition(" || ")[0]) for line in joined.splitlines() if line.startswith("efficli ")]


def test_the_commands_are_command_lines():
    found = commands(SCRIPT) + commands(CODES)
    assert len(found) == 3
    for words in found:
        assert isinstance(cli.app(words[1:], prog_name="efficli", standalone_mode=False), cli.Job)
    for option in set(re.findall(r"`(--[a-z-]+)", PAGE)):
        assert option in (ROOT / "docs" / "cli.md").read_text(encoding="utf-8"), option


def test_the_files_of_jobs_install_as_this_repository_does_and_run_the_script():
    actions, gitlab = FILES
    steps = actions["jobs"]["compress"]["steps"]
    ran = [line for step in steps for line in step.get("run", "").splitlines()]
    assert ran == gitlab["compress"]["script"][1:] and ran[-1] == "bash ci/compress.sh"
    scripts = [word.removeprefix("efficli/") for line in ran for word in line.split() if word.startswith("efficli/")]
    assert scripts and all((ROOT / name).exists() for name in scripts)
    assert {step["with"]["path"] for step in steps if "upload" in step.get("uses", "")} == {"out.tar", "gates.xml"}
    assert "tar -cf out.tar" in SCRIPT and "--junit gates.xml" in SCRIPT
    kept = next(step for step in steps if "cache" in step.get("uses", ""))["with"]["path"].split()
    assert kept == [".efficli-cache", "~/.cache/efficli/wheels"]
