"""Methods are found by their files, described without being imported, and run as a recipe's passes run them."""

from __future__ import annotations

import ast
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from efficli import catalog
from efficli.checkpoint import open_checkpoint
from efficli.checkpoint.sidecar import Origin, Sidecar, read_sidecar, write_sidecar
from efficli.cli import main
from efficli.errors import UsageError
from efficli.lowrank.svd import Config as Svd
from efficli.method import Context, Kind, MethodConfig, TensorConfig
from efficli.pipeline.methods import describe_method, list_methods
from efficli.skip_layers.last import Config as Last
from efficli.store import source_hash
from tests import pico

ROOT = Path(__file__).resolve().parent.parent


def test_names_are_paths():
    names = catalog.method_names()
    assert {"lowrank.svd", "skip-layers.last"} <= set(names)
    for name in names:
        assert (ROOT / "efficli" / (name.replace("-", "_").replace(".", "/") + ".py")).is_file()
        assert catalog.canonical(name) == catalog.canonical(name.replace("-", "_")) == name


def test_every_package_of_methods_is_listed():
    kinds = [f'\nKIND = "{kind}"\n' for kind in get_args(Kind)]
    texts = {path: path.read_text() for path in (ROOT / "efficli").glob("*/*.py")}
    packages = {path.parent.name for path, text in texts.items() if any(kind in text for kind in kinds)}
    assert packages
    assert packages <= set(catalog.PACKAGES)


@pytest.mark.parametrize("name", catalog.method_names())
def test_every_method_is_whole(name):
    method = catalog.load_method(name)
    assert method.name == name
    assert issubclass(method.config, TensorConfig if method.kind == "tensor" else MethodConfig)
    assert (method.solve if method.kind == "tensor" else method.run) is not None
    about = catalog.about(name)
    assert 20 < len(about) <= 90 and about.endswith(".") and about[0].isupper()
    assert "arXiv:" in catalog.description(name)
    info = describe_method(name)
    assert info.keys and all(key.about.endswith(".") and key.type != "value" for key in info.keys)
    heavy = {"torch", "transformers", "scipy"}
    tree = ast.parse((ROOT / "efficli" / (name.replace("-", "_").replace(".", "/") + ".py")).read_text())
    tops = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not heavy & {word for node in tops for word in ast.unparse(node).replace(".", " ").split()}


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("lowrank.svdd", "did you mean 'lowrank.svd'?"),
        ("skip_layer.last", "did you mean 'skip-layers.last'?"),
        ("svd", "did you mean 'lowrank.svd'?"),
        ("last", "did you mean 'skip-layers.last'?"),
        ("quantum", "efficli methods"),
        ("../checkpoint.writer", "efficli methods"),
    ],
)
def test_an_unknown_method(word, hint):
    for ask in (catalog.load_method, catalog.config_of, catalog.about, catalog.method_modules):
        with pytest.raises(UsageError) as caught:
            ask(word)
        assert (caught.value.line, caught.value.hint) == (f"unknown method {word!r}", hint)


def loaded_after(code: str) -> set[str]:
    """Names in sys.modules of a fresh interpreter after `code`; its own stdout is not looked at."""
    code = f"{code}\nimport sys, json; sys.stderr.write('\\0' + json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(json.loads(done.stderr.rpartition("\0")[2]))


def test_describing_imports_no_method_and_running_no_torch(tmp_path):
    code = "from efficli import catalog; [(catalog.about(n), catalog.kind_of(n)) for n in catalog.method_names()]"
    assert not {"efficli.lowrank.svd", "efficli.skip_layers.last"} & loaded_after(code)
    code = "from efficli.cli import main; main(['methods']); main(['methods', 'lowrank.svd'])"
    assert not {"torch", "transformers", "huggingface_hub", "llama_cpp"} & loaded_after(code)


def test_passes_follow_each_other_and_the_origin_stays(tmp_path):
    ckpt = open_checkpoint(pico.write_llama(tmp_path / "a", layers=3))
    steps = [("skip_layers.last", Last(remove=1)), ("lowrank.svd", Svd(rank=8)), ("skip-layers.last", Last(remove=1))]
    before = ckpt
    for number, (name, config) in enumerate(steps):
        folder = tmp_path / str(number)
        folder.mkdir()
        catalog.run_method(name, before, folder, config, Context())
        before = open_checkpoint(folder)
    sidecar = open_checkpoint(tmp_path / "2").sidecar
    assert [step.method for step in sidecar.steps] == ["skip-layers.last", "lowrank.svd", "skip-layers.last"]
    assert sidecar.origin == Origin(fingerprint=ckpt.fingerprint(), model=str(tmp_path / "a"))
    assert open_checkpoint(tmp_path / "2").config["num_hidden_layers"] == 1


def test_an_origin_that_is_known_is_not_made_again(tmp_path):
    folder = pico.write_llama(tmp_path / "a")
    ckpt = open_checkpoint(folder)
    given = "sha256:" + "a" * 64
    (tmp_path / "b").mkdir()
    origin = Origin(fingerprint=given)
    catalog.run_method("lowrank.svd", ckpt, tmp_path / "b", Svd(rank=8), Context(), origin=origin)
    assert read_sidecar(tmp_path / "b").origin == origin
    write_sidecar(folder, Sidecar(origin=Origin(fingerprint=given, model="org/first")))
    (tmp_path / "c").mkdir()
    catalog.run_method("lowrank.svd", open_checkpoint(folder), tmp_path / "c", Svd(rank=8), Context())
    assert read_sidecar(tmp_path / "c").origin == Origin(fingerprint=given, model="org/first")


