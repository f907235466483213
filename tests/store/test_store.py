"""The store: what was put in comes out; what cannot be kept leaves nothing."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from efficli.artifact import FileRecord
from efficli.errors import FitError, OutputError
from efficli.progress import Silent
from efficli.store import Store, step_key
from efficli.store import entry as entry_module
from tests.store.results import FILES, INGREDIENTS, KEY, assert_whole, fill, got, write

MAKE_ROOM = "make room with `efficli cache prune --older-than 30d`, set EFFICLI_CACHE_DIR, or use --no-cache"
ELSEWHERE = "set EFFICLI_CACHE_DIR to a folder that you can write to, or use --no-cache"


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "cache" / "steps")


def names(store: Store) -> set[str]:
    return {path.name for path in store.root.iterdir()}


# Putting in and getting out


def test_what_was_put_in_comes_out_in_another_run(store):
    assert not store.root.exists()
    made = fill(store, label="Q4_K_M of tiny")
    found, notes = got(store.root)
    assert_whole(found)
    assert found == made and notes == []
    assert (found.kind, found.label, found.ingredients) == ("export", "Q4_K_M of tiny", INGREDIENTS)
    assert found.nbytes == sum(map(len, FILES.values()))
    assert found.file("model.gguf").read_bytes() == FILES["model.gguf"]
    assert names(store) == {KEY, "lock"}


def test_another_key_is_not_there(store):
    fill(store)
    assert got(store.root, step_key("export", {**INGREDIENTS, "seed": 1})) == (None, [])


def test_looking_reads_no_file_and_changes_nothing(store):
    assert store.look(KEY) is None and not store.root.exists()
    entry = fill(store)
    entry.file("model.gguf").write_bytes(b"damaged!" * 5000)
    before = {path: path.stat().st_mtime_ns for path in store.root.rglob("*")}
    assert store.look(KEY) == entry
    assert {path: path.stat().st_mtime_ns for path in store.root.rglob("*")} == before


def test_what_fails_leaves_nothing(store):
    with store.using():
        with pytest.raises(ZeroDivisionError), store.filling(KEY, kind="export", ingredients=INGREDIENTS) as folder:
            write(folder)
            raise ZeroDivisionError
        assert store.get(KEY) is None
    assert names(store) == {"lock"}


def test_of_two_that_compute_the_same_the_first_stays(store):
    other = Store(store.root)
    with store.using(), other.using():
        with store.filling(KEY, kind="export", ingredients=INGREDIENTS) as slow:
            write(slow)
            fill(other)
            inode = other.look(KEY).path.stat().st_ino
        assert_whole(store.get(KEY))
        assert store.get(KEY).path.stat().st_ino == inode
    assert names(store) == {KEY, "lock"}


def test_many_processes_fill_the_same_keys(store):
    code = """
import sys
from pathlib import Path
from efficli.store import Store
from tests.store.results import fill
for number in range(8):
    fill(Store(Path(sys.argv[1])), number=number)
