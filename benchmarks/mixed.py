"""A byte budget against llama.cpp's presets of the same size: KL divergence on text that nothing was fitted to.

    python benchmarks/mixed.py [--models reference,twin] [--work DIR] [--minutes 60]

For each model and preset: llama.cpp's own quantizer (llama_model_quantize) writes the preset with the importance
matrix that `efficli quantize` computed; `quantize.mixed` gets the bytes of that file as its budget, once with types
alone, once with error feedback, both with the same matrix. All files run in llama.cpp on the same chunks of the
evaluation slices; ratios of the mean KL divergence have a paired bootstrap over chunks. Calibration and selection are
other files of text.
"""

from __future__ import annotations

import ctypes
import functools
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from runner import Benchmark, Limit, Step, arguments

from efficli.ops.statistics import Estimate

K_BUDGETS = ("Q2_K", "Q3_K_M", "Q4_K_M")
IQ_BUDGETS = ("IQ2_S", "IQ3_XXS", "IQ4_XS")
BUDGETS = ("Q2_K", "IQ2_S", "IQ3_XXS", "Q3_K_M", "IQ4_XS", "Q4_K_M")
VARIANTS: Mapping[str, Mapping[str, Any]] = {"types": {}, "feedback": {"rounding": "error-feedback"}}
ROOTS = {"reference": "efficli/reference/checkpoint", "twin": "efficli/reference/twin"}
POSITIONS, CTX, DRAWS = 16384, 512, 4000
QUESTION = "Types chosen within the bytes of a preset: the KL divergence, as a share of the preset's"
COLUMNS = ("model", "budget of", "bytes", "preset KLD", "types alone", "ratio", "with error feedback", "ratio")


def statistics(model: str, work: Path) -> dict[str, Any]:
    """The importance matrix, and the model as an F32 file."""
    import efficli
    from efficli.checkpoint import open_checkpoint
    from efficli.pipeline.plain_file import write_plain
    from efficli.progress import Silent

    folder = work / model
    options = {"bpw": 6.0, "loss": "mse", "swaps": 0}
    efficli.compress(_root(model), folder / "any", method="quantize.mixed", options=options, force=True)
    path = write_plain(
        open_checkpoint(_root(model)), "F32", folder, pre_tokenizer=None, threads=None, progress=Silent()
    )
    path.rename(folder / "F32.gguf")
    return {"bytes": (folder / "F32.gguf").stat().st_size}


