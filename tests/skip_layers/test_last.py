"""skip-layers.last: what is left computes what transformers computes with a layer list that was cut by hand."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from efficli.catalog import config_of, run_method
from efficli.checkpoint import open_checkpoint
from efficli.errors import CheckpointError, UsageError
from efficli.export.gguf.model import layout
from efficli.families import FAMILIES, read_shape
from efficli.method import Context
from efficli.ops.llama import LlamaFile
from efficli.skip_layers.last import Config, rehearsal
from efficli.surgery import config_of_first_layers, layer_number
from tests import models, pico
from tests.converted import convert
from tests.gguf_plain import write_f32

FULL, SLIDING = "full_attention", "sliding_attention"
IDS = np.random.default_rng(0).integers(3, models.VOCAB, 100).tolist()
VARIANTS: dict[str, tuple[str, dict[str, Any], int]] = {
    "llama": ("llama", {}, 1),
    "llama, all but one": ("llama", {"tie_word_embeddings": True}, 2),
    "gemma3": ("gemma3", {}, 2),  # the sixth of seven layers sees everything, and goes
    "smollm3": ("smollm3", {}, 2),  # the fourth of five does not rotate, and goes
    "qwen2, window": ("qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}, 1),
    "gpt2": ("gpt2", {}, 1),
    "bert": ("bert", {}, 1),
}
OTHERS = sorted(set(models.FAMILIES) - {family for family, _, _ in VARIANTS.values()})


def cut(folder: Path, out: Path, remove: int) -> Path:
    """Run the method as the pipeline does."""
    out.mkdir()
    run_method("skip-layers.last", open_checkpoint(folder), out, Config(remove=remove), Context())
    return out


def by_hand(model: Any, remove: int) -> Any:
    """The model with a shorter list of layers, its configuration as it was."""
    import torch

    body = model if hasattr(model, "encoder") else getattr(model, "model", None) or model.transformer
    owner, name = (
        (body.encoder, "layer") if hasattr(body, "encoder") else (body, "h" if hasattr(body, "h") else "layers")
    )
    kept = list(getattr(owner, name))[:-remove]
    setattr(owner, name, torch.nn.ModuleList(kept))
    return model


def outputs(model: Any) -> Any:
    import torch

    with torch.no_grad():
        out = model(torch.tensor([IDS]))
    return (out.logits if hasattr(out, "logits") else out.last_hidden_state)[0].numpy()


def check(family: str, overrides: dict[str, Any], remove: int, folder: Path) -> Path:
    """The written checkpoint, loaded by transformers, gives the outputs of the model cut by hand, to the last bit."""
    model = models.build(family, **overrides)
    models.save(model, folder / "whole")
    expected = outputs(by_hand(model, remove))
    out = cut(folder / "whole", folder / "cut", remove)
    loaded, told = type(model).from_pretrained(out, attn_implementation="eager", output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    found = outputs(loaded.eval())
    assert np.array_equal(found, expected)
    assert not np.array_equal(found, outputs(models.build(family, **overrides)))
    return out


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_rest_is_the_model_with_a_shorter_list(variant: str, tmp_path: Path) -> None:
    family, overrides, remove = VARIANTS[variant]
    out = check(family, overrides, remove, tmp_path)
    before, after = read_shape(open_checkpoint(tmp_path / "whole").config), read_shape(open_checkpoint(out).config)
    keep = before.num_layers - remove
    assert (after.num_layers, after.windowed, after.rotary) == (keep, before.windowed[:keep], before.rotary[:keep])


@pytest.mark.parametrize("family", OTHERS)
def test_every_other_family(family: str, tmp_path: Path) -> None:
    check(family, {}, 1, tmp_path)


@pytest.mark.parametrize("family", ["gemma3", "smollm3"])
def test_llama_cpp_computes_the_same_from_its_export(family: str, tmp_path: Path) -> None:
    model = models.build(family)
    models.save(model, tmp_path / "whole")
    expected = outputs(by_hand(model, 2))
    ckpt = open_checkpoint(cut(tmp_path / "whole", tmp_path / "cut", 2))
    shape = read_shape(ckpt.config)
    metadata, tensors, _ = layout(shape, ckpt, strict=True)
    file = write_f32(tmp_path / "model.gguf", shape.facts.gguf_arch, metadata, tensors, ckpt)
    with LlamaFile(file, ctx=len(IDS), exact=True, threads=1) as loaded:
        found = loaded.logits(IDS)
    assert np.linalg.norm(found - expected) <= (2e-3 if family == "gemma3" else 1e-5) * np.linalg.norm(expected)


def test_a_quantized_export_of_it_writes_text(tmp_path: Path) -> None:
    out = cut(pico.write_llama(tmp_path / "whole", layers=3), tmp_path / "cut", 2)
    [file] = convert(out, tmp_path / "gguf", "Q8_0")
    with LlamaFile(file, ctx=64, threads=1) as loaded:
        assert np.isfinite(loaded.logits(loaded.tokenize("def read(path):"))).all()


def test_what_is_left_is_copied_byte_for_byte(tmp_path: Path) -> None:
    whole = open_checkpoint(pico.write_llama(tmp_path / "whole", layers=12, dtype="BF16"))
    left = open_checkpoint(cut(whole.root, tmp_path / "cut", 2))
    gone = set(whole.tensors) - set(left.tensors)
    assert gone == {name for name in whole.tensors if name.startswith(("model.layers.10.", "model.layers.11."))}
    assert {name: left.hash(name) for name in left.tensors} == {name: whole.hash(name) for name in left.tensors}


def test_the_report_and_the_sidecar_say_what_was_done(tmp_path: Path) -> None:
    ckpt = open_checkpoint(pico.write_llama(tmp_path / "whole", layers=4))
    for remove, row in [
        (1, "layer 3 of 4 left out: 9 tensors, 148 kB; 3 layers remain"),
        (3, "layers 1 to 3 of 4 left out: 27 tensors, 444 kB; 1 layer remains"),
    ]:
        out = tmp_path / str(remove)
        out.mkdir()
        assert run_method("skip-layers.last", ckpt, out, Config(remove=remove), Context()).report == (row,)
        sidecar = open_checkpoint(out).sidecar
        assert sidecar is not None and sidecar.origin is not None
        assert [(s.method, s.config) for s in sidecar.steps] == [("skip-layers.last", {"remove": remove})]
        assert sidecar.origin.fingerprint == ckpt.fingerprint()


@pytest.mark.parametrize("remove", [2, 3])
def test_no_model_without_layers(tmp_path: Path, remove: int) -> None:
    folder = pico.write_llama(tmp_path / "whole")
    with pytest.raises(UsageError, match=rf"^remove: {remove} of 2 layers, expected at least one to remain$"):
        cut(folder, tmp_path / "cut", remove)


def test_a_layer_without_tensors_is_damage(tmp_path: Path) -> None:
    folder = pico.write_llama(tmp_path / "whole")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match="layer 2 has no tensors"):
        cut(folder, tmp_path / "cut", 1)


def test_a_nested_configuration_is_cut_where_it_is_nested() -> None:
    text = {"model_type": "gemma3_text", "num_hidden_layers": 8, "layer_types": [SLIDING] * 5 + [FULL, SLIDING, FULL]}
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": text,
        "vision_config": {"num_hidden_layers": 8},
        "eos_token_id": [1, 2, 3, 4, 5, 6, 7, 8],
    }
    before = copy.deepcopy(config)
    found = config_of_first_layers(config, FAMILIES["gemma3"], 6)
    assert config == before
    nested = text | {"num_hidden_layers": 6, "layer_types": [SLIDING] * 5 + [FULL]}
    assert found == config | {"text_config": nested}


def test_lists_of_layers_in_a_configuration() -> None:
    moe = {"num_hidden_layers": 4, "mlp_only_layers": [0, 3], "max_window_layers": 3, "layer_scales": [1, 2, 3, 4]}
    cut_moe = {"num_hidden_layers": 2, "mlp_only_layers": [0], "max_window_layers": 3, "layer_scales": [1, 2]}
    assert config_of_first_layers(moe, FAMILIES["qwen3_moe"], 2) == cut_moe
    smol = {"num_hidden_layers": 3, "no_rope_layers": [1, 1, 1, 0, 1], "no_rope_layer_interval": 4}
    assert config_of_first_layers(smol, FAMILIES["smollm3"], 2) == smol | {
        "num_hidden_layers": 2,
        "no_rope_layers": [1, 1],
    }
    assert config_of_first_layers({"n_layer": 4, "n_head": 2}, FAMILIES["gpt2"], 3) == {"n_layer": 3, "n_head": 2}
    assert config_of_first_layers({}, FAMILIES["gemma3"], 25) == {"num_hidden_layers": 25}  # the default is 26
    with pytest.raises(CheckpointError, match="2 layer_types for 3 layers"):
        config_of_first_layers({"num_hidden_layers": 3, "layer_types": [FULL, FULL]}, FAMILIES["gemma2"], 1)


def test_which_tensors_are_inside_layers() -> None:
    gemma = layer_number(FAMILIES["gemma3"])
    match = gemma.match("language_model.model.layers.17.mlp.up_proj.weight")
    assert match and match[1] == "17"
    assert gemma.match("vision_tower.vision_model.encoder.layers.3.mlp.fc1.weight") is None
    assert gemma.match("model.norm.weight") is None
    assert layer_number(FAMILIES["bert"]).match("bert.encoder.layer.2.output.dense.bias")
    assert layer_number(FAMILIES["gpt2"]).match("h.0.attn.bias")


def test_a_rehearsal_leaves_a_layer() -> None:
    assert rehearsal(Config(remove=8), 2) == Config(remove=1)
    assert config_of("skip_layers.last") is Config