"""
    runs = [
        subprocess.Popen([sys.executable, "-c", code, str(store.root)], stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [run.communicate()[1] for run in runs] == [""] * 3
    entries = store.entries()
    assert len(entries) == 8
    for entry in entries:
        assert_whole(got(store.root, entry.key)[0])
    assert names(store) == {"lock", *(entry.key for entry in entries)}


def test_files_whose_hash_is_known_are_not_read(store, monkeypatch):
    read = []
    real = entry_module.open_file
    monkeypatch.setattr(entry_module, "open_file", lambda path: read.append(path.name) or real(path))
    records: list[FileRecord] = []
    with store.using():
        with store.filling(KEY, kind="export", ingredients=INGREDIENTS, hashed=records) as folder:
            write(folder)
            records += [FileRecord(name, len(data), _sha256(data)) for name, data in FILES.items()]
        assert_whole(store.get(KEY))
    assert set(read) == {"entry.json"}
    assert_whole(got(store.root)[0])
    assert set(read) == {"entry.json", "model.gguf", "tokenizer.json", "empty"}


def test_a_hash_that_was_wrong_is_found_by_the_next_run(store):
    records = [FileRecord("a", 3, _sha256(b"abd"))]
    with (
        store.using(),
        store.filling(KEY, kind="export", ingredients=INGREDIENTS, hashed=records) as folder,
    ):
        (folder / "a").write_bytes(b"abc")
    assert got(store.root) == (
        None,
        [f"cache entry {KEY[:8]} of step export is damaged (sha256 differs in a) and is computed anew"],
    )


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (FileRecord("a", 2, "0" * 64), "a: 3 bytes on disk, 2 were written"),
        (FileRecord("b", 3, "0" * 64), "b: was written, but is not on disk"),
    ],
)
def test_a_record_of_other_files_is_an_error(store, record, words):
    with (
        pytest.raises(OutputError, match=words),
        store.using(),
        store.filling(KEY, kind="export", ingredients=INGREDIENTS, hashed=[record]) as folder,
    ):
        (folder / "a").write_bytes(b"abc")
    assert names(store) == {"lock"}


def test_a_result_has_no_links(store, tmp_path):
    with (
        pytest.raises(ValueError, match="a result cannot be kept: a is not a regular file"),
        store.using(),
        store.filling(KEY, kind="export", ingredients=INGREDIENTS) as folder,
    ):
        (folder / "a").symlink_to(tmp_path)
    assert names(store) == {"lock"}


def test_a_key_must_be_that_of_its_ingredients(store):
    with (
        store.using(),
        pytest.raises(ValueError, match="the key is not that of the ingredients"),
        store.filling(KEY, kind="pass", ingredients=INGREDIENTS),
    ):
        pass


@pytest.mark.parametrize("key", ["../../etc", "", KEY[:-1], KEY.upper(), f"{KEY}\n"])
def test_a_key_is_64_digits(store, key):
    with pytest.raises(ValueError, match="is not a key"):
        store.look(key)


def test_outside_a_use_nothing_is_got_or_filled(store):
    with pytest.raises(RuntimeError, match=r"inside `with store\.using\(\)`"):
        store.get(KEY)
    with (
        pytest.raises(RuntimeError, match=r"inside `with store\.using\(\)`"),
        store.filling(KEY, kind="export", ingredients=INGREDIENTS),
    ):
        pass


def test_why_a_result_is_not_there(store):
    assert store.why_not("export", INGREDIENTS) == ()
    fill(store)
    fill(store, seed=1, input="sha256:ffff")
    fill(store, kind="pass", seed=1)
    wanted = {**INGREDIENTS, "seed": 1, "config": {"type": "Q8_0", "threads": 2}}
    assert store.why_not("export", wanted) == ("config.type", "input")
    assert store.why_not("export", {**INGREDIENTS, "config": {"type": "Q8_0", "threads": 2}}) == ("config.type",)
    assert store.why_not("bench", wanted) == ()


# Where it cannot be written


def test_no_room_is_said_before_anything_is_computed(store):
    with (
        store.using(),
        pytest.raises(FitError) as told,
        store.filling(KEY, kind="export", ingredients=INGREDIENTS, needs_bytes=1 << 60),
    ):
        raise AssertionError
    assert told.value.line.startswith(f"cache: needs {(1 << 60) / 1e9:,.0f} GB, ")
    assert told.value.hint == MAKE_ROOM
    assert names(store) == {"lock"}


@pytest.mark.parametrize("taken", ["", "lock"])
def test_a_name_that_is_taken(store, taken):
    store.root.parent.mkdir()
    if taken:
        store.root.mkdir()
        (store.root / taken).mkdir()
    else:
        store.root.write_text("")
    with pytest.raises(OutputError) as told, store.using():
        raise AssertionError
    assert str(store.root) in told.value.line and told.value.hint == ELSEWHERE
    assert taken or store.root.read_text() == ""


def test_a_disk_that_fills_up_is_one_line(store):
    with (
        pytest.raises(OutputError) as told,
        store.using(),
        store.filling(KEY, kind="export", ingredients=INGREDIENTS) as folder,
    ):
        write(folder)
        raise OSError(28, "No space left on device", str(folder / "model.gguf"))
    assert told.value.line == f"{store.root}: cannot write model.gguf: no space left"
    assert told.value.hint == MAKE_ROOM
    assert names(store) == {"lock"}


def test_an_error_of_reading_the_input_is_not_blamed_on_the_cache(store):
    with (
        pytest.raises(PermissionError),
        store.using(),
        store.filling(KEY, kind="export", ingredients=INGREDIENTS),
    ):
        raise PermissionError(13, "Permission denied", "/input/model.safetensors")
    assert names(store) == {"lock"}


READ_ONLY = """
import os, sys
from pathlib import Path
from efficli.errors import OutputError
from efficli.store import Store, step_key
store = Store(Path(sys.argv[1]))
if os.geteuid() == 0:  # whom no permission stops
    os.setgid(65534)
    os.setuid(65534)
