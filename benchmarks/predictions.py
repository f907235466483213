"""How far `efficli plan`'s tokens/s are from what others published (published.yaml).

    python benchmarks/predictions.py

A row's constant (GB/s of its device) and its floors (types that are computed more slowly than they are read) are fitted
on other rows of the device: with four rows or more on the half that it is not in, with two or three on all others. A
device's only row, and rows that do not count, are predicted by the profile as it is, which may be made of them.
"""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from published import Row, Types, active_types, configs, read_rows, types_of, work
from runner import Benchmark, Limit, Step, arguments

from efficli.ops.statistics import estimate
from efficli.target import Figure, Range, Share, Target, load_target, predict
from efficli.target.profile import Decode, Floor

QUESTION = "How far are predicted tokens/s from published ones, with constants fitted on other rows?"
COLUMNS = ("device", "model", "type", "GB", "published", "predicted", "error", "in range", "fitted on other rows")
MEDIAN, FAR, SHARE_FAR = 0.15, 0.4, 0.1
"""The limits: the median absolute error, and the share of rows that may be off by more than FAR."""
HALVES = 4
"""Rows of a device from which on it is fitted on halves."""
SPLITS = 300
"""Random halves that the fixed ones are compared with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """What was fitted of a device."""

    gb_per_s: float
    low: float
    high: float
    n: int
    floors: tuple[Floor, ...] = ()

    @property
    def line(self) -> str:
        """What a person reads."""
        floors = "".join(f", {' '.join(f.types)} {f.gops_per_thread.value:.2g} Gops/s a thread" for f in self.floors)
        return f"{self.gb_per_s:.3g} GB/s (n = {self.n}){floors}"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A row with the bytes that a token reads of its model."""

    row: Row
    types: Types

    @functools.cached_property
    def main(self) -> str:
        """The type of most weights."""
        return max(self.types, key=lambda kind: self.types[kind].weights)

    @functools.cached_property
    def below_four(self) -> bool:
        """Whether most weights have less than 4 bits: then it does not tell how fast memory is read."""
        share = self.types[self.main]
        return 8 * share.nbytes < 4 * share.weights

    @functools.cached_property
    def gb_per_s(self) -> float | None:
        """The constant with which the published speed is predicted."""
        return None if self.below_four else _solved(self, lambda gb: Constants(gb_per_s=gb, low=gb, high=gb, n=1))

    def predicted(self, target: Target) -> Range:
        """tokens/s"""
        found = predict(target, work(self.row, self.types), self.row.profile).decode
        assert found is not None, f"{target.name} does not say how fast {self.row.profile} is"
        return found

    def with_constants(self, constants: Constants) -> Range:
        """tokens/s by the profile of its target with other constants: of its own no GB/s and no floor is left."""
        target = _profile(self.row.target)
        own = target.decode[0]
        speed = Decode(
            runtime=own.runtime,
            threads=own.threads,
            overhead_ms=own.overhead_ms,
            gb_per_s=_figure(constants.gb_per_s, constants.low, constants.high, constants.n),
            floors=constants.floors,
        )
        return self.predicted(target.model_copy(update={"decode": (speed,)}))


_profile = functools.cache(load_target)


def _figure(value: float, low: float, high: float, n: int) -> Figure:
    return Figure(value=value, low=min(low, value), high=max(high, value), n=n, source="fit", confidence="published")


def _solved(case: Case, constants: Callable[[float], Constants]) -> float | None:
    """The value whose `constants` predict the published speed, to 10^-4; None where none does."""
    low, high = 1e-2, 1e3

    def fast(value: float) -> bool:
        return case.with_constants(constants(value)).value >= case.row.tokens_per_s

    if fast(low) or not fast(high):
        return None
    while high > 1.0001 * low:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if fast(middle) else (middle, high)
    return low


def fit(cases: Sequence[Case]) -> Constants | None:
    """The median of what each row says; None where none says anything.

    GB/s: rows of types of four bits and more. Floors: of each other type but mixtures.
    """
    known = [gb for case in cases if (gb := case.gb_per_s) is not None]
    if not known:
        return None
    memory = Constants(gb_per_s=median(known), low=min(known), high=max(known), n=len(known))
    return _with_floors(memory, tuple(_floors(cases, memory)))


def _with_floors(memory: Constants, floors: tuple[Floor, ...]) -> Constants:
    return Constants(gb_per_s=memory.gb_per_s, low=memory.low, high=memory.high, n=memory.n, floors=floors)


