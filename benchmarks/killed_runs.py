"""`efficli run` killed with SIGKILL anywhere: does the next run finish the artifact, with the same bytes and no strays?

    python benchmarks/killed_runs.py [--moments 100] [--recipe FILE]

A recipe of four steps that are kept (a pass, an importance matrix, a file, its certificate), a load and bench, on the
reference. The moments are spread over all its steps, each in a folder with a cache of its own.
"""

from __future__ import annotations

import functools
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import killing
import yaml
from runner import Benchmark, Limit, Step, arguments

from efficli.data import committed
from efficli.ops.statistics import Estimate

QUESTION = "Does a run that was killed anywhere end with the same bytes when it is run again, and leave nothing behind?"
RECIPE = {
    "version": 1,
    "model": "reference",
    "passes": [{"method": "skip-layers.last", "remove": 1}],
    "calibration": {"max_tokens": 2048},
    "exports": [{"type": "Q4_K_M", "imatrix": "auto"}],
    "bench": {"n_prompt": 32, "n_gen": 8, "patience": 0.0, "starts": False, "threads": 1},
    "gates": {"max_kld": 1.0, "max_bytes": "10MiB"},
}
CHARACTERS = 20_000
"""Of the text that the certificate is measured on."""
COLUMNS = ("results kept when killed", "runs", "rerun done", "same bytes", "stray files")
PACKAGES = ("efficli", "llama-cpp-python", "numpy", "torch", "transformers")


def undisturbed(recipe: Path, folder: Path) -> dict[str, Any]:
    """A run that nobody disturbs."""
    shutil.rmtree(folder, ignore_errors=True)
    found = killing.undisturbed(recipe, folder)
    shutil.rmtree(folder)
    return asdict(found) | {"leaves": sorted(found.leaves)}


def killed(recipe: Path, folder: Path, bench: Benchmark, number: int, count: int) -> dict[str, Any]:
    """One run that is killed, and the one after it."""
    whole = bench.runs["undisturbed"]
    moment = moments(whole["lines"], count, whole["seconds"])[number]
    shutil.rmtree(folder, ignore_errors=True)
    found = killing.kill_and_rerun(recipe, folder, moment)
    shutil.rmtree(folder)
    told = asdict(found) | {"same": found.sums == whole["sums"]}
    told["strays"] = sorted(set(found.strays) - set(whole["leaves"]))
    return told


def moments(lines: int, count: int, seconds: float) -> list[killing.Moment]:
    """Half of them after what the run says, from at once to later; half of them evenly over its time."""
    half = count // 2
    evenly = [killing.Moment(0, 0.9 * seconds * (number + 0.5) / half) for number in range(half)]
    return [*killing.moments(lines, count - half, seconds), *evenly]


def killed_runs(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs that were killed, not those that had ended before."""
    return [run for name, run in result["runs"].items() if name != "undisturbed" and run["was_killed"]]


def rows(result: dict[str, Any]) -> list[list[str]]:
    """One row for each number of results that were kept, and one for all."""
    found = killed_runs(result)
    told = []
    for kept in [*sorted({run["kept"] for run in found}), None]:
        these = [run for run in found if kept in (None, run["kept"])]
        told.append(
            [
                "all" if kept is None else str(kept),
                str(len(these)),
                str(sum(run["rerun"] == 0 for run in these)),
                str(sum(run["same"] for run in these)),
                str(sum(len(run["strays"]) for run in these)),
            ]
        )
    return told


def about(result: dict[str, Any]) -> str:
    """What was run."""
    whole, runs = result["runs"]["undisturbed"], len(result["runs"]) - 1
    return (
        f"n = {runs} runs, of which {len(killed_runs(result))} were killed before they had ended; undisturbed the "
        f"recipe takes {whole['seconds']:.0f} s. Kept are results of the pass, the matrix, the file, its certificate."
    )


def share(name: str, held: Sequence[bool]) -> Limit:
    """A share that must be all."""
    value = sum(held) / len(held) if held else 0.0
    found = Estimate(n=len(held), median=value, low=value, high=value, confidence=1.0, mean=value, stdev=0.0)
    return Limit(name=name, found=found, least=1.0)


def write_recipe(folder: Path) -> Path:
    """The recipe of this benchmark, with the text that it names beside it."""
    text = folder / "text.txt"
    text.write_text(committed("evaluation-prose")[:CHARACTERS], encoding="utf-8")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE | {"certificate": {"text": str(text)}}), encoding="utf-8")
    return path


def main() -> int:
    """Kill, run again, compare."""
    parser = arguments(__doc__, "killed_runs")
    parser.add_argument("--recipe", type=str, help="another one, of the reference")
    parser.add_argument("--moments", type=int, default=100, help="how often to kill (%(default)s)")
    options = parser.parse_args()
    bench = Benchmark("killed_runs", QUESTION, options, *PACKAGES)
    recipe = Path(options.recipe).resolve() if options.recipe else write_recipe(bench.folder)
    steps = [Step(name="undisturbed", run=functools.partial(undisturbed, recipe, bench.folder / "undisturbed"))]
    for number in range(options.moments):
        run = functools.partial(killed, recipe, bench.folder / str(number), bench, number, options.moments)
        steps.append(Step(name=str(number), run=run))
    bench.run(steps)
    runs = [run for name, run in bench.runs.items() if name != "undisturbed"]
    found = killed_runs({"runs": bench.runs})
    limits = [
        share("runs after a kill that are done", [run["rerun"] == 0 for run in found]),
        share("artifacts with the hash of the undisturbed one", [run["same"] for run in found]),
        share("folders without stray files", [not run["strays"] for run in found]),
    ]
    return bench.finish(limits, n=len(runs), killed=len(found))


if __name__ == "__main__":
    sys.exit(main())
