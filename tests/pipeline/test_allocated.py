"""A checkpoint with allocated types to an artifact, and what becomes of them in other passes and with other types."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from gguf import GGUFReader

import efficli
from efficli.artifact import read_artifact
from efficli.catalog import config_of, run_method
from efficli.checkpoint import open_checkpoint
from efficli.checkpoint.sidecar import ALLOCATION_DROPPED, IMATRIX, Allocation, Sidecar, sealed, write_sidecar
from efficli.checkpoint.tensor_types import TENSOR_TYPES, tensor_types_text
from efficli.errors import CheckpointError, SecurityError, UsageError
from efficli.export.gguf.imatrix import Sums, write_imatrix
from efficli.export.gguf.model import layout
from efficli.families import read_shape
from efficli.method import Context
from efficli.ops import ggml
from efficli.ops.ggml_types import TYPE_IDS
from efficli.progress import Silent
from tests.pico import write_llama

CYCLE = ("IQ2_XXS", "Q4_K", "Q6_K", "Q3_K", "Q8_0")


def write_allocated(folder: Path, **config: object) -> Path:
    """A Llama with a type for each weight, and a matrix that the first of them needs."""
    write_llama(folder, hidden=256, ffn=256, heads=4, dtype="BF16", **config)
    ckpt = open_checkpoint(folder)
    _, tensors, _ = layout(read_shape(ckpt.config), ckpt)
    draw = np.random.default_rng(0)
    weights = [t for t in tensors if not t.keep_f32]
    types = {t.name: CYCLE[n % len(CYCLE)] for n, t in enumerate(weights)}
    sums = {t.name: Sums(draw.exponential(1.0, (1, t.shape[-1])).astype(np.float32), np.array([1])) for t in weights}
    write_imatrix(folder / IMATRIX, sums, dataset="drawn", chunk=8, chunks=1)
    allocation = sealed(Allocation(types=types, imatrix=IMATRIX), folder)
    write_sidecar(folder, Sidecar(allocation=allocation))
    (folder / TENSOR_TYPES).write_text(tensor_types_text(types))
    (folder / "recipe.yaml").write_text("version: 1\n")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_allocated(tmp_path_factory.mktemp("in") / "pico")


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    return efficli.export(model, tmp_path_factory.mktemp("out") / "artifact", certificate=False, threads=1)


def types_in(path: Path) -> dict[str, str]:
    names = {number: name for name, number in TYPE_IDS.items()}
    return {tensor.name: names[tensor.tensor_type.value] for tensor in GGUFReader(path).tensors}


def test_the_allocation_is_the_default_and_is_written(model, exported):
    allocation = open_checkpoint(model).sidecar.allocation
    (file,) = exported.files
    path = exported.output / file.name
    assert (file.type, file.name.endswith("-MIXED.gguf"), file.nbytes) == ("MIXED", True, path.stat().st_size)
    found = types_in(path)
    assert {name: found[name] for name in allocation.types} == allocation.types
    assert (exported.output / TENSOR_TYPES).read_text() == tensor_types_text(allocation.types)
    assert {TENSOR_TYPES, "recipe.yaml"} <= {record.name for record in read_artifact(exported.output).files}
    recipe = yaml.safe_load((exported.output / "recipe.yaml").read_text())
    assert recipe["exports"][0]["type"] == ["MIXED"]
    assert read_artifact(exported.output).manifest["recipe"]["exports"][0]["type"] == ["MIXED"]
    assert not any("not used" in row for row in exported.report)


def test_the_matrix_beside_the_weights_is_what_weights_are_encoded_with(model, exported):
    from efficli.export.gguf.imatrix import read_imatrix

    ckpt, matrix = open_checkpoint(model), read_imatrix(model / IMATRIX)
    stored = {t.name: t for t in GGUFReader(exported.output / exported.files[0].name).tensors}
    tensor = stored["blk.0.ffn_down.weight"]
    weights = ckpt.read("model.layers.0.mlp.down_proj.weight")
    kind = ckpt.sidecar.allocation.types[tensor.name]
    data = np.empty(len(weights) * ggml.row_bytes(kind, weights.shape[1]), np.uint8)
    ggml.encode(kind, weights, data, matrix[tensor.name])
    assert tensor.data.tobytes() == data.tobytes()


def test_in_any_case_from_a_recipe_and_from_a_command_line_it_is_the_same_file(model, exported, tmp_path):
    values = {"version": 1, "model": str(model), "exports": {"type": "mixed"}, "certificate": {"enabled": False}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    ran = efficli.run(tmp_path / "recipe.yaml", tmp_path / "out", cache=False, threads=1)
    assert [file.sha256 for file in ran.files] == [file.sha256 for file in exported.files]
    resolved = efficli.run(exported.output / "recipe.yaml", tmp_path / "again", cache=False, threads=1)
    assert [file.sha256 for file in resolved.files] == [file.sha256 for file in exported.files]


def test_other_types_are_told_and_written_from_the_same_read(model, tmp_path):
    done = efficli.export(model, tmp_path / "out", types=("Q8_0", "Mixed"), certificate=False, threads=1)
    assert [file.type for file in done.files] == ["Q8_0", "MIXED"]
    rows = [row for row in done.report if "not used" in row]
    assert rows == ["Q8_0: the allocation of types is not used: another type was asked for"]
    assert set(types_in(done.output / done.files[0].name).values()) == {"Q8_0", "F32"}


def test_without_an_allocation_it_is_wrong_usage(tmp_path):
    plain = write_llama(tmp_path / "plain")
    with pytest.raises(UsageError, match="MIXED of a checkpoint without an allocation") as raised:
        efficli.export(plain, tmp_path / "out", types=("MIXED",))
    assert "efficli quantize --max-bytes" in raised.value.hint
    assert not (tmp_path / "out").exists()
    done = efficli.export(plain, tmp_path / "out", dry_run=True)
    assert [file.type for file in done.files] == ["Q4_K_M"]


def test_what_is_no_longer_true_is_refused(model, tmp_path):
    copy = write_allocated(tmp_path / "copy")
    data = bytearray((copy / IMATRIX).read_bytes())
    data[-1] ^= 1
    (copy / IMATRIX).write_bytes(data)
    with pytest.raises(SecurityError, match="sha256 of the importance matrix differs"):
        efficli.export(copy, tmp_path / "out")
    done = efficli.export(copy, tmp_path / "out", imatrix=model / IMATRIX, dry_run=True)
    assert done.files[0].type == "MIXED"
    told = json.loads((copy / "efficli.json").read_text())
    told["allocation"]["types"]["blk.9.ffn_up.weight"] = "Q8_0"
    (copy / "efficli.json").write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match=r"names 'blk\.9\.ffn_up\.weight', which the file does not have"):
        efficli.export(copy, tmp_path / "out", imatrix=model / IMATRIX)


def test_a_later_pass_drops_it_and_what_was_written_with_it(model, tmp_path):
    ckpt = open_checkpoint(model)
    (tmp_path / "next").mkdir()
    config = config_of("skip-layers.last")(remove=1)
    outcome = run_method("skip-layers.last", ckpt, tmp_path / "next", config, Context(progress=Silent()))
    assert ALLOCATION_DROPPED in outcome.report
    after = open_checkpoint(tmp_path / "next")
    assert after.sidecar.allocation is None
    names = {path.name for path in (tmp_path / "next").iterdir()}
    assert not names & {IMATRIX, TENSOR_TYPES, "recipe.yaml"}
    assert {"tokenizer.json", "README.md", "efficli.json"} <= names


def test_a_rehearsal_has_the_allocation_of_its_layers(tmp_path):
    model = write_allocated(tmp_path / "deep", layers=3)
    values = {"version": 1, "model": str(model), "certificate": {"enabled": False}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    done = efficli.run(tmp_path / "recipe.yaml", tmp_path / "out", rehearsal=True, threads=1)
    assert [step.what for step in done.steps if step.kind == "write"] == ["MIXED"]
    assert not (tmp_path / "out").exists()


def test_the_matrix_beside_the_weights_is_no_model(model):
    found = efficli.inspect(model)
    assert (found.kind, len(found.models)) == ("checkpoint", 1)
    with pytest.raises(CheckpointError, match=r"no \.gguf file in it, expected an artifact"):
        efficli.try_artifact(model, "def")
    done = efficli.bench([model], starts=False)
    assert "no .gguf file in it" in done.artifacts[0].failure.message
