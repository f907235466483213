"""Models of the hub, without a network: caches of symbolic links, revisions, a hub on this machine, no hub at all."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

from efficli.checkpoint import hub, open_checkpoint
from efficli.checkpoint.locate import locate, suggest
from efficli.checkpoint.shards import INDEX
from efficli.errors import CheckpointError, EffiError, SecurityError, UsageError
from tests.lost_nothing import lost_nothing
from tests.pico import write_llama

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "f" * 40
MODEL = "/api/models/org/pico"
LOOK = "ckpt = open_checkpoint(sys.argv[1]); print(ckpt.name, ckpt.revision)"


def fill_cache(
    cache: Path, repository: str, files: Path, commit: str, refs: tuple[str, ...], xet: bool = False
) -> Path:
    """A cache as huggingface_hub leaves it: blobs by hash, snapshots of links to them; `xet`: weights shared by all."""
    home = cache / f"models--{repository.replace('/', '--')}"
    snapshot = home / "snapshots" / commit
    (home / "blobs").mkdir(parents=True, exist_ok=True)
    for path in sorted(p for p in files.rglob("*") if p.is_file()):
        name = path.relative_to(files)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        blob = home / "blobs" / digest
        if xet and path.suffix == ".safetensors":
            shared = cache / "blobs" / digest[:2] / digest
            shared.parent.mkdir(parents=True, exist_ok=True)
            shared.write_bytes(path.read_bytes())
            blob.unlink(missing_ok=True)
            blob.symlink_to(os.path.relpath(shared, blob.parent))
        else:
            blob.write_bytes(path.read_bytes())
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    for ref in refs:
        (home / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (home / "refs" / ref).write_text(commit)
    return snapshot


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for this test, with nothing in it."""
    from huggingface_hub import constants

    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


