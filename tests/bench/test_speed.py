"""Speed, starts and memory of real files by llama.cpp: figures agree with each other and with what is seen outside."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from efficli.bench import suite
from efficli.bench.figures import ArtifactResult, Settings, SpeedTest
from efficli.bench.gguf_engine import GgufEngine, GgufFile, GgufStarter
from efficli.bench.rounds import Effort
from efficli.bench.suite import Energy, measure
from efficli.chat import render
from efficli.errors import CheckpointError, FitError
from efficli.ops.energy import open_meter
from efficli.ops.page_cache import drop, resident
from efficli.ops.worker import Limits
from tests import pico
from tests.bench.measuring import (
    AT_DEPTH,
    GEN,
    LIMITS,
    NO_ENERGY,
    PROMPT,
    Interrupting,
    children,
    interrupt,
    measured,
    plan_of,
)
from tests.converted import convert
from tests.tiny_architectures import write_encoder, write_windowed
from tests.tiny_gguf import write_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """77 MB."""
    return write_tiny(tmp_path_factory.mktemp("large") / "large.gguf", vocab=300_000)


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


def test_memory_that_the_system_does_not_tell_is_not_zero(tiny, monkeypatch):
    monkeypatch.setattr("efficli.ops.worker.memory_of", lambda pid: None)  # as where there is no /proc
    result = measured(plan_of(tiny, PROMPT))
    assert (result.memory, len(result.tests)) == (None, 1)


def test_a_file_that_goes_away_is_its_own_failure(tiny, tmp_path):
    path = shutil.copy(tiny, tmp_path / "gone.gguf")
    starter = plan_of(path).starter
    path.unlink()
    for cold in (True, False):
        with pytest.raises(CheckpointError) as caught:
            starter.start(cold=cold)
        assert caught.value.line == "gone.gguf: cannot be read any more: No such file or directory"


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
