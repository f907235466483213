"""Conversion to GGUF: CPU time and peak memory of efficli against llama.cpp's converter and quantizer, paired.

    python benchmarks/convert.py [--work DIR] [--types F16,Q4_0,Q4_K_M] [--rounds 2] [--keep]

Makes a checkpoint of 1.1 billion random bfloat16 weights (TinyLlama's shape, 2.2 GB) and one of half its layers,
fetches llama.cpp's convert_hf_to_gguf.py with `pip download` (the source distribution of the installed
llama-cpp-python), and runs in pairs, for each type

* reference: convert_hf_to_gguf.py --outtype f16, then llama_model_quantize on its file (for F16 only the first)
* proper: efficli's conversion (reads, chooses types, checks for NaN, encodes, writes), nothing else of `export`
* export: `efficli export --no-certificate`, all of it

Needs 7 GB of disk. CPU seconds are of the whole process tree, and hardly depend on what else runs. See runner.py for
what all benchmarks share.
"""

from __future__ import annotations

import functools
import statistics
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import machine
import random_llama
from runner import Benchmark, Limit, Step, alternating, arguments, ratio, rounded

HERE = Path(__file__).resolve().parent
LIMITS = {"proper": {"F16": 0.5, "Q4_0": 0.45, "Q4_K_M": 0.85}, "export": {"F16": 0.8, "Q4_0": 0.6, "Q4_K_M": 0.95}}
"""Largest ratio of CPU seconds to the reference's."""
PEAK_LIMIT = 0.3
QUESTION = "CPU time and peak memory of `export` against llama.cpp's converter followed by its quantizer"
COLUMNS = ("part", "type", "CPU time", "limit", "peak memory")
PARTS = {
    "proper": "conversion: read, choose types, scan for NaN, encode, write",
    "export": "all of `export` but the certificate: with hashes, load, tokens",
}

QUANTIZE = """
import ctypes, sys, llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.ftype = getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + sys.argv[3])
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(params)))
"""

PROPER = """
import sys
from pathlib import Path
from efficli.checkpoint import open_checkpoint
from efficli.export.gguf.layout import string
from efficli.export.gguf.model import layout
from efficli.export.gguf.types import TypeRequest, choose_types
from efficli.export.gguf.vocab import read_vocab
from efficli.export.gguf.writer import write_files
from efficli.families import read_shape
ckpt = open_checkpoint(sys.argv[1])
shape = read_shape(ckpt.config)
metadata, tensors, _ = layout(shape, ckpt)
metadata["general.architecture"] = string(shape.facts.gguf_arch)
metadata |= read_vocab(ckpt, shape.vocab_size, shape.facts.gguf_arch).metadata
choice = choose_types(metadata, tensors, TypeRequest(type=sys.argv[3]))
write_files(ckpt, tensors, [(Path(sys.argv[2]), metadata, choice)], hashes=False)
"""

EXPORT = """
import pathlib, resource, sys
from efficli.cli import main
try:
    sys.exit(main())
finally:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    pathlib.Path(RSS).write_text(str(peak))
"""
"""`efficli` on the command line; the peak of its own process is told, as that of the child which maps the written
file to load it is the file's size."""


