"""Speed results as flat rows with llama-bench's field names, for `--json`, JSON lines and CSV.

Names, order, types and meanings are those of `test::get_fields` in llama.cpp's tools/llama-bench/llama-bench.cpp, so
that its readers (scripts/compare-llama-bench.py) take ours; the figures that llama-bench does not have come after them.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from efficli.bench.figures import NS_PER_S, ArtifactResult, BenchResult, Series, SpeedResult, StartResult

LLAMA_BENCH_FIELDS = (
    "build_commit", "build_number", "cpu_info", "gpu_info", "backends", "model_filename", "model_type", "model_size",
    "model_n_params", "n_batch", "n_ubatch", "n_threads", "cpu_mask", "cpu_strict", "poll", "type_k", "type_v",
    "n_gpu_layers", "n_cpu_moe", "split_mode", "main_gpu", "no_kv_offload", "flash_attn", "devices", "tensor_split",
    "tensor_buft_overrides", "load_mode", "lazy_mode", "embeddings", "no_op_offload", "no_host", "repack", "fit_target",
    "fit_min_ctx", "n_prompt", "n_gen", "n_depth", "test_time", "avg_ns", "stddev_ns", "avg_ts", "stddev_ts",
)  # fmt: skip
"""In llama-bench's order. Its JSON has `samples_ns` and `samples_ts` after them, its CSV has not."""

SAMPLES = ("samples_ns", "samples_ts")

DEFAULTS: Mapping[str, Any] = {
    "build_number": 0,
    "gpu_info": "",
    "backends": "CPU",
    "cpu_mask": "0x0",
    "cpu_strict": False,
    "poll": 50,
    "n_gpu_layers": 0,
    "n_cpu_moe": 0,
    "split_mode": "layer",
    "main_gpu": 0,
    "no_kv_offload": False,
    "devices": "auto",
    "tensor_split": "0.00",
    "tensor_buft_overrides": "none",
    "load_mode": "auto",
    "lazy_mode": "auto",
    "no_op_offload": 0,
    "no_host": False,
    "fit_target": 0,
    "fit_min_ctx": 0,
}
"""What is not a setting here: llama-bench's own defaults, but for the layers on a GPU, of which there are none."""

FLASH_ATTENTION = {"auto": -1, "off": 0, "on": 1}
"""llama.h's `llama_flash_attn_type`."""


def llama_bench_rows(result: BenchResult) -> list[dict[str, Any]]:
    """One flat dict for each SpeedResult. An artifact that failed before its first test has none."""
    return [_row(result, artifact, test) for artifact in result.artifacts for test in artifact.tests]


def to_jsonl(result: BenchResult) -> str:
    """The rows as `llama-bench -o jsonl` prints them, one JSON object a line, and our own fields at the end."""
    rows = (json.dumps(row, ensure_ascii=False, allow_nan=False) for row in llama_bench_rows(result))
    return "".join(f"{row}\n" for row in rows)


def to_csv(result: BenchResult) -> str:
    """The rows as `llama-bench -o csv` prints them: a heading, each value in quotes, 0 and 1 for no and yes.

    Without the samples, as there; a figure that was not measured is empty.
    """
    rows = llama_bench_rows(result)
    names = [name for name in (rows[0] if rows else LLAMA_BENCH_FIELDS) if name not in SAMPLES]
    text = io.StringIO()
    text.write(",".join(names) + "\n")
    writer = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerows([_cell(row[name]) for name in names] for row in rows)
    return text.getvalue()


def _row(result: BenchResult, artifact: ArtifactResult, found: SpeedResult) -> dict[str, Any]:
    values = {
        **DEFAULTS,
        **_machine_and_model(result, artifact),
        **_settings(artifact),
        **_times(found),
        "n_threads": found.test.threads,
    }
    return {name: values[name] for name in (*LLAMA_BENCH_FIELDS, *SAMPLES)} | _ours(artifact, found)


