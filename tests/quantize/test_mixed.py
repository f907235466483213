"""quantize.mixed from a checkpoint to a file: budgets, targets, the same bytes twice, plans and rehearsals."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

import efficli
from efficli.checkpoint import open_checkpoint
from efficli.checkpoint.sidecar import IMATRIX
from efficli.checkpoint.tensor_types import TENSOR_TYPES
from efficli.data import committed
from efficli.errors import FitError, UsageError
from efficli.export.gguf.imatrix import read_imatrix
from efficli.export.gguf.job import prepare
from efficli.export.gguf.types import TypeRequest
from efficli.pipeline.file_view import GgufView
from efficli.pipeline.fits import fit_of
from efficli.pipeline.result import ExportResult
from efficli.target import load_target
from tests.lost_nothing import lost_nothing
from tests.pico import write_llama
from tests.precision.here import in_this_process
from tests.quantize.few_tokens import (
    QUICK,
    TWIN,
    exported,
    mixed,
    real_children,
    recipe,
    small_target,
    told,
    types_in,
)

__all__ = ["in_this_process"]


@pytest.fixture(scope="module", autouse=True)
def _here(in_this_process: None) -> None:
    """No child of the method; those of the export are what they are."""


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics and curves, for all tests of the module."""
    return tmp_path_factory.mktemp("kept")


# Budgets


