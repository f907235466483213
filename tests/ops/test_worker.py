"""A worker: what comes back, what each way of ending turns into, and its memory as it is seen from outside."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from efficli.errors import CheckpointError, FitError, GateError, UnsupportedError
from efficli.ops.child import ChildError
from efficli.ops.worker import Limits, Worker
from tests.ops.test_child import alive, wait_until

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MIB = 1 << 20
WITHOUT_LIMIT = Limits()


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(HERE)


def open_worker(function: str = "serve", argument: object = None, limits: Limits = WITHOUT_LIMIT, **options) -> Worker:
    return Worker(f"in_worker:{function}", argument, what="working", limits=limits, **options)


def sizes(pid: int) -> dict[str, int]:
    """Bytes of each size in /proc/PID/status, read by the test itself."""
    text = Path(f"/proc/{pid}/status").read_text()
    return {name: int(kb) * 1024 for name, kb in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}


# what comes back


def test_one_process_answers_several_requests():
    with open_worker(argument={"text": "häh\n"}) as worker:
        told = [worker.ask({"do": "echo", "text": text}) for text in ("a\nb", "\udcff", None)]
        pid = worker.pid
    assert told == [
        {"asked": asked, "argument": {"text": "häh\n"}, "text": text, "pid": pid}
        for asked, text in ((1, "a\nb"), (2, "\udcff"), (3, None))
    ]
    assert pid != os.getpid()


def test_requests_and_answers_larger_than_a_pipe_holds():
    text = "y" * 3_000_000
    with open_worker(argument=text) as worker:
        told = worker.ask({"do": "echo", "text": text})
        assert (told["argument"], told["text"]) == (text, text)
        assert worker.ask({"do": "echo"})["asked"] == 2


def test_what_libraries_print_does_no_harm():
    with open_worker() as worker:
        assert worker.ask({"do": "noisy"}) == "heard"
        assert worker.ask({"do": "noisy"}) == "heard"
        assert worker.ask({"do": "echo"})["asked"] == 3


def test_a_child_that_chatters_before_it_reads_is_heard_while_a_large_request_is_sent():
    with open_worker("chatter", argument="y" * 3_000_000, limits=Limits(seconds=60)) as worker:
        assert worker.ask({"do": "echo"})["asked"] == 1


def test_notes_are_kept_and_bars_are_not_shown():
    with open_worker() as worker:
        assert worker.ask({"do": "note", "text": "a fallback"}) == "noted"
        assert worker.ask({"do": "note", "text": "another"}) == "noted"
        assert worker.notes == ["a fallback", "another"]


# errors that do not end the process


def test_an_error_is_raised_and_the_worker_goes_on():
    with open_worker() as worker:
        with pytest.raises(CheckpointError) as caught:
            worker.ask({"do": "fail"})
        assert caught.value.line == "config.json:12: is not a model"
        assert caught.value.hint == "look at it"
        with pytest.raises(GateError, match="too far"):
            worker.ask({"do": "fail", "gate": True})
        with pytest.raises(FitError, match=r"^out of memory while computing$"):
            worker.ask({"do": "no_memory"}, what="computing")
        assert worker.ask({"do": "echo"})["asked"] == 4


def test_an_error_of_the_beginning_is_raised_where_the_worker_is_made():
    with pytest.raises(CheckpointError) as caught:
        open_worker("refuse", argument="m.gguf")
    assert (caught.value.line, caught.value.hint) == ("m.gguf: is not a model", "look at it")


# ends of the process


@pytest.mark.parametrize("number", [signal.SIGILL, signal.SIGSEGV, signal.SIGABRT])
def test_a_crash_is_one_line_and_every_further_request_tells_it_again(number):
    with open_worker(runtime="llama.cpp") as worker:
        for what in ("reading a prompt", "reading another"):
            with pytest.raises(UnsupportedError) as caught:
                worker.ask({"do": "die", "number": int(number)}, what=what)
            assert caught.value.line.startswith(f"llama.cpp crashed (signal {int(number)}) while reading a prompt: ")
            assert "\n" not in caught.value.line + (caught.value.hint or "")
        if number == signal.SIGABRT:
            assert caught.value.line.endswith("GGML_ASSERT(n > 0) failed")


def test_a_real_segmentation_fault():
    with (
        open_worker(runtime="onnxruntime") as worker,
        pytest.raises(UnsupportedError, match=r"onnxruntime .*signal 11"),
    ):
        worker.ask({"do": "null_pointer"})


def test_a_crash_while_the_worker_is_made():
    with pytest.raises(UnsupportedError, match=r"crashed \(signal 4\) while working"):
        open_worker("crash", argument=int(signal.SIGILL))


def test_killed_from_outside_is_memory_that_ran_out():
    """What the kernel's out-of-memory killer does, in the middle of a request."""
    with open_worker() as worker:
        killer = threading.Timer(0.2, os.kill, (worker.pid, signal.SIGKILL))
        killer.start()
        with pytest.raises(FitError, match=r"^out of memory while sleeping$") as caught:
            worker.ask({"do": "sleep", "seconds": 60}, what="sleeping")
        assert caught.value.exit_code == 4
        killer.join()


