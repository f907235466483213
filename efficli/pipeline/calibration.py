"""The text that a model is calibrated on: its name, its content, its tokens in chunks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from efficli.bench.texts import evaluation_texts
from efficli.checkpoint import Checkpoint
from efficli.data import committed
from efficli.errors import CheckpointError
from efficli.export.gguf.vocab_check import SourceTokenizer
from efficli.families import read_shape
from efficli.network.statistics import cut
from efficli.precision.view import Calibration
from efficli.recipe import Recipe

CALIBRATION = ("calibration-code", "calibration-prose")
"""The slices that a model is calibrated on where the recipe names no text."""
SELECTION = 4
"""One of so many chunks of the calibration text is for choosing between candidates."""


def calibration_texts(recipe: Recipe) -> list[tuple[str, str]]:
    """(name, content) of what the model is calibrated on."""
    if recipe.calibration.text is None:
        return [(name, committed(name)) for name in CALIBRATION]
    return [(text.name, text.content) for text in evaluation_texts(recipe.calibration.text)]


def hashes(texts: Sequence[tuple[str, str]]) -> list[list[str]]:
    """Name and SHA-256 of each text."""
    return [[name, hashlib.sha256(text.encode()).hexdigest()] for name, text in texts]


def calibration(ckpt: Checkpoint, recipe: Recipe, bos: int | None) -> Calibration:
    """The tokens of the recipe's calibration text in chunks; CheckpointError if it fills none.

    Each chunk begins as the model's texts do, as llama-imatrix cuts them; of every four the last is for selection.
    """
    texts, options = calibration_texts(recipe), recipe.calibration
    tokenizer = SourceTokenizer(ckpt)
    size = min(options.ctx_size, read_shape(ckpt.config).max_positions)
    chunks: list[tuple[int, ...]] = []
    total = 0
    for _, content in texts:
        ids = tokenizer.ids(content, add_special=False, parse_special=False)
        total += len(ids)
        if len(ids) >= size:
            chunks += [tuple(chunk) for chunk in cut(ids, size, bos=bos)]
    chunks = chunks[: max(1, options.max_tokens // size)]
    if not chunks:
        raise CheckpointError(
            f"the calibration text has {total} tokens, expected at least {size}",
            where=texts[0][0],
            hint="a longer text, or a smaller calibration.ctx_size",
        )
    apart = range(SELECTION - 1, len(chunks), SELECTION) or range(len(chunks) - 1, len(chunks))
    rest = [chunk for number, chunk in enumerate(chunks) if number not in apart]
    return Calibration(
        name=", ".join(name for name, _ in texts),
        sha256=hashlib.sha256(json.dumps(chunks).encode()).hexdigest(),
        chunks=tuple(rest or chunks),
        selection=_shuffled([chunks[number] for number in apart], recipe.seed),
    )


def _shuffled(chunks: list[tuple[int, ...]], seed: int) -> tuple[tuple[int, ...], ...]:
    """In an order by hash: the first few are of all texts."""
    return tuple(sorted(chunks, key=lambda chunk: hashlib.sha256(json.dumps([seed, chunk]).encode()).digest()))
