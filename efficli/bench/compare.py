"""Continue a prompt with an artifact, and with its base side by side, as the two models write.

Both run in a child process; they take turns, a token each, so that both columns grow together. With the same seed and
sampling both draw the same random numbers: what differs is the models.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from efficli.bench.origin import TorchWriter
from efficli.checkpoint import Checkpoint
from efficli.checkpoint.sidecar import IMATRIX
from efficli.errors import CheckpointError, UsageError
from efficli.ops.child import run_child
from efficli.ops.llama import LlamaFile, available_threads
from efficli.ops.sampling import Completion, Sampling, complete
from efficli.progress import Progress

Side = Literal["artifact", "base"]


@dataclass(frozen=True, slots=True)
class Pieces:
    """Progress of a child that writes: its notes are pieces of text."""

    on_piece: Callable[[Side, str], None]

    def start(self, task: str, total: float, unit: str = "") -> None:
        """Nothing: a completion has no known end."""

    def advance(self, amount: float) -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""

    def note(self, message: str) -> None:
        """Pass a piece on."""
        side, text = json.loads(message)
        self.on_piece(side, text)


_ARTIFACT = "give what `efficli export` wrote, or a .gguf file"


def model_file(path: str | Path) -> Path:
    """The GGUF file of an artifact: the file itself, or the only model file of the directory."""
    path = Path(path)
    if path.is_file():
        return path.absolute()
    if not path.is_dir():
        raise CheckpointError("no such file or directory, expected an artifact", where=str(path), hint=_ARTIFACT)
    files = sorted(file for file in path.glob("*.gguf") if file.name != IMATRIX)
    if not files:
        raise CheckpointError("no .gguf file in it, expected an artifact", where=str(path), hint=_ARTIFACT)
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise UsageError(f"holds {len(files)} models: {names}", where=str(path), hint=f"name one: {files[0]}")
    return files[0].absolute()


def try_artifact(
    artifact: str | Path,
    prompt: str,
    *,
    base: Checkpoint | Path | None = None,
    max_tokens: int = 64,
    sampling: Sampling | None = None,
    threads: int | None = None,
    on_piece: Callable[[Side, str], None] | None = None,
) -> dict[Side, Completion]:
    """Continue `prompt` with an artifact (directory or GGUF file) and, beside it, with `base`.

    `base` is a checkpoint (run by PyTorch in float32), or another artifact or GGUF file. `on_piece(side, text)` hears
    every piece of text as it is written. Greedy unless `sampling` says otherwise. What each side wrote is returned.
    """
    if not prompt:
        raise UsageError("the prompt is empty, expected some text to continue")
    how = sampling or Sampling()
    sides: dict[str, dict[str, Any]] = {"artifact": {"path": str(model_file(artifact)), "torch": False}}
    if isinstance(base, Checkpoint):
        sides["base"] = {"path": str(base.root), "torch": True}
    elif base is not None:
        sides["base"] = {"path": str(model_file(base)), "torch": False}
    argument = {
        "sides": sides,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "threads": threads,
        "sampling": {"temperature": how.temperature, "top_p": how.top_p, "seed": how.seed},
    }
    pieces = Pieces(on_piece or (lambda side, text: None))
    found = run_child("efficli.bench.compare:write_both", argument, what=f"running {artifact}", progress=pieces)
    return {side: Completion(tuple(c["tokens"]), c["text"], c["stopped"]) for side, c in found.items()}


def write_both(argument: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Both completions, a token each in turn; every piece is a note. Runs in a child process."""
    threads = argument["threads"] or available_threads()
    how, prompt, max_tokens = Sampling(**argument["sampling"]), argument["prompt"], argument["max_tokens"]
    done = dict[str, Completion]()
    with ExitStack() as stack:
        running = dict[str, Generator[str, None, Completion]]()
        for side, model in argument["sides"].items():
            running[side] = _writer(stack, model, prompt, max_tokens, how, threads)
        while running:
            for side, writing in list(running.items()):
                try:
                    piece = next(writing)
                except StopIteration as end:
                    done[side] = end.value
                    del running[side]
                else:
                    progress.note(json.dumps([side, piece]))
    return {s: {"tokens": list(c.tokens), "text": c.text, "stopped": c.stopped} for s, c in done.items()}


def _writer(
    stack: ExitStack, model: Mapping[str, Any], prompt: str, max_tokens: int, how: Sampling, threads: int
) -> Generator[str, None, Completion]:
    """A model that is about to continue the prompt."""
    if model["torch"]:
        torch_model = TorchWriter(model["path"], threads=threads)
        ids = torch_model.tokenize(prompt)
        _check_room(len(ids), torch_model.ctx, model["path"])
        return complete(torch_model, ids, max_tokens, how)
    with LlamaFile(model["path"], vocab_only=True) as vocabulary:
        if not vocabulary.has_tokenizer:
            raise UsageError("the file has no tokenizer: it cannot read a prompt", where=model["path"])
        if vocabulary.metadata(f"{vocabulary.architecture}.pooling_type") not in (None, "0"):
            raise UsageError("an embedding model writes no text", where=model["path"])
        ids = vocabulary.tokenize(prompt, add_special=True, parse_special=True)
        trained = int(vocabulary.metadata(f"{vocabulary.architecture}.context_length") or len(ids) + max_tokens)
    _check_room(len(ids), trained, model["path"])
    file = stack.enter_context(
        LlamaFile(model["path"], ctx=max(8, min(trained, len(ids) + max_tokens)), threads=threads)
    )
    return file.write(ids, max_tokens, how)


def _check_room(tokens: int, ctx: int, where: str) -> None:
    if tokens >= ctx:
        raise UsageError(f"a prompt of {tokens} tokens, expected fewer than the model's {ctx}", where=where)
