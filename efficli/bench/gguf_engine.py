"""The parent's side of a GGUF benchmark: an open file in a child process, and fresh starts of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from efficli.bench.engine import Repeat
from efficli.bench.figures import MemoryResult, ModelFacts, RequestTimes, Settings, SpeedTest, StartTimes
from efficli.chat import render
from efficli.errors import CheckpointError
from efficli.ops import page_cache
from efficli.ops.process import memory_of
from efficli.ops.worker import Limits, Worker

_SESSION = "efficli.bench.gguf_session:open_session"


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFile:
    """A file to measure: its header was read and believed before a process is started."""

    path: Path
    generates: bool
    """False for an embedding model."""

    @property
    def nbytes(self) -> int:
        """Its size; CheckpointError if it is gone."""
        with _readable(self.path):
            return self.path.stat().st_size

    def open(self, settings: Settings, limits: Limits) -> GgufEngine:
        """The file, open in a process of its own."""
        return GgufEngine(self, settings, limits)

    def starter(self, settings: Settings, limits: Limits) -> GgufStarter:
        """Fresh processes of it."""
        return GgufStarter(file=self, settings=settings, limits=limits)

    def worker(self, settings: Settings, limits: Limits) -> Worker:
        """A process with the library loaded and the file not yet open."""
        argument = {"path": str(self.path), "settings": settings.to_json()}
        return Worker(_SESSION, argument, what=f"running {self.path.name}", limits=limits)


class GgufEngine:
    """An Engine: llama.cpp with the file open; a context manager."""

    def __init__(self, file: GgufFile, settings: Settings, limits: Limits) -> None:
        self.file, self.settings = file, settings
        self._worker = file.worker(settings, limits)
        try:
            before = memory_of(self._worker.pid)
            self._before = (before.rss_anon, before.rss_file) if before else (0, 0)
            self._worker.ask({"do": "load", "generates": file.generates}, what=f"loading {file.path.name}")
            told = self._worker.ask({"do": "facts"})
        except BaseException:
            self._worker.close(hurry=True)
            raise
        self._specials = {"bos_token": told["bos_token"], "eos_token": told["eos_token"]}
        self._rendered: dict[str, str] = {}
        self.system_info: str = told["system_info"]
        self.facts = ModelFacts(
            path=str(file.path),
            format="gguf",
            nbytes=file.nbytes,
            description=told["description"],
            tensor_bytes=told["tensor_bytes"],
            num_weights=told["num_weights"],
            trained_ctx=told["trained_ctx"],
            generates=file.generates,
            has_tokenizer=told["has_tokenizer"],
            chat_template=told["chat_template"],
            runtime=f"llama.cpp of llama-cpp-python {metadata.version('llama-cpp-python')}",
        )

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End the process."""
        self._worker.close(hurry=error is not None)

    @property
    def pid(self) -> int:
        """Of the process that runs the model."""
        return self._worker.pid

    def repeat(self, test: SpeedTest) -> Repeat:
        """Run one SpeedTest once."""
        request = {"depth": test.n_depth, "threads": test.threads}
        if test.n_prompt:
            read, chosen = self._worker.ask(request | {"do": "prompt", "n": test.n_prompt})
            return Repeat(ns=read, first_token_ns=chosen)
        tokens = self._worker.ask(request | {"do": "generate", "n": test.n_gen})
        return Repeat(ns=sum(tokens), token_ns=tuple(tokens))

    def count_tokens(self, text: str, *, chat: bool) -> int:
        """Tokens that `request` would read."""
        return int(self._worker.ask({"do": "count", **self._prompt(text, chat)}))

    def request(self, text: str, *, chat: bool, n_gen: int) -> RequestTimes:
        """Answer one request from an empty cache."""
        told = self._worker.ask({"do": "answer", "n": n_gen, **self._prompt(text, chat)})
        return RequestTimes(
            prompt_tokens=told["prompt_tokens"],
            ttft_ns=told["ttft_ns"],
            token_ns=tuple(told["token_ns"]),
            text=told["text"],
        )

    def memory(self) -> MemoryResult | None:
        """Peaks so far; None where the system does not tell."""
        self._worker.look()
        peaks = self._worker.peaks
        if not peaks.rss:
            return None
        return MemoryResult(
            peak_rss=peaks.rss,
            peak_anon=peaks.anon,
            peak_file=peaks.file,
            before_anon=self._before[0],
            before_file=self._before[1],
        )

    def _prompt(self, text: str, chat: bool) -> Mapping[str, Any]:
        """The text as the model is to read it: with its chat template around it where it has one and that is asked."""
        template = self.facts.chat_template
        if not (chat and template):
            return {"text": text, "special": False, "begin": True}
        if text not in self._rendered:
            talk = [[{"role": "user", "content": text}]]
            self._rendered[text] = render(template, talk, specials=self._specials, add_generation_prompt=True)[0]
        rendered = self._rendered[text]
        begun = bool(self._specials["bos_token"]) and rendered.startswith(self._specials["bos_token"])
        return {"text": rendered, "special": True, "begin": not begun}


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufStarter:
    """A Starter: a fresh process each time, from nothing to its first token."""

    file: GgufFile
    settings: Settings
    limits: Limits

    def start(self, *, cold: bool) -> StartTimes:
        """Start, load, compute one token; the file is first dropped from the page cache, or read into it."""
        path = self.file.path
        with _readable(path):
            there = page_cache.drop(path) if cold else _read_through(path)
        with self.file.worker(self.settings, self.limits) as worker:
            what = f"starting {path.name}"
            loaded = worker.ask({"do": "load", "generates": self.file.generates}, what=what)
            first = worker.ask({"do": "first_token"}, what=what)
            return StartTimes(
                cold=cold,
                resident=there,
                process_ns=loaded["library_ns"] - worker.spawned_ns,
                load_ns=loaded["load_ns"],
                first_token_ns=first,
            )


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """An OSError of the block is the file's trouble: its header could be read before."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot be read any more: {error.strerror}", where=path.name) from error


def _read_through(path: Path) -> float | None:
    """Read the file, so that it is in the page cache as far as that has room; the share that is."""
    share = page_cache.resident(path)
    if share is None or share < 1:
        with path.open("rb", buffering=0) as file:
            while os.read(file.fileno(), 1 << 22):
                pass
        share = page_cache.resident(path)
    return share