def test_the_file_is_within_the_budget_and_fills_it(kept: Path, tmp_path: Path) -> None:
    budget = 400_000
    outcome = mixed(tmp_path / "small", kept, max_bytes=budget)
    path = exported(tmp_path / "small", tmp_path / "out")
    assert 0.995 * budget <= path.stat().st_size <= budget
    assert outcome.allocation is not None and outcome.allocation.imatrix == IMATRIX
    found = types_in(path)
    assert {name: found[name] for name in outcome.allocation.types} == outcome.allocation.types
    record = json.loads((tmp_path / "small" / "allocation.json").read_text())
    assert path.stat().st_size <= record["nbytes"] <= path.stat().st_size + 450 and record["limit"] == budget
    assert {name: row["type"] for name, row in record["tensors"].items()} == outcome.allocation.types
    assert all(np.isfinite(row["loss"]) and row["loss"] >= 0 for row in record["tensors"].values())
    lines = (tmp_path / "small" / TENSOR_TYPES).read_text().splitlines()
    assert len(lines) == len(outcome.allocation.types)
    for name, kind in outcome.allocation.types.items():
        (line,) = [line for line in lines if re.search(line.partition("=")[0], name)]
        assert line.partition("=")[2].upper() == kind
    assert (tmp_path / "small" / "frontier.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    old, new = open_checkpoint(TWIN), open_checkpoint(tmp_path / "small")
    for name in old.tensors:
        np.testing.assert_array_equal(old.read(name), new.read(name))


def test_bits_of_a_weight_are_counted_as_llama_quantize_does(kept: Path, tmp_path: Path) -> None:
    mixed(tmp_path / "small", kept, bpw=4.9)
    tensors = GGUFReader(exported(tmp_path / "small", tmp_path / "out")).tensors
    bits = 8 * sum(tensor.n_bytes for tensor in tensors) / sum(tensor.n_elements for tensor in tensors)
    assert 0.995 * 4.9 <= bits <= 4.9


def test_an_impossible_budget_names_the_smallest_and_that_works(kept: Path, tmp_path: Path) -> None:
    with pytest.raises(FitError, match="the smallest possible file has") as raised:
        mixed(tmp_path / "a", kept, max_bytes="100kB")
    assert raised.value.exit_code == 4
    size = int(re.findall(r"\((\d+) bytes\), above", raised.value.message)[0])
    with pytest.raises(FitError):
        mixed(tmp_path / "b", kept, max_bytes=size - 1)
    for name in ("c", "A-name-of-quite-some-length-with-Words-and-7B-numbers-in-it-v1.25"):
        mixed(tmp_path / name, kept, max_bytes=size)
        assert size - 600 <= exported(tmp_path / name, tmp_path / f"{name}-out").stat().st_size <= size


def test_a_budget_above_f16_says_so_and_writes_f16(kept: Path, tmp_path: Path) -> None:
    outcome = mixed(tmp_path / "small", kept, max_bytes="1GiB")
    assert "above" in told(outcome, "budget of 1.00 GiB") and "F16" in told(outcome, "budget of 1.00 GiB")
    assert outcome.allocation is not None and set(outcome.allocation.types.values()) == {"F16"}


@pytest.mark.slow
def test_a_low_budget_of_a_model_whose_table_is_not_its_head(kept: Path, tmp_path: Path) -> None:
    """What is chosen can be written: rows that are looked up have no importance matrix, and no type that needs one."""
    model = write_llama(tmp_path / "wide", hidden=256, ffn=256, layers=1, dtype="BF16", tie=False, vocab=1024)
    with pytest.raises(FitError) as raised:
        mixed(tmp_path / "a", tmp_path / "kept", model, max_bytes=1000)
    size = int(re.findall(r"\((\d+) bytes\), above", raised.value.message)[0])
    mixed(tmp_path / "b", tmp_path / "kept", model, max_bytes=size, loss="mse")
    path = exported(tmp_path / "b", tmp_path / "out")
    assert size - 600 <= path.stat().st_size <= size
    assert types_in(path)["token_embd.weight"] == "Q2_K" and types_in(path)["output.weight"] == "IQ2_XXS"
    assert set(read_imatrix(tmp_path / "b" / IMATRIX)) == GgufView(open_checkpoint(model)).multiplied


@pytest.mark.slow
@pytest.mark.parametrize("like", ["pi4-2gb", "pi5-4gb"])
def test_what_fits_a_target_fits_by_the_judgement_of_plan(like: str, kept: Path, tmp_path: Path) -> None:
    """A Pi 5 copies weights of some types, which then count twice; on both more memory is never a worse file."""
    ckpt, losses, sizes = open_checkpoint(TWIN), [], []
    for usable in (6.1, 6.25, 6.5, 6.8, 64):
        board = small_target(tmp_path, usable, like=like)
        folder = tmp_path / f"{usable}"
        outcome = mixed(folder, kept, fit=str(board), ctx_size=64)
        assert outcome.allocation is not None and outcome.allocation.losses is not None
        losses.append(sum(outcome.allocation.losses.values()))
        job = prepare(ckpt, [TypeRequest(type="MIXED", given=outcome.allocation.types)], own={})
        found = fit_of(load_target(str(board)), job, 64)
        assert found.verdict == "FIT"
        sizes.append(found.need_bytes / found.comfortable_bytes)
    assert losses == sorted(losses, reverse=True) and len(set(losses)) == 5
    assert min(sizes[:3]) > 0.99
    with pytest.raises(FitError, match=r"the smallest possible file has .* above the budget of") as raised:
        mixed(tmp_path / "none", kept, fit=str(small_target(tmp_path, 5.9, like=like)), ctx_size=64)
    assert raised.value.exit_code == 4
    with pytest.raises(FitError, match=r"a context of 64 takes .* beside the file"):
        mixed(tmp_path / "less", kept, fit=str(small_target(tmp_path, 4, like=like)), ctx_size=64)


@pytest.mark.slow
def test_swaps_stay_within_what_fits(kept: Path, tmp_path: Path) -> None:
    board = small_target(tmp_path, 6.3)
    outcome = mixed(tmp_path / "small", kept, fit=str(board), ctx_size=64, swaps=20)
    assert re.search(r"in (1\d|2\d) trials", told(outcome, "KL divergence"))
    assert outcome.allocation is not None
    given = [TypeRequest(type="MIXED", given=outcome.allocation.types)]
    job = prepare(open_checkpoint(TWIN), given, own={})
    assert fit_of(load_target(str(board)), job, 64).verdict == "FIT"


def test_a_target_decides_which_types_there_are(kept: Path, tmp_path: Path) -> None:
    board = small_target(tmp_path, 64, more="lacks: [IQ4_NL, MXFP4]\nlacks_source: drawn\n")
    outcome = mixed(tmp_path / "a", kept, max_bytes=400_000, target=str(board))
    assert outcome.allocation is not None
    assert not {"IQ4_NL", "MXFP4"} & set(outcome.allocation.types.values())
    with pytest.raises(UsageError, match="types: IQ4_NL: the target's runtime cannot load them") as raised:
        mixed(tmp_path / "b", kept, max_bytes=400_000, target=str(board), types=["IQ4_NL", "Q8_0"])
    assert raised.value.exit_code == 2
    profile = load_target("pi5-4gb")
    slow = {kind for speed in profile.decode[:1] for floor in speed.floors for kind in floor.types}
    assert slow
    outcome = mixed(tmp_path / "c", kept, max_bytes=400_000, target="pi5-4gb")
    assert outcome.allocation is not None and not slow & set(outcome.allocation.types.values())
    assert sorted(slow)[0] in told(outcome, "more slowly than it reads them")


def test_groups_share_types(kept: Path, tmp_path: Path) -> None:
    outcome = mixed(tmp_path / "small", kept, max_bytes=400_000, harmonize=("qkv", "gate-up"))
    assert outcome.allocation is not None
    types = outcome.allocation.types
    for layer in range(3):
        for names in (("attn_q", "attn_k", "attn_v"), ("ffn_gate", "ffn_up")):
            assert len({types[f"blk.{layer}.{name}.weight"] for name in names}) == 1


def test_only_types_that_were_asked_for(kept: Path, tmp_path: Path) -> None:
    outcome = mixed(tmp_path / "small", kept, max_bytes=500_000, types=["q5_1", "q8_0", "Q5_1"])
    assert outcome.allocation is not None
    assert set(outcome.allocation.types.values()) == {"Q5_1", "Q8_0"}


# The same bytes


@pytest.mark.slow
def test_twice_the_same(kept: Path, tmp_path: Path) -> None:
    """Another folder for what is kept: all is computed anew."""
    first, second = (mixed(tmp_path / n, tmp_path / f"kept-{n}", bpw=4.6, swaps=6, loss="kld") for n in ("a", "b"))
    assert first == second
    names = [{p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("a", "b")]
    assert names[0].keys() == names[1].keys()
    assert [name for name in names[0] if names[0][name] != names[1][name]] == []


@pytest.mark.slow
def test_a_run_twice_without_a_cache(tmp_path: Path) -> None:
    """The children as they are; the second time from the recipe in the artifact."""
    steps: dict[str, Any] = {"max_bytes": 420_000, "rounding": "error-feedback", "loss": "auto", "swaps": 4}
    path = recipe(tmp_path, TWIN, **steps)
    with pytest.MonkeyPatch.context() as patch:
        real_children(patch)
        first = efficli.run(path, tmp_path / "one", cache=False, threads=1)
        again = efficli.run(tmp_path / "one" / "recipe.yaml", tmp_path / "two", cache=False, threads=1)
    assert again.files[0].sha256 == first.files[0].sha256
    assert 0.995 * 420_000 <= first.files[0].nbytes <= 420_000


@pytest.mark.slow
def test_quantize_and_export_write_what_export_writes_at_once(tmp_path: Path) -> None:
    """But for the names in its metadata: the tensors are the same bytes."""
    text = tmp_path / "text.txt"
    text.write_text(committed("calibration-code")[:12_000])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFICLI_CACHE_DIR", str(tmp_path / "cache"))
        small = efficli.compress(
            TWIN, tmp_path / TWIN, method="quantize.mixed", options={"max_bytes": "400kB", **QUICK},
            calibration=text, threads=1,
        )  # fmt: skip
        file = exported(tmp_path / TWIN, tmp_path / "apart")
        at_once = efficli.compress(
            TWIN, tmp_path / "at-once", method="quantize.mixed", options={"max_bytes": "400kB", **QUICK},
            calibration=text, export=True, threads=1,
        )  # fmt: skip
    assert isinstance(at_once, ExportResult)
    other = tmp_path / "at-once" / at_once.files[0].name
    assert [(t.name, bytes(t.data)) for t in GGUFReader(file).tensors] == [
        (t.name, bytes(t.data)) for t in GGUFReader(other).tensors
    ]
    assert small.file is not None and small.file.nbytes == file.stat().st_size <= 400_000
    assert other.stat().st_size <= 400_000


# Before weights are read, and rehearsed


def test_a_plan_from_headers_is_within_the_budget(tmp_path: Path) -> None:
    for budget in (320_000, 400_000, 700_000):
        with lost_nothing(tmp_path):
            done = efficli.compress(
                TWIN, tmp_path / "out", method="quantize.mixed", options={"max_bytes": budget}, dry_run=True
            )
        assert done.file is not None and 0.99 * budget <= done.file.nbytes <= budget
    with pytest.raises(FitError, match="the smallest possible file has") as raised:
        efficli.compress(TWIN, tmp_path / "out", method="quantize.mixed", options={"max_bytes": 9000}, dry_run=True)
    assert raised.value.exit_code == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        {"max_bytes": 400_000, "rounding": "error-feedback", "loss": "auto"},
        {"max_bytes": 900_000, "types": ["Q8_0", "F16"]},
        {"fit": "pi5-4gb", "ctx_size": 128, "harmonize": ["qkv"]},
    ],
)
def test_a_rehearsal_goes_through_all_of_it(tmp_path: Path, keys: dict[str, Any]) -> None:
    path = recipe(tmp_path, TWIN, **keys)
    with lost_nothing(tmp_path):
        done = efficli.run(path, tmp_path / "out", rehearsal=True, threads=1)
    assert [step.what for step in done.steps if step.kind in ("pass", "write")] == ["quantize.mixed", "MIXED"]
