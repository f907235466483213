"""Conversion to GGUF: CPU time and peak memory of efficli against llama.cpp's converter and quantizer, paired.

    python benchmarks/convert.py --work DIR [--types F16,Q4_0,Q4_K_M] [--rounds 2] [--keep]

Makes a checkpoint of 1.1 billion random bfloat16 weights (TinyLlama's shape, 2.2 GB) and one of half its layers,
fetches llama.cpp's convert_hf_to_gguf.py with `pip download` (the source distribution of the installed
llama-cpp-python), and runs in turn, for each type

* reference: convert_hf_to_gguf.py --outtype f16, then llama_model_quantize on its file (for F16 only the first)
* proper: efficli's conversion (reads, chooses types, checks for NaN, encodes, writes), nothing else of `export`
* export: `efficli export --no-certificate`, all of it

Needs 7 GB of disk. Interrupted, it goes on where it was: each run is kept in DIR/runs.json. The result goes to
benchmarks/results/convert.json. CPU seconds are of the whole process tree, and hardly depend on what else runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tarfile
from pathlib import Path

import machine
import random_llama

HERE = Path(__file__).resolve().parent
LIMITS = {"proper": {"F16": 0.5, "Q4_0": 0.45, "Q4_K_M": 0.85}, "export": {"F16": 0.8, "Q4_0": 0.6, "Q4_K_M": 0.95}}
"""Largest ratio of CPU seconds to the reference's; peak memory: 0.3."""

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


