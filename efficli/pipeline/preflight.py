"""What would end a run after its long steps, found before them: texts, models to compare with, and what bench is asked.

Only headers and small files are read. Each error has its place in the recipe.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from efficli.bench.gguf_engine import GgufFile
from efficli.bench.rounds import Effort
from efficli.bench.scenario import Scenario, load_scenario, scenario_names
from efficli.bench.texts import MIN_TOKENS, evaluation_texts
from efficli.checkpoint import open_without_weights
from efficli.errors import UsageError
from efficli.export.gguf.job import GgufJob
from efficli.export.gguf.parse import GgufHeader
from efficli.export.gguf.vocab_check import SourceTokenizer
from efficli.pipeline.bench_request import BenchFile, BenchRequest
from efficli.recipe import Bench, Places, Recipe

_SURELY_ENOUGH = 4096
"""Characters of a text that has more than MIN_TOKENS tokens, whatever the vocabulary."""


def input_paths(recipe: Recipe, root: Path) -> list[Path]:
    """Folders and files that a run reads, `root` the model's; an output that held one of them would destroy it."""
    words = [recipe.certificate.base, recipe.certificate.text, recipe.calibration.text]
    words += [export.imatrix for export in recipe.exports if export.imatrix != "auto"]
    paths = [Path(word).expanduser() for word in words if word is not None]
    return [root, *(path for path in paths if path.exists())]


def check_first(recipe: Recipe, jobs: list[GgufJob], at: Places) -> None:
    """UsageError, CheckpointError and UnsupportedError as the long run would raise them at its end.

    `jobs` are the recipe's exports as headers decide them, their checkpoint still there.
    """
    if recipe.certificate.enabled:
        _check_certificate(recipe, jobs[0], at)
    if recipe.bench is not None:
        _check_bench(recipe.bench, recipe, jobs, at)


def _check_certificate(recipe: Recipe, job: GgufJob, at: Places) -> None:
    told = recipe.certificate
    for key in ("max_kld", "min_top1") if job.embeds else ():
        if getattr(recipe.gates, key) is not None:
            with at("gates", key):
                raise UsageError(f"{key} does not apply to an embedding model", where=job.checkpoint.name)
    if told.base is not None:
        with at("certificate", "base"):
            open_without_weights(told.base, trust_remote_code=recipe.trust_remote_code)
    with at("certificate", "text"):
        texts = evaluation_texts(told.text)
        if not job.embeds and max(len(text.content) for text in texts) < _SURELY_ENOUGH:
            ids = SourceTokenizer(job.checkpoint)
            most = max(len(ids.ids(text.content, add_special=False, parse_special=False)) for text in texts)
            if most < MIN_TOKENS:
                raise UsageError(f"a text of {most} tokens is too short, expected {MIN_TOKENS} or more")


def _check_bench(bench: Bench, recipe: Recipe, jobs: list[GgufJob], at: Places) -> None:
    if recipe.gates.min_decode is not None and jobs[0].embeds:
        with at("gates", "min_decode"):
            raise UsageError("min_decode does not apply to an embedding model", where=jobs[0].checkpoint.name)
    scenarios = tuple(_scenarios(bench, at))
    request = BenchRequest(
        n_prompt=bench.n_prompt,
        n_gen=bench.n_gen,
        depth=bench.depth,
        threads=bench.threads,
        ctx=None,
        cache_type_k="f16",
        cache_type_v="f16",
        flash_attn="auto",
        effort=Effort(least=bench.repetitions, most=bench.max_repetitions, patience=bench.patience),
        scenarios=scenarios,
        seed=recipe.seed,
    )
    with at("bench"):
        request.check()
        for job in jobs:
            for name in (file.name for file in job.files):
                try:
                    tests = request.tests(_unwritten(job, name))
                except UsageError as error:  # its hint is an option of the command, and no key
                    raise UsageError(error.message, where=error.where) from error
                if not (tests or bench.starts or (scenarios and not job.embeds)):
                    raise UsageError("nothing to measure: no test, no start, no scenario", where=name)


def _scenarios(bench: Bench, at: Places) -> Iterator[Scenario]:
    """The scenarios, each once."""
    seen = set()
    for place, word in enumerate(bench.scenario):
        with at("bench", "scenario", place):
            for name in scenario_names() if word == "all" else (word,):
                if name not in seen:
                    seen.add(name)
                    yield load_scenario(name)


def _unwritten(job: GgufJob, name: str) -> BenchFile:
    """A file as `bench` will open it."""
    header = GgufHeader({}, {}, {}, version=3, data_start=0, nbytes=0, alignment=32)
    file = GgufFile(path=Path(name), generates=not job.embeds)
    return BenchFile(gguf=file, header=header, trained_ctx=job.shape.max_positions)
