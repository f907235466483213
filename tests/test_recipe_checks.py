"""Recipes that cannot be: what a person reads on stderr, word for word, and exit code 2; nothing is fetched."""

from __future__ import annotations

import json

import pytest

from efficli.cli import main
from efficli.errors import EffiError, UnsupportedError, UsageError
from efficli.recipe import load_with
from efficli.target import load_target

HEAD = "version: 1\nmodel: reference\n"


@pytest.fixture
def told(tmp_path, monkeypatch, capsys):
    """The lines of `efficli run recipe.yaml` with the recipe `text`; it must end with exit code 2 and write nothing."""
    monkeypatch.chdir(tmp_path)

    def run(text: str, *words: str) -> list[str]:
        (tmp_path / "recipe.yaml").write_text(text)
        before = {path.name for path in tmp_path.iterdir()}
        assert main(["run", "recipe.yaml", *words]) == 2
        out, err = capsys.readouterr()
        assert not out
        assert {path.name for path in tmp_path.iterdir()} == before
        return err.splitlines()

    return run


def bomb(levels: int) -> str:
    rows = ["a0: &a0 [x,x,x,x,x,x,x,x,x,x]"]
    return "\n".join(rows + [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)])


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (
            HEAD + "seed: 1\nseed: 2\n",
            ["error: recipe.yaml:4: duplicate key 'seed' (first on line 3)"],
        ),
        (
            HEAD + bomb(12) + "\n",
            ["error: recipe.yaml:3: more than 10000 values once its aliases are expanded"],
        ),
        (
            "version: 1\nmodel: !!python/object/apply:os.system [touch canary]\n",
            [
                "error: recipe.yaml:2: tag '!!python/object/apply:os.system' is not read",
                "hint: plain values only are read",
            ],
        ),
        (
            HEAD + "strict: no\n",
            ["error: recipe.yaml:3: strict: 'no' is a word, expected true or false", "hint: strict: false"],
        ),
        (
            HEAD + "gates: {max_kld: 1e999}\n",
            ["error: recipe.yaml:3: '1e999' is not a finite number"],
        ),
        (
            HEAD + "passes:\n  - method: lowrank.svdd\n    rank: 4\n",
            ["error: recipe.yaml:4: unknown method 'lowrank.svdd'", "hint: did you mean 'lowrank.svd'?"],
        ),
        (
            HEAD + "passes:\n  - method: lowrank.svd\n    rnak: 4\n    keep: 0.5\n",
            ["error: recipe.yaml:5: unknown key 'passes.0.rnak'", "hint: did you mean 'rank'?"],
        ),
        (
            HEAD + "passes:\n  - method: lowrank.svd\n    rank: 4\n    keep: 0.5\n",
            ["error: recipe.yaml:6: both 'rank' and 'keep', expected one of them"],
        ),
        (
            HEAD + "export:\n  type: Q8_0\n",
            ["error: recipe.yaml:3: unknown key 'export'", "hint: did you mean 'exports'?"],
        ),
        (
            HEAD + "exports:\n  - type: Q8_0\n  - type: [Q4_K_M, q4km]\n",
            ["error: recipe.yaml:5: unknown type 'q4km'", "hint: did you mean 'Q4_K_M' or 'Q5_K_M' or 'Q4_K_S'?"],
        ),
        (
            HEAD + "exports:\n  - type: Q8_0\n  - type: [Q4_K, Q8_0]\n",
            ["error: recipe.yaml:5: type Q8_0 is there twice (first: line 4)"],
        ),
        (
            HEAD + "exports:\n  type: IQ2_XXS\n",
            ["error: recipe.yaml:4: IQ2_XXS needs an importance matrix", "hint: imatrix: auto"],
        ),
        (
            HEAD + "exports:\n  tensor_type:\n    - attn_v=Q6_K\n    - '(=Q6_K'\n",
            [
                "error: recipe.yaml:6: tensor_type: '(' is not a regular expression: missing ), unterminated "
                "subpattern at position 0"
            ],
        ),
        (
            HEAD + "exports:\n  tensor_type: attn_v\n",
            ["error: recipe.yaml:4: tensor_type: 'attn_v', expected REGEX=TYPE", "hint: attn_v=Q6_K"],
        ),
        (
            HEAD + "target: pi5-8gbb\n",
            [
                "error: recipe.yaml:3: unknown target 'pi5-8gbb'",
                "hint: did you mean 'pi5-8gb' or 'pi5-4gb' or 'pi4-8gb'?",
            ],
        ),
        (
            HEAD + "target:\n  - pi5-8gb\n  - gr740\n",
            ["error: recipe.yaml:5: gr740 runs no gguf: {gr740}"],
        ),
        (
            HEAD + "target: agx-orin\nexports:\n  type:\n    - Q8_0\n    - TQ1_0\n",
            ["error: recipe.yaml:7: TQ1_0 is not for agx-orin: {agx-orin}"],
        ),
        (
            HEAD + "certificate:\n  enabled: false\ngates:\n  max_kld: 0.1\n",
            ["error: recipe.yaml:6: max_kld needs the certificate, and certificate.enabled is false"],
        ),
        (
            HEAD + "gates:\n  min_decode: 5\n",
            ["error: recipe.yaml:4: min_decode needs bench", "hint: bench: {}"],
        ),
        (
            HEAD + "bench: {n_gen: 0}\ngates:\n  min_decode: 5\n",
            ["error: recipe.yaml:5: min_decode needs tokens to write, and bench.n_gen is 0"],
        ),
        (
            HEAD + "bench:\n",
            ["error: recipe.yaml:3: bench is empty, expected keys", "hint: bench: {} measures with the defaults"],
        ),
        (
            HEAD + "bench: {scenario: [chat, chta]}\n",
            ["error: recipe.yaml:3: unknown scenario 'chta'", "hint: did you mean 'chat'?"],
        ),
        (
            HEAD + "bench:\n  repetitions: 40\n",
            ["error: recipe.yaml:4: max_repetitions 30 is less than repetitions 40"],
        ),
        (
            HEAD + "calibration:\n  text: recipe.yml\n",
            ["error: recipe.yaml:4: no such file: recipe.yml", "hint: did you mean 'recipe.yaml'?"],
        ),
        (
            HEAD + "exports:\n  imatrix: nowhere/im.dat\n",
            ["error: recipe.yaml:4: no such file: nowhere/im.dat"],
        ),
        (
            "version: 1\nmodel: ./recipe.yaml\n",
            [
                "error: recipe.yaml:2: ./recipe.yaml: is a file, expected a checkpoint directory",
                "hint: give the directory: .",
            ],
        ),
        (
            "version: 1\nmodel: refrence\nrevision: main\n",
            [
                "error: recipe.yaml:2: no such checkpoint: refrence",
                "hint: did you mean 'reference' or 'reference-twin'?",
            ],
        ),
        (
            "version: 1\nmodel: .\nrevision: main\n",
            ["error: recipe.yaml:3: revision 'main' of a directory, which has none: ."],
        ),
        (
            HEAD + "gates:\n  max_bytes: 4G\n",
            [
                "error: recipe.yaml:4: gates.max_bytes: '4G' is not a number of bytes",
                "hint: a number and B, kB, MB, GB, TB (1000s) or KiB, MiB, GiB, TiB (1024s), as in 350MiB",
            ],
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_word_for_word(told, text, lines):
    own = {"{gr740}": load_target("gr740").why_not, "{agx-orin}": load_target("agx-orin").lacks_source}
    for name, words in own.items():
        lines = [line.replace(name, str(words)) for line in lines]
    assert told(text) == lines


def test_a_missing_recipe_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["run", "nothing.yaml"]) == 2
    assert capsys.readouterr().err == "error: no such recipe: nothing.yaml\n"


