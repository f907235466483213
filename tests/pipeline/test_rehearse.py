"""A rehearsal finds what a run would find, in a minute, from small files alone, and leaves nothing behind."""

from __future__ import annotations

import json
import math
import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import efficli
from efficli.checkpoint import open_checkpoint, open_without_weights
from efficli.errors import CheckpointError, UnsupportedError, UsageError
from efficli.export.gguf.imatrix import Sums, write_imatrix
from efficli.export.gguf.job import prepare
from efficli.export.gguf.types import TypeRequest
from efficli.families import expected_tensors, read_shape
from efficli.families.table import FAMILIES
from efficli.ops.ggml_types import FILE_TYPES
from efficli.pipeline.rehearse import LAYERS, MOST_WEIGHTS, make_clone, num_weights, small_config
from efficli.planning.subject import with_stand_ins
from efficli.progress import Silent
from tests import whole
from tests.light import light_site, run_light
from tests.lost_nothing import fingerprint
from tests.pico import TEXT, write_llama, write_tokenizer

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 0,
    "tie_word_embeddings": False,
    "max_position_embeddings": 8192,
}


def like(architecture: str, hidden: int, inner: int, layers: int, heads: int, kv: int, vocab: int, **more) -> dict:
    """A config.json of a Llama's form."""
    family = next(family for family in FAMILIES.values() if architecture in family.architectures)
    sizes = {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv, "vocab_size": vocab,
    }  # fmt: skip
    return LLAMA | {"architectures": [architecture], "model_type": family.model_types[0]} | sizes | more


