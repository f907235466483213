"""Export: a checkpoint becomes files, the files are loaded and measured, and all of it one artifact.

    checkpoint -> prepare (headers) -> draft -> write -> load and decode -> certificate -> gates -> commit

Until the commit nothing is at the output's name but what was there before.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from efficli.artifact import check_output
from efficli.checkpoint import Checkpoint, open_checkpoint
from efficli.errors import UsageError
from efficli.export.gguf.job import GgufJob
from efficli.ops.ggml_types import is_mixed
from efficli.pipeline.calibration import calibration_texts
from efficli.pipeline.execution import RecipeRun, check_names
from efficli.pipeline.files import prepare_export, with_default_types
from efficli.pipeline.passes import planned_passes
from efficli.pipeline.preflight import check_first, input_paths
from efficli.pipeline.result import ExportResult, planned
from efficli.pipeline.steps import Clock, kept_steps
from efficli.progress import Progress, Silent
from efficli.recipe import Places, Recipe, no_place
from efficli.store import Store


def export(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    format: str = "gguf",
    types: Sequence[str] | None = None,
    max_bytes: int | str | None = None,
    bpw: float | None = None,
    fit: str | None = None,
    fit_ctx: int | None = None,
    imatrix: str | os.PathLike[str] | None = None,
    tensor_types: Sequence[tuple[str, str]] = (),
    output_tensor_type: str | None = None,
    token_embedding_type: str | None = None,
    pure: bool = False,
    pre_tokenizer: str | None = None,
    allow_non_ternary: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    base: str | None = None,
    text: str | os.PathLike[str] | None = None,
    ctx: int = 512,
    max_kld: float | None = None,
    min_top1: float | None = None,
    certificate: bool = True,
    strict: bool = False,
    threads: int | None = None,
    seed: int = 0,
    force: bool = False,
    dry_run: bool = False,
    cache: bool = True,
    progress: Progress | None = None,
) -> ExportResult:
    """Write `model` (directory, hub id, `reference`) as GGUF files into the directory `output`, load and measure them.

    `types` are llama.cpp's names, or MIXED: the types that a pass allocated to the checkpoint's tensors, which is the
    default where it has them, and Q4_K_M elsewhere. Several are written in one read. `imatrix` is a file or "auto".
    A budget instead of types is a size (`max_bytes`: a number, or "350MiB"), bits per weight (`bpw`), or a target that
    must hold the file and `fit_ctx` tokens (`fit`): the pass quantize.mixed then chooses the type of every tensor, and
    with `cache` what it measures is kept for another budget.
    `tensor_types` are (regular expression, type). `trust_remote_code` takes a model that names code of its own; no code
    of it is run. The certificate compares with the origin, or with `base`, on the evaluation slice or `text`, in
    windows of `ctx` tokens; `max_kld` (nats) and `min_top1` (0 to 1) are gates: not met, nothing is written and
    GateError is raised. `strict` turns fallbacks and an absent origin into errors. With `dry_run` nothing is written.
    Errors are those of `efficli.errors`; `output` is untouched or whole after each of them.
    """
    matrix = None if imatrix is None else os.fspath(imatrix)
    budget = _budget(types, max_bytes, bpw, fit, fit_ctx)
    if budget:  # the matrix is the pass's, which has one computed by itself, and keeps it for the export
        budget |= {} if matrix in (None, "auto") else {"imatrix": matrix}
        matrix = None
    recipe = Recipe.from_export(
        model=os.fspath(model),
        format=format,
        types=None if types is None or budget else tuple(types),
        passes=({"method": "quantize.mixed", **budget},) if budget else (),
        imatrix=matrix,
        tensor_types=tuple(tensor_types),
        output_tensor_type=output_tensor_type,
        token_embedding_type=token_embedding_type,
        pure=pure,
        pre_tokenizer=pre_tokenizer,
        allow_non_ternary=allow_non_ternary,
        revision=revision,
        trust_remote_code=trust_remote_code,
        base=base,
        text=None if text is None else os.fspath(text),
        ctx=ctx,
        max_kld=max_kld,
        min_top1=min_top1,
        certificate=certificate,
        strict=strict,
        seed=seed,
    )
    progress = progress or Silent()
    with kept_steps(cache and bool(budget) and not dry_run, progress) as store:
        return run_export(
            recipe, Path(output), threads=threads, force=force, dry_run=dry_run, store=store, progress=progress
        )


def _budget(
    types: Sequence[str] | None, max_bytes: int | str | None, bpw: float | None, fit: str | None, fit_ctx: int | None
) -> dict[str, Any]:
    """The keys of quantize.mixed that a command line gives; UsageError where it names types, too."""
    words = {"max_bytes": max_bytes, "bpw": bpw, "fit": fit}
    budget = {key: word for key, word in words.items() if word is not None}
    if not budget:
        if fit_ctx is not None:
            raise UsageError("--fit-ctx needs --fit", hint="--fit pi5-8gb --fit-ctx 4096")
        return {}
    option = "--" + next(iter(budget)).replace("_", "-")
    if fit_ctx is not None and fit is None:
        raise UsageError(f"{option} and --fit-ctx, which is for --fit")
    if named := [word for word in types or () if not is_mixed(word)]:
        hint = f"leave out one of them; --type says it for all, {option} chooses for each tensor"
        raise UsageError(f"{option} and --type {named[0]}: a budget chooses the types", hint=hint)
    return budget if fit_ctx is None else {**budget, "ctx_size": fit_ctx}


def run_export(
    recipe: Recipe,
    output: Path,
    *,
    threads: int | None,
    force: bool,
    dry_run: bool,
    progress: Progress,
    store: Store | None = None,
) -> ExportResult:
    """Run the recipe of a command line; of one without a pass nothing is worth keeping in a `store`."""
    return run_recipe(recipe, output, threads=threads, force=force, dry_run=dry_run, store=store, progress=progress)


def run_recipe(
    recipe: Recipe,
    output: Path,
    *,
    threads: int | None,
    force: bool,
    dry_run: bool,
    progress: Progress,
    store: Store | None = None,
    command: str = "export",
    on_judged: Callable[[ExportResult], None] | None = None,
    at: Places = no_place,
) -> ExportResult:
    """Run a recipe; see `export`, and `efficli.pipeline.recipe_run.run` for what a recipe adds."""
    check_gates(recipe)
    clock = Clock()
    with clock("prepare"):
        with at("model"):
            base = open_checkpoint(recipe.model, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code)
        if not dry_run:
            check_output(output, input_paths(recipe, base.root), force)
        recipe = pinned(recipe, base)
        with planned_passes(recipe, base, at) as ckpt:
            recipe = with_default_types(recipe, ckpt)
            result, jobs = outline(recipe, ckpt, output, command=command, at=at)
            check_first(recipe, jobs, at)
    result = replace(result, dry_run=dry_run)
    fallbacks = {f"{file.type}: {fallback}" for file in result.files for fallback in file.fallbacks}
    for row in result.report:
        if row not in fallbacks:  # hundreds in a small model; the result holds them, and a table counts them
            progress.note(row)
    if dry_run:
        return result
    run = RecipeRun(
        recipe=recipe,
        base=base,
        result=result,
        jobs=jobs,
        store=store,
        threads=threads,
        progress=progress,
        clock=clock,
        on_judged=on_judged,
    )
    return run.write(force)


def pinned(recipe: Recipe, base: Checkpoint) -> Recipe:
    """The recipe with the commit of a model of the hub, as the artifact keeps it: the branch will move on."""
    if base.revision is None or Path(recipe.model).expanduser().is_dir():
        return recipe
    return recipe.model_copy(update={"model": recipe.model.partition("@")[0], "revision": base.revision})


def outline(
    recipe: Recipe, ckpt: Checkpoint, output: Path, *, command: str, at: Places = no_place
) -> tuple[ExportResult, list[GgufJob]]:
    """What a recipe's exports write from a checkpoint, as its headers decide it, and the jobs that write it."""
    jobs = []
    if any(export.imatrix == "auto" for export in recipe.exports):
        with at("calibration", "text"):
            calibration_texts(recipe)  # whose hashes are in the files
    for number, export in enumerate(recipe.exports):
        with at("exports", number, only=UsageError):
            jobs.append(prepare_export(ckpt, recipe, export, weightless=bool(recipe.passes)))
    with at("exports"):
        check_names(jobs)
    result = ExportResult(
        output=output,
        model=ckpt.name,
        num_weights=jobs[0].num_weights,
        files=tuple(planned(job, file) for job in jobs for file in job.files),
        report=tuple(dict.fromkeys(row for job in jobs for row in job.report)),
        dry_run=False,
        command=command,
        passes=tuple(one.method for one in recipe.passes),
    )
    return result, jobs


def check_gates(recipe: Recipe) -> None:
    """UsageError for a wish about a certificate that is not made."""
    wishes = {
        "--max-kld": recipe.gates.max_kld,
        "--min-top1": recipe.gates.min_top1,
        "--base": recipe.certificate.base,
        "--text": recipe.certificate.text,
    }
    asked = [flag for flag, wish in wishes.items() if wish is not None]
    if asked and not recipe.certificate.enabled:
        raise UsageError(f"{asked[0]} needs the certificate", hint="leave out --no-certificate")
