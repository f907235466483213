"""Run a writer once for every point at which it can be killed or a call can fail, and judge what it leaves behind.

Started by test_faults.py as a process of its own with shim.c loaded: one fork for each point. Reads the plan as JSON
from its first argument, prints the table as JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from efficli.artifact.temporary import aside_path
from efficli.errors import EffiError
from tests.lost_nothing import fingerprint

MODES = {"kill": 1, "torn": 2, "once": 3, "from": 4, "loss": 5}
ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EROFS": errno.EROFS, "EDQUOT": errno.EDQUOT, "none": 0}
TEMPORARY = ".efficli-tmp-"

Writer = Callable[[Path, str], None]
"""Writes the artifact whose content follows from a text ("old", "new") to a path, replacing what is there."""


@dataclass
class Plan:
    """What to sweep: a writer ("module:function"), whether something is replaced, which faults at which points."""

    writer: str
    previous: bool
    faults: list[tuple[str, str]]
    """(mode, error) pairs."""
    no_exchange: bool = False
    every: int = 1
    """Take every so many-th point."""
    inputs: str | None = None
    """A folder that must not change."""
    outside: list[str] = field(default_factory=list)


class Sweep:
    """The points of one plan."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.folder, self.out = plan, folder, folder / "out"
        self.shim = ctypes.CDLL(None)
        self.shim.fault_trace.restype = ctypes.c_char_p
        module, _, name = plan.writer.partition(":")
        self.write: Writer = getattr(importlib.import_module(module), name)
        self.old = self._sample("old") if plan.previous else {}
        self.kept = folder.with_name("old")
        if plan.previous:
            self.out.rename(self.kept)
        self.new = self._sample("new")
        self.inputs = fingerprint(Path(plan.inputs)) if plan.inputs else None
        self.corrupt: list[str] = []
        self.seen: Counter[str] = Counter()

    def _sample(self, text: str) -> dict[str, str]:
        self._clear()
        self.write(self.out, text)
        return self._content()

    def _clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()

    def _content(self) -> dict[str, str]:
        found = fingerprint(self.out)
        if "run.json" in found:
            found["run.json"] = "valid" if _is_json(self.out / "run.json") else "damaged"
        return found

    def _prepare(self) -> None:
        self._clear()
        if self.plan.previous:
            shutil.copytree(self.kept, self.out)

    def run(self) -> dict[str, object]:
        """Every fault at every point."""
        self._prepare()
        points, trace = self._count()
        for mode, error in self.plan.faults:
            for point in range(1, points + 1, self.plan.every):
                self._point(mode, error, point, trace)
        return {"calls": points, "trace": trace, "outcomes": dict(self.seen), "corrupt": self.corrupt}

    def _count(self) -> tuple[int, list[str]]:
        """How many calls an undisturbed run makes, and which."""
        reader, writer = os.pipe()
        if os.fork() == 0:
            self.shim.fault_arm(os.fsencode(self.folder), ctypes.c_long(0), 0, 0, int(self.plan.no_exchange))
            self.write(self.out, "new")
            self.shim.fault_disarm()
            count = self.shim.fault_count()
            lines = [self.shim.fault_trace(ctypes.c_long(n)).decode() for n in range(1, count + 1)]
            os.write(writer, json.dumps(lines).encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            trace = json.loads(pipe.read())
        os.wait()
        return len(trace), trace

    def _point(self, mode: str, error: str, point: int, trace: list[str]) -> None:
        """One run with one fault, judged; then one without, which must succeed and leave nothing behind."""
        self._prepare()
        status, line = self._disturbed(mode, error, point)
        name = f"{mode} {error} at {point} ({trace[point - 1]})"
        outcome, wrong = self._judge(mode, status, line)
        self.seen[f"{mode} {error}: {outcome}"] += 1
        if wrong is None:
            wrong = self._again()
        if wrong is not None:
            self.corrupt.append(f"{name}: {wrong} [{line}]")

    def _disturbed(self, mode: str, error: str, point: int) -> tuple[int, str]:
        """Exit status of the disturbed run (0 published, 1 told, 70 a bug, -9 killed) and what it told."""
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            os._exit(self._attempt(mode, error, point, writer))
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            line = pipe.read().decode()
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), line

    def _attempt(self, mode: str, error: str, point: int, writer: int) -> int:
        folder, without = os.fsencode(self.folder), int(self.plan.no_exchange)
        self.shim.fault_arm(folder, ctypes.c_long(point), MODES[mode], ERRORS[error], without)
        try:
            self.write(self.out, "new")
        except EffiError as failure:
            self.shim.fault_disarm()
            os.write(writer, failure.line.encode())
            return 1
        except BaseException:  # noqa: BLE001 - a forked child must not return into the sweep
            self.shim.fault_disarm()
            os.write(writer, _bug().encode())
            return 70
        self.shim.fault_disarm()
        return 0

    def _judge(self, mode: str, status: int, line: str) -> tuple[str, str | None]:
        """What is at OUT ("old", "new", "absent", "corrupt"), and what is wrong about that, if anything."""
        content = self._content()
        outcome = "new" if content == self.new else "old" if content == self.old and content else "absent"
        if outcome == "absent" and content:
            return "corrupt", f"OUT is neither old nor new: {content}"
        if outcome == "absent" and self.plan.previous and not self._waits_aside():
            return outcome, "OUT is gone"
        if mode in ("kill", "torn", "loss"):
            return outcome, None if status == -signal.SIGKILL else f"status {status}"
        return outcome, self._misleads(outcome, status, line) or self._strays()

    def _waits_aside(self) -> bool:
        """Whether the old artifact waits where the next run restores it."""
        aside = aside_path(self.out)
        return aside.exists() and {**fingerprint(aside), "run.json": "valid"} == self.old

    def _misleads(self, outcome: str, status: int, line: str) -> str | None:
        """Whether the words of a failed run differ from what it left."""
        if status == 70:
            return "a bug"
        if status == 0 or "published, but durability not confirmed" in line:
            return None if outcome == "new" else f"said that it was published, but OUT is {outcome}"
        if outcome == "new":
            return "published, but did not say so"
        if "\n" in line or ("previous artifact kept" in line and outcome != "old"):
            return "wrong words"
        return None

    def _strays(self) -> str | None:
        names = {path.name for path in self.folder.iterdir() if not path.name.startswith(TEMPORARY)}
        allowed = {"out", "out.lock", aside_path(self.out).name, *self.plan.outside}
        return f"stray files {sorted(names - allowed)}" if names - allowed else None

    def _again(self) -> str | None:
        """A second, undisturbed run."""
        try:
            self.write(self.out, "new")
        except EffiError as failure:
            return f"the next run fails: {failure.line}"
        if self._content() != self.new:
            return "the next run wrote something else"
        left = sorted({path.name for path in self.folder.iterdir()} - {"out", *self.plan.outside})
        if left:
            return f"the next run leaves {left}"
        if self.inputs is not None and fingerprint(Path(self.plan.inputs or "")) != self.inputs:
            return "the input was changed"
        return None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except ValueError:
        return False
    return True


def _bug() -> str:
    """The last frames of the exception that nobody caught, on one line."""
    return " | ".join(traceback.format_exc().strip().splitlines()[-5:])


def main(kind: type[Sweep] = Sweep) -> None:
    """Run the plan in the first argument."""
    began = time.monotonic()
    plan = Plan(**json.loads(sys.argv[1]))
    with tempfile.TemporaryDirectory(dir=os.environ.get("SWEEP_DIR")) as folder, contextlib.chdir(folder):
        result = kind(plan, Path(folder).resolve() / "work").run()
    print(json.dumps({**result, "seconds": round(time.monotonic() - began, 2)}))


if __name__ == "__main__":
    main()
