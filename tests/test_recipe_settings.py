"""`--set key=value`: what it sets is what the same key in the file would say, errors included."""

from __future__ import annotations

from pathlib import Path

import pytest

from efficli.cli import main
from efficli.errors import UsageError
from efficli.recipe import load_with, parse_recipe

FILE = """version: 1
model: reference
exports:
  - type: Q8_0
  - {type: [Q4_K_M, Q4_0], imatrix: auto}
gates:
  max_kld: 0.5
"""


@pytest.fixture
def path(tmp_path):
    (tmp_path / "r.yaml").write_text(FILE)
    return tmp_path / "r.yaml"


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (["gates.max_kld=0.1"], FILE.replace("0.5", "0.1")),
        (["gates.max_bytes=350MiB"], FILE + "  max_bytes: 350MiB\n"),
        (["exports.0.type=Q6_K"], FILE.replace("Q8_0", "Q6_K")),
        (["exports.1.type=[F16, BF16]"], FILE.replace("[Q4_K_M, Q4_0]", "[F16, BF16]")),
        (["exports.1.type.1=F16"], FILE.replace("Q4_0", "F16")),
        (["exports.2.type=F16"], FILE.replace("gates:", "  - {type: F16}\ngates:")),
        (["exports.2.type=F16", "exports.2.pure=true"], FILE.replace("gates:", "  - {type: F16, pure: true}\ngates:")),
        (["exports={type: F16}"], "version: 1\nmodel: reference\nexports: {type: F16}\ngates: {max_kld: 0.5}\n"),
        (["gates={}"], FILE.replace("gates:\n  max_kld: 0.5\n", "gates: {}\n")),
        (["seed=1", "seed=2"], FILE + "seed: 2\n"),
        (["target.0=pi5", "target.1=pi4-4gb"], FILE + "target: [pi5, pi4-4gb]\n"),
        (["target=pi5", "target.1=pi4-4gb"], FILE + "target: [pi5, pi4-4gb]\n"),
        (
            ["passes.0.method=lowrank.svd", "passes.0.rank=4"],
            FILE + "passes: [{method: lowrank.svd, rank: 4}]\n",
        ),
        (["bench.n_gen=[8, 16]"], FILE + "bench: {n_gen: [8, 16]}\n"),
        (["bench={}"], FILE + "bench: {}\n"),
        (['certificate.base="reference"'], FILE + "certificate: {base: reference}\n"),
        (["exports.0.tensor_type=a=b=Q6_K"], FILE.replace("type: Q8_0", "type: Q8_0\n    tensor_type: a=b=Q6_K")),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_a_setting_is_the_same_as_the_key_in_the_file(settings, text, path):
    assert load_with(path, settings).recipe == parse_recipe(text)


@pytest.mark.parametrize(
    ("setting", "line", "hint"),
    [
        ("exports.0.typ=Q8_0", "--set exports.0.typ: unknown key 'exports.0.typ'", "did you mean 'type'?"),
        ("exports.1.type=IQ4_N", "--set exports.1.type: unknown type 'IQ4_N'",
         "did you mean 'IQ4_NL' or 'IQ4_XS' or 'Q4_1'?"),
        ("exports.1.type=Q8_0", "--set exports.1.type: type Q8_0 is there twice (first: line 4)", None),
        ("gate.max_kld=0.1", "--set gate.max_kld: unknown key 'gate'", "did you mean 'gates'?"),
        ("gates.max_kld=small", "--set gates.max_kld: 'small', expected number", None),
        ("model=", "--set model: nothing, expected string", None),
        ("seed=[" + ", ".join(["12345"] * 20) + "]", f"--set seed: [{'12345, ' * 8}123..., expected integer", None),
        ("gates.max_kld=1e999", "--set gates.max_kld: '1e999' is not a finite number", None),
        ("strict=no", "--set strict: 'no' is a word, expected true or false", "strict: false"),
        ("exports.type=Q8_0", "--set exports.type: exports is a list, expected a position before 'type'",
         "--set exports.0.type=..."),
        ("exports.4.type=Q8_0", "--set exports.4.type: exports has 2 of them, expected a position up to 2", None),
        ("model=!!python/name:os.system", "--set model: tag '!!python/name:os.system' is not read",
         "plain values only are read"),
        ("model=a: [b", "--set model: not valid YAML: expected ',' or ']', but got '<stream end>'",
         "put quotes around the value, inside those of the shell: 'key=\"value\"'"),
        ("calibration.text=gone.txt", "--set calibration.text: no such file: gone.txt", None),
        ("gates", "--set 'gates', expected key=value", "--set exports.0.type=Q8_0"),
        ("=3", "--set '=3', expected key=value", "--set exports.0.type=Q8_0"),
        ("exports.0=Q8_0", "--set exports.0: 'Q8_0', expected keys (format, type, imatrix, tensor_type, "
         "output_tensor_type, token_embedding_type, pure, pre_tokenizer, allow_non_ternary)", None),
        ("passes.0.method=lowrank", "--set passes.0.method: unknown method 'lowrank'", "did you mean 'lowrank.svd'?"),
    ],
)  # fmt: skip
def test_errors_name_the_setting(path, setting, line, hint):
    with pytest.raises(UsageError) as caught:
        load_with(path, [setting])
    assert (caught.value.line, caught.value.hint, caught.value.others) == (line, hint, ())


def test_errors_of_the_file_come_first_and_keep_their_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(FILE + "sede: 1\nseed: x\n")
    assert main(["run", "r.yaml", "--set", "ctx_size=0", "--set", "seed=3"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: r.yaml:8: unknown key 'sede'; did you mean 'seed'?",
        "error: --set ctx_size: 0, expected greater than or equal to 1",
    ]


def test_one_mapping_or_word_becomes_a_list_when_another_is_added(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("version: 1\nmodel: reference\nexports:\n  type: Q8_0\n")
    loaded = load_with(path, ["exports.0.pure=true", "exports.1.type=Q4_0", "exports.0.type.1=F16"])
    assert [export.type for export in loaded.recipe.exports] == [("Q8_0", "F16"), ("Q4_0",)]
    assert loaded.where("exports", 0, "pure") == "--set exports.0.pure"
    assert loaded.where("exports", 1, "type") == "--set exports.1.type"
    assert loaded.where("exports", 0, "type") == f"{path}:4"


def test_bench_is_switched_off_by_false(tmp_path):
    (tmp_path / "recipe.yaml").write_text(FILE + "bench: {n_gen: 8}\n")
    assert load_with(tmp_path / "recipe.yaml").recipe.bench is not None
    assert load_with(tmp_path / "recipe.yaml", ["bench=false"]).recipe.bench is None
