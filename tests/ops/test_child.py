"""A child process: what comes back, and what each way of dying turns into."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from efficli.errors import CheckpointError, FitError, GateError, MissingExtra, UnsupportedError
from efficli.ops import crash
from efficli.ops.child import LOG_BYTES, ChildError, run_child
from efficli.progress import Silent

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(HERE)


def alive(pid: int) -> bool:
    """Whether the process still runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def test_argument_and_result_cross_unchanged():
    argument = {"text": "häh\n\udcff", "numbers": [1, 2.5, None], "long": "y" * 3_000_000}
    got = run_child("in_child:echo", argument, what="echoing")
    assert got["argument"] == argument
    assert got["pid"] != os.getpid()
    assert got["stdin"] == ""


def test_progress_is_relayed():
    class Recorder(Silent):
        def __init__(self):
            super().__init__()
            self.seen = []

        def start(self, task, total, unit=""):
            self.seen.append((task, total, unit))

        def advance(self, amount):
            self.seen.append(amount)

        def finish(self):
            self.seen.append("finish")

    recorder = Recorder()
    assert run_child("in_child:report", None, what="reporting", progress=recorder) is None
    assert recorder.seen == [("rows", 3, "rows"), 1, 1, 1, "finish"]
    assert recorder.notes == ["a fallback"]


def test_output_of_libraries_does_no_harm():
    assert run_child("in_child:noisy", None, what="chattering") == "true"


def test_errors_keep_class_hint_and_place():
    with pytest.raises(CheckpointError) as caught:
        run_child("in_child:fail", None, what="failing")
    assert caught.value.line == "config.json:12: is not a model"
    assert caught.value.hint == "look at it"
    with pytest.raises(MissingExtra, match="this needs llama-cpp-python") as missing:
        run_child("in_child:fail", "extra", what="failing")
    assert missing.value.hint == "pip install 'efficli[gguf]'"
    assert missing.value.exit_code == 5
    with pytest.raises(GateError, match="too far") as subclass:
        run_child("in_child:fail", "subclass", what="failing")
    assert type(subclass.value) is GateError


@pytest.mark.parametrize(("function", "words"), [("bug", "KeyError: 'no such key'"), ("not_json", "not JSON seri")])
def test_a_bug_comes_back_with_its_traceback(function, words):
    with pytest.raises(ChildError, match=words) as caught:
        run_child(f"in_child:{function}", None, what="computing")
    assert "Traceback" in str(caught.value)


@pytest.mark.parametrize("code", [0, 3])
def test_leaving_without_an_answer_is_a_bug(code):
    with pytest.raises(ChildError, match=rf"while leaving \(exit code {code}\)"):
        run_child("in_child:leave", code, what="leaving")


@pytest.mark.parametrize("number", [signal.SIGILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE])
def test_a_crash_is_one_line_with_a_cure(number):
    with pytest.raises(UnsupportedError) as caught:
        run_child("in_child:die", int(number), what="loading model.gguf")
    error = caught.value
    assert error.line.startswith(f"llama.cpp crashed (signal {int(number)}) while loading model.gguf: ")
    assert "\n" not in error.line
    assert "\n" not in error.hint
    if number in (signal.SIGILL, signal.SIGSEGV):
        assert "processor" in error.line
        assert "scripts/install-llama.sh" in error.hint
        assert "CMAKE_ARGS" in error.hint
    else:
        assert error.line.endswith("GGML_ASSERT(n > 0) failed")
    assert "loading the tensors" in error.__notes__[0]


def test_a_real_segmentation_fault():
    with pytest.raises(UnsupportedError, match=r"onnxruntime crashed \(signal 11\)"):
        run_child("in_child:null_pointer", None, what="loading", runtime="onnxruntime")


