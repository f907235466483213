"""`efficli bench` against llama-bench on the same libraries: prefill and decode, in pairs.

    python benchmarks/llama_bench.py [--rounds 10] [--threads 2,1] [--models reference,random] [--build DIR]

Exports the reference (Q8_0, Q4_K_M) and a Llama of 100 million random weights (Q8_0, Q4_0), builds llama-bench from the
source distribution of the installed llama-cpp-python (build_llama_bench.sh: it runs on the installed libraries), and
runs in turn, for each file and number of threads

* llama-bench -p 512 -n 128 -r 5
* efficli bench -p 512 -n 128 -r 5, as many repeats and no starts

Compared are the medians of the five repeats, pair by pair: what disturbs this machine lasts longer than a pair. The two
draw other random tokens and count the same: from the call until the last token is computed.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import random_llama
from runner import HERE, Benchmark, Limit, Step, alternating, arguments, ratio, rounded

from efficli.ops.statistics import estimate

QUESTION = "Does `efficli bench` measure what llama-bench measures, on the same libraries?"
WITHIN = 0.05
HANGS_S = 600
"""A run takes seconds: one that takes so long does not end."""
N_PROMPT, N_GEN, REPEATS = 512, 128, 5
FILES = {
    "reference": {"Q8_0": "reference/Q8_0", "Q4_K_M": "reference/Q4_K_M"},
    "random": {"Q8_0": "random 100 M/Q8_0", "Q4_0": "random 100 M/Q4_0"},
}
"""Per model: its types, and what the file is called in the result."""
TESTS = {f"pp{N_PROMPT}": "prefill", f"tg{N_GEN}": "decode"}
COLUMNS = ("file", "threads", "test", "llama-bench tokens/s", "efficli tokens/s", "efficli / llama-bench", "within 5 %")


class Peers:
    """The two programs and the files that both read."""

    def __init__(self, bench: Benchmark, models: list[str], build: Path | None) -> None:
        self.bench, self.folder = bench, bench.folder
        self.environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
        # both see the machine alike: neither the number of threads nor their way of waiting is the user's
        for name in [name for name in self.environment if name.startswith(("OMP_", "GOMP_", "GGML_"))]:
            del self.environment[name]
        self.llama_bench = self._built(build or bench.folder / "llama-bench")
        self.files = {name: path for model in models for name, path in self._exported(model).items()}

    def _built(self, folder: Path) -> str:
        command = ["bash", str(HERE / "build_llama_bench.sh"), str(folder), sys.executable]
        with (self.folder / "log.txt").open("a") as log:
            return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=log).stdout.strip()

    def _exported(self, model: str) -> dict[str, Path]:
        """Files of a model by their names in the result, exported unless they are there."""
        out, types = self.folder / f"{model}-files", FILES[model]
        if not (out / "efficli.json").exists():
            source = model
            if model == "random":
                text = HERE.parent / "efficli/reference/text/calibration-prose.txt"
                random_llama.write_apart(self.folder / "random-100M", text, random_llama.HUNDRED_MILLION)
                source = str(self.folder / "random-100M")
            command = [sys.executable, "-m", "efficli", "export", source, "-o", str(out), "--type", ",".join(types)]
            subprocess.run([*command, "--no-certificate", "--quiet"], check=True, stdout=subprocess.DEVNULL)
        return {name: next(out.glob(f"*-{kind}.gguf")) for kind, name in types.items()}

    def steps(self, rounds: int, threads: list[int], wait: float) -> Iterator[Step]:
        """Whole rounds of all files, so that a benchmark that is cut short has pairs of each."""
        for number, sides in rounds_of_sides(rounds):
            for name, path in self.files.items():
                for count in threads:
                    for side in sides:
                        run = functools.partial(self.run, side, path, count)
                        quietly = functools.partial(self.bench.quietly, run, wait)
                        yield Step(name=f"{number}/{name}/t{count}/{side}", run=quietly)

    def run(self, side: str, path: Path, threads: int) -> dict[str, Any]:
        """One process: nanoseconds of each repeat of both tests."""
        work = ["-p", str(N_PROMPT), "-n", str(N_GEN), "-t", str(threads), "-r", str(REPEATS)]
        if side == "llama-bench":
            command = [self.llama_bench, "-m", str(path), "-o", "jsonl", *work]
        else:
            command = [sys.executable, "-m", "efficli", "bench", str(path), "--jsonl", *work]
            command += ["--max-repetitions", str(REPEATS), "--no-starts", "--quiet"]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, env=self.environment, check=False, timeout=HANGS_S
            )
        except subprocess.TimeoutExpired:
            raise SystemExit(f"{' '.join(command)}: did not end in {HANGS_S} s") from None
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr}")
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        return {f"pp{row['n_prompt']}" if row["n_prompt"] else f"tg{row['n_gen']}": row["samples_ns"] for row in rows}


def rounds_of_sides(rounds: int) -> Iterator[tuple[int, list[str]]]:
    """Each round with its two sides in their order."""
    pairs = list(alternating(rounds, "llama-bench", "efficli"))
    for first, second in zip(pairs[::2], pairs[1::2], strict=True):
        yield first[0], [first[1], second[1]]


def compare(runs: dict[str, Any], rounds: int, threads: list[int]) -> tuple[list[Limit], list[dict[str, Any]]]:
    """The limits, and one entry for each file, number of threads and test."""
    limits, entries = [], []
    names = dict.fromkeys(key.split("/", 1)[1].rsplit("/", 2)[0] for key in runs)
    for name in names:
        for count in threads:
            for test, what in TESTS.items():
                speed = {
                    side: [rate(runs[f"{n}/{name}/t{count}/{side}"][test], test) for n in range(rounds)]
                    for side in ("llama-bench", "efficli")
                }
                found = ratio(list(zip(speed["efficli"], speed["llama-bench"], strict=True)))
                limit = Limit(
                    name=f"{name}, {count} threads, {what} ({test})", found=found, least=1 - WITHIN, most=1 + WITHIN
                )
                limits.append(limit)
                entries.append(
                    {
                        "file": name,
                        "threads": count,
                        "test": test,
                        "ratio": rounded(found),
                        "holds": limit.holds,
                        **{side: rounded(estimate(values)) for side, values in speed.items()},
                    }
                )
    return limits, entries


def rate(samples_ns: list[int], test: str) -> float:
    """Tokens per second of the median repeat."""
    return int(test[2:]) * 1e9 / statistics.median(samples_ns)


def rows(result: dict[str, Any]) -> list[list[str]]:
    """One row for each file, number of threads and test."""
    return [
        [
            entry["file"],
            str(entry["threads"]),
            f"{TESTS[entry['test']]} ({entry['test']})",
            f"{entry['llama-bench']['median']:.0f}",
            f"{entry['efficli']['median']:.0f}",
            f"{entry['ratio']['median']:.3f} ({entry['ratio']['low']:.3f} - {entry['ratio']['high']:.3f})",
            "yes" if entry["holds"] else "NO",
        ]
        for entry in result["comparisons"]
    ]


def about(result: dict[str, Any]) -> str:
    """What the figures are of."""
    n = result["comparisons"][0]["ratio"]["n"]
    others = sorted(run["others_cores"] for run in result["runs"].values())
    return (
        f"Medians of n = {n} alternating pairs, {REPEATS} repeats in each run; in brackets the interval of the median "
        f"ratio ({result['comparisons'][0]['ratio']['confidence']:.0%}). Meanwhile other processes took "
        f"{statistics.median(others):.2f} cores (median of the runs; most: {others[-1]:.2f})."
    )


def main() -> int:
    """Measure, compare, write the result."""
    parser = arguments(__doc__, "llama_bench")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", default="2,1")
    parser.add_argument("--models", default=",".join(FILES))
    parser.add_argument("--build", type=Path, help="folder of build_llama_bench.sh (WORK/llama-bench)")
    parser.add_argument("--wait", type=float, default=20.0, help="seconds to wait for a quiet machine, each run")
    options = parser.parse_args()
    threads = [int(word) for word in options.threads.split(",")]
    build, options.build = options.build, None
    bench = Benchmark("llama_bench", QUESTION, options, "efficli", "llama-cpp-python", "numpy")
    peers = Peers(bench, options.models.split(","), build)
    bench.run(list(peers.steps(options.rounds, threads, options.wait)))
    limits, comparisons = compare(bench.runs, options.rounds, threads)
    return bench.finish(limits, comparisons=comparisons)


if __name__ == "__main__":
    sys.exit(main())
