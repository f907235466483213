"""How well predicted losses rank whole allocations: Spearman's rank correlation with the measured KL divergence.

    python benchmarks/losses.py [--models reference] [--work DIR] [--minutes 60]

30 allocations of mixed sizes and 30 of equal bytes (± 1 %), each chosen with losses that were disturbed at random, are
measured on the selection text; every loss model predicts them from its table of single tensors. Prediction and
measurement run the same network, in PyTorch on dequantized weights.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from runner import Benchmark, Limit, Step, arguments

from efficli.ops.statistics import Estimate

COUNT, DISTURBED, DRAWS = 30, 1.5, 4000
BITS = (2.6, 6.5)
EQUAL_BITS = 3.5
LEAST_BITS = 4.3
"""For a model whose rows only take types of 4 bits and more: the bits of both."""
SETS = {"mixed sizes": 0.95, "equal bytes": 0.8}
HELD = ("kld", "higgs")
QUESTION = "How predicted losses rank allocations: rank correlation with the measured KL divergence"
COLUMNS = ("model", "allocations", "KLD from", "to", "mse", "hess", "higgs", "kld")


def table(model: str, work: Path) -> dict[str, Any]:
    """Measure the allocations, and predict them with every loss model."""
    from efficli.catalog import load_method
    from efficli.checkpoint import open_checkpoint
    from efficli.checkpoint.digest import digest_of
    from efficli.ops.allocate import Choice, Item, allocate
    from efficli.pipeline.method_context import context_for
    from efficli.pipeline.steps import Clock, Steps
    from efficli.precision import choice
    from efficli.precision.losses import LOSSES, losses
    from efficli.precision.search import Task, search
    from efficli.precision.work import Workshop
    from efficli.progress import Silent
    from efficli.recipe import Recipe
    from efficli.store import Store

    store = Store(work / "cache")
    steps = Steps(store=store, scratch=work, progress=Silent(), clock=Clock())
    ckpt = open_checkpoint(model)
    digest = functools.cache(lambda: digest_of(ckpt, Silent()).value)
    method = load_method("quantize.mixed")
    context = context_for(method, ckpt, Recipe(version=1, model=model), steps, digest, os.cpu_count() or 1)
    with store.using():
        view = context.need_file()
        found = choice.choices(view, (), weighed=view.multiplied, lacking=(), slow=())
        shop = Workshop(ckpt=ckpt, view=view, context=context, choices=found, rounding="nearest")
        shop.calibrate(None)
        curves = {name: shop.curves("kld" if name == "kld" else "higgs") for name in LOSSES}
        told = {name: {t: losses(curve, name) for t, curve in curves[name].items()} for name in LOSSES}
        weights = sum(tensor.num_weights for tensor in view.tensors)
        narrow = view.tensors[0].columns % 256 != 0
        random, sets = np.random.default_rng(0), dict[str, dict[str, dict[str, str]]]()
        for name in SETS:
            sets[name] = {}
            for number in range(COUNT):
                low, high = (LEAST_BITS, BITS[1]) if narrow else BITS
                bits = float(random.uniform(low, high)) if name == "mixed sizes" else max(low, EQUAL_BITS)
                items = [
                    Item(name, tuple(Choice(k, n, float(told["hess"][name][k] * factor)) for k, n in sizes.items()))
                    for name, sizes in found.nbytes.items()
                    for factor in [float(np.exp(DISTURBED * random.standard_normal()))]
                ]
                sets[name][f"{name} {number}"] = dict(allocate(items, int(bits * weights / 8)).picks)
        task = Task(
            candidates={k: v for some in sets.values() for k, v in some.items()},
            nbytes=found.nbytes,
            losses=told["kld"],
            budget=0,
            trials=0,
            groups={},
        )
        measured = search(shop.bench(2), task, Silent()).measured
    return {
        name: {
            "measured": [measured[key] for key in some],
            "bytes": [sum(found.nbytes[t][k] for t, k in types.items()) for types in some.values()],
            **{one: [sum(told[one][t][k] for t, k in types.items()) for types in some.values()] for one in LOSSES},
        }
        for name, some in sets.items()
    }


def correlation(predicted: Sequence[float], measured: Sequence[float]) -> Estimate:
    """Spearman's rho with the interval of a bootstrap over allocations."""
    x, y = np.array(predicted), np.array(measured)
    random, n = np.random.default_rng(0), len(x)
    drawn = [_rho(x[i], y[i]) for i in random.integers(n, size=(DRAWS, n))]
    low, high = np.quantile(drawn, [0.025, 0.975])
    value = _rho(x, y)
    return Estimate(
        n=n, median=value, low=float(low), high=float(high), confidence=0.95, mean=float(np.mean(drawn)),
        stdev=float(np.std(drawn)),
    )  # fmt: skip


def _rho(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation of the ranks."""
    ranks = [np.argsort(np.argsort(values, kind="stable"), kind="stable") for values in (x, y)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def limits(runs: Mapping[str, Any]) -> list[Limit]:
    """What the default loss models promise."""
    return [
        Limit(name=f"{model}: {loss}, {name}", found=correlation(run[name][loss], run[name]["measured"]), least=least)
        for model, run in runs.items()
        for name, least in SETS.items()
        for loss in HELD
    ]


def rows(result: dict[str, Any]) -> list[list[str]]:
    """One row for each model and set."""
    told = []
    for model, run in result["runs"].items():
        for name in SETS:
            found = run[name]
            cells = [model, name, f"{min(found['measured']):.4f}", f"{max(found['measured']):.4f}"]
            for loss in ("mse", "hess", "higgs", "kld"):
                one = correlation(found[loss], found["measured"])
                cells.append(f"{one.median:.3f} ({one.low:.2f}-{one.high:.2f})")
            told.append(cells)
    return told


def about(result: dict[str, Any]) -> str:
    """What the figures are of."""
    return (
        f"{COUNT} allocations a row; intervals: 95 % of {DRAWS} bootstrap draws over allocations. "
        "Losses are in the tables of single tensors, added up."
    )


def main() -> int:
    """Measure, keep the result."""
    parser = arguments(__doc__, "losses")
    parser.add_argument("--models", default="reference")
    options = parser.parse_args()
    bench = Benchmark("losses", QUESTION, options, "efficli", "llama-cpp-python", "numpy", "torch", "transformers")
    models = options.models.split(",")
    bench.run([Step(name=model, run=functools.partial(table, model, bench.folder)) for model in models])
    return bench.finish(limits(bench.runs))


if __name__ == "__main__":
    sys.exit(main())
