"""Turns Hugging Face checkpoints into small files that stock runtimes load, and says what that cost.

    import efficli
    result = efficli.export("reference", Path("out"), types=("Q4_K_M",))
    speed = efficli.bench(["out"], starts=False)

Every command is one public function here, defined in `efficli.pipeline`. Nothing is loaded before it is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from efficli.pipeline import try_artifact as try_artifact
    from efficli.pipeline.targets import probe_target as probe_target
    from efficli.planning.plan import plan as plan

__version__ = "0.1.0"

_WHERE = {
    "bench": "efficli.bench",
    "compress": "efficli.pipeline",
    "export": "efficli.export",
    "inspect": "efficli.pipeline",
    "plan": "efficli.planning.plan",
    "probe_target": "efficli.pipeline.targets",
    "run": "efficli.pipeline",
    "try_artifact": "efficli.pipeline",
}


def __getattr__(name: str) -> Any:
    """A public function, imported when it is first named."""
    if name not in _WHERE:
        raise AttributeError(f"module 'efficli' has no attribute {name!r}")
    module = importlib.import_module(_WHERE[name])
    return module if module.__name__ == f"efficli.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*_WHERE, "__version__"])