def _machine_and_model(result: BenchResult, artifact: ArtifactResult) -> dict[str, Any]:
    model, machine = artifact.model, result.machine
    # a wheel's library knows no commit; llama-bench's readers group runs by this field, and a version groups them too
    build = machine.get("build_commit") or (model.runtime.rpartition(" of ")[2] if model else "unknown")
    return {
        "build_commit": str(build),
        "build_number": int(machine.get("build_number") or 0),
        "cpu_info": str(machine.get("cpu_info") or ""),
        # as it was given, as llama-bench has it: its readers take rows of another file name for another model
        "model_filename": artifact.path,
        "model_type": model.description if model else "",
        "model_size": model.tensor_bytes if model else 0,
        "model_n_params": model.num_weights if model else 0,
        "embeddings": bool(model and not model.generates),
    }


def _settings(artifact: ArtifactResult) -> dict[str, Any]:
    settings = artifact.settings
    if settings is None:
        raise ValueError(f"{artifact.path} has results and no settings")
    return {
        "n_batch": settings.batch,
        "n_ubatch": settings.ubatch,
        "type_k": settings.cache_type_k,
        "type_v": settings.cache_type_v,
        "flash_attn": FLASH_ATTENTION[settings.flash_attn],
        "repack": settings.repack,
    }


def _times(found: SpeedResult) -> dict[str, Any]:
    test, ns = found.test, found.samples_ns
    rates = [NS_PER_S * test.tokens / value for value in ns]
    return {
        "n_prompt": test.n_prompt,
        "n_gen": test.n_gen,
        "n_depth": test.n_depth,
        "test_time": _time(found.began),
        "avg_ns": sum(ns) // len(ns),
        "stddev_ns": int(_stdev(ns)),
        "avg_ts": round(sum(rates) / len(rates), 6),
        "stddev_ts": round(_stdev(rates), 6),
        "samples_ns": list(ns),
        "samples_ts": [round(rate, 6) for rate in rates],
    }


def _ours(artifact: ArtifactResult, found: SpeedResult) -> dict[str, Any]:
    """What llama-bench does not measure; None where it was not measured here either."""
    rate, tpot, memory = found.rate.estimate, found.tpot, artifact.memory
    cold, warm = _start(artifact, cold=True), _start(artifact, cold=False)
    return {
        "artifact": artifact.path,
        "model_bytes": artifact.model and artifact.model.nbytes,
        "runtime": artifact.model and artifact.model.runtime,
        "n_ctx": artifact.settings and artifact.settings.ctx,
        "n_samples": rate.n,
        "median_ts": _rounded(rate.median),
        "low_ts": _rounded(rate.low),
        "high_ts": _rounded(rate.high),
        "confidence": _rounded(rate.confidence),
        "steady": found.rate.steady,
        "disturbed": None if artifact.disturbance is None else bool(artifact.disturbance.lines),
        "ttft_ms": _median(found.ttft),
        "tpot_ms_p50": _rounded(tpot.p50) if tpot else None,
        "tpot_ms_p95": _rounded(tpot.p95) if tpot else None,
        "tpot_ms_p99": _rounded(tpot.p99) if tpot else None,
        "energy_j_per_token": _median(found.energy),
        "load_cold_ms": _median(cold.load) if cold else None,
        "load_warm_ms": _median(warm.load) if warm else None,
        "start_cold_ms": _median(cold.total) if cold else None,
        "start_warm_ms": _median(warm.total) if warm else None,
        "peak_rss_bytes": memory and memory.peak_rss,
        "peak_rss_anon_bytes": memory and memory.peak_anon,
        "peak_rss_file_bytes": memory and memory.peak_file,
        "kld_mean": artifact.quality and artifact.quality.kld_mean,
        "top1_agreement": artifact.quality and artifact.quality.top1_agreement,
    }


def _start(artifact: ArtifactResult, *, cold: bool) -> StartResult | None:
    return next((start for start in artifact.starts if start.cold is cold), None)


def _time(iso: str) -> str:
    """llama-bench's form, seconds and a Z: 2025-01-31T12:00:00Z."""
    moment = datetime.fromisoformat(iso)
    return moment.replace(tzinfo=moment.tzinfo or UTC).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _stdev(values: Sequence[float]) -> float:
    """Of a sample; 0 for one value, as in llama-bench."""
    if len(values) < 2:
        return 0.0
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _median(series: Series | None) -> float | None:
    return _rounded(series.estimate.median) if series else None


def _rounded(value: float) -> float:
    """Eight significant digits."""
    return float(f"{value:.8g}")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return str(int(value) if isinstance(value, bool) else value)
