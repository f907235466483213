"""`efficli targets` as it is typed: the list, one device, a machine that is measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from efficli import cli
from efficli.pipeline import targets as pipeline
from efficli.target import load_target, target_names
from efficli.target.profile import parse_target
from efficli.target.table import figures, overview

MINE = "version: 1\nlike: pi5\nabout: mine\npower:\n  idle_w: {value: 3, source: meter, confidence: measured}\n"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers of a megabyte: what is measured is wrong, and soon there."""
    monkeypatch.setattr(pipeline, "BUFFER_BYTES", 1 << 20)
    monkeypatch.setattr(pipeline, "BEYOND", 0)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    code = cli.main(["targets", *words])
    out, err = capsys.readouterr()
    return code, out, err


def on_80_columns(*words: str) -> list[str]:
    """The lines of a terminal of 80 columns."""
    script = (
        "import os, pty, sys\n"
        "pid, master = pty.fork()\n"
        "if not pid:\n"
        "    os.execv(sys.executable, [sys.executable, '-m', 'efficli', 'targets', *sys.argv[1:]])\n"
        "text = b''\n"
        "while True:\n"
        "    try:\n"
        "        text += (piece := os.read(master, 65536))\n"
        "    except OSError:\n"
        "        break\n"
        "os.waitpid(pid, 0)\n"
        "sys.stdout.buffer.write(text)\n"
    )
    command = [sys.executable, "-c", script, *words, "--no-color"]
    done = subprocess.run(command, capture_output=True, check=True, env={**os.environ, "COLUMNS": "80"})
    return done.stdout.decode().replace("\r\n", "\n").splitlines()


def test_the_list_names_every_device_once_under_its_group(capsys):
    code, out, err = run(capsys)
    assert (code, err) == (0, "")
    firsts = [line.split()[0] for line in out.splitlines() if line.strip()]
    assert [firsts.count(name) for name in target_names()] == [1] * len(target_names())
    groups = [line for line in out.splitlines() if line in ("Raspberry Pi", "phone", "board", "satellite", "x86")]
    assert groups == ["Raspberry Pi", "phone", "board", "satellite", "x86"]
    assert "others" not in firsts


def test_a_row_says_what_the_profile_says(capsys):
    out = run(capsys)[1]
    row = next(line.split() for line in out.splitlines() if line.startswith("pi5-8gb"))
    assert row == ["pi5-8gb", "pi5-8g", "7.2", "9.5", "dotprod", "both", "published"]
    row = next(line.split() for line in out.splitlines() if line.startswith("jetson-orin-nano"))
    assert row == ["jetson-orin-nano", "orin-nano", "4.8", "50*", "dotprod", "both", "published"]
    row = next(line.split() for line in out.splitlines() if line.startswith("gr740 "))
    assert row == ["gr740", "0.88", "-", "-", "none", "-"]
    assert "pi5-8gb" in out[: out.index("pi5-16gb")]
    assert "myriad2, myriadx: it takes compiled blobs" in out


def test_nothing_is_folded_at_80_columns():
    lines = on_80_columns()
    assert max(map(len, lines)) <= 80
    firsts = [line.split()[0] for line in lines if line.strip()]
    assert set(target_names()) <= set(firsts)
    for name in target_names():
        assert len(next(line for line in lines if line.startswith(f"{name} ")).split()) >= 6


@pytest.mark.parametrize("name", ["pi5-16gb", "agx-orin"])
def test_nor_are_the_figures_of_one_device(name):
    lines = on_80_columns(name)
    assert max(map(len, lines)) <= 80
    rows = lines[3 : lines.index("")]
    assert len(rows) == len(list(figures(load_target(name))))


def test_a_device_shows_each_figure_with_unit_range_source_and_confidence(capsys):
    code, out, err = run(capsys, "pi5-8gb")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "pi5-8gb: Raspberry Pi 5, 8 GB"
    decode = next(line.split() for line in lines if line.startswith("decode, llama.cpp, 4 threads, GB/s"))
    assert decode[-5:-1] == ["9.5", "8.3-12.1", "published", "(17)"]
    (source,) = [line for line in lines if line.startswith(f"{decode[-1]}  ")]
    assert source == f"{decode[-1]}  {load_target('pi5').decode[0].gb_per_s.source}"
    assert "also called pi5-8g, pi5" in lines
    rows = lines[3 : lines.index("")]
    assert [row.split("   ")[0] for row in rows] == [
        f"{label}, {unit}" if unit else label for label, _, unit in figures(load_target("pi5"))
    ]


def test_what_a_satellite_is_reached_by_and_what_a_runtime_lacks(capsys):
    out = run(capsys, "zynq7020")[1]
    assert "uplink, kbit/s" in out and "link: S-band" in out
    assert "lacks TQ1_0, TQ2_0: " in run(capsys, "orin-nano")[1]


