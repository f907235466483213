"""The table of families against transformers: tensors, defaults, rotary frequencies, layouts 4 and 5; its errors."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from efficli.checkpoint import open_checkpoint
from efficli.errors import CheckpointError, EffiError, UnsupportedError
from efficli.families import FAMILIES, check_tensors, expected_tensors, inverse_frequencies, read_shape
from efficli.progress import Silent
from tests import models
from tests.models import DYNAMIC, LINEAR, LLAMA3, YARN, as_transformers_4, longrope

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 128,
}


class Tensor:
    """A header entry."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape


def config_of(family: str, **overrides: Any) -> dict[str, Any]:
    """config.json as transformers 5 writes it."""
    config = models.build(family, **overrides).config
    return json.loads(config.to_json_string(use_diff=False)) | {"architectures": [FAMILIES[family].architectures[0]]}


def headers(config: dict[str, Any], **changes: tuple[int, ...] | None) -> dict[str, Tensor]:
    """What a checkpoint of this config holds; `changes` replace a shape, None drops the tensor."""
    tensors = {spec.name: Tensor(spec.shape) for spec in expected_tensors(read_shape(config))}
    return tensors | {name: Tensor(shape) for name, shape in changes.items() if shape is not None}


@pytest.mark.parametrize("family", models.FAMILIES)
def test_tensors_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    """Names and shapes of the saved checkpoint, no more and no fewer, but for BERT's pooler."""
    ckpt = open_checkpoint(models.save(models.build(family), tmp_path / "m"))
    expected = {spec.name: spec.shape for spec in expected_tensors(read_shape(ckpt.config))}
    found = {name: ref.shape for name, ref in ckpt.tensors.items() if not name.startswith("pooler.")}
    assert expected == found


@pytest.mark.parametrize("family", models.FAMILIES)
def test_defaults_are_those_of_transformers(family: str) -> None:
    """A config.json that leaves out what the table has a default for means what transformers makes of it."""
    import transformers

    kind = getattr(transformers, models.FAMILIES[family][0] + "Config")
    full = config_of(family)
    dropped = set(FAMILIES[family].defaults) | {"rope_parameters", "rms_norm_eps", "layer_types", "no_rope_layers"}
    names = {name for key in dropped for name in FAMILIES[family].keys.get(key, (key,))}
    sparse = {key: value for key, value in full.items() if key not in names}
    if family in ("mistral", "bitnet", "qwen2", "qwen3"):  # a multiple of the default number of key/value heads
        sparse |= {"num_attention_heads": 160, "hidden_size": 2560}
    filled = json.loads(kind(**copy.deepcopy(sparse)).to_json_string(use_diff=False))
    filled |= {"architectures": full["architectures"], "dtype": sparse.get("dtype")}
    assert read_shape(sparse) == read_shape(filled)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_layouts_of_transformers_4_and_5_mean_the_same(family: str) -> None:
    """Both layouts of config.json give the same shape, and the older one still gives transformers the same model."""
    import transformers

    config = config_of(family)
    old = as_transformers_4(config)
    writes_new = int(transformers.__version__.partition(".")[0]) >= 5
    assert ("rope_parameters" in config) == (writes_new and FAMILIES[family].positions == "rope")
    assert "rope_parameters" not in old and "dtype" not in old
    assert read_shape(old) == read_shape(config)
    kind = getattr(transformers, models.FAMILIES[family][0] + "Config")
    reread = kind.from_dict(copy.deepcopy(old))
    for key in ("rope_parameters", "tie_word_embeddings", "head_dim", "sliding_window"):
        assert getattr(reread, key, None) == config.get(key, getattr(reread, key, None))


SCALINGS = {
    "default": ("llama", {"rope_type": "default", "rope_theta": 500.0}),
    "linear": ("llama", LINEAR),
    "dynamic": ("llama", DYNAMIC),
    "llama3": ("llama", LLAMA3),
    "yarn": ("llama", YARN),
    "yarn, own ramp": ("qwen2", YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}),
    "yarn, scales": ("qwen3", YARN | {"mscale": 1.5, "mscale_all_dim": 0.7}),
    "yarn, no factor": ("llama", {k: v for k, v in YARN.items() if k != "factor"} | {"factor": None}),
    "longrope, factor": ("phi3", longrope(8, 256, factor=4.0)),
    "longrope": ("phi3", longrope(8, 256)),
}


