"""quantize.mixed on every layout of a checkpoint, and its rounded codes: written, and read by llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGUFReader
from safetensors.numpy import load_file

import efficli
from efficli.catalog import run_method
from efficli.checkpoint import open_checkpoint
from efficli.checkpoint.sidecar import IMATRIX
from efficli.export.gguf.imatrix import read_imatrix
from efficli.pipeline.file_view import GgufView
from efficli.precision.choice import choices
from efficli.precision.work import Workshop
from tests import whole
from tests.precision.here import context, drawn, in_this_process
from tests.quantize.few_tokens import (
    TWIN,
    configured,
    exported,
    mixed,
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


# Rounding


@pytest.mark.slow
def test_rounded_codes_are_copied_and_decode_to_a_smaller_error(kept: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_bytes": 400_000, "types": ["Q4_0", "Q5_1", "Q8_0"]}
    nearest = mixed(tmp_path / "nearest", kept, **options)
    rounded = mixed(tmp_path / "rounded", kept, rounding="error-feedback", **options)
    assert rounded.packed and not nearest.packed
    path, plain = (exported(tmp_path / n, tmp_path / f"{n}-out") for n in ("rounded", "nearest"))
    assert rounded.allocation is not None and nearest.allocation is not None
    view, ckpt = GgufView(open_checkpoint(TWIN)), open_checkpoint(TWIN)
    codes = load_file(tmp_path / "rounded" / "efficli-rounded.safetensors")
    stored = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    others = {tensor.name: tensor for tensor in GGUFReader(plain).tensors}
    grams = Workshop(
        ckpt=ckpt,
        view=view,
        context=context(kept, view, drawn(900, 8)),
        choices=choices(view, (), weighed=view.multiplied, lacking=(), slow=()),
        rounding="nearest",
    )
    grams.calibrate(None)
    compared = 0
    for tensor in view.tensors:
        (part,) = tensor.parts
        kind = rounded.allocation.types[tensor.name]
        if part.name not in codes:
            assert tensor.name == "token_embd.weight"
            continue
        data = codes[part.name].reshape(tensor.rows, -1)
        written = np.frombuffer(stored[tensor.name].data.tobytes(), np.uint8).reshape(data.shape)
        if tensor.group in ("attn_q", "attn_k"):  # the file has their rows in another order
            assert sorted(map(bytes, written)) == sorted(map(bytes, data))
            continue
        np.testing.assert_array_equal(written, data)
        if nearest.allocation.types[tensor.name] != kind:
            continue
        gram = np.asarray(grams.statistics.gram(tensor, 0), np.float64)
        own = ckpt.read(part.name).astype(np.float64)
        errors = []
        for one in (stored, others):
            values = gguf.dequantize(one[tensor.name].data, one[tensor.name].tensor_type) - own
            errors.append(np.trace(values @ gram @ values.T))
        assert errors[0] <= errors[1] * (1 + 1e-4)
        compared += errors[0] < 0.95 * errors[1]
    assert compared >= 3


# Every family


def small(name: str, folder: Path, **more: Any) -> Path:
    """A tiny whole checkpoint with a tokenizer."""
    kind = whole.KINDS[name]
    whole.write(folder / kind.folder, kind, **more)
    return folder / kind.folder


FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"bpw": 10.0},
    "qwen3_moe": {"bpw": 9.5},
    "gemma3": {"bpw": 6.0, "rounding": "error-feedback"},
    "phi3": {"bpw": 6.0, "rounding": "error-feedback"},
    "bert": {"bpw": 13.0, "rounding": "error-feedback"},
}


@pytest.mark.parametrize(
    "name", [name if name == "gpt2" else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_every_kind_of_layout_is_loaded_by_llama_cpp(name: str, tmp_path: Path) -> None:
    """Transposed, fused, stacked, tied, without a head: measured, chosen, written, and run by llama.cpp."""
    model, keys = small(name, tmp_path), FAMILIES[name]
    view = GgufView(open_checkpoint(model))
    outcome = mixed(tmp_path / "small", tmp_path / "kept", model, **{"loss": "kld", "swaps": 8, **keys})
    assert outcome.allocation is not None
    assert len(set(outcome.allocation.types.values())) > 1
    assert set(read_imatrix(tmp_path / "small" / IMATRIX)) == view.multiplied
    assert all(np.isfinite(loss) for loss in outcome.allocation.losses.values())
    done = efficli.export(tmp_path / "small", tmp_path / "out", certificate=False, threads=1)
    (file,) = done.files
    assert {n: k for n, k in types_in(tmp_path / "out" / file.name).items() if n in outcome.allocation.types} == (
        outcome.allocation.types
    )
    tensors = GGUFReader(tmp_path / "out" / file.name).tensors
    bits = 8 * sum(tensor.n_bytes for tensor in tensors) / sum(tensor.n_elements for tensor in tensors)
    assert bits <= keys["bpw"]
    assert file.sample is not None  # llama.cpp loaded it and ran


def test_an_expert_that_is_never_chosen_is_a_row_and_no_nan(tmp_path: Path) -> None:
    """Two tokens for each of two experts of six in a text of a few tokens."""
    model = small("qwen3_moe", tmp_path, num_hidden_layers=1)
    ckpt = open_checkpoint(model)
    view = GgufView(ckpt)
    few = drawn(900, 1, size=2, selection=1)
    (tmp_path / "out").mkdir()
    config = configured(bpw=9.5, loss="kld")
    outcome = run_method("quantize.mixed", ckpt, tmp_path / "out", config, context(tmp_path / "kept", view, few))
    rows = [row for row in outcome.report if "the calibration text never reaches" in row]
    assert len(rows) == 3 and all("of 6 experts" in row and "_exps.weight" in row for row in rows)
    assert outcome.allocation is not None
    assert all(np.isfinite(loss) for loss in outcome.allocation.losses.values())
    assert not any("nan" in row.lower().split() for row in outcome.report)
    for values in read_imatrix(tmp_path / "out" / IMATRIX).values():
        assert np.isfinite(values).all()
    record = json.loads((tmp_path / "out" / "allocation.json").read_text())
    assert "NaN" not in (tmp_path / "out" / "allocation.json").read_text() and record["tensors"]
    assert exported(tmp_path / "out", tmp_path / "file").stat().st_size > 0
