"""Scenarios: requests as people make them, as data files, with objectives; and how many of the requests meet them.

A file is strict YAML (`efficli/bench/scenarios/*.yaml` are examples); texts that it names lie in its own folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from efficli import strict_schema
from efficli.bench.engine import Engine, Starter
from efficli.bench.excerpts import Excerpts
from efficli.bench.failure import Failure
from efficli.bench.scenario_result import Figure, Sample, ScenarioResult
from efficli.checkpoint.files import read_bytes
from efficli.data import documents
from efficli.errors import EffiError, SecurityError, UnsupportedError, UsageError, did_you_mean
from efficli.progress import Progress
from efficli.strict_schema import Part
from efficli.strict_yaml import parse

FOLDER = Path(__file__).parent / "scenarios"
"""The scenarios that come with efficli."""

PLACE = "{document}"
"""Where a prompt wants its part of the document."""

MAX_DOCUMENT_BYTES = 1 << 24
TEMPLATE_TOKENS = 96
"""What a chat template adds at most, for choosing a context; what it really adds is counted."""

Milliseconds = Annotated[float, Field(gt=0)]


def _tuple(value: Any) -> Any:
    if not isinstance(value, list):
        raise ValueError("expected a list of texts")
    return tuple(value)


class DocumentTokens(Part):
    """How much of the document a request reads."""

    most: Annotated[int, Field(ge=1)]
    """Tokens at most; what the context cannot hold is cut off."""
    least: Annotated[int, Field(ge=1)] = 1
    """With fewer the scenario is no longer what it is about, and is not run."""


class Objectives(Part):
    """What a request must not exceed, in milliseconds."""

    ttft_ms: Milliseconds | None = None
    """Time to the first token; of a start, from the start of the process."""
    tpot_ms: Milliseconds | None = None
    """Mean time of each further token."""
    total_ms: Milliseconds | None = None
    """Time to the last token."""

    @property
    def limits(self) -> dict[Figure, float]:
        """Those that are set."""
        all_: dict[Figure, float | None] = {
            "ttft_ms": self.ttft_ms, "tpot_ms": self.tpot_ms, "total_ms": self.total_ms
        }  # fmt: skip
        return {figure: limit for figure, limit in all_.items() if limit is not None}


class ScenarioFile(Part):
    """The keys of a scenario's file."""

    name: str
    """What results call it."""
    about: str = ""
    """One line for a reader."""
    kind: Literal["request", "start"]
    """Requests to a running model, or cold starts of a process until its first token."""
    chat: bool = False
    """Put the file's chat template around a prompt, where it has one."""
    prompts: Annotated[tuple[str, ...], BeforeValidator(_tuple)] = ()
    """Texts; requests take them in turn."""
    prompts_file: str | None = None
    """A file of them instead: JSON lines with `text`."""
    document: str | None = None
    """A text file; each prompt has {document} where its part of it goes, another part for each prompt."""
    document_tokens: DocumentTokens | None = None
    """How much of it."""
    n_gen: Annotated[int, Field(ge=1)]
    """Tokens to write."""
    requests: Annotated[int, Field(ge=5, le=10_000)]
    """How many, one after the other; fewer than five say nothing."""
    headline: Figure = "total_ms"
    """The figure that the scenario is about."""
    objectives: Objectives
    """What is fast enough."""

    @model_validator(mode="after")
    def _fits_together(self) -> ScenarioFile:
        found = list(self._starts_wrong() if self.kind == "start" else self._requests_wrong())
        if not self.objectives.limits:
            found.append("objectives is empty, expected ttft_ms, tpot_ms or total_ms")
        if self.n_gen == 1 and "tpot_ms" in (*self.objectives.limits, self.headline):
            found.append("tpot_ms is of the tokens after the first, and n_gen is 1")
        if found:
            raise ValueError("; ".join(found))
        return self

    def _starts_wrong(self) -> Iterator[str]:
        for key in ("chat", "prompts", "prompts_file", "document", "document_tokens"):
            if getattr(self, key):
                yield f"{key} belongs to requests, and kind is start"
        if self.n_gen != 1:
            yield f"n_gen is {self.n_gen}, and a start ends with its first token"

    def _requests_wrong(self) -> Iterator[str]:
        if bool(self.prompts) == bool(self.prompts_file):
            yield "expected prompts or prompts_file, one of them"
        if (self.document is None) != (self.document_tokens is None):
            yield "document and document_tokens go together"
        if self.document_tokens and self.document_tokens.least > self.document_tokens.most:
            yield f"document_tokens: least {self.document_tokens.least} is more than most {self.document_tokens.most}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A scenario with its texts read."""

    name: str
    about: str
    kind: Literal["request", "start"]
    chat: bool
    prompts: tuple[str, ...]
    document: str | None
    document_name: str | None
    most: int
    least: int
    n_gen: int
    requests: int
    headline: Figure
    objectives: dict[Figure, float]

    @property
    def positions(self) -> int:
        """Tokens of context that it would like: an estimate, as a token is two bytes of text at the least, mostly."""
        longest = max((len(prompt.replace(PLACE, "").encode()) for prompt in self.prompts), default=0)
        needs = self.n_gen + (longest // 2 + TEMPLATE_TOKENS + self.most if self.kind == "request" else 0)
        return math.ceil(needs / 256) * 256  # llama.cpp rounds a context up to this

    @property
    def sha256(self) -> str:
        """Of what is sent, and how often."""
        sent = [self.kind, self.chat, self.prompts, self.document, self.most, self.n_gen, self.requests]
        return hashlib.sha256(json.dumps(sent).encode()).hexdigest()

    def result(self, within: float) -> ScenarioResult:
        """With nothing measured yet."""
        return ScenarioResult(
            name=self.name,
            about=self.about,
            kind=self.kind,
            headline=self.headline,
            n_gen=self.n_gen,
            requests=self.requests,
            objectives=self.objectives,
            sha256=self.sha256,
            within=within,
        )


def scenario_names() -> tuple[str, ...]:
    """Those that come with efficli, by alphabet."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def load_scenario(word: str) -> Scenario:
    """A scenario by its name, or from a YAML file; UsageError with file:line, SecurityError for a path that leaves."""
    names = scenario_names()
    if word in names:
        return _read(FOLDER / f"{word}.yaml")
    path = Path(word).expanduser()
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return _read(path)
    hint = did_you_mean(word, names) or f"one of {', '.join(names)}, all, or a YAML file"
    raise UsageError(f"no such scenario: {word}", hint=hint)


def run_scenario(
    scenario: Scenario,
    engine: Engine | None,
    starter: Starter,
    *,
    ctx: int,
    progress: Progress,
    within: float = 0.05,
    begin: Callable[[ScenarioResult], None] | None = None,
) -> ScenarioResult:
    """Run all requests of a scenario, one after the other; `progress` advances by one for each.

    `engine` answers requests. A cold start needs none, and must have none with this file open: what a process has
    mapped stays in the page cache. `begin` is handed the result before the first request; it is filled as they go, and
    an error is noted in it. UsageError where a prompt does not fit `ctx` tokens, UnsupportedError for a model that
    writes nothing.
    """
    result = scenario.result(within)
    if begin:
        begin(result)
    try:
        if scenario.kind == "start":
            for _ in range(scenario.requests):
                result.samples.append(Sample.of_start(starter.start(cold=True)))
                progress.advance(1)
            result.notes += _warm_notes(result.samples)
        elif engine is None:
            raise ValueError(f"{scenario.name} needs an engine")
        else:
            for sample in _answers(scenario, engine, ctx, result.notes):
                result.samples.append(sample)
                progress.advance(1)
    except EffiError as error:
        result.failure = Failure.of(error)
        raise
    return result


def _answers(scenario: Scenario, engine: Engine, ctx: int, notes: list[str]) -> Iterator[Sample]:
    texts = _texts(scenario, engine, ctx, notes)
    # reads all weights once, so that the first request does not pay for pages that no later one pays for
    engine.request("A request that does not count.", chat=False, n_gen=2)
    for text in islice(cycle(texts), scenario.requests):
        yield Sample.of_request(engine.request(text, chat=scenario.chat, n_gen=scenario.n_gen))


def _warm_notes(samples: Sequence[Sample]) -> Iterator[str]:
    """What a reader must know if the starts were not cold."""
    shares = [sample.start.resident for sample in samples if sample.start]
    known = [share for share in shares if share is not None]
    if len(known) < len(shares):
        yield "whether the page cache held the file before a start is not known here"
    if known and max(known) > 0.01:
        yield f"up to {max(known):.0%} of the file was in the page cache before a start: not wholly cold"


def _place(scenario: Scenario, engine: Engine) -> str:
    return f"{Path(engine.facts.path).name}: {scenario.name}"


def _texts(scenario: Scenario, engine: Engine, ctx: int, notes: list[str]) -> list[str]:
    """What is sent, one text per prompt, each of which leaves room for the answer."""
    if not engine.facts.generates:
        raise UnsupportedError("an embedding model writes no tokens", where=_place(scenario, engine))
    if not engine.facts.has_tokenizer:
        raise UnsupportedError("the file has no tokenizer, so no text can be sent", where=_place(scenario, engine))
    if scenario.chat and engine.facts.chat_template is None:
        notes.append("the file has no chat template: prompts are sent as plain text")
    for prompt in scenario.prompts:
        needs = engine.count_tokens(prompt.replace(PLACE, ""), chat=scenario.chat) + scenario.n_gen
        if needs > ctx:
            raise UsageError(
                f"a prompt and its answer take {needs} tokens, the context holds {ctx}",
                where=_place(scenario, engine),
                hint=f"--ctx-size {needs + scenario.least if scenario.document else needs}",
            )
    if scenario.document is None:
        return list(scenario.prompts)
    return _with_document(scenario, engine, ctx, notes)


def _with_document(scenario: Scenario, engine: Engine, ctx: int, notes: list[str]) -> list[str]:
    """Each prompt with a part of the document, from places spread evenly over it; a note if the context cut it."""
    document = Excerpts(scenario.document or "", lambda text: engine.count_tokens(text, chat=False))
    texts, lengths, cut = [], [], False
    for place, prompt in enumerate(scenario.prompts):
        around = engine.count_tokens(prompt.replace(PLACE, ""), chat=scenario.chat)
        room = min(scenario.most, ctx - scenario.n_gen - around)
        part = document.part(place * document.num_lines // len(scenario.prompts), room)
        text = prompt.replace(PLACE, document.text(part))
        # tokens may merge, or fail to, where the part meets the prompt: what counts is the whole
        while (tokens := engine.count_tokens(text, chat=scenario.chat) - around) > room and part:
            part = part[:-1]
            text = prompt.replace(PLACE, document.text(part))
        whole = len(part) == document.num_lines
        if tokens < scenario.least:
            held = f"has {tokens} tokens" if whole else f"is cut to {tokens} tokens by the context of {ctx}"
            raise UsageError(
                f"{scenario.document_name} {held}, expected {scenario.least} or more",
                where=_place(scenario, engine),
                hint=None if whole else f"--ctx-size {scenario.least + around + scenario.n_gen + 64}",
            )
        texts.append(text)
        lengths.append(tokens)
        cut = cut or (room < scenario.most and not whole)
    if cut:
        told = str(min(lengths)) if len(set(lengths)) == 1 else f"{min(lengths)} to {max(lengths)}"
        notes.append(f"the context of {ctx} cuts {scenario.document_name} to {told} tokens instead of {scenario.most}")
    return texts


def _read(path: Path) -> Scenario:
    file = strict_schema.load(ScenarioFile, path, "scenario")
    prompts = tuple(documents(_beside(path, "prompts_file", file.prompts_file))) if file.prompts_file else file.prompts
    key = "prompts_file" if file.prompts_file else "prompts"
    for number, prompt in enumerate(prompts, start=1):
        if not prompt.strip():
            raise UsageError(f"{key}: prompt {number} is empty", where=_where(path, key))
        if (PLACE in prompt) != (file.document is not None):
            found = "has no {document}" if file.document else "has {document}, and there is no document"
            raise UsageError(f"{key}: prompt {number} {found}", where=_where(path, key))
    if file.kind == "request" and not prompts:
        raise UsageError(f"{key} is empty, expected at least one", where=_where(path, key))
    tokens = file.document_tokens
    return Scenario(
        name=file.name,
        about=file.about,
        kind=file.kind,
        chat=file.chat,
        prompts=prompts,
        document=_document(path, file.document) if file.document is not None else None,
        document_name=file.document,
        most=tokens.most if tokens else 0,
        least=tokens.least if tokens else 0,
        n_gen=file.n_gen,
        requests=file.requests,
        headline=file.headline,
        objectives=file.objectives.limits,
    )


def _document(path: Path, name: str) -> str:
    content = read_bytes(_beside(path, "document", name), name, MAX_DOCUMENT_BYTES)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"document: {name} is not UTF-8 (byte {error.start})", where=_where(path, "document")
        ) from None


def _beside(path: Path, key: str, name: str) -> Path:
    """The file `name` of the folder in which the scenario `path` lies; SecurityError if it is somewhere else."""
    home = Path(os.path.realpath(path)).parent
    real = Path(os.path.realpath(home / name))
    if not real.is_relative_to(home):
        hint = "put the file beside the scenario"
        raise SecurityError(f"{key}: {name} leaves the scenario's folder", where=_where(path, key), hint=hint)
    if not real.is_file():
        raise UsageError(f"{key}: no such file: {name}", where=_where(path, key))
    return real


def _where(path: Path, key: str) -> str:
    """`file:line` of a key that is known to be there."""
    return parse(path.read_text(encoding="utf-8"), str(path)).where((key,))
