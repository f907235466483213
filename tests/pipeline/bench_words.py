"""Options of a quick bench, and what its result says in short."""

from __future__ import annotations

from efficli.bench.figures import BenchResult

QUICK = {"n_prompt": (24,), "n_gen": (8,), "threads": (1,), "starts": False, "patience": 0.0}


def labels(result: BenchResult) -> list[list[str]]:
    return [[told.test.label for told in one.tests] for one in result.artifacts]


def codes(result: BenchResult) -> list[int | None]:
    return [one.failure and one.failure.code for one in result.artifacts]
