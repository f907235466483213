"""The reference checkpoint is what its card says, and its network is transformers' Llama."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from efficli.data import COMMITTED, check_disjoint, committed
from efficli.ops.llama import LlamaFile
from efficli.reference import evaluate
from efficli.reference.corpus import slice_of
from tests.converted import convert

ROOT = Path(evaluate.__file__).parent
CARD = json.loads((ROOT / "checkpoint" / "evaluation.json").read_text())


@pytest.mark.parametrize("name", ["checkpoint", "twin"])
def test_network_is_transformers_llama(name):
    import torch
    from transformers import AutoModelForCausalLM

    model, tokenizer = evaluate.load(ROOT / name)
    theirs = AutoModelForCausalLM.from_pretrained(ROOT / name, dtype=torch.float32, attn_implementation="eager")
    ids = torch.tensor([tokenizer.encode(committed("evaluation-code")[:2000]).ids[:256]])
    with torch.inference_mode():
        a, b = model(ids), theirs(ids).logits
    assert float((a - b).norm() / b.norm()) < 1e-5
    assert ids[0, 0] == 0, "every text begins with the token that stood before every document"


def test_slices_are_disjoint_and_files_belong_to_one():
    check_disjoint({name: [committed(name)] for name in COMMITTED})
    counts = dict.fromkeys(("train", "calibration", "evaluation"), 0)
    for number in range(4000):
        counts[slice_of(f"code/{number}.py")] += 1
    assert 60 < counts["evaluation"] < 140 and 60 < counts["calibration"] < 140


def test_whole_statements_drop_what_is_not_finished():
    whole = evaluate.whole_statements
    assert whole("def f(x):\n    y = (1,\n        2)\n    for i in x:\n") == "def f(x):\n    y = (1,\n        2)\n"
    assert whole("x = 1\ny = '''abc\n def") == "x = 1\n"
    assert whole("x = 1\nif x:\n    y = [1, 2\n") == "x = 1\n"
    assert whole("def f(x):\n    return '''abc\n def") == ""


def test_prompts_are_fifty_beginnings_of_held_out_code():
    code = committed("evaluation-code")
    found = evaluate.prompts(code)
    assert len(set(found)) == evaluate.NUM_PROMPTS
    for prompt in found:
        compile(prompt + "\n", "prompt", "exec")
        assert prompt in code and not prompt.endswith("\n")


def test_weights_are_those_of_the_record():
    recorded = json.loads((ROOT.parent.parent / "tests" / "export" / "converter_hashes.json").read_text())
    data = (ROOT / "checkpoint" / "model.safetensors").read_bytes()
    assert hashlib.sha256(data).hexdigest() == recorded["checkpoint"]["model.safetensors"]
    assert len(data) <= 18_000_000


@pytest.mark.slow
def test_bits_per_byte_of_the_card():
    model, tokenizer = evaluate.load(ROOT / "checkpoint")
    found = evaluate.bits_per_byte(model, tokenizer, committed("evaluation-code"))
    assert found == pytest.approx(CARD["bits_per_byte_code"], abs=2e-3)
    assert found < 1.1


@pytest.mark.slow
def test_completions_of_the_card(tmp_path):
    """By llama.cpp, which has a cache: nearly always the tokens of PyTorch, in a tenth of the time."""
    (file,) = convert("reference", tmp_path, "F32")
    good = 0
    with LlamaFile(file, ctx=1024, exact=True) as model:
        found = evaluate.prompts(committed("evaluation-code"))
        for prompt in found:
            text = model.generate(model.tokenize(prompt, add_special=True), evaluate.NEW_TOKENS, stop_at_end=True).text
            whole = evaluate.whole_statements(prompt + text)
            good += len(whole) > len(prompt) + 1 and evaluate._parses(whole)
    assert good / len(found) >= 0.6
    assert good / len(found) == pytest.approx(CARD["completions_that_parse"], abs=0.06)
