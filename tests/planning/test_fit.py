"""Verdicts, limiting terms, largest contexts and speeds against the definitions, written out again by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from efficli.errors import UnsupportedError, UsageError
from efficli.planning.cache import CacheLayer, kv_bytes
from efficli.planning.fit import Fit, fit
from efficli.planning.model import PlannedFile, PlannedModel, plan_files
from efficli.planning.repack import repacked_bytes
from efficli.planning.scratch import read_network, scratch_bytes
from efficli.target import Target, load_target, target_names
from efficli.target.profile import parse_target

MIB = 1 << 20
DEVICE = """
version: 1
about: made up
arch: aarch64
isa: [{isa}]
cores: [{{count: 4, name: core}}]
runs: [gguf, onnx]
{lacks}
ram:
  total_mib: {{value: 9999, source: made up, confidence: vendor}}
  usable_mib: {{value: {value}, low: {low}, high: {high}, source: made up, confidence: vendor}}
bandwidth:
  theoretical: {{value: 10, source: made up, confidence: vendor}}
decode:
  - runtime: {runtime}
    threads: 4
    gb_per_s: {{value: 2, low: 1, high: 4, source: made up, confidence: published}}
    overhead_ms: {{value: 2, low: 1, high: 4, source: made up, confidence: estimate}}
