"""lowrank.svd against numpy's SVD, Eckart and Young's theorem, and whole models of several families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from efficli import strict_schema
from efficli.catalog import run_method
from efficli.checkpoint import Checkpoint, open_checkpoint
from efficli.checkpoint.sidecar import Sidecar, write_packed, write_sidecar
from efficli.errors import CheckpointError, UnsupportedError, UsageError
from efficli.lowrank.svd import Config, leave, rank_for, rehearsal, truncate
from efficli.method import Context, Outcome
from efficli.ops.llama import LlamaFile
from efficli.strict_yaml import Document
from tests import models, pico
from tests.converted import convert

RANDOM = np.random.default_rng(0)
UP = "model.layers.0.mlp.up_proj.weight"


def plain(weight: np.ndarray, rank: int) -> np.ndarray:
    """Eckart and Young as it is written."""
    u, s, vt = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def run(folder: Path, out: Path, **keys: Any) -> tuple[Checkpoint, Outcome]:
    out.mkdir()
    outcome = run_method("lowrank.svd", open_checkpoint(folder), out, Config(**keys), Context())
    return open_checkpoint(out), outcome


@pytest.mark.parametrize("shape", [(48, 80), (80, 48), (64, 64), (1, 9), (200, 7)])
def test_it_is_the_nearest_matrix_of_its_rank(shape: tuple[int, int]) -> None:
    weight = RANDOM.standard_normal(shape).astype(np.float32)
    values = np.linalg.svd(weight.astype(np.float64), compute_uv=False)
    for rank in {1, min(shape) // 2 or 1, min(shape)}:
        found = truncate(weight, rank)
        assert found.dtype == np.float32 and found.shape == shape
        assert np.abs(found - plain(weight, rank)).max() < 2e-6 * values[0]
        lost = np.square(found.astype(np.float64) - weight).sum()
        assert lost == pytest.approx(np.square(values[rank:]).sum(), rel=1e-5, abs=1e-9 * values[0] ** 2)
        assert np.linalg.matrix_rank(found.astype(np.float64), tol=1e-5 * values[0]) == rank


def test_the_full_rank_is_the_matrix_itself() -> None:
    weight = (RANDOM.standard_normal((40, 64)) * np.logspace(0, -5, 64)).astype(np.float32)
    assert np.abs(truncate(weight, 40) - weight).max() <= np.spacing(np.abs(weight).max())


def test_no_matrix_of_the_rank_is_nearer() -> None:
    weight = RANDOM.standard_normal((30, 20)).astype(np.float32)
    nearest = np.linalg.norm(truncate(weight, 5) - weight)
    for _ in range(50):
        left, right = RANDOM.standard_normal((30, 5)), RANDOM.standard_normal((5, 20))
        best = left @ np.linalg.lstsq(left, weight, rcond=None)[0]
        assert nearest < np.linalg.norm(best - weight)
        assert nearest < np.linalg.norm(weight - left @ right)


def test_ranks_and_what_stays_as_it_is() -> None:
    assert rank_for(1024, 1024, Config(keep=0.5)) == 256
    assert rank_for(4096, 1024, Config(keep=0.25)) == 204  # 0.25 x 819.2
    assert leave(1024, 1024, Config(rank=511)) is None
    assert leave(1024, 1024, Config(rank=512)) == "factors of rank 512 are not smaller than 1024×1024 numbers"
    assert leave(8, 8, Config(keep=0.2)) == "0.2 of 8×8 numbers is less than rank 1"
    for rows, columns in ((64, 64), (100, 7), (3, 5000)):
        rank = rank_for(rows, columns, Config(keep=0.999))
        assert rank * (rows + columns) < rows * columns


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "neither 'rank' nor 'keep', expected one of them"),
        ({"rank": 4, "keep": 0.5}, "both 'rank' and 'keep', expected one of them"),
        ({"rank": 0}, "--rank: 0, expected greater than or equal to 1"),
        ({"keep": 1.0}, "--keep: 1.0, expected less than 1"),
        ({"rank": "8"}, "--rank: '8', expected integer"),
        ({"keep": 0.5, "exclude": "("}, "--exclude: '(' is not a regular expression (missing )"),
        ({"keep": 0.5, "ranks": 3}, "unknown key '--ranks'"),
    ],
)
def test_what_makes_no_sense_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        strict_schema.validate(Config, Document("", keys, {}))
    assert message in caught.value.message


def test_linear_layers_change_and_the_rest_is_copied(tmp_path: Path) -> None:
    folder = pico.write_llama(tmp_path / "whole", dtype="BF16", tie=False)
    whole = open_checkpoint(folder)
    found, outcome = run(folder, tmp_path / "out", rank=16)
    changed = {name for name in whole.tensors if found.hash(name) != whole.hash(name)}
    assert changed == {name for name in whole.tensors if "_proj." in name}
    for name in changed:
        expected = plain(whole.read(name), 16)
        assert np.abs(found.read(name) - expected).max() <= 2.0**-8 * np.abs(expected).max()  # half a unit of BF16
    assert outcome.report[0].startswith("14 of 14 matrices changed; relative Frobenius error ")
    assert len(outcome.report) == 1
    assert found.sidecar is not None
    step = found.sidecar.steps[0]
    assert (step.method, step.config["rank"], step.config["keep"]) == ("lowrank.svd", 16, None)


def test_the_error_in_the_report_is_the_error(tmp_path: Path) -> None:
    folder = pico.write_llama(tmp_path / "whole", layers=1)
    found, outcome = run(folder, tmp_path / "out", keep=0.5, include="up_proj|k_proj")
    whole = open_checkpoint(folder)
    names = ["model.layers.0.self_attn.k_proj.weight", UP]
    errors = [np.linalg.norm(found.read(n) - whole.read(n)) / np.linalg.norm(whole.read(n)) for n in names]
    worst = names[int(np.argmax(errors))]
    assert outcome.report == (
        f"2 of 2 matrices changed; relative Frobenius error {np.mean(errors):.2%} on average, "
        f"{max(errors):.2%} at most ({worst})",
    )


def test_a_matrix_that_would_grow_stays_and_is_a_row(tmp_path: Path) -> None:
    folder = pico.write_llama(tmp_path / "whole")
    whole = open_checkpoint(folder)
    found, outcome = run(folder, tmp_path / "out", rank=24)  # k and v are 32×64, so 21.3 is where they would grow
    for name in whole.tensors:
        assert (found.hash(name) == whole.hash(name)) == (
            not any(p in name for p in ("q_p", "o_p", "up", "gate", "down"))
        )
    assert outcome.report[0].startswith("10 of 14 matrices changed")
    reason = "left as it is: factors of rank 24 are not smaller than 32×64 numbers"
    assert outcome.report[1:] == tuple(
        f"model.layers.*.self_attn.{name}_proj.weight (2): {reason}" for name in ("k", "v")
    )
    with pytest.raises(UsageError, match="nothing to do: all 14 matrices stay as they are"):
        run(folder, tmp_path / "none", rank=1000)


def test_include_and_exclude(tmp_path: Path) -> None:
    folder = pico.write_llama(tmp_path / "whole", tie=False)
    whole = open_checkpoint(folder)
    for number, (keys, expected) in enumerate(
        [
            ({"include": r"layers\.1\..*(q|k)_proj", "exclude": "k_proj"}, {"model.layers.1.self_attn.q_proj.weight"}),
            ({"include": ("lm_head", "embed")}, {"lm_head.weight", "model.embed_tokens.weight"}),
            ({"exclude": ("self_attn", r"layers\.0", "down", "gate")}, {"model.layers.1.mlp.up_proj.weight"}),
        ]
    ):
        found, _ = run(folder, tmp_path / str(number), rank=8, **keys)
        assert {name for name in whole.tensors if found.hash(name) != whole.hash(name)} == expected
    with pytest.raises(UsageError, match=r"^include: 'up_prj' matches none of 16 matrices$"):
        run(folder, tmp_path / "a", rank=8, include="up_prj")
    with pytest.raises(UsageError, match="exclude: leaves no matrix to work on"):
        run(folder, tmp_path / "b", rank=8, exclude=".")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe", "phi3", "bert"])
def test_families_whose_matrices_are_stored_otherwise(family: str, tmp_path: Path) -> None:
    model = models.build(family)
    models.save(model, tmp_path / "whole")
    whole = open_checkpoint(tmp_path / "whole")
    found, _ = run(tmp_path / "whole", tmp_path / "out", rank=8)
    changed = {name for name in whole.tensors if found.hash(name) != whole.hash(name)}
    stems = {
        "gpt2": ("c_attn.weight", "c_proj.weight", "c_fc.weight"),
        "qwen3_moe": ("_proj.weight",),
        "phi3": ("_proj.weight",),
        "bert": ("query.weight", "key.weight", "value.weight", "dense.weight"),
    }
    assert changed == {n for n in whole.tensors if n.endswith(stems[family]) and "pooler" not in n}
    for name in changed:  # transposing changes nothing: the SVD of W.T is that of W
        assert np.abs(found.read(name) - plain(whole.read(name), 8)).max() < 1e-5
    loaded, told = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.dtype == model.dtype


def test_experts_in_one_tensor_are_matrices_of_their_own(tmp_path: Path) -> None:
    folder = tmp_path / "whole"
    model = models.build("qwen3_moe")
    models.save(model, folder)
    split = open_checkpoint(folder)
    tensors = {name: split.read(name) for name in split.tensors if ".experts." not in name}
    for layer in range(3):
        stem = f"model.layers.{layer}.mlp.experts."
        read = {
            p: np.stack([split.read(f"{stem}{e}.{p}_proj.weight") for e in range(6)]) for p in ("gate", "up", "down")
        }
        tensors[f"{stem}gate_up_proj"] = np.concatenate([read["gate"], read["up"]], axis=1)
        tensors[f"{stem}down_proj"] = read["down"]
    pico.write_shards(folder, tensors)
    whole = open_checkpoint(folder)
    found, outcome = run(folder, tmp_path / "out", rank=8, include="experts")
    assert outcome.report[0].startswith("6 of 6 matrices changed")
    for name in (n for n in whole.tensors if ".experts." in n):
        for old, new in zip(whole.read(name), found.read(name), strict=True):
            assert np.abs(new - plain(old, 8)).max() < 1e-5


def test_packed_blocks_of_changed_matrices_go_and_others_stay(tmp_path: Path) -> None:
    folder = pico.write_llama(tmp_path / "whole")
    kept = "model.layers.1.mlp.up_proj.weight"
    blocks = {UP: ("Q8_0", b"\x01" * 340), kept: ("Q4_0", b"\x02" * 180)}
    write_sidecar(folder, Sidecar(packed=write_packed(folder, blocks)))
    found, outcome = run(folder, tmp_path / "out", rank=8, include=r"layers\.0\.")
    assert f"{UP}: its Q8_0 blocks were chosen for other values and are dropped" in outcome.report
    assert found.packed_blocks(UP) is None
    assert found.packed_blocks(kept) == b"\x02" * 180


def test_weights_that_are_no_numbers(tmp_path: Path) -> None:
    folder = pico.write_llama(tmp_path / "whole")
    whole = open_checkpoint(folder)
    tensors = {name: whole.read(name) for name in whole.tensors}
    tensors[UP][3, 4] = np.nan
    pico.write_shards(folder, tensors)
    with pytest.raises(CheckpointError, match=f"^{UP}: holds NaN or infinite values$") as caught:
        try:
            run(folder, tmp_path / "out", rank=8)
        except CheckpointError as error:
            raise CheckpointError(error.line) from None
    assert caught.value.exit_code == 1
    pico.write_llama(tmp_path / "stranger", architectures=["OPTForCausalLM"], model_type="opt")
    with pytest.raises(UnsupportedError, match="architecture 'OPTForCausalLM' is not supported"):
        run(tmp_path / "stranger", tmp_path / "none", rank=8)


def test_the_same_bytes_twice_and_an_export_that_loads(tmp_path: Path) -> None:
    folder = pico.write_llama(tmp_path / "whole", dtype="F16")
    for name in ("one", "two"):
        run(folder, tmp_path / name, keep=0.6)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "two").iterdir())
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)
    [file] = convert(tmp_path / "one", tmp_path / "gguf", "Q8_0")
    with LlamaFile(file, ctx=64, threads=1) as loaded:
        assert np.isfinite(loaded.logits(loaded.tokenize("def read(path):"))).all()


def test_a_rehearsal_takes_a_share() -> None:
    assert rehearsal(Config(rank=4096, exclude="down"), 2) == Config(keep=0.5, exclude="down")
    assert rehearsal(Config(keep=0.9), 2) == Config(keep=0.9)
