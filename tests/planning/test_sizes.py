"""Sizes planned without weights are those of the files that are written once the weights are there, to the byte."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest

import efficli
from efficli.checkpoint import open_checkpoint
from efficli.errors import CheckpointError, EffiError, SecurityError, UnsupportedError, UsageError
from efficli.export.gguf.job import prepare
from efficli.export.gguf.types import TypeRequest
from efficli.families import expected_tensors, read_shape
from efficli.ops.ggml_types import FILE_TYPES
from efficli.planning.model import PlannedModel, plan_files
from tests import pico, whole
from tests.gguf_reader import Reader
from tests.planning.weightless import REFERENCE, add_weights, copy_without_weights, export_sizes

ALL = tuple(name for name in FILE_TYPES if name != "F32")
TWIN = REFERENCE.parent / "twin"


def check_every_type(source: Path, folder: Path, out: Path) -> PlannedModel:
    """Plan without weights, add them, plan again and write every type; the plan, all of it compared."""
    bare = plan_files(str(copy_without_weights(source, folder)))
    add_weights(source, folder)
    assert replace(plan_files(str(folder)), basis="config") == bare
    assert bare.basis == "config"
    assert {file.type for file in bare.files} | set(bare.refused) == set(ALL)
    assert compared(bare, folder, out) == set(ALL)
    return bare


def compared(plan: PlannedModel, folder: Path, out: Path) -> set[str]:
    """The types of a plan, each file written, or refused by the export in the same words."""
    sizes = export_sizes(folder, out, [file.type for file in plan.files if not file.needs_imatrix])
    needing = [file.type for file in plan.files if file.needs_imatrix]
    sizes |= export_sizes(folder, out, needing, matrix=True)
    assert {file.type: file.nbytes for file in plan.files} == sizes
    for kind in needing:
        with pytest.raises(UsageError, match=f"{kind} needs an importance matrix"):
            prepare(open_checkpoint(folder), [TypeRequest(type=kind)], own={})
    for kind, why in plan.refused.items():
        with pytest.raises(EffiError) as raised:
            prepare(open_checkpoint(folder), [TypeRequest(type=kind)], own={})
        assert raised.value.message == why
    return set(sizes) | set(plan.refused)


def test_every_type_of_the_awkward_twin(tmp_path: Path) -> None:
    plan = check_every_type(TWIN, tmp_path / "twin", tmp_path)
    assert plan.refused == {"Q1_0": "llama.cpp cannot choose types: no tensor type fallback is defined for type q1_0"}
    q4 = next(file for file in plan.files if file.type == "Q4_K_M")
    assert q4.fallbacks
    written = Reader(tmp_path / "Q4_K_M.gguf")
    assert {name: (t.type, t.shape) for name, t in written.tensors.items()} == {
        name: (kind, shape) for name, (kind, _, shape) in q4.tensors.items()
    }
    assert sum(nbytes for _, nbytes, _ in q4.tensors.values()) == q4.data_nbytes


WIDE = {
    "gemma3": {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 6},
    "qwen3_moe": {"hidden_size": 256, "moe_intermediate_size": 256},
    "gpt2": {"n_embd": 256, "n_inner": 512},
    "bert": {"hidden_size": 256, "intermediate_size": 512},
}
"""Rows that fill blocks of 256, so that every type is there as itself; vocabularies of SentencePiece, byte pairs and
WordPiece."""


@pytest.mark.slow
@pytest.mark.parametrize("family", WIDE)
def test_every_type_of_a_family(family: str, tmp_path: Path) -> None:
    whole.write(tmp_path / "source", whole.KINDS[family], **WIDE[family])
    plan = check_every_type(tmp_path / "source", tmp_path / "wide", tmp_path)
    assert plan.exportable
    assert plan.metadata["general.architecture"] == plan.gguf_arch
    assert bool(plan.cache) == (family != "bert")


@pytest.fixture(scope="module")
def bare_reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PlannedModel]:
    """The plan of the reference without weights; the weights are then added."""
    folder = copy_without_weights(REFERENCE, tmp_path_factory.mktemp("bare") / "model")
    plan = plan_files(str(folder))
    assert (plan.basis, plan.refused) == ("config", {})
    add_weights(REFERENCE, folder)
    return folder, plan


@pytest.mark.parametrize("kinds", [["Q4_0"], pytest.param(None, marks=pytest.mark.slow)])
def test_the_reference_by_the_whole_command(
    kinds: list[str] | None, bare_reference: tuple[Path, PlannedModel], tmp_path: Path
) -> None:
    folder, plan = bare_reference
    files = [file for file in plan.files if not file.needs_imatrix and (kinds is None or file.type in kinds)]
    types = [file.type for file in files]
    result = efficli.export(folder, tmp_path / "out", types=types, certificate=False, allow_non_ternary=True)
    for file, written in zip(files, result.files, strict=True):
        assert (file.type, file.nbytes) == (written.type, (tmp_path / "out" / written.name).stat().st_size)
        assert file.bits_per_weight == written.bits_per_weight


@pytest.mark.slow
@pytest.mark.parametrize("start", ["IQ1", "IQ2", "IQ3"])
def test_the_types_of_the_reference_that_need_a_matrix(
    start: str, bare_reference: tuple[Path, PlannedModel], tmp_path: Path
) -> None:
    folder, plan = bare_reference
    files = [f for f in plan.files if f.needs_imatrix and f.type.startswith((start, "Q2") if start == "IQ1" else start)]
    assert len(files) >= 2
    sizes = export_sizes(folder, tmp_path, [file.type for file in files], matrix=True)
    assert sizes == {file.type: file.nbytes for file in files}


def test_types_are_named_in_any_case_and_once() -> None:
    plan = plan_files("reference", types=["q4_0", "Q8_0", "q4_k", "q8_0"])
    assert [file.type for file in plan.files] == ["Q4_0", "Q8_0", "Q4_K_M"]


def test_the_embedded_checkpoint_is_planned_from_its_headers() -> None:
    plan = plan_files("reference")
    assert (plan.name, plan.basis, plan.tied, plan.why_not, plan.refused) == ("reference", "headers", True, None, {})
    assert {file.type for file in plan.files if file.ternary} == {"TQ1_0", "TQ2_0", "Q1_0", "Q2_0"}
    needing = {file.type for file in plan.files if file.needs_imatrix}
    assert {"IQ1_S", "IQ2_XS", "IQ3_XXS", "Q2_K_S"} <= needing
    assert not needing & {"Q4_0", "Q2_K", "IQ4_XS", "IQ3_M", "Q8_0"}
    assert not [key for key in plan.metadata if key.startswith("tokenizer.ggml.tokens")]
    assert plan.max_positions == plan.metadata["llama.context_length"]


def untied(folder: Path) -> None:
    """Take the output matrix out of the weights, and leave config.json as it is."""
    config = json.loads((folder / "config.json").read_text())
    pico.write_shards(folder, pico.llama_tensors(config | {"tie_word_embeddings": True}))


def test_headers_without_the_output_matrix_decide(tmp_path: Path) -> None:
    folder = pico.write_llama(tmp_path / "m", tie=False)
    assert not plan_files(str(folder), types=["Q8_0"]).tied
    untied(folder)
    plan = plan_files(str(folder), types=["Q8_0"])
    assert (plan.tied, plan.exportable) == (True, False)
    assert "config.json says untied, and the weights have no lm_head.weight: planned as tied" in plan.notes
    with pytest.raises(CheckpointError) as raised:
        efficli.export(folder, tmp_path / "out", types=("Q8_0",))
    assert plan.why_not == f"{raised.value.line}; {raised.value.hint}"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert export_sizes(folder, tmp_path / "out", ["Q8_0"]) == {"Q8_0": plan.files[0].nbytes}


def test_an_output_matrix_that_config_does_not_speak_of_is_left_out(tmp_path: Path) -> None:
    folder = pico.write_llama(tmp_path / "m", tie=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    plan = plan_files(str(folder), types=["Q8_0"])
    assert plan.tied
    assert plan.exportable
    assert [note for note in plan.notes if note.startswith("config.json says tied, and the weights have lm_head")]
    assert export_sizes(folder, tmp_path / "out", ["Q8_0"]) == {"Q8_0": plan.files[0].nbytes}


@pytest.mark.parametrize("lack", ["all shards", "one shard", "pointers"])
def test_an_index_tells_the_names_of_weights_that_are_not_here(lack: str, tmp_path: Path) -> None:
    folder = pico.write_llama(tmp_path / "m", tie=False, shards=2)
    whole_plan = plan_files(str(folder), types=["Q8_0"])
    shards = sorted(folder.glob("model-*.safetensors"))
    for shard in shards[: 1 if lack == "one shard" else 2]:
        shard.unlink()
        if lack == "pointers":
            shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    plan = plan_files(str(folder), types=["Q8_0"])
    told = (f"{shards[0].name} is a Git LFS pointer, the weights were not fetched",) if lack == "pointers" else ()
    assert plan == replace(whole_plan, basis="config", notes=(*told, *whole_plan.notes))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["weight_map"]["lm_head.weight"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert plan_files(str(folder), types=["Q8_0"]).tied
    del index["weight_map"]["model.norm.weight"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"missing 1 of \d+ tensors: model\.norm\.weight"):
        plan_files(str(folder), types=["Q8_0"])


def test_experts_in_one_piece_or_apart_are_the_same_file(tmp_path: Path) -> None:
    """transformers 5 may save all experts of a layer as one tensor; config.json does not tell."""
    folder = pico.write_llama(tmp_path / "m", tie=False, hidden=64)
    config = json.loads((folder / "config.json").read_text()) | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 96,
        "norm_topk_prob": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    bare = plan_files(str(folder), types=["Q8_0", "Q4_K_M"])
    assert bare.metadata["general.size_label"].startswith("6x")
    for fused in (False, True):
        specs = expected_tensors(read_shape(config), fused_experts=fused)
        zeros = {spec.name: ("F32", spec.shape, bytes(4 * prod(spec.shape))) for spec in specs}
        pico.write_safetensors(folder / "model.safetensors", zeros)
        assert replace(plan_files(str(folder), types=["Q8_0", "Q4_K_M"]), basis="config") == bare
        sizes = export_sizes(folder, tmp_path / str(fused), ["Q8_0", "Q4_K_M"])
        assert sizes == {file.type: file.nbytes for file in bare.files}


def a_truncated_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "x.Y"}}))


def a_link_that_leaves(folder: Path) -> None:
    shutil.move(folder / "tokenizer.json", folder.parent / "elsewhere.json")
    (folder / "tokenizer.json").symlink_to(folder.parent / "elsewhere.json")


def a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def an_adapter(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")


def a_key_twice(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text().replace("{", '{"vocab_size": 5, ', 1))


def codes_of_another_quantizer(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def another_family(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["LlamoForCausalLM"]}))


@pytest.mark.parametrize(
    ("damage", "kind", "line"),
    [
        (a_truncated_file, CheckpointError, "1 bytes short"),
        (code, SecurityError, "refusing to run code from the checkpoint"),
        (a_link_that_leaves, SecurityError, "leaves the checkpoint directory"),
        (a_pickle, SecurityError, "refusing pickle checkpoint"),
        (an_adapter, UnsupportedError, "this is an adapter"),
        (a_key_twice, CheckpointError, "duplicate key 'vocab_size'"),
        (codes_of_another_quantizer, UnsupportedError, r"already quantized \(gptq\)"),
        (no_tokenizer, CheckpointError, "tokenizer.json not found"),
        (another_family, UnsupportedError, "architecture 'LlamoForCausalLM' is not supported"),
    ],
)
def test_what_export_refuses_is_refused_in_the_same_words(
    damage: Callable[[Path], None], kind: type[EffiError], line: str, tmp_path: Path
) -> None:
    folder = pico.write_llama(tmp_path / "m")
    damage(folder)
    with pytest.raises(kind, match=line) as raised:
        plan_files(str(folder))
    with pytest.raises(kind) as told:
        efficli.export(folder, tmp_path / "out")
    assert (raised.value.line, raised.value.hint) == (told.value.line, told.value.hint)


def test_code_is_ignored_when_trusted_and_types_must_exist(tmp_path: Path) -> None:
    folder = pico.write_llama(tmp_path / "m")
    code(folder)
    plan = plan_files(str(folder), trust_remote_code=True, types=["Q8_0"])
    assert plan.notes == ("config.json: auto_map ignored; no code from the checkpoint is run",)
    with pytest.raises(UsageError, match="unknown type 'Q4KM'"):
        plan_files("reference", types=["Q4KM"])
    with pytest.raises(UsageError, match="no types to plan"):
        plan_files("reference", types=[])
