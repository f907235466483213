"""Families that plan knows and export does not, against llama.cpp's converter, transformers and published figures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from efficli.errors import CheckpointError, EffiError, UnsupportedError
from efficli.export.gguf.layout import Field, Metadata, string, u32
from efficli.export.gguf.types import TypeRequest, choose_types
from efficli.planning.cache import kv_bytes
from efficli.planning.foreign import FOREIGN, ForeignModel, read_foreign
from efficli.target import active_bytes
from tests.planning.sparse import allocated, opened, write_header

FOLDER = Path(__file__).parent
TINY = json.loads((FOLDER / "foreign_tiny.json").read_text())
CONVERTED = json.loads((FOLDER / "foreign_converted.json").read_text())
"""What llama.cpp's converter wrote of TINY: scripts/foreign_converted.py."""
PUBLISHED = json.loads((FOLDER / "foreign_published.json").read_text())
FAST = {
    "DeepSeek-V2-Lite", "Mixtral-8x7B", "Qwen1.5-MoE-A2.7B", "gpt-oss-20b", "LFM2-1.2B", "granite-4.0-h-tiny",
    "Falcon-H1-0.5B", "Qwen3-Next-80B-A3B", "gemma-3n-E2B",
}  # fmt: skip
"""One of each architecture; the others are in the slow tier where llama.cpp is asked."""
NOT_LOADED = {"deepseek-v2-lite": "a low rank of queries", "gemma3n": "its graph has 256 and 64"}
"""Tiny models that llama.cpp refuses for their sizes, and what the note says."""


def tiered(names: Any) -> list[Any]:
    """Parameters, slow where the model is not one of FAST or TINY."""
    return [name if name in FAST or name in TINY else pytest.param(name, marks=pytest.mark.slow) for name in names]


def read(config: dict[str, Any]) -> ForeignModel:
    model = read_foreign(config)
    assert model is not None
    return model


def header(model: ForeignModel) -> Metadata:
    """What llama.cpp needs beside the tensors."""
    size = {f"{model.gguf_arch}.vocab_size": u32(model.vocab_size)}
    return {"general.architecture": string(model.gguf_arch)} | size | model.metadata


def comparable(field: Field) -> list[Any]:
    """Types and value as the converter's record has them: float32, infinity as a word."""

    def plain(value: Any) -> Any:
        if not isinstance(value, float):
            return value
        return str(value) if math.isinf(value) else float(np.float32(value))

    value = [plain(item) for item in field.value] if isinstance(field.value, list) else plain(field.value)
    return [[kind.name for kind in (field.type, field.item) if kind is not None], value]


