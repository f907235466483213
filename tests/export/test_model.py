"""What a file is made of: metadata, tensors, and what is said or refused because llama.cpp computes something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from efficli.checkpoint import open_checkpoint
from efficli.errors import CheckpointError, UnsupportedError
from efficli.export.gguf.layout import Metadata, OutTensor
from efficli.export.gguf.model import layout
from efficli.export.gguf.source import rows
from efficli.families import read_shape
from tests import models, pico
from tests.gguf_plain import write_f32
from tests.models import DYNAMIC, LINEAR, LLAMA3, YARN, longrope


def lay_out(folder: Path, *, strict: bool = True) -> tuple[Metadata, list[OutTensor], list[str]]:
    """The layout of the checkpoint in `folder`."""
    ckpt = open_checkpoint(folder)
    return layout(read_shape(ckpt.config), ckpt, strict=strict)


def report(family: str, folder: Path, **overrides: Any) -> list[str]:
    """The rows for the report on a family's variant."""
    return lay_out(models.save(models.build(family, **overrides), folder / "m"))[2]


def test_llama_metadata(tmp_path: Path) -> None:
    """Keys, values and types as llama.cpp's own converter writes them for a llama checkpoint."""
    pico.write_llama(tmp_path / "m", hidden=64, layers=2, heads=4, kv_heads=2, ffn=128, tie=False)
    metadata, tensors, said = lay_out(tmp_path / "m")
    ckpt = open_checkpoint(tmp_path / "m")
    found = {key: (field.value, field.type.name) for key, field in metadata.items()}
    assert found == {
        "llama.block_count": (2, "UINT32"),
        "llama.context_length": (ckpt.config["max_position_embeddings"], "UINT32"),
        "llama.embedding_length": (64, "UINT32"),
        "llama.feed_forward_length": (128, "UINT32"),
        "llama.attention.head_count": (4, "UINT32"),
        "llama.attention.head_count_kv": (2, "UINT32"),
        "llama.attention.key_length": (16, "UINT32"),
        "llama.attention.value_length": (16, "UINT32"),
        "llama.attention.layer_norm_rms_epsilon": (ckpt.config["rms_norm_eps"], "FLOAT32"),
        "llama.rope.freq_base": (pytest.approx(read_shape(ckpt.config).rope.theta), "FLOAT32"),  # type: ignore[union-attr]
        "llama.rope.dimension_count": (16, "UINT32"),
        "llama.vocab_size": (ckpt.config["vocab_size"], "UINT32"),
    }
    assert said == []
    by_name = {tensor.name: tensor for tensor in tensors}
    assert len(by_name) == len(tensors) == 3 + 2 * 9
    assert by_name["blk.1.attn_k.weight"].transform == "permute" and by_name["blk.1.attn_k.weight"].heads == 2
    assert by_name["blk.0.attn_v.weight"].transform == "copy"
    assert {tensor.name for tensor in tensors if tensor.keep_f32} == {
        "output_norm.weight",
        *(f"blk.{i}.{part}_norm.weight" for i in range(2) for part in ("attn", "ffn")),
    }


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in models.FAMILIES),
    ("llama", {"rope_parameters": LLAMA3}),
    ("granite", {"rope_parameters": YARN}),
    ("qwen2", {"rope_parameters": LINEAR}),
    ("phi3", {"rope_parameters": longrope(8, 256), "original_max_position_embeddings": 256}),
    ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}}),
    (
        "gemma3",
        {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
                "full_attention": LINEAR,
            }
        },
    ),
]


