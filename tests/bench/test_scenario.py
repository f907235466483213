"""Scenarios: the shipped ones run on the reference; requests and shares are what a count by hand gives."""

from __future__ import annotations

import json
import re
import runpy
from functools import cache
from pathlib import Path

import pytest

from efficli.bench.excerpts import Excerpts
from efficli.bench.failure import Failure
from efficli.bench.figures import Settings
from efficli.bench.gguf_engine import GgufEngine, GgufFile, GgufStarter
from efficli.bench.scenario import FOLDER, Scenario, load_scenario, run_scenario, scenario_names
from efficli.bench.scenario_result import FIGURES, ScenarioResult
from efficli.errors import UnsupportedError, UsageError
from efficli.ops.worker import Limits
from efficli.progress import Silent
from tests.bench.plain_engine import PLAIN, READER, PlainEngine, PlainStarter, words
from tests.converted import convert

ROOT = Path(__file__).resolve().parent.parent.parent
SETTINGS = Settings(ctx=2048, threads=1)


@cache
def reference_tokenizer():
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(ROOT / "efficli" / "reference" / "checkpoint" / "tokenizer.json"))


class Counter(Silent):
    """Counts what was advanced."""

    done = 0.0

    def advance(self, amount: float) -> None:
        self.done += amount


def run(scenario: Scenario | Path, engine: PlainEngine, ctx: int = 2048) -> ScenarioResult:
    found = scenario if isinstance(scenario, Scenario) else load_scenario(str(scenario))
    return run_scenario(found, engine, PlainStarter(), ctx=ctx, progress=Silent())


# the shipped ones


def test_the_four_scenarios_are_there_and_say_what_they_are():
    assert scenario_names() == ("chat", "code-completion", "long-log-in-short-answer", "wake-up")
    for name in scenario_names():
        scenario = load_scenario(name)
        assert scenario.name == name
        assert scenario.about
        assert scenario.requests >= 5
        assert "ttft_ms" in scenario.objectives
        assert ("tpot_ms" in scenario.objectives) == (scenario.kind == "request")
        assert scenario.headline in scenario.objectives
        text = (FOLDER / f"{name}.yaml").read_text()
        assert text.startswith("# For ")
        for figure in scenario.objectives:  # each limit has its reason in the lines above it
            assert re.search(rf"^  #.+\n  {figure}:", text, re.MULTILINE), f"{name}: {figure} without a reason"


@pytest.mark.parametrize("name", ["chat", "code-completion", "long-log-in-short-answer"])
def test_a_shipped_scenario_fits_the_context_of_the_reference(name):
    scenario = load_scenario(name)
    engine = PlainEngine(count=lambda text: len(reference_tokenizer().encode(text).ids))
    result = run(scenario, engine)
    sent = [text for text, _, _ in engine.asked[1:]]
    assert len(sent) == scenario.requests
    assert len(set(sent)) == len(scenario.prompts) >= 5
    assert all(sample.prompt_tokens + scenario.n_gen <= 2048 for sample in result.samples)
    assert "chat_template" not in json.dumps(result.to_json())
    if name == "long-log-in-short-answer":
        note = result.notes[-1]
        assert re.fullmatch(r"the context of 2048 cuts sensor-log.txt to 19\d\d to 19\d\d tokens instead of 3840", note)
        parts = [set(text.splitlines()) & set(scenario.document.splitlines()) for text in sent]
        assert not any(a & b for i, a in enumerate(parts) for b in parts[:i])
        assert all(any(word in line for line in part) for part in parts for word in ("WARN", "pump-", "bat="))
    else:
        assert max(sample.prompt_tokens for sample in result.samples) < {"chat": 64, "code-completion": 512}[name]


def test_positions_hold_a_shipped_scenario_uncut():
    for name in scenario_names():
        scenario = load_scenario(name)
        engine = PlainEngine(count=lambda text: len(reference_tokenizer().encode(text).ids), template="word " * 40)
        if scenario.kind == "request":
            assert run(scenario, engine, scenario.positions).notes == []
        assert scenario.positions % 256 == 0
        assert scenario.positions <= 4096


