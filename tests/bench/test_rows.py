"""Rows with llama-bench's names: what its readers take, and what the numbers in them mean."""

from __future__ import annotations

import csv
import io
import json
import sqlite3
import statistics
from dataclasses import replace

import pytest

from efficli.bench.rows import LLAMA_BENCH_FIELDS, llama_bench_rows, to_csv, to_jsonl
from tests.bench.made_results import artifact, everything, several

# `test::get_fields` and `get_field_type` of llama.cpp's tools/llama-bench/llama-bench.cpp, as llama-cpp-python 0.3.36
# has it; lazy_mode is the newest of them.
TYPES = {
    "build_commit": str, "build_number": int, "cpu_info": str, "gpu_info": str, "backends": str, "model_filename": str,
    "model_type": str, "model_size": int, "model_n_params": int, "n_batch": int, "n_ubatch": int, "n_threads": int,
    "cpu_mask": str, "cpu_strict": bool, "poll": int, "type_k": str, "type_v": str, "n_gpu_layers": int,
    "n_cpu_moe": int, "split_mode": str, "main_gpu": int, "no_kv_offload": bool, "flash_attn": int, "devices": str,
    "tensor_split": str, "tensor_buft_overrides": str, "load_mode": str, "lazy_mode": str, "embeddings": bool,
    "no_op_offload": int, "no_host": bool, "repack": bool, "fit_target": int, "fit_min_ctx": int, "n_prompt": int,
    "n_gen": int, "n_depth": int, "test_time": str, "avg_ns": int, "stddev_ns": int, "avg_ts": float,
    "stddev_ts": float, "samples_ns": list, "samples_ts": list,
}  # fmt: skip

# scripts/compare-llama-bench.py: the columns of its database, and those of them that a row must have.
DATABASE = (
    "build_commit TEXT, build_number INTEGER, cpu_info TEXT, gpu_info TEXT, backends TEXT, model_filename TEXT, "
    "model_type TEXT, model_size INTEGER, model_n_params INTEGER, n_batch INTEGER, n_ubatch INTEGER, "
    "n_threads INTEGER, cpu_mask TEXT, cpu_strict INTEGER, poll INTEGER, type_k TEXT, type_v TEXT, "
    "n_gpu_layers INTEGER, split_mode TEXT, main_gpu INTEGER, no_kv_offload INTEGER, flash_attn INTEGER, "
    "tensor_split TEXT, tensor_buft_overrides TEXT, load_mode TEXT, embeddings INTEGER, no_op_offload INTEGER, "
    "n_prompt INTEGER, n_gen INTEGER, n_depth INTEGER, test_time TEXT, avg_ns INTEGER, stddev_ns INTEGER, "
    "avg_ts REAL, stddev_ts REAL, n_cpu_moe INTEGER, fit_target INTEGER, fit_min_ctx INTEGER"
)
KEYS = (
    "cpu_info", "gpu_info", "backends", "n_gpu_layers", "n_cpu_moe", "tensor_buft_overrides", "model_filename",
    "model_type", "n_batch", "n_ubatch", "embeddings", "cpu_mask", "cpu_strict", "poll", "n_threads", "type_k",
    "type_v", "load_mode", "no_kv_offload", "split_mode", "main_gpu", "tensor_split", "flash_attn", "n_prompt",
    "n_gen", "n_depth", "fit_target", "fit_min_ctx",
)  # fmt: skip


@pytest.mark.parametrize("result", [several(), everything()], ids=["several", "everything"])
def test_names_order_and_types_are_llama_benchs(result):
    for row in map(json.loads, to_jsonl(result).splitlines()):
        assert list(row)[: len(TYPES)] == list(TYPES)
        assert {name: type(row[name]) for name in TYPES} == TYPES
    assert list(LLAMA_BENCH_FIELDS) == list(TYPES)[:-2]


def as_its_script_reads(parsed):
    """A database of rows as scripts/compare-llama-bench.py makes it from JSON lines or CSV."""
    connection = sqlite3.connect(":memory:")
    columns = [column.split()[0] for column in DATABASE.split(", ")]
    connection.execute(f"CREATE TABLE llama_bench({DATABASE})")
    for row in parsed:
        assert row.keys() >= {*KEYS, "build_commit", "test_time", "avg_ts"}
        known = {name: value for name, value in row.items() if name in columns}
        places = ", ".join("?" * len(known))
        connection.execute(f"INSERT INTO llama_bench({', '.join(known)}) VALUES({places})", tuple(known.values()))
    return connection