@pytest.mark.parametrize("layout", [4, 5])
@pytest.mark.parametrize("name", SCALINGS)
def test_rotary_frequencies_are_those_of_transformers(name: str, layout: int) -> None:
    """Radians per position and the factor of cosines, for each scaling."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    family, parameters = SCALINGS[name]
    extra = {"original_max_position_embeddings": 256} if family == "phi3" else {}
    if parameters.get("factor", 1.0) is None:
        shape = read_shape(TINY | {"rope_parameters": parameters | {"original_max_position_embeddings": 32}})
        assert shape.rope is not None and shape.rope.factor == 4.0
        return
    model = models.build(family, rope_parameters=parameters, **extra)
    config = json.loads(model.config.to_json_string(use_diff=False)) | {"architectures": [type(model).__name__]}
    rope = read_shape(as_transformers_4(config) if layout == 4 else config).rope
    assert rope is not None
    if rope.scaling == "default":
        assert np.allclose(inverse_frequencies(rope), 500.0 ** -(np.arange(0, rope.dim, 2) / rope.dim))
        return
    for long in (False, True):
        length = 1024 if long else 64
        frequencies, factor = ROPE_INIT_FUNCTIONS[rope.scaling](model.config, "cpu", seq_len=length)
        np.testing.assert_allclose(inverse_frequencies(rope, long=long), frequencies.numpy(), rtol=2e-6)
        assert rope.attention_factor == pytest.approx(factor, rel=1e-7)


def test_windows_without_layer_types() -> None:
    """Configs older than `layer_types` say the pattern by its step, or not at all."""
    gemma3 = {key: value for key, value in config_of("gemma3").items() if key != "layer_types"}
    assert read_shape(gemma3).windowed == (True,) * 5 + (False, True)
    gemma3 = {key: value for key, value in gemma3.items() if key != "_sliding_window_pattern"}
    assert read_shape(gemma3 | {"sliding_window_pattern": 3}).windowed == (True, True, False) * 2 + (True,)
    gemma2 = {key: value for key, value in config_of("gemma2").items() if key != "layer_types"}
    assert read_shape(gemma2).windowed == (True, False, True)
    qwen2 = TINY | {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 8, "max_window_layers": 1}
    assert read_shape(qwen2).sliding_window is None
    assert read_shape(qwen2 | {"use_sliding_window": True}).windowed == (False, True)


def test_nested_text_config() -> None:
    """A multimodal Gemma 3: what is nested counts as if it stood at the top."""
    text = config_of("gemma3")
    del text["architectures"]
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
    shape = read_shape(outer)
    assert shape.architecture == "Gemma3ForConditionalGeneration"
    assert shape.num_layers == 7 and shape.hidden_size == 64 and shape.tied
    assert read_shape(as_transformers_4(outer)) == shape


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"architectures": ["Foo"]}, UnsupportedError, "architecture 'Foo' is not supported"),
        ({"architectures": ["LlamaForCausaLM"]}, UnsupportedError, "architecture 'LlamaForCausaLM' is not supported"),
        ({"architectures": [], "model_type": "mamba"}, UnsupportedError, "architecture 'mamba' is not supported"),
        ({"hidden_size": "32"}, CheckpointError, "'hidden_size' is '32', expected a positive whole number"),
        ({"hidden_size": None}, CheckpointError, "'hidden_size' is missing"),
        ({"num_hidden_layers": 0}, CheckpointError, "'num_hidden_layers' is 0, expected a positive whole number"),
        ({"num_attention_heads": 3}, CheckpointError, "hidden_size 32 is not a multiple of 3 heads"),
        ({"num_key_value_heads": 3}, CheckpointError, "4 heads are not a multiple of 3 key/value heads"),
        ({"head_dim": 7}, CheckpointError, "7 rotary dimensions, expected an even number"),
        ({"rms_norm_eps": "tiny"}, CheckpointError, "'rms_norm_eps' is 'tiny', expected a number"),
        ({"rope_scaling": {"type": "spiral"}}, UnsupportedError, "rope type 'spiral' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, CheckpointError, "rope type 'linear' has no 'factor'"),
        ({"rope_parameters": 3}, CheckpointError, "'rope_parameters' is 3, expected an object"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            CheckpointError,
            "rope short_factor has 1 values, expected 4",
        ),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            UnsupportedError,
            "the checkpoint is already quantized ('gptq')",
        ),
    ],
)
def test_config_errors(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    """What is wrong with a config.json, in its own words."""
    with pytest.raises(kind) as caught:
        read_shape({key: value for key, value in (TINY | change).items() if value is not None})
    assert caught.value.line == f"config.json: {message}"  # type: ignore[attr-defined]


def test_unknown_architecture_suggests() -> None:
    """A near name, or the list of known ones."""
    with pytest.raises(UnsupportedError) as caught:
        read_shape(TINY | {"architectures": ["LlamaForCausaLM"]})
    assert caught.value.hint is not None and "LlamaForCausalLM" in caught.value.hint
    with pytest.raises(UnsupportedError) as caught:
        read_shape(TINY | {"architectures": ["Foo"]})
    assert caught.value.hint is not None and "Qwen3MoeForCausalLM" in caught.value.hint


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("gpt2", {"scale_attn_weights": False}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("bert", {"position_embedding_type": "relative_key"}),
        ("bert", {"is_decoder": True}),
        ("gemma3", {"use_bidirectional_attention": True}),
    ],
)
def test_variants_that_no_row_describes(family: str, change: dict[str, Any]) -> None:
    """Rare switches of a family's code are refused, not ignored."""
    with pytest.raises(UnsupportedError, match=f"not supported for {family}"):
        read_shape(config_of(family) | change)