@pytest.mark.parametrize("xet", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
def test_snapshot_of_links(cache: Path, tmp_path: Path, shards: int, xet: bool) -> None:
    files = write_llama(tmp_path / "files", shards=shards)
    (files / "1_Pooling").mkdir()
    (files / "1_Pooling" / "config.json").write_text('{"a": 1}')
    snapshot = fill_cache(cache, "org/pico", files, COMMIT, ("main",), xet)
    with lost_nothing(cache):
        ckpt = open_checkpoint("org/pico")
        assert (ckpt.name, ckpt.model, ckpt.revision) == ("org/pico", "org/pico", COMMIT)
        assert ckpt.fingerprint() == open_checkpoint(files).fingerprint()
        assert ckpt.json("1_Pooling/config.json") == {"a": 1}
        # the snapshot's folder, given as one, is still the hub's model
        again = open_checkpoint(snapshot)
        assert (again.name, again.revision) == ("org/pico", COMMIT)


def test_revisions(cache: Path, tmp_path: Path) -> None:
    fill_cache(cache, "org/pico", write_llama(tmp_path / "a", seed=1), COMMIT, ("main",))
    fill_cache(cache, "org/pico", write_llama(tmp_path / "b", seed=2), OTHER, ("v2.0", "refs/pr/1"))
    assert open_checkpoint("org/pico").revision == COMMIT
    for word in (f"org/pico@{OTHER}", "org/pico@v2.0", "org/pico@refs/pr/1"):
        assert open_checkpoint(word).revision == OTHER
    assert open_checkpoint("org/pico", revision="v2.0").revision == OTHER
    assert open_checkpoint("org/pico@v2.0", revision="v2.0").revision == OTHER
    with pytest.raises(UsageError, match=r"two revisions: 'v2\.0' in the name and 'main'"):
        open_checkpoint("org/pico@v2.0", revision="main")
    with pytest.raises(CheckpointError, match="org/pico@v3 is neither a folder here nor in the Hugging Face cache"):
        open_checkpoint("org/pico@v3")
    with pytest.raises(UsageError, match="a directory has no revision"):
        open_checkpoint(tmp_path / "a", revision="main")


def test_a_bare_name_is_the_hubs_only_when_cached(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^no such checkpoint: pico$"):
        open_checkpoint("pico")
    fill_cache(cache, "pico", write_llama(tmp_path / "files"), COMMIT, ("main",))
    assert open_checkpoint("pico").name == "pico"


def test_not_cached_and_offline(cache: Path, tmp_path: Path) -> None:
    fill_cache(cache, "org/pico-llama", write_llama(tmp_path / "files"), COMMIT, ("main",))
    with lost_nothing(tmp_path), pytest.raises(CheckpointError) as caught:
        open_checkpoint("org/pico-lama")
    assert caught.value.line == (
        "org/pico-lama is neither a folder here nor in the Hugging Face cache, and HF_HUB_OFFLINE is set"
    )
    assert caught.value.hint == "did you mean 'org/pico-llama'?"
    assert caught.value.exit_code == 1


def test_blob_that_is_gone(cache: Path, tmp_path: Path) -> None:
    """A cache from which blobs were deleted, and a snapshot whose index names a shard that was never fetched."""
    snapshot = fill_cache(cache, "org/pico", write_llama(tmp_path / "files", shards=2), COMMIT, ("main",))
    (snapshot / "model-00002-of-00002.safetensors").resolve().unlink()
    with pytest.raises(CheckpointError, match=r"index names model-00002-of-00002\.safetensors, which is not here"):
        open_checkpoint("org/pico")
    for path in snapshot.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        open_checkpoint("org/pico")


def test_a_snapshots_link_may_not_go_further(cache: Path, tmp_path: Path) -> None:
    snapshot = fill_cache(cache, "org/pico", write_llama(tmp_path / "files"), COMMIT, ("main",))
    secret = fill_cache(cache, "org/private", write_llama(tmp_path / "other"), COMMIT, ("main",))
    (snapshot / "model.safetensors").unlink()
    for target in (secret / "model.safetensors", tmp_path / "files" / "model.safetensors"):
        (snapshot / "model.safetensors").symlink_to(target)
        with pytest.raises(SecurityError, match="leaves the checkpoint directory"):
            open_checkpoint("org/pico")
        (snapshot / "model.safetensors").unlink()


def test_index_of_a_hub_model_that_names_another_repository(cache: Path, tmp_path: Path) -> None:
    files = write_llama(tmp_path / "files", shards=2)
    index = json.loads((files / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = "../../../../api/models/org/private"
    (files / "model.safetensors.index.json").write_text(json.dumps(index))
    fill_cache(cache, "org/pico", files, COMMIT, ("main",))
    with pytest.raises(SecurityError, match="index points outside the checkpoint"):
        open_checkpoint("org/pico")


@pytest.mark.parametrize("word", ["org/pico/x", "../x", "/none/at/all", "org/../x", "-x/y", "a b", "org/", "x@", ""])
def test_words_that_are_no_hub_id(cache: Path, word: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # `../x` may be something where the tests are
    monkeypatch.setattr(hub, "fetch", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(EffiError, match="no such checkpoint"):
        locate(word)


def test_suggestions(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("SmolLM2-135M", "runs/first", ".hidden"):
        (tmp_path / name).mkdir(parents=True)
    (cache / "models--Qwen--Qwen3-0.6B" / "snapshots").mkdir(parents=True)
    for word, near in {
        "smollm2-135": "SmolLM2-135M",
        "runs/frist": "runs/first",
        str(tmp_path / "runs" / "firts"): str(tmp_path / "runs" / "first"),
        "Qwen/Qwen3-0.6": "Qwen/Qwen3-0.6B",
        "qwen3-0.6B": "Qwen/Qwen3-0.6B",
        "refrence": "reference",
    }.items():
        assert repr(near) in suggest(word), word
    assert "did you mean" not in suggest("zzzzzz")


def in_fresh_interpreter(word: str, look: str = LOOK, **environment: str) -> subprocess.CompletedProcess[str]:
    """Open a model where huggingface_hub reads the environment anew; prints name and commit, or the error's line."""
    script = (
        "import sys; from efficli.checkpoint import open_checkpoint, open_without_weights\n"
        "from efficli.errors import EffiError\n"
        f"try: {look}\n"
        "except EffiError as error: print(error.exit_code, error.line)"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and k != "XDG_CACHE_HOME"}
    return subprocess.run(
        [sys.executable, "-c", script, word], capture_output=True, text=True, check=True, env=clean | environment
    )


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HOME"])
def test_the_environments_cache(tmp_path: Path, variable: str) -> None:
    below = {
        "HF_HUB_CACHE": "",
        "HF_HOME": "hub",
        "XDG_CACHE_HOME": "huggingface/hub",
        "HOME": ".cache/huggingface/hub",
    }
    fill_cache(tmp_path / below[variable], "org/pico", write_llama(tmp_path / "files"), COMMIT, ("main",))
    found = in_fresh_interpreter("org/pico", HF_HUB_OFFLINE="1", **{variable: str(tmp_path)})
    assert (found.stdout, found.stderr) == (f"org/pico {COMMIT}\n", "")


def closed_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def test_no_network(tmp_path: Path) -> None:
    """Nothing answers: a cached model opens, one that is not is one line."""
    fill_cache(tmp_path / "hub", "org/pico", write_llama(tmp_path / "files"), COMMIT, ("main",))
    environment = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": f"http://127.0.0.1:{closed_port()}"}
    found = in_fresh_interpreter("org/pico", **environment)
    assert found.stdout == f"org/pico {COMMIT}\n"
    found = in_fresh_interpreter("org/other", **environment)
    assert found.stdout == (
        "1 org/other is neither a folder here nor in the Hugging Face cache, and there is no network\n"
    )


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP interface as huggingface_hub asks for; serves `folder` as org/pico."""

    folder: Path
    asked: list[str]

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        if "/org/pico/resolve/" in path:
            self.file(self.folder / path.rpartition(f"/resolve/{COMMIT}/")[2])
        elif path.removesuffix("/main").removesuffix(f"/{COMMIT}") in (MODEL, f"{MODEL}/revision"):
            siblings = [{"rfilename": self.entry(p)["path"]} for p in self.folder.rglob("*") if p.is_file()]
            self.answer(200, json.dumps({"id": "org/pico", "sha": COMMIT, "siblings": siblings}).encode())
        elif path == f"{MODEL}/tree/{COMMIT}":
            files = [p for p in self.folder.rglob("*") if p.is_file()]
            self.answer(200, json.dumps([self.entry(p) for p in files]).encode())
        elif "gated" in path:
            self.answer(403, b"", "GatedRepo")
        else:
            self.answer(404, b"", "RevisionNotFound" if "pico" in path else "RepoNotFound")

    do_HEAD = do_GET

    def file(self, path: Path) -> None:
        if self.command == "GET":
            self.asked.append(path.relative_to(self.folder).as_posix())
        self.answer(200, path.read_bytes())

    def entry(self, path: Path) -> dict[str, object]:
        oid = hashlib.sha1(path.read_bytes()).hexdigest()
        name = path.relative_to(self.folder).as_posix()
        return {"type": "file", "path": name, "size": path.stat().st_size, "oid": oid}

    def answer(self, status: int, body: bytes, code: str = "") -> None:
        self.send_response(status)
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Error-Code": code}
        for name, value in (headers | {"Content-Length": str(len(body)), "Content-Type": "application/json"}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A hub on this machine, and the environment that leads to it."""
    Hub.folder, Hub.asked = tmp_path / "served", []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
    server.shutdown()
    server.server_close()
    thread.join()


def test_what_the_hub_answers(endpoint: dict[str, str]) -> None:
    for word, line in {
        "org/none": "1 no such checkpoint: org/none\n",
        "org/gated": "1 org/gated: access to this model is restricted\n",
        "org/pico@v9": "1 org/pico: revision 'v9' does not exist\n",
    }.items():
        assert in_fresh_interpreter(word, **endpoint).stdout == line


@pytest.mark.parametrize("shards", [1, 2])
def test_fetches_what_it_needs_and_nothing_else(endpoint: dict[str, str], shards: int) -> None:
    files = write_llama(Hub.folder, shards=shards)
    wanted = {p.name for p in files.iterdir()} | {"LICENSE", "1_Pooling/config.json"}
    for name in (
        "LICENSE", "1_Pooling/config.json", "pytorch_model.bin", "model.fp16.safetensors", "model.gguf", "evil.py",
        "original/consolidated.safetensors", "original/params.json", "onnx/model.onnx", "consolidated.safetensors",
    ):  # fmt: skip
        (files / name).parent.mkdir(exist_ok=True)
        (files / name).write_text(f'{{"n": "{name}"}}')
    assert in_fresh_interpreter("org/pico", **endpoint).stdout == f"org/pico {COMMIT}\n"
    assert set(Hub.asked) == wanted
    Hub.asked.clear()
    assert in_fresh_interpreter("org/pico", **endpoint).stdout == f"org/pico {COMMIT}\n"
    assert in_fresh_interpreter("org/pico", **endpoint, HF_HUB_OFFLINE="1").stdout == f"org/pico {COMMIT}\n"
    assert Hub.asked == []


@pytest.mark.parametrize("shards", [1, 2])
def test_without_weights_the_small_files_alone_are_fetched(endpoint: dict[str, str], shards: int) -> None:
    files = write_llama(Hub.folder, shards=shards)
    wanted = {path.name for path in files.iterdir() if path.suffix != ".safetensors"}
    opened = "found, absent = open_without_weights(sys.argv[1]); print(found.revision, len(found.tensors), absent)"
    found = in_fresh_interpreter("org/pico", look=opened, **endpoint)
    names = json.loads((files / INDEX).read_text())["weight_map"] if shards > 1 else {}
    assert found.stdout.startswith(f"{COMMIT} 0 Absent(names=frozenset(")
    assert all(repr(name) in found.stdout for name in names)
    assert set(Hub.asked) == wanted
    in_fresh_interpreter("org/pico", **endpoint)
    Hub.asked.clear()
    # weights that were fetched for something else are read to their headers
    found = in_fresh_interpreter("org/pico", look=opened, **endpoint)
    assert found.stdout == f"{COMMIT} {len(open_checkpoint(files).tensors)} None\n"
    assert Hub.asked == []


def test_a_cache_that_another_program_filled_in_part(endpoint: dict[str, str]) -> None:
    """What is missing matters only if it is needed: a model card does not, weights do."""
    files = write_llama(Hub.folder, shards=2)
    in_fresh_interpreter("org/pico", **endpoint)
    snapshot = Path(endpoint["HF_HOME"]) / "hub" / "models--org--pico" / "snapshots" / COMMIT
    (snapshot / "README.md").unlink()
    offline = endpoint | {"HF_HUB_OFFLINE": "1"}
    assert in_fresh_interpreter("org/pico", **offline).stdout == f"org/pico {COMMIT}\n"
    (snapshot / "model-00001-of-00002.safetensors").unlink()
    assert in_fresh_interpreter("org/pico", **offline).stdout in (
        "1 org/pico: only in part in the Hugging Face cache, and HF_HUB_OFFLINE is set\n",
        # huggingface_hub < 1 keeps no list of what a repository has
        "1 model.safetensors.index.json: index names model-00001-of-00002.safetensors, which is not here\n",
    )
    assert files.exists()


def test_a_model_of_pickles(endpoint: dict[str, str]) -> None:
    files = write_llama(Hub.folder)
    (files / "model.safetensors").rename(files / "pytorch_model.bin")
    found = in_fresh_interpreter("org/pico", **endpoint)
    line = f"1 {COMMIT}: neither model.safetensors nor model.safetensors.index.json found\n"
    assert (found.stdout, found.stderr) == (line, "")
    assert "pytorch_model.bin" not in Hub.asked


def test_escaping_index_fetches_nothing(endpoint: dict[str, str]) -> None:
    """huggingface_hub itself would ask for another repository, with the user's token."""
    files = write_llama(Hub.folder, shards=2)
    index = files / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00002-of-00002", "../../../private/resolve/main/model"))
    assert "6 model.safetensors.index.json: index points outside" in in_fresh_interpreter("org/pico", **endpoint).stdout
    assert not [name for name in Hub.asked if name.endswith(".safetensors")]
