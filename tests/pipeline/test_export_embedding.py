"""The spine for an embedding model: all-MiniLM-L6-v2 becomes F32 and Q8_0 files with their certificate of cosines."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import efficli
from efficli.artifact import read_artifact
from efficli.data import committed
from efficli.errors import UsageError
from efficli.ops.llama import LlamaFile
from tests.light import light_site, run_light
from tests.minilm import minilm_folder


@pytest.fixture(scope="module")
def minilm() -> Path:
    """The model's folder in its package."""
    return minilm_folder()


@pytest.mark.slow
def test_minilm(minilm: Path, tmp_path: Path) -> None:
    """What llama.cpp and its users are told is what sentence-transformers computes, within what Q8_0 costs."""
    text = tmp_path / "lines.txt"
    text.write_text(committed("evaluation-prose")[:6000], encoding="utf-8")
    result = efficli.export(minilm, tmp_path / "out", types=("F32", "Q8_0"), text=text)
    exact, eight = (file.certificate for file in result.files)
    assert exact is not None and eight is not None
    assert (exact.kind, exact.status, exact.total.n) == ("embedding", "measured", eight.total.n)
    assert exact["cosine_mean"] >= 0.999999 > eight["cosine_mean"] > 0.999
    assert 0.99999 < exact["cosine_min"] <= exact["cosine_mean"] and eight["cosine_min"] > 0.995
    assert any("tanh approximation" in row for row in result.report)
    assert result.files[0].sample == ""
    artifact = read_artifact(tmp_path / "out")
    artifact.verify()
    told = artifact.manifest["artifacts"][1]["certificate"]
    assert told == json.loads(json.dumps(eight.to_json()))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "cosine" in card and "apache-2.0" in card.lower()
    _compare_with_sentence_transformers(minilm, tmp_path / "out" / result.files[0].name)


def _compare_with_sentence_transformers(folder: Path, file: Path) -> None:
    """Text in, vector out: the file's tokenizer and pooling against the whole package's."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    texts = ["A man is eating food.", "def read(path): return open(path).read()", "Café — naïve ﬁ 12,345!"]
    expected = model.encode(texts)  # of length 1
    with LlamaFile(file, ctx=256, embeddings=True, exact=True, threads=1) as runtime:
        for line, vector in zip(texts, expected, strict=True):
            found = runtime.embed(runtime.tokenize(line, add_special=True))
            assert found @ vector / np.linalg.norm(found) >= 0.999996


def test_gates_for_language_models_do_not_apply(minilm: Path, tmp_path: Path) -> None:
    """Said, and nothing is written."""
    text = tmp_path / "lines.txt"
    text.write_text("A sentence that is long enough.\nAnother sentence, as long as that.\n")
    with pytest.raises(UsageError, match="max_kld does not apply to an embedding model"):
        efficli.export(minilm, tmp_path / "out", types=("Q8_0",), text=text, max_kld=0.1)
    assert [path.name for path in tmp_path.iterdir()] == ["lines.txt"]


@pytest.mark.slow
def test_minilm_on_the_committed_texts(minilm: Path, tmp_path: Path) -> None:
    """The whole certificate, by PyTorch, and by the F32 file where it is not installed."""
    result = efficli.export(minilm, tmp_path / "out", types=("F32", "Q8_0"))
    exact, eight = (file.certificate for file in result.files)
    assert exact is not None and eight is not None
    assert exact.total.n == 512 and exact["cosine_mean"] >= 0.999999 and exact["cosine_min"] > 0.99999
    assert 0.9999 > eight["cosine_mean"] > 0.9995 and eight["cosine_min"] > 0.998
    packages = light_site(tmp_path / "site")
    told = run_light(packages, ["export", str(minilm), "-o", str(tmp_path / "light"), "--type", "F32,Q8_0", "--json"])
    assert told.returncode == 0, told.stderr
    light = json.loads(told.stdout)["files"][1]
    assert light["sha256"] == result.files[1].sha256
    row = next(row for row in light["certificate"]["rows"] if row["text"] == "all")
    assert row["cosine_mean"] == pytest.approx(eight["cosine_mean"], abs=1e-5)
