"""Our files of the reference and its twin hold what llama.cpp's own converter writes (converter_hashes.json)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from efficli.checkpoint import open_checkpoint
from efficli.export.gguf.job import prepare
from efficli.export.gguf.types import TypeRequest
from efficli.export.gguf.writer import write_files
from scripts.converter_hashes import contents

RECORDED = json.loads((Path(__file__).parent / "converter_hashes.json").read_text())
ONLY_OURS = {"efficli.version", "efficli.source", "tokenizer.ggml.add_eos_token"}
"""What we write beside it; that no end token is added is said, not left to llama.cpp's default, which is the same."""
HEADER = {"GGUF.version", "GGUF.tensor_count", "GGUF.kv_count"}


@pytest.fixture(scope="module", params=["checkpoint", "twin"])
def written(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    ckpt = open_checkpoint({"checkpoint": "reference", "twin": "reference-twin"}[request.param])
    kinds = ("F32", "F16", "BF16")
    own = {"version": "0", "source": ckpt.name}
    job = prepare(ckpt, [TypeRequest(type=kind) for kind in kinds], own=own)
    write_files(ckpt, job.tensors, [(folder / f.type, job.metadata, f.choice) for f in job.files])
    weights = hashlib.sha256((ckpt.root / "model.safetensors").read_bytes()).hexdigest()
    assert weights == RECORDED[request.param]["model.safetensors"], "run scripts/converter_hashes.py again"
    return {kind.lower(): contents(folder / kind) for kind in kinds}, RECORDED[request.param]


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_tensors_are_bit_equal(written, kind):
    ours, theirs = written[0][kind]["tensors"], written[1][kind]["tensors"]
    assert len(theirs) > 20
    assert ours == theirs


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_metadata_is_equal(written, kind):
    ours, theirs = written[0][kind]["metadata"], written[1][kind]["metadata"]
    assert set(ours) - set(theirs) == ONLY_OURS and ours["tokenizer.ggml.add_eos_token"] is False
    ours = {key: value for key, value in ours.items() if key not in {*ONLY_OURS, *HEADER}}
    assert ours == {key: value for key, value in theirs.items() if key not in HEADER}
