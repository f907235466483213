"""What a speed benchmark measures, as values: nothing here runs anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import PurePath
from typing import Any, Literal, Self

from efficli.bench.failure import Failure
from efficli.errors import EffiError
from efficli.ops.child import ChildError
from efficli.ops.statistics import Estimate, Quantiles, estimate

FlashAttention = Literal["auto", "on", "off"]
NS_PER_MS, NS_PER_S = 1e6, 1e9
RESOLUTION = 0.02
"""Two processes with the same file differ by up to this for as long as they live: where their heaps lie. No number of
repeats in the same two processes shows it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How the runtime is opened: what changes speed or memory and nothing else."""

    ctx: int
    threads: int
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    flash_attn: FlashAttention = "auto"
    batch: int = 2048
    ubatch: int = 512
    repack: bool = True
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """As plain data; `from_json` reads it back."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedTest:
    """One workload: read `n_prompt` tokens, or write `n_gen`, with `n_depth` tokens already in the cache."""

    n_prompt: int = 0
    n_gen: int = 0
    n_depth: int = 0
    threads: int = 1

    @property
    def label(self) -> str:
        """llama-bench's name: pp512, tg128 @ d1024."""
        return (f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}") + (
            f" @ d{self.n_depth}" if self.n_depth else ""
        )

    @property
    def tokens(self) -> int:
        """Tokens that one repeat computes."""
        return self.n_prompt + self.n_gen

    @property
    def positions(self) -> int:
        """Tokens of context that it needs."""
        return self.n_depth + self.tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """The repeats of one quantity, in the order in which they were taken."""

    unit: str
    samples: tuple[float, ...]
    estimate: Estimate
    steady: bool
    """Whether the median's interval is as narrow as was asked; if not, the range is the answer, not the median."""

    @classmethod
    def of(cls, samples: Sequence[float], unit: str, within: float) -> Self:
        """`within`: the share of the median that its interval may reach to either side."""
        found = estimate(samples)
        return cls(unit=unit, samples=tuple(samples), estimate=found, steady=found.n > 1 and found.spread <= within)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "unit": self.unit,
            **self.estimate.to_json(),
            "steady": self.steady,
            "samples": [round(value, 6) for value in self.samples],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedResult:
    """One SpeedTest of one artifact."""

    test: SpeedTest
    began: str
    """UTC, ISO 8601."""
    samples_ns: tuple[int, ...]
    rate: Series
    """tokens/s"""
    ttft: Series | None = None
    """ms from the prompt's ids to the first token, of prompts."""
    tpot: Quantiles | None = None
    """Time per output token, over all repeats, of generation."""
    energy: Series | None = None
    """J/token of whatever the meter sees, idle power included."""

    def to_json(self) -> dict[str, Any]:
        """As plain data; llama-bench's names are in `rows.py`."""
        return {
            "label": self.test.label,
            **asdict(self.test),
            "began": self.began,
            "samples_ns": list(self.samples_ns),
            "rate": self.rate.to_json(),
            "ttft": self.ttft and self.ttft.to_json(),
            "tpot_ms": self.tpot and asdict(self.tpot),
            "energy": self.energy and self.energy.to_json(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class StartResult:
    """Starts of a fresh process, cold (the file not in the page cache) or warm, split where they spend their time."""

    cold: bool
    resident: float | None
    """Share of the file that was in the page cache before a process began, where it was least what it should be:
    0 if all starts were really cold, 1 if all were really warm, None unknown."""
    process: Series
    """ms from the start of the process until the runtime's library is there."""
    load: Series
    """ms from there until the model and its context are there."""
    first_token: Series
    """ms from there until one token was computed."""
    total: Series

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "cold": self.cold,
            "resident": self.resident,
            "process": self.process.to_json(),
            "load": self.load.to_json(),
            "first_token": self.first_token.to_json(),
            "total": self.total.to_json(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryResult:
    """Memory of the process that ran the model, seen from outside; bytes."""

    peak_rss: int
    """VmHWM: the kernel's own high-water mark of anonymous and file pages together."""
    peak_anon: int
    """RssAnon: what must be there."""
    peak_file: int
    """RssFile: pages of files, which the kernel may drop and read again."""
    before_anon: int
    """RssAnon of the process before the model was opened: interpreter and library."""
    before_file: int

    def to_json(self) -> dict[str, int]:
        """As plain data."""
        return {f"{name}_bytes": value for name, value in asdict(self).items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What the runtime says of the file."""

    path: str
    format: str
    nbytes: int
    """Of the file."""
    description: str
    """llama.cpp's `model_type`: "llama ?B Q4_K - Medium"."""
    tensor_bytes: int
    num_weights: int
    trained_ctx: int
    generates: bool
    """False for an embedding model: it reads, and writes nothing."""
    runtime: str
    """Name and version of the library."""
    has_tokenizer: bool = True
    chat_template: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain data, without the template."""
        values = asdict(self)
        values["has_chat_template"] = values.pop("chat_template") is not None
        return values


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTimes:
    """One request to a running model: a text in, tokens out, chosen greedily, the end token ignored."""

    prompt_tokens: int
    ttft_ns: int
    """From the text to the first token: tokenizing, reading, choosing."""
    token_ns: tuple[int, ...]
    """Of each further token."""
    text: str = ""

    @property
    def tpot_ms(self) -> float | None:
        """Mean time of a further token; None if there was only one."""
        return sum(self.token_ns) / len(self.token_ns) / NS_PER_MS if self.token_ns else None

    @property
    def ttft_ms(self) -> float:
        """Time to the first token."""
        return self.ttft_ns / NS_PER_MS

    @property
    def total_ms(self) -> float:
        """From the text to the last token: the time to the useful answer."""
        return (self.ttft_ns + sum(self.token_ns)) / NS_PER_MS


@dataclass(frozen=True, slots=True, kw_only=True)
class StartTimes:
    """One start of a fresh process, until its first token; nanoseconds, and what was in the page cache before."""

    cold: bool
    resident: float | None
    process_ns: int
    load_ns: int
    first_token_ns: int

    @property
    def total_ns(self) -> int:
        """From the start of the process to its first token."""
        return self.process_ns + self.load_ns + self.first_token_ns


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """From the artifact's certificate, or measured now with `--base`."""

    kld_mean: float | None
    top1_agreement: float | None
    origin: str | None
    cosine_mean: float | None = None
    """Of an embedding model, which has no other figure."""


@dataclass(slots=True, kw_only=True)
class ArtifactResult:
    """All that was measured of one artifact so far; filled as the run goes on, so that Ctrl-C loses nothing."""

    path: str
    settings: Settings | None = None
    planned: tuple[SpeedTest, ...] = ()
    """The tests that a run takes."""
    planned_starts: bool = False
    planned_scenarios: tuple[str, ...] = ()
    model: ModelFacts | None = None
    starts: list[StartResult] = field(default_factory=list)
    tests: list[SpeedResult] = field(default_factory=list)
    memory: MemoryResult | None = None
    scenarios: list[Any] = field(default_factory=list)
    """ScenarioResult of `scenario.py`: to_json()."""
    predictions: list[Any] = field(default_factory=list)
    """Prediction of `efficli.target`: to_json()."""
    quality: Quality | None = None
    disturbance: Any = None
    """Disturbance of `ops/disturbance.py`, or None: to_json(), .lines."""
    energy_source: str | None = None
    """Where joules come from, or, beginning with "none", why there are none."""
    notes: list[str] = field(default_factory=list)
    failure: Failure | None = None

    def fail(self, error: EffiError | ChildError) -> None:
        """Note why it could not be measured; an error about its file names it as the user did."""
        self.failure = Failure.of(error)
        where = self.failure.where
        if where is not None and PurePath(where).name == PurePath(self.path).name:
            self.failure = replace(self.failure, where=self.path)

    @property
    def failures(self) -> list[Failure]:
        """Its own, and those of scenarios that could not be run."""
        found = [self.failure, *(scenario.failure for scenario in self.scenarios)]
        return list(dict.fromkeys(failure for failure in found if failure))

    @property
    def is_measured(self) -> bool:
        """Whether there is anything to show."""
        return bool(self.tests or self.starts or self.scenarios)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "path": self.path,
            "model": self.model and self.model.to_json(),
            "settings": self.settings and self.settings.to_json(),
            "planned": [test.label for test in self.planned],
            "planned_starts": self.planned_starts,
            "planned_scenarios": list(self.planned_scenarios),
            "starts": [start.to_json() for start in self.starts],
            "tests": [test.to_json() for test in self.tests],
            "memory": self.memory and self.memory.to_json(),
            "scenarios": [scenario.to_json() for scenario in self.scenarios],
            "predictions": [prediction.to_json() for prediction in self.predictions],
            "quality": self.quality and asdict(self.quality),
            "disturbance": self.disturbance and self.disturbance.to_json(),
            "energy_source": self.energy_source,
            "notes": self.notes,
            "error": self.failure and self.failure.to_json(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One test of two artifacts, measured in turns: `ratios` of pairs, tokens/s of `other` over those of `first`."""

    test: SpeedTest
    first: str
    other: str
    ratios: Series

    @property
    def verdict(self) -> str:
        """ "faster", "slower", or "no difference shown": whether the interval leaves 1 out by more than RESOLUTION."""
        found = self.ratios.estimate
        if found.low > 1 + RESOLUTION:
            return "faster"
        return "slower" if found.high < 1 - RESOLUTION else "no difference shown"

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "label": self.test.label,
            **asdict(self.test),
            "first": self.first,
            "other": self.other,
            "ratio": self.ratios.to_json(),
            "verdict": self.verdict,
        }


@dataclass(slots=True, kw_only=True)
class BenchResult:
    """A whole run of `bench`."""

    machine: Mapping[str, Any]
    """cpu_info, cores, memory_bytes, system, runtime versions."""
    effort: Mapping[str, float] = field(default_factory=dict)
    """How hard it tried: repeats at least and at most, the width asked for, patience in seconds."""
    artifacts: list[ArtifactResult] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    interrupted: bool = False
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        from efficli.bench.rows import llama_bench_rows  # noqa: PLC0415 (rows are made of these values)

        return {
            "schema_version": 1,
            "command": "bench",
            "machine": dict(self.machine),
            "effort": dict(self.effort),
            "artifacts": [artifact.to_json() for artifact in self.artifacts],
            "comparisons": [comparison.to_json() for comparison in self.comparisons],
            "results": llama_bench_rows(self),
            "interrupted": self.interrupted,
            "seconds": round(self.seconds, 3),
        }