@pytest.mark.parametrize(("family", "overrides"), VARIANTS, ids=[f"{f} {''.join(o)}".strip() for f, o in VARIANTS])
def test_layouts_of_transformers_4_and_5_give_equal_files(
    family: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    """Saved by transformers 5, and with config.json as transformers 4 wrote it: the same bytes."""
    files = []
    for version in (4, 5):
        folder = models.save(models.build(family, **overrides), tmp_path / f"m{version}", layout=version)
        ckpt = open_checkpoint(folder)
        assert ("torch_dtype" in ckpt.config) == (version == 4)
        shape = read_shape(ckpt.config)
        metadata, tensors, _ = layout(shape, ckpt, strict=True)
        file = write_f32(tmp_path / f"{version}.gguf", shape.facts.gguf_arch, metadata, tensors, ckpt)
        files.append(file.read_bytes())
    assert files[0] == files[1]


def test_experts_fused_or_apart_give_equal_tensors(tmp_path: Path) -> None:
    """transformers 5 keeps a layer's experts in one tensor and saves them apart; both are read."""
    apart = models.save(models.build("qwen3_moe"), tmp_path / "apart")
    arrays = load_file(apart / "model.safetensors")
    fused: dict[str, Any] = {name: array for name, array in arrays.items() if ".experts." not in name}
    for layer in range(3):
        base = f"model.layers.{layer}.mlp.experts"
        parts = {
            part: np.stack([arrays[f"{base}.{e}.{part}_proj.weight"] for e in range(6)])
            for part in ("gate", "up", "down")
        }
        fused[f"{base}.gate_up_proj"] = np.concatenate([parts["gate"], parts["up"]], axis=1)
        fused[f"{base}.down_proj"] = parts["down"]
    (tmp_path / "fused").mkdir()
    save_file(fused, tmp_path / "fused" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "fused" / "config.json").write_text((apart / "config.json").read_text())
    found = []
    for folder in (apart, tmp_path / "fused"):
        ckpt = open_checkpoint(folder)
        _, tensors, _ = layout(read_shape(ckpt.config), ckpt, strict=True)
        found.append({t.name: rows(ckpt, t, 0, t.num_elements // t.shape[-1]) for t in tensors})
    assert found[0].keys() == found[1].keys()
    for name, array in found[0].items():
        np.testing.assert_array_equal(array, found[1][name])


def test_multimodal_gemma3_is_its_language_model(tmp_path: Path) -> None:
    """Nested text_config, prefixed tensors; the vision tower is a row in the report, and no error even when strict."""
    import torch
    import transformers

    text = models.SMALL | models.FAMILIES["gemma3"][1]
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14}, mm_tokens_per_image=4
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "both")
    metadata, tensors, said = lay_out(tmp_path / "both")
    assert said == ["the vision tower and its projector are left out: the file is the language model"]
    alone, expected, _ = lay_out(models.save(models.build("gemma3"), tmp_path / "alone"))
    assert metadata == alone
    assert {(t.name, t.shape, t.transform) for t in tensors} == {(t.name, t.shape, t.transform) for t in expected}
    assert all(t.sources[0].startswith("language_model.model.") for t in tensors)


@pytest.mark.parametrize(
    ("family", "overrides", "found"),
    [
        ("bitnet", {"hidden_act": "relu2"}, "activation 'relu2': llama.cpp's bitnet graph computes silu"),
        ("bitnet", {"tie_word_embeddings": False}, "an output matrix of its own"),
        ("llama", {"hidden_act": "gelu"}, "activation 'gelu': llama.cpp's llama graph computes silu"),
        ("qwen3", {"attention_bias": True}, "a bias of the attention's output"),
        ("qwen2", {"rope_parameters": LLAMA3}, "rope type 'llama3': llama.cpp's qwen2 graph reads no factors"),
        ("qwen3", {"rope_parameters": YARN | {"beta_fast": 16.0}}, "yarn with other beta_fast"),
        ("qwen3", {"rope_parameters": longrope(16, 256, factor=4.0)}, "rope type 'longrope'"),
        ("smollm3", {"no_rope_layers": [1] * 5}, "no_rope_layers"),
        ("gemma2", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar 64: llama.cpp's gemma2 graph computes 32"),
        ("gemma3", {"query_pre_attn_scalar": 16}, "query_pre_attn_scalar 16: llama.cpp's gemma3 graph computes 32"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob is false"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "layers 1 have no experts"),
    ],
)
def test_other_models_are_refused(family: str, overrides: dict[str, Any], found: str, tmp_path: Path) -> None:
    """What the runtime would compute otherwise, without a word, is exit code 5."""
    with pytest.raises(UnsupportedError) as caught:
        report(family, tmp_path, **overrides)
    assert found in caught.value.message
    assert caught.value.exit_code == 5


def test_what_is_said(tmp_path: Path) -> None:
    """Differences that leave a right model are rows of the report."""
    assert report("mistral", tmp_path / "a", sliding_window=128) == [
        "sliding window: llama.cpp's llama graph has none, so context_length is capped at the window, "
        "128 instead of 1024"
    ]
    assert report("mistral", tmp_path / "b", sliding_window=1024) == []
    assert "'dynamic' changes nothing up to 1024" in report("llama", tmp_path / "c", rope_parameters=DYNAMIC)[0]
    assert "longrope" in report("phi3", tmp_path / "d", rope_parameters=longrope(8, 1024))[0]
    assert report("gpt2", tmp_path / "e", activation_function="gelu") == [
        "activation 'gelu': llama.cpp computes its tanh approximation"
    ]
    assert "no 1_Pooling/config.json: the mean of all tokens is taken" in report("bert", tmp_path / "f")


@pytest.mark.parametrize(
    ("settings", "pooling"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, 1),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, 2),
        ({"pooling_mode_lasttoken": True}, 3),
        ({"pooling_mode": "cls"}, 2),
    ],
)
def test_pooling(settings: dict[str, Any], pooling: int, tmp_path: Path) -> None:
    """As sentence-transformers writes it, in the folder that modules.json names."""
    folder = models.save(models.build("bert"), tmp_path / "m")
    (folder / "9_Pooling").mkdir()
    (folder / "modules.json").write_text(
        json.dumps([{"type": "sentence_transformers.models.Pooling", "path": "9_Pooling"}])
    )
    (folder / "9_Pooling" / "config.json").write_text(json.dumps(settings))
    metadata = lay_out(folder)[0]
    assert metadata["bert.pooling_type"].value == pooling
    assert metadata["bert.attention.causal"].value is False
    (folder / "9_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(CheckpointError, match="no pooling that is known"):
        lay_out(folder)
    (folder / "9_Pooling" / "config.json").write_text(
        '{"pooling_mode_mean_tokens": true, "pooling_mode_cls_token": true}'
    )
    with pytest.raises(UnsupportedError, match="2 poolings at once"):
        lay_out(folder)


def test_unexpected_tensors_are_noted(tmp_path: Path) -> None:
    """A row of the report, and an error under `strict`."""
    folder = pico.write_llama(tmp_path / "m")
    arrays = load_file(folder / "model.safetensors")
    save_file(arrays | {"extra": np.ones((2, 2), np.float32)}, folder / "model.safetensors", metadata={"format": "pt"})
    ckpt = open_checkpoint(folder)
    _, tensors, rows = layout(read_shape(ckpt.config), ckpt)
    assert rows == ["unexpected tensor: extra; left out"]
    assert not any("extra" in tensor.sources for tensor in tensors)
    with pytest.raises(CheckpointError, match="unexpected tensor: extra"):
        lay_out(folder)
