"""source_hash: follows what code imports, found without importing it; changes with that and with nothing else."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from efficli.store import package_versions, source_hash
from efficli.store.source import _closure, _imported, hash_sources

ROOT = Path(__file__).resolve().parents[2]
TREE = {
    "efficli/__init__.py": "_WHERE = 'efficli.pipeline'\n",
    "efficli/errors.py": "",
    "efficli/ops/__init__.py": "",
    "efficli/ops/far.py": "from efficli import errors\n",
    "efficli/ops/late.py": "",
    "efficli/ops/child.py": "",
    "efficli/ops/types.py": "",
    "efficli/ops/other.py": "import efficli.ops.far\n",
    "efficli/export/__init__.py": "def __getattr__(name):\n    from efficli import pipeline\n",
    "efficli/export/near.py": (
        "from typing import TYPE_CHECKING\nimport os, efficli.ops.far as f\nif TYPE_CHECKING:\n"
        "    from efficli.ops import types\ndef g():\n    from efficli.ops import late\n    from . import beside\n"
        "    return run('efficli.ops.child:work')\n"
    ),
    "efficli/export/beside.py": "from .near import g\n",
    "efficli/export/deep/down.py": "",
    "efficli/pipeline/__init__.py": "",
}


@pytest.fixture
def tree(tmp_path):
    for name, text in TREE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def changed(root: Path, name: str, module: str) -> bool:
    """Whether one more line in a file changes the hash of a module."""
    before = hash_sources(root, (module,))
    text = (root / name).read_text()
    (root / name).write_text(text + "# another line\n")
    after = hash_sources(root, (module,))
    (root / name).write_text(text)
    assert hash_sources(root, (module,)) == before
    return after != before


def test_followed_is_what_the_code_imports_and_nothing_else(tree):
    used = {name for name in TREE if changed(tree, name, "efficli.export.near")}
    unused = {f"efficli/{name}.py" for name in ("ops/types", "ops/other", "export/deep/down", "pipeline/__init__")}
    assert used == set(TREE) - unused


def test_an_import_that_appears_is_followed(tree):
    before = hash_sources(tree, ("efficli.ops.late",))
    (tree / "efficli/ops/late.py").write_text("import efficli.ops.types\n")
    _imported.cache_clear()  # a process reads a file once
    assert hash_sources(tree, ("efficli.ops.late",)) != before
    assert changed(tree, "efficli/ops/types.py", "efficli.ops.late")


def test_packages_above_a_folder_without_init_count(tree):
    assert changed(tree, "efficli/export/__init__.py", "efficli.export.deep.down")


def test_several_modules_are_one_hash_in_any_order(tree):
    both = ("efficli.ops.late", "efficli.ops.far")
    assert hash_sources(tree, both) == hash_sources(tree, both[::-1]) != hash_sources(tree, both[:1])


@pytest.mark.parametrize("name", ["efficli.ops.nothing", "numpy", "efficli", "efficli..ops", "../etc", ""])
def test_only_modules_of_efficli_have_a_hash(tree, name):
    if name == "efficli":
        assert hash_sources(tree, (name,))
        return
    with pytest.raises(ValueError, match="there is no module"):
        hash_sources(tree, (name,))


@pytest.mark.parametrize(
    "module", ["efficli.export.gguf.job", "efficli.lowrank.svd", "efficli.skip_layers.last", "efficli.bench.quality"]
)
def test_all_that_importing_the_real_module_loads_is_in_its_hash(module):
    ours = "[n for n, m in sys.modules.items() if n.split('.')[0] == 'efficli' and m.__file__]"
    code = f"import json, sys, {module}; print(json.dumps({ours}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    followed = set(_closure(ROOT, (module,)))
    assert set(json.loads(done.stdout)) <= followed
    assert not any(name.startswith(("efficli.cli", "efficli.pipeline", "efficli.console")) for name in followed)


def test_a_copy_of_efficli_has_the_hash_of_the_original(tmp_path):
    def sources_only(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if not name.endswith(".py") and not (Path(folder) / name).is_dir()]

    shutil.copytree(ROOT / "efficli", tmp_path / "efficli", ignore=sources_only)
    assert hash_sources(tmp_path, ("efficli.export.gguf.job",)) == source_hash("efficli.export.gguf.job")
    assert changed(tmp_path, "efficli/export/gguf/vocab_bpe.py", "efficli.export.gguf.job")
    assert changed(tmp_path, "efficli/ops/storage.py", "efficli.export.gguf.job")
    assert not changed(tmp_path, "efficli/bench/chart.py", "efficli.export.gguf.job")
    assert not changed(tmp_path, "efficli/store/store.py", "efficli.export.gguf.job")


def test_versions_are_those_installed():
    assert package_versions("numpy", "no-such-package-here") == {
        "numpy": metadata.version("numpy"),
        "no-such-package-here": None,
    }
