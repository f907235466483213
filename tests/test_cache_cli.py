"""efficli cache: what is kept, and making room; every line and exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from efficli import cli
from efficli.errors import UsageError
from efficli.ops.duration import duration_text, parse_duration
from efficli.store import Store, default_root
from tests.store.results import FILES, fill

SIZE = sum(map(len, FILES.values()))


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFICLI_CACHE_DIR", str(tmp_path / "cache"))
    return default_root()


@pytest.fixture
def kept(root):
    """Three results: of a pass, last used 40 days ago; of a file, 5 hours ago; of a benchmark, now."""
    store = Store(root)
    made = [
        fill(store, kind="pass", method="lowrank.svd"),
        fill(store, kind="write", label="Q4_K_M of tiny"),
        fill(store, kind="bench", types=["Q8_0", "F16"]),
    ]
    for entry, seconds in zip(made, (40 * 86400 + 60, 5 * 3600 + 60, 0), strict=True):
        at = time.time() - seconds
        os.utime(entry.path.parent / "entry.json", (at, at))
    return made


def run(capsys, *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `efficli cache ...`."""
    capsys.readouterr()
    code = cli.main(["cache", *words])
    out, err = capsys.readouterr()
    return code, out, err


def rows(out: str) -> list[list[str]]:
    """The cells of a table."""
    return [line.split("  ") for line in out.splitlines() if "KiB" in line and " result" not in line]


def test_an_empty_cache_says_so(capsys, root):
    assert run(capsys, "ls") == (0, f"no results in {root}\n", "")
    assert run(capsys, "prune", "--all") == (0, f"removed no results; no results left in {root}\n", "")
    code, out, err = run(capsys, "ls", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {
        "schema_version": 1,
        "command": "cache ls",
        "root": str(root),
        "bytes": 0,
        "entries": [],
        "damaged": [],
    }
    assert not root.parent.exists()


def test_results_are_listed_the_last_used_first(capsys, root, kept):
    code, out, err = run(capsys, "ls")
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == f"Results in {root}"
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows(out)]
    assert [row[:3] for row in cells] == [
        ["bench Q8_0 F16", kept[2].key[:8], "39.07 KiB"],
        ["write Q4_K_M of tiny", kept[1].key[:8], "39.07 KiB"],
        ["pass lowrank.svd", kept[0].key[:8], "39.07 KiB"],
    ]
    assert [row[4] for row in cells][1:] == ["5 h", "40 d"]
    assert out.splitlines()[-1] == f"3 results (117.22 KiB) in {root}"


