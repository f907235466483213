"""The child's side of a GGUF benchmark: llama.cpp with one file open, and its answers to requests."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from efficli.ops.llama_clock import LlamaClock
from efficli.ops.llama_log import llama_cpp
from efficli.ops.llama_model import LlamaModel, StockContext
from efficli.progress import Progress


def open_session(argument: dict[str, Any], progress: Progress) -> Session:
    """A server for `Worker`: opens argument["path"] as argument["settings"] say, and times what it is asked for."""
    llama_cpp(stock=True)
    return Session(argument, library_ns=time.monotonic_ns())


class Session:
    """An open file; requests are {"do": name, ...}."""

    def __init__(self, argument: dict[str, Any], *, library_ns: int) -> None:
        settings = argument["settings"]
        self._path = Path(argument["path"])
        self._threads: int = settings["threads"]
        self._library_ns = library_ns
        self._stock = StockContext(
            cache_type_k=settings["cache_type_k"],
            cache_type_v=settings["cache_type_v"],
            flash_attn=settings["flash_attn"],
            batch=settings["batch"],
            ubatch=settings["ubatch"],
        )
        self._settings = settings
        self._file: LlamaModel | None = None
        self._clock: LlamaClock | None = None

    def __call__(self, request: dict[str, Any]) -> Any:
        """Answer one request."""
        return getattr(self, f"do_{request['do']}")(request)

    @property
    def clock(self) -> LlamaClock:
        """Of the open file."""
        if self._clock is None:
            raise RuntimeError("asked before `load`")
        return self._clock

    def do_load(self, request: dict[str, Any]) -> dict[str, int]:
        """Open the file; when the library was there and how long the load took, nanoseconds of the monotonic clock."""
        began = time.monotonic_ns()
        file = LlamaModel(
            self._path,
            ctx=self._settings["ctx"],
            threads=self._threads,
            use_extra_bufts=self._settings["repack"],
            embeddings=not request["generates"],
            stock=self._stock,
        )
        loaded = time.monotonic_ns()
        self._file, self._clock = file, LlamaClock(file, self._settings["seed"])
        return {"library_ns": self._library_ns, "load_ns": loaded - began}

    def do_first_token(self, request: dict[str, Any]) -> int:
        """Nanoseconds of the first token: read one, choose one."""
        return self.clock.prompt(1, depth=0, threads=self._threads)[1]

    def do_facts(self, request: dict[str, Any]) -> dict[str, Any]:
        """What the runtime says of the file."""
        file = self.clock.file
        return {
            "description": file.description,
            "tensor_bytes": file.tensor_bytes,
            "num_weights": file.num_weights,
            "trained_ctx": file.trained_ctx,
            "chat_template": file.metadata("tokenizer.chat_template"),
            "bos_token": _special(file, file.bos),
            "eos_token": _special(file, file.eos),
            "has_tokenizer": file.has_tokenizer,
            "system_info": file.library.llama_print_system_info().decode("utf-8", "replace"),
        }

    def do_prompt(self, request: dict[str, Any]) -> tuple[int, int]:
        """Read a prompt of random ids."""
        return self.clock.prompt(request["n"], depth=request["depth"], threads=request["threads"])

    def do_generate(self, request: dict[str, Any]) -> list[int]:
        """Write random ids one after the other."""
        return self.clock.generate(request["n"], depth=request["depth"], threads=request["threads"])

    def do_count(self, request: dict[str, Any]) -> int:
        """Tokens of a text."""
        return len(
            self.clock.file.tokenize(request["text"], add_special=request["begin"], parse_special=request["special"])
        )

    def do_answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer a text."""
        told = self.clock.answer(
            request["text"], request["n"], special=request["special"], begin=request["begin"], threads=self._threads
        )
        return {
            "prompt_tokens": told.prompt_tokens,
            "ttft_ns": told.first_token_ns,
            "token_ns": told.token_ns,
            "text": self.clock.file.spell(told.tokens),
        }


def _special(file: LlamaModel, token: int | None) -> str:
    return "" if token is None else file.piece(token, special=True).decode("utf-8", "replace")
