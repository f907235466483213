"""Which pages of a file are in memory, and dropping them."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys

import pytest

from efficli.ops import page_cache
from efficli.ops.page_cache import drop, resident
from efficli.ops.process import memory_of

MIB = 1 << 20


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(16 * MIB))
    return path


def read_quietly(path, offset: int, count: int) -> None:
    """Read a part, and tell the kernel not to read ahead."""
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    assert len(os.pread(descriptor, count, offset)) == count
    os.close(descriptor)


def test_a_file_just_written_is_there_and_goes(file):
    assert resident(file) == 1.0
    assert drop(file) == 0.0
    assert resident(file) == 0.0


def test_the_share_is_that_of_the_pages_that_were_read(file):
    drop(file)
    read_quietly(file, 4 * MIB, 2 * MIB)
    assert resident(file) == pytest.approx(2 / 16)
    read_quietly(file, 15 * MIB, MIB)
    assert resident(file) == pytest.approx(3 / 16)


def test_looking_reads_nothing(file):
    drop(file)
    before = memory_of(os.getpid()).rss_file
    for _ in range(3):
        assert resident(file) == 0.0
    assert memory_of(os.getpid()).rss_file - before < MIB


def test_a_large_file_is_looked_at_window_by_window(file, monkeypatch):
    drop(file)
    read_quietly(file, 3 * MIB - mmap.PAGESIZE, 2 * mmap.PAGESIZE)
    whole = resident(file)
    monkeypatch.setattr(page_cache, "WINDOW", 3 * MIB)
    assert resident(file) == whole == 2 / (16 * MIB // mmap.PAGESIZE)


def test_a_page_that_someone_has_mapped_stays_and_is_told(file):
    code = f"import mmap\nf = open({str(file)!r}, 'rb')\nm = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)\n"
    code += "sum(m[: 4 << 20 : 4096]); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1) as process:
        process.stdout.readline()
        assert 4 / 16 <= drop(file) < 1
        process.communicate(b"\n")
    assert drop(file) == 0.0


def test_the_last_page_counts_whole_and_an_empty_file_has_none(tmp_path):
    short, empty = tmp_path / "short", tmp_path / "empty"
    short.write_bytes(b"x")
    empty.touch()
    assert resident(short) == 1.0
    assert drop(short) == 0.0
    assert resident(empty) == drop(empty) == 0.0


def test_a_file_that_linux_tells_nothing_about_is_not_known(file):
    """Of a file that is neither its own nor writable, a process hears "all resident" from mincore."""
    file.chmod(0o644)
    code = "import os, sys\nfrom pathlib import Path\nfrom efficli.ops.page_cache import resident\n"
    code += "descriptor = os.open(sys.argv[1], os.O_RDONLY)\nos.setuid(int(sys.argv[2]))\n"
    code += "print(resident(Path(f'/proc/self/fd/{descriptor}')))"

    def seen_by(user: int) -> str:
        command = [sys.executable, "-c", code, str(file), str(user)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    drop(file)
    assert seen_by(os.geteuid()) == "0.0"
    if os.geteuid() == 0:
        assert seen_by(65534) == "None"
        file.chmod(0o666)
        assert seen_by(65534) == "0.0"


@pytest.mark.parametrize("function", [drop, resident])
def test_a_file_that_is_not_there_is_an_os_error(function, tmp_path):
    with pytest.raises(FileNotFoundError):
        function(tmp_path / "none")
