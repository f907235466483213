"""Error feedback against ggml's own rounding: the same type for all tensors, the same bytes, the KL divergence.

    python benchmarks/rounding.py [--models reference,twin] [--work DIR] [--minutes 60]

Both files have the same importance matrix and the same scales; only codes differ. Measured on the evaluation slices, as
`mixed` does.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mixed import ROOTS, measured, paired
from runner import Benchmark, Limit, Step, arguments

TYPES = (
    "Q4_0",
    "Q3_K",
    "Q2_K",
    "IQ4_NL",
    "Q8_0",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ4_XS",
    "IQ3_S",
    "IQ3_XXS",
    "IQ2_S",
    "IQ2_XXS",
)
HELD = ("Q4_0", "Q3_K", "Q2_K")
NARROW = ("Q4_0", "IQ4_NL", "Q5_0")
"""What rows that are no multiple of 256 can have."""
QUESTION = "What error feedback gains at the same type and bytes: the KL divergence, as a share of ggml's rounding"
COLUMNS = ("model", "type", "nearest", "error feedback", "ratio")


def kinds(model: str) -> tuple[str, ...]:
    """The types that a model's rows can have."""
    return NARROW if model == "twin" else TYPES


def write(model: str, kind: str, rounding: str, work: Path) -> dict[str, Any]:
    """A file all of whose matrices have one type."""
    import efficli

    options = {"bpw": 32.0, "types": [kind], "loss": "mse", "swaps": 0, "rounding": rounding}
    out = work / model / f"{kind}-{rounding}"
    done = efficli.compress(
        ROOTS.get(model, model), out, method="quantize.mixed", options=options, export=True, force=True
    )
    return {"bytes": done.files[0].nbytes}


def measure(model: str, work: Path) -> dict[str, Any]:
    """The divergences of all files."""
    names = [f"{kind}-{rounding}" for kind in kinds(model) for rounding in ("nearest", "error-feedback")]
    return measured(model_root(model), {name: next((work / model / name).glob("*.gguf")) for name in names})


def model_root(model: str) -> str:
    """Where a model is."""
    return ROOTS.get(model, model)


def rows(result: dict[str, Any]) -> list[list[str]]:
    """One row for each model and type."""
    told = []
    for name, run in result["runs"].items():
        if name.startswith("measure "):
            model = name.removeprefix("measure ")
            for kind in kinds(model):
                near, fed = run["kld"][f"{kind}-nearest"], run["kld"][f"{kind}-error-feedback"]
                one = paired([fed], [near])
                means = [f"{np.mean(values):.5f}" for values in (near, fed)]
                told.append([model, kind, *means, f"{one.median:.3f} ({one.low:.3f}-{one.high:.3f})"])
    return told


def about(result: dict[str, Any]) -> str:
    """What the figures are of."""
    counts = {name.removeprefix("measure "): run["positions"] for name, run in result["runs"].items() if "kld" in run}
    told = ", ".join(f"{count} ({model})" for model, count in counts.items())
    return (
        f"Positions: {told}. Intervals: 95 % of a paired bootstrap over chunks. Embeddings and head have the type too."
    )


def limits(runs: Mapping[str, Any]) -> list[Limit]:
    """What the method promises."""
    run = runs["measure reference"]["kld"]
    found = paired([run[f"{k}-error-feedback"] for k in HELD], [run[f"{k}-nearest"] for k in HELD])
    return [Limit(name=f"error feedback / nearest, {', '.join(HELD)} on the reference", found=found, most=0.85)]


def main() -> int:
    """Write the files, measure them, keep the result."""
    parser = arguments(__doc__, "rounding")
    parser.add_argument("--models", default="reference,twin")
    options = parser.parse_args()
    os.environ["EFFICLI_CACHE_DIR"] = str(options.work.resolve() / "cache")
    bench = Benchmark("rounding", QUESTION, options, "efficli", "llama-cpp-python", "numpy", "torch", "transformers")
    work, steps = bench.folder, []
    for model in options.models.split(","):
        steps += [
            Step(name=f"{model} {kind} {way}", run=functools.partial(write, model, kind, way, work))
            for kind in kinds(model)
            for way in ("nearest", "error-feedback")
        ]
        steps.append(Step(name=f"measure {model}", run=functools.partial(measure, model, work)))
    bench.run(steps)
    return bench.finish(limits(bench.runs))


if __name__ == "__main__":
    sys.exit(main())