@pytest.mark.parametrize(("name", "config"), [("lowrank.svd", Svd(keep=0.5)), ("skip-layers.last", Last(remove=1))])
def test_headers_only_reads_no_weight_and_has_the_final_shapes(name, config, tmp_path):
    ckpt = open_checkpoint(pico.write_llama(tmp_path / "a"))
    for folder in ("whole", "headers"):
        (tmp_path / folder).mkdir()
    catalog.run_method(name, ckpt, tmp_path / "whole", config, Context())
    with (tmp_path / "a" / "model.safetensors").open("r+b") as file:  # NaN: an error for whoever reads it
        size = file.seek(0, 2)
        first = min(tensor.offset for tensor in ckpt.tensors.values())
        file.seek(first)
        file.write(b"\xff" * (size - first))
    catalog.run_method(name, open_checkpoint(tmp_path / "a"), tmp_path / "headers", config, Context(headers_only=True))
    whole, headers = (open_checkpoint(tmp_path / folder) for folder in ("whole", "headers"))
    assert headers.config == whole.config
    assert headers.sidecar.steps == whole.sidecar.steps and headers.sidecar.origin is None
    assert {n: (t.dtype, t.shape, t.offset) for n, t in headers.tensors.items()} == {
        n: (t.dtype, t.shape, t.offset) for n, t in whole.tensors.items()
    }


def test_what_decides_a_result_is_the_method_and_what_runs_it():
    for name in catalog.method_names():
        own, frame = catalog.method_modules(name)
        assert (own, frame) == ("efficli." + name.replace("-", "_"), "efficli.catalog")
    svd, last = (source_hash(*catalog.method_modules(name)) for name in ("lowrank.svd", "skip-layers.last"))
    assert svd != last


def run(capsys, *words) -> tuple[int, str, str]:
    code = main(list(words))
    told = capsys.readouterr()
    return code, told.out, told.err


def test_the_list_on_the_terminal(capsys):
    code, out, err = run(capsys, "methods")
    lines = out.splitlines()
    assert (code, err, lines[0].split()) == (0, "", ["method", "kind", "what", "it", "does"])
    for name, line in zip(catalog.method_names(), lines[1:], strict=True):
        assert line.split() == [name, catalog.kind_of(name), *catalog.about(name).split()]
    code, out, _ = run(capsys, "methods", "--json")
    assert json.loads(out) == {"methods": list_methods()}


def test_a_page_on_a_narrow_terminal_keeps_its_columns(capsys, monkeypatch):
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((60, 24)))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    _, out, _ = run(capsys, "methods", "lowrank.svd")
    lines = out.splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("key "))
    column = lines[first + 1].index("Regular")
    assert {line.ljust(column)[column - 2 : column] for line in lines[first:]} == {"  "}
    assert max(map(len, lines)) <= 60
    assert not any(len(above) < 40 for above, below in itertools.pairwise(lines[:first]) if above and below)


def test_one_method_on_the_terminal(capsys):
    code, out, err = run(capsys, "methods", "skip_layers.last")
    assert (code, err) == (0, "")
    assert out.startswith("skip-layers.last: Leave out the last layers")
    assert "remove  whole number >= 1  required  Layers to leave out, counted from the last." in out
    code, out, _ = run(capsys, "methods", "lowrank.svd", "--json")
    keys = {key["name"]: key for key in json.loads(out)["keys"]}
    assert set(keys) == {"include", "exclude", "rank", "keep"}
    assert keys["keep"]["type"] == "number > 0, < 1" and keys["keep"]["default"] is None
    assert keys["include"]["type"] == "text or list of text" and not keys["include"]["required"]
    code, out, err = run(capsys, "methods", "lowrank.svdd")
    assert (code, out) == (2, "")
    assert err == "error: unknown method 'lowrank.svdd'\nhint: did you mean 'lowrank.svd'?\n"


HALF = '''
"""Halve every matrix, for a test of the catalog."""
from efficli.method import TensorConfig
KIND = "tensor"
class Config(TensorConfig):
    """None of its own."""
def solve(weight, statistics, config, context):
    return weight / 2
'''
RUN_HALF = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from efficli import catalog
from efficli.checkpoint import open_checkpoint
from efficli.method import Context
assert catalog.__file__.startswith(sys.argv[1])
assert "lowrank.half-it" in catalog.method_names()
assert catalog.about("lowrank.half_it") == "Halve every matrix, for a test of the catalog."
config = catalog.config_of("lowrank.half-it")(include="up_proj")
source, out = open_checkpoint(Path("model")), Path("out")
out.mkdir()
print(catalog.run_method("lowrank.half-it", source, out, config, Context()).report)
"""


def test_a_new_method_is_one_file(tmp_path):
    """A copy of the package with one more file lists it, describes it and runs it."""
    skipped = shutil.ignore_patterns("__pycache__", "reference", "targets")
    shutil.copytree(ROOT / "efficli", tmp_path / "efficli", ignore=skipped)
    (tmp_path / "efficli" / "lowrank" / "half_it.py").write_text(HALF)
    folder = pico.write_llama(tmp_path / "model", dtype="BF16")
    run = [sys.executable, "-c", RUN_HALF, str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    name = "model.layers.0.mlp.up_proj.weight"
    assert "2 of 2 matrices changed; relative Frobenius error 50.00% on average" in done.stdout
    assert np.array_equal(open_checkpoint(tmp_path / "out").read(name), open_checkpoint(folder).read(name) / 2)