QWEN_MOE = {
    "head_dim": 128,
    "moe_intermediate_size": 1536,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
}
LARGE = {
    "Llama 3 70B": like("LlamaForCausalLM", 8192, 28672, 80, 64, 8, 128256),
    "Qwen 3 235B A22B": like("Qwen3MoeForCausalLM", 4096, 12288, 94, 64, 4, 151936, **QWEN_MOE),
    "Gemma 3 27B": {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "torch_dtype": "bfloat16",
        "text_config": {
            "model_type": "gemma3_text", "hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 62,
            "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128, "query_pre_attn_scalar": 168,
            "sliding_window": 1024, "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "vocab_size": 262208,
        },
        "vision_config": {"hidden_size": 1152},
    },
}  # fmt: skip
"""As their config.json on the hub says, what decides nothing here left out."""
WIDE = LARGE | {
    "Gemma 3 4B": LARGE["Gemma 3 27B"]
    | {"text_config": {"hidden_size": 2560, "num_hidden_layers": 34, "intermediate_size": 10240}},
    "Qwen 2.5 0.5B": like("Qwen2ForCausalLM", 896, 4864, 24, 14, 2, 151936, tie_word_embeddings=True),
    "Phi 3 mini": like("Phi3ForCausalLM", 3072, 8192, 32, 32, 32, 32064),
    "OLMo 2 32B": like("Olmo2ForCausalLM", 5120, 27648, 64, 40, 8, 100352),
    "OpenLLaMA 3B": like("LlamaForCausalLM", 3200, 8640, 26, 32, 32, 32000),
    "BitNet 2B": like("BitNetForCausalLM", 2560, 6912, 30, 20, 5, 128256, tie_word_embeddings=True),
    "GPT-2 XL": {
        "architectures": ["GPT2LMHeadModel"], "n_embd": 1600, "n_head": 25, "n_layer": 48, "n_positions": 1024,
        "vocab_size": 50257,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", WIDE)
def test_a_clone_is_small_and_its_rows_fill_the_same_blocks(name):
    real, clone = read_shape(WIDE[name]), read_shape(small_config(WIDE[name]))
    assert clone.num_layers == LAYERS and clone.head_dim == real.head_dim and clone.vocab_size == real.vocab_size
    smallest = real.vocab_size * 256 * (1 if real.tied else 2)
    assert num_weights(small_config(WIDE[name])) <= max(MOST_WEIGHTS, 1.1 * smallest)
    others = {spec.name: spec for spec in expected_tensors(replace(real, num_layers=1))}
    for one in expected_tensors(clone):
        if len(one.shape) < 2 or one.layer not in (0, None):
            continue
        other = others[one.name]
        axis = 0 if real.facts.transposed and one.layer is not None else -1
        blocks = 256 if name not in ("OpenLLaMA 3B", "GPT-2 XL") else 32
        assert math.gcd(one.shape[axis], blocks) == math.gcd(other.shape[axis], blocks), one.name
        assert (one.shape[axis] % 256 == 0) == (other.shape[axis] % 256 == 0), one.name


def test_a_small_model_keeps_its_widths():
    config = like("LlamaForCausalLM", 576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True)
    assert small_config(config) == config | {"num_hidden_layers": LAYERS}
    single = config | {"num_hidden_layers": 1}
    assert small_config(single) == single


def folder_of(config: dict, folder: Path) -> Path:
    """config.json and a tokenizer that is shorter than its vocabulary; no weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    return folder


@pytest.mark.parametrize("name", ["Qwen 2.5 0.5B", "Gemma 3 4B"])
def test_what_falls_back_in_the_model_does_in_the_clone(name, tmp_path, monkeypatch):
    monkeypatch.setattr("efficli.pipeline.rehearse.MOST_WEIGHTS", 10_000_000)
    config = WIDE[name] | {"vocab_size": 4096}
    config |= {key: value | {"vocab_size": 4096} for key, value in config.items() if key == "text_config"}
    real = with_stand_ins(*open_without_weights(folder_of(config, tmp_path / "real")))
    make_clone(real, tmp_path / "clone", seed=0)
    requests = [TypeRequest(type=kind) for kind in ("Q4_K_M", "Q5_0")]
    found = []
    for ckpt in (real, open_checkpoint(tmp_path / "clone")):
        job = prepare(ckpt, requests, own={})
        first = [[f for f in file.choice.fallbacks if not re.match(r"blk\.[1-9]", f.tensor)] for file in job.files]
        assert job.num_weights <= 10_000_000 or ckpt is real
        found.append([{fallback.tensor for fallback in one} for one in first])
    assert found[0] == found[1]
    assert bool(found[0][0]) == (name == "Qwen 2.5 0.5B")


# Errors are those of the run, before anything is computed


def recipe(folder: Path, **values) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"version": 1, "exports": {"type": "Q8_0"}} | values))
    return path


def both(path: Path, kind: type[Exception]) -> Exception:
    """The error of the rehearsal, which is that of the run."""
    errors = []
    for rehearsal in (True, False):
        with pytest.raises(kind) as caught:
            efficli.run(path, path.parent / "out", rehearsal=rehearsal, cache=False)
        errors.append(caught.value)
    assert (errors[0].line, errors[0].hint) == (errors[1].line, errors[1].hint)
    return errors[0]


def test_a_family_that_is_not_supported(tmp_path):
    model = write_llama(tmp_path / "model", layers=3, architectures=["FalconForCausalLM"])
    error = both(recipe(tmp_path, model=str(model)), UnsupportedError)
    assert error.exit_code == 5 and "'FalconForCausalLM' is not supported" in error.line


def test_wishes_that_no_tensor_of_the_model_has(tmp_path):
    model = str(write_llama(tmp_path / "model", layers=3))
    exports = {"type": "Q8_0", "tensor_type": ["blk.3.attn_v=F16"]}
    assert "matches no weight" in both(recipe(tmp_path, model=model, exports=exports), UsageError).line
    passes = [{"method": "skip-layers.last", "remove": 3}]
    assert "3 of 3 layers" in both(recipe(tmp_path, model=model, passes=passes), UsageError).line
    passes = [{"method": "lowrank.svd", "keep": 0.5, "include": "layers.3."}]
    assert "include" in both(recipe(tmp_path, model=model, passes=passes), UsageError).line


def test_an_importance_matrix_of_another_model(tmp_path):
    import numpy as np

    model = str(write_llama(tmp_path / "model", layers=3))
    write_imatrix(
        tmp_path / "m.gguf", {"blk.0.attn_q.weight": Sums(np.ones((1, 32)), np.ones(1))}, dataset="d", chunk=8, chunks=1
    )
    exports = {"type": "Q4_0", "imatrix": str(tmp_path / "m.gguf")}
    assert "has 32 columns" in both(recipe(tmp_path, model=model, exports=exports), UsageError).line


def test_a_base_that_is_no_checkpoint(tmp_path):
    (tmp_path / "base").mkdir()
    path = recipe(tmp_path, model="reference", certificate={"base": str(tmp_path / "base")})
    with pytest.raises(CheckpointError, match="not found"):
        efficli.run(path, rehearsal=True)


# Whole rehearsals


def steps_of(path: Path, progress: Silent | None = None) -> list[str]:
    done = efficli.run(path, path.parent / "out", rehearsal=True, progress=progress)
    assert done.command == "rehearse" and not (path.parent / "out").exists()
    return [step.kind for step in done.steps]


@pytest.mark.slow
@pytest.mark.parametrize("name", whole.KINDS)
def test_every_family_without_its_weights(name, tmp_path):
    kind = whole.KINDS[name]
    model = tmp_path / kind.folder
    whole.write(model, kind)
    (model / "model.safetensors").unlink()
    exports, passes = [{"type": ["Q4_K_M", "Q8_0"], "tensor_type": ["ffn_down=Q5_0"]}], []
    if kind.family != "bert":
        exports.append({"type": ["IQ4_XS"], "imatrix": "auto", "tensor_type": [r"blk\.1\.ffn_down=Q6_K"]})
        # the third layer is there in the model, and not in the clone
        passes = [{"method": "lowrank.svd", "rank": 4, "include": r"\.2\..*(down|c_)_?proj"}]
        passes.append({"method": "skip-layers.last", "remove": 1})
    values = {"model": str(model), "exports": exports, "passes": passes, "bench": {"scenario": "all"}, "strict": False}
    progress = Silent()
    found = steps_of(recipe(tmp_path, target="pi5-8gb", gates={"max_bytes": 1 << 40}, **values), progress)
    middle = ["pass", "pass", "write", "imatrix", "write"] if passes else ["write"]
    files = sum(len(export["type"]) for export in exports)
    assert found == [*middle, "load", *["certificate"] * files, "bench"]
    assert (
        "gates, targets and scenarios are left out: drawn weights of two layers say nothing of them" in progress.notes
    )


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model whose rows every type can hold, without weights."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    write_llama(folder, hidden=256, ffn=512, layers=3)
    (folder / "model.safetensors").unlink()
    return folder


TERNARY = ["TQ1_0", "TQ2_0", "Q2_0", "Q1_0"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "types", [[name for name in FILE_TYPES if name not in (*TERNARY, "MXFP4_MOE")], TERNARY[:3], TERNARY, ["MXFP4_MOE"]]
)
def test_every_type(types, wide, tmp_path):
    progress = Silent()
    found = steps_of(recipe(tmp_path, model=str(wide), exports={"type": types, "imatrix": "auto"}), progress)
    assert found == ["imatrix", "write", "load", *["certificate"] * len(types)]
    told = [note for note in progress.notes if "own weights" in note]
    assert len(told) == any(kind in TERNARY for kind in types)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_a_large_model_takes_less_than_a_minute_and_4_gb(name, tmp_path):
    model = folder_of(LARGE[name], tmp_path / "model")
    exports = [{"type": ["Q4_K_M"], "imatrix": "auto", "tensor_type": [r"blk\.60\.attn_v=Q8_0"]}, {"type": "Q8_0"}]
    path = recipe(tmp_path, model=str(model), exports=exports, bench={}, gates={"max_kld": 1e-9})
    before = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    words = [sys.executable, "-m", "efficli", "run", str(path), "--rehearse", "-o", str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert sum(used[:2]) - before < 90  # CPU seconds of 2 cores; some 30 where nothing else runs
    assert used.ru_maxrss * 1024 < 4e9
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model", "recipe.yaml"]


@pytest.fixture(scope="module")
def light(tmp_path_factory):
    return light_site(tmp_path_factory.mktemp("light") / "site")


@pytest.mark.slow
def test_without_torch_and_nothing_is_written_but_temporary_files(light, tmp_path):
    places = {name: tmp_path / name for name in ("HOME", "TMPDIR", "EFFICLI_CACHE_DIR", "HF_HOME", "XDG_CACHE_HOME")}
    for place in places.values():
        place.mkdir()
    model = write_llama(tmp_path / "model", layers=3)
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 4)
    calibration = {"text": str(text), "ctx_size": 64}
    exports = {"type": "Q4_0", "imatrix": "auto"}
    path = recipe(tmp_path, model=str(model), exports=exports, calibration=calibration, bench={})
    before = fingerprint(tmp_path)
    done = run_light(light, ["run", str(path), "--rehearse"], **{name: str(place) for name, place in places.items()})
    assert done.returncode == 0, done.stderr
    assert "Rehearsal of model" in done.stderr and done.stdout == ""
    assert fingerprint(tmp_path) == before


@pytest.mark.slow
def test_a_missing_extra_shows(tmp_path):
    site = light_site(tmp_path / "site", "llama_cpp")
    path = recipe(tmp_path, model=str(write_llama(tmp_path / "model", layers=3)))
    rehearsed, ran = (
        run_light(site, ["run", str(path), "-o", str(tmp_path / "out"), *more]) for more in (["--rehearse"], [])
    )
    assert rehearsed.returncode == ran.returncode == 5
    assert rehearsed.stderr == ran.stderr and "pip install 'efficli[gguf]'" in ran.stderr


@pytest.mark.slow
def test_a_calibration_text_that_fills_no_window_shows(tmp_path):
    model = str(write_llama(tmp_path / "model", layers=3))
    text = tmp_path / "text.txt"
    text.write_text(TEXT[:100])
    calibration = {"text": str(text), "ctx_size": 200}
    path = recipe(tmp_path, model=model, exports={"type": "Q4_0", "imatrix": "auto"}, calibration=calibration)
    assert "the calibration text has" in both(path, CheckpointError).line
