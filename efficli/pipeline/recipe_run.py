"""Run: a recipe from its file to an artifact, each step taken from the cache where nothing that decides it changed."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from efficli.artifact.temporary import scratch_directory
from efficli.catalog import run_method
from efficli.checkpoint import Checkpoint, open_checkpoint, open_without_weights
from efficli.checkpoint.shards import Absent
from efficli.errors import UsageError
from efficli.export.gguf.job import GgufJob
from efficli.method import Context, MethodConfig
from efficli.pipeline.ci_report import write_reports
from efficli.pipeline.estimate import predicted_steps
from efficli.pipeline.export import outline, run_recipe
from efficli.pipeline.fits import check_fit
from efficli.pipeline.rehearse import rehearse
from efficli.pipeline.result import ExportResult
from efficli.planning.subject import with_stand_ins
from efficli.progress import Progress, Silent
from efficli.recipe import Recipe, load_with
from efficli.store import Store, default_root


def run(
    recipe: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    settings: Sequence[str] = (),
    cache: bool = True,
    rehearsal: bool = False,
    dry_run: bool = False,
    threads: int | None = None,
    force: bool = False,
    summary: str | os.PathLike[str] | None = None,
    junit: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> ExportResult:
    """Do what the recipe in a file says and write the artifact `output`, by default a folder named as the recipe.

    `settings` are `key=value` that replace values of the file. With `cache` the results of steps are kept, and taken
    where nothing that decides them has changed (`efficli cache`). `dry_run` says what would be written, how large and
    in what time, and reads no weights. `rehearsal` runs every step on a two-layer clone with drawn weights and keeps
    nothing. `summary` (Markdown) and `junit` (XML) are files that get the gates, met or not. Errors are those of
    `efficli.errors`: UsageError for a recipe that is wrong, before anything is fetched; GateError, FitError.
    """
    path, progress = Path(recipe), progress or Silent()
    place = Path(output) if output is not None else Path(path.stem)
    with write_reports(summary, junit, output=place, progress=progress) as on_judged:
        loaded = load_with(path, settings)
        if rehearsal and dry_run:
            raise UsageError("--rehearse and --dry-run: one runs the steps, the other none")
        if dry_run:
            done = _dry_run(loaded.recipe, place, cache, threads, progress)
        elif rehearsal:
            done = rehearse(loaded.recipe, _planned(loaded.recipe, place)[0], threads=threads, progress=progress)
        else:
            done = _run(loaded.recipe, place, cache, threads, force, on_judged, progress)
        on_judged(done)
        return done


def _run(
    recipe: Recipe,
    output: Path,
    cache: bool,
    threads: int | None,
    force: bool,
    on_judged: Callable[[ExportResult], None],
    progress: Progress,
) -> ExportResult:
    targets = check_fit(recipe, _planned(recipe)[1], progress) if recipe.target else ()
    with ExitStack() as stack:
        store = None
        if cache:
            store = Store(default_root(), progress)
            stack.enter_context(store.using())
        done = run_recipe(
            recipe,
            output,
            threads=threads,
            force=force,
            dry_run=False,
            progress=progress,
            store=store,
            command="run",
            on_judged=lambda result: on_judged(replace(result, targets=targets)),
        )
    return replace(done, targets=targets)


def _dry_run(recipe: Recipe, output: Path, cache: bool, threads: int | None, progress: Progress) -> ExportResult:
    """What a run would write, from headers alone."""
    result, jobs = _planned(recipe, output)
    targets = check_fit(recipe, jobs, progress) if recipe.target else ()
    return replace(result, targets=targets, steps=predicted_steps(recipe, result, threads))


def _planned(recipe: Recipe, output: Path = Path()) -> tuple[ExportResult, list[GgufJob]]:
    """The files of a recipe as headers decide them; passes are gone through with headers, too."""
    ckpt = with_stand_ins(*_small(recipe))
    with scratch_directory() as folder:
        for number, one in enumerate(recipe.passes):
            ckpt = _passed(ckpt, one.method, one.config, folder / str(number), recipe)
        result, jobs = outline(recipe, ckpt, output, command="run")
    return replace(result, dry_run=True), jobs


def _small(recipe: Recipe) -> tuple[Checkpoint, Absent | None]:
    return open_without_weights(recipe.model, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code)


def _passed(ckpt: Checkpoint, method: str, config: object, folder: Path, recipe: Recipe) -> Checkpoint:
    assert isinstance(config, MethodConfig)
    folder.mkdir()
    run_method(method, ckpt, folder, config, Context(seed=recipe.seed, headers_only=True))
    found = open_checkpoint(folder, trust_remote_code=recipe.trust_remote_code)
    return replace(found, name=ckpt.name, model=ckpt.model, revision=ckpt.revision)
