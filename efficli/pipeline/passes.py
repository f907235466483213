"""Passes of a recipe: each turns a checkpoint into the next one, or finds that in the cache."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from efficli.catalog import method_modules, run_method
from efficli.checkpoint import Checkpoint, open_checkpoint
from efficli.checkpoint.digest import Digest, digest_of
from efficli.method import Context, MethodConfig
from efficli.ops.llama_model import available_threads
from efficli.ops.storage import write_file
from efficli.pipeline.steps import Steps
from efficli.progress import Progress
from efficli.recipe import Pass, Recipe
from efficli.store import package_versions, source_hash

CHECKPOINT, OUTCOME = "checkpoint", "outcome.json"
"""What a pass leaves: the checkpoint's folder, and its rows for the report."""

_BLAS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""How many threads numpy sums with, which decides the last bits."""
_COMPUTES = ("numpy", "torch")
"""Packages whose version can change the weights that a method writes."""


@dataclass(slots=True)
class Digests:
    """Digests of checkpoints, each made once in a run."""

    progress: Progress
    known: dict[Path, Digest] = field(default_factory=dict)

    def of(self, ckpt: Checkpoint) -> Digest:
        """The digest of a checkpoint; reads its weights the first time."""
        if ckpt.root not in self.known:
            self.known[ckpt.root] = digest_of(ckpt, self.progress)
        return self.known[ckpt.root]


def apply_passes(
    recipe: Recipe, base: Checkpoint, steps: Steps, digests: Digests, *, threads: int | None
) -> tuple[Checkpoint, list[str]]:
    """The checkpoint after all passes of the recipe, under the name of the first one, and rows for the report."""
    ckpt, rows = base, list[str]()
    for one in recipe.passes:
        ckpt, told = _apply(one, recipe, base, ckpt, steps, digests, threads or available_threads())
        rows += [f"{one.method}: {row}" for row in told]
    return ckpt, rows


def _apply(
    one: Pass, recipe: Recipe, base: Checkpoint, ckpt: Checkpoint, steps: Steps, digests: Digests, threads: int
) -> tuple[Checkpoint, list[str]]:
    def ingredients() -> dict[str, Any]:
        return {
            "method": one.method,
            "config": one.config.model_dump(mode="json"),
            "input": digests.of(ckpt).value,
            "origin": ckpt.model,
            "source": source_hash(*method_modules(one.method)),
            "versions": package_versions(*_COMPUTES),
            "seed": recipe.seed,
            "threads": [threads, *(os.environ.get(name) for name in _BLAS)],
        }

    def fill(folder: Path) -> None:
        steps.progress.start(one.method, 0)
        (folder / CHECKPOINT).mkdir()
        context = Context(seed=recipe.seed, threads=threads, progress=steps.progress, evaluate=None)
        assert isinstance(one.config, MethodConfig)
        told = digests.of(ckpt).fingerprint if steps.store is not None else None
        outcome = run_method(one.method, ckpt, folder / CHECKPOINT, one.config, context, fingerprint=told)
        write_file(folder / OUTCOME, json.dumps({"report": list(outcome.report)}, ensure_ascii=True, indent=1))
        steps.progress.finish()

    folder = steps.produce("pass", one.method, ingredients, fill, needs_bytes=ckpt.nbytes)
    found = open_checkpoint(folder / CHECKPOINT, trust_remote_code=recipe.trust_remote_code)
    rows = json.loads((folder / OUTCOME).read_text(encoding="utf-8"))["report"]
    return replace(found, name=base.name, model=base.model, revision=base.revision), rows
