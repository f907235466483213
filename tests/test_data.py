"""data.py: every source, disjoint slices, packing against the plain definition, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from efficli import data
from efficli.errors import CheckpointError, MissingExtra, SecurityError, UsageError


def ids_of(text: str) -> list[int]:
    return list(text.encode())


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return path


def test_committed_slices_are_whole_and_disjoint() -> None:
    texts = {name: data.committed(name) for name in data.COMMITTED}
    assert all(len(text) > 90_000 for text in texts.values())
    assert "def " in texts["evaluation-code"]
    data.check_disjoint({name: [text] for name, text in texts.items()})


def test_changed_slice_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path(data.__file__).parent / "reference" / "text"
    shutil.copytree(real, tmp_path / "reference" / "text")
    file = tmp_path / "reference" / "text" / "evaluation-code.txt"
    file.write_bytes(file.read_bytes().replace(b"e", b"a", 1))
    monkeypatch.setattr(data, "__file__", str(tmp_path / "data.py"))
    with pytest.raises(SecurityError, match="sha256 differs"):
        data.committed("evaluation-code")
    assert data.committed("evaluation-prose")
    with pytest.raises(UsageError, match="no slice 'test-code'"):
        data.committed("test-code")


def test_text_files_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "PIECE_CHARACTERS", 100)
    text = "".join(f"line {i} é\r\n" for i in range(50))
    (tmp_path / "b.txt").write_bytes(text.encode())
    (tmp_path / "a.md").write_text("first")
    pieces = list(data.documents(tmp_path / "b.txt"))
    assert "".join(pieces) == text
    assert len(pieces) > 3
    assert all(piece.endswith("\r\n") for piece in pieces)
    assert list(data.documents(tmp_path)) == ["first", *pieces]
    (tmp_path / "c.txt").write_bytes(b"ab\xff")
    with pytest.raises(CheckpointError) as caught:
        list(data.documents(tmp_path / "c.txt"))
    assert caught.value.line == "c.txt: not UTF-8 (byte 2)"


def test_json_lines_and_messages(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "hi"}]
    file = write_lines(tmp_path / "x.jsonl", [{"text": "a"}, {"messages": talk}, {"messages": talk}, {"text": "b"}])
    calls = []

    def render(conversations: list) -> list[str]:
        calls.append(len(conversations))
        return [c[0]["content"] for c in conversations]

    assert list(data.documents(file, render=render)) == ["a", "hi", "hi", "b"]
    assert calls == [2]
    with pytest.raises(CheckpointError, match="'messages' without a chat template"):
        list(data.documents(file))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a", "text": "b"}', "x.jsonl:2: duplicate key 'text'"),
        ('{"text": ', "x.jsonl:2: not valid JSON"),
        ("[1]", "x.jsonl:2: a JSON array, expected an object"),
        ('{"txet": "a"}', "x.jsonl: record 2 has 'txet', expected 'text' with text or 'messages'"),
        ('{"messages": [1]}', "x.jsonl: record 2 has 'messages', expected"),
    ],
)
def test_bad_lines_are_named(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(CheckpointError) as caught:
        list(data.documents(tmp_path / "x.jsonl"))
    assert caught.value.line.startswith(message)


def test_missing_text_and_missing_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="no such text"):
        list(data.documents(str(tmp_path / "none.txt")))
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MissingExtra, match="this needs datasets"):
        list(data.documents("org/name"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_data_sets_of_hugging_face(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"text": ["one", "two"], "n": [1, 2]})
    rows.save_to_disk(str(tmp_path / "saved"))
    assert list(data.documents(tmp_path / "saved")) == ["one", "two"]
    with pytest.raises(CheckpointError, match="record 1 has"):
        list(data.documents(tmp_path / "saved", column="n"))
    (tmp_path / "folder").mkdir()
    rows.to_parquet(str(tmp_path / "folder" / "train.parquet"))
    assert list(data.documents(tmp_path / "folder")) == ["one", "two"]
    with pytest.raises(CheckpointError, match=r"^cannot be loaded"):
        list(data.documents("org/no-such-data-set"))


def test_slices_are_disjoint_complete_and_independent_of_order() -> None:
    found = [f"document number {i}" for i in range(4000)]
    parts = {name: list(data.in_slice(found, name, seed=3)) for name in ("train", "calibration", "evaluation")}
    assert sorted(d for part in parts.values() for d in part) == sorted(found)
    # 5 % of 4000 is 200, standard deviation 14
    assert 140 < len(parts["evaluation"]) < 260
    assert 140 < len(parts["calibration"]) < 260
    assert data.slice_of("a  b\n") == data.slice_of("a b")
    assert list(data.in_slice(reversed(found), "evaluation", seed=3)) == parts["evaluation"][::-1]
    assert set(data.in_slice(found, "evaluation", seed=4)) != set(parts["evaluation"])
    data.check_disjoint(parts)


def test_shared_text_is_found() -> None:
    paragraph = "word " * 60
    with pytest.raises(CheckpointError, match="1 document in both train and evaluation"):
        data.check_disjoint({"train": ["a", "b c"], "evaluation": ["b  c\n"]})
    with pytest.raises(CheckpointError, match="1 of 1 passages in both train and evaluation"):
        data.check_disjoint({"train": ["x\n\n" + paragraph], "evaluation": [paragraph + "\n\ny"]})
    # one paragraph in 500, a licence say, is no shared text
    many = [f"{i} " * 100 for i in range(1000)]
    data.check_disjoint({"a": ["\n\n".join([paragraph, *many[:500]])], "b": ["\n\n".join([paragraph, *many[500:]])]})
    with pytest.raises(CheckpointError, match="50 of 500 passages in both a and b"):
        data.check_disjoint({"a": ["\n\n".join(many[:500])], "b": ["\n\n".join(many[450:950])]})


def test_packing_is_the_concatenation_cut() -> None:
    found = ["abc", "de", "", "fghijkl"]
    whole = [i for d in found for i in [*ids_of(d), 0]]
    samples = list(data.pack(found, ids_of, 4, seed=None, separator=0))
    assert [s.tolist() for s in samples] == [whole[i : i + 4] for i in range(0, len(whole) - 3, 4)]
    assert all(s.dtype == np.int32 for s in samples)
    assert len(list(data.pack(found, ids_of, 4, seed=None, num_samples=2))) == 2
    assert list(data.pack(["ab"], ids_of, 4, seed=0)) == []
    with pytest.raises(UsageError):
        next(data.pack(found, ids_of, 0, seed=0))


def test_packing_under_a_seed() -> None:
    found = [chr(65 + i % 26) * 3 for i in range(300)]

    def run(seed: int) -> list[list[int]]:
        return [s.tolist() for s in data.pack(found, ids_of, 3, seed=seed, buffer_documents=50)]

    assert run(1) == run(1) != run(2)
    assert sorted(run(1)) == sorted(ids_of(d) for d in found)  # nothing lost, nothing twice


def test_packing_streams() -> None:
    """Peak memory follows the buffer, not the data; `num_samples` stops reading."""
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield "x" * 1000

    tracemalloc.start()
    samples = data.pack(endless(), ids_of, 512, seed=0, num_samples=3000, buffer_documents=100)
    count = sum(1 for _ in samples)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 3000
    assert taken < 1700
    assert peak < 1_000_000


def test_names_of_committed_slices_are_the_files() -> None:
    folder = Path(data.__file__).parent / "reference" / "text"
    found = {p.stem for p in folder.glob("*-*.txt") if re.match("calib|eval", p.name)}
    assert found == set(data.COMMITTED)
