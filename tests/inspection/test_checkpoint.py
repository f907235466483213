"""Checkpoints: the embedded ones are clean, and what is wrong with one is a finding; nothing of it is run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from efficli.errors import CheckpointError, SecurityError
from efficli.inspection import llama_view
from efficli.pipeline import inspect
from tests.pico import llama_tensors, write_llama, write_safetensors, write_shards

NORM, UP = "model.layers.0.input_layernorm.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def _alone(monkeypatch) -> None:
    """No llama.cpp: what it says of templates is tested elsewhere."""
    monkeypatch.setattr(llama_view, "is_installed", lambda: False)


@pytest.fixture
def pico(tmp_path) -> Path:
    return write_llama(tmp_path / "pico", shards=2)


def edit(path: Path, **values: Any) -> None:
    told = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in told.items() if value is not None}))


def findings(path: Path) -> list[str]:
    found = inspect(path)
    assert all(finding.hint for finding in found.all_findings)
    assert found.exit_code == max((finding.code for finding in found.all_findings), default=0)
    return [finding.line for finding in found.all_findings]


@pytest.mark.parametrize("word", ["reference", "reference-twin"])
def test_the_embedded_checkpoints_are_clean(word):
    found = inspect(word)
    assert (found.exit_code, found.kind) == (0, "checkpoint")
    (report,) = found.models
    assert report.bits_per_weight == 16
    assert report.facts["architecture"] == "LlamaForCausalLM"
    assert not {"finding", "skipped"} & {check.status for check in report.checks if check.name != "chat template"}


def test_shards_and_what_is_in_them(pico):
    assert findings(pico) == []
    (report,) = inspect(pico).models
    tensors = llama_tensors(json.loads((pico / "config.json").read_text()))
    assert report.num_weights == sum(values.size for values in tensors.values())
    assert report.nbytes == 4 * report.num_weights


def with_value(pico: Path, name: str, value: float) -> None:
    tensors = llama_tensors(json.loads((pico / "config.json").read_text()))
    tensors[name].reshape(-1)[70 if tensors[name].ndim > 1 else 3] = value
    write_shards(pico, tensors, shards=2)


def test_values(pico):
    with_value(pico, UP, np.nan)
    assert findings(pico) == [f"pico: 1 NaN in {UP} (first at [1,6])"]
    with_value(pico, NORM, -np.inf)
    assert findings(pico) == [f"pico: 1 Inf in {NORM} (first at [3])"]
    assert inspect(pico, scan=False).exit_code == 0


def test_values_across_slabs(tmp_path, monkeypatch):
    """In the last row of a matrix that is read in many pieces."""
    monkeypatch.setattr("efficli.inspection.weights.SLAB_BYTES", 1000)
    path = write_llama(tmp_path / "pico", layers=2)
    tensors = llama_tensors(json.loads((path / "config.json").read_text()))
    tensors[UP][127, 63] = np.nan
    tensors[UP][100, 1] = np.inf
    write_shards(path, tensors)
    assert findings(path) == [f"pico: 1 NaN and 1 Inf in {UP} (first at [100,1])"]


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "more tokens": (
        lambda p: edit(
            p / "tokenizer.json",
            added_tokens=[
                *json.loads((p / "tokenizer.json").read_text())["added_tokens"],
                {"id": 384, "content": "<|one more|>", "special": True},
            ],
        ),
        "tokenizer has 385 ids, embedding 384 rows",
    ),
    "no tokenizer": (lambda p: (p / "tokenizer.json").unlink(), "tokenizer.json not found"),
    "no licence": (lambda p: (p / "README.md").unlink(), "people need the licence: README.md names none"),
    "code": (
        lambda p: edit(p / "config.json", auto_map={"AutoModel": "evil.Model"}),
        "config.json: names code of its own (auto_map); none was run",
    ),
    "shape": (lambda p: edit(p / "config.json", intermediate_size=129), "is 128×64, config says 129×64"),
    "layers": (lambda p: edit(p / "config.json", num_hidden_layers=3), "missing 9 of 29 tensors"),
    "no model type": (lambda p: edit(p / "config.json", model_type=None), "config.json lacks model_type"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_findings(name, pico):
    damage, message = DAMAGE[name]
    damage(pico)
    told = findings(pico)
    assert any(message in line for line in told), told


def test_a_model_without_an_end(pico):
    edit(pico / "config.json", eos_token_id=None)
    (pico / "generation_config.json").unlink()
    edit(pico / "tokenizer_config.json", eos_token=None)
    assert findings(pico) == ["config.json lacks eos_token_id"]


def test_tied_and_yet_two_matrices(tmp_path):
    """What config.json says, and what is there."""
    path = write_llama(tmp_path / "pico", tie=False)
    assert findings(path) == []
    edit(path / "config.json", tie_word_embeddings=True)
    (line,) = findings(path)
    assert line == "config.json says they are tied, and lm_head.weight is another matrix"
    tensors = llama_tensors(json.loads((path / "config.json").read_text()) | {"tie_word_embeddings": False})
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    write_shards(path, tensors)
    assert findings(path) == []
    seen = {check.name: check.seen for check in inspect(path).models[0].checks}
    assert seen["tied embeddings"] == "the same matrix is stored twice; config says True"


def test_a_family_that_is_not_exported_and_weights_in_anothers_codes_are_shown(pico):
    edit(pico / "config.json", architectures=["FooForCausalLM"])
    found = inspect(pico)
    assert found.exit_code == 0
    assert found.models[0].facts["family"] == "none that efficli exports"
    edit(
        pico / "config.json",
        architectures=["LlamaForCausalLM"],
        quantization_config={"quant_method": "gptq", "bits": 4},
    )
    found = inspect(pico)
    assert (found.exit_code, found.models[0].facts["type"]) == (0, "gptq")


def test_float8_is_shown_and_not_looked_at(tmp_path):
    path = write_llama(tmp_path / "pico")
    tensors = llama_tensors(json.loads((path / "config.json").read_text()))
    coded = {name: ("F32", values.shape, values.tobytes()) for name, values in tensors.items()}
    coded[UP] = ("F8_E4M3", (128, 64), bytes(128 * 64))
    write_safetensors(path / "model.safetensors", coded)
    seen = {check.name: check.seen for check in inspect(path).models[0].checks}
    assert seen["values"] == "no NaN, no Inf; not looked at: F8_E4M3"


def test_hashes(pico):
    names = sorted(path.name for path in pico.iterdir())
    sums = "".join(f"{hashlib.sha256((pico / n).read_bytes()).hexdigest()}  ./{n}\n" for n in names)
    (pico / "SHA256SUMS").write_text(sums)
    assert findings(pico) == []
    (pico / "README.md").write_text("---\nlicense: mit\n---\n")
    assert findings(pico) == ["README.md: verify: sha256 differs"]
    assert inspect(pico).exit_code == 6
    (pico / "SHA256SUMS").write_text(f"{'0' * 64}  ../outside\n")
    (line,) = findings(pico)
    assert "file name leaves the checkpoint directory" in line
    assert inspect(pico).exit_code == 6
    (pico / "SHA256SUMS").write_text("not a hash\n")
    assert findings(pico) == ["SHA256SUMS:1: not a line of sha256sum"]


def test_what_cannot_be_read_at_all_is_an_error(pico, tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint") as caught:
        inspect("/nowhere at all")
    assert "a .gguf or .onnx file" in str(caught.value.hint)
    with pytest.raises(CheckpointError, match="no such checkpoint") as caught:
        inspect(str(tmp_path / "pic"))
    assert "pico" in str(caught.value.hint)
    (pico / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is not here"):
        inspect(pico)
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "config.json").write_text("{}")
    (tmp_path / "pickle" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(SecurityError, match="refusing pickle"):
        inspect(tmp_path / "pickle")