def _floors(cases: Sequence[Case], memory: Constants) -> Iterator[Floor]:
    slow = [case for case in cases if case.below_four and case.main != "mixture"]
    for kind in sorted({case.main for case in slow}):
        rows = [case for case in slow if case.main == kind]
        threads = max(case.row.threads or _profile(case.row.target).decode[0].threads or 1 for case in rows)

        def floor(*gops: float, kind: str = kind, threads: int = threads) -> Floor:
            figure = _figure(median(gops), min(gops), max(gops), len(gops))
            return Floor(types=(kind,), threads=threads, gops_per_thread=figure)

        said = [_solved(case, lambda gops, floor=floor: _with_floors(memory, (floor(gops),))) for case in rows]
        if known := [gops for gops in said if gops is not None]:
            yield floor(*known)


def halves(cases: Sequence[Case]) -> list[tuple[list[Case], list[Case]]]:
    """(fitted on, predicted) in a fixed order that knows no speed; similar rows alternate, so both halves have some."""
    ordered = sorted(
        cases,
        key=lambda case: (
            case.below_four,
            case.main,
            case.row.threads or 0,
            sum(share.nbytes for share in case.types.values()),
            case.row.board,
        ),
    )
    even, odd = ordered[::2], ordered[1::2]
    return [(even, odd), (odd, even)]


def folds(cases: Sequence[Case]) -> list[tuple[list[Case], list[Case]]]:
    """(fitted on, predicted) for each row of a device; nothing for a single row."""
    if len(cases) >= HALVES:
        return halves(cases)
    return [([other for other in cases if other is not case], [case]) for case in cases] if len(cases) > 1 else []


def by_device(cases: Iterable[Case]) -> dict[str, list[Case]]:
    """Rows that count, by device."""
    devices: dict[str, list[Case]] = {}
    for case in cases:
        if case.row.counts:
            devices.setdefault(case.row.device, []).append(case)
    return devices


def all_cases(asked: Mapping[str, Types]) -> list[Case]:
    """Every row of published.yaml; `asked`: by `subjects`."""
    return [Case(row=row, types=types_of(row, asked)) for row in read_rows()]


def subjects() -> list[str]:
    """MODEL/TYPE that llama.cpp is asked for."""
    return sorted({row.subject for row in read_rows() if row.subject})


def ask(subject: str) -> Types:
    """What a token reads of it."""
    model, _, kind = subject.partition("/")
    return active_types(configs()[model], kind)


