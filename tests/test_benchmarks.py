"""benchmarks/: runs that survive a kill, alternation, limits, the page; with real small commands."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"

SCRIPT = """
import functools, os, signal, sys
from pathlib import Path
from runner import Benchmark, Limit, Step, alternating, arguments, ratio

parser = arguments("A benchmark of two commands.", "tiny")
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--most", type=float, default=1e9)
parser.add_argument("--die-in", default="")
options = parser.parse_args()
die_in, options.die_in = options.die_in, ""
bench = Benchmark("tiny", "which of two commands takes longer?", options, "numpy")
seen = bench.folder / "seen.txt"


def step(number, side):
    with seen.open("a") as file:
        file.write(f"{number}/{side}\\n")
    if f"{number}/{side}" == die_in.removeprefix("interrupt:"):
        os.kill(os.getpid(), signal.SIGINT if die_in.startswith("interrupt:") else signal.SIGKILL)
    return bench.measure(["sleep", "0.02" if side == "a" else "0.01"])


steps = [Step(name=f"{n}/{s}", run=functools.partial(step, n, s)) for n, s in alternating(options.rounds, "a", "b")]
bench.run(steps)
pairs = [(bench.runs[f"{n}/a"]["wall_s"], bench.runs[f"{n}/b"]["wall_s"]) for n in range(options.rounds)]
limits = [Limit(name="a / b", found=ratio(pairs), least=0.0, most=options.most)]
sys.exit(bench.finish(limits, pairs=pairs))
"""


@pytest.fixture
def tiny(tmp_path):
    """Runs the small benchmark in a folder of its own."""
    script = tmp_path / "tiny.py"
    script.write_text(SCRIPT)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(script), "--work", str(tmp_path / "work"), "--results", str(tmp_path), *words]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(BENCHMARKS), str(ROOT)])}
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    return run


def steps_run(folder: Path) -> list[str]:
    """Names of the steps that were begun, in order."""
    return (folder / "work/seen.txt").read_text().split()


def test_pairs_alternate_and_the_result_has_everything(tiny, tmp_path):
    done = tiny("--rounds", "3")
    assert done.returncode == 0, done.stderr
    assert steps_run(tmp_path) == ["0/a", "0/b", "1/b", "1/a", "2/a", "2/b"]
    result = json.loads((tmp_path / "tiny.json").read_text())
    assert result["command"] == "python benchmarks/tiny.py --rounds 3"  # without this machine's folders
    assert result["machine"]["cores"] == len(os.sched_getaffinity(0))
    assert result["versions"].keys() == {"numpy"}
    assert result["runs"].keys() == set(steps_run(tmp_path))
    limit = result["limits"][0]
    assert limit["holds"]
    assert limit["n"] == 3
    ratios = [result["runs"][f"{n}/a"]["wall_s"] / result["runs"][f"{n}/b"]["wall_s"] for n in range(3)]
    assert limit["median"] == pytest.approx(statistics.median(ratios), abs=1e-4)
    assert limit["low"] == pytest.approx(min(ratios), abs=1e-4)
    assert "holds: a / b" in done.stdout


def test_a_killed_benchmark_goes_on(tiny, tmp_path):
    killed = tiny("--die-in", "1/b")
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "tiny.json").exists()
    kept = json.loads((tmp_path / "work/runs.json").read_text())["runs"]
    assert list(kept) == ["0/a", "0/b"]
    done = tiny()
    assert done.returncode == 0, done.stderr
    assert steps_run(tmp_path) == ["0/a", "0/b", "1/b", "1/b", "1/a", "2/a", "2/b"]  # only the killed one twice
    runs = json.loads((tmp_path / "tiny.json").read_text())["runs"]
    assert {name: runs[name] for name in kept} == kept
    tiny()  # a finished benchmark measures anew
    assert steps_run(tmp_path)[7:] == ["0/a", "0/b", "1/b", "1/a", "2/a", "2/b"]


def test_an_interrupted_benchmark_says_how_to_go_on(tiny, tmp_path):
    done = tiny("--die-in", "interrupt:0/b")
    assert done.returncode == 130
    assert "tiny: interrupted; 5 of 6 runs are missing: 0/b, 1/b, 1/a, 2/a, 2/b" in done.stderr
    assert "the same command goes on" in done.stderr
    assert "Traceback" not in done.stderr


def test_out_of_time_says_what_is_missing_and_each_call_gets_on(tiny, tmp_path):
    done = tiny("--minutes", "0")
    assert done.returncode == 4
    assert "out of time" in done.stderr
    assert "5 of 6 runs are missing: 0/b, 1/b, 1/a, 2/a, 2/b" in done.stderr
    assert tiny("--minutes", "0").returncode == 4
    assert steps_run(tmp_path) == ["0/a", "0/b"]
    assert tiny("--minutes", "5").returncode == 0


def test_a_limit_that_is_not_met_is_said_and_is_exit_1(tiny, tmp_path):
    done = tiny("--most", "0", "--rounds", "1")
    assert done.returncode == 1
    assert "NOT MET: a / b" in done.stdout
    assert "0 of 1 limits hold" in done.stdout
    assert json.loads((tmp_path / "tiny.json").read_text())["limits"][0]["holds"] is False


def test_runs_of_other_conditions_are_not_mixed_in(tiny, tmp_path):
    assert tiny("--minutes", "0").returncode == 4
    other = tiny("--rounds", "2")
    assert other.returncode == 1
    assert "its runs are of other options" in other.stderr
    state = tmp_path / "work/runs.json"
    kept = json.loads(state.read_text())
    kept["conditions"]["versions"]["numpy"] = "1.0"
    state.write_text(json.dumps(kept))
    other = tiny()
    assert other.returncode == 1
    assert "its runs are of other versions" in other.stderr


def measured(tmp_path: Path, program: str) -> subprocess.CompletedProcess[str]:
    """A program that begins with machine imported and `log` set."""
    head = f"import machine, pathlib, sys; log = pathlib.Path({str(tmp_path / 'log')!r}); "
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS)}
    # by way of a shell that stays: a program keeps the peak memory of the process that starts it, pytest's is large
    command = ["sh", "-c", '"$0" -c "$1"; exit $?', sys.executable, head + program]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_a_command_that_fails_ends_the_benchmark(tmp_path):
    done = measured(tmp_path, "machine.measure(['false'], log=log)")
    assert done.returncode == 1
    assert "false: exit code 1, see" in done.stderr


def test_peak_memory_is_that_of_the_command_or_is_not_told(tmp_path):
    child = "[sys.executable, '-c', 'x = bytearray(range(250)) * 250_000']"
    done = measured(tmp_path, f"print(machine.measure({child}, log=log, memory=True)['peak_rss_bytes'])")
    assert 60e6 < int(done.stdout) < 120e6
    done = measured(tmp_path, f"x = b'1' * 200_000_000; machine.measure({child}, log=log, memory=True)")
    assert done.returncode == 1
    assert "its peak memory is hidden by this process's" in done.stderr


def test_what_others_take_is_seen_and_what_was_waited_for_is_ours(tmp_path):
    program = """
