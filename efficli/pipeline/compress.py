"""Compress: a checkpoint through one pass into another checkpoint, or on to a file of it.

    checkpoint -> plan (headers) -> draft -> pass, or its result from the cache -> sidecar, recipe -> commit

Until the commit nothing is at the output's name but what was there before.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from efficli.artifact import check_output, draft
from efficli.catalog import canonical, config_of
from efficli.checkpoint import Checkpoint, open_checkpoint, open_without_weights
from efficli.checkpoint.carry import RECIPE
from efficli.checkpoint.sidecar import FILE, write_sidecar
from efficli.errors import OutputError, UsageError, did_you_mean
from efficli.ops.storage import remove_tree, write_file, writing
from efficli.pipeline.execution import OVERHEAD_BYTES
from efficli.pipeline.export import pinned, run_recipe
from efficli.pipeline.files import allocation_of, prepare_export, with_default_types
from efficli.pipeline.passes import Digests, apply_passes, planned_passes
from efficli.pipeline.preflight import input_paths
from efficli.pipeline.result import CompressResult, ExportResult, planned
from efficli.pipeline.steps import Clock, Steps, kept_steps
from efficli.planning.subject import with_stand_ins
from efficli.progress import Progress, Silent
from efficli.recipe import Recipe, no_place
from efficli.store import Store


def compress(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    method: str,
    options: Mapping[str, Any] | None = None,
    calibration: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    export: bool = False,
    strict: bool = False,
    seed: int = 0,
    threads: int | None = None,
    force: bool = False,
    dry_run: bool = False,
    cache: bool = True,
    progress: Progress | None = None,
) -> CompressResult | ExportResult:
    """Run one `method` (quantize.mixed) with `options`, its keys, over `model`; write the checkpoint folder `output`.

    The folder has the resolved recipe beside the weights: `efficli run` of it writes the file that the checkpoint
    stands for. With `export` that is what is done here, `output` is its artifact, and no checkpoint is kept.
    `calibration` is a text file. With `cache` the result of the pass is kept, and taken where nothing that decides it
    has changed. With `dry_run` nothing is written, and no weight is read. Errors are those of `efficli.errors`;
    `output` is untouched or whole after each of them.
    """
    progress, name = progress or Silent(), canonical(method)
    check_options(name, options or {})
    recipe = Recipe.from_export(
        model=os.fspath(model),
        types=None,
        passes=({"method": name, **(options or {})},),
        calibration=None if calibration is None else os.fspath(calibration),
        revision=revision,
        trust_remote_code=trust_remote_code,
        strict=strict,
        seed=seed,
    )
    place = Path(output)
    if dry_run and not export:
        return _dry_run(recipe, place, progress)
    with kept_steps(cache and not dry_run, progress) as store:
        if export:
            return run_recipe(
                recipe,
                place,
                threads=threads,
                force=force,
                dry_run=dry_run,
                progress=progress,
                store=store,
                command="quantize",
            )
        return _write(recipe, place, store, threads=threads, force=force, progress=progress)


def check_options(method: str, options: Mapping[str, Any]) -> None:
    """UsageError for an option that a method does not have."""
    known = list(config_of(method).model_fields)
    for key in options:
        if key not in known:
            flags = ["--" + name.replace("_", "-") for name in known]
            flag = "--" + key.replace("_", "-")
            hint = did_you_mean(flag, flags) or f"it has {', '.join(flags)}"
            raise UsageError(f"{method} has no option {flag}", hint=hint)


def _dry_run(recipe: Recipe, output: Path, progress: Progress) -> CompressResult:
    """What would be written, from headers alone."""
    found = open_without_weights(recipe.model, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code)
    with planned_passes(recipe, with_stand_ins(*found), no_place) as ckpt:
        return replace(_outline(recipe, ckpt, output, weightless=True), dry_run=True)


def _outline(recipe: Recipe, ckpt: Checkpoint, output: Path, *, weightless: bool) -> CompressResult:
    """What there is to say of the checkpoint that the pass made, or as its headers describe it."""
    file = None
    if allocation_of(ckpt) is not None:
        recipe = with_default_types(recipe, ckpt)
        job = prepare_export(ckpt, recipe, recipe.exports[0], weightless=weightless)
        file = planned(job, job.files[0])
    return CompressResult(
        output=output,
        model=ckpt.name,
        method=recipe.passes[0].method,
        nbytes=ckpt.nbytes,
        file=file,
        report=(),
        dry_run=False,
    )


def _write(
    recipe: Recipe, output: Path, store: Store | None, *, threads: int | None, force: bool, progress: Progress
) -> CompressResult:
    clock = Clock()
    with clock("prepare"):
        base = open_checkpoint(recipe.model, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code)
        inputs = input_paths(recipe, base.root)
        check_output(output, inputs, force)
        recipe = pinned(recipe, base)
        with planned_passes(recipe, base, no_place) as ckpt:
            recipe, needs = with_default_types(recipe, ckpt), ckpt.nbytes
    with draft(output, inputs=inputs, needs_bytes=needs + OVERHEAD_BYTES, force=force) as drafted:
        scratch = Path(tempfile.mkdtemp(prefix="work-", dir=drafted.path))  # on an error the draft removes it
        steps = Steps(store=store, scratch=scratch, progress=progress, clock=clock)
        ckpt, rows = apply_passes(recipe, base, steps, Digests(progress), threads=threads)
        for row in rows:
            progress.note(row)
        done = replace(_outline(recipe, ckpt, output, weightless=False), report=tuple(rows), steps=tuple(steps.done))
        with clock("publish"):
            _fill(ckpt, steps, drafted.path)
            write_file(drafted.path / RECIPE, recipe.to_yaml())
            remove_tree(scratch)
            if scratch.exists():
                raise OutputError(f"cannot remove {scratch.name}, which is no part of it", where=output.name)
            drafted.commit_folder()
    return replace(done, seconds=dict(clock.seconds))


def _fill(ckpt: Checkpoint, steps: Steps, folder: Path) -> None:
    """Put the files of a pass's checkpoint into `folder`; its sidecar as it is now says where the origin was."""
    assert ckpt.sidecar is not None
    for source in sorted(ckpt.root.rglob("*")):
        name = source.relative_to(ckpt.root)
        if source.is_dir() or name == Path(FILE):
            continue
        target = folder / name
        with writing(target):
            target.parent.mkdir(exist_ok=True)
            if steps.store is None:
                source.rename(target)
        if steps.store is not None:
            steps.copy(ckpt.root.parent, source.relative_to(ckpt.root.parent).as_posix(), target)
    with writing(folder / FILE):
        write_sidecar(folder, ckpt.sidecar)
