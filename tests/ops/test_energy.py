"""Joules from the processor's counters and from commands that print watts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from efficli.errors import UnsupportedError, UsageError
from efficli.ops import energy
from efficli.ops.energy import CommandMeter, NoMeter, open_meter

PYTHON = sys.executable


def domain(powercap: Path, number: str, name: str, counter: int | str, top: int = 1_000_000) -> Path:
    """A RAPL domain as Linux shows it; microjoules."""
    folder = powercap / f"intel-rapl:{number}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text(name + "\n")
    (folder / "max_energy_range_uj").write_text(f"{top}\n")
    (folder / "energy_uj").write_text(f"{counter}\n")
    return folder / "energy_uj"


def command(tmp_path: Path, code: str) -> str:
    """A command that runs Python `code`, in which `tell` prints a line at once."""
    file = tmp_path / "a meter.py"
    file.write_text(f"import os, sys, time\ndef tell(word): print(word, flush=True)\n{code}\n")
    return f"{PYTHON} '{file}'"


def wait_until(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


# RAPL


def test_rapl_counts_the_packages_and_not_their_parts(tmp_path):
    first = domain(tmp_path, "0", "package-0", 5_000)
    second = domain(tmp_path, "1", "package-1", 700)
    core = domain(tmp_path, "0:0", "core", 1)
    platform = domain(tmp_path, "2", "psys", 1)
    with open_meter(None, powercap=tmp_path) as meter:
        assert meter.source == "RAPL, package-0 and package-1: the processor only"
        assert meter.joules() == 0
        first.write_text("25000\n")
        second.write_text("1700\n")
        core.write_text("999999\n")
        platform.write_text("999999\n")
        assert meter.joules() == pytest.approx(0.021)
        assert meter.joules() == pytest.approx(0.021)


def test_a_counter_that_starts_anew_goes_on_counting(tmp_path):
    file = domain(tmp_path, "0", "package-0", 900_000)
    meter = open_meter(None, powercap=tmp_path)
    for value, joules in ((950_000, 0.05), (10_000, 0.11), (600_000, 0.70), (0, 1.10)):
        file.write_text(f"{value}\n")
        assert meter.joules() == pytest.approx(joules)


def test_the_command_is_taken_before_rapl(tmp_path):
    domain(tmp_path, "0", "package-0", 0)
    with open_meter(command(tmp_path, "tell(5); time.sleep(60)"), powercap=tmp_path) as meter:
        assert meter.source.startswith("power command: ")


NO_PACKAGE = "none: no RAPL here ({at} has no package domain), no --power-command"
BROKEN = "none: RAPL does not work here ({at}/intel-rapl:0/energy_uj: it holds 'x'), no --power-command"


@pytest.mark.parametrize(
    ("made", "source"),
    [
        (lambda at: None, "none: no RAPL here, no --power-command"),
        (Path.mkdir, NO_PACKAGE),
        (lambda at: domain(at, "0:0", "core", 1), NO_PACKAGE),
        (lambda at: domain(at, "0", "package-0", "x"), BROKEN),
    ],
)
def test_where_nothing_counts_it_is_said_why(tmp_path, made, source):
    at = tmp_path / "powercap"
    made(at)
    with open_meter(None, powercap=at) as meter:
        assert isinstance(meter, NoMeter)
        assert meter.source == source.format(at=at)


def test_a_counter_that_only_root_may_read_is_said_to_need_root(tmp_path):
    """Seen by a process that is not root, which the tests may be."""
    at = tmp_path / "powercap"
    file = domain(at, "0", "package-0", 1)
    file.chmod(0)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o111)
    at.chmod(0o755), file.parent.chmod(0o755)
    code = "import os, sys\nfrom pathlib import Path\nfrom efficli.ops.energy import open_meter\n"
    code += "if os.geteuid() == 0: os.setuid(65534)\nprint(open_meter(None, powercap=Path(sys.argv[1])).source)"
    done = subprocess.run([PYTHON, "-c", code, str(at)], capture_output=True, text=True, check=True)
    told = done.stdout.strip()
    assert told == f"none: RAPL needs root here ({file} cannot be read), no --power-command"


def test_a_counter_that_goes_away_is_told(tmp_path):
    file = domain(tmp_path, "0", "package-0", 1)
    meter = open_meter(None, powercap=tmp_path)
    file.unlink()
    with pytest.raises(UnsupportedError, match="cannot be read any more"):
        meter.joules()


# A command


def test_each_number_holds_until_the_next(tmp_path):
    log = tmp_path / "log"
    code = f"log = open({str(log)!r}, 'w')\nfor watts in (2, '4', 1.05e1):\n"
    code += " print(time.monotonic(), file=log, flush=True); tell(watts); time.sleep(0.2)\ntime.sleep(60)"
    with open_meter(command(tmp_path, code)) as meter:
        wait_until(lambda: len(log.read_text().splitlines()) == 3)

        def watts() -> float:
            before, began = meter.joules(), time.monotonic()
            time.sleep(0.05)
            return (meter.joules() - before) / (time.monotonic() - began)

        wait_until(lambda: watts() == pytest.approx(10.5, rel=0.1))
        seen, now = meter.joules(), time.monotonic()
    first, second, third = map(float, log.read_text().splitlines())
    # each is heard at the earliest when it is printed, and the later ones are larger
    assert seen <= 2 * (second - first) + 4 * (third - second) + 10.5 * (now - third)
    assert seen > 2 * (now - first)


def test_a_steady_power_is_power_times_time(tmp_path):
    before = time.monotonic()
    with open_meter(command(tmp_path, "while True: tell(7); time.sleep(0.01)")) as meter:
        opened = time.monotonic()
        time.sleep(0.3)
        waited = time.monotonic() - opened
        seen = meter.joules()
        assert 7 * waited <= seen <= 7 * (time.monotonic() - before)


def test_joules_never_become_fewer(tmp_path):
    with open_meter(command(tmp_path, "while True:\n for w in (50, 0, 7): tell(w); time.sleep(0.01)")) as meter:
        seen = [(time.sleep(0.002), meter.joules())[1] for _ in range(100)]
    assert seen == sorted(seen) and seen[-1] > 0


def test_a_command_that_prints_one_line_and_ends_is_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "AGAIN_S", 0.01)
    count = tmp_path / "count"
    code = f"open({str(count)!r}, 'a').write('x'); sys.stdout.write('12'); sys.exit(0)"  # no line end either
    before = time.monotonic()
    with open_meter(command(tmp_path, code)) as meter:
        opened = time.monotonic()
        wait_until(lambda: len(count.read_text()) >= 3)
        waited = time.monotonic() - opened
        assert 12 * waited <= meter.joules() <= 12 * (time.monotonic() - before)


def test_lines_that_come_together_are_averaged(tmp_path):
    code = "sys.stdout.write('2\\n4\\n\\n  6 \\n'); sys.stdout.flush(); time.sleep(60)"
    before = time.monotonic()
    with open_meter(command(tmp_path, code)) as meter:
        opened = time.monotonic()
        time.sleep(0.2)
        waited = time.monotonic() - opened
        assert 4 * waited <= meter.joules() <= 4 * (time.monotonic() - before)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("/no/such/meter --watts", "'/no/such/meter' cannot be run: No such file or directory"),
        ("", "there is no command"),
        ("'unbalanced", '"\'unbalanced" is not a command: no closing quotation'),
        ("echo 12 W", "'echo' printed '12 W', expected watts, one number a line"),
        ("echo -3", "'echo' printed '-3', expected watts, one number a line"),
        ("echo nan", "'echo' printed 'nan', expected watts, one number a line"),
        ("echo '$HOME; true'", "'echo' printed '$HOME; true', expected watts, one number a line"),
        ("printf '\\377'", "'printf' printed '\\\\xff', expected watts, one number a line"),
        ("cat /dev/zero", "'cat' printed 4096 bytes without a line end, expected one number a line"),
        ("true", "'true' ended without a number"),
        ("false", "'false' ended with exit code 1"),
        ("sh -c 'echo no sensor >&2; exit 3'", "'sh' ended with exit code 3: no sensor"),
        ("sh -c 'kill -9 $$'", "'sh' died of 9"),
    ],
)
def test_a_command_that_does_not_do_is_a_usage_error(words, message):
    before = threading.active_count()
    with pytest.raises(UsageError) as caught:
        open_meter(words)
    assert caught.value.line == f"--power-command: {message}"
    assert threading.active_count() == before


def test_a_command_that_says_nothing_is_not_waited_for_forever(monkeypatch):
    monkeypatch.setattr(energy, "SILENCE_S", 0.2)
    with pytest.raises(UsageError, match=r"'sleep' printed nothing in 0\.2 s"):
        open_meter("sleep 60")


def test_a_command_that_falls_silent_is_told(tmp_path, monkeypatch):
    with open_meter(command(tmp_path, "tell(3); time.sleep(60)")) as meter:
        meter.joules()
        monkeypatch.setattr(energy, "SILENCE_S", 0.05)
        time.sleep(0.1)
        with pytest.raises(UsageError, match="has printed nothing for"):
            meter.joules()
        with pytest.raises(UsageError, match="has printed nothing for"):
            meter.joules()


@pytest.mark.parametrize(
    ("end", "message"),
    [("tell('off')", "printed 'off', expected watts"), ("sys.exit('no sensor')", "exit code 1: no sensor")],
)
def test_a_command_that_breaks_on_the_way_is_told(tmp_path, end, message):
    with open_meter(command(tmp_path, f"tell(3); time.sleep(0.1); {end}")) as meter:

        def broken() -> bool:
            try:
                meter.joules()
            except UsageError as error:
                return message in error.line
            return False

        wait_until(broken)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_closing_ends_the_command_and_what_it_started(tmp_path):
    pids = tmp_path / "pids"
    code = "import subprocess\nchild = subprocess.Popen(['sleep', '600'])\n"
    code += f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\ntell(1); time.sleep(600)"
    meter = open_meter(command(tmp_path, code))
    numbers = [int(word) for word in pids.read_text().split()]
    assert all(map(alive, numbers))
    meter.close()
    wait_until(lambda: not any(map(alive, numbers)))
    meter.close()


def test_a_command_that_does_not_want_to_end_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "FAREWELL_S", 0.1)
    code = f"import signal\nsignal.signal({int(signal.SIGTERM)}, signal.SIG_IGN)\n"
    before = threading.active_count()
    meter = open_meter(command(tmp_path, code + "tell(1)\nwhile True: time.sleep(600)"))
    assert isinstance(meter, CommandMeter)
    meter.close()
    assert threading.active_count() == before


def test_ctrl_c_is_not_for_the_command(tmp_path):
    pids = tmp_path / "pids"
    with open_meter(command(tmp_path, f"open({str(pids)!r}, 'w').write(str(os.getpgid(0)))\ntell(1); time.sleep(60)")):
        assert int(pids.read_text()) != os.getpgid(0)
