"""What a model is called, where it comes from, and how its file is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf import GGUFValueType

from efficli.checkpoint import Checkpoint, open_checkpoint
from efficli.export.gguf.general import MAX_FRONT_MATTER, file_name, general_metadata, model_card
from efficli.export.gguf.header import lay_out
from efficli.export.gguf.layout import string
from tests.vocabs import write_checkpoint

CARD = """---
license: apache-2.0
language:
- en
- no
tags: [code, small]
base_model: some-org/Base-7B-v1.5
datasets:
- owner/data
author: Someone
pipeline_tag: text-generation
---
# A model
"""


def opened(folder: Path, card: str | None = None, model: dict[str, Any] | None = None) -> Checkpoint:
    write_checkpoint(folder, None, {}, model)
    if card is not None:
        (folder / "README.md").write_text(card)
    return open_checkpoint(folder)


def values(ckpt: Checkpoint, **options: Any) -> dict[str, Any]:
    fields = general_metadata(ckpt, **{"num_weights": 8_900_000, **options})
    return {key.removeprefix("general."): field.value for key, field in fields.items()}


def test_fields_from_card_and_directory(tmp_path: Path) -> None:
    found = values(opened(tmp_path / "My-Model-9M-chat-v2.0", CARD))
    assert found == {
        "type": "model",
        "name": "My Model 9M Chat v2.0",
        "author": "Someone",
        "version": "v2.0",
        "finetune": "chat",
        "basename": "My-Model",
        "size_label": "9M",
        "license": "apache-2.0",
        "base_model.count": 1,
        "base_model.0.name": "Base 7B v1.5",
        "base_model.0.organization": "Some Org",
        "base_model.0.version": "v1.5",
        "base_model.0.repo_url": "https://huggingface.co/some-org/Base-7B-v1.5",
        "dataset.count": 1,
        "dataset.0.name": "Data",
        "dataset.0.organization": "Owner",
        "dataset.0.repo_url": "https://huggingface.co/owner/data",
        "tags": ["code", "small", "text-generation"],
        "languages": ["en", "no"],
    }


def test_equal_to_gguf_metadata_load(tmp_path: Path) -> None:
    """The package's own reader of model folders, which llama.cpp's converter uses, says the same."""
    ckpt = opened(tmp_path / "Tiny-Llama-9M-Instruct", CARD, {"_name_or_path": "some-org/Other-9M"})
    (ckpt.root / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_k": 20, "top_p": 0.9}))
    reference = gguf.Metadata.load(model_path=ckpt.root, total_params=8_900_000)
    if reference.size_label is None:
        reference.size_label = gguf.size_label(8_900_000, 8_900_000, 0, 0)
    writer = gguf.GGUFWriter(path=None, arch="llama")
    writer.add_type(gguf.GGUFType.MODEL)
    reference.set_gguf_meta_model(writer)
    expected = {key: value.value for key, value in writer.kv_data[0].items() if key != "general.architecture"}
    found = general_metadata(ckpt, num_weights=8_900_000)
    assert {key: field.value for key, field in found.items()} == expected
    assert expected["general.sampling.temp"] == 0.6


def test_fields_can_be_written_and_are_the_same_each_time(tmp_path: Path) -> None:
    ckpt = opened(tmp_path / "Model-9M", CARD)
    fields = general_metadata(ckpt, num_weights=8_900_000, quantized_by="efficli")
    assert fields["general.tags"].item == GGUFValueType.STRING
    head = lay_out({"general.architecture": string("llama")} | fields, []).head
    path = tmp_path / "x.gguf"
    path.write_bytes(head)
    read = gguf.GGUFReader(path)
    assert read.fields["general.quantized_by"].contents() == "efficli"
    assert read.fields["general.tags"].contents() == ["code", "small", "text-generation"]
    again = general_metadata(open_checkpoint(ckpt.root), num_weights=8_900_000, quantized_by="efficli")
    assert lay_out({"general.architecture": string("llama")} | again, []).head == head


def test_size_labels(tmp_path: Path) -> None:
    ckpt = opened(tmp_path / "model")
    assert values(ckpt)["size_label"] == "8.9M"
    assert values(ckpt, num_weights=1_234_000_000)["size_label"] == "1.2B"
    moe = values(ckpt, num_weights=1_000_000 + 8 * 2_000_000, expert_weights=16_000_000, num_experts=8)
    assert moe["size_label"] == "8x3.0M"


@pytest.mark.parametrize(
    ("card", "note"),
    [
        ("---\nlicense: mit\nlicense: gpl\n---\n", "duplicate key 'license'"),
        ("---\nlicense: !!python/object/apply:os.system [id]\n---\n", "front matter left out"),
        ("---\na: &x [1]\nb: [*x, *x]\n" + "c: [" * 30 + "]" * 30 + "\n---\n", "front matter left out"),
        ("---\nlicense: mit\n", "no end"),
    ],
)
def test_odd_cards_stop_nothing_and_are_said(card: str, note: str, tmp_path: Path) -> None:
    ckpt = opened(tmp_path / "model", card)
    assert note in model_card(ckpt).notes[0]
    assert "license" not in values(ckpt)


def test_card_without_front_matter_and_values_of_other_kinds(tmp_path: Path) -> None:
    assert model_card(opened(tmp_path / "a", "# Title\n---\nlicense: mit\n---\n")).values == {}
    assert model_card(opened(tmp_path / "b", "---\n" + "x" * MAX_FRONT_MATTER)).notes
    card = "---\nversion: 1.5\nauthor: [a, b]\nlicense: [mit, apache-2.0]\ntags: [1, a]\nbase_model: {x: 1}\n---\n"
    found = values(opened(tmp_path / "c", card))
    assert (found["version"], found["license"], found["tags"]) == ("1.5", "mit,apache-2.0", ["a"])
    assert "author" not in found and "base_model.count" not in found


@pytest.mark.parametrize(
    ("folder", "strips", "name"),
    [
        ("Phi-3-mini-4k-instruct", False, "Phi 3 Mini 4k Instruct"),
        ("Phi-3-mini-4k-instruct", True, "Phi-3 Mini 4k Instruct"),
        ("phi3_tuned", False, "Phi 3_Tuned"),
        ("tuned", True, "Tuned (Phi-3)"),
        ("tuned", False, "Tuned"),
    ],
)
def test_names_that_llama_cpp_treats_as_phi3(folder: str, strips: bool, name: str, tmp_path: Path) -> None:
    found = values(opened(tmp_path / folder), strips_like_phi3=strips)
    assert found["name"] == name
    assert ("phi-3" in name.lower() or "phi3" in name.lower()) is strips


def test_file_names(tmp_path: Path) -> None:
    fields = general_metadata(opened(tmp_path / "My-Model-9M-chat-v2.0"), num_weights=8_900_000)
    assert file_name(fields, "Q4_K_M") == "My-Model-9M-chat-v2.0-Q4_K_M.gguf"
    plain = general_metadata(opened(tmp_path / "reference"), num_weights=8_900_000)
    assert file_name(plain, "f16") == "Reference-8.9M-F16.gguf"
    evil = "---\nname: ../../etc/passwd\nfinetune: a/b\\c:d\nversion: '..'\nbasename: '/'\n---\n"
    named = file_name(general_metadata(opened(tmp_path / "x", evil), num_weights=8_900_000), "Q8_0")
    assert named == "model-8.9M-a-b-c-d-model-Q8_0.gguf"
    long = general_metadata(opened(tmp_path / "y", f"---\nname: {'n' * 500}\n---\n"), num_weights=1)
    assert len(file_name(long, "Q8_0")) < 200