def test_the_log_is_what_its_script_writes():
    lines = runpy.run_path(str(ROOT / "scripts" / "sensor_log.py"))["lines"]
    text = (FOLDER / "sensor-log.txt").read_text(encoding="utf-8")
    assert "".join(f"{line}\n" for line in lines()) == text
    assert 60_000 < len(text) < 100_000
    stamps = [line[:19] for line in text.splitlines()]
    assert stamps == sorted(stamps)


def test_a_wake_up_is_a_series_of_cold_starts():
    scenario, starter, progress = load_scenario("wake-up"), PlainStarter(), Counter()
    result = run_scenario(scenario, None, starter, ctx=64, progress=progress)
    assert starter.colds == [True] * scenario.requests
    assert progress.done == scenario.requests == len(result.samples)
    assert result.values("ttft_ms") == result.values("total_ms") == [float(n) for n in range(1, scenario.requests + 1)]
    assert result.series("tpot_ms") is None
    assert result.notes == []
    first = result.to_json()["samples"][0]
    assert (first["process_ms"], first["load_ms"], first["first_token_ms"]) == (0.25, 0.25, 0.5)


@pytest.mark.parametrize(
    ("resident", "notes"),
    [
        ((0.0, 0.31), ["up to 31% of the file was in the page cache before a start: not wholly cold"]),
        ((0.0, None), ["whether the page cache held the file before a start is not known here"]),
    ],
)
def test_a_start_that_was_not_cold_is_said(resident, notes):
    result = run_scenario(load_scenario("wake-up"), None, PlainStarter(resident), ctx=64, progress=Silent())
    assert result.notes == notes


# what is sent


def test_requests_take_the_prompts_in_turn_after_one_that_does_not_count(write_scenario):
    engine, progress = PlainEngine(), Counter()
    scenario = load_scenario(str(write_scenario(PLAIN)))
    result = run_scenario(scenario, engine, PlainStarter(), ctx=64, progress=progress)
    assert [text for text, _, _ in engine.asked[1:]] == [
        "one two", "three four five", "one two", "three four five", "one two"
    ]  # fmt: skip
    assert [sample.prompt_tokens for sample in result.samples] == [2, 3, 2, 3, 2]
    assert {n_gen for _, _, n_gen in engine.asked[1:]} == {4}
    assert progress.done == 5
    assert result.notes == []


@pytest.mark.parametrize("template", [None, "<user>"])
def test_a_chat_without_a_template_is_plain_text_and_says_so(write_scenario, template):
    engine = PlainEngine(template=template)
    result = run(write_scenario(PLAIN + "chat: true\n"), engine)
    assert result.notes == ([] if template else ["the file has no chat template: prompts are sent as plain text"])
    assert all(chat for _, chat, _ in engine.asked[1:])


@pytest.mark.parametrize("ctx", [20, 31, 64, 1000])
def test_each_prompt_reads_its_own_part_of_the_document_up_to_the_context(write_scenario, ctx):
    lines = [f"{i} {'x ' * (i % 4)}\n" for i in range(300)]
    engine = PlainEngine()
    result = run(write_scenario(READER, text="".join(lines)), engine, ctx)
    sent = [text for text, _, _ in engine.asked[1:]]
    assert sent[:3] == sent[3:]
    assert len(set(sent)) == 3
    for text, around in zip(sent[:3], (2, 2, 1), strict=True):
        room = min(40, ctx - 4 - around)
        read = [line for line in lines if line in text.removeprefix("a ").removeprefix("e ").splitlines(keepends=True)]
        first = lines.index(read[0])
        assert read == lines[first : first + len(read)]
        assert words("".join(read)) <= room < words("".join(lines[first : first + len(read) + 1]))
    assert max(words(text) for text in engine.counted) <= 160, "a text much longer than the context was counted"
    assert [note.partition(" to ")[0] for note in result.notes] == (
        [f"the context of {ctx} cuts text.txt"] if ctx < 46 else []
    )


def test_a_document_that_fits_is_read_whole(write_scenario):
    engine = PlainEngine()
    result = run(write_scenario(READER, text="\n".join(map(str, range(30)))), engine)
    assert {sample.prompt_tokens for sample in result.samples} == {31, 32}
    assert result.notes == []