@pytest.mark.parametrize("name", TINY)
def test_file_is_what_the_converter_writes(name):
    model, theirs = read(TINY[name]), CONVERTED[name]
    assert model.gguf_arch == theirs["arch"]
    ours = {t.name: ["F32" if t.keep_f32 else "F16", list(t.shape)] for t in model.tensors}
    assert len(ours) == len(model.tensors)
    assert ours == theirs["tensors"]
    prefix = f"{model.gguf_arch}."
    assert {key.removeprefix(prefix): comparable(f) for key, f in model.metadata.items()} == theirs["fields"]


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_weights_are_those_of_transformers(name, tmp_path):
    import torch
    import transformers

    config = TINY[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        found = transformers.AutoConfig.from_pretrained(tmp_path)
        network = getattr(transformers, config["architectures"][0])(found)
    stored = network.state_dict()
    tables = sum(stored[key].numel() for key, _ in network.named_buffers() if key in stored)
    count = tables + sum(t.numel() for t in network.parameters())  # a tied matrix once
    model = read(config)
    ahead = f"blk.{model.num_layers}."  # a block that predicts a further token, which transformers leaves out
    further = sum(t.num_elements for t in model.tensors if t.name.startswith(ahead))
    assert (further > 0) == (name == "qwen3-next")
    assert model.num_weights - further == count
    assert (model.vocab_size, model.hidden_size) == (found.vocab_size, found.hidden_size)
    assert model.max_positions == found.max_position_embeddings
    assert model.tied == found.tie_word_embeddings


@pytest.mark.slow
@pytest.mark.parametrize("architecture", FOREIGN)
def test_defaults_are_those_of_transformers(architecture):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind, defaults, _ = FOREIGN[architecture]
    found = CONFIG_MAPPING["gemma3n_text" if kind == "gemma3n" else kind]()
    own = {"mtp_num_hidden_layers", "full_attention_interval"}  # transformers forgets them: they are not in the class
    for key, value in defaults.items():
        theirs = getattr(found, key, None)
        if key in own:
            assert theirs is None
        elif key == "rope_theta":
            assert found.rope_parameters["rope_theta"] == value
        elif key == "partial_rotary_factor":
            assert found.rope_parameters[key] == value
        elif key == "rope_parameters":
            assert {name: found.rope_parameters[name] for name in value} == value
        elif key == "mamba_d_head":
            assert value == "auto"
        elif isinstance(theirs, list):
            assert set(theirs) == {value}
        else:
            assert theirs == value, key
    bare = read({"architectures": [architecture], "model_type": kind, "num_experts_per_tok": 2, "layer_types": None})
    assert bare.tied == found.tie_word_embeddings
    eps = getattr(found, "rms_norm_eps", None) or found.norm_eps
    assert bare.metadata[f"{bare.gguf_arch}.attention.layer_norm_rms_epsilon"].value == eps


@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_are_those_published(name):
    row = PUBLISHED[name]
    model = read(row["config"])
    assert model.num_weights == pytest.approx(row["weights"], rel=0.003)
    assert len(model.tensors) == row.get("tensors", len(model.tensors))
    assert model.notes == () or "does not load" not in " ".join(model.notes)


def f16(model: ForeignModel) -> dict[str, tuple[str, int, tuple[int, ...]]]:
    return {t.name: ("F16", 2 * t.num_elements, t.shape) for t in model.tensors}


def plain(model: ForeignModel) -> dict[str, Any]:
    return {key: field.value for key, field in header(model).items()}


@pytest.mark.parametrize("name", [name for name, row in PUBLISHED.items() if "active" in row])
def test_active_weights_are_those_published(name):
    row = PUBLISHED[name]
    model = read(row["config"])
    active = active_bytes(f16(model), plain(model)).weights
    if row["active_with_embedding"]:
        active += model.vocab_size * model.hidden_size
    assert active == pytest.approx(row["active"], rel=0.025)


def test_embeddings_of_layers_are_looked_up():
    """Gemma 3n E2B: 1.91 B weights beside the embeddings, of 4.46 B."""
    model = read(PUBLISHED["gemma-3n-E2B"]["config"])
    active = active_bytes(f16(model), plain(model))
    table = next(t for t in model.tensors if t.name == "per_layer_token_embd.weight")
    assert table.shape == (262_400, 30 * 256)
    assert active.left_out["looked up by row"] == 2 * table.num_elements
    assert active.weights - model.vocab_size * model.hidden_size == pytest.approx(1.91e9, rel=0.005)
    assert model.num_padding == 256 * 30 * 256  # the last rows, for pictures and sound, are zeros


def test_blocks_that_predict_further_tokens_are_not_read():
    model = read(PUBLISHED["Qwen3-Next-80B-A3B"]["config"])
    ahead = sum(2 * t.num_elements for t in model.tensors if t.name.startswith("blk.48."))
    active = active_bytes(f16(model), plain(model))
    assert active.left_out["blocks that predict further tokens"] == ahead > 3e9
    assert "a further token" in model.notes[0]
    known = read(PUBLISHED["Qwen3-Next-80B-A3B"]["config"] | {"mtp_num_hidden_layers": 0})
    assert known.num_weights == model.num_weights - ahead // 2 and known.notes == ()


def test_latent_cache_is_one_vector_for_each_position():
    """DeepSeek-V2-Lite keeps 512 + 64 values a layer where 16 heads of 192 and 128 would keep 5120."""
    model = read(PUBLISHED["DeepSeek-V2-Lite"]["config"])
    assert [(layer.kind, layer.k, layer.v) for layer in model.cache] == [("latent", 576, 0)] * 27
    assert kv_bytes(model.cache, 4096).nbytes == 4096 * 27 * 576 * 2


@pytest.mark.parametrize("name", tiered([*TINY, *(name for name, row in PUBLISHED.items() if row["weights"] < 1e11)]))
def test_llama_cpp_loads_it_and_allocates_the_cache(name, tmp_path):
    """Every tensor has the shape that the graph expects; the cache is what is reckoned, at two contexts."""
    model = read(TINY[name] if name in TINY else PUBLISHED[name]["config"])
    if name in NOT_LOADED:
        assert NOT_LOADED[name] in " ".join(model.notes)
        return
    table = {t.name: ("F32" if t.keep_f32 else "F16", t.shape) for t in model.tensors}
    path = write_header(tmp_path / "model.gguf", header(model), table)
    with opened(path) as loaded:
        for ctx in (512, 5000):
            assert allocated(loaded, ctx).cache == kv_bytes(model.cache, ctx).nbytes


@pytest.mark.parametrize("name", tiered(PUBLISHED))
def test_llama_cpp_chooses_types(name):
    """The quantizer takes the header; files are as large as those published, but for vocabulary and template."""
    model, files = read(PUBLISHED[name]["config"]), PUBLISHED[name].get("files", {})
    tensors = list(model.tensors)
    last = 0.0
    for kind in ("Q2_K", "Q4_0", "Q4_K_M", "Q8_0", *(["MXFP4_MOE"] if "gpt-oss" in name else [])):
        choice = choose_types(header(model), tensors, TypeRequest(type=kind))
        bits = 8 * choice.nbytes(tensors) / sum(t.num_elements for t in tensors)
        if kind == "MXFP4_MOE":
            assert bits < 5
        else:
            assert last < bits < 9, kind
            last = bits
        assert all(choice.types[t] == "F32" for t in model.as_source)
        if kind in files:
            assert choice.nbytes(tensors) == pytest.approx(files[kind], rel=0.01)


def test_checkpoints_in_four_bits_become_one_type():
    config = PUBLISHED["gpt-oss-20b"]["config"]
    assert read(config).only_types == ("MXFP4_MOE",)
    assert read({key: value for key, value in config.items() if key != "quantization_config"}).only_types is None


def test_others_are_not_foreign():
    assert read_foreign({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}) is None
    assert read_foreign({}) is None
    assert read_foreign({"model_type": "mixtral"}).architecture == "MixtralForCausalLM"
    why = "efficli export has no table for MixtralForCausalLM; llama.cpp's own converter writes it"
    assert read_foreign({"model_type": "mixtral"}).why_not == why


def changed(name: str, **values: Any) -> dict[str, Any]:
    return TINY[name] | values


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"architectures": "x"}, CheckpointError, "'architectures' is 'x', expected a list"),
        (
            changed("mixtral", hidden_size=-1),
            CheckpointError,
            "'hidden_size' is -1, expected a positive whole number",
        ),
        (
            changed("mixtral", num_experts_per_tok=9),
            CheckpointError,
            "num_experts_per_tok is 9 of 4 experts",
        ),
        (
            changed("mixtral", quantization_config={"quant_method": "awq"}),
            UnsupportedError,
            "the checkpoint is already quantized ('awq')",
        ),
        (
            changed("mixtral", rope_scaling={"rope_type": "longrope"}),
            UnsupportedError,
            "rope type 'longrope' is not planned for MixtralForCausalLM",
        ),
        (
            changed("lfm2", layer_types=["conv"]),
            CheckpointError,
            "1 layer_types for 3 layers",
        ),
        (
            changed("falcon-h1", mamba_n_heads=7),
            CheckpointError,
            "7 Mamba heads of 16 in 1 groups do not make 96",
        ),
        (
            changed("qwen2-moe", tie_word_embeddings=True),
            UnsupportedError,
            "the output matrix is the embedding: llama.cpp wants one of its own for Qwen2MoeForCausalLM",
        ),
        (
            changed("qwen2-moe", decoder_sparse_step=2),
            UnsupportedError,
            "'decoder_sparse_step' is 2, which llama.cpp does not compute for Qwen2MoeForCausalLM",
        ),
        (
            changed("deepseek-v3", vocab_size=1 << 40),
            CheckpointError,
            "'vocab_size' is 1099511627776, expected at most 2147483647",
        ),
    ],
)
def test_errors_verbatim(config, error, message):
    with pytest.raises(error) as caught:
        read_foreign(config)
    assert (str(caught.value), caught.value.where) == (message, "config.json")


@pytest.mark.parametrize("name", TINY)
def test_absurd_values_are_errors(name):
    """Any key of config.json with any JSON value: a model or one of our errors, nothing else."""
    absurd = (None, True, 0, -1, 0.5, 1e308, math.inf, math.nan, 10**30, "", "x", [], [1], {}, {"a": 1}, [None] * 3)
    _, defaults, _ = FOREIGN[TINY[name]["architectures"][0]]
    refused = 0
    for key in {*TINY[name], *defaults, "quantization_config", "text_config"}:
        for value in absurd:
            try:
                model = read_foreign(changed(name, **{key: value}))
            except EffiError as error:
                assert error.where == "config.json"
                refused += 1
            else:
                assert model is None or all(n > 0 for t in model.tensors for n in t.shape)
    assert refused > 100


def test_rotary_scaling_of_llama_3_adds_factors():
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    plain_model, scaled = read(TINY["mixtral"]), read(changed("mixtral", rope_scaling=rope))
    added = {t.name: t for t in scaled.tensors if t.name not in {p.name for p in plain_model.tensors}}
    assert {name: t.shape for name, t in added.items()} == {"rope_freqs.weight": (8,)}
    assert scaled.num_weights == plain_model.num_weights and scaled.num_padding == 8
