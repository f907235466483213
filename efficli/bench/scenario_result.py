"""What a scenario found: times of its requests, and the share of them that met the objectives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from efficli.bench.failure import Failure
from efficli.bench.figures import NS_PER_MS, RequestTimes, Series, StartTimes
from efficli.ops.statistics import quantile, share_interval

Figure = Literal["ttft_ms", "tpot_ms", "total_ms"]
FIGURES: tuple[Figure, ...] = ("ttft_ms", "tpot_ms", "total_ms")
"""Time to the first token, mean time of each further one, time to the last; milliseconds."""

FIGURE_NAMES: dict[Figure, str] = {"ttft_ms": "TTFT", "tpot_ms": "TPOT", "total_ms": "time to the answer"}
"""What a reader calls them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One request, or one start; milliseconds."""

    ttft_ms: float
    tpot_ms: float | None
    """None where there was only one token."""
    total_ms: float
    prompt_tokens: int | None = None
    text: str | None = None
    """The answer, for a reader to judge; it is not."""
    start: StartTimes | None = None
    """Where the time of a start went."""

    @classmethod
    def of_request(cls, times: RequestTimes) -> Sample:
        """As an engine measured it."""
        return cls(
            ttft_ms=times.ttft_ms,
            tpot_ms=times.tpot_ms,
            total_ms=times.total_ms,
            prompt_tokens=times.prompt_tokens,
            text=times.text,
        )

    @classmethod
    def of_start(cls, times: StartTimes) -> Sample:
        """From the start of the process to its first token, which is also its last."""
        total = times.total_ns / NS_PER_MS
        return cls(ttft_ms=total, tpot_ms=None, total_ms=total, start=times)

    def value(self, figure: Figure) -> float | None:
        """Of one of FIGURES."""
        found: float | None = getattr(self, figure)
        return found

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        values: dict[str, Any] = {name: _rounded(self.value(name)) for name in FIGURES}
        if self.start is None:
            return {"prompt_tokens": self.prompt_tokens, **values, "text": self.text}
        parts = {part: getattr(self.start, f"{part}_ns") / NS_PER_MS for part in ("process", "load", "first_token")}
        return {
            **values,
            **{f"{part}_ms": _rounded(value) for part, value in parts.items()},
            "resident": self.start.resident,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """`met` of `n` requests met an objective, or all of them; with Wilson's 95 % interval."""

    met: int
    n: int
    low: float
    high: float

    @classmethod
    def of(cls, met: Sequence[bool]) -> Share:
        """From one answer per request."""
        low, high = share_interval(sum(met), len(met))
        return cls(met=sum(met), n=len(met), low=low, high=high)

    @property
    def share(self) -> float | None:
        """None without requests."""
        return self.met / self.n if self.n else None

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "share": self.share}


@dataclass(slots=True, kw_only=True)
class ScenarioResult:
    """A scenario of one artifact; filled request by request, so that Ctrl-C loses none that was measured."""

    name: str
    about: str
    kind: Literal["request", "start"]
    headline: Figure
    """The figure that the scenario is about."""
    n_gen: int
    requests: int
    """How many were wanted; `samples` are those that were measured."""
    objectives: dict[Figure, float]
    """Milliseconds, each met by a request that takes no longer."""
    sha256: str
    """Of everything that is sent: results with the same one are of the same requests."""
    within: float = 0.05
    """The share of the median that its interval may reach to either side."""
    samples: list[Sample] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failure: Failure | None = None
    """Why it was not run, or not to its end."""

    def values(self, figure: Figure) -> list[float]:
        """One per request, in their order."""
        return [value for sample in self.samples if (value := sample.value(figure)) is not None]

    def series(self, figure: Figure) -> Series | None:
        """The figure over all requests; None where no request has it."""
        values = self.values(figure)
        return Series.of(values, "ms", self.within) if values else None

    def p95(self, figure: Figure) -> float | None:
        """What one request in twenty exceeds; of fewer than twenty it is an interpolation towards the slowest."""
        values = sorted(self.values(figure))
        return quantile(values, 0.95) if values else None

    def share(self, figure: Figure) -> Share:
        """Of the requests that meet the objective for this figure."""
        return Share.of([self._meets(sample, figure) for sample in self.samples])

    @property
    def goodput(self) -> Share:
        """Of the requests that each meet all of the objectives.

        Zhong et al., DistServe (OSDI 2024): a request counts if it meets every objective, not if the objectives are
        met on average. There it is a rate under load; one device that answers one person is asked for the share.
        """
        return Share.of([self._is_good(sample) for sample in self.samples])

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        prompts = [sample.prompt_tokens for sample in self.samples if sample.prompt_tokens is not None]
        return {
            "name": self.name,
            "about": self.about,
            "kind": self.kind,
            "headline": self.headline,
            "n_gen": self.n_gen,
            "requests": self.requests,
            "measured": len(self.samples),
            "prompt_tokens": {"least": min(prompts), "most": max(prompts)} if prompts else None,
            **{figure: self._figure(figure) for figure in FIGURES},
            "objectives": [
                {"figure": figure, "limit_ms": limit, **self.share(figure).to_json()}
                for figure, limit in self.objectives.items()
            ],
            "goodput": self.goodput.to_json(),
            "samples": [{**sample.to_json(), "good": self._is_good(sample)} for sample in self.samples],
            "sha256": self.sha256,
            "notes": self.notes,
            "error": self.failure and self.failure.to_json(),
        }

    def _meets(self, sample: Sample, figure: Figure) -> bool:
        value = sample.value(figure)
        return value is not None and value <= self.objectives[figure]

    def _is_good(self, sample: Sample) -> bool:
        return all(self._meets(sample, figure) for figure in self.objectives)

    def _figure(self, figure: Figure) -> dict[str, Any] | None:
        series = self.series(figure)
        return {**series.to_json(), "p95": _rounded(self.p95(figure))} if series else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
