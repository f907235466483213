"""Removing results: the least recently used first, under a lock that every run shares."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from efficli.errors import OutputError
from efficli.store import Store, lock
from tests.store.results import FILES, KEY, fill, got

SIZE = sum(map(len, FILES.values()))
DAY = 86400.0


@pytest.fixture
def store(tmp_path):
    """Five results that were used 5, 4, 3, 2 and 1 days ago, in this order; the even ones are passes."""
    store = Store(tmp_path / "steps")
    for number in range(5):
        entry = fill(store, kind="export" if number % 2 else "pass", number=number)
        used(entry.path.parent, 5 - number)
    return store


def used(place: Path, days: float) -> None:
    at = time.time() - days * DAY
    os.utime(place / "entry.json", (at, at))


def numbers(entries) -> list[int]:
    return [entry.ingredients["number"] for entry in entries]


def test_entries_come_in_the_order_of_use(store):
    assert numbers(store.entries()) == [0, 1, 2, 3, 4]
    got(store.root, store.entries()[0].key)
    assert numbers(store.entries()) == [1, 2, 3, 4, 0]


@pytest.mark.parametrize(
    ("options", "removed"),
    [
        ({}, []),
        ({"everything": True}, [0, 1, 2, 3, 4]),
        ({"everything": True, "kinds": ["pass"]}, [0, 2, 4]),
        ({"older_than_s": 2.5 * DAY}, [0, 1, 2]),
        ({"older_than_s": 2.5 * DAY, "kinds": ["export"]}, [1]),
        ({"older_than_s": 9 * DAY}, []),
        ({"max_bytes": 3 * SIZE}, [0, 1]),
        ({"max_bytes": 3 * SIZE - 1}, [0, 1, 2]),
        ({"max_bytes": 0}, [0, 1, 2, 3, 4]),
        ({"max_bytes": 5 * SIZE}, []),
        ({"max_bytes": 2 * SIZE, "kinds": ["export"]}, [1, 3]),
        ({"max_bytes": 3 * SIZE, "older_than_s": 3.5 * DAY}, [0, 1]),
        ({"max_bytes": 1 * SIZE, "older_than_s": 3.5 * DAY}, [0, 1, 2, 3]),
    ],
)
def test_which_go(store, options, removed):
    planned = store.prune(**options, dry_run=True)
    assert numbers(store.entries()) == [0, 1, 2, 3, 4]
    done = store.prune(**options)
    assert numbers(done.removed) == numbers(planned.removed) == removed
    assert done.nbytes == SIZE * len(removed)
    assert numbers(done.kept) == numbers(store.entries()) == [n for n in range(5) if n not in removed]
    assert {path.name for path in store.root.iterdir()} == {"lock", *(entry.key for entry in store.entries())}


def test_damaged_half_written_and_foreign(store, tmp_path):
    for number, entry in enumerate(store.entries()[:2]):
        (entry.path.parent / "entry.json").write_text("?" * number)
    dead = store.root / ".efficli-tmp-999999999-0123abcd"
    (dead / "files").mkdir(parents=True)
    (store.root / "notes.txt").write_text("mine")
    (store.root / ("f" * 64)).symlink_to(tmp_path)
    assert store.prune(dry_run=True).damaged == len(store.damaged()) == 3
    assert dead.exists()
    pruned = store.prune()
    assert (pruned.damaged, pruned.removed, numbers(pruned.kept)) == (3, (), [2, 3, 4])
    left = {path.name for path in store.root.iterdir()}
    assert left == {"lock", "notes.txt", *(entry.key for entry in store.entries())}
    assert tmp_path.is_dir()


def test_nothing_to_prune_makes_no_folder(tmp_path):
    store = Store(tmp_path / "none")
    assert store.prune(everything=True).removed == store.entries() == store.damaged() == ()
    assert not store.root.exists()


def test_a_run_that_uses_the_cache_keeps_it(store):
    code = """
import sys
from pathlib import Path
from efficli.store import Store
with Store(Path(sys.argv[1])).using():
    print("in use", flush=True)
    sys.stdin.readline()
"""
    command = [sys.executable, "-c", code, str(store.root)]
    runs = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        for run in runs:
            assert run.stdout.readline() == "in use\n"
        with pytest.raises(OutputError) as told:
            store.prune(everything=True)
        pids = ", ".join(str(pid) for pid in sorted(run.pid for run in runs))
        assert told.value.line == f"{store.root}: another efficli run uses the cache (pids {pids})"
        assert told.value.hint == "wait for it"
        runs[0].communicate("\n")
        with pytest.raises(OutputError, match=rf"uses the cache \(pid {runs[1].pid}\)$"):
            store.prune(everything=True)
    finally:
        for run in runs:
            run.kill()
            run.communicate()
    # a run that was killed holds nothing
    assert len(store.prune(everything=True).removed) == 5


def test_a_run_waits_until_others_have_removed(store):
    inside = threading.Event()

    def use() -> None:
        with Store(store.root).using():
            inside.set()

    with lock.alone(store.root):
        thread = threading.Thread(target=use)
        thread.start()
        assert not inside.wait(0.2)
    thread.join(timeout=30)
    assert inside.is_set()


def test_the_list_of_users_ends_with_the_last_of_them(store):
    for _ in range(3):
        got(store.root, KEY)
    assert (store.root / "lock").read_text() == f"{os.getpid()}\n"