EVERYTHING = """version: 1
model: ./refrence
target: [pi5, pi5-8gb]
exports:
  - type: [Q4_K_M, TQ3_0]
    imatrix: im.dat
  - {type: q4_k_m, tpye: 1}
certificate: {enabled: off}
bench:
gates:
  max_kld: .nan
  min_decode: 3
seed: 1
seed: 2
bnch: {}
passes:
  - {method: lowrank.svd, rank: 0}
  - method: lowrank
"""


def test_everything_is_said_at_once_in_the_order_of_lines(told):
    assert told(EVERYTHING) == [
        "error: recipe.yaml:2: no such checkpoint: ./refrence; did you mean 'reference' or 'reference-twin'?",
        "error: recipe.yaml:3: target pi5-8gb is there twice",
        "error: recipe.yaml:5: unknown type 'TQ3_0'; did you mean 'TQ2_0' or 'TQ1_0' or 'Q8_0'?",
        "error: recipe.yaml:6: no such file: im.dat",
        "error: recipe.yaml:7: type Q4_K_M is there twice (first: line 5)",
        "error: recipe.yaml:7: unknown key 'exports.1.tpye'; did you mean 'type'?",
        "error: recipe.yaml:8: certificate.enabled: 'off' is a word, expected true or false; enabled: false",
        "error: recipe.yaml:9: bench is empty, expected keys; bench: {} measures with the defaults",
        "error: recipe.yaml:11: '.nan' is not a finite number",
        "error: recipe.yaml:12: min_decode needs bench; bench: {}",
        "error: recipe.yaml:14: duplicate key 'seed' (first on line 13)",
        "error: recipe.yaml:15: unknown key 'bnch'; did you mean 'bench'?",
        "error: recipe.yaml:17: passes.0.rank: 0, expected greater than or equal to 1",
        "error: recipe.yaml:18: unknown method 'lowrank'; did you mean 'lowrank.svd'?",
    ]