def test_the_list_as_json(capsys, root, kept):
    (root / kept[1].key / "entry.json").write_text("")
    code, out, _ = run(capsys, "ls", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["bytes"] == 2 * SIZE
    assert found["damaged"] == [kept[1].key]
    assert [entry["key"] for entry in found["entries"]] == [kept[0].key, kept[2].key]
    first = found["entries"][0]
    assert (first["kind"], first["what"], first["bytes"]) == ("pass", "lowrank.svd", SIZE)
    assert first["ingredients"] == dict(kept[0].ingredients)
    assert {(one["name"], one["bytes"], one["sha256"]) for one in first["files"]} == {
        (record.name, record.nbytes, record.sha256) for record in kept[0].files.values()
    }
    assert 0 < first["used"] <= first["created"] <= time.time()


def test_damaged_entries_are_named_and_pruned(capsys, root, kept):
    (root / kept[1].key / "entry.json").write_text("")
    _, out, _ = run(capsys, "ls")
    assert out.splitlines()[-1] == f"damaged and of no use: {kept[1].key[:8]}"
    code, out, _ = run(capsys, "prune", "--older-than", "1000d")
    assert (code, out) == (0, f"removed no results, and 1 damaged; 2 results (78.15 KiB) left in {root}\n")
    assert not (root / kept[1].key).exists()


@pytest.mark.parametrize(
    ("words", "gone"),
    [
        ("--older-than 30d", 1),
        ("--older-than 2h", 2),
        ("--older-than 2000h", 0),
        ("--max-bytes 0B", 3),
        ("--max-bytes 50kB", 2),
        ("--max-bytes 1GB", 0),
        ("--all", 3),
        ("--all --kind pass", 1),
        ("--all --kind pass --kind bench", 2),
        ("--older-than 30d --max-bytes 45kB", 2),
    ],
)
def test_what_was_not_used_for_longest_goes(capsys, root, kept, words, gone):
    code, planned, _ = run(capsys, "prune", *words.split(), "--dry-run")
    assert code == 0 and len(Store(root).entries()) == 3
    assert len(rows(planned)) == gone
    code, out, err = run(capsys, "prune", *words.split(), "--json")
    result = json.loads(out)
    assert (code, err) == (0, "")
    assert (len(result["removed"]), result["bytes"], result["kept"]) == (gone, gone * SIZE, 3 - gone)
    left = {entry.key for entry in Store(root).entries()}
    assert left == {entry.key for entry in kept} - {entry["key"] for entry in result["removed"]}


def test_the_words_of_a_prune_and_of_its_dry_run(capsys, root, kept):
    _, out, _ = run(capsys, "prune", "--older-than", "30d", "--dry-run")
    lines = out.splitlines()
    assert lines[0] == f"Would remove from {root}"
    assert lines[-1] == f"would remove 1 result (39.07 KiB); 2 results (78.15 KiB) would stay in {root}"
    _, out, _ = run(capsys, "prune", "--older-than", "30d")
    assert out == f"removed 1 result (39.07 KiB); 2 results (78.15 KiB) left in {root}\n"


@pytest.mark.parametrize(
    ("words", "code", "line", "hint"),
    [
        (
            "prune",
            2,
            "nothing says what to remove, expected --older-than, --max-bytes or --all",
            "efficli cache prune --older-than 30d",
        ),
        (
            "prune --kind pass",
            2,
            "nothing says what to remove, expected --older-than, --max-bytes or --all",
            "efficli cache prune --older-than 30d",
        ),
        (
            "prune --older-than 30",
            2,
            "--older-than: '30' is not a length of time",
            "a number and s, min, h, d or w, as in 30d or 12h",
        ),
        (
            "prune --max-bytes 5G",
            2,
            "--max-bytes: '5G' is not a number of bytes",
            "a number and B, kB, MB, GB, TB (1000s) or KiB, MiB, GiB, TiB (1024s), as in 350MiB",
        ),
        ("prune --all --kind wriet", 2, "--kind 'wriet' is no step whose results are kept", "did you mean 'write'?"),
        ("", 2, "missing command", "efficli cache --help"),
        ("prun", 2, "no such command 'prun'", "did you mean 'prune'?"),
    ],
)
def test_what_makes_no_sense_removes_nothing(capsys, root, kept, words, code, line, hint):
    assert run(capsys, *words.split()) == (code, "", f"error: {line}\nhint: {hint}\n")
    assert len(Store(root).entries()) == 3


def test_a_cache_in_use_is_not_pruned(capsys, root, kept):
    with Store(root).using():
        code, out, err = run(capsys, "prune", "--all", "--json")
        assert code == 1
        assert err == f"error: {root}: another efficli run uses the cache (pid {os.getpid()})\nhint: wait for it\n"
        assert json.loads(out)["error"]["code"] == 1
        assert run(capsys, "ls")[0] == 0
    assert len(Store(root).entries()) == 3


def test_a_cache_that_is_a_file(capsys, root):
    root.parent.mkdir()
    root.write_text("")
    assert run(capsys, "ls")[1] == f"no results in {root}\n"
    assert run(capsys, "prune", "--all")[0] == 0


def test_quiet_still_gives_data(capsys, kept):
    assert kept[0].key[:8] in run(capsys, "ls", "-q")[1]


def test_neither_torch_nor_transformers_is_imported(root, kept):
    code = "import sys; from efficli.cli import main; main(['cache', 'ls']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "3 results" in done.stdout
    assert not {"torch", "transformers", "llama_cpp", "matplotlib"} & set(done.stderr.split())


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30d", 2592000), ("12h", 43200), (" 90 MIN ", 5400), ("1.5h", 5400), ("45s", 45), (".5w", 302400), ("0s", 0)],
)
def test_lengths_of_time(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "d", "-1d", "1e3s", "3 months", "1d2h", "nan d", "1" * 20 + "d", "٣d"])
def test_what_is_no_length_of_time(text):
    with pytest.raises(UsageError, match="is not a length of time"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "0 s"), (0.4, "0 s"), (59.4, "59 s"), (60, "1 min"), (3599, "59 min"), (3600, "1 h"), (86400 * 400, "400 d")],
)
def test_lengths_of_time_as_words(seconds, text):
    assert duration_text(seconds) == text
