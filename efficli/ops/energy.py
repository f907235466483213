"""Joules: from the processor's own counters (RAPL), or from a command that prints watts."""

from __future__ import annotations

import contextlib
import math
import os
import re
import selectors
import shlex
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from efficli.errors import UnsupportedError, UsageError

FLAG = "--power-command"
SILENCE_S = 10.0
"""So long may a command print nothing before it is taken for one that does not work."""
AGAIN_S = 1.0
"""Between two runs of a command that prints one line and ends."""
FAREWELL_S = 1.0
LOG_BYTES = 4096
_UJ = 1e-6


class EnergyMeter(Protocol):
    """Counts joules from when it was opened; a context manager, or closed with `close`."""

    @property
    def source(self) -> str:
        """Where the joules come from, for a report."""

    def joules(self) -> float:
        """Joules since the meter was opened; never less than before. UsageError or UnsupportedError if it broke."""

    def close(self) -> None:
        """Stop counting."""

    def __enter__(self) -> Self:
        """Itself."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close it."""


class NoMeter:
    """There is nothing to count joules with; `source` says why. A context manager, as the meters are."""

    def __init__(self, why: str) -> None:
        self.source = f"none: {why}, no {FLAG}"

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""


def open_meter(power_command: str | None, *, powercap: Path = Path("/sys/class/powercap")) -> EnergyMeter | NoMeter:
    """The command if one is given, else RAPL where it can be read, else a NoMeter. UsageError if the command fails.

    The command prints watts, one number a line, as it goes; or one line, and ends: then it is run again and again.
    It is started without a shell, and waited for until it has printed its first number.
    """
    if power_command is not None:
        return CommandMeter(power_command)
    domains = [
        domain
        for domain in sorted(powercap.glob("intel-rapl:*"))
        # intel-rapl:0:1 is a part of intel-rapl:0; "psys" is the platform, the packages included
        if re.fullmatch(r"intel-rapl:[0-9]+", domain.name) and _name(domain).startswith("package")
    ]
    if not domains:
        return NoMeter(f"no RAPL here ({powercap} has no package domain)" if powercap.exists() else "no RAPL here")
    try:
        return RaplMeter(domains)
    except PermissionError:
        return NoMeter(f"RAPL needs root here ({domains[0]}/energy_uj cannot be read)")
    except (OSError, UnsupportedError) as error:
        return NoMeter(f"RAPL does not work here ({error})")


class RaplMeter:
    """The counters of the processor packages: cores, caches, and memory controller; not the rest of the machine.

    They start anew at `max_energy_range_uj`, after minutes of full load at the earliest: ask more often than that.
    """

    def __init__(self, domains: Sequence[Path]) -> None:
        self._files = [domain / "energy_uj" for domain in domains]
        self._ranges = [_count(domain / "max_energy_range_uj") for domain in domains]
        self._last = [_count(file) for file in self._files]
        self._total = 0
        self.source = f"RAPL, {' and '.join(_name(domain) for domain in domains)}: the processor only"

    def joules(self) -> float:
        """Joules of all packages since the meter was opened."""
        try:
            now = [_count(file) for file in self._files]
        except OSError as error:
            raise UnsupportedError(f"cannot be read any more: {error}", where="RAPL") from error
        for new, old, top in zip(now, self._last, self._ranges, strict=True):
            self._total += new - old if new >= old else new - old + top
        self._last = now
        return self._total * _UJ

    def close(self) -> None:
        """Nothing to stop."""

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to stop."""


class CommandMeter:
    """Integrates the watts that a command prints over time; each number holds until the next one."""

    def __init__(self, command: str) -> None:
        self.source = f"power command: {command}"
        self._words = _words(command)
        self._changed = threading.Condition()
        self._joules = 0.0
        self._watts: float | None = None
        self._heard = time.monotonic()
        self._error: UsageError | None = None
        run = _Run(self._words)
        self._closing, self._close = os.pipe()
        self._thread = threading.Thread(target=self._listen, args=(run,), name="power command", daemon=True)
        self._thread.start()
        try:
            self._wait_for_first()
        except BaseException:
            self.close()
            raise

    def joules(self) -> float:
        """Joules since the first number; UsageError if the command failed, fell silent, or printed no number."""
        with self._changed:
            now = time.monotonic()
            if self._error is None and now - self._heard > SILENCE_S:
                self._error = _problem(self._words, f"has printed nothing for {now - self._heard:.0f} s")
            if self._error is not None:
                raise self._error
            return self._joules + (self._watts or 0.0) * (now - self._heard)

    def close(self) -> None:
        """End the command, with all that it started."""
        if self._close >= 0:
            os.close(self._close)
            self._close = -1
            self._thread.join()
            os.close(self._closing)

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the command."""
        self.close()

    def _wait_for_first(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._watts is not None or self._error is not None, SILENCE_S)
            if self._error is not None:
                raise self._error
            if self._watts is None:
                hint = "a program may keep its lines back when no terminal is there: try stdbuf -oL"
                raise _problem(self._words, f"printed nothing in {SILENCE_S:g} s", hint)

    def _listen(self, run: _Run) -> None:
        """The thread: one run of the command after another, until the meter is closed or the command fails."""
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(self._closing, selectors.EVENT_READ)
                while self._hear(run, selector) and not selector.select(AGAIN_S):
                    run = _Run(self._words)
        except UsageError as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()
        finally:
            run.end()

    def _hear(self, run: _Run, selector: selectors.BaseSelector) -> bool:
        """Listen until the command ends, which must be well; False if the meter is closed meanwhile."""
        rest, heard = b"", False
        selector.register(run.stdout, selectors.EVENT_READ)
        while True:
            if any(key.fd == self._closing for key, _ in selector.select()):
                return False
            data = os.read(run.stdout, 65536)
            *lines, rest = (rest + data).split(b"\n") if data else (rest, b"")
            if len(rest) > LOG_BYTES:
                raise _problem(self._words, f"printed {LOG_BYTES} bytes without a line end, expected one number a line")
            numbers = [_watts(line, self._words) for line in lines if line.strip()]
            if numbers:
                # several that came together were printed since the last look: their mean is the best guess
                self._take(sum(numbers) / len(numbers))
                heard = True
            if not data:
                break
        selector.unregister(run.stdout)
        run.end(FAREWELL_S)
        if run.failure or not heard:
            raise _problem(self._words, run.failure or "ended without a number")
        return True

    def _take(self, watts: float) -> None:
        """The last number held until now; this one holds from now on."""
        with self._changed:
            now = time.monotonic()
            self._joules += (self._watts or 0.0) * (now - self._heard)
            self._watts, self._heard = watts, now
            self._changed.notify_all()


