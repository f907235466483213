"""Results of a bench as values: three artifacts, noisy and quiet, with and without everything that can be missing."""

from __future__ import annotations

import random

from efficli.bench.failure import Failure
from efficli.bench.figures import (
    ArtifactResult,
    BenchResult,
    Comparison,
    MemoryResult,
    ModelFacts,
    Quality,
    RequestTimes,
    Series,
    Settings,
    SpeedResult,
    SpeedTest,
    StartResult,
)
from efficli.bench.scenario_result import Sample, ScenarioResult
from efficli.ops.disturbance import Disturbance, Neighbour
from efficli.ops.statistics import Quantiles
from efficli.target import Prediction, Share, Work, load_target, predict

MIB = 1 << 20
WITHIN = 0.05
MACHINE = {
    "cpu_info": "Intel(R) Xeon(R) Processor @ 2.70GHz",
    "cores": 2,
    "memory_bytes": 8 << 30,
    "system": "Linux 6.1.0 x86_64",
    "versions": {"efficli": "0.1.0", "llama-cpp-python": "0.3.36"},
}


def watched(others: float = 0.0, *top: Neighbour) -> Disturbance:
    """What a Watch saw in 20 s: `others` cores were busy with something else."""
    return Disturbance(
        seconds=20.0,
        windows=40,
        cores=2,
        own_cores=1.9 - others / 2,
        others_cores=others,
        waited_share=0.01,
        steal_share=0.0,
        frequency_drop=None,
        throttled=None,
        board=(),
        load1=4.1,
        top=top,
        seen_cores=others,
    )


def series(median: float, noise: float, unit: str, *, n: int = 5, seed: int = 0) -> Series:
    """`n` values around `median`, `noise` of it to either side."""
    draw = random.Random(seed)
    return Series.of([median * (1 + noise * draw.uniform(-1, 1)) for _ in range(n)], unit, WITHIN)


def speed(n_prompt: int, n_gen: int, rate: float, *, noise: float = 0.01, depth: int = 0, seed: int = 0) -> SpeedResult:
    """A test at about `rate` tokens/s, consistent in all its figures."""
    test = SpeedTest(n_prompt=n_prompt, n_gen=n_gen, n_depth=depth, threads=2)
    rates = series(rate, noise, "tokens/s", seed=seed)
    ns = tuple(int(1e9 * test.tokens / value) for value in rates.samples)
    tokens = [int(1e9 / value) for value in rates.samples for _ in range(max(1, n_gen))]
    return SpeedResult(
        test=test,
        began="2025-11-23T13:20:05.123456+00:00",
        samples_ns=ns,
        rate=Series.of([1e9 * test.tokens / value for value in ns], "tokens/s", WITHIN),
        ttft=Series.of([value / 1e6 for value in ns], "ms", WITHIN) if n_prompt else None,
        tpot=Quantiles.of(tokens) if n_gen else None,
    )


def start(cold: bool, factor: float) -> StartResult:
    """Starts of a process, the load of which takes `factor` times 20 ms."""
    process, load, token = (
        series(180, 0.02, "ms"),
        series(20 * factor, 0.03, "ms", seed=1),
        series(9, 0.02, "ms", seed=2),
    )
    total = [sum(values) for values in zip(process.samples, load.samples, token.samples, strict=True)]
    return StartResult(
        cold=cold,
        resident=0.0 if cold else 1.0,
        process=process,
        load=load,
        first_token=token,
        total=Series.of(total, "ms", WITHIN),
    )


def artifact(
    name: str, mib: float, decode: float, *, kld: float | None = 0.0076, noise: float = 0.01, seed: int = 0
) -> ArtifactResult:
    """A whole result: a file of `mib` MiB that writes `decode` tokens/s."""
    nbytes = int(mib * MIB)
    return ArtifactResult(
        path=name,
        settings=Settings(ctx=640, threads=2),
        model=ModelFacts(
            path=f"/models/{name}",
            format="gguf",
            nbytes=nbytes,
            description="llama ?B Q4_K - Medium",
            tensor_bytes=nbytes - 400_000,
            num_weights=8_900_000,
            trained_ctx=1024,
            generates=True,
            runtime="llama.cpp of llama-cpp-python 0.3.36",
        ),
        starts=[start(True, 3.0), start(False, 1.0)],
        tests=[
            speed(512, 0, decode * 7, noise=noise, seed=seed + 1),
            speed(0, 128, decode, noise=noise, seed=seed + 2),
            speed(0, 128, decode * 0.8, noise=noise, depth=512, seed=seed + 3),
        ],
        memory=MemoryResult(
            peak_rss=int(nbytes * 1.2) + 60 * MIB,
            peak_anon=52 * MIB,
            peak_file=nbytes + 14 * MIB,
            before_anon=30 * MIB,
            before_file=12 * MIB,
        ),
        quality=Quality(kld_mean=kld, top1_agreement=0.948 if kld else None, origin="reference" if kld else None),
        disturbance=watched(),
        energy_source="none: no RAPL here (/sys/class/powercap is absent), no --power-command",
    )


