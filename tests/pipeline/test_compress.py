"""A checkpoint through one pass: what is written, that it is whole or not there, and that the line is saved."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import efficli
from efficli.checkpoint import open_checkpoint
from efficli.errors import CheckpointError, OutputError, UsageError
from efficli.pipeline.result import CompressResult, ExportResult
from efficli.recipe import load
from tests.lost_nothing import fingerprint as tree_hash
from tests.lost_nothing import lost_nothing
from tests.pico import write_llama

METHOD, OPTIONS = "skip-layers.last", {"remove": 1}


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFICLI_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_llama(tmp_path_factory.mktemp("in") / "pico", layers=3, dtype="BF16")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def first(model, tmp_path_factory, _own_cache):
    return efficli.compress(model, tmp_path_factory.mktemp("out") / "small", method=METHOD, options=OPTIONS, threads=1)


def test_it_is_a_checkpoint_with_its_recipe(model, first):
    assert isinstance(first, CompressResult)
    ckpt = open_checkpoint(first.output)
    assert ckpt.sidecar is not None
    assert [step.method for step in ckpt.sidecar.steps] == [METHOD]
    assert ckpt.sidecar.origin is not None
    assert ckpt.sidecar.origin.fingerprint == open_checkpoint(model).fingerprint()
    assert ckpt.sidecar.origin.model == str(model)
    names = {path.relative_to(first.output).as_posix() for path in first.output.rglob("*") if path.is_file()}
    source = {path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()}
    assert names == source | {"efficli.json", "recipe.yaml"}
    assert (ckpt.nbytes, first.file) == (first.nbytes, None)
    old = open_checkpoint(model)
    for name in ckpt.tensors:
        np.testing.assert_array_equal(ckpt.read(name), old.read(name))
    assert any("layer 2 of 3 left out" in row for row in first.report)
    recipe = load(first.output / "recipe.yaml")
    assert (recipe.model, [one.method for one in recipe.passes]) == (str(model), [METHOD])


def test_from_the_cache_and_without_it_the_bytes_are_the_same(model, first, tmp_path):
    again = efficli.compress(model, tmp_path / "again", method="skip_layers.last", options=OPTIONS, threads=1)
    assert [(step.kind, step.cached) for step in again.steps] == [("pass", True)]
    alone = efficli.compress(model, tmp_path / "alone", method=METHOD, options=OPTIONS, threads=1, cache=False)
    assert [(step.kind, step.key) for step in alone.steps] == [("pass", None)]
    assert tree_hash(again.output) == tree_hash(first.output) == tree_hash(alone.output)


def test_the_recipe_and_the_line_make_the_same_file(model, first, tmp_path):
    ran = efficli.run(first.output / "recipe.yaml", tmp_path / "ran", settings=["certificate.enabled=false"], threads=1)
    line = efficli.compress(
        model, tmp_path / "line", method=METHOD, options=OPTIONS, export=True, dry_run=True, threads=1
    )
    assert isinstance(line, ExportResult)
    assert not (tmp_path / "line").exists()
    assert [(file.name, file.nbytes) for file in line.files] == [(file.name, file.nbytes) for file in ran.files]
    done = efficli.export(first.output, tmp_path / "of-it", certificate=False, threads=1)
    tensors = [json.loads((one.output / "efficli.json").read_text())["tensors"] for one in (ran, done)]
    assert list(tensors[0].values()) == list(tensors[1].values())


def test_a_dry_run_says_the_size_and_writes_nothing(model, first, tmp_path):
    with lost_nothing(tmp_path):
        told = efficli.compress(model, tmp_path / "out", method=METHOD, options=OPTIONS, dry_run=True)
    assert isinstance(told, CompressResult)
    assert (told.nbytes, told.dry_run, told.steps) == (first.nbytes, True, ())
    shown = told.to_json()
    assert (shown["command"], shown["method"], shown["file"]) == ("quantize", METHOD, None)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("skip-layers.lst", {}, "unknown method 'skip-layers.lst'"),
        (METHOD, {"remove": 1, "max_bytes": "1MiB"}, "skip-layers.last has no option --max-bytes"),
        (METHOD, {}, "key '--remove' is missing"),
        (METHOD, {"remove": 0}, "--remove: 0"),
        (METHOD, {"remove": 3}, "remove: 3 of 3 layers, expected at least one to remain"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(model, tmp_path, method, options, message):
    with lost_nothing(tmp_path), pytest.raises(UsageError) as raised:
        efficli.compress(model, tmp_path / "out", method=method, options=options)
    assert message in raised.value.line


def test_what_is_there_is_kept_until_the_new_one_is_whole(model, first, tmp_path):
    out = efficli.compress(model, tmp_path / "out", method=METHOD, options={"remove": 2}, threads=1).output
    before = tree_hash(out)
    with pytest.raises(OutputError, match="exists already"):
        efficli.compress(model, out, method=METHOD, options=OPTIONS, threads=1)
    with pytest.raises(UsageError, match="would overwrite the input"):
        efficli.compress(model, model, method=METHOD, options=OPTIONS, force=True, threads=1)
    broken = write_llama(tmp_path / "broken", layers=3, dtype="BF16")
    data = bytearray((broken / "model.safetensors").read_bytes())
    data[-30_000:-20_000] = b"\xff" * 10_000  # NaN
    (broken / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="NaN"):
        efficli.compress(broken, out, method="lowrank.svd", options={"keep": 0.5}, force=True, threads=1)
    assert tree_hash(out) == before
    efficli.compress(model, out, method=METHOD, options=OPTIONS, force=True, threads=1)
    assert tree_hash(out) == tree_hash(first.output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "out"]


def test_a_second_pass_takes_over_neither_recipe_nor_steps_of_the_first(first, tmp_path):
    twice = efficli.compress(first.output, tmp_path / "twice", method=METHOD, options=OPTIONS, threads=1)
    ckpt, before = open_checkpoint(twice.output), open_checkpoint(first.output)
    assert ckpt.sidecar is not None and before.sidecar is not None
    assert [step.method for step in ckpt.sidecar.steps] == [METHOD, METHOD]
    assert ckpt.sidecar.origin == before.sidecar.origin
    assert load(twice.output / "recipe.yaml").model == str(first.output)
    assert Path(twice.output / "1_Pooling" / "config.json").exists()


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"max_bytes": "1MiB", "types": ("mixed", "Q8_0")}, "--max-bytes and --type Q8_0: a budget chooses the types"),
        ({"bpw": 3.5, "fit_ctx": 64}, "--bpw and --fit-ctx, which is for --fit"),
        ({"fit_ctx": 64}, "--fit-ctx needs --fit"),
    ],
)
def test_a_budget_of_an_export_and_what_contradicts_it(model, tmp_path, wishes, message):
    with lost_nothing(tmp_path), pytest.raises(UsageError) as raised:
        efficli.export(model, tmp_path / "out", **wishes)
    assert message in raised.value.line
