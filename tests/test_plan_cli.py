"""`efficli plan` as it is typed: exit codes, JSON, terminals, models of which only small files are there."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import efficli
from efficli import cli
from tests.checkpoint.test_hub import COMMIT, fill_cache
from tests.planning.weightless import REFERENCE, copy_without_weights

EFFICLI = [sys.executable, "-m", "efficli"]
TINY = """version: 1
like: pi-zero-2w
about: a device with a mebibyte
ram:
  total_mib: {value: 2, source: made up, confidence: vendor}
  usable_mib: {value: 1, source: made up, confidence: vendor}
"""


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    code = cli.main(["plan", *words])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    (tmp_path / "tiny.yaml").write_text(TINY)
    return str(tmp_path / "tiny.yaml")


def test_json_has_all_of_it(capsys):
    code, out, err = run(
        capsys, "reference", "--target", "pi5-8gb,zynq-ultrascale", "-c", "512,2048", "--type", "q4_0", "--json"
    )
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert set(told) == {
        "schema_version", "command", "model", "revision", "architecture", "gguf_arch", "num_weights", "tied_embeddings",
        "vocab_size", "max_context", "sizes_from", "sizes_exact", "exportable", "why_not_exportable",
        "cache_type_k", "cache_type_v", "files", "refused", "memory", "fits", "recommended", "anything_fits",
        "uplinks", "notes",
    }  # fmt: skip
    assert [(fit["target"], fit["ctx"]) for fit in told["fits"]] == [
        ("pi5-8gb", 512), ("pi5-8gb", 2048), ("zynq-ultrascale", 512), ("zynq-ultrascale", 2048),
    ]  # fmt: skip
    assert told["files"][0]["bytes"] == 5434112
    assert [room["kv_cache"]["nbytes"] for room in told["memory"]] == [2 << 20, 8 << 20]
    assert told["uplinks"][0]["files"]["Q4_0"] == {"passes": 1, "days": 0.25, "within_3_passes": True}
    assert (
        told
        == efficli.plan("reference", targets=("pi5-8gb", "zynq-ultrascale"), ctx=(512, 2048), types=("Q4_0",)).to_json()
    )


def test_what_fits_nowhere_is_shown_and_is_exit_4(capsys, tiny):
    code, out, err = run(capsys, "reference", "--target", tiny, "-q")
    assert code == 4
    assert "NO weights" in out and "Q4_K_M" in out
    assert err == (
        "error: nothing fits tiny: Q2_K with a context of 2048 needs 28 MiB, expected at most 1 MiB; limited by the "
        "weights\nhint: a smaller model\n"
    )
    code, out, _ = run(capsys, "reference", "--target", tiny, "--json")
    assert (code, json.loads(out)["anything_fits"]) == (4, False)
    assert run(capsys, "reference", "--target", f"{tiny},pi5-8gb")[0] == 0


@pytest.mark.parametrize(("words", "code", "error"), [
    (["reference", "--target", "pi55-8gb"], 2, "unknown target 'pi55-8gb'"),
    (["reference", "--type", "Q4_9"], 2, "unknown type 'Q4_9'"),
    (["reference", "--ctx-size", "many"], 2, "--ctx-size 'many', expected numbers"),
    (["reference", "--uplink", "32kB/s"], 2, "--uplink '32kB/s' is not a rate in bits"),
    (["reference", "--uplink", "1kbps", "--pass", "8"], 2, "'8' is not a length of time"),
    (["reference", "--chart", "a.png"], 2, "--chart draws what devices do, expected --target"),
    (["./absent"], 1, "absent"),
])  # fmt: skip
def test_wrong_words(capsys, words, code, error):
    found, out, err = run(capsys, *words)
    assert (found, out) == (code, "")
    assert err.startswith("error: ")
    assert error in err


def test_a_family_that_nobody_knows_is_exit_5(capsys, tmp_path):
    made = copy_without_weights(REFERENCE, tmp_path / "odd")
    config = json.loads((made / "config.json").read_text())
    config |= {"architectures": ["OddForCausalLM"], "model_type": "odd"}
    (made / "config.json").write_text(json.dumps(config))
    code, out, err = run(capsys, str(made), "--target", "pi5-8gb")
    assert (code, out) == (5, "")
    assert "OddForCausalLM" in err


def test_a_model_of_the_hub_of_which_only_small_files_are_here(capsys, tmp_path, monkeypatch):
    from huggingface_hub import constants

    (tmp_path / "hub").mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    files = copy_without_weights(REFERENCE, tmp_path / "files")
    fill_cache(tmp_path / "hub", "org/model", files, COMMIT, ("main",))
    code, out, _ = run(capsys, "org/model", "--target", "pi5-8gb", "--json", "--type", "Q8_0")
    told = json.loads(out)
    assert (code, told["model"], told["revision"], told["sizes_from"]) == (0, "org/model", COMMIT, "config")
    assert told["files"][0]["data_bytes"] == efficli.plan("reference", types=("Q8_0",)).files[0].data_nbytes
    assert run(capsys, "org/model", "--revision", "v9")[0] == 1


def test_a_chart_is_drawn_once_and_replaced_by_force(capsys, tmp_path):
    path = tmp_path / "plan.png"
    words = ["reference", "--target", "pi5-8gb", "--type", "Q4_0,Q8_0", "--chart", str(path)]
    code, _, err = run(capsys, *words)
    assert (code, err) == (0, f"note: the chart is {path}\n")
    first = path.read_bytes()
    assert run(capsys, *words)[0] == 1
    assert run(capsys, *words, "--force")[0] == 0
    assert path.read_bytes() == first


def on_a_terminal(columns: int, *words: str) -> list[str]:
    """The lines of a terminal of so many columns."""
    script = (
        "import os, pty, sys\n"
        "pid, master = pty.fork()\n"
        "if not pid:\n"
        "    os.execv(sys.executable, [sys.executable, '-m', 'efficli', 'plan', *sys.argv[1:]])\n"
        "text = b''\n"
        "while True:\n"
        "    try:\n"
        "        text += (piece := os.read(master, 65536))\n"
        "    except OSError:\n"
        "        break\n"
        "os.waitpid(pid, 0)\n"
        "sys.stdout.buffer.write(text)\n"
    )
    command = [sys.executable, "-c", script, *words, "--no-color", "-q"]
    env = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm"}
    done = subprocess.run(command, capture_output=True, check=True, env=env)
    return done.stdout.decode().replace("\r\n", "\n").splitlines()


@pytest.mark.parametrize("columns", [80, 120])
def test_no_line_is_wider_than_the_terminal(columns):
    targets = "snapdragon-855-orbit,jetson-orin-nano,pi-zero-2w,gr740,zynq-ultrascale"
    lines = on_a_terminal(columns, "reference", "--target", targets, "--uplink", "9.6kbps")
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines]
    assert max(map(len, lines)) <= columns
    assert len([line for line in lines if line.startswith("Q4_K_M") and "FIT" in line]) == (2 if columns == 80 else 1)
    heads = [line for line in lines if line.startswith("type ") and "bits/w" in line]
    assert len(heads) == (2 if columns == 80 else 1), "a wider terminal has more devices beside each other"


def test_it_costs_little_and_loads_neither_torch_nor_the_hubs_client():
    code = (
        "import sys; from efficli.cli import main; main(['plan', 'reference', '--target', 'pi5-8gb', '-q']);"
        "sys.stderr.write(' '.join(sys.modules))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr.split()
    heavy = {"torch", "transformers", "huggingface_hub", "matplotlib", "tokenizers", "llama_cpp", "efficli.pipeline"}
    assert "efficli.planning.plan" in loaded
    assert not heavy & set(loaded)


def test_it_takes_at_most_0_8_seconds_of_cpu():
    """Interpreter and child processes included; on a busy machine the best of a few looks counts."""
    assert any(cpu_seconds("reference", "--target", "pi5-8gb") <= 0.8 for _ in range(6))


def cpu_seconds(*words: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*EFFICLI, "plan", *words], capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["-c", "4096"], "error: --ctx-size 4096: reference was made for at most 2048\nhint: --ctx-size 2048\n"),
        (["--target", ""], "error: --target '' names nothing\n"),
        (["--type", ","], "error: --type ',' names nothing\n"),
    ],
)
def test_what_cannot_be_planned_is_no_answer_to_something_else(capsys, words, line):
    assert cli.main(["plan", "reference", *words]) == 2
    assert capsys.readouterr() == ("", line)


def test_a_recipe_is_held_against_its_targets(capsys, tmp_path, tiny, monkeypatch):
    monkeypatch.setenv("EFFICLI_CACHE_DIR", str(tmp_path / "cache"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("version: 1\nmodel: reference\ntarget: pi5-8gb\nctx_size: 4096\nexports: {type: [Q4_0, Q8_0]}\n")
    result = efficli.run(recipe, tmp_path / "out", dry_run=True)
    planned = efficli.plan("reference", targets=("pi5-8gb",), ctx=(2048,), types=("Q4_0", "Q8_0"))
    by_type = {fit.type: fit.to_json() for fit in planned.fits}
    assert len(result.targets) == 2
    for row in result.targets:
        assert {key: row[key] for key in by_type[row["type"]]} == by_type[row["type"]]
        assert row["cells"][:3] == ["pi5-8gb", row["file"], "FIT"]
        assert row["file"] == f"Reference-8.9M-{row['type']}.gguf"
    assert all("cells" not in row for row in result.to_json()["targets"])
    code = cli.main(["run", str(recipe), "--set", f"target={tiny}", "-o", str(tmp_path / "out")])
    out, err = capsys.readouterr()
    assert (code, out) == (4, "")
    assert err == (
        "note: tiny: context of 2048 instead of 4096, the model's longest\n"
        "error: tiny: Reference-8.9M-Q4_0.gguf with a context of 2048 needs 29.08 MiB, expected at most 1.00 MiB; "
        "limited by the weights\nhint: a smaller type\n"
    )
    assert not (tmp_path / "out").exists()
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
