"""Predicted against published speeds: the limits of benchmarks/predictions.py, and that no row predicts itself."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import pytest

from efficli.planning.model import plan_files
from efficli.target import Share, Work, active_bytes, load_target, predict
from tests.planning.weightless import REFERENCE, copy_without_weights

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
MODULES = ("predictions", "published", "runner", "machine")


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """The benchmark, imported as its command imports it."""
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("predictions")
    sys.path.remove(str(BENCHMARKS))
    for name in MODULES:
        sys.modules.pop(name)


@pytest.fixture(scope="module")
def cases(script: ModuleType) -> list[Any]:
    """Every published row, its bytes asked of llama.cpp now."""
    return script.all_cases({subject: script.ask(subject) for subject in script.subjects()})


@pytest.fixture(scope="module")
def told(script: ModuleType, cases: list[Any]) -> list[dict[str, Any]]:
    """Every row with its prediction."""
    found: list[dict[str, Any]] = script.evaluate(cases)
    return found


def test_half_of_the_rows_are_within_15_percent_and_nine_of_ten_within_40(script, told):
    errors = [abs(row["error"]) for row in told if row["counted"]]
    assert len(errors) >= 35
    assert median(errors) <= 0.15
    assert sum(error > 0.4 for error in errors) <= 0.1 * len(errors)
    assert all(limit.holds for limit in script.limits(told))


def test_all_that_counts_is_counted(script, told):
    family = [row for row in told if row["family"]]
    devices = [row["device"] for row in family]
    assert {row["device"] for row in family if not row["counted"]} == {
        device for device in devices if devices.count(device) == 1
    }
    assert (len(family), devices.count("Pi 5"), devices.count("Pi 4")) == (38, 21, 9)
    for row in told:
        runs_elsewhere = any(word in row["runtime"] for word in ("T-MAC", "MNN", "CUDA", "Metal", "rustllm"))
        assert row["family"] != runs_elsewhere, row


def test_the_kept_result_is_what_comes_out_today(told):
    kept = json.loads((BENCHMARKS / "results/predictions.json").read_text())
    assert kept["predictions"] == json.loads(json.dumps(told))
    assert kept["summary"]["n"] == sum(row["counted"] for row in told)


def test_the_split_is_not_a_lucky_one(script, cases):
    drawn = script.random_halves(cases, number=40)
    assert drawn["median_error"][1] <= 0.15
    assert drawn["share_far"][2] <= 0.1


def test_a_row_has_no_part_in_its_own_prediction(script, cases, told):
    for index, case in enumerate(cases):
        if told[index]["counted"]:
            changed = script.Case(row=replace(case.row, tokens_per_s=case.row.tokens_per_s * 1.7), types=case.types)
            device = [changed if other is case else other for other in script.by_device(cases)[case.row.device]]
            (training,) = (training for training, held_out in script.folds(device) if changed in held_out)
            assert changed not in training
            assert changed.with_constants(script.fit(training)).to_json() == told[index]["predicted"]


def test_the_profiles_hold_what_all_rows_of_their_device_say(script, cases):
    fitted = 0
    for device, rows in script.by_device(cases).items():
        names = {case.row.target for case in rows}
        speeds = {json.dumps(load_target(name).to_json()["decode"]) for name in names}
        assert len(speeds) == 1, f"{device}: {names} do not share their constants"
        found = script.fit(rows)
        if found is None:  # types below 4 bits alone
            continue
        speed = load_target(rows[0].row.target).decode[0]
        assert speed.gb_per_s.value == pytest.approx(found.gb_per_s, rel=0.015), device
        assert speed.gb_per_s.range.low <= found.gb_per_s <= speed.gb_per_s.range.high
        assert speed.gb_per_s.n == found.n
        own = {kind: floor.gops_per_thread for floor in speed.floors for kind in floor.types}
        for floor in found.floors:
            assert own[floor.types[0]].value == pytest.approx(floor.gops_per_thread.value, rel=0.015), device
        fitted += 1
    assert fitted == 6


def test_a_profile_s_range_holds_the_rows_but_two_of_2024(cases):
    missed = []
    for case in cases:
        found, (low, high) = case.predicted(load_target(case.row.target)), case.row.ends
        if not (found.low <= high and low <= found.high):
            missed.append((case.row.board, case.row.model, case.row.year, case.row.runtime))
    assert missed == [
        ("Pi 5 4 GB", "qwen1.5-1.8B", 2024, "ollama 0.1.41"),
        ("Pi 5 4 GB", "phi3-3.8B", 2024, "ollama 0.1.41"),
        ("Pi 5 16 GB", "Qwen3.5-4B", 2026, "MNN"),
    ]


def test_other_runtimes_give_their_points_back(told):
    others = [row for row in told if not row["family"] and row["runtime"] != "MNN"]
    assert len(others) == 11
    assert median(abs(row["error"]) for row in others) <= 0.05
    assert max(abs(row["error"]) for row in others) <= 0.26


def test_bytes_are_those_of_a_planned_file(script, tmp_path):
    folder = copy_without_weights(REFERENCE, tmp_path / "model")  # for a vocabulary, which is padded
    (folder / "config.json").write_text(json.dumps(script.configs()["TinyLlama-1.1B"]))
    plan = plan_files(str(folder), types=["Q4_K_M"])
    (file,) = plan.files
    assert script.ask("TinyLlama-1.1B/Q4_K_M") == active_bytes(file.tensors, plan.metadata).types


def test_published_sizes_of_files_agree_with_the_shapes(script, cases):
    # GiB that llama-bench prints of these files (geerlingguy/ai-benchmarks 51), without the embedding where it is apart
    found = {f"{case.row.model} {case.row.type}": sum(s.nbytes for s in case.types.values()) for case in cases}
    assert found["Llama-3.2-3B Q4_K_M"] / 2**30 == pytest.approx(1.87, abs=0.01)
    embedding = 32000 * 2048 * 4.5 / 8
    assert (found["TinyLlama-1.1B Q4_K_M"] + embedding) / 2**20 == pytest.approx(636.18, abs=0.5)


def test_file_size_instead_of_active_bytes_would_be_wrong_by_a_factor():
    file = Work(file_bytes=int(10.3e9), types={"Q2_K": Share(10.3e9, 30.5e9)})
    found = predict(load_target("pi5-16gb"), file).decode
    assert found is not None
    assert found.high < 7.99 / 5
