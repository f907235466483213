"""Writing artifacts: checks before anything is computed, then whole or absent, whoever else writes."""

from __future__ import annotations

import os
import stat
import subprocess
import threading
from pathlib import Path

import pytest

from efficli.artifact import FileRecord, draft, lock, read_artifact, temporary, writing
from efficli.errors import FitError, OutputError, UsageError
from efficli.ops import storage
from tests.artifact.toy import publish
from tests.lost_nothing import fingerprint, lost_nothing

# What is written


def test_an_artifact_appears_whole(tmp_path):
    artifact = publish(tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["README.md", "SHA256SUMS", "efficli.json", "model.gguf", "run.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert artifact.manifest["schema_version"] == 1
    assert artifact.file("model.gguf").read_bytes() == b"one" * 1000
    assert artifact.nbytes == 3003
    checked = subprocess.run(["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=tmp_path / "out", capture_output=True)
    assert checked.stdout.decode().splitlines() == ["README.md: OK", "efficli.json: OK", "model.gguf: OK"]
    again = read_artifact(tmp_path / "out")
    assert again == artifact
    again.verify()


def test_permissions_are_those_of_the_umask(tmp_path):
    previous = os.umask(0o027)
    try:
        publish(tmp_path / "out")
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {0o640}


def test_the_bytes_do_not_depend_on_time_or_order(tmp_path):
    publish(tmp_path / "a")
    with draft(tmp_path / "b", inputs=[], needs_bytes=0, force=False) as made:
        (made.path / "README.md").write_text("one")
        (made.path / "model.gguf").write_bytes(b"one" * 1000)
        made.commit({"text": "one", "tool": {"name": "efficli"}}, {"date": "2031-12-31"})
    one, other = fingerprint(tmp_path / "a"), fingerprint(tmp_path / "b")
    assert one.pop("run.json") != other.pop("run.json")
    assert one == other


def test_hashes_of_the_writer_are_used_and_sizes_compared(tmp_path):
    told = FileRecord("README.md", 3, "ab" * 32)
    assert told in publish(tmp_path / "out", hashed=[told]).files
    with lost_nothing(tmp_path), pytest.raises(OutputError, match=r"README.md: 3 bytes on disk, 4 were written"):
        publish(tmp_path / "other", hashed=[FileRecord("README.md", 4, "ab" * 32)])
    with lost_nothing(tmp_path), pytest.raises(OutputError, match=r"gone.bin: was written, but is not on disk"):
        publish(tmp_path / "other", hashed=[FileRecord("gone.bin", 4, "ab" * 32)])


def test_nothing_appears_without_a_commit_or_after_an_error(tmp_path):
    with lost_nothing(tmp_path):
        with draft(tmp_path / "out", inputs=[], needs_bytes=0, force=False) as made:
            (made.path / "model.gguf").write_bytes(b"x")
        with (
            pytest.raises(ZeroDivisionError),
            draft(tmp_path / "deep" / "out", inputs=[], needs_bytes=0, force=False) as made,
        ):
            (made.path / "model.gguf").write_bytes(b"x")
            raise ZeroDivisionError


def test_missing_parents_are_made(tmp_path):
    publish(tmp_path / "a" / "b" / "out")
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["out"]


@pytest.mark.parametrize("name", ["efficli.json", "SHA256SUMS", "run.json", "a\nb", "tab\t"])
def test_names_of_files_are_plain(tmp_path, name):
    with (
        lost_nothing(tmp_path),
        pytest.raises(ValueError, match="cannot have a file named"),
        draft(tmp_path / "out", inputs=[], needs_bytes=0, force=False) as made,
    ):
        (made.path / name).write_bytes(b"x")
        made.commit({}, {})


def test_only_regular_files_are_published(tmp_path):
    for make in (lambda path: path.mkdir(), lambda path: path.symlink_to("/etc/passwd")):
        with (
            lost_nothing(tmp_path),
            pytest.raises(ValueError, match="not a regular file"),
            draft(tmp_path / "out", inputs=[], needs_bytes=0, force=False) as made,
        ):
            make(made.path / "x")
            made.commit({}, {})


def test_a_draft_is_committed_once_and_holds_only_json_numbers(tmp_path):
    with draft(tmp_path / "out", inputs=[], needs_bytes=0, force=False) as made:
        made.commit({}, {})
        with pytest.raises(RuntimeError):
            made.commit({}, {})
    with (
        lost_nothing(tmp_path),
        pytest.raises(ValueError, match="JSON compliant"),
        draft(tmp_path / "b", inputs=[], needs_bytes=0, force=False) as made,
    ):
        made.commit({"loss": float("nan")}, {})


# Replacing (row 49)


def test_an_existing_artifact_needs_force_and_is_replaced_whole(tmp_path):
    out = tmp_path / "out"
    publish(out, "old")
    (out / "notes.txt").write_text("mine")
    with lost_nothing(tmp_path), pytest.raises(OutputError, match=r"out exists already$") as caught:
        publish(out, "new")
    assert "--force" in caught.value.hint
    publish(out, "new", force=True)
    assert read_artifact(out).manifest["text"] == "new"
    assert not (out / "notes.txt").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_foreign_things_need_force(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("mine")
    for name, words in (("file", "exists and is a file"), ("folder", "exists and was not made by efficli")):
        with lost_nothing(tmp_path), pytest.raises(OutputError, match=words):
            publish(tmp_path / name)
        publish(tmp_path / name, force=True)
        read_artifact(tmp_path / name).verify()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_an_empty_directory_may_be_used(tmp_path):
    (tmp_path / "out").mkdir()
    publish(tmp_path / "out")
    read_artifact(tmp_path / "out").verify()


def test_a_link_is_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "real")
    publish(tmp_path / "out", "old")
    publish(tmp_path / "out", "new", force=True)
    assert (tmp_path / "out").is_symlink()
    assert read_artifact(tmp_path / "disk" / "real").manifest["text"] == "new"
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["real"]


def test_a_read_only_old_artifact_is_removed(tmp_path):
    publish(tmp_path / "out", "old")
    (tmp_path / "out").chmod(0o555)
    publish(tmp_path / "out", "new", force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_two_steps_where_the_file_system_cannot_exchange(tmp_path, monkeypatch):
    monkeypatch.setattr("efficli.artifact.atomic.exchange", lambda one, other: False)
    publish(tmp_path / "out", "old")
    publish(tmp_path / "out", "new", force=True)
    assert read_artifact(tmp_path / "out").manifest["text"] == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_replacement_killed_between_two_steps_is_undone_or_finished(tmp_path):
    out = tmp_path / "out"
    publish(out, "old")
    old = fingerprint(out)
    out.rename(temporary.aside_path(out))
    with pytest.raises(OutputError, match="exists already"):
        publish(out, "new")
    assert fingerprint(out) == old
    publish(tmp_path / "left", "older")
    (tmp_path / "left").rename(temporary.aside_path(out))
    publish(out, "new", force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_exchange_swaps_or_says_that_it_cannot(tmp_path):
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").mkdir()
    if storage.exchange(tmp_path / "a", tmp_path / "b"):
        assert (tmp_path / "a").is_dir()
        assert (tmp_path / "b").read_text() == "a"
    with pytest.raises(FileNotFoundError):
        storage.exchange(tmp_path / "a", tmp_path / "missing")


# Checks before anything is computed (rows 45, 48, 50)


def test_no_space_is_found_before_anything_is_computed(tmp_path):
    with lost_nothing(tmp_path), pytest.raises(FitError, match=r"^needs 1,000,000,000 GB, [\d,]+ [GMk]?B.* free on /"):
        publish(tmp_path / "out", needs_bytes=10**18)
    assert FitError.exit_code == 4


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (812_000_000, "812 MB"), (9_990_000_000, "9,990 MB"), (12 * 10**9, "12 GB")],
)
def test_bytes_are_told_in_decimal_units(count, text):
    assert storage.byte_text(count) == text


def test_a_parent_that_is_a_file_or_not_writable(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    with lost_nothing(tmp_path), pytest.raises(OutputError, match="file is not a directory"):
        publish(tmp_path / "file" / "out")
    # root may write everywhere, so the answer of the system is replaced; test_faults.py asks a real one
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with lost_nothing(tmp_path), pytest.raises(OutputError, match=f"{tmp_path} is not writable"):
        publish(tmp_path / "out")


def test_the_output_cannot_overlap_an_input(tmp_path, monkeypatch):
    model = tmp_path / "models" / "tiny"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(model)
    outs = [
        model,
        model / "gguf",
        tmp_path / "models",
        tmp_path / "link",
        tmp_path / "link" / "x",
        model / ".." / "tiny",
    ]
    for out in outs:
        for inputs in ([model], [tmp_path / "link"], [tmp_path / "other", model / "config.json", model]):
            with lost_nothing(tmp_path), pytest.raises(UsageError, match="would overwrite the input"):
                publish(out, inputs=inputs, force=True)
    monkeypatch.chdir(model)
    with pytest.raises(UsageError, match="would overwrite the input"):
        publish(Path("gguf"), inputs=[Path()])
    publish(tmp_path / "models" / "tiny-gguf", inputs=[model])


def test_the_current_and_the_home_directory_are_safe(tmp_path, monkeypatch):
    work, home = tmp_path / "work" / "deep", tmp_path / "home" / "me"
    work.mkdir(parents=True)
    home.mkdir(parents=True)
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(home))
    for out in (Path(), work, work.parent):
        with lost_nothing(tmp_path), pytest.raises(UsageError, match="replace the current directory"):
            publish(out, force=True)
    for out in (home, home.parent):
        with lost_nothing(tmp_path), pytest.raises(UsageError, match="replace your home directory"):
            publish(out, force=True)


def test_a_mount_point_cannot_be_the_output(tmp_path):
    assert storage.is_mount(Path("/proc"))
    assert not storage.is_mount(tmp_path)
    with pytest.raises(OutputError, match="/dev/shm is a mount point") as caught:
        publish(Path("/dev/shm"), force=True)
    assert caught.value.hint == "-o /dev/shm/model"


# Locks (rows 51, 52)


def test_a_second_run_is_told_who_holds_the_output(tmp_path):
    with draft(tmp_path / "out", inputs=[], needs_bytes=0, force=False) as first:
        (first.path / "model.gguf").write_bytes(b"x")
        with pytest.raises(OutputError, match=rf"another efficli run holds .*/out \(pid {os.getpid()}\)"):
            publish(tmp_path / "out", force=True)
        publish(tmp_path / "neighbour")
        first.commit({}, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["neighbour", "out"]
    read_artifact(tmp_path / "out").verify()


def test_a_stale_lock_and_a_dead_temporary_directory_are_taken_over(tmp_path):
    (tmp_path / "out.lock").write_bytes(b"efficli run, pid 999999999\n")
    dead = tmp_path / ".efficli-tmp-999999999-0123abcd"
    dead.mkdir()
    (dead / "model.gguf").write_bytes(b"half")
    for name in (".efficli-tmp-notes", ".efficli-tmp-1-0123abcd.txt"):
        (tmp_path / name).write_text("mine")
    (tmp_path / ".efficli-tmp-1-00000000").symlink_to(dead)
    publish(tmp_path / "out")
    left = {".efficli-tmp-notes", ".efficli-tmp-1-0123abcd.txt", ".efficli-tmp-1-00000000", "out"}
    assert {p.name for p in tmp_path.iterdir()} == left


def test_a_file_of_the_user_with_the_name_of_the_lock_is_safe(tmp_path):
    (tmp_path / "out.lock").write_text("my notes")
    with lost_nothing(tmp_path), pytest.raises(OutputError, match=r"out.lock exists and is not a lock of efficli"):
        publish(tmp_path / "out", force=True)
    (tmp_path / "b.lock").symlink_to(tmp_path / "out.lock")
    with lost_nothing(tmp_path), pytest.raises(OutputError, match=r"cannot write b.lock"):
        publish(tmp_path / "b", force=True)
    os.mkfifo(tmp_path / "c.lock")
    with lost_nothing(tmp_path), pytest.raises(OutputError, match=r"c.lock exists and is not a lock"):
        publish(tmp_path / "c", force=True)


def test_the_longest_name_has_a_lock_too(tmp_path):
    out = tmp_path / ("n" * 255)
    publish(out)
    assert len(lock.lock_path(out).name) < 50
    assert lock.lock_path(tmp_path / "out").name == "out.lock"
    read_artifact(out).verify()


def test_one_of_many_threads_wins_and_the_others_are_told(tmp_path):
    outcomes: list[str] = []
    ready = threading.Barrier(8)

    def work():
        ready.wait()
        for _ in range(20):
            try:
                publish(tmp_path / "out", force=True)
                outcomes.append("published")
            except OutputError as error:
                outcomes.append("held" if "another efficli run holds" in error.line else error.line)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(outcomes) <= {"published", "held"}
    assert outcomes.count("published") >= 20 // 8
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    read_artifact(tmp_path / "out").verify()


# Errors of the disk, told


def test_errors_of_writing_say_what_was_kept(tmp_path):
    publish(tmp_path / "out", "old")
    for number, words in ((28, "no space left"), (122, "disk quota exceeded"), (30, "the file system is read-only")):
        for force, out, kept in ((True, "out", r" \(previous artifact kept\)"), (False, "fresh", "")):
            with (
                lost_nothing(tmp_path),
                pytest.raises(OutputError, match=rf"^cannot write model.gguf: {words}{kept}$"),
                draft(tmp_path / out, inputs=[], needs_bytes=0, force=force) as made,
                writing(made.path / "model.gguf"),
            ):
                raise OSError(number, os.strerror(number))
    with (
        lost_nothing(tmp_path),
        pytest.raises(OutputError, match=r"^cannot write model.gguf: the device reports an error \(previous"),
        draft(tmp_path / "out", inputs=[], needs_bytes=0, force=True) as made,
    ):
        raise OSError(5, "Input/output error", str(made.path / "model.gguf"))


def test_errors_of_reading_are_not_blamed_on_the_output(tmp_path):
    with (
        lost_nothing(tmp_path),
        pytest.raises(OSError, match=r"model\.safetensors"),
        draft(tmp_path / "out", inputs=[], needs_bytes=0, force=False),
    ):
        raise OSError(5, "Input/output error", "/data/model.safetensors")


def test_a_folder_is_published_as_it_is(tmp_path):
    """A checkpoint: its own efficli.json, folders inside, no sums."""
    with draft(tmp_path / "out", inputs=[], needs_bytes=0, force=False) as drafted:
        (drafted.path / "efficli.json").write_text("{}")
        (drafted.path / "1_Pooling").mkdir()
        (drafted.path / "1_Pooling" / "config.json").write_text("{}")
        drafted.commit_folder()
        with pytest.raises(RuntimeError, match="committed once"):
            drafted.commit_folder()
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert names == {"out", "out/efficli.json", "out/1_Pooling", "out/1_Pooling/config.json"}
    with draft(tmp_path / "other", inputs=[], needs_bytes=0, force=False) as drafted:
        (drafted.path / "link").symlink_to(tmp_path)
        with pytest.raises(ValueError, match="link is not a regular file"):
            drafted.commit_folder()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
