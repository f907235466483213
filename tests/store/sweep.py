"""The fault sweep of tests/faults with a store as output: no entry, the old one or the new one, whole; no strays."""

from __future__ import annotations

from pathlib import Path

from efficli.artifact.manifest import FileRecord
from efficli.errors import EffiError, OutputError
from efficli.ops.storage import writing
from efficli.store import Store
from efficli.store.entry import Damaged, manifest_bytes, read_entry
from tests.faults.sweep import TEMPORARY, Sweep, main
from tests.lost_nothing import fingerprint
from tests.store.results import FILES, INGREDIENTS, KEY

_PIECE = 16_000


def keep(root: Path, text: str) -> None:
    """A step as the pipeline runs it: get the result, or compute and keep it. "old" leaves one with a flipped bit."""
    store = Store(root)
    with store.using():
        if store.get(KEY) is None:
            with store.filling(KEY, kind="export", ingredients=INGREDIENTS) as folder:
                _write(folder)
            if store.get(KEY) is None:
                raise OutputError("kept, and not there")
    if text == "old":
        path = root / KEY / "files" / "model.gguf"
        path.write_bytes(b"W" + path.read_bytes()[1:])


def in_place(root: Path, text: str) -> None:
    """A store that writes entries where they will be, as a careless one does: the sweep has to catch it."""
    files = root / KEY / "files"
    files.mkdir(parents=True, exist_ok=True)
    _write(files)
    rows = [FileRecord(name, len(data), "0" * 64) for name, data in FILES.items()]
    content = manifest_bytes(key=KEY, kind="export", ingredients=INGREDIENTS, label="", created=0.0, files=rows)
    (root / KEY / "entry.json").write_bytes(content)


def _write(folder: Path) -> None:
    """The files, in several writes that are not buffered."""
    for name, data in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        with writing(folder / name), (folder / name).open("wb", buffering=0) as file:
            for start in range(0, len(data), _PIECE):
                view = memoryview(data[start : start + _PIECE])
                while view:
                    view = view[file.write(view) :]


class StoreSweep(Sweep):
    """Judges a store by its entries; a lock, and folders that the next run removes, are no content."""

    def _content(self) -> dict[str, str]:
        found = fingerprint(self.out)
        hidden = ("lock", TEMPORARY)
        found = {name: content for name, content in found.items() if name != "." and not name.startswith(hidden)}
        if f"{KEY}/entry.json" in found:
            found[f"{KEY}/entry.json"] = "whole" if _is_whole(self.out / KEY) else "damaged"
        return found

    def _waits_aside(self) -> bool:
        return True  # an old entry that was discarded is no loss

    def _misleads(self, outcome: str, status: int, line: str) -> str | None:
        if status == 70:
            return "a bug"
        if status == 0 and outcome != "new":
            return f"done, but the store is {outcome}"
        return "wrong words" if status and (not line or "\n" in line) else None

    def _again(self) -> str | None:
        if wrong := super()._again():
            return wrong
        left = [path.name for path in self.out.iterdir() if path.name.startswith(TEMPORARY)]
        return f"the next run leaves {left}" if left else self._prune()

    def _prune(self) -> str | None:
        """Whether the store can be emptied afterwards."""
        try:
            Store(self.out).prune(everything=True)
        except EffiError as failure:
            return f"cannot be pruned: {failure.line}"
        return None if [path.name for path in self.out.iterdir()] == ["lock"] else "prune leaves something"


def _is_whole(place: Path) -> bool:
    try:
        read_entry(place)
    except Damaged:
        return False
    return True


if __name__ == "__main__":
    main(StoreSweep)
