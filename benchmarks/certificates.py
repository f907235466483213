"""The README's table: what each type costs the reference checkpoint.

    python benchmarks/certificates.py [--model reference] [--types Q8_0,Q6_K,...]

Exports all types in one read, each with its certificate; the table goes to stdout, everything to results/.
"""

from __future__ import annotations

import functools
import sys
import tempfile
from pathlib import Path
from typing import Any

from runner import Benchmark, Step, arguments

TYPES = "Q8_0,Q6_K,Q5_K_M,Q4_K_M,Q4_0,IQ4_XS,Q3_K_M,Q2_K"
QUESTION = "What each type costs the reference checkpoint: size, KL divergence, top-1 agreement, perplexity"
COLUMNS = ("type", "size", "bits/weight", "mean KL divergence", "top-1 agreement", "perplexity")


def export(model: str, types: list[str]) -> dict[str, Any]:
    """Export every type with its certificate, as `efficli export --json` tells it."""
    import efficli
    from efficli.console import Terminal

    with tempfile.TemporaryDirectory() as folder:
        done = efficli.export(model, Path(folder) / "out", types=types, progress=Terminal())
    result: dict[str, Any] = done.to_json()
    result["artifact"] = "out"
    for file in result["files"]:
        file["path"] = f"out/{Path(file['path']).name}"
    return result


def rows(result: dict[str, Any]) -> list[list[str]]:
    """One row for each type."""
    told = []
    for file in result["runs"]["export"]["files"]:
        total = whole(file)
        told.append(
            [
                file["type"],
                f"{file['bytes'] / 2**20:.2f} MiB",
                f"{file['bits_per_weight']:.2f}",
                figure(total, "kld_mean", ".6f"),
                figure(total, "top1_agreement", ".2f", 100) + " %",
                figure(total, "ppl", ".2f"),
            ]
        )
    return told


def about(result: dict[str, Any]) -> str:
    """What the figures are of."""
    file = result["runs"]["export"]["files"][0]
    total = whole(file)
    return (
        f"n = {total['n']} positions; perplexity of the origin {figure(total, 'ppl_base', '.2f')}, "
        f"run by {file['certificate']['base_runtime']}. ± is the standard error."
    )


def whole(file: dict[str, Any]) -> dict[str, Any]:
    """The row of a certificate that is of all texts."""
    row: dict[str, Any] = file["certificate"]["rows"][-1]
    return row


def figure(row: dict[str, Any], name: str, form: str, scale: float = 1.0) -> str:
    """`value ± standard error`."""
    return f"{(row[name] or 0) * scale:{form}} ± {(row[f'{name}_stderr'] or 0) * scale:{form}}"


def main() -> int:
    """Measure, print the table, keep the result."""
    parser = arguments(__doc__, "certificates")
    parser.add_argument("--model", default="reference")
    parser.add_argument("--types", default=TYPES)
    options = parser.parse_args()
    bench = Benchmark(
        "certificates", QUESTION, options, "efficli", "llama-cpp-python", "numpy", "torch", "transformers"
    )
    bench.run([Step(name="export", run=functools.partial(export, options.model, options.types.split(",")))])
    result = {"runs": bench.runs}
    print(f"| {' | '.join(COLUMNS)} |\n|---{'|--:' * (len(COLUMNS) - 1)}|")
    for row in rows(result):
        print(f"| {' | '.join(row)} |")
    print(f"\n{about(result)}")
    return bench.finish([])


if __name__ == "__main__":
    sys.exit(main())
