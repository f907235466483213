"""Planned sizes of families that `export` does not write, against llama.cpp's quantizer and published files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from efficli.checkpoint import open_without_weights
from efficli.errors import SecurityError, UnsupportedError
from efficli.export.gguf.header import lay_out
from efficli.export.gguf.types import TypeChoice
from efficli.families import FAMILIES
from efficli.planning.foreign import FOREIGN
from efficli.planning.model import plan_files
from efficli.planning.subject import read_subject
from tests import pico
from tests.encoding import quantize_by_llama

FOLDER = Path(__file__).parent
TINY = json.loads((FOLDER / "foreign_tiny.json").read_text())
PUBLISHED = {name: row["config"] for name, row in json.loads((FOLDER / "foreign_published.json").read_text()).items()}
FILES = {
    ("Mixtral-8x22B", "Q4_K_M"): 85.58,
    ("Mixtral-8x22B", "Q5_K_M"): 99.96,
    ("Mixtral-8x22B", "Q3_K_L"): 72.57,
    ("Mixtral-8x22B", "IQ4_XS"): 76.35,
    ("DeepSeek-V3", "Q4_K_M"): 404.43,
    ("gpt-oss-20b", "MXFP4_MOE"): 12.1,
    ("gpt-oss-120b", "MXFP4_MOE"): 63.37,
}
"""GB of published files: the tables of bartowski/Mixtral-8x22B-v0.1-GGUF and bartowski/openai_gpt-oss-20b-GGUF; from
llama-bench's table in ik_llama.cpp's pull request 259 (376.65 GiB) and llama.cpp's 19922 (59.02 GiB)."""


def write(folder: Path, config: dict[str, Any], *, tokenizer: bool = True) -> str:
    """A folder with configuration and a tokenizer, and no weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if tokenizer:
        pico.write_tokenizer(folder)
    return str(folder)


def write_half(folder: str, out: Path) -> Path:
    """The file that a converter would write in F16, filled with random numbers."""
    subject = read_subject(*open_without_weights(folder))
    types = {t.name: "F32" if t.keep_f32 else "F16" for t in subject.tensors}
    choice = TypeChoice(type="F16", types=types)
    stored = choice.stored(subject.tensors)
    placed = lay_out(subject.metadata | choice.fields, stored)
    data = np.zeros(placed.nbytes, np.uint8)
    data[: len(placed.head)] = np.frombuffer(placed.head, np.uint8)
    draw = np.random.default_rng(0)
    for tensor, start in zip(stored, placed.offsets, strict=True):
        kind = np.float32 if types[tensor.name] == "F32" else np.float16
        values = draw.standard_normal(np.prod(tensor.shape)).astype(kind)
        data[start : start + tensor.nbytes] = values.view(np.uint8)
    data.tofile(out)
    return out


@pytest.mark.parametrize("name", sorted(TINY.keys() - {"deepseek-v2-lite"}))
def test_the_size_is_that_of_llama_cpps_quantizer(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "m", TINY[name])
    plan = plan_files(folder, types=["F16", "Q8_0", "Q4_K_M", "Q4_0"])
    assert (plan.exportable, plan.basis) == (False, "config")
    assert "llama.cpp's own converter writes it" in str(plan.why_not)
    half = write_half(folder, tmp_path / "half.gguf")
    for file in plan.files:
        written = quantize_by_llama(half, tmp_path / "out.gguf", file.type)
        assert file.nbytes == (tmp_path / "out.gguf").stat().st_size
        assert {n: (t.type, t.shape) for n, t in written.tensors.items()} == {
            n: (kind, shape) for n, (kind, _, shape) in file.tensors.items()
        }


@pytest.mark.parametrize(("name", "kind"), FILES)
def test_the_size_is_that_of_published_files(name: str, kind: str, tmp_path: Path) -> None:
    """Within 0.5 %: of other versions of llama.cpp, and with a vocabulary of some megabytes."""
    plan = plan_files(write(tmp_path / name, PUBLISHED[name]), types=[kind])
    assert plan.files[0].nbytes / 1e9 == pytest.approx(FILES[name, kind], rel=0.005)


def test_weights_in_four_bits_stay_as_they_are(tmp_path: Path) -> None:
    plan = plan_files(write(tmp_path / "m", PUBLISHED["gpt-oss-20b"]))
    assert [file.type for file in plan.files] == ["MXFP4_MOE"]
    assert plan.refused["Q4_K_M"] == "its weights are stored as MXFP4_MOE, and llama.cpp's converter keeps them so"


def test_a_vocabulary_that_cannot_be_read_is_reckoned_and_said(tmp_path: Path) -> None:
    config = TINY["mixtral"]
    whole = plan_files(write(tmp_path / "m", config), types=["Q8_0"])
    none = plan_files(write(tmp_path / "n", config, tokenizer=False), types=["Q8_0"])
    assert none.files[0].tensors == whole.files[0].tensors
    assert none.notes == (
        "the vocabulary is reckoned as 50 bytes for each token, as it cannot be read: n: tokenizer.json not found",
    )
    odd = Path(write(tmp_path / "o", config))
    tokenizer = json.loads((odd / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "x+"}, "behavior": "Isolated"}
    (odd / "tokenizer.json").write_text(json.dumps(tokenizer))
    plan = plan_files(str(odd), types=["Q8_0"])
    assert plan.notes[0].startswith("the vocabulary is reckoned as large as tokenizer.json, as it cannot be read: ")
    size = (odd / "tokenizer.json").stat().st_size
    assert 0 <= plan.files[0].nbytes - size - plan.files[0].data_nbytes < 10_000


def test_an_index_decides_whether_the_output_matrix_is_the_embedding(tmp_path: Path) -> None:
    folder = Path(write(tmp_path / "m", TINY["mixtral"] | {"tie_word_embeddings": False}))
    plain = plan_files(str(folder), types=["Q8_0"])
    names = {"model.embed_tokens.weight": "model-00001-of-00001.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    plan = plan_files(str(folder), types=["Q8_0"])
    assert (plain.tied, plan.tied) == (False, True)
    assert "output.weight" not in plan.files[0].tensors
    assert plan.notes == ("config.json says untied, and the weights have no lm_head.weight: planned as tied",)


def test_code_is_refused_and_no_family_is_in_both_tables(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", TINY["deepseek-v2"] | {"auto_map": {"AutoModel": "x.Y"}})
    with pytest.raises(SecurityError, match="refusing to run code"):
        plan_files(folder)
    assert plan_files(folder, trust_remote_code=True, types=["Q8_0"]).gguf_arch == "deepseek2"
    ours = {name for family in FAMILIES.values() for name in family.architectures}
    assert not ours & FOREIGN.keys()
    with pytest.raises(UnsupportedError, match=r"already quantized \('awq'\)"):
        plan_files(write(tmp_path / "q", TINY["mixtral"] | {"quantization_config": {"quant_method": "awq"}}))


def test_questions_that_llama_cpp_cannot_answer_are_refused(tmp_path: Path) -> None:
    plan = plan_files(write(tmp_path / "m", TINY["deepseek-v2-lite"]), types=["Q8_0", "F16"])
    assert not plan.files
    assert all("key not found in model: deepseek2.attention.q_lora_rank" in why for why in plan.refused.values())
