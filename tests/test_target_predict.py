"""Predictions: against a formula written out again, and honest where nothing is known.

Against published speeds: test_predictions.py.
"""

from __future__ import annotations

import json
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efficli.target import Share, Work, load_target, predict, target_names
from efficli.target.predict import SATURATED

RUNNING = [name for name in target_names() if load_target(name).decode]
GB = 1e9


def work(kind: str = "Q4_K", gb: float = 2.0, bits: float = 4.5, **others) -> Work:
    """All weights of one type."""
    return Work(file_bytes=int(gb * GB), types={kind: Share(gb * GB, gb * GB * 8 / bits)}, **others)


def test_the_formula_written_out_again():
    target = load_target("pi5-8gb")
    mixed = Work(
        file_bytes=int(4 * GB),
        types={
            "Q4_K": Share(1.5 * GB, 2.6 * GB),
            "Q2_K": Share(0.33 * GB, 1.0 * GB),
            "Q6_K": Share(0.4 * GB, 0.5 * GB),
        },
        kv_bytes_per_token=100_000,
        depth=2000,
    )
    seconds = 1.5 / 9.5 + 2 * 1.0 / (4 * 8.2) + 0.4 / 9.5 + 0.2 / 9.5 + 0.002
    slow = 1.5 / 8.3 + 2 * 1.0 / (2 * 7.4) + 0.4 / 8.3 + 0.2 / 8.3 + 0.003
    fast = 1.5 / 12.1 + 2 * 1.0 / (4 * 13.5) + 0.4 / 12.1 + 0.2 / 12.1 + 0.001
    found = predict(target, mixed)
    assert found.decode is not None
    assert found.token_ms is not None
    assert found.decode.value == pytest.approx(1 / seconds)
    assert (found.decode.low, found.decode.high) == (pytest.approx(1 / slow), pytest.approx(1 / fast))
    assert found.token_ms.value == pytest.approx(1000 * seconds)
    assert found.limited_by == "memory"
    assert found.energy_j is not None
    assert found.energy_j.value == pytest.approx(11 * seconds)


def test_two_bits_promise_no_speed():
    for name in RUNNING:
        target = load_target(name)
        if target.decode[0].scales_below_4_bits:
            continue
        weights = 6.6 * GB
        four = predict(target, Work(file_bytes=0, types={"Q4_0": Share(weights * 4.5 / 8, weights)})).decode
        for kind, bits in {"Q2_K": 2.625, "IQ2_XXS": 2.0625, "TQ2_0": 2.0625, "IQ1_S": 1.5625, "IQ3_S": 3.4375}.items():
            found = predict(target, Work(file_bytes=0, types={kind: Share(weights * bits / 8, weights)}))
            assert four is not None
            assert found.decode is not None
            assert found.decode.value <= 1.01 * four.value, (name, kind)
            assert found.decode.low <= four.low, (name, kind)


def test_an_unmeasured_type_below_four_bits_says_so():
    found = predict(load_target("pi4-8gb"), work("IQ2_XS", 0.6, 2.3125))
    assert (
        "IQ2_XS: not measured there; below 4 bits a stock runtime is not taken to be faster than at 4"
        in found.sentences
    )
    assert found.confidence == "estimate"
    assert found.limited_by == "arithmetic of IQ2_XS"
    assert "not measured there" not in " ".join(predict(load_target("pi4-8gb"), work()).sentences[:2])


def test_q2_k_on_a_pi_5_is_as_slow_as_it_was_measured():
    target, bytes_of = load_target("pi5-8gb"), {"Q2_K": Share(2.77 * GB, 6.6 * GB)}
    two = predict(target, Work(file_bytes=0, types=bytes_of, threads=2))
    assert two.decode is not None
    assert two.decode.value == pytest.approx(1.31, rel=0.06)
    four = predict(target, Work(file_bytes=0, types=bytes_of, threads=4))
    assert four.decode is not None
    assert four.decode.low == pytest.approx(two.decode.low, rel=0.01)
    assert four.decode.value < 2 * two.decode.value
    assert any("1.31 tokens/s" in text for text in four.sentences)


def test_fewer_threads_than_calibrated_are_slower_until_memory_is_what_limits():
    target = load_target("pi5-8gb")
    four, three, two, one = (predict(target, work(threads=threads)) for threads in (4, 3, 2, 1))
    ends = {}
    for threads, found in {4: four, 3: three, 2: two, 1: one}.items():
        assert found.decode is not None
        ends[threads] = found.decode
    assert ends[3].value == ends[4].value
    assert ends[2].value == pytest.approx(ends[4].value * 2 / 4 / 0.7, rel=0.01)
    assert ends[1].value == pytest.approx(ends[2].value / 2, rel=0.01)
    assert ends[2].low == pytest.approx(ends[4].low / 2, rel=0.01)
    assert ends[2].high == pytest.approx(ends[4].high * 2 / 4 / 0.6, rel=0.01)
    assert "calibrated with 4 threads, not 2" in two.sentences
    assert predict(target, work(threads=64)).decode == four.decode
    assert "calibrated with" not in " ".join(four.sentences)


# tokens/s with some threads, and with those of the calibration: microsoft/T-MAC docs/profiling_data.md (llama.cpp on an
# AGX Orin, an M2 Ultra and an i7-1065G7) and potato-os/core benchmarks/mnn_spike_results.md (ik_llama.cpp on a Pi 5)
SWEEPS = [
    (1, 12, 1.04, 7.42), (1, 12, 0.79, 7.08), (1, 12, 1.62, 12.34), (1, 8, 3.82, 22.06), (1, 8, 5.65, 31.57),
    (1, 4, 6.49, 22.09), (1, 4, 5.65, 14.85), (1, 4, 2.70, 7.50), (1, 4, 2.50, 6.52), (1, 4, 1.9, 6.0),
    (2, 4, 3.8, 6.0), (1, 4, 2.1, 5.0), (2, 4, 4.1, 5.0),
]  # fmt: skip