@pytest.mark.parametrize(
    ("number", "built_for", "flags", "words"),
    [
        (4, "AVX AVX2 AVX512_VBMI", "avx avx2", "it was built for AVX512_VBMI, which this processor lacks"),
        (4, "NEON DOTPROD REPACK", "asimd", "it was built for DOTPROD, which this processor lacks"),
        (4, "AVX", "avx", "instructions that this processor lacks"),
        (4, "AVX", "", "instructions that this processor lacks"),
        (11, "AVX AMX_INT8", "avx amx_int8 amx_tile", "built for AMX, which a virtual machine may announce"),
        (11, "AVX", "avx", "built for another processor"),
    ],
)
def test_the_cause_names_the_processor_feature(monkeypatch, number, built_for, flags, words):
    monkeypatch.setattr(crash, "cpu_features", lambda: frozenset(flags.split()))
    monkeypatch.setattr(crash, "built_features", lambda: frozenset(built_for.split()))
    assert words in crash.crash_error(number, "loading", "llama.cpp", "").line


def test_what_the_library_was_built_for_is_known_and_here():
    """The names are llama.cpp's own, and this machine's build fits this machine."""
    built_for = crash.built_features() & set(crash.FEATURES)
    assert built_for
    assert {crash.FEATURES[name] for name in built_for} <= crash.cpu_features()


def test_the_processor_has_features():
    assert crash.cpu_features()


@pytest.mark.parametrize(("function", "argument"), [("die", int(signal.SIGKILL)), ("eat_memory", None)])
def test_memory_that_ran_out_does_not_fit(function, argument):
    with pytest.raises(FitError, match=r"^out of memory while quantizing blk\.3$") as caught:
        run_child(f"in_child:{function}", argument, what="quantizing blk.3")
    assert caught.value.exit_code == 4


def test_timeout_kills_the_child(tmp_path):
    began = time.monotonic()
    with pytest.raises(FitError, match=r"sleeping took more than 0\.5 s"):
        run_child("in_child:sleep", str(tmp_path / "pid"), what="sleeping", timeout_s=0.5)
    assert time.monotonic() - began < 5
    if (tmp_path / "pid").exists():
        assert not alive(int((tmp_path / "pid").read_text()))


def test_a_crash_after_the_answer_is_no_failure():
    assert run_child("in_child:crash_at_exit", None, what="leaving") == "done"


def test_no_descriptor_or_process_is_left():
    before = sorted(Path("/proc/self/fd").iterdir())
    run_child("in_child:report", None, what="reporting")
    with pytest.raises(UnsupportedError):
        run_child("in_child:die", 11, what="dying")
    assert sorted(Path("/proc/self/fd").iterdir()) == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


PARENT = """
import sys
sys.path[:0] = [{root!r}, {here!r}]
from efficli.ops.child import run_child
{code}
"""


def run_parent(code: str, **options) -> subprocess.Popen[bytes]:
    text = PARENT.format(root=str(ROOT), here=str(HERE), code=code)
    return subprocess.Popen([sys.executable, "-c", text], **options)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_the_child_dies_with_its_parent(tmp_path, number):
    pid_file = tmp_path / "pid"
    code = f"run_child('in_child:sleep', {str(pid_file)!r}, what='sleeping')"
    with run_parent(code, stderr=subprocess.PIPE) as parent:
        assert wait_until(pid_file.exists)
        child = int(pid_file.read_text())
        assert alive(child)
        parent.send_signal(number)
        parent.communicate(timeout=10)
    assert wait_until(lambda: not alive(child))


def test_works_with_stdin_stdout_and_stderr_closed(tmp_path):
    told = tmp_path / "told"
    code = f"""
import os
for descriptor in (0, 1, 2):
    os.close(descriptor)
got = run_child('in_child:echo', 5, what='echoing')
open({str(told)!r}, 'w').write(str(got['argument']))
"""
    with run_parent(code) as parent:
        assert parent.wait(timeout=20) == 0
    assert told.read_text() == "5"


def test_a_module_in_the_current_directory_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("raise SystemExit('hijacked')")
    monkeypatch.chdir(tmp_path)
    assert run_child("in_child:echo", 1, what="echoing")["argument"] == 1


def test_the_log_is_bounded():
    with pytest.raises(ChildError) as caught:
        run_child("in_child:leave_noisily", None, what="leaving")
    assert len(str(caught.value)) < LOG_BYTES + 1000


def test_a_stall_is_a_time_without_progress():
    assert run_child("in_child:plod", 0.5, what="plodding", stall_s=2.0) == "there"
    with pytest.raises(FitError, match=r"^plodding showed no progress for 0\.5 s, and was stopped$"):
        run_child("in_child:plod", 60, what="plodding", stall_s=0.5)
