"""Speed, starts and memory of real files by llama.cpp: figures agree with each other and with what is seen outside."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from efficli.bench import suite
from efficli.bench.engine import Repeat
from efficli.bench.figures import ArtifactResult, Comparison, Settings, SpeedTest
from efficli.bench.gguf_engine import GgufEngine, GgufFile, GgufStarter
from efficli.bench.rounds import Effort
from efficli.bench.suite import Energy, Plan, measure, measure_in_turns
from efficli.chat import render
from efficli.errors import FitError
from efficli.ops.energy import open_meter
from efficli.ops.page_cache import drop, resident
from efficli.ops.process import cpu_seconds
from efficli.ops.worker import Limits
from efficli.progress import Silent
from tests import pico
from tests.converted import convert
from tests.tiny_architectures import write_encoder, write_windowed
from tests.tiny_gguf import write_tiny

LIMITS = Limits(seconds=120)
QUICK = Effort(patience=0)
PROMPT, GEN = SpeedTest(n_prompt=40), SpeedTest(n_gen=12)
AT_DEPTH = SpeedTest(n_prompt=16, n_depth=100)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """77 MB."""
    return write_tiny(tmp_path_factory.mktemp("large") / "large.gguf", vocab=300_000)


def plan_of(path: Path, *tests: SpeedTest, effort: Effort = QUICK, generates: bool = True, **options) -> Plan:
    values = {"limits": LIMITS, "starts": False, "scenarios": ()} | options
    return Plan(
        file=GgufFile(path=path, generates=generates),
        settings=Settings(ctx=200, threads=1),
        effort=effort,
        tests=tests,
        **values,
    )


NO_ENERGY = Energy(None)


def measured(plan: Plan, energy: Energy = NO_ENERGY) -> ArtifactResult:
    result = ArtifactResult(path=str(plan.file.path), settings=plan.settings, planned=plan.tests)
    measure(plan, result, energy=energy, progress=Silent())
    return result


@dataclass
class Heard:
    """Every repeat that the engines made, in order."""

    files: list[str] = field(default_factory=list)
    tests: list[SpeedTest] = field(default_factory=list)
    repeats: list[Repeat] = field(default_factory=list)
    pids: dict[str, int] = field(default_factory=dict)


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Heard:
    found, real = Heard(), GgufEngine.repeat

    def repeat(self: GgufEngine, test: SpeedTest) -> Repeat:
        made = real(self, test)
        found.files.append(self.file.path.stem)
        found.tests.append(test)
        found.repeats.append(made)
        found.pids[self.file.path.stem] = self.pid
        return made

    monkeypatch.setattr(GgufEngine, "repeat", repeat)
    return found


class Interrupting(Silent):
    """Calls `do` at the so-manieth step of a task whose name has `word` in it."""

    def __init__(self, word: str, step: int, do: Callable[[], None]) -> None:
        super().__init__()
        self.word, self.left, self.do = word, step, do
        self.task = ""

    def start(self, task: str, total: float, unit: str = "") -> None:
        self.task = task

    def advance(self, amount: float) -> None:
        if self.word in self.task:
            self.left -= 1
            if self.left == 0:
                self.do()


def interrupt() -> None:
    raise KeyboardInterrupt


def children() -> set[int]:
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


# speed


def test_rates_times_and_quantiles_are_those_of_the_repeats(tiny, heard):
    result = measured(plan_of(tiny, PROMPT, GEN, AT_DEPTH, effort=Effort(least=7, most=9)))
    assert [test.test for test in result.tests] == [PROMPT, GEN, AT_DEPTH]
    warm, counted = heard.repeats[:3], heard.repeats[3:]
    assert [test.tokens for test in heard.tests[:3]] == [40, 1, 16]  # of generation one token, as llama-bench does
    assert len(warm) == 3
    for told in result.tests:
        made = [repeat for repeat, test in zip(counted, heard.tests[3:], strict=True) if test == told.test]
        assert 7 <= len(made) <= 9
        assert told.samples_ns == tuple(repeat.ns for repeat in made)
        assert told.rate.samples == pytest.approx([told.test.tokens * 1e9 / ns for ns in told.samples_ns])
        assert told.rate.unit == "tokens/s"
        assert told.rate.estimate.median == pytest.approx(np.median(told.rate.samples))
        assert told.rate.steady is (told.rate.estimate.spread <= 0.05)
        assert told.began.endswith("Z")
        assert told.energy is None
        if told.test.n_prompt:
            assert told.ttft.unit == "ms"
            assert told.tpot is None
            assert all(ms >= ns / 1e6 for ms, ns in zip(told.ttft.samples, told.samples_ns, strict=True))
        else:
            tokens = [ns / 1e6 for repeat in made for ns in repeat.token_ns]
            assert told.tpot.n == len(tokens) == 12 * len(made)
            wanted = np.quantile(tokens, [0.5, 0.95, 0.99])
            assert [told.tpot.p50, told.tpot.p95, told.tpot.p99] == pytest.approx(wanted.tolist())
            assert told.ttft is None
            assert all(repeat.ns == sum(repeat.token_ns) for repeat in made)


def test_steady_is_what_the_interval_says_and_nothing_else(tiny):
    result = measured(plan_of(tiny, PROMPT))
    [told] = result.tests
    middle = np.median(told.rate.samples)
    reach = max(max(told.rate.samples) / middle - 1, 1 - min(told.rate.samples) / middle)  # of five, the range
    assert told.rate.steady is bool(reach <= 0.05)


def test_what_the_file_says(tiny):
    facts = measured(plan_of(tiny, PROMPT)).model
    assert (facts.path, facts.nbytes, facts.trained_ctx) == (str(tiny), tiny.stat().st_size, 256)
    assert 0 < facts.tensor_bytes < facts.nbytes
    assert facts.num_weights == facts.tensor_bytes // 4  # F32
    assert (facts.generates, facts.has_tokenizer, facts.chat_template) == (True, False, None)
    assert facts.description.startswith("llama")


def test_an_embedding_model_reads(tmp_path):
    plan = plan_of(write_encoder(tmp_path / "e.gguf"), PROMPT, generates=False)
    [told] = measured(plan).tests
    assert told.ttft.samples == pytest.approx([ns / 1e6 for ns in told.samples_ns])
    assert plan.starter.start(cold=True).first_token_ns > 0


def test_a_chat_is_what_the_template_makes_of_it(tmp_path):
    template = "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    model = pico.write_llama(tmp_path / "m", chat_template=template)
    [path] = convert(model, tmp_path / "out", "F32")
    with GgufEngine(GgufFile(path=path, generates=True), Settings(ctx=200, threads=1), LIMITS) as engine:
        assert engine.facts.chat_template == template
        [rendered] = render(template, [[{"role": "user", "content": "def f"}]], specials={"bos_token": "<|endoftext|>"})
        told = engine.request("def f", chat=True, n_gen=3)
        assert told.prompt_tokens == engine.count_tokens("def f", chat=True)
        # control tokens of the template are one token each, and the begin token is not doubled
        assert told.prompt_tokens == engine.count_tokens(rendered.removeprefix("<|endoftext|>"), chat=False) + 1
        plain = engine.request("def f", chat=False, n_gen=3)
        assert plain.prompt_tokens < told.prompt_tokens
        assert len(plain.token_ns) == 2


# starts


def test_cold_is_cold_and_warm_is_warm(large):
    """Before each start the file is out of the page cache, or all of it is in."""
    result = measured(plan_of(large, starts=True, effort=Effort(least=5, most=40, within=1e-9, patience=0)))
    cold, warm = result.starts
    assert (cold.cold, cold.resident) == (True, 0.0)
    assert (warm.cold, warm.resident) == (False, 1.0)
    for start in result.starts:
        assert start.total.estimate.n == 5
        parts = zip(start.process.samples, start.load.samples, start.first_token.samples, strict=True)
        assert start.total.samples == pytest.approx([sum(part) for part in parts])
        assert min(start.process.samples + start.load.samples + start.first_token.samples) > 0


def test_a_start_leaves_the_file_as_it_used_it(large):
    """What the columns mean: a cold start has read the file from the disk by its end."""
    starter = GgufStarter(
        file=GgufFile(path=large, generates=True), settings=Settings(ctx=64, threads=1), limits=LIMITS
    )
    before = drop(large)
    cold = starter.start(cold=True)
    assert (before, cold.resident) == (0.0, 0.0)
    assert resident(large) > 0.4
    assert starter.start(cold=False).resident == 1.0
    assert starter.start(cold=True).resident == 0.0
    assert children() == set()


@pytest.mark.slow
def test_starts_have_their_own_limit(tiny, monkeypatch):
    monkeypatch.setattr(suite, "MOST_STARTS", 6)
    effort = Effort(least=5, most=40, within=1e-9, patience=1e9)
    result = measured(plan_of(tiny, starts=True, effort=effort))
    assert [start.total.estimate.n for start in result.starts] == [6, 6]


# memory


class Watcher(threading.Thread):
    """Looks at /proc/PID/status of every child of this process as often as it can."""

    def __init__(self) -> None:
        super().__init__()
        self.peaks: dict[int, dict[str, int]] = {}
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.002):
            for pid in children():
                with contextlib.suppress(OSError):
                    # until it has its own program, a child shows the memory of its parent
                    if b"worker.serve()" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                        continue
                    text = Path(f"/proc/{pid}/status").read_text()
                    sizes = {name: int(kb) * 1024 for name, kb in re.findall(r"(\w+):\s+(\d+) kB", text)}
                    known = self.peaks.setdefault(pid, {})
                    for name in ("VmHWM", "RssAnon", "RssFile"):
                        known[name] = max(known.get(name, 0), sizes.get(name, 0))

    def __enter__(self) -> Watcher:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.join()


def test_peaks_are_those_seen_from_outside(large):
    with Watcher() as watcher:
        memory = measured(plan_of(large, PROMPT, GEN)).memory
    [seen] = watcher.peaks.values()
    assert memory.peak_rss == pytest.approx(seen["VmHWM"], rel=0.02)
    assert memory.peak_anon == pytest.approx(seen["RssAnon"], rel=0.02)
    assert memory.peak_file == pytest.approx(seen["RssFile"], rel=0.02)
    assert memory.peak_file - memory.before_file > 70e6  # the mapped file
    assert 0 < memory.before_anon < memory.peak_anon
    assert max(memory.peak_anon, memory.peak_file) <= memory.peak_rss <= memory.peak_anon + memory.peak_file


def test_a_model_larger_than_the_limit_does_not_fit(large):
    with pytest.raises(FitError) as caught:
        measured(plan_of(large, PROMPT, limits=Limits(memory=70_000_000, seconds=120)))
    assert re.fullmatch(
        r"out of memory while (loading|running) large\.gguf: [\d.]+ MiB of its own and [\d.]+ MiB of files, "
        r"the limit is 66\.76 MiB",
        caught.value.line,
    )
    assert caught.value.exit_code == 4
    assert children() == set()


# energy


@pytest.mark.parametrize("test", [SpeedTest(n_prompt=180), SpeedTest(n_gen=100), SpeedTest(n_prompt=20, n_depth=170)])
def test_joules_a_token_are_watts_times_seconds_over_tokens(tmp_path, test):
    """Of a window that is read again before each repeat: what the depth costs is not counted."""
    path = write_windowed(tmp_path / "w.gguf")
    loop = "import time\nwhile True:\n print(5, flush=True)\n time.sleep(0.01)"
    with open_meter(f'"{sys.executable}" -c "{loop}"') as meter:
        [told] = measured(plan_of(path, test, effort=Effort(least=9, most=9)), energy=Energy(meter)).tests
    wanted = [5.0 * ns / 1e9 / test.tokens for ns in told.samples_ns]
    assert told.energy.unit == "J/token"
    assert told.energy.estimate.median == pytest.approx(np.median(wanted), rel=0.1)


# in turns


def turns(*plans: Plan, progress: Silent | None = None) -> tuple[list[ArtifactResult], list[Comparison]]:
    results = [ArtifactResult(path=str(plan.file.path)) for plan in plans]
    comparisons: list[Comparison] = []
    with contextlib.suppress(KeyboardInterrupt):
        measure_in_turns(plans, results, comparisons, energy=NO_ENERGY, progress=progress or Silent())
    return results, comparisons


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    return [write_tiny(tmp_path / f"{name}.gguf", seed=seed) for seed, name in enumerate("abc")]


def test_turns_alternate_and_ratios_are_of_one_round(three, heard):
    effort = Effort(least=6, most=6)
    results, comparisons = turns(*[plan_of(path, PROMPT, GEN, effort=effort) for path in three])
    order = heard.files[6:]  # behind the warm-up
    assert "".join(order) == ("abc" * 2 + "cba" * 2) * 3
    assert heard.tests[6:] == ([PROMPT] * 3 + [GEN] * 3) * 6
    rates = [[told.rate.samples for told in result.tests] for result in results]
    assert [(one.test, one.first, one.other) for one in comparisons] == [
        (test, str(three[0]), str(other)) for test in (PROMPT, GEN) for other in three[1:]
    ]
    for index, one in enumerate(comparisons):
        test, other = divmod(index, 2)
        wanted = [b / a for a, b in zip(rates[0][test], rates[1 + other][test], strict=True)]
        assert one.ratios.samples == pytest.approx(wanted)
        found = one.ratios.estimate
        assert one.verdict == ("faster" if found.low > 1 else "slower" if found.high < 1 else "no difference shown")
    assert all(result.memory and result.disturbance and result.model for result in results)


def test_a_file_is_not_much_faster_than_itself(tiny):
    """What alternation is for: the ratio is near 1, or it is told who took the cores meanwhile."""
    effort = Effort(least=40, most=40)
    results, [same] = turns(*[plan_of(tiny, SpeedTest(n_prompt=180), effort=effort)] * 2)
    found = same.ratios.estimate
    assert found.low * 0.9 <= 1 <= found.high * 1.1 or results[0].disturbance.lines
    assert len(results[0].tests[0].samples_ns) == 40


def test_whoever_had_the_last_turn_rests_while_the_next_one_runs(three, monkeypatch):
    """Threads that spin after their work made the second of two equal ones a third slower."""
    shares, real, pids = [], GgufEngine.repeat, set()

    def repeat(self: GgufEngine, test: SpeedTest) -> Repeat:
        pids.add(self.pid)
        before = {pid: cpu_seconds(pid) for pid in pids - {self.pid}}
        made = real(self, test)
        shares.extend((cpu_seconds(pid) - cpu) * 1e9 / made.ns for pid, cpu in before.items())
        return made

    monkeypatch.setattr(GgufEngine, "repeat", repeat)
    test = SpeedTest(n_prompt=150, threads=2)
    turns(*[plan_of(path, test, effort=Effort(least=10, most=10)) for path in three[:2]])
    assert len(shares) == 1 + 2 * 10
    assert np.median(shares) < 0.05


def test_a_slower_one_is_found(tiny, tmp_path):
    wide = write_tiny(tmp_path / "wide.gguf", vocab=20_000)  # its output costs 300 times as much a token
    _, [told] = turns(*[plan_of(path, SpeedTest(n_gen=20), effort=Effort(least=16, most=16)) for path in (tiny, wide)])
    assert told.verdict == "slower"
    assert told.ratios.estimate.median < 0.7


def test_one_that_fails_leaves_the_others_to_take_their_turns(three, heard):
    bad = write_tiny(three[0].parent / "bad.gguf", arch="nosuch")
    results, comparisons = turns(*[plan_of(path, PROMPT) for path in (three[0], bad, three[1])])
    assert [result.failure and result.failure.code for result in results] == [None, 5, None]
    assert "unknown model architecture" in results[1].failure.line
    assert [(one.first, one.other) for one in comparisons] == [(str(three[0]), str(three[1]))]
    assert [len(result.tests) for result in results] == [1, 0, 1]
    assert children() == set()


def test_one_that_fails_midway_keeps_what_was_measured_and_the_others_start_anew(three, heard):
    """Killed as the kernel does where memory runs out, after two rounds of nine."""
    kill = Interrupting("in turns", 2, lambda: os.kill(heard.pids["b"], signal.SIGKILL))
    effort = Effort(least=9, most=9)
    results, comparisons = turns(*[plan_of(path, PROMPT, effort=effort) for path in three], progress=kill)
    assert [result.failure and (result.failure.message, result.failure.code) for result in results] == [
        None,
        ("out of memory while running b.gguf", 4),
        None,
    ]
    assert [len(result.tests[0].samples_ns) for result in results] == [9, 2, 9]
    found = {(Path(one.first).stem, Path(one.other).stem): one.ratios.estimate.n for one in comparisons}
    assert found == {("a", "b"): 2, ("a", "c"): 9}


def test_the_last_one_left_is_measured_alone(three):
    bad = write_tiny(three[0].parent / "bad.gguf", without="blk.1.ffn_up.weight")
    results, comparisons = turns(*[plan_of(path, PROMPT, GEN) for path in (bad, three[0])])
    assert [result.failure and result.failure.code for result in results] == [1, None]
    assert comparisons == []
    assert [len(result.tests) for result in results] == [0, 2]


# what ends it early


@pytest.mark.parametrize(
    ("word", "step", "starts", "tests"), [("starts", 3, [2, 1], []), ("warm-up", 1, [], []), ("speed", 7, [], [4, 3])]
)
def test_an_interrupt_leaves_what_was_measured(tiny, word, step, starts, tests):
    result = ArtifactResult(path=str(tiny))
    with pytest.raises(KeyboardInterrupt):
        plan = plan_of(tiny, PROMPT, GEN, starts=word == "starts")
        measure(plan, result, energy=NO_ENERGY, progress=Interrupting(word, step, interrupt))
    assert [start.total.estimate.n for start in result.starts] == starts
    assert [told.rate.estimate.n for told in result.tests] == tests
    assert (result.memory is not None) is (word != "starts")
    assert result.disturbance is not None
    assert result.to_json()
    assert children() == set()


def test_an_interrupt_in_turns_leaves_what_was_measured(three):
    effort = Effort(least=9, most=9)
    progress = Interrupting("in turns", 5, interrupt)
    results, comparisons = turns(*[plan_of(path, PROMPT, GEN, effort=effort) for path in three[:2]], progress=progress)
    assert [[told.rate.estimate.n for told in result.tests] for result in results] == [[3, 2], [3, 2]]
    assert [one.ratios.estimate.n for one in comparisons] == [3, 2]
    assert children() == set()


def test_a_crash_in_the_middle_keeps_what_was_measured(tiny, heard):
    kill = Interrupting("speed", 4, lambda: os.kill(heard.pids["tiny"], signal.SIGKILL))
    result = ArtifactResult(path=str(tiny))
    with pytest.raises(FitError, match=r"^out of memory while running tiny\.gguf$"):
        measure(plan_of(tiny, PROMPT), result, energy=NO_ENERGY, progress=kill)
    assert result.tests[0].rate.estimate.n == 4
    assert result.memory.peak_rss > 0


# the neighbours


@pytest.fixture
def busy() -> Iterator[list[int]]:
    """A process for each core that we may use, which uses all of it."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in os.sched_getaffinity(0)]
    yield [loop.pid for loop in loops]
    for loop in loops:
        loop.kill()
        loop.wait()


def test_a_loaded_machine_is_reported(tiny, busy):
    effort = Effort(least=12, most=12)
    result = measured(plan_of(tiny, replace(PROMPT, n_prompt=150), SpeedTest(n_gen=180), effort=effort))
    [line, *_] = [line for line in result.disturbance.lines if line.startswith("busy neighbour")]
    assert result.disturbance.others_cores > 0.3
    assert any(f"pid {pid}" in line for pid in busy) or "python" in line
    assert result.to_json()["disturbance"]["lines"]
