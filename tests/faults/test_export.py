"""The real command under faults: whole or absent, the same bytes everywhere, one line for whatever went wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from efficli.artifact import read_artifact
from tests.faults.preload import ROOT, sweep
from tests.faults.process import listen
from tests.lost_nothing import fingerprint, lost_nothing
from tests.pico import write_llama

PREPARE = "import sys; from efficli.cli import main; "


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint that is converted in no time."""
    return write_llama(tmp_path_factory.mktemp("in") / "pico")


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory):
    """A checkpoint that takes seconds as IQ3_S."""
    return write_llama(tmp_path_factory.mktemp("in") / "slow", hidden=768, layers=4, heads=12, ffn=2048)


def command(model: Path, out: Path, *options: str) -> list[str]:
    return ["export", str(model), "-o", str(out), "--no-certificate", *options]


def start(
    arguments: Sequence[str], code: str | None = None, env: dict[str, str] | None = None, **options
) -> subprocess.Popen[str]:
    """`python -m efficli ...`, or the same after the lines of `code`."""
    begin = ["-m", "efficli"] if code is None else ["-c", f"{code}\n{PREPARE}sys.exit(main())"]
    options.setdefault("stdout", subprocess.PIPE)
    options.setdefault("preexec_fn", listen)
    environment = dict(os.environ if env is None else env)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, *begin, *arguments],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        **options,
    )


def run(
    arguments: Sequence[str], code: str | None = None, env: dict[str, str] | None = None, **options
) -> tuple[int, str]:
    """Exit code and stderr."""
    with start(arguments, code, env, **options) as process:
        _, told = process.communicate(timeout=120)
    return process.returncode, told


def errors(told: str) -> list[str]:
    """The lines of stderr that tell an error."""
    assert "Traceback" not in told, told
    return [line for line in told.splitlines() if line.startswith(("error:", "interrupted"))]


def bytes_of(out: Path) -> dict[str, str]:
    """What is at OUT but the run's report."""
    read_artifact(out).verify()
    content = fingerprint(out)
    del content["run.json"]
    return content


# Rows 46, 47, 53: the sweep over the real writer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("previous", "faults"),
    [
        (True, [("kill", "none")]),
        (True, [("torn", "none")]),
        (True, [("loss", "none")]),
        (True, [("once", "EIO"), ("from", "EIO")]),
        (True, [("once", "ENOSPC"), ("from", "ENOSPC")]),
        (False, [("kill", "none"), ("from", "EIO")]),
    ],
)
def test_every_call_of_an_export(model, monkeypatch, previous, faults):
    monkeypatch.setenv("SWEEP_MODEL", str(model))
    table = sweep("export", previous=previous, faults=faults, inputs=str(model))
    assert table["corrupt"] == []
    assert sum(table["outcomes"].values()) == len(faults) * table["calls"]


@pytest.mark.slow
@pytest.mark.parametrize("faults", [[("kill", "none")], [("loss", "none")], [("from", "ENOSPC")]], ids=str)
def test_some_calls_of_a_whole_export(model, monkeypatch, faults):
    """With the children that load the file and compare token ids."""
    monkeypatch.setenv("SWEEP_MODEL", str(model))
    table = sweep("export_whole", previous=True, faults=faults, inputs=str(model), every=9)
    assert table["corrupt"] == []
    assert sum(table["outcomes"].values()) >= 4


# Rows 45, 46, 55: limits


def test_a_limit_of_the_file_size(model, tmp_path):
    assert run(command(model, tmp_path / "out", "--type", "Q4_0"))[0] == 0
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))"
    with lost_nothing(tmp_path), lost_nothing(model.parent):
        status, told = run(command(model, tmp_path / "out", "--type", "Q8_0", "--force"), limit)
    assert status == 1
    assert len(errors(told)) == 1
    assert errors(told)[0].endswith("larger than the file system or `ulimit -f` allows (previous artifact kept)")


def test_no_space_before_anything_is_written(model, tmp_path):
    full = "import os; os.statvfs = lambda path: os.statvfs_result((4096, 4096, 100, 5, 5, 9, 9, 9, 0, 255))"
    with lost_nothing(tmp_path):
        status, told = run(command(model, tmp_path / "out"), full)
    assert status == 4
    assert errors(told)[0].startswith("error: needs 1 MB, 20 kB free on ")


