"""efficli quantize as it is typed: what is said, what is written, and how what is wrong ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import efficli
from efficli import cli
from efficli.checkpoint import open_checkpoint
from efficli.data import committed
from efficli.pipeline.calibration import SELECTION, calibration
from efficli.recipe import Recipe
from tests.lost_nothing import lost_nothing

TWIN = "reference-twin"
QUICK = ("--loss", "hess", "--swaps", "0", "--threads", "1")


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command line, in this process."""
    capsys.readouterr()
    code = cli.main(list(words))
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four chunks of 512 tokens."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(committed("calibration-code")[:12_000])
    return path


def test_a_dry_run_says_the_size(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with lost_nothing(tmp_path):
        code, out, err = run(capsys, "quantize", TWIN, "-o", str(tmp_path / "out"), "--max-bytes", "400kB", "--dry-run")
        assert (code, out) == (0, f"{tmp_path / 'out'}\n")
        assert "quantize.mixed" in err and "token_embd.weight" in err
        words = ("--bpw", "4.9", "--dry-run", "--json", "--types", "Q4_0,Q8_0,MXFP4", "--harmonize", "qkv,gate-up")
        code, out, _ = run(capsys, "quantize", TWIN, "-o", str(tmp_path / "out"), *words)
    told = json.loads(out)
    assert code == 0 and told["dry_run"] and told["method"] == "quantize.mixed"
    assert told["file"]["bits_per_weight"] <= 4.9
    assert {group["type"] for group in told["file"]["types"]} <= {"Q4_0", "Q8_0", "MXFP4"}


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        ("", 2, "error: no budget, expected one of max_bytes, bpw and fit"),
        ("--max-bytes 1MiB --bpw 4", 2, "error: 'max_bytes' and 'bpw', expected one of"),
        ("--max-bytes much", 2, "error: --max-bytes: 'much'"),
        ("--bpw 4 --types Q4_9", 2, "Q4_9"),
        ("--bpw 4 --ctx-size 64", 2, "'ctx_size' is for 'fit'"),
        ("--bpw 4 --loss guess", 2, "guess"),
        ("--bpw 4 --harmonize all", 2, "all"),
        ("--fit pi6", 2, "unknown target 'pi6'"),
        ("--bpw 4 --target pi6", 2, "unknown target 'pi6'"),
        ("--bpw 4.9 --types Q4_K", 2, "no tensor can be Q4_K"),
        ("--max-bytes 100kB", 4, "the smallest possible file has"),
        ("--bpw 2", 4, "the smallest possible file has"),
        ("--bpw 4.9 --imatrix none.gguf", 1, "none.gguf"),
        ("--bpw 4.9 --calibration none.txt", 1, "none.txt"),
        ("--bpw 4.9 --method nothing", 2, "unknown method"),
    ],
)
def test_what_is_wrong_is_one_line_and_an_exit_code(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: str, code: int, line: str
) -> None:
    with lost_nothing(tmp_path):
        found, out, err = run(capsys, "quantize", TWIN, "-o", str(tmp_path / "out"), *words.split())
    errors = [row for row in err.splitlines() if not row.startswith(("hint: ", "note: "))]
    assert (found, out, len(errors)) == (code, "", 1)
    assert errors[0].startswith("error: ") and line in errors[0]


@pytest.mark.slow
def test_a_checkpoint_its_tables_and_its_file(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: Path) -> None:
    words = ("--max-bytes", "400kB", "--calibration", str(text), *QUICK)
    code, out, err = run(capsys, "quantize", TWIN, "-o", str(tmp_path / "small"), *words)
    assert code == 0
    assert out == f"{tmp_path / 'small'}\n"
    assert "Wrote" in err and "Types" in err and "token_embd.weight" in err and "predicted loss" in err
    code, out, err = run(capsys, "export", str(tmp_path / "small"), "-o", str(tmp_path / "file"), "--no-certificate")
    assert code == 0
    (file,) = (tmp_path / "file").glob("*.gguf")
    assert file.name.endswith("-MIXED.gguf") and 0.99 * 400_000 <= file.stat().st_size <= 400_000
    once = ("--max-bytes", "400kB", "--no-certificate", "--dry-run")
    assert run(capsys, "export", TWIN, "-o", str(tmp_path / "once"), *once)[0] == 0


@pytest.mark.slow
def test_a_second_budget_takes_what_the_first_measured(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EFFICLI_CACHE_DIR", str(tmp_path / "cache"))
    found = []
    for budget in ("400kB", "450kB"):
        words = ("--max-bytes", budget, "--calibration", str(text), *QUICK, "--json")
        code, out, _ = run(capsys, "quantize", TWIN, "-o", str(tmp_path / budget), *words)
        assert code == 0
        found.append({step["kind"]: step["cached"] for step in json.loads(out)["steps"]})
    assert found[0]["calibrate"] is False and found[0]["curves"] is False and found[0]["pass"] is False
    assert found[1]["calibrate"] is True and found[1]["curves"] is True and found[1]["pass"] is False


def test_chunks_are_for_calibration_or_for_selection(text: Path) -> None:
    """One of four for selection, none of them for both, and the same every time."""
    ckpt = open_checkpoint(TWIN)
    for tokens, size in ((512, 512), (1024, 512), (1536, 512), (4096, 256), (4096, 64)):
        values = {
            "version": 1,
            "model": TWIN,
            "calibration": {"text": str(text), "ctx_size": size, "max_tokens": tokens},
        }
        recipe = Recipe.model_validate(values)
        found = calibration(ckpt, recipe, bos=0)
        both = set(found.chunks) & set(found.selection)
        assert not both or len(found.chunks) == 1 == tokens // size
        assert all(len(chunk) == size and chunk[0] == 0 for chunk in (*found.chunks, *found.selection))
        together = len(set(found.chunks) | set(found.selection))
        assert together <= tokens // size and len(found.selection) == max(1, together // SELECTION)
        assert calibration(ckpt, recipe, bos=0) == found
        other = calibration(ckpt, recipe.model_copy(update={"seed": 1}), bos=0)
        assert sorted(other.selection) == sorted(found.selection) and other.chunks == found.chunks
        assert calibration(ckpt, recipe, bos=None).sha256 != found.sha256


def test_it_is_in_the_library(tmp_path: Path) -> None:
    with pytest.raises(efficli.errors.UsageError, match="expected one of max_bytes, bpw and fit") as raised:
        efficli.compress(TWIN, tmp_path / "out", method="quantize.mixed")
    assert raised.value.exit_code == 2