@pytest.mark.parametrize("form", [to_jsonl, to_csv])
def test_its_script_compares_two_builds(form):
    """Its own query: rows of two builds that agree in every key property belong together."""
    old, new = several(), several()
    for one in new.artifacts:
        one.model = one.model and replace(one.model, runtime="llama.cpp of llama-cpp-python 0.3.37")
    texts = [form(old), form(new)]
    read = (lambda text: map(json.loads, text.splitlines())) if form is to_jsonl else lines_of_csv
    with as_its_script_reads([row for text in texts for row in read(text)]) as connection:
        found = connection.execute(
            "SELECT tb.n_prompt, tb.n_gen, tb.n_depth, AVG(tb.avg_ts), AVG(tc.avg_ts) FROM llama_bench tb "
            f"JOIN llama_bench tc ON {' AND '.join(f'tb.{key} = tc.{key}' for key in KEYS)} "
            "AND tb.build_commit = 'llama-cpp-python 0.3.36' AND tc.build_commit = 'llama-cpp-python 0.3.37' "
            "GROUP BY tb.n_gen, tb.n_prompt, tb.n_depth ORDER BY tb.n_gen, tb.n_prompt, tb.n_depth"
        ).fetchall()
        flags = connection.execute("SELECT DISTINCT embeddings, cpu_strict, no_kv_offload FROM llama_bench").fetchall()
    connection.close()
    assert [row[:3] for row in found] == [(512, 0, 0), (0, 128, 0), (0, 128, 512)]
    assert all(before == after > 0 for *_, before, after in found)
    assert flags == [(0, 0, 0)]  # as numbers: the text "False" would be true to it


def lines_of_csv(text):
    return csv.DictReader(io.StringIO(text))


def test_csv_is_quoted_as_llama_bench_quotes_and_says_the_same():
    result = everything()
    heading, first, *_ = to_csv(result).splitlines()
    assert '"' not in heading and first.startswith('"') and first.endswith('"')
    for row, cells in zip(llama_bench_rows(result), lines_of_csv(to_csv(result)), strict=True):
        assert list(cells) == [name for name in row if name not in ("samples_ns", "samples_ts")]
        for name, cell in cells.items():
            value = row[name]
            if value is None:
                assert cell == ""
            elif isinstance(value, bool | int | float):
                assert float(cell) == value
            else:
                assert cell == value


def test_a_quote_in_a_name_is_doubled():
    result = several()
    result.artifacts[0].path = 'a "b", c.gguf'
    assert next(lines_of_csv(to_csv(result)))["artifact"] == 'a "b", c.gguf'
    assert '"a ""b"", c.gguf"' in to_csv(result)


def test_the_numbers_are_those_of_the_samples():
    row = llama_bench_rows(several())[1]
    ns, rates = row["samples_ns"], [128e9 / value for value in row["samples_ns"]]
    assert row["n_gen"] == 128 and row["samples_ts"] == pytest.approx(rates, abs=1e-6)
    assert row["avg_ns"] == sum(ns) // 5 and row["avg_ts"] == pytest.approx(statistics.fmean(rates))
    assert row["stddev_ns"] == pytest.approx(statistics.stdev(ns), abs=1)
    assert row["stddev_ts"] == pytest.approx(statistics.stdev(rates), rel=1e-6)
    assert row["median_ts"] == pytest.approx(statistics.median(rates))
    assert (row["low_ts"], row["high_ts"]) == pytest.approx((min(rates), max(rates)))
    assert row["confidence"] == 0.9375 and row["n_samples"] == 5
    assert row["test_time"] == "2025-11-23T13:20:05Z"
    assert row["model_filename"] == several().artifacts[0].path  # as it was given


def test_our_own_figures_follow():
    rows = llama_bench_rows(everything())
    prefill, decode = rows[0], rows[1]
    assert prefill["ttft_ms"] == pytest.approx(prefill["samples_ns"][4] / 1e6, rel=0.05)
    assert decode["ttft_ms"] is None and prefill["tpot_ms_p50"] is None
    assert decode["tpot_ms_p50"] <= decode["tpot_ms_p95"] <= decode["tpot_ms_p99"]
    assert prefill["load_cold_ms"] > 2 * prefill["load_warm_ms"]
    assert prefill["start_cold_ms"] > prefill["load_cold_ms"]
    assert prefill["peak_rss_anon_bytes"] == 52 << 20 and prefill["kld_mean"] == 0.0076
    assert (prefill["disturbed"], rows[6]["disturbed"]) == (False, True)
    assert (prefill["steady"], rows[6]["steady"]) == (True, False)


def test_what_was_not_measured_is_null():
    result = several()
    bare = result.artifacts[0]
    bare.starts, bare.memory, bare.quality, bare.disturbance = [], None, None, None
    row = llama_bench_rows(result)[0]
    for name in ("load_cold_ms", "peak_rss_bytes", "kld_mean", "disturbed", "energy_j_per_token"):
        assert row[name] is None


def test_without_results_there_are_no_rows():
    result = several()
    result.artifacts = result.artifacts[-1:]
    assert llama_bench_rows(result) == [] and to_jsonl(result) == ""
    assert to_csv(result) == ",".join(LLAMA_BENCH_FIELDS) + "\n"


def test_settings_are_told():
    result = several()
    one = artifact("a.gguf", 5, 100)
    one.settings = replace(
        one.settings, cache_type_k="q8_0", cache_type_v="q4_0", flash_attn="on", repack=False, ctx=99
    )
    result.artifacts = [one]
    row = llama_bench_rows(result)[0]
    assert (row["type_k"], row["type_v"], row["flash_attn"], row["repack"]) == ("q8_0", "q4_0", 1, False)
    assert (row["n_batch"], row["n_ubatch"], row["n_ctx"], row["n_threads"]) == (2048, 512, 99, 2)


def test_the_result_carries_them():
    result = everything()
    told = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert told["results"] == json.loads(json.dumps(llama_bench_rows(result)))