@pytest.mark.parametrize("words", [["PI5", "--json"], ["--json", "pi5-8g"], ["show", "pi5-8gb", "--json"]])
def test_json_of_one_device_wherever_the_option_stands(capsys, words):
    code, out, err = run(capsys, *words)
    found = json.loads(out)
    assert (code, err, found["schema_version"], found["command"]) == (0, "", 1, "targets")
    target = found["target"]
    listed = target.pop("figures")
    assert target == load_target("pi5-8gb").to_json()
    decode = next(one for one in listed if one["figure"] == "decode, llama.cpp, 4 threads")
    assert decode == {
        "figure": "decode, llama.cpp, 4 threads", "unit": "GB/s", "value": 9.5, "low": 8.3, "high": 12.1, "n": 17,
        "source": load_target("pi5-8gb").decode[0].gb_per_s.source, "confidence": "published",
    }  # fmt: skip
    assert all(one["low"] <= one["value"] <= one["high"] and one["source"] for one in listed)


def test_json_of_all(capsys):
    found = json.loads(run(capsys, "--json")[1])
    assert [one["name"] for one in found["targets"]] == list(target_names())


@pytest.mark.parametrize(
    ("words", "line", "hint"),
    [
        (["pi5-8b"], "unknown target 'pi5-8b'", "did you mean 'pi5-8gb' or 'pi5-4gb' or 'pi4-8gb'?"),
        (["phone-higg"], "unknown target 'phone-higg'", None),
        (["probee"], "unknown target 'probee'", "`efficli targets` lists them"),
        (["./none.yaml"], "no such target: none.yaml", None),
        (["pi5", "pi4"], "got unexpected extra argument(s) (pi4)", "efficli targets show --help"),
        (["--jsn"], "no such option: --jsn (Possible options: --json)", None),
        (["probe", "x"], "got unexpected extra argument(s) (x)", "efficli targets probe --help"),
        (["probe", "-o", "here.txt"], "-o here.txt, expected a name that ends in .yaml", None),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(capsys, tmp_path, monkeypatch, words, line, hint):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *words)
    first, *rest = err.splitlines()
    assert (code, out, first) == (2, "", f"error: {line}")
    if hint:
        assert rest[0].startswith(f"hint: {hint}")


def test_a_file_of_ones_own_by_path(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("board.yaml").write_text(MINE)
    code, out, err = run(capsys, "board.yaml")
    assert (code, err) == (0, "")
    assert out.startswith("board: mine\n") and "power, idle, W" in out
    Path("board.yaml").write_text(MINE.replace("value: 3", "vlaue: 3"))
    code, out, err = run(capsys, "board.yaml")
    assert (code, out) == (2, "")
    assert err.startswith("error: board.yaml:5: unknown key 'power.idle_w.vlaue'")
    assert "hint: did you mean 'value'?" in err


def test_a_profile_of_ones_own_has_no_group_and_is_listed_last():
    own = parse_target("version: 1\narch: aarch64\nabout: b\ncores: [{count: 1, name: x}]\nruns: [gguf, onnx]\n"
                       "ram:\n  total_mib: {value: 9, source: s, confidence: vendor}\n"
                       "  usable_mib: {value: 8, source: s, confidence: vendor}\n"
                       "bandwidth:\n  read: {value: 8, source: s, confidence: vendor}\n", "b")  # fmt: skip
    titles = [title for title, _, _ in overview([own, load_target("pi5")])]
    assert titles == ["Raspberry Pi", "others"]


@pytest.mark.parametrize("words", [["probe", "--quick"], ["--quick", "probe"]])
def test_a_probe_prints_a_profile_that_loads(capsys, small, words):
    code, out, err = run(capsys, *words, "-q")
    assert (code, err) == (0, "")
    assert parse_target(out, "here").decode[0].gb_per_s.confidence == "estimate"


def test_a_probe_writes_a_file_and_tells_it_as_json(capsys, small, tmp_path):
    path = tmp_path / "here.yaml"
    code, out, _ = run(capsys, "probe", "--quick", "-o", str(path), "--json", "-q")
    found = json.loads(out)
    assert (code, found["command"], found["output"]) == (0, "targets probe", str(path))
    assert found["target"]["name"] == "here"
    assert {one["figure"] for one in found["target"]["figures"]} >= {"memory", "read", "copy, 1 thread"}
    code, out, err = run(capsys, "probe", "--quick", "-o", str(path))
    assert (code, out, err) == (1, "", f"error: {path}: exists\nhint: --force replaces it\n")
    code, out, _ = run(capsys, "probe", "--quick", "-o", str(path), "--force", "-q")
    assert (code, out) == (0, f"{path}\n")


def test_help_shows_both_ways(capsys):
    assert cli.main(["targets", "--help"]) == 0
    out = capsys.readouterr().out
    assert "[NAME | FILE.yaml] | probe" in out and "efficli targets probe -o my-board.yaml" in out
    assert cli.main(["targets", "probe", "--help"]) == 0
    assert "--quick" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["pi5"], ["probe", "--quick", "-q"]])
def test_no_torch_no_transformers_no_llama_cpp_is_imported(words):
    code = (
        "import sys; from efficli.pipeline import targets; targets.BUFFER_BYTES, targets.BEYOND = 1 << 20, 0\n"
        f"from efficli.cli import main; assert main({['targets', *words]!r}) == 0\n"
        "names = {name.partition('.')[0] for name in sys.modules}\n"
        "sys.exit(repr(names & {'torch', 'transformers', 'llama_cpp', 'onnx', 'onnxruntime', 'matplotlib'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "set()\n"