def evaluate(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Every row with what was predicted for it, in the order of published.yaml."""
    found: dict[int, dict[str, Any]] = {}
    for device in by_device(cases).values():
        for training, held_out in folds(device):
            constants = fit(training)
            for case in held_out if constants else ():
                found[id(case)] = _told(case, case.with_constants(constants), constants.line)
    return [found.get(id(case)) or _told(case, case.predicted(_profile(case.row.target))) for case in cases]


def _told(case: Case, predicted: Range, fitted_on: str | None = None) -> dict[str, Any]:
    row = case.row
    low, high = row.ends
    return {
        **{name: getattr(row, name) for name in ("device", "board", "target", "model", "type", "threads", "runtime")},
        **{name: getattr(row, name) for name in ("year", "source", "note", "basis")},
        "active_gb": round(sum(share.nbytes for share in case.types.values()) / 1e9, 3),
        "published": [low, high],
        "predicted": predicted.to_json(),
        "error": round(predicted.value / row.tokens_per_s - 1, 4),
        "in_range": predicted.low <= high and low <= predicted.high,
        "family": row.counts,
        "counted": fitted_on is not None,
        "fitted_on": fitted_on,
    }


def summary(told: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The two figures, and which rows are far off."""
    counted = [row for row in told if row["counted"]]
    far = [row for row in counted if abs(row["error"]) > FAR]
    return {
        "n": len(counted),
        "median_error": round(median(abs(row["error"]) for row in counted), 4),
        "share_far": round(len(far) / len(counted), 4),
        "in_range": sum(row["in_range"] for row in counted),
        "far": [f"{row['model']} {row['type']} on {row['board']} ({row['runtime']})" for row in far],
    }


def limits(told: Sequence[dict[str, Any]]) -> list[Limit]:
    """What the predictions are held against."""
    errors = [abs(row["error"]) for row in told if row["counted"]]
    share = sum(error > FAR for error in errors) / len(errors)
    return [
        Limit(name="absolute error of tokens/s", found=estimate(errors), most=MEDIAN),
        Limit(name=f"share of rows off by more than {FAR:.0%}", found=estimate([share]), most=SHARE_FAR),
    ]


def random_halves(cases: Sequence[Case], number: int = SPLITS, seed: int = 0) -> dict[str, Any]:
    """The two figures over random halves, [lowest, median, highest]: whether the fixed ones are lucky."""
    rng, medians, shares = random.Random(seed), [], []
    devices = list(by_device(cases).values())
    for _ in range(number):
        errors = []
        for device in devices:
            mixed = rng.sample(device, len(device))
            cut = len(mixed) // 2
            drawn = [(mixed[:cut], mixed[cut:]), (mixed[cut:], mixed[:cut])]
            for training, held_out in drawn if len(device) >= HALVES else folds(device):
                constants = fit(training)
                assert constants is not None
                errors += [abs(case.with_constants(constants).value / case.row.tokens_per_s - 1) for case in held_out]
        medians.append(median(errors))
        shares.append(sum(error > FAR for error in errors) / len(errors))
    spread = {"median_error": medians, "share_far": shares}
    return {"splits": number} | {
        name: [round(end, 4) for end in (min(found), median(found), max(found))] for name, found in spread.items()
    }


def rows(result: dict[str, Any]) -> list[list[str]]:
    """Rows of llama.cpp's family on a CPU; a device's only row has nothing that it could be fitted on."""
    return [_cells(row) for row in result["predictions"] if row["family"]]


def _cells(row: dict[str, Any]) -> list[str]:
    low, high = row["published"]
    found = row["predicted"]
    threads = f", {row['threads']} threads" if row["threads"] else ""
    return [
        row["board"] if row["board"].startswith(("Pi", "CM")) else f"{row['device']} ({row['board']})",
        f"{row['model']}, {row['runtime']} ({row['year']})",
        f"{row['type']}{threads}",
        f"{row['active_gb']:.2f}",
        f"{low:g}" if low == high else f"{low:g} - {high:g}",
        f"{found['value']:.3g} ({found['low']:.3g} - {found['high']:.3g})",
        f"{row['error']:+.0%}".replace("-0%", "+0%"),
        "yes" if row["in_range"] else "no",
        row["fitted_on"] or "not counted: by the profile",
    ]


def about(result: dict[str, Any]) -> str:
    """The summary, and the rows of other runtimes."""
    told, drawn = result["summary"], result["random_halves"]
    others = [_cells(row)[:-1] for row in result["predictions"] if not row["family"]]
    middle, far = drawn["median_error"], drawn["share_far"]
    return "\n".join(
        [
            f"{told['n']} rows are counted: median absolute error {told['median_error']:.1%} (at most {MEDIAN:.0%}), "
            f"{told['share_far']:.1%} of them off by more than {FAR:.0%} (at most {SHARE_FAR:.0%}): "
            f"{'; '.join(told['far']) or 'none'}. {told['in_range']} are in the range that was predicted.",
            "",
            "published, predicted: tokens/s, one request at a time; GB: what a token reads. With four rows of a device "
            "or more each half is predicted by constants of the other (similar rows alternate), with two or three each "
            "row by the others. Floors (Gops/s a thread, of types that are computed more slowly than they are read) "
            "are fitted like the GB/s, never the profile's: without one, fewer than 4 bits are taken for 4.5. "
            f"Over {drawn['splits']} random halves the median error is {middle[1]:.1%} ({middle[0]:.1%} to "
            f"{middle[2]:.1%}), the share that is far off {far[1]:.1%} ({far[0]:.1%} to {far[2]:.1%}). Sources, and "
            "what a row's bytes are reckoned from: [published.yaml](../published.yaml).",
            "",
            "Not counted: other runtimes and GPUs, by profiles that may be made of these very rows.",
            "",
            f"| {' | '.join(COLUMNS[:-1])} |",
            f"|{'---|' * (len(COLUMNS) - 1)}",
            *(f"| {' | '.join(cells)} |" for cells in others),
        ]
    )


def kept(types: Types) -> dict[str, Any]:
    """As JSON."""
    return {"types": {kind: list(share) for kind, share in types.items()}}


def asked_in(runs: Mapping[str, Any]) -> dict[str, Types]:
    """What `kept` kept."""
    return {name: {kind: Share(*share) for kind, share in run["types"].items()} for name, run in runs.items()}


def main() -> int:
    """Ask llama.cpp for types, predict, keep the result."""
    bench = Benchmark(
        "predictions", QUESTION, arguments(__doc__, "predictions").parse_args(), "efficli", "llama-cpp-python"
    )

    def asking(subject: str) -> Callable[[], dict[str, Any]]:
        return lambda: kept(ask(subject))

    bench.run([Step(name=subject, run=asking(subject)) for subject in subjects()])
    cases = all_cases(asked_in(bench.runs))
    told = evaluate(cases)
    return bench.finish(limits(told), summary=summary(told), random_halves=random_halves(cases), predictions=told)


if __name__ == "__main__":
    sys.exit(main())
