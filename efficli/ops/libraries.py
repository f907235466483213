"""Where the shared libraries of the installed llama-cpp-python are; found without importing it, or anything else."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from efficli.errors import MissingExtra, UnsupportedError

_NAMES = ("lib{}.so.0", "lib{}.so", "lib{}.dylib", "{}.dll", "lib{}.dll")


def library_path(stem: str) -> Path:
    """The shared library `stem` ("ggml-base", "ggml-cpu", "llama") of the installed llama-cpp-python."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtra("llama-cpp-python", "gguf")
    folder = Path(next(iter(spec.submodule_search_locations))) / "lib"
    for pattern in _NAMES:
        path = folder / pattern.format(stem)
        if path.exists():
            return path
    raise UnsupportedError(
        f"the installed llama-cpp-python has no library '{stem}' in {folder}",
        hint="pip install --force-reinstall 'efficli[gguf]'",
    )