def test_missing_unexpected_and_wrong_tensors() -> None:
    """Rows 25, 26 and 27 of the test programme."""
    config = TINY | {"tie_word_embeddings": False}
    shape = read_shape(config)
    tensors = headers(config)
    notes = Silent()
    assert list(check_tensors(tensors, shape, strict=True, progress=notes)) == list(tensors)
    gone = {name: ref for name, ref in tensors.items() if "layers.1.mlp.up_proj" not in name}
    with pytest.raises(CheckpointError, match=r"^missing 1 of 21 tensors: model\.layers\.1\.mlp\.up_proj\.weight$"):
        check_tensors(gone, shape, strict=False, progress=notes)
    with pytest.raises(CheckpointError, match=r"^lm_head\.weight is 65×32, config says 64×32$"):
        check_tensors(tensors | {"lm_head.weight": Tensor((65, 32))}, shape, strict=False, progress=notes)
    more = tensors | {"model.layers.0.adapter.weight": Tensor((4, 4))}
    assert set(check_tensors(more, shape, strict=False, progress=notes)) == set(tensors)
    assert notes.notes == ["unexpected tensor: model.layers.0.adapter.weight; left out"]
    with pytest.raises(CheckpointError, match=r"^unexpected tensor: model\.layers\.0\.adapter\.weight$"):
        check_tensors(more, shape, strict=True, progress=notes)


def test_untied_without_an_output_matrix() -> None:
    """config.json says untied and there is no lm_head: an error that says what to do, not a tie in silence."""
    tensors = headers(TINY | {"tie_word_embeddings": True})
    with pytest.raises(CheckpointError, match=r"missing 1 of 21 tensors: lm_head\.weight") as caught:
        check_tensors(tensors, read_shape(TINY), strict=False, progress=Silent())
    assert caught.value.hint is not None and "tie_word_embeddings" in caught.value.hint


def test_ballast_and_other_prefixes() -> None:
    """Tied heads, rotary tables and masks are passed over; a body without `model.` and BERT's gamma are known."""
    shape = read_shape(TINY | {"tie_word_embeddings": True})
    tensors = headers(TINY | {"tie_word_embeddings": True})
    ballast = {"lm_head.weight": Tensor((64, 32)), "model.layers.0.self_attn.rotary_emb.inv_freq": Tensor((4,))}
    assert set(check_tensors(tensors | ballast, shape, strict=True, progress=Silent())) == set(tensors)
    bare = {name.removeprefix("model."): ref for name, ref in tensors.items()}
    assert set(check_tensors(bare, shape, strict=True, progress=Silent())) == set(bare)
    config = config_of("bert")
    old = {
        "bert." + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): ref
        for name, ref in headers(config).items()
    }
    found = check_tensors(old, read_shape(config), strict=True, progress=Silent())
    assert found["bert.embeddings.LayerNorm.beta"].role == "embedding_norm"


@pytest.mark.parametrize("family", models.FAMILIES)
def test_any_value_in_a_config_is_read_or_refused(family: str) -> None:
    """Each value replaced by something absurd, in both layouts: a shape or one of our errors, at once."""
    absurd = (None, -1, 0, 1, 3, 1.5, 1e300, "x", "", [], [1], ["x"], [None] * 7, {}, {"a": 1}, True, False, 10**30)
    config = config_of(family)
    for layout in (config, as_transformers_4(config)):
        nested = [("rope_parameters", key) for key in layout.get("rope_parameters") or ()]
        nested += [("rope_parameters", key) for key in YARN | longrope(4, 64) | LLAMA3]
        for place in [(key,) for key in layout] + nested:
            for value in absurd:
                changed = copy.deepcopy(layout)
                target = changed if len(place) == 1 else changed.setdefault(place[0], {})
                target[place[-1]] = value
                try:
                    shape = read_shape(changed)
                except EffiError:
                    continue
                assert 0 < shape.num_layers <= 1024
                assert shape.rope is None or inverse_frequencies(shape.rope).shape == (shape.rope.dim // 2,)