def preset(model: str, kind: str, work: Path) -> dict[str, Any]:
    """What llama.cpp's quantizer makes of the F32 file with the importance matrix."""
    from efficli.export.gguf.imatrix import read_imatrix
    from efficli.ops.ggml_types import FILE_TYPES
    from efficli.ops.llama_log import captured_log, llama_cpp

    library = llama_cpp()
    imatrix = read_imatrix(work / model / "any" / "imatrix.gguf")
    params = library.llama_model_quantize_default_params()
    params.ftype, params.nthread = FILE_TYPES[kind], os.cpu_count() or 1
    entries = (library.llama_model_imatrix_data * (len(imatrix) + 1))()
    for entry, (name, values) in zip(entries, imatrix.items(), strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    params.imatrix = entries
    out = work / model / f"preset-{kind}.gguf"
    with captured_log() as log:
        source = str(work / model / "F32.gguf").encode()
        code = library.llama_model_quantize(source, str(out).encode(), ctypes.byref(params))
    if code:
        raise SystemExit(f"llama_model_quantize: {log[-1].text}")
    return {"bytes": out.stat().st_size}


def mixed(model: str, kind: str, variant: str, work: Path) -> dict[str, Any]:
    """The file of quantize.mixed within the preset's bytes."""
    import efficli

    budget = (work / model / f"preset-{kind}.gguf").stat().st_size
    out = work / model / f"{variant}-{kind}"
    options = {"max_bytes": budget, "imatrix": str(work / model / "any" / "imatrix.gguf"), **VARIANTS[variant]}
    done = efficli.compress(_root(model), out, method="quantize.mixed", options=options, export=True, force=True)
    told = [row for row in done.report if row.startswith("quantize.mixed")]
    return {"bytes": done.files[0].nbytes, "budget": budget, "report": told, "seconds": dict(done.seconds)}


def divergences(model: str, work: Path) -> dict[str, Any]:
    """Mean KL divergence of every chunk, for every file of a model."""
    files = {f"preset-{kind}": work / model / f"preset-{kind}.gguf" for kind in BUDGETS}
    files |= {
        f"{variant}-{kind}": next((work / model / f"{variant}-{kind}").glob("*.gguf"))
        for variant in VARIANTS
        for kind in BUDGETS
    }
    return measured(model, files)


def measured(model: str, files: Mapping[str, Path]) -> dict[str, Any]:
    """Mean KL divergence of files from their model on each chunk of the evaluation slices, and how many positions."""
    from efficli.bench.measure import compare_chunk
    from efficli.bench.origin import TorchModel
    from efficli.bench.texts import choose_chunks, evaluation_texts
    from efficli.ops.llama import LlamaFile

    threads = os.cpu_count() or 1
    judged = {name: LlamaFile(path, ctx=CTX, threads=threads) for name, path in files.items()}
    base = TorchModel(_root(model), threads=threads)
    first = next(iter(judged.values()))
    ids = [first.tokenize(text.content) for text in evaluation_texts(None)]
    found: dict[str, list[float]] = {name: [] for name in files}
    positions = 0
    for chunk in choose_chunks([len(one) for one in ids], CTX, POSITIONS, 0):
        tokens = list(ids[chunk.text][chunk.start : chunk.stop])
        if first.add_bos and first.bos is not None:
            tokens[0] = first.bos
        compared = compare_chunk(base, list(judged.values()), tokens, chunk.first)
        positions += len(compared[0])
        for name, one in zip(judged, compared, strict=True):
            found[name].append(float(one.kld.mean()))
    for file in judged.values():
        file.close()
    return {"positions": positions, "kld": {name: [round(v, 8) for v in values] for name, values in found.items()}}


def ratios(runs: Mapping[str, Any], model: str, kinds: Sequence[str], variant: str) -> Estimate:
    """Geometric mean over budgets of mean KLD / the preset's, with the interval of a paired bootstrap over chunks."""
    kld = runs[f"measure {model}"]["kld"]
    return paired([kld[f"{variant}-{kind}"] for kind in kinds], [kld[f"preset-{kind}"] for kind in kinds])


def paired(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> Estimate:
    """Geometric mean of mean(first) / mean(second), each of the same chunks, with its 95 % interval over chunks."""
    ours, theirs = np.array(first), np.array(second)
    random, count = np.random.default_rng(0), ours.shape[1]
    drawn = random.integers(count, size=(DRAWS, count))
    logs = np.log(ours[:, drawn].mean(-1) / theirs[:, drawn].mean(-1)).mean(0)
    value = math.exp(np.log(ours.mean(1) / theirs.mean(1)).mean())
    low, high = np.exp(np.quantile(logs, [0.025, 0.975]))
    return _estimate(value, float(low), float(high), count, float(np.exp(logs).mean()), float(np.exp(logs).std()))


def _estimate(value: float, low: float, high: float, n: int, mean: float, stdev: float) -> Estimate:
    return Estimate(n=n, median=value, low=low, high=high, confidence=0.95, mean=mean, stdev=stdev)


def limits(runs: Mapping[str, Any], models: Sequence[str]) -> list[Limit]:
    """What the method promises."""
    found = []
    for model in models:
        every = ratios(runs, model, BUDGETS, "types")
        found.append(Limit(name=f"{model}: types alone, all budgets", found=every, most=0.9))
        for kind in BUDGETS:
            one = ratios(runs, model, (kind,), "types")
            lowest = _estimate(one.low, one.low, one.high, one.n, one.mean, one.stdev)
            found.append(Limit(name=f"{model}: types alone, {kind}, low end", found=lowest, most=1.0))
        for name, kinds, most in (("K", K_BUDGETS, 0.7), ("IQ", IQ_BUDGETS, 0.85)):
            told = ratios(runs, model, kinds, "feedback")
            found.append(Limit(name=f"{model}: with error feedback, {name} budgets", found=told, most=most))
    return found


def rows(result: dict[str, Any]) -> list[list[str]]:
    """One row for each model and budget."""
    runs, told = result["runs"], []
    for model in [name.removeprefix("measure ") for name in runs if name.startswith("measure ")]:
        kld = {name: float(np.mean(values)) for name, values in runs[f"measure {model}"]["kld"].items()}
        for kind in BUDGETS:
            cells = [model, kind, str(runs[f"preset {model} {kind}"]["bytes"]), f"{kld[f'preset-{kind}']:.5f}"]
            for variant in VARIANTS:
                one = ratios(runs, model, (kind,), variant)
                cells += [f"{kld[f'{variant}-{kind}']:.5f}", f"{one.median:.2f} ({one.low:.2f}-{one.high:.2f})"]
            told.append(cells)
    return told


def about(result: dict[str, Any]) -> str:
    """What the figures are of."""
    runs = result["runs"]
    counts = {name: run["positions"] for name, run in runs.items() if name.startswith("measure ")}
    used = [run["bytes"] / run["budget"] for name, run in runs.items() if name.startswith("mixed ")]
    return (
        f"Positions: {json.dumps(counts)}; contexts of {CTX}, half of which is scored. Intervals: 95 % of {DRAWS} "
        f"paired bootstrap draws over chunks. Files use {min(used):.2%} to {max(used):.2%} of their budgets."
    )


def _root(model: str) -> str:
    return ROOTS.get(model, model)


def main() -> int:
    """Write the files, measure them, keep the result."""
    parser = arguments(__doc__, "mixed")
    parser.add_argument("--models", default="reference,twin")
    options = parser.parse_args()
    os.environ["EFFICLI_CACHE_DIR"] = str(options.work.resolve() / "cache")
    bench = Benchmark("mixed", QUESTION, options, "efficli", "llama-cpp-python", "numpy", "torch", "transformers")
    work, models = bench.folder, options.models.split(",")
    steps = []
    for model in models:
        steps.append(Step(name=f"statistics {model}", run=functools.partial(statistics, model, work)))
        steps += [Step(name=f"preset {model} {k}", run=functools.partial(preset, model, k, work)) for k in BUDGETS]
        steps += [
            Step(name=f"mixed {model} {kind} {variant}", run=functools.partial(mixed, model, kind, variant, work))
            for variant in VARIANTS
            for kind in BUDGETS
        ]
        steps.append(Step(name=f"measure {model}", run=functools.partial(divergences, model, work)))
    bench.run(steps)
    return bench.finish(limits(bench.runs, models))


if __name__ == "__main__":
    sys.exit(main())
