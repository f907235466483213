"""Artifacts in turns: the order, the ratios, and what happens when one of them fails."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from efficli.bench.engine import Repeat
from efficli.bench.figures import SpeedTest
from efficli.bench.gguf_engine import GgufEngine
from efficli.bench.rounds import Effort
from efficli.ops.process import cpu_seconds, ran_on, thread_times
from tests.bench.measuring import GEN, PROMPT, Interrupting, children, interrupt, plan_of, turns
from tests.tiny_gguf import write_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


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
        assert one.verdict == (
            "faster" if found.low > 1.02 else "slower" if found.high < 0.98 else "no difference shown"
        )
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


def test_a_round_is_run_on_the_cores_of_its_first_turn(three, monkeypatch):
    places, real = [], GgufEngine.repeat

    def repeat(self: GgufEngine, test: SpeedTest) -> Repeat:
        before = thread_times(self.pid)
        made = real(self, test)
        places.append(ran_on(self.pid, before))
        return made

    monkeypatch.setattr(GgufEngine, "repeat", repeat)
    turns(*[plan_of(path, SpeedTest(n_prompt=150), effort=Effort(least=8, most=8)) for path in three])
    rounds = [places[at : at + 3] for at in range(3, len(places), 3)]  # behind the warm-up
    assert len(rounds) == 8
    assert all(first == others[0] == others[1] for first, *others in rounds)


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


def test_an_interrupt_in_turns_leaves_what_was_measured(three):
    effort = Effort(least=9, most=9)
    progress = Interrupting("in turns", 5, interrupt)
    results, comparisons = turns(*[plan_of(path, PROMPT, GEN, effort=effort) for path in three[:2]], progress=progress)
    assert [[told.rate.estimate.n for told in result.tests] for result in results] == [[3, 2], [3, 2]]
    assert [one.ratios.estimate.n for one in comparisons] == [3, 2]
    assert children() == set()
