"""What quantize.mixed is given: settings, texts and importance matrices, and how wrong ones end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import efficli
from efficli.checkpoint import open_checkpoint
from efficli.checkpoint.sidecar import IMATRIX
from efficli.data import committed
from efficli.errors import CheckpointError, EffiError, UsageError
from efficli.export.gguf.imatrix import Sums, read_imatrix, write_imatrix
from efficli.export.gguf.vocab_check import SourceTokenizer
from efficli.network.statistics import cut
from efficli.pipeline.file_view import GgufView
from efficli.pipeline.plain_file import write_plain
from efficli.precision.view import Calibration
from efficli.progress import Silent
from tests.lost_nothing import lost_nothing
from tests.precision.here import in_this_process, open_shop
from tests.quantize.few_tokens import (
    TWIN,
    mixed,
)

__all__ = ["in_this_process"]


@pytest.fixture(scope="module", autouse=True)
def _here(in_this_process: None) -> None:
    """No child of the method; those of the export are what they are."""


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics and curves, for all tests of the module."""
    return tmp_path_factory.mktemp("kept")


# What is wrong


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "no budget, expected one of max_bytes, bpw and fit"),
        ({"max_bytes": "1MiB", "bpw": 4.0}, "'max_bytes' and 'bpw', expected one of"),
        ({"bpw": 4.0, "fit": "pi5-4gb"}, "'bpw' and 'fit', expected one of"),
        ({"bpw": 4.0, "ctx_size": 64}, "'ctx_size' is for 'fit'"),
        ({"bpw": 4.0, "types": "Q4_9"}, "Q4_9"),
        ({"bpw": 4.0, "types": "Q4_K_M"}, "Q4_K_M"),
        ({"bpw": 4.0, "loss": "guess"}, "loss"),
        ({"bpw": 4.0, "rounding": "up"}, "rounding"),
        ({"bpw": 4.0, "harmonize": "all"}, "harmonize"),
        ({"bpw": -1.0}, "bpw"),
        ({"max_bytes": "much"}, "much"),
        ({"fit": "pi6"}, "unknown target 'pi6'"),
        ({"bpw": 4.9, "types": "Q4_K"}, "types: no tensor can be Q4_K"),
    ],
)
def test_settings_that_make_no_sense_are_one_line_each(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with lost_nothing(tmp_path), pytest.raises(UsageError) as raised:
        efficli.compress(TWIN, tmp_path / "out", method="quantize.mixed", options=keys)
    assert raised.value.exit_code == 2
    assert message in raised.value.line and "\n" not in raised.value.line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the text is empty"),
        ("def f():\n    return 1\n", r"the calibration text has \d+ tokens, expected at least 512"),
    ],
)
def test_a_calibration_text_of_less_than_a_chunk(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "text.txt").write_text(text)
    with lost_nothing(tmp_path), pytest.raises(EffiError, match=message) as raised:
        efficli.compress(
            TWIN, tmp_path / "out", method="quantize.mixed", options={"bpw": 4.9},
            calibration=tmp_path / "text.txt", cache=False, threads=1,
        )  # fmt: skip
    assert raised.value.exit_code in (1, 2)
    assert "text.txt" in raised.value.line


def matrix(path: Path, sums: dict[str, int]) -> Path:
    """An importance matrix of tensors with so many columns."""
    found = {name: Sums(np.ones((1, size), np.float32), np.array([1])) for name, size in sums.items()}
    write_imatrix(path, found, dataset="drawn", chunk=8, chunks=1)
    return path


@pytest.mark.parametrize(
    ("sums", "message"),
    [
        ({"blk.7.ffn_down.weight": 96}, "none of the 1 tensors of the importance matrix is in this model"),
        ({"blk.0.ffn_up.weight": 128}, r"has 128 columns for blk\.0\.ffn_up\.weight, which has 96"),
    ],
)
def test_an_importance_matrix_of_another_model(tmp_path: Path, sums: dict[str, int], message: str) -> None:
    """Before anything is computed, and in a dry run."""
    path = matrix(tmp_path / "other.gguf", sums)
    for dry_run in (True, False):
        with lost_nothing(tmp_path), pytest.raises(UsageError, match=message) as raised:
            efficli.compress(
                TWIN, tmp_path / "out", method="quantize.mixed", options={"bpw": 4.9, "imatrix": str(path)},
                dry_run=dry_run, cache=False,
            )  # fmt: skip
        assert raised.value.exit_code == 2 and "other.gguf" in raised.value.line


def test_a_damaged_or_missing_importance_matrix(tmp_path: Path) -> None:
    path = matrix(tmp_path / "cut.gguf", {"blk.0.ffn_up.weight": 96})
    path.write_bytes(path.read_bytes()[:-64])
    for name in ("cut.gguf", "none.gguf"):
        with lost_nothing(tmp_path), pytest.raises(CheckpointError) as raised:
            efficli.compress(
                TWIN, tmp_path / "out", method="quantize.mixed",
                options={"bpw": 4.9, "imatrix": str(tmp_path / name)}, cache=False,
            )  # fmt: skip
        assert raised.value.exit_code == 1 and name in raised.value.line


def test_a_given_importance_matrix_is_the_one_that_is_used_and_kept(kept: Path, tmp_path: Path) -> None:
    given = matrix(tmp_path / "given.gguf", {"blk.0.ffn_up.weight": 96, "blk.0.ffn_down.weight": 288})
    mixed(tmp_path / "small", kept, max_bytes=400_000, imatrix=str(given), loss="mse")
    assert (tmp_path / "small" / IMATRIX).read_bytes() == given.read_bytes()


# The importance matrix


@pytest.mark.slow
def test_the_matrix_is_llama_imatrix_s_and_export_reads_it(kept: Path, tmp_path: Path) -> None:
    """On the tokens of the reference's calibration text that llama.cpp is given, too."""
    from efficli.export.gguf.imatrix import compute_imatrix

    ckpt = open_checkpoint("reference")
    view = GgufView(ckpt)
    chunk, chunks = 512, 12
    plain = write_plain(ckpt, "F32", tmp_path, threads=1)
    text = committed("calibration-code")[:60_000]
    ids = SourceTokenizer(ckpt).ids(text, add_special=False, parse_special=False)
    assert len(ids) >= chunk * chunks
    found = cut(ids, chunk, bos=view.bos)[:chunks]
    told = Calibration(name="code", sha256="0" * 64, chunks=tuple(map(tuple, found)), selection=(tuple(found[0]),))
    written = open_shop("reference", tmp_path / "kept", told).shop.imatrix
    ours = read_imatrix(written)
    theirs = compute_imatrix(plain, ids, chunk=chunk, max_chunks=chunks, threads=1, progress=Silent())
    shared = {name: sums.mean() for name, sums in theirs.items() if name in ours}
    assert len(shared) >= 20
    worst = max(float(np.abs(ours[name] - values).max() / values.max()) for name, values in shared.items())
    assert worst < 5e-4
    done = efficli.export(
        "reference", tmp_path / "out", types=("Q4_K_M",), imatrix=written, certificate=False,
        threads=1,
    )  # fmt: skip
    assert done.files[0].sample is not None