def test_what_few_threads_reach_is_what_was_seen_elsewhere():
    times = [few / full * of / threads for threads, of, few, full in SWEEPS]
    assert 1 / SATURATED.value == pytest.approx(statistics.median(times), abs=0.05)
    assert 1 / SATURATED.high <= min(times)
    assert max(times) <= 1.02 / SATURATED.low


def test_a_small_model_is_bound_by_overhead_and_says_so():
    found = predict(load_target("jetson-orin-nano"), work(gb=0.02))
    assert found.limited_by == "overhead"
    assert any("of a token is overhead" in text for text in found.sentences)


def test_prefill_only_where_it_was_measured():
    q4 = {"Q4_K": Share(1.4 * GB, 2.3 * GB), "F32": Share(1e6, 0.25e6)}
    pi5, pi4 = (predict(load_target(name), Work(file_bytes=0, types=q4)) for name in ("pi5-8gb", "pi4-8gb"))
    assert pi5.prefill is not None
    assert pi4.prefill is not None
    assert 28 <= pi5.prefill.value <= 32
    assert 4.1 <= pi4.prefill.value <= 4.4
    first = pi5.ttft_ms(300)
    assert first is not None
    assert pi5.token_ms is not None
    assert first.value == pytest.approx(300 / pi5.prefill.value * 1000 + pi5.token_ms.value)
    assert first.low < first.value < first.high
    other = predict(load_target("pi5-8gb"), work("Q8_0", 1.0, 8.5))
    assert (other.prefill, other.ttft_ms(10)) == (None, None)
    assert "prefill is not predicted: Q8_0 was not measured there" in other.sentences
    phone = predict(load_target("snapdragon-8-gen-3"), work())
    assert phone.prefill is None
    assert any(text.startswith("prefill is not predicted: ") for text in phone.sentences)


def test_where_nothing_is_known_nothing_is_said():
    found = predict(load_target("pic64-hpsc"), work())
    assert (found.decode, found.token_ms, found.energy_j, found.prefill, found.confidence) == (None,) * 5
    assert found.sentences[0].startswith("decode speed is not known")
    chip = predict(load_target("gr740"), work())
    assert chip.decode is None
    assert chip.sentences[0].startswith("does not run there: big-endian")
    runtime = predict(load_target("pi5-8gb"), work(), "onnxruntime")
    assert runtime.decode is None
    assert runtime.sentences[0].startswith("decode speed with onnxruntime is not known")


MIB = 1 << 20


@pytest.mark.parametrize(
    ("mib", "anon", "verdict"),
    [(2000, 800, "fits"), (2000, 900, "tight"), (3340, 0, "tight"), (3400, 100, "no"), (100, 4000, "no")],
)
def test_what_fits(mib, anon, verdict):
    # pi5-4gb: 3340 MiB usable (3200 - 3470); fits up to 2880
    file = Work(file_bytes=mib * MIB, types={}, peak_anon=anon * MIB)
    found = predict(load_target("pi5-4gb"), file).memory
    assert (found.verdict, found.anon_known) == (verdict, True)
    assert found.need_bytes == (mib + anon) * MIB


def test_unknown_memory_is_the_cache_alone_and_says_so():
    found = predict(load_target("pi5-4gb"), work(kv_bytes_per_token=1000, depth=50))
    assert found.memory.need_bytes == 2 * GB + 50_000
    assert not found.memory.anon_known
    assert any("not counted" in text for text in found.sentences)


def test_reading_the_file_takes_its_bytes_over_the_storage():
    found = predict(load_target("pi5-8gb"), work(gb=1.8)).load_s
    assert list(found) == ["microSD", "NVMe"]
    assert found["microSD"].value == pytest.approx(20)
    assert found["NVMe"].low == pytest.approx(1800 / 800)


def test_it_is_plain_data_marked_as_predicted():
    found = predict(load_target("pi5-8gb"), work())
    data = json.loads(json.dumps(found.to_json()))
    assert data["predicted"] is True
    assert data["target"] == "pi5-8gb"
    assert data["decode"] == {"value": 4.705, "low": 4.099, "high": 6.014}
    assert "BW" in data["formula"]
    assert any("17 points" in text for text in data["sentences"])
    assert predict(load_target("gr740"), work()).to_json()["decode"] is None


@given(
    name=st.sampled_from(RUNNING),
    gb=st.floats(0.01, 50),
    bits=st.floats(1, 32),
    kind=st.sampled_from(["Q2_K", "Q3_K", "Q4_0", "Q4_K", "F16", "TQ1_0"]),
    depth=st.integers(0, 100_000),
    threads=st.none() | st.integers(1, 64),
)
@settings(max_examples=150, deadline=None)
def test_ranges_are_in_order_and_more_work_is_slower(name, gb, bits, kind, depth, threads):
    target = load_target(name)
    small = predict(target, work(kind, gb, bits, kv_bytes_per_token=1e4, depth=depth, threads=threads))
    large = predict(target, work(kind, 2 * gb, bits, kv_bytes_per_token=1e4, depth=depth + 1, threads=threads))
    assert small.decode is not None
    assert large.decode is not None
    assert 0 < small.decode.low <= small.decode.value <= small.decode.high
    assert large.decode.value < small.decode.value
    assert large.decode.low < small.decode.low
