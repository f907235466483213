"""The README's table: what each type costs the reference checkpoint.

    python benchmarks/certificates.py [--model reference] [--types Q8_0,Q6_K,...]

Exports all types in one read, each with its certificate; the table goes to stdout, everything to results/.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import machine

import efficli
from efficli.bench.quality import Certificate
from efficli.console import Terminal

TYPES = "Q8_0,Q6_K,Q5_K_M,Q4_K_M,Q4_0,IQ4_XS,Q3_K_M,Q2_K"


def figure(certificate: Certificate, name: str, form: str, scale: float = 1.0) -> str:
    """`value ± standard error`."""
    figures = certificate.total.figures
    return f"{(figures[name] or 0) * scale:{form}} ± {(figures[f'{name}_stderr'] or 0) * scale:{form}}"


def main() -> None:
    """Measure, print the table, keep the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--types", default=TYPES)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = efficli.export(
            options.model, Path(folder) / "out", types=options.types.split(","), progress=Terminal()
        )
    print("| type | size | bits/weight | mean KL divergence | top-1 agreement | perplexity |")
    print("|---|--:|--:|--:|--:|--:|")
    for file in result.files:
        told = file.certificate
        print(
            f"| {file.type} | {file.nbytes / 2**20:.2f} MiB | {file.bits_per_weight:.2f} "
            f"| {figure(told, 'kld_mean', '.6f')} | {figure(told, 'top1_agreement', '.2f', 100)} % "
            f"| {figure(told, 'ppl', '.2f')} |"
        )
    base = result.files[0].certificate
    print(
        f"\nn = {base.total.n} positions; perplexity of the origin {figure(base, 'ppl_base', '.2f')}, "
        f"run by {base.base_runtime}."
    )
    kept = {
        "command": f"certificates.py --model {options.model} --types {options.types}",
        "machine": machine.describe(),
    }
    path = Path(__file__).parent / "results" / "certificates.json"
    path.write_text(json.dumps(kept | {"result": result.to_json()}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