def test_json_lists_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text("version: 1\nmodle: m\nseed: x\n")
    assert main(["run", "r.yaml", "--json"]) == 2
    assert json.loads(capsys.readouterr().out) == {
        "error": {
            "code": 2, "where": "r.yaml:2", "message": "unknown key 'modle'", "hint": "did you mean 'model'?",
            "others": [{"where": "r.yaml:3", "message": "seed: 'x', expected integer", "hint": None}],
        }
    }  # fmt: skip


def test_a_problem_that_another_one_causes_is_not_told(told):
    """`enabled` cannot be read, so nobody knows whether the gate has its certificate."""
    text = HEAD + "certificate: {enabled: 0}\nbench: {n_gen: x}\ngates: {max_kld: 1, min_decode: 3}\n"
    assert told(text) == [
        "error: recipe.yaml:3: certificate.enabled: 0, expected boolean",
        "error: recipe.yaml:4: bench.n_gen: 'x', expected tuple",
    ]


def test_a_file_beside_the_recipe_is_pointed_at(tmp_path, monkeypatch):
    """Paths are relative to the current directory, as on a command line."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "text.txt").write_text("words")
    recipe = tmp_path / "sub" / "r.yaml"
    recipe.write_text(HEAD + "certificate: {text: text.txt}\n")
    with pytest.raises(UsageError) as caught:
        load_with(recipe)
    assert caught.value.message == "no such file: text.txt"
    assert caught.value.hint == f"paths are relative to the current directory: {tmp_path}/sub/text.txt"
    recipe.write_text(HEAD + "certificate: {text: sub/text.txt}\n")
    assert load_with(recipe).recipe.certificate.text == "sub/text.txt"


def test_a_target_of_ones_own_is_told_with_its_own_lines(told, tmp_path):
    (tmp_path / "mine.yaml").write_text("version: 1\nlike: pi5-8gb\nabuot: mine\ncores: []\n")
    assert told(HEAD + "target: ./mine.yaml\n")[0].startswith("error: recipe.yaml:3: mine.yaml:3: unknown key 'abuot'")


def test_later_errors_can_name_the_key(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(HEAD + "exports:\n  - type: Q8_0\n  - type: [Q4_0,\n      IQ4_NL]\n")
    loaded = load_with(path)
    assert loaded.where("exports", 1, "type", 1) == f"{path}:6"
    with pytest.raises(EffiError) as caught, loaded.at("exports", 1, "type", 0):
        raise UnsupportedError("rows of 96", where="token_embd.weight")
    assert caught.value.line == f"{path}:5: token_embd.weight: rows of 96"


def test_a_name_that_no_file_system_holds_is_a_usage_error(told):
    long = "x" * 5000
    assert told(HEAD + f"calibration: {{text: {long}}}\n") == [f"error: recipe.yaml:3: no such file: {long}"]
    assert told(HEAD + 'calibration: {text: "a\\0b"}\n')[0].startswith("error: recipe.yaml:3: no such file: a")
