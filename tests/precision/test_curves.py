"""Error curves against whole tensors in float64, and the encoder against llama.cpp's own quantizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

from efficli.checkpoint import open_checkpoint
from efficli.export.gguf.job import prepare
from efficli.export.gguf.types import TypeRequest
from efficli.export.gguf.writer import write_files
from efficli.ops import ggml
from efficli.ops.ggml_types import NEED_IMATRIX, TYPE_IDS
from efficli.pipeline.file_view import GgufView
from efficli.precision import curves
from efficli.precision.curves import Curve, curve, nbytes, row_reader
from efficli.precision.encoder import Encoder, Statistics
from efficli.precision.view import FileTensor, Part
from efficli.surgery import matrices
from tests.pico import write_llama
from tests.precision.here import Shop

KINDS = ("Q4_0", "IQ4_NL", "Q5_1", "Q8_0", "F16")
"""For rows of 32."""
LARGE = (*KINDS, "Q2_K", "Q3_K", "Q4_K", "Q6_K", "IQ2_XXS", "IQ2_S", "IQ3_XXS", "IQ4_XS")
"""For rows of 256."""
FEW = ("Q8_0", "F16", "Q4_K", "IQ4_XS")


def of(found: Shop, name: str) -> FileTensor:
    return next(tensor for tensor in found.view.tensors if tensor.name == name)


def brute(found: Shop, tensor: FileTensor, kind: str) -> tuple[float, float | None]:
    """mse and hess over all rows and matrices, from what ggml's decoder says of ggml's encoder."""
    statistics, mse, hess = found.shop.statistics, 0.0, 0.0
    for number, part in enumerate(tensor.parts):
        weight = found.ckpt.read(part.name).astype(np.float32)[part.start : part.stop]
        importance = statistics.imatrix(tensor, number)
        data = np.empty(len(weight) * ggml.row_bytes(kind, tensor.columns), np.uint8)
        ggml.encode(kind, np.ascontiguousarray(weight), data, importance)
        error = ggml.decode(kind, data, *weight.shape).astype(np.float64) - weight
        mse += float((error**2 * (1 if importance is None else importance)).sum())
        gram = statistics.gram(tensor, number)
        hess += float("nan") if gram is None else float(np.trace(error @ np.asarray(gram, np.float64) @ error.T))
    return mse, None if np.isnan(hess) else hess


@pytest.mark.parametrize("name", ["blk.1.ffn_down.weight", "blk.0.attn_q.weight", "token_embd.weight", "output.weight"])
def test_mse_and_hess_are_those_of_the_whole_tensor(twin: Shop, name: str) -> None:
    tensor = of(twin, name)
    read = row_reader(twin.ckpt, matrices(twin.ckpt))
    found = curve(tensor, KINDS, read, Encoder(twin.shop.statistics))
    assert list(found.points) == list(KINDS)
    for kind, point in found.points.items():
        mse, hess = brute(twin, tensor, kind)
        assert point.mse == pytest.approx(mse, rel=1e-5)
        assert (point.hess is None) == (hess is None) == (name == "token_embd.weight")
        assert hess is None or point.hess == pytest.approx(hess, rel=1e-3)
        size = -(-tensor.rows * ggml.row_bytes(kind, tensor.columns) // 32) * 32
        assert point.nbytes == nbytes(tensor, kind) == size
    assert Curve.from_json(found.to_json()) == found


def test_a_sample_of_rows_is_within_a_few_percent(twin: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = of(twin, "output.weight")
    read = row_reader(twin.ckpt, matrices(twin.ckpt))
    seen = 0

    def counted(part: Part, first: int, last: int) -> Any:
        nonlocal seen
        seen += last - first
        return read(part, first, last)

    encoder = Encoder(twin.shop.statistics)
    whole = curve(tensor, KINDS, read, encoder)
    monkeypatch.setattr(curves, "SAMPLED_WEIGHTS", 96 * 200)
    sampled = curve(tensor, KINDS, counted, encoder)
    assert seen == 200 < tensor.rows == 1001
    for kind in KINDS[:-1]:
        assert sampled.points[kind].mse == pytest.approx(whole.points[kind].mse, rel=0.1)
        assert sampled.points[kind].hess == pytest.approx(whole.points[kind].hess, rel=0.1)
        assert sampled.points[kind].nbytes == whole.points[kind].nbytes


@pytest.mark.parametrize(
    ("threads", "kinds"), [(3, FEW), pytest.param(1, LARGE, marks=pytest.mark.slow)], ids=["few", "all"]
)
def test_what_is_measured_is_what_export_writes(tmp_path: Path, threads: int, kinds: Sequence[str]) -> None:
    """Every matrix of every type, with an importance matrix, byte for byte; only the table of tokens has none."""
    folder = write_llama(tmp_path / "model", hidden=256, ffn=256, heads=4, layers=1, dtype="BF16", tie=False)
    ckpt = open_checkpoint(folder)
    view = GgufView(ckpt)
    draw = np.random.default_rng(0)
    names = sorted(view.multiplied)
    assert {tensor.name for tensor in view.tensors} - set(names) == {"token_embd.weight"}
    wide = {tensor.name: tensor.columns for tensor in view.tensors}
    squares = {name: draw.exponential(1.0, wide[name]).astype(np.float32) for name in names}
    encoder, read = Encoder(Statistics(squares), threads=threads), row_reader(ckpt, matrices(ckpt))
    numbers = {number: name for name, number in TYPE_IDS.items()}
    for kind in kinds:
        types = {tensor.name: kind for tensor in view.tensors}
        if kind in NEED_IMATRIX:
            types["token_embd.weight"] = "Q2_K"
        job = prepare(ckpt, [TypeRequest(type="MIXED", given=types, imatrix=squares)], own={})
        path = tmp_path / f"{kind}.gguf"
        write_files(ckpt, job.tensors, [(path, job.metadata, job.files[0].choice)], threads=threads)
        stored = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
        for tensor in view.tensors:
            (part,) = tensor.parts
            data = encoder.encode(tensor, 0, types[tensor.name], read(part, 0, tensor.rows)).reshape(tensor.rows, -1)
            found = stored[tensor.name]
            assert numbers[found.tensor_type.value] == types[tensor.name]
            written = np.frombuffer(found.data.tobytes(), np.uint8).reshape(tensor.rows, -1)
            if tensor.group in ("attn_q", "attn_k"):  # the file has their rows in another order
                assert sorted(map(bytes, written)) == sorted(map(bytes, data))
            else:
                np.testing.assert_array_equal(written, data)