def chat(token_ms: float, *, requests: int = 10, slow: int = 1) -> ScenarioResult:
    """Ten requests, the last `slow` of which miss both objectives."""
    times = [
        RequestTimes(
            prompt_tokens=30 + i,
            ttft_ns=int((40 + i) * token_ms * (40 if i >= requests - slow else 1) * 1e6),
            token_ns=(int(token_ms * (200 if i >= requests - slow else 1) * 1e6),) * 127,
        )
        for i in range(requests)
    ]
    return ScenarioResult(
        name="chat",
        about="a short question in, a paragraph out",
        kind="request",
        headline="ttft_ms",
        n_gen=128,
        requests=10,
        objectives={"ttft_ms": 1000, "tpot_ms": 150},
        sha256="0" * 64,
        samples=[Sample.of_request(one) for one in times],
        notes=["the file has no chat template: the text is sent as it is"],
    )


def wake_up(total_ms: float) -> ScenarioResult:
    """Five starts; its only objective is its headline."""
    return ScenarioResult(
        name="wake-up",
        about="a device wakes up and needs one token",
        kind="start",
        headline="total_ms",
        n_gen=1,
        requests=5,
        objectives={"total_ms": 2000},
        sha256="1" * 64,
        samples=[
            Sample(ttft_ms=t, tpot_ms=None, total_ms=t) for t in (total_ms * f for f in (0.99, 1, 1.01, 1.02, 1.03))
        ],
    )


def predictions(mib: float, *targets: str) -> list[Prediction]:
    """Of a Q4_K file of `mib` MiB."""
    nbytes = int(mib * MIB)
    share = Share(nbytes=nbytes - 400_000, weights=int((nbytes - 400_000) / 0.5625))
    work = Work(file_bytes=nbytes, types={"Q4_K": share}, kv_bytes_per_token=2000.0, depth=500, peak_anon=52 * MIB)
    return [predict(load_target(name), work) for name in targets]


def everything() -> BenchResult:
    """`several` with scenarios and predictions, energy, a scenario that failed, and one that was cut off."""
    result = several()
    first, other, noisy, _ = result.artifacts
    for one, token in ((first, 0.9), (other, 0.8), (noisy, 1.3)):
        one.scenarios = [chat(token), wake_up(250 * token)]
        one.predictions = predictions(one.model.nbytes / MIB, "pi5-8gb", "zynq7020", "snapdragon-7-gen-3")
    other.scenarios[0] = chat(0.8, requests=4, slow=0)
    noisy.scenarios[1] = wake_up(0)
    noisy.scenarios[1].samples = []
    noisy.scenarios[1].failure = Failure(
        message="no answer after 60 s", where=noisy.path, hint="raise --time-limit", code=4
    )
    return result


def several() -> BenchResult:
    """Two quiet artifacts, one on a loaded machine, one that failed; a comparison of the first two."""
    noisy = artifact("out/reference-Q8_0.gguf", 9.17, 820, kld=0.000198, noise=0.2, seed=30)
    noisy.disturbance = watched(1.9, Neighbour("python3", 123, 0.98), Neighbour("cc1plus", 130, 0.92))
    failed = ArtifactResult(
        path="out/huge.gguf",
        settings=Settings(ctx=640, threads=2),
        failure=Failure(
            message="llama.cpp ran out of memory while loading: the limit is 350 MB, the file has 812 MB",
            where="out/huge.gguf",
            hint="raise --memory-limit",
            code=4,
        ),
    )
    first = artifact("out/reference-Q4_K_M.gguf", 5.47, 1102, seed=10)
    other = artifact("out/reference-Q2_K.gguf", 3.70, 1268, kld=0.0927, seed=20)
    compared = [
        Comparison(
            test=result.test,
            first=first.path,
            other=other.path,
            ratios=series(1.12, noise, "ratio", n=7, seed=5),
        )
        for result, noise in zip(first.tests, (0.03, 0.3, 0.02), strict=True)
    ]
    return BenchResult(machine=MACHINE, artifacts=[first, other, noisy, failed], comparisons=compared, seconds=41.2)