with store.using():
    print(store.get(sys.argv[2]) is not None)
    try:
        with store.filling(step_key("a", {}), kind="a", ingredients={}):
            pass
    except OutputError as error:
        print(error.line, error.hint, sep="|")
try:
    store.prune(everything=True)
except OutputError as error:
    print(error.line)
"""


def test_a_cache_that_may_only_be_read():
    with tempfile.TemporaryDirectory() as name:
        store = Store(Path(name) / "steps")
        fill(store)
        paths = [Path(name), store.root, *store.root.rglob("*")]
        for path in paths:
            path.chmod(0o555 if path.is_dir() else 0o444)
        command = [sys.executable, "-c", READ_ONLY, str(store.root), KEY]
        done = subprocess.run(command, capture_output=True, text=True)
        for path in paths:
            path.chmod(0o755)
    line = f"{store.root}: cannot write to the cache: permission denied"
    assert (done.stdout.splitlines(), done.stderr) == (["True", f"{line}|{ELSEWHERE}", line], "")


# Copies


@pytest.mark.parametrize("known", [True, False])
def test_a_copy_has_the_bytes_and_is_a_file_of_its_own(store, tmp_path, known):
    entry = fill(store)
    reader = store if known else Store(store.root)
    for name, data in FILES.items():
        reader.copy(entry, name, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == data
        with (tmp_path / "copy").open("ab") as file:
            file.write(b"more")
        (tmp_path / "copy").unlink()
    assert_whole(got(store.root)[0])


def cut(path: Path) -> None:
    os.truncate(path, 100)


@pytest.mark.parametrize("harm", [cut, os.remove])
def test_a_copy_of_what_was_changed_is_an_error_and_leaves_no_file(store, tmp_path, harm):
    entry = fill(store)
    harm(entry.file("model.gguf"))
    with pytest.raises(OutputError) as told:
        store.copy(entry, "model.gguf", tmp_path / "copy")
    assert told.value.line == f"{store.root}: cache entry {KEY[:8]} of step export was changed during the run"
    assert not (tmp_path / "copy").exists()


def test_a_copy_replaces_nothing(store, tmp_path):
    (tmp_path / "copy").write_text("mine")
    with pytest.raises(OutputError, match="cannot write copy: File exists"):
        store.copy(fill(store), "model.gguf", tmp_path / "copy")
    assert (tmp_path / "copy").read_text() == "mine"


def test_a_name_that_the_entry_has_not(store, tmp_path):
    with pytest.raises(KeyError):
        store.copy(fill(store), "../entry.json", tmp_path / "copy")


# Locks, and what the dead leave


def test_what_a_killed_run_left_is_removed_by_the_next(store):
    code = """
import os, sys
from pathlib import Path
from efficli.store import Store
from tests.store.results import INGREDIENTS, KEY, write
store = Store(Path(sys.argv[1]))
with store.using(), store.filling(KEY, kind="export", ingredients=INGREDIENTS) as folder:
    write(folder)
    os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code, str(store.root)]).returncode == -9
    left = names(store) - {"lock"}
    assert len(left) == 1 and left.pop().startswith(".efficli-tmp-")
    assert got(store.root) == (None, [])
    assert names(store) == {"lock"}


def test_what_a_living_run_writes_stays(store):
    with store.using(), store.filling(KEY, kind="export", ingredients=INGREDIENTS) as folder:
        write(folder)
        assert got(store.root) == (None, [])
        assert store.prune(everything=True, dry_run=True).removed == ()
        assert (folder / "model.gguf").exists()
    assert_whole(got(store.root)[0])


def test_uses_may_be_nested(store):
    with store.using():
        with store.using():
            fill(store)
        with pytest.raises(OutputError, match="another efficli run uses the cache"):
            Store(store.root).prune(everything=True)
        assert store.get(KEY) is not None
    assert len(Store(store.root).prune(everything=True).removed) == 1


def test_a_read_only_note_of_time_is_no_error(store, monkeypatch):
    entry = fill(store)
    monkeypatch.setattr(os, "utime", _input_output_error)
    assert got(store.root)[0] == entry


def test_progress_counts_the_bytes_that_are_hashed(store):
    class Counting(Silent):
        done = 0.0

        def advance(self, amount: float) -> None:
            self.done += amount

    size = fill(store).nbytes
    counting = Counting()
    other = Store(store.root, counting)
    with other.using():
        for _ in range(3):
            assert other.get(KEY) is not None
    assert counting.done == size


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _input_output_error(*arguments: object) -> None:
    raise OSError(5, os.strerror(5))