class Work:
    """The folder of one benchmark: what was measured so far, and where files are."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.log, self.state = folder, folder / "log.txt", folder / "runs.json"
        self.runs = json.loads(self.state.read_text()) if self.state.exists() else {}

    def run(self, name: str, command: list[str], environment: dict[str, str] | None = None) -> bool:
        """Measure a command once; a run of this name that is already there is kept. Whether it was run now."""
        if name in self.runs:
            return False
        self.runs[name] = machine.measure(command, log=self.log, environment=environment)
        self.save()
        print(name, self.runs[name], flush=True)
        return True

    def save(self) -> None:
        """Keep what was measured."""
        self.state.write_text(json.dumps(self.runs, indent=2))


def main() -> None:
    """Measure, compare, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder with 7 GB to spare")
    parser.add_argument("--types", default="F16,Q4_0,Q4_K_M")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--keep", action="store_true", help="do not delete the checkpoints at the end")
    parser.add_argument("--only", choices=["reference", "proper", "export"], action="append", help="parts to run")
    options = parser.parse_args()
    work = Work(options.work)
    types = options.types.split(",")
    parts = options.only or ["reference", "proper", "export"]
    text = HERE.parent / "efficli/reference/text/calibration-prose.txt"
    models = {
        size: (
            work.folder / size,
            random_llama.write(work.folder / size, layers=layers, text=text, **random_llama.TINYLLAMA),
        )
        for size, layers in (("full", options.layers), ("half", options.layers // 2))
    }
    for number in range(options.rounds):
        one_round(work, number, types, parts, models["full"][0])
    if "proper" in parts:
        for kind in types:
            ours(work, f"half/proper/{kind}", "proper", kind, models["half"][0])
    result = {
        "benchmark": "convert",
        "command": f"python benchmarks/convert.py --work DIR --types {options.types} --rounds {options.rounds}",
        "layers": options.layers,
        "machine": machine.describe(),
        "versions": machine.versions("llama-cpp-python", "numpy", "gguf", "transformers", "torch"),
        "checkpoint_bytes": {size: nbytes for size, (_, nbytes) in models.items()},
        "summary": summary(work, types, options.rounds),
        "runs": work.runs,
    }
    out = HERE / "results" / "convert.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["summary"], indent=2))
    if not options.keep:
        for folder, _ in models.values():
            random_llama.remove(folder)


def one_round(work: Work, number: int, types: list[str], parts: list[str], model: Path) -> None:
    """The reference and efficli after each other, for every type."""
    half_file = work.folder / "reference-f16.gguf"
    if "reference" in parts:
        todo = [kind for kind in types if f"{number}/reference/{kind}" not in work.runs]
        if todo:
            work.runs.pop(f"{number}/reference/F16", None)
            converter = fetch_converter(work.folder)
            command = [sys.executable, str(converter), str(model), "--outtype", "f16", "--outfile", str(half_file)]
            work.run(f"{number}/reference/F16", command, {"PYTHONPATH": str(converter.parent / "gguf-py")})
    for kind in types:
        if "reference" in parts and kind != "F16":
            out = work.folder / "reference.gguf"
            work.run(f"{number}/reference/{kind}", [sys.executable, "-c", QUANTIZE, str(half_file), str(out), kind])
            out.unlink(missing_ok=True)
        for part in ("proper", "export"):
            if part in parts:
                ours(work, f"{number}/{part}/{kind}", part, kind, model)
    half_file.unlink(missing_ok=True)


def ours(work: Work, name: str, part: str, kind: str, model: Path) -> None:
    """One run of efficli."""
    out = work.folder / "efficli-out"
    environment = {"PYTHONPATH": str(HERE.parent)}
    if part == "proper":
        work.run(name, [sys.executable, "-c", PROPER, str(model), str(out), kind], environment)
        out.unlink(missing_ok=True)
    else:
        told = work.folder / "rss.txt"
        program = EXPORT.replace("RSS", repr(str(told)))
        command = [sys.executable, "-c", program, "export", str(model), "-o", str(out), "--type", kind]
        if work.run(name, [*command, "--no-certificate", "--force"], environment):
            work.runs[name]["converting_process_peak_rss_bytes"] = int(told.read_text())
            work.save()
        random_llama.remove(out)


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


def summary(work: Work, types: list[str], rounds: int) -> dict[str, object]:
    """Ratios per type: median of the rounds, their range, and the limit."""
    out: dict[str, object] = {}
    for kind in types:
        for part in ("proper", "export"):
            pairs = [pair(work, n, part, kind) for n in range(rounds) if f"{n}/{part}/{kind}" in work.runs]
            pairs = [p for p in pairs if p]
            if not pairs:
                continue
            cpu, rss = [p[0] for p in pairs], [p[1] for p in pairs if p[1] is not None]
            out[f"{part}/{kind}"] = {
                "n": len(pairs),
                "cpu_ratio": round(statistics.median(cpu), 3),
                "cpu_ratio_range": [round(min(cpu), 3), round(max(cpu), 3)],
                "cpu_limit": LIMITS[part].get(kind),
                "peak_rss_ratio": round(statistics.median(rss), 3) if rss else None,
                "peak_rss_limit": 0.3,
            }
        if f"half/proper/{kind}" in work.runs and f"0/proper/{kind}" in work.runs:
            full, half = (work.runs[f"{n}/proper/{kind}"]["peak_rss_bytes"] for n in ("0", "half"))
            out[f"memory/{kind}"] = {"peak_rss_bytes": full, "of_half_the_model": half, "ratio": round(full / half, 3)}
    return out


def pair(work: Work, number: int, part: str, kind: str) -> tuple[float, float | None] | None:
    """(CPU seconds, peak RSS) of efficli relative to the reference's in the same round."""
    first = work.runs.get(f"{number}/reference/F16")
    second = work.runs.get(f"{number}/reference/{kind}") if kind != "F16" else {"cpu_s": 0.0, "peak_rss_bytes": 0}
    if first is None or second is None:
        return None
    mine = work.runs[f"{number}/{part}/{kind}"]
    cpu = mine["cpu_s"] / (first["cpu_s"] + second["cpu_s"])
    peak = mine.get("converting_process_peak_rss_bytes") if part == "export" else mine["peak_rss_bytes"]
    return cpu, peak and peak / max(first["peak_rss_bytes"], second["peak_rss_bytes"])


if __name__ == "__main__":
    main()
