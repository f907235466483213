"""Passes of a recipe: each turns a checkpoint into the next one, or finds that in the cache."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from efficli.artifact.temporary import scratch_directory
from efficli.catalog import load_method, method_modules, run_method
from efficli.checkpoint import Checkpoint, open_checkpoint
from efficli.checkpoint.digest import Digest, digest_of, small_files
from efficli.checkpoint.sidecar import Origin
from efficli.errors import UsageError
from efficli.method import MethodConfig
from efficli.ops.llama_model import available_threads
from efficli.ops.storage import write_file
from efficli.pipeline.method_context import COMPUTES, beside, context_for, planning_context, thread_words
from efficli.pipeline.steps import Steps
from efficli.progress import Progress
from efficli.recipe import Pass, Places, Recipe
from efficli.store import package_versions, source_hash

CHECKPOINT, OUTCOME = "checkpoint", "outcome.json"
"""What a pass leaves: the checkpoint's folder, and its rows for the report."""


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

    def learn(self, ckpt: Checkpoint, fingerprint: str) -> None:
        """Take the fingerprint that somebody has just made of a checkpoint, so that its weights are not read again."""
        self.known.setdefault(ckpt.root, Digest(fingerprint, small_files(ckpt)))


@contextmanager
def planned_passes(recipe: Recipe, base: Checkpoint, at: Places) -> Iterator[Checkpoint]:
    """What the passes of a recipe would make of a checkpoint, without its values; it is gone after the block.

    No weight is read. A pass that is wrong for the model is a UsageError with its place in the recipe.
    """
    ckpt = base
    with ExitStack() as stack:
        for number, one in enumerate(recipe.passes):
            folder = stack.enter_context(scratch_directory())
            assert isinstance(one.config, MethodConfig)
            with at("passes", number, only=UsageError):
                context = planning_context(load_method(one.method), ckpt, recipe)
                run_method(one.method, ckpt, folder, one.config, context)
            ckpt = _named(folder, base, recipe)
        yield ckpt


def apply_passes(
    recipe: Recipe, base: Checkpoint, steps: Steps, digests: Digests, *, threads: int | None
) -> tuple[Checkpoint, list[str]]:
    """The checkpoint after all passes of the recipe, under the name of the first one, and rows for the report."""
    ckpt, rows = base, list[str]()
    for one in recipe.passes:
        ckpt, told = _apply(one, recipe, base, ckpt, steps, digests, threads or available_threads())
        rows += [f"{one.method}: {row}" for row in told]
    # what is kept does not say where the origin was, so that it is found again from elsewhere
    sidecar = ckpt.sidecar
    if sidecar is not None and sidecar.origin is not None and sidecar.origin.model is None:
        origin = sidecar.origin.model_copy(update={"model": base.model, "revision": base.revision})
        ckpt = replace(ckpt, sidecar=sidecar.model_copy(update={"origin": origin}))
    return ckpt, rows


def _named(folder: Path, base: Checkpoint, recipe: Recipe) -> Checkpoint:
    """The checkpoint in a folder under the name of the recipe's model."""
    found = open_checkpoint(folder, trust_remote_code=recipe.trust_remote_code)
    return replace(found, name=base.name, model=base.model, revision=base.revision)


def _apply(
    one: Pass, recipe: Recipe, base: Checkpoint, ckpt: Checkpoint, steps: Steps, digests: Digests, threads: int
) -> tuple[Checkpoint, list[str]]:
    assert isinstance(one.config, MethodConfig)
    method = load_method(one.method)

    def ingredients() -> dict[str, Any]:
        assert isinstance(one.config, MethodConfig)
        return {
            "method": one.method,
            "config": one.config.model_dump(mode="json"),
            "input": digests.of(ckpt).value,
            "source": source_hash(*method_modules(one.method)),
            "versions": package_versions(*COMPUTES),
            "seed": recipe.seed,
            "threads": thread_words(threads),
            **({"beside": told} if (told := beside(method, one.config, recipe)) else {}),
        }

    def fill(folder: Path) -> None:
        steps.progress.start(one.method, 0)
        (folder / CHECKPOINT).mkdir()
        context = context_for(method, ckpt, recipe, steps, lambda: digests.of(ckpt).value, threads)
        assert isinstance(one.config, MethodConfig)
        known = ckpt.sidecar is not None and ckpt.sidecar.origin is not None
        origin = None if known else Origin(fingerprint=digests.of(ckpt).fingerprint)
        outcome = run_method(one.method, ckpt, folder / CHECKPOINT, one.config, context, origin=origin)
        write_file(folder / OUTCOME, json.dumps({"report": list(outcome.report)}, ensure_ascii=True, indent=1))
        steps.progress.finish()

    folder = steps.produce("pass", one.method, ingredients, fill, needs_bytes=ckpt.nbytes)
    rows = json.loads((folder / OUTCOME).read_text(encoding="utf-8"))["report"]
    return _named(folder / CHECKPOINT, base, recipe), rows
