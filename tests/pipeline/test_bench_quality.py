"""Quality beside speed, gates, and the bytes of the cache that predictions rest on."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

import efficli
from efficli.artifact import draft
from efficli.artifact.manifest import hash_file
from efficli.bench.quality import Certificate, Row
from efficli.export.gguf.parse import read_gguf
from efficli.ops.llama import LlamaFile, StockContext
from efficli.ops.llama_log import captured_log
from efficli.pipeline.bench_predict import cache_bytes_per_token
from tests import pico
from tests.pipeline.bench_words import QUICK, codes
from tests.tiny_architectures import write_encoder, write_recurrent, write_windowed


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(pico.TEXT * 2)
    return path


def publish(folder: Path, path: Path, **certificate) -> Path:
    """An artifact of one file, with what its certificate says."""
    figures = {"kld_mean": 0.02, "top1_agreement": 0.9}
    made = Certificate(
        artifact=path.name,
        origin="pico",
        kind="divergence",
        rows=(Row("all", 100, 2, figures),),
        **certificate,
    )
    with draft(folder, inputs=[], needs_bytes=0, force=False) as files:
        shutil.copy(path, files.path / path.name)
        entry = {"path": path.name, "sha256": hash_file(path), "certificate": made.to_json()}
        files.commit({"tool": {"name": "efficli"}, "artifacts": [entry]}, {})
    return folder


def test_a_certificate_is_of_one_file_only(tiny, tmp_path):
    folder = publish(tmp_path / "artifact", tiny)
    data = bytearray(tiny.read_bytes())
    data[-1] ^= 1
    (folder / tiny.name).write_bytes(data)
    [one] = efficli.bench(folder, **QUICK, max_kld=1.0).artifacts
    assert one.quality is None and one.failure.code == 3
    assert "the certificate beside it is of another file with its name: not used" in one.notes


def test_gates_hold_against_the_certificate_of_an_artifact(tiny, tmp_path):
    folder = publish(tmp_path / "artifact", tiny)

    def failure(**gates):
        [one] = efficli.bench(folder, **QUICK, **gates).artifacts
        assert len(one.tests) == 2
        assert (one.quality.kld_mean, one.quality.top1_agreement, one.quality.origin) == (0.02, 0.9, "pico")
        return one.failure

    assert failure() is None
    assert failure(max_kld=0.02, min_top1=0.9, max_bytes=tiny.stat().st_size) is None
    assert (failure(max_kld=0.019).code, failure(max_kld=0.019).message) == (
        3,
        "mean KL divergence 0.020000, at most 0.019 wanted",
    )
    assert failure(min_top1=0.91).message == "top-1 agreement 0.9000, at least 0.91 wanted"
    small = failure(max_bytes=1000)
    assert (small.code, "at most 1000 B wanted" in small.message) == (4, True)


def test_a_gate_without_a_certificate_is_not_met(tiny, tmp_path):
    bare = shutil.copy(tiny, tmp_path / "bare.gguf")
    other = publish(tmp_path / "artifact", tiny)
    (other / tiny.name).write_bytes(write_encoder(tmp_path / "e.gguf").read_bytes())  # no longer what was certified
    absent = publish(tmp_path / "absent", tiny, status="origin absent")
    result = efficli.bench([bare, other, absent], **QUICK, max_kld=1.0)
    assert codes(result) == [3, 3, 3]
    for one in result.artifacts:
        assert one.failure.message == "no KL divergence is known of it, and a gate asks for one"
        assert one.failure.hint == "--base MODEL measures it"
        assert one.tests


def test_a_manifest_of_another_version_is_no_certificate(tiny, tmp_path):
    folder = publish(tmp_path / "artifact", tiny)
    manifest = json.loads((folder / "efficli.json").read_text())
    manifest["artifacts"][0]["certificate"]["schema_version"] = 99
    (folder / "efficli.json").write_text(json.dumps(manifest))
    [one] = efficli.bench(folder, **QUICK).artifacts
    assert (one.failure, one.quality) == (None, None)


def test_quality_is_measured_against_a_base(spoken, text, tmp_path):
    """For each what is its own: a model that the base cannot be compared with fails alone."""
    stranger = write_encoder(tmp_path / "e.gguf")
    result = efficli.bench(
        [spoken["Q4_0"], stranger, spoken["F32"]], **QUICK, base=str(spoken["F32"]), text=text, max_kld=1e-3
    )
    rough, other, same = result.artifacts
    assert rough.quality.kld_mean > 1e-3 > same.quality.kld_mean
    assert same.quality.top1_agreement > 0.95
    assert (rough.failure.code, same.failure) == (3, None)
    assert other.failure is not None
    assert [bool(one.tests) for one in result.artifacts] == [True] * 3


# the cache


@pytest.mark.parametrize("types", [("f16", "f16"), ("f32", "bf16"), ("q8_0", "q4_0"), ("q5_1", "iq4_nl")])
def test_bytes_of_the_cache_are_what_llama_cpp_says(spoken, types):
    path, ctx = spoken["F32"], 65536
    stock = StockContext(cache_type_k=types[0], cache_type_v=types[1], flash_attn="on")
    with captured_log() as log, LlamaFile(path, ctx=ctx, threads=1, stock=stock):
        pass
    sizes = [match for line in log if (match := re.search(r"size = +([\d.]+) MiB \( *(\d+) cells", line.text))]
    [(size, cells)] = [match.groups() for match in sizes]
    assert int(cells) == ctx
    found = cache_bytes_per_token(read_gguf(path).metadata, *types)
    assert found * ctx == pytest.approx(float(size) * 2**20, rel=1e-3)


def test_bytes_of_the_cache_of_other_models(tmp_path):
    windowed = read_gguf(write_windowed(tmp_path / "w.gguf")).metadata
    assert cache_bytes_per_token(windowed, "f16", "f32") == 2 * 2 * 8 * (2 + 4)  # layers x heads x width
    for write in (write_recurrent, write_encoder):
        metadata = read_gguf(write(tmp_path / "m.gguf")).metadata
        assert cache_bytes_per_token(metadata, "f16", "f16") == 0