def test_ended_by_a_guard_of_the_memory_is_no_interrupt_of_ours():
    """earlyoom begins with SIGTERM."""
    with open_worker() as worker:
        guard = threading.Timer(0.2, os.kill, (worker.pid, signal.SIGTERM))
        guard.start()
        with pytest.raises(FitError, match=r"^sleeping was ended from outside \(signal 15\)$"):
            worker.ask({"do": "sleep", "seconds": 60}, what="sleeping")
        guard.join()


def test_killed_between_two_requests():
    with open_worker() as worker:
        os.kill(worker.pid, signal.SIGKILL)
        for _ in range(2):
            with pytest.raises(FitError, match="out of memory while working"):
                worker.ask({"do": "echo", "text": "y" * 1_000_000})


@pytest.mark.parametrize(("request_", "words"), [
    ({"do": "bug"}, "KeyError: 'no such key'"),
    ({"do": "leave", "code": 3}, "exit code 3"),
    ({"do": "leave", "code": 0}, "exit code 0"),
])  # fmt: skip
def test_a_bug_comes_back_with_its_traceback(request_, words):
    with open_worker() as worker:
        for _ in range(2):
            with pytest.raises(ChildError, match=words):
                worker.ask(request_)


@pytest.mark.parametrize("request_", [{"do": "sleep", "seconds": 60}, {"do": "stop"}])
def test_a_hang_ends_at_the_time_limit(request_):
    with open_worker(limits=Limits(seconds=60)) as worker:
        worker.limits = Limits(seconds=0.3)
        with pytest.raises(FitError) as caught:
            worker.ask(request_, what="reading a prompt")
        assert caught.value.line == "reading a prompt took more than 0.3 s, and was stopped"
        assert (caught.value.exit_code, caught.value.hint) == (4, "--time-limit SECONDS gives it longer")
        assert not alive(worker.pid)


def test_the_time_limit_holds_for_a_child_that_does_not_read():
    """A request that fills the pipe to a stopped process: the writer must not wait for ever."""
    with open_worker(limits=Limits(seconds=60)) as worker:
        worker.limits = Limits(seconds=0.3)
        os.kill(worker.pid, signal.SIGSTOP)
        with pytest.raises(FitError, match=r"took more than 0\.3 s"):
            worker.ask({"do": "echo", "text": "y" * 3_000_000})


def test_ctrl_c_ends_the_child_and_the_worker():
    with open_worker() as worker:
        interrupt = threading.Timer(0.2, signal.raise_signal, (signal.SIGINT,))
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            worker.ask({"do": "sleep", "seconds": 60})
        interrupt.join()
        assert not alive(worker.pid)
        with pytest.raises(KeyboardInterrupt):
            worker.ask({"do": "echo"})