import subprocess, time
others = machine.Others()
began = time.monotonic()
burn = [sys.executable, '-c', 'import time\\nwhile time.process_time() < 0.5: pass']
child = subprocess.Popen(burn, stdout=subprocess.PIPE)
time.sleep(0.3)
ticks = pathlib.Path(f'/proc/{child.pid}/stat').read_text().rsplit(')', 1)[1].split()[11]
foreign = others.cores() * (time.monotonic() - began)
assert foreign > int(ticks) / 100 - 0.05, (foreign, ticks)
before = machine.own_seconds()
child.wait()
assert machine.own_seconds() - before > 0.4
"""
    done = measured(tmp_path, f"exec({program!r})")
    assert done.returncode == 0, done.stderr


def test_a_run_is_made_again_where_others_disturb_it_and_no_longer_than_asked(tmp_path):
    program = """
import argparse, runner
options = argparse.Namespace(work=log.parent / 'work', minutes=1, results=None)
bench = runner.Benchmark('tiny', '', options)
runner.QUIET_CORES = -1.0
found = bench.quietly(lambda: {'figure': bench.measure(['sleep', '0.01'])['wall_s']}, 0.0)
assert found['attempts'] == 1 and found['others_cores'] >= 0 and found['figure'] > 0.009, found
assert bench.quietly(lambda: bench.measure(['sleep', '0.3']), 1.1)['attempts'] >= 1
runner.QUIET_CORES = 1e9
assert bench.quietly(lambda: {}, 60.0)['attempts'] == 1
"""
    done = measured(tmp_path, f"exec({program!r})")
    assert done.returncode == 0, done.stderr


def test_a_limit_is_sure_where_the_whole_interval_is_on_its_side(tmp_path):
    program = """
