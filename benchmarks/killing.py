"""`efficli run` killed with SIGKILL at moments spread over its steps, and run again: for a test and a benchmark."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Moment:
    """When to kill: `delay` seconds after the `line`-th line on stderr."""

    line: int
    delay: float


@dataclass(frozen=True, slots=True)
class Killed:
    """What became of one run."""

    moment: Moment
    after: str
    """The last thing that it said."""
    was_killed: bool
    """False: it had ended before."""
    kept: int
    """Results in the cache when it died."""
    rerun: int
    """Exit code of the run after it."""
    sums: str
    strays: tuple[str, ...]
    """Files that neither the artifact nor a result of a step owns."""


def command(recipe: Path, out: Path) -> list[str]:
    """A run that says on stderr when each of its tasks is done, and nothing else there."""
    run = "import sys; from efficli.cli import main; sys.exit(main())"
    return [sys.executable, "-c", run, "run", str(recipe), "-o", str(out), "-t", "1", "-v", "--json", "--force"]


def environment(place: Path) -> dict[str, str]:
    """With a cache and a folder for temporary files of their own."""
    for name in ("cache", "tmp"):
        (place / name).mkdir(parents=True, exist_ok=True)
    return os.environ | {"EFFICLI_CACHE_DIR": str(place / "cache"), "TMPDIR": str(place / "tmp")}


@dataclass(frozen=True, slots=True)
class Undisturbed:
    """A run that nobody disturbed."""

    sums: str
    """The hash of its artifact."""
    lines: int
    """On stderr."""
    seconds: float
    leaves: frozenset[str]
    """What libraries leave among the temporary files, as PyTorch's compiler does."""


def undisturbed(recipe: Path, place: Path) -> Undisturbed:
    """Run the recipe to its end."""
    began = time.monotonic()
    done = subprocess.run(command(recipe, place / "out"), env=environment(place), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    seconds, left = time.monotonic() - began, frozenset(strays(place, known=[recipe.name]))
    return Undisturbed(sums(place / "out"), done.stderr.count("\n"), seconds, left)


def moments(lines: int, count: int, seconds: float) -> Iterator[Moment]:
    """`count` moments: after every line in turn, at once and, from the second round on, later and later."""
    rounds = -(-count // lines)
    for number in range(count):
        turn, line = divmod(number, lines)
        yield Moment(line, seconds / lines * turn / rounds)


def kill_and_rerun(recipe: Path, place: Path, moment: Moment) -> Killed:
    """Run the recipe, kill it and its children at the moment, run it again."""
    process = subprocess.Popen(
        command(recipe, place / "out"),
        env=environment(place),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stderr
    after = ""
    with process.stderr:
        for _ in range(moment.line):
            line = process.stderr.readline().decode()
            if not line:
                break
            after = line.strip()
        time.sleep(moment.delay)
        process.kill()  # itself alone: its children have to notice
        was_killed = process.wait() == -signal.SIGKILL
    kept = len(results(place))
    again = subprocess.run(command(recipe, place / "out"), env=environment(place), capture_output=True, text=True)
    return Killed(
        moment=moment,
        after=after,
        was_killed=was_killed,
        kept=kept,
        rerun=again.returncode,
        sums=sums(place / "out") if again.returncode == 0 else again.stderr,
        strays=tuple(strays(place, known=[recipe.name])),
    )


def results(place: Path) -> list[Path]:
    """Whole entries of the cache."""
    root = place / "cache" / "steps"
    return [path for path in root.iterdir() if len(path.name) == 64] if root.is_dir() else []


def strays(place: Path, known: Sequence[str]) -> Iterator[str]:
    """What is there beside the artifact, the results of steps and files that serve as locks."""
    for path in place.iterdir():
        if path.name not in ("out", "cache", "tmp", "out.lock", *known):
            yield path.name
    for path in (place / "tmp").iterdir():
        yield f"tmp/{path.name}"
    for path in (place / "cache" / "steps").iterdir():
        if len(path.name) != 64 and path.name != "lock":
            yield f"cache/{path.name}"


def sums(out: Path) -> str:
    """One hash of all that the artifact's hashes cover."""
    return hashlib.sha256((out / "SHA256SUMS").read_bytes()).hexdigest()
