"""How long the steps of a recipe should take on this machine: predicted, before any of them has run.

Seconds are work over rates that were measured on one core (AMD EPYC with AVX-512, llama-cpp-python 0.3.36), divided by
the cores that may be used; another processor is off by its own factor, so they say minutes or hours, not more.
"""

from __future__ import annotations

from collections.abc import Mapping

from efficli.bench.quality import MAX_POSITIONS
from efficli.catalog import kind_of, load_method
from efficli.network.loading import torch_is_installed
from efficli.ops.llama_model import available_threads
from efficli.pipeline.bench_request import DEPTH, N_GEN, N_PROMPT
from efficli.pipeline.result import ExportResult
from efficli.pipeline.steps import StepRun
from efficli.recipe import Bench, Recipe

NANOSECONDS: Mapping[str, tuple[float, float]] = {
    "F32": (1, 1), "F16": (2, 2), "BF16": (1, 1), "Q8_0": (3, 4), "Q4_0": (1, 26), "Q4_1": (1, 111), "Q5_0": (2, 27),
    "Q5_1": (2, 110), "Q2_K": (56, 130), "Q3_K": (12, 37), "Q4_K": (67, 115), "Q5_K": (55, 116), "Q6_K": (28, 29),
    "IQ1_S": (310, 310), "IQ1_M": (137, 146), "IQ2_XXS": (481, 481), "IQ2_XS": (1219, 1219), "IQ2_S": (406, 222),
    "IQ3_XXS": (666, 470), "IQ3_S": (556, 334), "IQ4_XS": (176, 177), "IQ4_NL": (176, 177), "TQ1_0": (3, 3),
    "TQ2_0": (3, 3), "Q1_0": (5, 5), "Q2_0": (3, 3), "MXFP4": (5, 5),
}  # fmt: skip
"""To encode a weight, without and with an importance matrix."""
READ_NANOSECONDS = 4
"""To read, hash and write a weight."""
SOLVE_NANOSECONDS = 500
"""Of a method that works matrix by matrix, for a weight: an eigenproblem of a matrix of some thousand columns."""
GFLOPS_LLAMA, GFLOPS_TORCH = 60.0, 40.0
"""Of a core reading text with llama.cpp (16-bit weights), and with PyTorch in float32; two operations a weight."""
READ_BYTES, DECODE_BYTES = 1e9, 1e10
"""A second: of a file while it is loaded, and while all cores write tokens with it."""
MEASURED_GFLOPS, MEASUREMENTS = 6e4, 2048 * 400
"""Of losses that a pass measures: at most, and operations a weight: 400 times half of the layers over 2048 tokens."""
START_SECONDS = 0.5
"""Of a child process with llama.cpp, its load and its first tokens."""
TORCH_SECONDS = 4.0
"""Of a child process with PyTorch and transformers."""
SMALL_SECONDS = 0.2
"""Of a file, however small: header, hash, waiting for the disk."""


def predicted_steps(recipe: Recipe, result: ExportResult, threads: int | None) -> tuple[StepRun, ...]:
    """The steps of a run with predicted seconds; what is kept in the cache will take less."""
    cores = threads or available_threads()
    weights = result.num_weights
    tokens = recipe.calibration.max_tokens
    found = [_step("pass", method, _pass_seconds(method, weights, tokens, cores)) for method in result.passes]
    if any(export.imatrix == "auto" for export in recipe.exports):
        work = 2e-9 * weights * recipe.calibration.max_tokens / GFLOPS_LLAMA
        found.append(_step("imatrix", f"{recipe.calibration.max_tokens} tokens", work / cores + 2 * START_SECONDS))
    start = 0
    for export in recipe.exports:
        files = result.files[start : start + len(export.type)]
        start += len(export.type)
        matrix = export.imatrix is not None
        spent = sum(
            count * NANOSECONDS.get(kind, (100, 100))[matrix] for file in files for kind, count in file.weights.items()
        )
        seconds = (spent + READ_NANOSECONDS * weights * len(files)) * 1e-9 / cores + SMALL_SECONDS * (1 + len(files))
        found.append(_step("write", ", ".join(file.type for file in files), seconds))
    nbytes = sum(file.nbytes for file in result.files)
    number = f"{len(result.files)} file{'s' * (len(result.files) > 1)}"
    found.append(_step("load", number, START_SECONDS * (len(result.files) + 1) + nbytes / READ_BYTES))
    if recipe.certificate.enabled:
        # half of each window is context; the origin runs once, every file beside it
        origin, begin = (GFLOPS_TORCH, TORCH_SECONDS) if torch_is_installed() else (GFLOPS_LLAMA, START_SECONDS)
        work = 2e-9 * weights * 2 * MAX_POSITIONS * (1 / origin + len(result.files) / GFLOPS_LLAMA)
        found.append(_step("certificate", ", ".join(file.name for file in result.files), work / cores + begin))
    if recipe.bench is not None:
        seconds = sum(_bench_seconds(recipe.bench, weights, file.nbytes, cores) for file in result.files)
        found.append(_step("bench", number, seconds))
    return tuple(found)


def _pass_seconds(method: str, weights: int, tokens: int, cores: int) -> float:
    solved = SOLVE_NANOSECONDS * weights * 1e-9 / cores if kind_of(method) == "tensor" else 0
    looked_at = 0.0
    if "calibration" in load_method(method).uses:  # statistics on all tokens, then losses are measured
        reads = 2e-9 * weights * tokens + min(MEASURED_GFLOPS, MEASUREMENTS * 1e-9 * weights)
        looked_at = reads / GFLOPS_TORCH / cores + 3 * TORCH_SECONDS
    return READ_NANOSECONDS * weights * 1e-9 + solved + looked_at + 2 * SMALL_SECONDS


def _bench_seconds(options: Bench, weights: int, nbytes: int, cores: int) -> float:
    """Of one file: its tests as often as they are at least, half of the patience, starts; scenarios are not in it."""
    prompts = N_PROMPT if options.n_prompt is None else options.n_prompt
    gens = N_GEN if options.n_gen is None else options.n_gen
    depths, settings = options.depth or DEPTH, len(options.threads or (0,))
    reads = sum(prompts) * len(depths) + sum(depths) * (len(prompts) + len(gens))
    once = 2e-9 * weights * reads / GFLOPS_LLAMA / cores + sum(gens) * len(depths) * nbytes / DECODE_BYTES
    starts = 2 * options.repetitions * (START_SECONDS + nbytes / READ_BYTES) if options.starts else 0
    return START_SECONDS + options.repetitions * settings * once + options.patience / 2 + starts


def _step(kind: str, what: str, seconds: float) -> StepRun:
    return StepRun(kind=kind, what=what, key=None, cached=False, seconds=seconds)
