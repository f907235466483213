"""Results of a pipeline's steps, kept between runs: found by what they depend on, and checked when they are used.

key = step_key("export", ingredients)
with store.using():
    entry = store.get(key)
    if entry is None:
        with store.filling(key, kind="export", ingredients=ingredients) as folder:
            ...  # write files into the folder
        entry = store.get(key)
"""

from __future__ import annotations

from efficli.store.entry import Entry
from efficli.store.key import differences, step_key
from efficli.store.place import default_root
from efficli.store.pruning import Pruned
from efficli.store.source import package_versions, source_hash
from efficli.store.store import Store

__all__ = ["Entry", "Pruned", "Store", "default_root", "differences", "package_versions", "source_hash", "step_key"]
