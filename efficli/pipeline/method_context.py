"""What a method is handed beside weights and configuration, and what of it decides its result."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from efficli.catalog import Method
from efficli.checkpoint import Checkpoint
from efficli.errors import CheckpointError
from efficli.method import Context, Keep, MethodConfig
from efficli.pipeline.calibration import calibration, calibration_texts, hashes
from efficli.pipeline.file_view import GgufView
from efficli.pipeline.steps import Steps
from efficli.recipe import Recipe
from efficli.store import package_versions, source_hash
from efficli.target import load_target

BLAS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""How many threads numpy sums with, which decides the last bits."""
COMPUTES = ("numpy", "torch")
"""Packages whose version can change the weights that a method writes."""
_MEASURES = (*COMPUTES, "transformers", "llama-cpp-python", "gguf", "tokenizers", "sentencepiece", "scipy")
"""Packages whose version can change what a method measures."""


def context_for(
    method: Method, ckpt: Checkpoint, recipe: Recipe, steps: Steps, digest: Callable[[], str], threads: int
) -> Context:
    """The context of a method that works on weights; `digest` is that of `ckpt`."""

    def keep(kind: str, what: str, module: str, ingredients: Mapping[str, Any], fill: Callable[[Path], None]) -> Path:
        def made_from() -> dict[str, Any]:
            return {
                **ingredients,
                "input": digest(),
                "source": source_hash(module),
                "versions": package_versions(*_MEASURES),
                "threads": thread_words(threads),
                "seed": recipe.seed,
            }

        return steps.produce(kind, what, made_from, fill)

    view = _view(method, ckpt, recipe)
    wanted = "calibration" in method.uses
    kept: Keep | None = keep if wanted else None
    return Context(
        seed=recipe.seed,
        threads=threads,
        progress=steps.progress,
        file=view,
        calibration=cache(lambda: calibration(ckpt, recipe, (view or GgufView(ckpt)).bos)) if wanted else None,
        keep=kept,
    )


def planning_context(method: Method, ckpt: Checkpoint, recipe: Recipe) -> Context:
    """The context of a method that writes sizes alone."""
    return Context(seed=recipe.seed, headers_only=True, file=_view(method, ckpt, recipe))


def beside(method: Method, config: MethodConfig, recipe: Recipe) -> dict[str, Any]:
    """What decides a method's result beside the checkpoint, its configuration and its source: texts, files, targets."""
    told: dict[str, Any] = {}
    if "calibration" in method.uses:
        told["calibration"] = recipe.calibration.model_dump(mode="json", exclude={"text"})
        told["texts"] = hashes(calibration_texts(recipe))
    if method.uses:
        told["versions"] = package_versions(*_MEASURES)
        told["view"] = source_hash("efficli.pipeline.file_view")
    if method.inputs is not None:
        found = method.inputs(config)
        told["files"] = [hashlib.sha256(_read(path)).hexdigest() for path in found.files]
        told["targets"] = [json.loads(load_target(name).model_dump_json()) for name in found.targets]
    return told


def thread_words(threads: int) -> list[Any]:
    """How many threads compute, as far as that decides last bits."""
    return [threads, *(os.environ.get(name) for name in BLAS)]


def _view(method: Method, ckpt: Checkpoint, recipe: Recipe) -> GgufView | None:
    word = next((export.pre_tokenizer for export in recipe.exports if export.pre_tokenizer), None)
    return GgufView(ckpt, pre_tokenizer=word) if "file" in method.uses else None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot be read ({(error.strerror or str(error)).lower()})", where=str(path)) from None