class _Run:
    """One run of the command, in a process group of its own: Ctrl-C is for us, and `end` reaches all of it."""

    def __init__(self, words: Sequence[str]) -> None:
        self.failure: str | None = None
        """How it ended, if not well."""
        # a file, as a pipe that nobody reads could fill up and stop it
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `end`)
        try:
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=self._complaints,
                process_group=0,
            )
        except OSError as error:
            self._complaints.close()
            raise _problem(words, f"cannot be run: {error.strerror}") from error
        assert self._process.stdout
        self.stdout = self._process.stdout.fileno()

    def end(self, patience: float = 0.0) -> None:
        """End the command if it does not do so itself within `patience` seconds; a second call does nothing."""
        if self._complaints.closed:
            return
        assert self._process.stdout
        self._process.stdout.close()
        for number, seconds in ((0, patience), (signal.SIGTERM, FAREWELL_S), (signal.SIGKILL, FAREWELL_S)):
            self._signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)
                break
        self._signal(signal.SIGKILL)  # what it has left behind
        code = self._process.returncode
        if code != 0:
            how = "does not end" if code is None else f"ended with exit code {code}" if code > 0 else f"died of {-code}"
            self._complaints.seek(0)
            lines = self._complaints.read()[-LOG_BYTES:].decode(errors="replace").split("\n")
            last = next((line.strip() for line in reversed(lines) if line.strip()), "")
            self.failure = f"{how}: {last}" if last else how
        self._complaints.close()

    def _signal(self, number: int) -> None:
        # not permitted: it has become another user's (sudo), and ends when it next prints
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)


def _words(command: str) -> list[str]:
    """The command split as a shell would."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UsageError(f"{command!r} is not a command: {str(error).lower()}", where=FLAG) from error
    if not words:
        raise UsageError("there is no command", where=FLAG)
    return words


def _watts(line: bytes, words: Sequence[str]) -> float:
    """The number on a line."""
    with contextlib.suppress(ValueError):
        watts = float(line)
        if math.isfinite(watts) and watts >= 0:
            return watts
    text = line[:60].decode(errors="backslashreplace").strip()
    raise _problem(words, f"printed {text!r}, expected watts, one number a line")


def _problem(words: Sequence[str], what: str, hint: str | None = None) -> UsageError:
    return UsageError(f"{words[0]!r} {what}", hint=hint, where=FLAG)


def _name(domain: Path) -> str:
    """What RAPL calls a domain: "package-0"."""
    try:
        return (domain / "name").read_text().strip()
    except OSError:
        return ""


def _count(file: Path) -> int:
    """Microjoules."""
    text = file.read_text().strip()
    if not text.isdecimal():
        raise UnsupportedError(f"{file}: it holds {text[:40]!r}")
    return int(text)
