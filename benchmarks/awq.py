"""Q4_0 after scale folding against Q4_0 before it: KL divergence on text that nothing was fitted to.

    python benchmarks/awq.py [--models reference,twin] [--type Q4_0] [--work DIR] [--minutes 60]

For each model, without and with an importance matrix: `export --type Q4_0` of the checkpoint, and of what
`quantize.awq` makes of it, by the exponents of AWQ alone and channel by channel. The matrix is computed anew from the
folded checkpoint, as it must be. All files run in llama.cpp on the same chunks of the evaluation slices; ratios of the
mean KL divergence have a paired bootstrap over chunks. Scales come from other files of text. That folding alone changes
nothing is measured too: the folded checkpoint as an F32 file, and, in PyTorch, what rounding its matrices to bfloat16
again costs.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mixed import ROOTS, measured, paired
from runner import Benchmark, Limit, Step, arguments

from efficli.ops.statistics import Estimate

QUESTION = "Q4_0 after scale folding: the KL divergence, as a share of what it is without"
COLUMNS = ("model", "importance matrix", "KLD before", "exponents of AWQ", "ratio", "channel by channel", "ratio")
SEARCHES = ("grid", "channels")
MOST = 0.9
ROUNDED_CHUNKS = 8


def export(source: str, folder: Path, kind: str, imatrix: bool) -> dict[str, Any]:
    """A file, and a short name for it."""
    import efficli

    done = efficli.export(
        source, folder, types=(kind,), imatrix="auto" if imatrix else None, certificate=False, force=True
    )
    return {"bytes": done.files[0].nbytes}


def fold(model: str, folder: Path, kind: str, imatrix: bool, search: str) -> dict[str, Any]:
    """What quantize.awq makes of a model, and what it says of it."""
    import efficli

    options = {"type": kind, "imatrix": imatrix, "search": search}
    done = efficli.compress(_root(model), folder, method="quantize.awq", options=options, force=True)
    return {"report": list(done.report), "seconds": dict(done.seconds)}


def divergences(model: str, work: Path) -> dict[str, Any]:
    """Mean KL divergence of every chunk, for every file of a model."""
    return measured(model, {folder.name: next(folder.glob("*.gguf")) for folder in sorted(work.glob("file-*"))})


def rounded(folder: Path, model: str) -> dict[str, Any]:
    """Mean KL divergence of a folded checkpoint whose matrices are rounded to the model's own bfloat16 again."""
    from tokenizers import Tokenizer

    from efficli.bench.texts import evaluation_texts
    from efficli.checkpoint import open_checkpoint
    from efficli.checkpoint.reader import to_float32
    from efficli.checkpoint.writer import as_stored
    from efficli.network.divergence import Divergence
    from efficli.network.model import Network

    network = Network(open_checkpoint(str(folder)))
    tokenizer = Tokenizer.from_file(str(Path(_root(model)) / "tokenizer.json"))
    ids = [tokenizer.encode(text.content, add_special_tokens=False).ids for text in evaluation_texts(None)]
    chunks = [one[at : at + 512] for one in ids for at in range(0, 512 * ROUNDED_CHUNKS // len(ids), 512)]
    before = Divergence(network, chunks)
    for name in network.matrices:
        network.replace(name, to_float32(as_stored(network.weight(name), "BF16", name), "BF16"))
    return {"kld": before.mean()}


def ratio(runs: Mapping[str, Any], model: str, suffix: str, search: str) -> Estimate:
    """Mean KLD after / before, with the interval of a paired bootstrap over chunks."""
    kld = runs[f"measure {model}"]["kld"]
    return paired([kld[f"file-{search}{suffix}"]], [kld[f"file-plain{suffix}"]])


def limits(runs: Mapping[str, Any], models: Sequence[str], kind: str) -> list[Limit]:
    """What the method must reach to be on by default."""
    return [
        Limit(name=f"{model}: {kind} {told}, after / before", found=ratio(runs, model, suffix, "channels"), most=MOST)
        for model in models
        for suffix, told in (("", "without a matrix"), ("-imatrix", "with a matrix"))
    ]


def rows(result: dict[str, Any]) -> list[list[str]]:
    """One row for each model, without and with an importance matrix."""
    runs, told = result["runs"], []
    for model in [name.removeprefix("measure ") for name in runs if name.startswith("measure ")]:
        kld = runs[f"measure {model}"]["kld"]
        for suffix, word in (("", "no"), ("-imatrix", "yes")):
            cells = [model, word, f"{np.mean(kld[f'file-plain{suffix}']):.5f}"]
            for search in SEARCHES:
                one = ratio(runs, model, suffix, search)
                shown = f"{one.median:.3f} ({one.low:.3f}-{one.high:.3f})"
                cells += [f"{np.mean(kld[f'file-{search}{suffix}']):.5f}", shown]
            told.append(cells)
    return told


def about(result: dict[str, Any]) -> str:
    """What the figures are of."""
    runs = result["runs"]
    models = [name.removeprefix("measure ") for name in runs if name.startswith("measure ")]
    exact = ", ".join(f"{np.mean(runs[f'measure {model}']['kld']['file-exact']):.1e} ({model})" for model in models)
    again = ", ".join(f"{runs[f'rounded {model}']['kld']:.1e} ({model})" for model in models)
    return (
        f"KL divergence of the folded checkpoint as an F32 file: {exact}; with its matrices rounded to bfloat16 again, "
        f"in PyTorch: {again}."
    )


def _root(model: str) -> str:
    return ROOTS.get(model, model)


def _steps(model: str, work: Path, kind: str) -> list[Step]:
    """The files of one model, and their measurement."""
    steps = []
    for suffix, imatrix in (("", False), ("-imatrix", True)):
        plain = functools.partial(export, _root(model), work / f"file-plain{suffix}", kind, imatrix)
        steps.append(Step(name=f"plain {model}{suffix}", run=plain))
        for search in SEARCHES:
            folder, file = work / f"{search}{suffix}", work / f"file-{search}{suffix}"
            made = functools.partial(fold, model, folder, kind, imatrix, search)
            steps.append(Step(name=f"{search} {model}{suffix}", run=made))
            after = functools.partial(export, str(folder), file, kind, imatrix)
            steps.append(Step(name=f"{search} {model}{suffix} as {kind}", run=after))
    exact = functools.partial(export, str(work / "channels"), work / "file-exact", "F32", False)
    steps.append(Step(name=f"exact {model}", run=exact))
    steps.append(Step(name=f"rounded {model}", run=functools.partial(rounded, work / "channels", model)))
    steps.append(Step(name=f"measure {model}", run=functools.partial(divergences, model, work)))
    return steps


def main() -> int:
    """Write the files, measure them, keep the result."""
    parser = arguments(__doc__, "awq")
    parser.add_argument("--models", default="reference,twin")
    parser.add_argument("--type", default="Q4_0")
    options = parser.parse_args()
    os.environ["EFFICLI_CACHE_DIR"] = str(options.work.resolve() / "cache")
    bench = Benchmark("awq", QUESTION, options, "efficli", "llama-cpp-python", "numpy", "torch", "transformers")
    models = options.models.split(",")
    for model in models:
        (bench.folder / model).mkdir(exist_ok=True)
    bench.run([step for model in models for step in _steps(model, bench.folder / model, options.type)])
    result = {"runs": bench.runs}
    print(f"| {' | '.join(COLUMNS)} |\n|---{'|--:' * (len(COLUMNS) - 1)}|")
    for row in rows(result):
        print(f"| {' | '.join(row)} |")
    print(f"\n{about(result)}")
    return bench.finish(limits(bench.runs, models, options.type))


if __name__ == "__main__":
    sys.exit(main())