def test_tokens_that_part_where_texts_meet_still_fit(write_scenario):
    # a count that is larger for the whole than for its parts
    engine = PlainEngine(count=lambda text: words(text) + 3 * text.count("a 0"))
    result = run(write_scenario(READER, text="".join(f"{i}\n" for i in range(300))), engine, 44)
    assert all(sample.prompt_tokens + 4 <= 44 for sample in result.samples)
    assert min(sample.prompt_tokens for sample in result.samples) >= 39


def test_what_does_not_fit_the_context_is_a_usage_error(write_scenario):
    with pytest.raises(UsageError, match=r"^a prompt and its answer take 7 tokens, the context holds 6$") as caught:
        run(write_scenario(PLAIN), PlainEngine(), 6)
    assert (caught.value.where, caught.value.hint) == ("m.gguf: plain", "--ctx-size 7")
    text = "".join(f"{i}\n" for i in range(300))
    with pytest.raises(
        UsageError, match=r"^text.txt is cut to 9 tokens by the context of 15, expected 10 or more$"
    ) as c:
        run(write_scenario(READER, text=text), PlainEngine(), 15)
    assert c.value.hint == "--ctx-size 80"
    with pytest.raises(UsageError, match=r"^text.txt has 3 tokens, expected 10 or more$") as caught:
        run(write_scenario(READER, text="0\n1\n2\n"), PlainEngine())
    assert caught.value.hint is None


def test_a_failure_is_in_the_result_too(write_scenario):
    kept: list[ScenarioResult] = []
    with pytest.raises(UsageError) as caught:
        run_scenario(
            load_scenario(str(write_scenario(PLAIN))), PlainEngine(), PlainStarter(), ctx=6, progress=Silent(),
            begin=kept.append,
        )  # fmt: skip
    assert kept[0].failure == Failure.of(caught.value)
    assert kept[0].to_json()["error"]["code"] == 2


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"generates": False}, "m.gguf: chat: an embedding model writes no tokens"),
        ({"has_tokenizer": False}, "m.gguf: chat: the file has no tokenizer, so no text can be sent"),
    ],
)
def test_a_model_that_cannot_answer_is_unsupported(facts, message):
    with pytest.raises(UnsupportedError) as caught:
        run(load_scenario("chat"), PlainEngine(**facts))
    assert caught.value.line == message


@pytest.mark.parametrize("length", [0, 1, 2, 7, 50])
@pytest.mark.parametrize("room", [0, 1, 5, 12, 1000])
def test_an_excerpt_is_the_longest_that_fits(length, room):
    sizes = [1 + (7 * i) % 5 for i in range(length)]
    text = "".join("w " * size + "\n" for size in sizes)
    excerpts = Excerpts(text, words)
    for start in range(length):
        # by trying every length
        n = max(n for n in range(length - start + 1) if sum(sizes[start : start + n]) <= room)
        if start + n == length:
            n = max(n for n in range(length + 1) if sum(sizes[length - n :]) <= room)
            start = length - n
        part = excerpts.part(start, room)
        assert (part.start, len(part)) == (start, n)
        assert words(excerpts.text(part)) == sum(sizes[start : start + n])


# what is found


def test_a_request_is_good_if_it_meets_all_objectives(write_scenario):
    # ttft, tpot: late; good; slow; good; too long in all
    times = ((11, 1), (10, 2), (1, 6), (3, 3), (9, 4))
    text = PLAIN.replace("{ttft_ms: 10}", "{ttft_ms: 10, tpot_ms: 5, total_ms: 20}")
    result = run(write_scenario(text), PlainEngine(times=times))
    assert result.values("total_ms") == [14, 16, 19, 12, 21]
    assert [result.share(figure).met for figure in FIGURES] == [4, 4, 4]
    assert (result.goodput.met, result.goodput.n, result.goodput.share) == (2, 5, 0.4)
    for share in (result.goodput.low, result.goodput.high):  # Wilson: where 2 of 5 is just 1.96 standard errors away
        assert abs(share - 0.4) == pytest.approx(1.959964 * (share * (1 - share) / 5) ** 0.5)
    assert result.series("ttft_ms").estimate.median == 9
    assert result.p95("ttft_ms") == pytest.approx(10.8)  # between 10 and 11, at position 3.8 of 0..4
    told = result.to_json()
    assert json.loads(json.dumps(told)) == told
    assert [sample["good"] for sample in told["samples"]] == [False, True, False, True, False]
    assert told["prompt_tokens"] == {"least": 2, "most": 3}
    assert [row["limit_ms"] for row in told["objectives"]] == [10, 5, 20]


