"""Run: a recipe from its file to an artifact, each step taken from the cache where nothing that decides it changed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from efficli.checkpoint import open_without_weights
from efficli.errors import UsageError
from efficli.export.gguf.job import GgufJob
from efficli.pipeline.ci_report import write_reports
from efficli.pipeline.estimate import predicted_steps
from efficli.pipeline.export import outline, run_recipe
from efficli.pipeline.files import with_default_types
from efficli.pipeline.fits import check_fit
from efficli.pipeline.passes import planned_passes
from efficli.pipeline.preflight import check_first
from efficli.pipeline.rehearse import rehearse
from efficli.pipeline.result import ExportResult
from efficli.pipeline.steps import kept_steps
from efficli.planning.subject import with_stand_ins
from efficli.progress import Progress, Silent
from efficli.recipe import LoadedRecipe, load_with


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
        if place.exists() and place.samefile(path):
            raise UsageError(f"output {place} would overwrite the recipe", hint="give the name of a new folder to -o")
        if rehearsal and dry_run:
            raise UsageError("--rehearse and --dry-run: one runs the steps, the other none")
        if dry_run:
            done = _dry_run(loaded, place, threads, progress)
        elif rehearsal:
            done = rehearse(loaded.recipe, _planned(loaded, place)[0], threads=threads, progress=progress)
        else:
            done = _run(loaded, place, cache, threads, force, on_judged, progress)
        on_judged(done)
        return done


def _run(
    loaded: LoadedRecipe,
    output: Path,
    cache: bool,
    threads: int | None,
    force: bool,
    on_judged: Callable[[ExportResult], None],
    progress: Progress,
) -> ExportResult:
    recipe, targets = loaded.recipe, tuple[Mapping[str, Any], ...]()
    if recipe.target or recipe.passes:  # what is wrong with them is said before weights are fetched
        jobs = _planned(loaded)[1]
        targets = check_fit(recipe, jobs, progress) if recipe.target else ()
    with kept_steps(cache, progress) as store:
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
            at=loaded.at,
        )
    return replace(done, targets=targets)


def _dry_run(loaded: LoadedRecipe, output: Path, threads: int | None, progress: Progress) -> ExportResult:
    """What a run would write, from headers alone."""
    recipe = loaded.recipe
    result, jobs = _planned(loaded, output)
    targets = check_fit(recipe, jobs, progress) if recipe.target else ()
    return replace(result, targets=targets, steps=predicted_steps(recipe, result, threads))


def _planned(loaded: LoadedRecipe, output: Path = Path()) -> tuple[ExportResult, list[GgufJob]]:
    """The files of a recipe as headers decide them; passes are gone through with headers, too."""
    recipe = loaded.recipe
    with loaded.at("model"):
        found = open_without_weights(recipe.model, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code)
    with planned_passes(recipe, with_stand_ins(*found), loaded.at) as ckpt:
        recipe = with_default_types(recipe, ckpt)
        result, jobs = outline(recipe, ckpt, output, command="run", at=loaded.at)
        check_first(recipe, jobs, loaded.at)
    return replace(result, dry_run=True), jobs