@pytest.mark.parametrize(
    "more", [pytest.param(0, marks=pytest.mark.slow), 8, 32, pytest.param(96, marks=pytest.mark.slow)]
)
def test_little_address_space(slow_model, tmp_path, more):
    """Works or says in one line that memory ran out; never a crash, never half a file."""
    limit = f"""
import resource
from pathlib import Path
import efficli.cli, efficli.pipeline, efficli.tables, efficli.console, rich.progress, rich.table, llama_cpp
pages = int(Path("/proc/self/statm").read_text().split()[0])
size = pages * resource.getpagesize() + ({more} << 20)
resource.setrlimit(resource.RLIMIT_AS, (size, size))
"""
    published = ["out"] if more > 64 else []
    with lost_nothing(slow_model.parent), lost_nothing(tmp_path, published=published):
        status, told = run(command(slow_model, tmp_path / "out", "--type", "Q8_0"), limit)
    if (tmp_path / "out").exists():
        assert status == 0
        read_artifact(tmp_path / "out").verify()
    else:
        assert status == 4, told
        assert [line.startswith("error: out of memory") for line in errors(told)] == [True]


# Rows 48, 49, 50: places


def test_places_that_are_refused_before_anything_is_read(model, tmp_path):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("mine")
    cases = {
        str(model): (2, "would overwrite the input"),
        str(model / "gguf"): (2, "would overwrite the input"),
        ".": (2, "would replace the current directory"),
        str(tmp_path / "foreign"): (1, "exists and was not made by efficli"),
        str(tmp_path / "foreign" / "thesis.tex"): (1, "exists and is a file"),
        str(tmp_path / "foreign" / "thesis.tex" / "out"): (1, "is not a directory"),
    }
    for out, (code, words) in cases.items():
        with lost_nothing(tmp_path), lost_nothing(model.parent):
            status, told = run(command(model, Path(out)), cwd=tmp_path)
        assert status == code, told
        assert words in errors(told)[0]


# Row 54: signals


def begin_slowly(slow_model: Path, out: Path) -> subprocess.Popen[str]:
    """An export that is in the middle of its conversion."""
    process = start(command(slow_model, out, "--type", "IQ3_S"))
    end = time.monotonic() + 30
    while not any(out.parent.glob(".efficli-tmp-*/*.gguf")) and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.3)
    assert process.poll() is None, process.communicate()[1]
    return process


@pytest.mark.parametrize(
    ("numbers", "code"),
    [([signal.SIGINT], 130), ([signal.SIGINT] * 2, 130), ([signal.SIGTERM], 143), ([signal.SIGHUP], 129)],
)
def test_a_signal_in_the_middle_of_a_conversion(slow_model, tmp_path, numbers, code):
    place = tmp_path / "out"
    with lost_nothing(tmp_path), lost_nothing(slow_model.parent), begin_slowly(slow_model, place) as process:
        began = time.monotonic()
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.05)
        _, told = process.communicate(timeout=30)
        seconds = time.monotonic() - began
    assert process.returncode == code
    assert errors(told) == ["interrupted; nothing was changed"]
    assert seconds < 1.5


def children(process: subprocess.Popen[str]) -> set[str]:
    """Process ids of a process's children."""
    return set(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())


@pytest.mark.parametrize(
    ("nth", "options"), [(1, ["--no-certificate"]), (3, [])], ids=["load check", "certificate, after two others"]
)
def test_ctrl_c_while_a_child_works(model, tmp_path, nth, options):
    """As a terminal sends it: to the command and its child at once. Neither says anything else, and both are gone."""
    words = ["export", str(model), "-o", str(tmp_path / "out"), "--type", "Q8_0", *options]
    with lost_nothing(tmp_path), start(words, start_new_session=True) as process:
        seen: set[str] = set()
        while len(seen) < nth:
            assert process.poll() is None, process.communicate()[1]
            seen |= children(process)
            time.sleep(0.005)
        time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)
        _, told = process.communicate(timeout=30)
    assert (process.returncode, told) == (130, "interrupted; nothing was changed\n")
    assert not [child for child in seen if Path("/proc", child).exists()]


def test_killed_in_the_middle_and_run_again(slow_model, model, tmp_path):
    with lost_nothing(tmp_path, temporary=True), begin_slowly(slow_model, tmp_path / "out") as process:
        process.kill()
    assert any(tmp_path.glob(".efficli-tmp-*"))
    assert run(command(model, tmp_path / "out", "--type", "Q8_0"))[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_second_run_on_the_same_output(slow_model, model, tmp_path):
    with begin_slowly(slow_model, tmp_path / "out") as first:
        status, told = run(command(model, tmp_path / "out", "--force"))
        assert first.poll() is None
        first.kill()
    assert status == 1
    assert errors(told) == [f"error: another efficli run holds {tmp_path / 'out'} (pid {first.pid})"]


# Row 57


def test_an_input_that_changes_meanwhile(tmp_path):
    changing = write_llama(tmp_path / "changing", hidden=768, layers=4, heads=12, ffn=2048)
    (tmp_path / "place").mkdir()
    place = tmp_path / "place" / "out"
    with lost_nothing(tmp_path / "place"), begin_slowly(changing, place) as process:
        with (changing / "model.safetensors").open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"\0\0\0\0")
        _, told = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors(told) == ["error: model.safetensors: input changed while reading"]