def test_ctrl_c_while_it_is_closed_leaves_nothing():
    before = left()
    worker = open_worker()
    os.kill(worker.pid, signal.SIGSTOP)  # it cannot leave by itself
    interrupt = threading.Timer(0.2, signal.raise_signal, (signal.SIGINT,))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        worker.close()
    interrupt.join()
    assert not alive(worker.pid)
    assert left() == before


# memory


def test_peaks_are_those_that_the_kernel_counts(tmp_path):
    """Memory of its own and pages of files apart; the peak stays when memory is given back."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(MIB) * 60)
    with open_worker() as worker:
        before = sizes(worker.pid)
        worker.ask({"do": "map_file", "path": str(path)})
        mapped = sizes(worker.pid)
        worker.ask({"do": "allocate", "mib": 100})
        full = sizes(worker.pid)
        worker.ask({"do": "allocate", "mib": 60, "keep": False})
        after, peaks = sizes(worker.pid), worker.peaks
    assert mapped["RssFile"] - before["RssFile"] > 57 * MIB
    assert full["RssAnon"] - mapped["RssAnon"] > 97 * MIB
    assert after["VmHWM"] > full["VmHWM"] + 50 * MIB
    assert after["VmRSS"] < after["VmHWM"] - 50 * MIB
    assert peaks.rss == pytest.approx(after["VmHWM"], rel=0.02)
    assert peaks.file == pytest.approx(full["RssFile"], rel=0.02)
    # the last 60 MiB were there for a moment: seen as far as a busy machine let us look
    assert full["RssAnon"] * 0.98 <= peaks.anon <= after["VmHWM"] - after["RssFile"] + 4 * MIB


def test_peaks_know_what_came_and_went_between_two_looks():
    with open_worker() as worker:
        for _ in range(3):
            worker.ask({"do": "allocate", "mib": 64, "keep": False})
        status = worker.ask({"do": "status"})
        assert worker.peaks.rss == pytest.approx(int(status["VmHWM"].split()[0]) * 1024, rel=0.02)
        assert worker.peaks.rss > 64 * MIB


def test_memory_above_the_limit_is_told_with_its_figures():
    with open_worker(limits=Limits(memory=150 * MIB)) as worker:
        worker.ask({"do": "allocate", "mib": 20})
        with pytest.raises(FitError) as caught:
            worker.ask({"do": "allocate", "mib": 4000}, what="loading m.gguf")
        told = re.fullmatch(
            r"out of memory while loading m\.gguf: ([\d.]+) MiB of its own and ([\d.]+) MiB of files, "
            r"the limit is 150\.00 MiB",
            caught.value.line,
        )
        assert told
        assert float(told[1]) + float(told[2]) >= 150
        assert (caught.value.exit_code, "--memory-limit" in (caught.value.hint or "")) == (4, True)
        assert not alive(worker.pid)


def test_pages_of_files_count_unless_nobody_set_the_limit(tmp_path):
    """A kernel that is short of memory drops them: the machine's own limit is one of what cannot be dropped."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(MIB) * 90)
    limits = Limits(memory=80 * MIB)
    with open_worker(limits=limits) as worker, pytest.raises(FitError, match=r"of files, the limit is 80\.00 MiB"):
        worker.ask({"do": "map_file", "path": str(path)})
    with open_worker(limits=Limits(memory=80 * MIB, files=False)) as worker:
        worker.ask({"do": "map_file", "path": str(path)})
        with pytest.raises(FitError, match="out of memory"):
            worker.ask({"do": "allocate", "mib": 100, "keep": True})


def test_more_than_the_limit_for_a_moment_is_too_much():
    """Never between two looks, but in the kernel's own high-water mark: what is told does not depend on luck."""
    with open_worker() as worker:
        worker.ask({"do": "allocate", "mib": 150, "keep": False})
        worker.limits = Limits(memory=100 * MIB)
        told = r"out of memory while working: 1\d\d\.\d\d MiB for a moment, the limit is 100\.00 MiB"
        with pytest.raises(FitError, match=told):
            worker.ask({"do": "echo"})


