"""efficli.json of a checkpoint: what survives a pass, packed blocks and their hashes, what is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from efficli.checkpoint import open_checkpoint
from efficli.checkpoint.sidecar import (
    ALLOCATION_DROPPED,
    FILE,
    IMATRIX,
    PACKED,
    Allocation,
    Origin,
    Packed,
    Sidecar,
    Step,
    allocation_imatrix,
    compress,
    edit,
    fine_tune,
    read_sidecar,
    sealed,
    write_packed,
    write_sidecar,
)
from efficli.errors import CheckpointError, EffiError, SecurityError, UnsupportedError
from tests.lost_nothing import lost_nothing
from tests.pico import write_llama

FIRST = Origin(fingerprint="sha256:" + "1" * 64, model="org/first", revision="abc")
SECOND = Origin(fingerprint="sha256:" + "2" * 64)
STEP = Step(method="quantize.mixed", config={"bits": 3.5, "types": ["Q4_K"]}, recipe="a" * 64)
UP = "model.layers.0.mlp.up_proj.weight"


def test_compressing_keeps_the_origin_and_training_sets_it() -> None:
    once = compress(None, STEP, FIRST)
    assert (once.origin, once.steps) == (FIRST, [STEP])
    twice = compress(once, Step(method="lowrank.svd"), SECOND)
    assert twice.origin == FIRST
    assert [s.method for s in twice.steps] == ["quantize.mixed", "lowrank.svd"]
    trained, notes = fine_tune(twice, Step(method="distill.logits"), SECOND)
    assert (trained.origin, notes) == (SECOND, [])
    assert len(trained.steps) == 3
    assert compress(trained, STEP, FIRST).origin == SECOND


def test_packed_blocks_round_trip(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "m")
    blocks = {UP: ("Q4_K", bytes(range(144))), "lm_head.weight": ("Q8_0", b"\x07" * 34)}
    sidecar = Sidecar(steps=[STEP], origin=FIRST, packed=write_packed(folder, blocks))
    write_sidecar(folder, sidecar)
    with lost_nothing(tmp_path):
        ckpt = open_checkpoint(folder)
        assert ckpt.sidecar == sidecar
        assert ckpt.packed_blocks(UP) == bytes(range(144))
        assert ckpt.packed_blocks("lm_head.weight") == b"\x07" * 34
        assert ckpt.packed_blocks("model.norm.weight") is None
    text = (folder / FILE).read_bytes()
    write_sidecar(folder, read_sidecar(folder))
    assert (folder / FILE).read_bytes() == text
    assert json.loads(text)["version"] == 1


def test_blocks_in_a_file_of_their_own(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "m")
    entry = write_packed(folder, {UP: ("Q4_K", b"blocks")}, "x.safetensors")[UP]
    (folder / "up.q4k").write_bytes(b"blocks")
    write_sidecar(folder, Sidecar(packed={UP: entry.model_copy(update={"file": "up.q4k"})}))
    assert open_checkpoint(folder).packed_blocks(UP) == b"blocks"


def test_an_edit_drops_blocks_and_says_so() -> None:
    packed = {name: Packed(type="Q4_K", file=PACKED, sha256="0" * 64) for name in ("a", "b")}
    sidecar = Sidecar(packed=packed)
    same, note = edit(sidecar, "c")
    assert (same, note) == (sidecar, None)
    less, note = edit(sidecar, "a")
    assert list(less.packed) == ["b"]
    assert note == "a: its Q4_K blocks were chosen for other values and are dropped"
    assert list(sidecar.packed) == ["a", "b"]
    assert fine_tune(sidecar, STEP, SECOND)[0].packed == {}
    assert len(fine_tune(sidecar, STEP, SECOND)[1]) == 2


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (flip, SecurityError, "sha256 of the packed blocks of"),
        (Path.unlink, CheckpointError, "efficli.json names efficli-packed.safetensors, which is not here"),
        (lambda p: p.write_bytes(p.read_bytes()[:-3]), CheckpointError, "3 bytes short"),
        (lambda p: p.write_bytes(p.read_bytes().replace(UP.encode(), b"z" * len(UP))), CheckpointError, "no packed"),
        (lambda p: p.rename(p.parent.parent / "o") and p.symlink_to("../o"), SecurityError, "leaves the checkpoint"),
    ],
)
def test_damaged_blocks(tmp_path: Path, damage, kind: type[EffiError], message: str) -> None:
    folder = write_llama(tmp_path / "m")
    write_sidecar(folder, Sidecar(packed=write_packed(folder, {UP: ("Q4_K", b"blocks of it")})))
    damage(folder / PACKED)
    ckpt = open_checkpoint(folder)
    with pytest.raises(EffiError, match=message) as caught:
        ckpt.packed_blocks(UP)
    assert type(caught.value) is kind


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"version": 2}, UnsupportedError, "efficli.json: version is 2, expected 1"),
        ({"kind": "artifact"}, CheckpointError, "efficli.json: kind is 'artifact', expected 'checkpoint'"),
        ({"orgin": None}, CheckpointError, "efficli.json: orgin: extra inputs are not permitted"),
        ({"steps": [{"config": {}}]}, CheckpointError, "efficli.json: steps.0.method: field required"),
        ({"origin": {"fingerprint": "abc"}}, CheckpointError, "efficli.json: origin.fingerprint: string should match"),
        ({"packed": {"a": {"type": "Q4_K", "file": "../x", "sha256": "0" * 64}}}, CheckpointError, "packed.a.file:"),
        ({"packed": {"a": {"type": "Q4_K", "file": "x", "sha256": "0"}}}, CheckpointError, "packed.a.sha256:"),
    ],
)
def test_what_a_sidecar_may_not_say(tmp_path: Path, change: dict, kind: type[EffiError], message: str) -> None:
    folder = write_llama(tmp_path / "m")
    path = write_sidecar(folder, Sidecar(steps=[STEP]))
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(EffiError) as caught:
        open_checkpoint(folder)
    assert type(caught.value) is kind
    assert message in caught.value.line


def test_an_allocation_round_trips_and_its_matrix_is_held_against_its_hash(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "m")
    (folder / IMATRIX).write_bytes(b"matrix")
    told = Allocation(types={"blk.0.ffn_up.weight": "Q4_K", "token_embd.weight": "Q8_0"}, imatrix=IMATRIX)
    write_sidecar(folder, Sidecar(allocation=told))
    with pytest.raises(CheckpointError, match=r"imatrix_sha256 of imatrix\.gguf is missing"):
        allocation_imatrix(folder, told)
    whole = sealed(told, folder)
    assert whole.imatrix_sha256 == hashlib.sha256(b"matrix").hexdigest()
    write_sidecar(folder, Sidecar(allocation=whole))
    sidecar = open_checkpoint(folder).sidecar
    assert sidecar is not None and sidecar.allocation == whole
    assert allocation_imatrix(folder, whole) == folder / IMATRIX
    (folder / IMATRIX).write_bytes(b"matriy")
    with pytest.raises(SecurityError, match="sha256 of the importance matrix differs"):
        allocation_imatrix(folder, whole)
    (folder / IMATRIX).unlink()
    with pytest.raises(CheckpointError, match=r"names imatrix\.gguf, which is not here"):
        allocation_imatrix(folder, whole)
    without = Allocation(types={"token_embd.weight": "F16"})
    assert sealed(without, folder) == without and allocation_imatrix(folder, without) is None
    _, notes = fine_tune(Sidecar(allocation=whole), STEP, SECOND)
    assert notes == [ALLOCATION_DROPPED]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"types": {}}, "allocation.types: dictionary should have at least 1 item"),
        ({"types": {"a": 4}}, "allocation.types.a: input should be a valid string"),
        ({"format": "onnx"}, "allocation.format: input should be 'gguf'"),
        ({"imatrix": "../imatrix.gguf"}, "imatrix must be the plain name of a file"),
        ({"imatrix_sha256": "0" * 64}, "imatrix_sha256 of no imatrix"),
        ({"budget": 1}, "allocation.budget: extra inputs"),
    ],
)
def test_an_allocation_that_is_none(tmp_path: Path, change: dict[str, object], message: str) -> None:
    told = {"types": {"a": "Q4_K"}} | change
    (tmp_path / FILE).write_text(json.dumps({"version": 1, "kind": "checkpoint", "allocation": told}))
    with pytest.raises(CheckpointError) as raised:
        read_sidecar(tmp_path)
    assert message in raised.value.line