# Row 58

KILLER = """
import os, sys
if "-c" in sys.orig_argv and any("child.serve" in word for word in sys.orig_argv):
    import llama_cpp.llama_cpp as bindings
    bindings.llama_model_load_from_file = lambda *arguments: os.kill(os.getpid(), {number})
"""


@pytest.mark.parametrize("number", [4, 6, 9, 11])
def test_a_runtime_that_crashes(model, tmp_path, number):
    """llama.cpp dies where it loads the file, as with an illegal instruction, an assertion, the OOM killer, AMX."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(KILLER.format(number=number))
    (tmp_path / "place").mkdir()
    with lost_nothing(tmp_path / "place"):
        arguments = command(model, tmp_path / "place" / "out", "--type", "Q8_0")
        status, told = run(arguments, env={**os.environ, "PYTHONPATH": str(tmp_path / "site")})
    (line,) = errors(told)
    if number == 9:
        assert status == 4
        assert line.startswith("error: out of memory while loading ")
        return
    assert status == 5
    assert line.startswith(f"error: llama.cpp crashed (signal {number}) while loading ")
    if number in (4, 11):
        assert "processor" in line
        assert "scripts/install-llama.sh" in told


# Rows 56 and 60: the same bytes

ODD = os.fsdecode(b" sp ace\t\xc3\xa4 \xff\xfe '\"$")


def surroundings() -> dict[str, dict[str, str]]:
    plain = {"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1"}
    return {
        "hash seed": {**os.environ, "PYTHONHASHSEED": "1"},
        "time zone": {**os.environ, "PYTHONHASHSEED": "2", "TZ": "Pacific/Kiritimati"},
        "no home": {**plain, "PYTHONHASHSEED": "3", "LANG": "C", "LC_ALL": "C"},
        "ascii": {**plain, "LANG": "C", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "LC_TIME": "C"},
    }


@pytest.mark.parametrize(
    "name", ["no home", *(pytest.param(n, marks=pytest.mark.slow) for n in ("hash seed", "time zone", "ascii"))]
)
def test_the_same_bytes_whatever_the_surroundings(model, tmp_path, name):
    outs = [tmp_path / "plain", tmp_path / ODD / ("n" * 255)]
    (tmp_path / ODD).mkdir()
    environments = [{**os.environ, "PYTHONHASHSEED": "0"}, surroundings()[name]]
    for out, environment, threads in zip(outs, environments, "12", strict=True):
        with lost_nothing(model.parent):
            status, told = run(command(model, out, "--type", "Q4_0,Q8_0", "-t", threads), env=environment)
        assert (status, errors(told)) == (0, [])
    assert bytes_of(outs[0]) == bytes_of(outs[1])


def test_a_clock_that_jumps(model, tmp_path):
    """Backwards and forwards by decades, at every look."""
    clock = """
import itertools, time
jumps, now, day = itertools.cycle([0, 10**9, -10**9]), time.time, time.gmtime
time.time = lambda: now() + next(jumps)
time.gmtime = lambda seconds=None: day(time.time() if seconds is None else seconds)
"""
    for name, code in (("plain", None), ("odd", clock)):
        assert run(command(model, tmp_path / name, "--type", "Q8_0"), code)[0] == 0
    assert bytes_of(tmp_path / "odd") == bytes_of(tmp_path / "plain")


@pytest.mark.slow
def test_an_input_with_an_odd_name(tmp_path):
    (tmp_path / ODD).mkdir()
    model = write_llama(tmp_path / "plain").rename(tmp_path / ODD / ODD)
    status, told = run(command(model, tmp_path / "out", "--type", "Q8_0"))
    assert (status, errors(told)) == (0, [])
    read_artifact(tmp_path / "out").verify()


@pytest.mark.parametrize(
    "closed", [(0, 1), pytest.param((0, 1, 2), marks=pytest.mark.slow), pytest.param((2,), marks=pytest.mark.slow)]
)
def test_closed_standard_descriptors(model, tmp_path, closed):
    def close():
        for descriptor in closed:
            os.close(descriptor)

    status, _ = run(command(model, tmp_path / "out", "--type", "Q8_0"), preexec_fn=close, stdout=subprocess.DEVNULL)
    assert status == 0
    assert run(command(model, tmp_path / "plain", "--type", "Q8_0"))[0] == 0
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "plain")


def test_a_reader_of_json_that_goes_away(model, tmp_path):
    with start(command(model, tmp_path / "out", "--type", "Q8_0", "--json")) as process:
        process.stdout.close()
        told = process.stderr.read()
    assert process.returncode == 0
    assert errors(told) == []
    read_artifact(tmp_path / "out").verify()
