"""What an Engine and a Starter are by definition: they take the times that they were given. Two scenarios for them."""

from __future__ import annotations

from collections.abc import Sequence

from efficli.bench.engine import Repeat
from efficli.bench.figures import ModelFacts, RequestTimes, SpeedTest, StartTimes

PLAIN = """\
name: plain
kind: request
n_gen: 4
requests: 5
prompts: [one two, three four five]
objectives: {ttft_ms: 10}
"""
READER = """\
name: reader
kind: request
n_gen: 4
requests: 6
document: text.txt
document_tokens: {most: 40, least: 10}
prompts: ['a {document} b', '{document} c d', 'e {document}']
objectives: {total_ms: 10}
"""


def words(text: str) -> int:
    return len(text.split())


class PlainEngine:
    """What an Engine is by definition: counts with a given function, takes the times that it was given, in turn."""

    def __init__(self, count=words, times: Sequence[tuple[float, float]] = ((1, 1),), template=None, **facts) -> None:
        self.count, self.times, self.template = count, times, template
        self.asked: list[tuple[str, bool, int]] = []
        self.counted: list[str] = []
        values = {"generates": True, "has_tokenizer": True} | facts
        self.facts = ModelFacts(
            path="m.gguf", format="gguf", nbytes=1, description="", tensor_bytes=1, num_weights=1, trained_ctx=0,
            runtime="none", chat_template=template, **values,
        )  # fmt: skip

    def repeat(self, test: SpeedTest) -> Repeat:
        raise AssertionError("a scenario runs no speed test")

    def count_tokens(self, text: str, *, chat: bool) -> int:
        self.counted.append(text)
        return self.count(f"{self.template} {text}" if chat and self.template else text)

    def request(self, text: str, *, chat: bool, n_gen: int) -> RequestTimes:
        self.asked.append((text, chat, n_gen))
        ttft, tpot = self.times[(len(self.asked) - 2) % len(self.times)]  # the first request is one that does not count
        return RequestTimes(
            prompt_tokens=self.count_tokens(text, chat=chat),
            ttft_ns=round(ttft * 1e6),
            token_ns=(round(tpot * 1e6),) * (n_gen - 1),
            text="answer",
        )


class PlainStarter:
    """Starts that take 1, 2, 3 ... ms, a third in each part."""

    def __init__(self, resident: Sequence[float | None] = (0.0,)) -> None:
        self.resident, self.colds = resident, list[bool]()

    def start(self, *, cold: bool) -> StartTimes:
        self.colds.append(cold)
        part = round(len(self.colds) * 1e6 / 4)
        resident = self.resident[(len(self.colds) - 1) % len(self.resident)]
        return StartTimes(cold=cold, resident=resident, process_ns=part, load_ns=part, first_token_ns=2 * part)
