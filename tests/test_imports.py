"""Imports point one way, and what `--help` loads is light."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sizes import findings
from tests.startup import bare_app, compare

ROOT = Path(__file__).resolve().parent.parent

LAYERS = (
    ("cli", "__main__"),
    ("console", "tables"),
    ("pipeline",),
    ("recipe", "export", "bench", "planning", "inspection"),
    ("catalog", "tensorwise"),
    ("skip_layers", "lowrank", "quantize"),
    ("method", "surgery", "folding", "network", "precision"),
    (
        "checkpoint", "chat", "data", "families", "artifact", "reference", "interrupt", "strict_yaml", "strict_schema",
        "schema_types",
        "target",
        "targets",
        "store",
    ),
    ("ops",),
    ("progress", "errors"),
)  # fmt: skip
"""From the surface to the ground: a module imports from its own line and the lines below."""
RANK = {name: rank for rank, line in enumerate(reversed(LAYERS)) for name in line}
STRANGERS = {
    ("export", "bench"),
    ("bench", "export"),
    ("recipe", "export"),
    ("recipe", "bench"),
    ("planning", "bench"),
    ("inspection", "bench"),
    ("planning", "inspection"),
    ("inspection", "planning"),
}
"""Of one line, and yet apart: pipeline joins them."""
UPWARDS = {"efficli/__init__.py", "efficli/export/__init__.py", "efficli/bench/__init__.py"}
"""The public interface names functions of the pipeline; it imports them when they are called."""

HEAVY = (
    "torch", "transformers", "tokenizers", "llama_cpp", "sentencepiece", "datasets", "onnx", "onnxruntime", "numpy",
    "gguf", "huggingface_hub", "safetensors", "jinja2", "yaml", "matplotlib",
)  # fmt: skip


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import of efficli's own modules, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.startswith("efficli."))
        elif isinstance(node, ast.ImportFrom) and node.module == "efficli":
            yield from ((node.lineno, f"efficli.{alias.name}") for alias in node.names if alias.name != "__version__")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("efficli."):
            yield node.lineno, str(node.module)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: a relative import"


def wrong_way(folder: Path) -> list[str]:
    """Every import that points upwards or to a stranger."""
    found = []
    for path in sorted((folder / "efficli").rglob("*.py")):
        name = path.relative_to(folder).as_posix()
        if name in UPWARDS:
            continue
        own = path.relative_to(folder / "efficli").parts[0].removesuffix(".py")
        for line, module in imports(path):
            other = module.split(".")[1]
            if RANK[other] > RANK[own] or (own, other) in STRANGERS:
                found.append(f"{name}:{line}: {own} imports {module}")
    return found


def test_imports_point_one_way():
    assert wrong_way(ROOT) == []


def test_an_import_that_points_up_is_found(tmp_path):
    for name, text in {
        "efficli/ops/a.py": "def f():\n    from efficli.checkpoint import reader\n",
        "efficli/bench/b.py": "import efficli.export.gguf.writer\n",
        "efficli/pipeline.py": "from efficli import bench, cli\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert wrong_way(tmp_path) == [
        "efficli/bench/b.py:1: bench imports efficli.export.gguf.writer",
        "efficli/ops/a.py:2: ops imports efficli.checkpoint",
        "efficli/pipeline.py:1: pipeline imports efficli.cli",
    ]


def test_every_module_has_a_layer():
    names = {
        path.stem for path in (ROOT / "efficli").iterdir() if path.suffix in ("", ".py") and path.name != "__pycache__"
    }
    assert names - {"__init__"} <= set(RANK), "give it a line in LAYERS"


def test_rich_is_imported_by_the_console_alone():
    users = {
        path.name
        for path in (ROOT / "efficli").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rich")
        or (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "rich" for alias in node.names))
    }
    assert users == {"console.py"}


def loaded_after(code: str) -> set[str]:
    """Names in sys.modules of a fresh interpreter after `code`; its own stdout is not looked at."""
    code = f"{code}\nimport sys, json; sys.stderr.write('\\0' + json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(json.loads(done.stderr.rpartition("\0")[2]))


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["export", "--help"],
        ["quantize", "--help"],
        ["bench", "--help"],
        ["try", "--help"],
        ["inspect", "--help"],
        ["plan", "--help"],
        ["methods", "--help"],
        ["recipe-schema", "--help"],
        ["targets", "--help"],
        ["targets", "probe", "--help"],
        ["cache", "prune", "--help"],
        ["--version"],
        ["exprot"],
    ],
)
def test_help_loads_nothing_heavy(words):
    loaded = loaded_after(f"from efficli.cli import main; main({words!r})")
    assert "efficli.cli" in loaded
    assert not loaded & set(HEAVY)
    ours = {name for name in loaded if name.startswith("efficli.")}
    ours = {name for name in ours if not name.startswith("efficli.cli.")}
    assert ours <= {f"efficli.{name}" for name in ("cli", "console", "errors", "interrupt", "ops", "ops.memory")}


@pytest.mark.parametrize("words", [["--help"], ["export", "--help"], ["--version"]])
def test_help_loads_no_more_than_typer_does(words, tmp_path):
    (tmp_path / "bare.py").write_text(bare_app())
    path = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.argv = ['bare', *{words!r}]"
    bare = loaded_after(f"{path}\ntry: import bare\nexcept SystemExit: pass")
    ours = loaded_after(f"import sys; sys.argv = ['efficli', *{words!r}]; from efficli.cli import main; main()")
    packages = {name.split(".")[0] for name in ours - bare} - set(sys.stdlib_module_names)
    assert packages == {"efficli"}
    assert not {name for name in ours - bare if name.startswith(("rich", "pydantic", "typer"))}


@pytest.mark.parametrize("words", [[], ["export"]])
def test_help_costs_at_most_1_3_times_a_bare_typer_app(words):
    # CPU seconds of pairs; a second look where the first is off, as one median can be on a shared core.
    assert any(compare(words, pairs=pairs)[2] <= 1.3 for pairs in (3, 9))


def test_importing_efficli_loads_nothing_and_offers_the_commands():
    loaded = loaded_after("import efficli; efficli.__version__; dir(efficli)")
    assert {name for name in loaded if name.startswith("efficli")} == {"efficli"}
    done = loaded_after(
        "import efficli, efficli.export.gguf, efficli.bench.figures; "
        "assert callable(efficli.export) and callable(efficli.bench)"
    )
    assert "efficli.pipeline" not in done


@pytest.mark.parametrize("name", ["export", "bench"])
def test_the_public_function_is_the_pipelines_whatever_was_imported_first(name):
    call = f"type(efficli.{name}).__call__.fget(efficli.{name})"
    check = f"from efficli import pipeline; assert {call} is pipeline.{name}"
    for begin in ("import efficli", "import efficli.export.gguf.layout, efficli.bench.figures"):
        loaded_after(f"{begin}; {check}")


def test_no_file_and_no_function_is_too_long():
    assert list(findings()) == []