class Converting:
    """The steps of the benchmark: what each runs, and the files that they need, made when the first one asks."""

    def __init__(self, bench: Benchmark, layers: int) -> None:
        self.bench, self.folder = bench, bench.folder
        self.layers = {"full": layers, "half": layers // 2}
        self.half_precision = bench.folder / "reference-f16.gguf"
        self._environment = {"PYTHONPATH": str(HERE.parent)}

    def steps(self, types: list[str], rounds: int, parts: list[str]) -> Iterator[Step]:
        """Whole rounds, every type in each; who comes first changes from round to round."""
        for number, side in alternating(rounds, "reference", "efficli"):
            if side == "reference" and "reference" in parts:
                yield Step(name=f"{number}/reference/F16", run=self.convert)
                for kind in types:
                    if kind != "F16":
                        yield Step(name=f"{number}/reference/{kind}", run=functools.partial(self.quantize, kind))
            elif side == "efficli":
                for kind in types:
                    for part in ("proper", "export"):
                        if part in parts:
                            run = functools.partial(self.efficli, part, kind, "full")
                            yield Step(name=f"{number}/{part}/{kind}", run=run)
        for kind in types:
            if "proper" in parts:
                run = functools.partial(self.efficli, "proper", kind, "half")
                yield Step(name=f"half/proper/{kind}", run=run)

    def model(self, size: str) -> Path:
        """The checkpoint."""
        text = HERE.parent / "efficli/reference/text/calibration-prose.txt"
        folder = self.folder / size
        random_llama.write_apart(folder, text, {"layers": self.layers[size], **random_llama.TINYLLAMA})
        return folder

    def convert(self) -> dict[str, float]:
        """llama.cpp's converter to F16; its file stays for the quantizer."""
        converter, model = fetch_converter(self.folder), self.model("full")
        partial = self.half_precision.with_suffix(".partial")
        command = [sys.executable, str(converter), str(model), "--outtype", "f16", "--outfile", str(partial)]
        found = self.bench.measure(command, {"PYTHONPATH": str(converter.parent / "gguf-py")}, memory=True)
        partial.replace(self.half_precision)
        return found

    def quantize(self, kind: str) -> dict[str, float]:
        """llama.cpp's quantizer."""
        if not self.half_precision.exists():
            self.convert()
        out = self.folder / "reference.gguf"
        program = [sys.executable, "-c", QUANTIZE, str(self.half_precision), str(out), kind]
        found = self.bench.measure(program, memory=True)
        out.unlink()
        return found

    def efficli(self, part: str, kind: str, size: str) -> dict[str, float]:
        """The conversion alone, or the whole command."""
        out, model = self.folder / "efficli-out", str(self.model(size))
        if part == "proper":
            command = [sys.executable, "-c", PROPER, model, str(out), kind]
            found = self.bench.measure(command, self._environment, memory=True)
            out.unlink()
            return found
        told = self.folder / "rss.txt"
        program = EXPORT.replace("RSS", repr(str(told)))
        command = [sys.executable, "-c", program, "export", model, "-o", str(out), "--type", kind]
        found = self.bench.measure([*command, "--no-certificate", "--force"], self._environment, memory=True)
        found["converting_process_peak_rss_bytes"] = int(told.read_text())
        random_llama.remove(out)
        return found

    def remove(self) -> None:
        """Delete what takes gigabytes."""
        self.half_precision.unlink(missing_ok=True)
        for size in self.layers:
            random_llama.remove(self.folder / size)


def main() -> int:
    """Measure, compare, write the result."""
    parser = arguments(__doc__, "convert")
    parser.add_argument("--types", default="F16,Q4_0,Q4_K_M")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--keep", action="store_true", help="do not delete the checkpoints at the end")
    parser.add_argument("--only", choices=["reference", "proper", "export"], action="append", help="parts to run")
    options = parser.parse_args()
    bench = Benchmark("convert", QUESTION, options, "llama-cpp-python", "numpy", "gguf", "transformers", "torch")
    types = options.types.split(",")
    converting = Converting(bench, options.layers)
    bench.run(list(converting.steps(types, options.rounds, options.only or ["reference", "proper", "export"])))
    limits, summary = compare(bench.runs, types, options.rounds)
    sizes = {
        size: 2 * random_llama.count(layers=layers, **random_llama.TINYLLAMA)
        for size, layers in converting.layers.items()
    }
    code = bench.finish(limits, layers=options.layers, checkpoint_bytes=sizes, summary=summary)
    if not options.keep:
        converting.remove()
    return code


def fetch_converter(folder: Path) -> Path:
    """convert_hf_to_gguf.py and what it imports, from the source distribution of the installed llama-cpp-python."""
    version = machine.versions("llama-cpp-python")["llama-cpp-python"]
    root = folder / f"llama_cpp_python-{version}" / "vendor" / "llama.cpp"
    if not (root / "convert_hf_to_gguf.py").exists():
        archive = folder / f"llama_cpp_python-{version}.tar.gz"
        if not archive.exists():
            wanted = [f"llama-cpp-python=={version}", "--no-binary", "llama-cpp-python", "--no-deps", "-d", str(folder)]
            subprocess.run([sys.executable, "-m", "pip", "download", *wanted], check=True)
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    return root / "convert_hf_to_gguf.py"


def compare(runs: dict[str, Any], types: list[str], rounds: int) -> tuple[list[Limit], dict[str, Any]]:
    """Ratios to the reference per part and type, and the limits that they are held against."""
    limits, out = [], dict[str, Any]()
    for kind in types:
        for part in PARTS:
            pairs = [found for n in range(rounds) if (found := pair(runs, n, part, kind))]
            if not pairs:
                continue
            cpu = ratio([(mine["cpu_s"], theirs["cpu_s"]) for mine, theirs in pairs])
            rss = ratio([(mine["peak_rss_bytes"], theirs["peak_rss_bytes"]) for mine, theirs in pairs])
            limits.append(Limit(name=f"{part}/{kind}: CPU time", found=cpu, most=LIMITS[part].get(kind)))
            limits.append(Limit(name=f"{part}/{kind}: peak memory", found=rss, most=PEAK_LIMIT))
            out[f"{part}/{kind}"] = {"cpu_ratio": rounded(cpu), "peak_rss_ratio": rounded(rss)}
        full = [runs[name]["peak_rss_bytes"] for n in range(rounds) if (name := f"{n}/proper/{kind}") in runs]
        if full and f"half/proper/{kind}" in runs:
            peak, half = statistics.median(full), runs[f"half/proper/{kind}"]["peak_rss_bytes"]
            out[f"memory/{kind}"] = {"peak_rss_bytes": peak, "of_half_the_model": half, "ratio": round(peak / half, 3)}
    return limits, out


def rows(result: dict[str, Any]) -> list[list[str]]:
    """One row for each part and type."""
    told = []
    for name, found in result["summary"].items():
        part, kind = name.split("/")
        if part in PARTS:
            cells = [interval(found["cpu_ratio"]), f"{LIMITS[part].get(kind, '')}", interval(found["peak_rss_ratio"])]
            told.append([PARTS[part], kind, *cells])
    return told


def interval(found: dict[str, float]) -> str:
    """`median (low - high)`."""
    return f"{found['median']:.2f} ({found['low']:.2f} - {found['high']:.2f})"


def about(result: dict[str, Any]) -> str:
    """What the figures are of."""
    n = max(found["cpu_ratio"]["n"] for name, found in result["summary"].items() if "cpu_ratio" in found)
    halves = [found["ratio"] for name, found in result["summary"].items() if name.startswith("memory/")]
    weights = result["checkpoint_bytes"]["full"] / 1e9
    return (
        f"Ratios to llama.cpp's, median and range of n = {n} pairs, {weights:.1f} GB of weights: CPU seconds of the "
        f"process tree, and peak resident memory of the converting process (limit {PEAK_LIMIT}). Memory of the "
        f"conversion relative to that for half the layers: {min(halves):.3f} - {max(halves):.3f}."
    )


def pair(runs: dict[str, Any], number: int, part: str, kind: str) -> tuple[dict[str, float], dict[str, float]] | None:
    """CPU seconds and peak memory of efficli and of the reference in the same round."""
    names = [f"{number}/reference/{step}" for step in dict.fromkeys(["F16", kind])]
    mine = runs.get(f"{number}/{part}/{kind}")
    if mine is None or any(name not in runs for name in names):
        return None
    theirs = [runs[name] for name in names]
    # of `export` not the child that maps the written file to load it: that peak is the file's size
    peak = mine["peak_rss_bytes" if part == "proper" else "converting_process_peak_rss_bytes"]
    return (
        {"cpu_s": mine["cpu_s"], "peak_rss_bytes": peak},
        {
            "cpu_s": sum(run["cpu_s"] for run in theirs),
            "peak_rss_bytes": max(run["peak_rss_bytes"] for run in theirs),
        },
    )


if __name__ == "__main__":
    sys.exit(main())