from runner import Limit, estimate
def limit(*samples): return Limit(name='x', found=estimate(samples), least=0.95, most=1.05)
told = [(found.holds, found.sure) for found in (limit(1.0, 1.01), limit(0.9, 1.1), limit(0.8, 0.81), limit(0.8, 1.0))]
assert told == [(True, True), (True, False), (False, True), (False, False)], told
assert 'not sure' in limit(0.9, 1.1).line and 'not sure' not in limit(1.0, 1.01).line
"""
    done = measured(tmp_path, f"exec({program!r})")
    assert done.returncode == 0, done.stderr


@pytest.fixture
def page(tmp_path):
    """Runs page.py on a folder of results."""

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(BENCHMARKS / "page.py"), "--results", str(tmp_path), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    return run


def speed_result(limits: list[dict[str, object]]) -> dict[str, object]:
    """A result of llama_bench.py with one comparison."""
    figures = {"n": 6, "median": 1.0, "low": 0.98, "high": 1.02, "confidence": 0.95, "mean": 1.0, "stdev": 0.01}
    speed = {**figures, "median": 812.4}
    return {
        "benchmark": "llama_bench",
        "question": "Is it the same?",
        "command": "python benchmarks/llama_bench.py",
        "date": "2025-01-31",
        "options": {},
        "machine": {"processor": "Made Up 9", "cores": 4, "features": ["avx2"], "memory_gib": 8, "system": "Linux"},
        "versions": {"llama-cpp-python": "0.3.36"},
        "limits": limits,
        "comparisons": [
            {
                "file": "a|b/Q8_0",
                "threads": 2,
                "test": "pp512",
                "ratio": figures,
                "holds": True,
                "efficli": speed,
                "llama-bench": speed,
            }
        ],
        "runs": {"0/a|b/Q8_0/t2/efficli": {"others_cores": 0.04}},
    }


def test_the_page_shows_question_conditions_table_and_limits(page, tmp_path):
    limit = {"name": "decode", "n": 6, "median": 0.9, "low": 0.89, "high": 0.91, "least": 0.95, "most": 1.05}
    kept = speed_result(
        [{**limit, "holds": False, "sure": True}, {**limit, "median": 1.0, "holds": True, "sure": False}]
    )
    (tmp_path / "llama_bench.json").write_text(json.dumps(kept))
    assert page("--check").returncode == 1
    assert page().returncode == 0
    text = (tmp_path / "README.md").read_text()
    for told in ("Is it the same?", "`python benchmarks/llama_bench.py` on 2025-01-31", "Made Up 9", "0.3.36"):
        assert told in text
    assert "| a\\|b/Q8_0 | 2 | prefill (pp512) | 812 | 812 | 1.000 (0.980 - 1.020) | yes |" in text
    assert "1 of 2 limits hold. Of 1 the interval reaches beyond the limit." in text
    assert "Not met: decode, 0.900 (0.890 - 0.910), at least 0.95 and at most 1.05." in text
    assert page("--check").returncode == 0
    (tmp_path / "llama_bench.json").write_text(json.dumps(speed_result([])))
    assert page("--check").returncode == 1
    assert "No limit is set." in page_text(page, tmp_path)


def page_text(page, folder: Path) -> str:
    """The page, written anew."""
    assert page().returncode == 0
    return (folder / "README.md").read_text()


def test_the_page_in_the_repository_is_that_of_its_results():
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "page.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_result_is_of_a_script_that_is_there_and_named_in_the_readme():
    told = (BENCHMARKS / "README.md").read_text()
    for path in (BENCHMARKS / "results").glob("*.json"):
        result = json.loads(path.read_text())
        script = BENCHMARKS / f"{result['benchmark']}.py"
        assert script.exists()
        assert path.stem == result["benchmark"]
        assert f"`{script.name}`" in told
        assert all(limit["holds"] for limit in result["limits"]), f"{path.name} has a limit that is not met"