"""


def device(
    low: float, high: float | None = None, *, isa: str = "neon", runtime: str = "llama.cpp", lacks: str = ""
) -> Target:
    """A device with so many MiB for a model."""
    high = low if high is None else high
    text = DEVICE.format(isa=isa, lacks=lacks, value=low, low=low, high=high, runtime=runtime)
    return parse_target(text, "made-up")


@pytest.fixture(scope="module")
def model() -> PlannedModel:
    return plan_files("reference", types=("F16", "Q8_0", "Q4_0", "Q2_K"))


def file(model: PlannedModel, kind: str) -> PlannedFile:
    return next(one for one in model.files if one.type == kind)


def scratch(model: PlannedModel, one: PlannedFile, ctx: int) -> float:
    network = read_network(model.metadata, model.vocab_size)
    kinds = {kind for kind, _, shape in one.tensors.values() if len(shape) == 2}
    return scratch_bytes(network, model.cache, ctx, types=kinds, merges=model.num_merges, threads=4).total.value


def need(model: PlannedModel, one: PlannedFile, ctx: int, isa: str = "neon") -> int:
    """8 layers, keys and values of 2 heads of 64 in 2 bytes, the context in steps of 256."""
    cache = 8 * 2 * 128 * 2 * -(-ctx // 256) * 256
    return one.nbytes + cache + round(scratch(model, one, ctx)) + repacked_bytes(one.tensors, isa.split(", "))


def test_the_reference_has_the_merges_of_its_tokenizer(model: PlannedModel) -> None:
    assert 3000 < model.num_merges < model.vocab_size


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0", "Q2_K"])
@pytest.mark.parametrize("isa", ["neon", "neon, dotprod"])
def test_need_and_its_parts(model: PlannedModel, kind: str, isa: str) -> None:
    one = fit(device(9000, isa=isa), model, file(model, kind), 2000)
    assert one.need_bytes == need(model, file(model, kind), 2000, isa)
    assert one.file_bytes == one.page_cache_bytes == file(model, kind).nbytes
    assert one.kv_bytes == 8 * MIB
    assert one.resident_bytes == one.kv_bytes + round(one.scratch_bytes.value) + one.repacked_bytes
    assert (one.repacked_bytes > 0) == (isa != "neon" and kind != "F16")
    assert one.scratch_bytes.low < one.scratch_bytes.value < one.scratch_bytes.high


def test_verdicts_change_where_the_definition_says(model: PlannedModel) -> None:
    one = file(model, "Q8_0")
    exact = need(model, one, 2048) / MIB
    edges = {
        exact / 0.9 + 1e-6: "FIT",
        exact / 0.9 - 1e-3: "TIGHT",
        exact + 1e-6: "TIGHT",
        exact - 1e-3: "NO",
    }
    assert {low: fit(device(low), model, one, 2048).verdict for low in edges} == edges
    wide = fit(device(exact / 2, exact + 1), model, one, 2048)
    assert (wide.verdict, wide.no_repack) == ("TIGHT", False)


def test_repacked_weights_count_and_can_be_left_out(model: PlannedModel) -> None:
    one, isa = file(model, "Q8_0"), "neon, dotprod"
    once, twice = need(model, one, 2048) / MIB, need(model, one, 2048, isa) / MIB
    assert twice - once == pytest.approx(one.data_nbytes / MIB, rel=0.01)
    found = fit(device(once / 0.9 + 0.01, isa=isa), model, one, 2048)
    assert twice > found.usable_bytes.high / MIB
    assert (found.verdict, found.limited_by, found.no_repack) == ("TIGHT", "repacked weights", True)
    assert found.sentences[0] == "llama.cpp copies 9.03 MiB of weights to repack them; with --no-repack it fits"
    only_just = fit(device(once + 0.01, isa=isa), model, one, 2048)
    assert (only_just.verdict, only_just.no_repack) == ("TIGHT", False)
    assert only_just.sentences[0].endswith("with --no-repack it is tight")
    assert fit(device(once - 0.01, isa=isa), model, one, 2048).verdict == "NO"


def test_the_term_with_which_it_goes_beyond(model: PlannedModel) -> None:
    one = file(model, "Q8_0")
    size, beside = one.nbytes / MIB, scratch(model, one, 2048) / MIB
    found = {low: fit(device(low), model, one, 2048) for low in (size - 1, size + 1, size + beside + 1)}
    assert [(f.verdict, f.limited_by) for f in found.values()] == [
        ("NO", "weights"), ("NO", "compute scratch"), ("NO", "KV cache"),
    ]  # fmt: skip
    assert fit(device(900), model, one, 2048).limited_by == "compute scratch", "the largest, where it fits"
    assert fit(device(900), model, file(model, "F16"), 2048).limited_by == "weights"


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("room", [0.5, 22, 26, 29, 33, 35, 60])
def test_the_largest_context_is_that_of_trying_all(model: PlannedModel, kind: str, room: float) -> None:
    one = file(model, kind)
    found = fit(device(room), model, one, 2048).largest_ctx
    fits = [ctx for ctx in range(1, 2049, 51) if need(model, one, ctx) <= 0.9 * room * MIB]
    assert found >= max(fits, default=0)
    if found:
        assert fit(device(room), model, one, found).verdict == "FIT"
    if found < 2048:
        assert fit(device(room), model, one, found + 1).verdict != "FIT"


def test_tokens_per_second_are_those_of_the_formula(model: PlannedModel) -> None:
    """Tied: the embedding is read as output matrix; half of 2048 positions are 4 MiB of the cache; t0 is 2 ms."""
    one = file(model, "F16")
    nbytes = sum(size for _, size, _ in one.tensors.values()) + 4 * MIB
    found = fit(device(900), model, one, 2048)
    assert found.decode is not None
    assert found.decode.value == pytest.approx(1 / (nbytes / 2e9 + 0.002))
    assert found.decode.low == pytest.approx(1 / (nbytes / 1e9 + 0.004))
    assert found.decode.high == pytest.approx(1 / (nbytes / 4e9 + 0.001))
    assert found.confidence == "estimate", "overhead is more than a tenth"
    assert (found.prefill, found.ttft_ms, found.prompt_tokens) == (None, None, 512)
    fewer = fit(device(900), model, one, 2048, threads=1).decode
    assert fewer is not None
    assert fewer.low < found.decode.low


def test_a_prompt_is_no_longer_than_the_context(model: PlannedModel) -> None:
    pi = load_target("pi5-8gb")
    found = fit(pi, model, plan_files("reference", types=("Q4_K_M",)).files[0], 100)
    assert found.prompt_tokens == 100
    assert found.prefill is not None and found.decode is not None and found.ttft_ms is not None
    expected = 1000 * (100 / found.prefill.value + 1 / found.decode.value)
    assert found.ttft_ms.value == pytest.approx(expected)


def test_a_quantized_cache_takes_and_reads_less(model: PlannedModel) -> None:
    one, target = file(model, "Q4_0"), device(900)
    plain, small = (fit(target, model, one, 2048, type_k=kind, type_v=kind) for kind in ("F16", "Q8_0"))
    assert small.kv_bytes == plain.kv_bytes * 34 // 64
    assert plain.decode is not None and small.decode is not None
    assert small.decode.value > plain.decode.value


def test_what_does_not_run_there(model: PlannedModel) -> None:
    found = fit(load_target("gr740"), model, file(model, "Q4_0"), 2048)
    assert (found.verdict, found.limited_by, found.decode, found.largest_ctx) == ("NO", "runtime", None, 0)
    assert found.sentences[0].startswith("does not run there: big-endian SPARC")
    without = device(900, lacks="lacks: [Q4_0]\nlacks_source: its handbook")
    found = fit(without, model, file(model, "Q4_0"), 2048)
    assert (found.verdict, found.limited_by, found.decode) == ("NO", "type", None)
    assert found.sentences[0] == "its runtime cannot load Q4_0: its handbook"
    assert fit(without, model, file(model, "Q8_0"), 2048).verdict == "FIT"


def test_on_a_gpu_weights_are_there_once_and_stay(model: PlannedModel) -> None:
    one = file(model, "Q4_0")
    found = fit(device(900, isa="neon, dotprod", runtime="llama.cpp CUDA"), model, one, 2048)
    assert (found.repacked_bytes, found.page_cache_bytes) == (0, 0)
    assert found.resident_bytes == found.need_bytes == need(model, one, 2048)


def test_a_model_that_only_reads_has_no_speed_of_writing(model: PlannedModel) -> None:
    reads = replace(model, cache=())
    found = fit(device(900), reads, file(model, "Q4_0"), 512)
    assert (found.kv_bytes, found.decode, found.ttft_ms, found.confidence) == (0, None, None, None)
    assert found.verdict == "FIT"
    assert "writes no text: no speed of decoding" in found.sentences


def test_windows_are_read_and_held_as_llama_cpp_does(model: PlannedModel) -> None:
    near = tuple(CacheLayer("window", 128, 128, 256) for _ in range(7))
    mixed = replace(model, cache=(*near, model.cache[0]))
    one = file(model, "Q4_0")
    found = fit(device(900), mixed, one, 2048)
    assert found.kv_bytes == kv_bytes(mixed.cache, 2048).nbytes < 8 * MIB
    whole = fit(device(900), model, one, 2048)
    assert found.decode is not None and whole.decode is not None
    assert found.decode.value > whole.decode.value


def test_wrong_words(model: PlannedModel) -> None:
    with pytest.raises(UsageError, match="context 0"):
        fit(device(900), model, file(model, "Q4_0"), 0)
    with pytest.raises(UsageError, match="cache type 'q9'"):
        fit(device(900), model, file(model, "Q4_0"), 64, type_k="q9")
    odd = replace(model, cache=(CacheLayer("full", 100, 100),))
    with pytest.raises(UnsupportedError, match="do not divide the 100 values"):
        fit(device(900), odd, file(model, "Q4_0"), 64, type_v="q8_0")


@pytest.mark.parametrize("name", target_names())
def test_every_target_has_a_verdict_that_json_can_hold(model: PlannedModel, name: str) -> None:
    for one in model.files:
        found = fit(load_target(name), model, one, 2048)
        told = json.loads(json.dumps(found.to_json(), allow_nan=False))
        assert told["predicted"] is True
        assert (told["verdict"], told["need_bytes"]) == (found.verdict, found.need_bytes)
        names = {field for field in Fit.__slots__ if field not in ("reasons", "decode", "prefill")}
        assert set(told) == names | {
            "predicted", "fits_without_repacking", "decode_tokens_per_s", "prefill_tokens_per_s"
        }  # fmt: skip
        assert (found.decode is None) == (found.confidence is None)