def test_what_was_measured_before_an_interrupt_is_kept(write_scenario):
    kept: list[ScenarioResult] = []

    class Stopped(PlainEngine):
        def request(self, text, *, chat, n_gen):
            if len(self.asked) == 3:
                raise KeyboardInterrupt
            return super().request(text, chat=chat, n_gen=n_gen)

    with pytest.raises(KeyboardInterrupt):
        run_scenario(
            load_scenario(str(write_scenario(PLAIN))),
            Stopped(),
            PlainStarter(),
            ctx=64,
            progress=Silent(),
            begin=kept.append,
        )
    told = kept[0].to_json()
    assert (told["measured"], told["requests"], told["goodput"]["n"]) == (2, 5, 2)


def test_a_result_without_requests_is_a_result(write_scenario):
    told = load_scenario(str(write_scenario(PLAIN))).result(0.05).to_json()
    assert (told["measured"], told["ttft_ms"], told["prompt_tokens"]) == (0, None, None)
    assert told["goodput"] == {"met": 0, "n": 0, "low": 0.0, "high": 1.0, "share": None}


def test_the_hash_follows_what_is_sent_and_nothing_else(write_scenario):
    first = load_scenario(str(write_scenario(PLAIN))).sha256
    assert load_scenario(str(write_scenario(PLAIN.replace("plain", "other").replace("10}", "20}")))).sha256 == first
    assert load_scenario(str(write_scenario(PLAIN.replace("one two", "one too")))).sha256 != first
    assert load_scenario(str(write_scenario(PLAIN.replace("n_gen: 4", "n_gen: 5")))).sha256 != first


# with llama.cpp


def test_llama_cpp_answers_a_scenario(pico_files, tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"line {i} of a text\n" for i in range(400)))
    (tmp_path / "s.yaml").write_text(READER.replace("most: 40", "most: 400"))
    scenario = load_scenario(str(tmp_path / "s.yaml"))
    file = GgufFile(path=pico_files["Q8_0"], generates=True)
    settings = Settings(ctx=256, threads=1)
    with GgufEngine(file, settings, Limits()) as engine:
        result = run_scenario(scenario, engine, PlainStarter(), ctx=settings.ctx, progress=Silent())
        text = scenario.prompts[0].replace("{document}", "line 0 of a text\n")
        assert engine.count_tokens(text, chat=False) < result.samples[0].prompt_tokens
    assert len(result.samples) == 6
    assert all(200 < sample.prompt_tokens <= 252 for sample in result.samples)
    assert all(0 < sample.ttft_ms < sample.total_ms for sample in result.samples)
    assert [sample.text for sample in result.samples[:3]] == [sample.text for sample in result.samples[3:]]
    assert result.notes[0].startswith("the context of 256 cuts text.txt to ")


@pytest.mark.slow
def test_the_reference_runs_all_scenarios(tmp_path):
    file = GgufFile(path=convert("reference", tmp_path, "Q8_0")[0], generates=True)
    starter = GgufStarter(file=file, settings=SETTINGS, limits=Limits())
    results = [run_scenario(load_scenario("wake-up"), None, starter, ctx=SETTINGS.ctx, progress=Silent())]
    with GgufEngine(file, SETTINGS, Limits()) as engine:
        for name in scenario_names():
            scenario = load_scenario(name)
            if scenario.kind == "request":
                results.append(run_scenario(scenario, engine, starter, ctx=SETTINGS.ctx, progress=Silent()))
    for result in results:
        assert len(result.samples) == result.requests
        assert all(sample.ttft_ms > 0 for sample in result.samples)
        json.dumps(result.to_json())