def test_the_kernel_is_asked_to_end_the_worker_before_others():
    with open_worker() as worker:
        assert Path(f"/proc/{worker.pid}/oom_score_adj").read_text().strip() == "1000"


# what is left behind


def left() -> tuple[list[Path], list[str]]:
    """Open descriptors and children of this process."""
    return sorted(Path("/proc/self/fd").iterdir()), Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


def test_nothing_is_left_of_many_workers():
    before = left()
    for ending in ("close", "leave", "sleep", "error", "crash", "refuse", "twice"):
        if ending == "refuse":
            with pytest.raises(CheckpointError):
                open_worker("refuse")
            continue
        limits = Limits(seconds=0.2) if ending == "sleep" else WITHOUT_LIMIT
        with contextlib.suppress(UnsupportedError, ChildError, FitError, ZeroDivisionError), open_worker() as worker:
            worker.limits = limits
            if ending == "error":
                raise ZeroDivisionError
            if ending == "twice":
                worker.close()
                worker.close()
            else:
                requests = {
                    "close": {"do": "echo"},
                    "leave": {"do": "leave", "code": 3},
                    "sleep": {"do": "sleep", "seconds": 60},
                    "crash": {"do": "die", "number": 11},
                }
                worker.ask(requests[ending])
        assert not alive(worker.pid)
    assert left() == before


PARENT = """
import sys
sys.path[:0] = [{root!r}, {here!r}]
from efficli.ops.worker import Limits, Worker
{code}
"""


def run_parent(code: str, **options) -> subprocess.Popen[bytes]:
    text = PARENT.format(root=str(ROOT), here=str(HERE), code=code)
    return subprocess.Popen([sys.executable, "-c", text], **options)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_worker_dies_with_its_parent(tmp_path, number):
    pid_file = tmp_path / "pid"
    code = f"""
worker = Worker("in_worker:serve", None, what="w", limits=Limits())
worker.ask({{"do": "sleep", "seconds": 60, "pid_file": {str(pid_file)!r}}})
"""
    with run_parent(code) as parent:
        assert wait_until(pid_file.exists, 30)
        child = int(pid_file.read_text())
        assert alive(child)
        parent.send_signal(number)
        parent.wait(30)
    assert wait_until(lambda: not alive(child), 30)


def test_an_idle_worker_ends_when_its_parent_does(tmp_path):
    pid_file = tmp_path / "pid"
    code = f"""
import os
worker = Worker("in_worker:serve", None, what="w", limits=Limits())
open({str(pid_file)!r}, "w").write(str(worker.pid))
os._exit(0)
"""
    with run_parent(code) as parent:
        assert parent.wait(30) == 0
    assert wait_until(lambda: not alive(int(pid_file.read_text())), 30)


@pytest.mark.parametrize("closed", [(1,), (0, 1, 2)])
def test_works_with_stdin_and_stdout_closed(tmp_path, closed):
    told = tmp_path / "told"
    code = f"""
import os
for descriptor in {closed!r}:
    os.close(descriptor)
with Worker("in_worker:serve", 5, what="w", limits=Limits(seconds=60)) as worker:
    worker.ask({{"do": "noisy"}})
    got = worker.ask({{"do": "echo", "text": "y" * 300_000}})
open({str(told)!r}, 'w').write(f"{{got['argument']}} {{len(got['text'])}}")
"""
    with run_parent(code, stderr=subprocess.PIPE) as parent:
        complaints = parent.communicate(timeout=60)[1].decode()
    assert (parent.returncode, complaints) == (0, "")
    assert told.read_text() == "5 300000"


def test_looking_costs_little_while_nothing_changes():
    """CPU time of this process while it waits: a bench must not take from what it measures."""
    with open_worker() as worker:
        worker.ask({"do": "echo"})
        began, cpu = time.monotonic(), time.process_time()
        worker.ask({"do": "sleep", "seconds": 1.0})
        assert (time.process_time() - cpu) / (time.monotonic() - began) < 0.05
