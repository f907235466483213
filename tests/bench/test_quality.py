"""The certificate against what the figures mean, computed again by other means; with both runtimes, not imitations."""

from __future__ import annotations

import json
import math
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from efficli.bench.measure import compare_chunk
from efficli.bench.origin import TorchModel
from efficli.bench.quality import Certificate, Row, certify, certify_all, find_origin
from efficli.bench.texts import choose_chunks
from efficli.checkpoint import Checkpoint, open_checkpoint
from efficli.errors import CheckpointError, EffiError, GateError, UsageError
from efficli.ops.llama import LlamaFile
from efficli.progress import Silent
from tests import pico
from tests.converted import convert

CTX = 128


@pytest.fixture(scope="module")
def certificates(pico_model: Path, pico_files: dict[str, Path], text_file: Path) -> dict[str, Certificate]:
    """By PyTorch, of every file."""
    found = certify_all(list(pico_files.values()), open_checkpoint(pico_model), text=text_file, ctx=CTX)
    return dict(zip(pico_files, found, strict=True))


def test_f32_is_its_origin(pico_model: Path, pico_files: dict[str, Path]) -> None:
    """Both runtimes compute the same from the same weights: the divergence is rounding."""
    ids = [int(i) for i in np.random.default_rng(0).integers(2, 384, 128)]
    with LlamaFile(pico_files["F32"], ctx=128, threads=1, exact=True) as file:
        [found] = compare_chunk(TorchModel(pico_model, threads=1), [file], ids, 0)
    assert len(found) == 127 and found.agrees.all()
    assert found.kld.max() < 1e-7
    assert np.abs(found.loss - found.loss_base).max() < 1e-4


def test_f32_as_users_run_it(certificates: dict[str, Certificate]) -> None:
    """What is left is the F16 cache that llama.cpp has by default, on random weights; 2e-8 on the reference."""
    certificate = certificates["F32"]
    assert certificate.status == "measured" and certificate.kind == "divergence"
    assert 0 < certificate["kld_mean"] < 1e-5
    assert certificate["top1_agreement"] > 0.995
    assert certificate["ppl_ratio"] == pytest.approx(1, abs=1e-3)
    assert str(certificate.base_runtime).startswith("PyTorch")
    assert certificate.total.n == certificate.total.chunks * 63


def test_order(certificates: dict[str, Certificate]) -> None:
    """Fewer bits, more divergence: each by more than ten standard errors."""
    means = [(c["kld_mean"], c["kld_mean_stderr"]) for c in certificates.values()]
    for (less, _), (more, error) in pairwise(means):
        assert less + 10 * error < more
    assert certificates["Q2_K"]["top1_agreement"] < certificates["Q8_0"]["top1_agreement"] < 1


def test_figures_are_what_they_say(
    certificates: dict[str, Certificate], pico_model: Path, pico_files: dict[str, Path], text_file: Path
) -> None:
    """Perplexities, divergence, agreement and bits per byte from whole logits, in double precision, chunk by chunk."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(pico_model, dtype=torch.float64)
    content = text_file.read_text("utf-8")
    klds, agrees, losses, base_losses, num_bytes, half = [], [], [], [], 0, CTX // 2
    with LlamaFile(pico_files["Q4_K_M"], ctx=CTX, threads=1) as file:
        ids = file.tokenize(content)
        for start in range(0, len(ids) - CTX + 1, CTX):
            chunk = ids[start : start + CTX]
            num_bytes += sum(len(file.piece(token)) for token in chunk[half + 1 :])
            if file.add_bos:
                chunk[0] = file.bos
            with torch.no_grad():
                p = torch.log_softmax(model(torch.tensor([chunk])).logits[0, half:-1], -1)
                [(_, logits)] = file.logit_blocks(chunk[:-1], first=half)
                q = torch.log_softmax(torch.from_numpy(logits).double(), -1)
            following = chunk[half + 1 :]
            klds += (p.exp() * (p - q)).sum(-1).tolist()
            agrees += (p.argmax(-1) == q.argmax(-1)).tolist()
            base_losses += [-float(p[t, token]) for t, token in enumerate(following)]
            losses += [-float(q[t, token]) for t, token in enumerate(following)]
    found = certificates["Q4_K_M"]
    assert found.total.n == len(klds) > 1000
    expected = {
        "kld_mean": np.mean(klds),
        "kld_p99": np.quantile(klds, 0.99),
        "kld_max": max(klds),
        "top1_agreement": np.mean(agrees),
        "ppl": math.exp(np.mean(losses)),
        "ppl_base": math.exp(np.mean(base_losses)),
        "ppl_ratio": math.exp(np.mean(losses) - np.mean(base_losses)),
        "rms_dp": math.sqrt(np.mean((np.exp(-np.array(losses)) - np.exp(-np.array(base_losses))) ** 2)),
        "bits_per_byte": sum(losses) / math.log(2) / num_bytes,
        "bits_per_byte_base": sum(base_losses) / math.log(2) / num_bytes,
    }
    assert {name: found[name] for name in expected} == {n: pytest.approx(v, rel=1e-4) for n, v in expected.items()}


def test_without_torch(certificates: dict[str, Certificate], pico_files: dict[str, Path], text_file: Path) -> None:
    """The origin's F32 file gives the same certificate, and it says what ran."""
    found = certify(pico_files["Q4_K_M"], pico_files["F32"], text=text_file, ctx=CTX, origin_name="pico")
    assert found.origin == "pico" and found.base_runtime == f"{str(found.runtime).split(',')[0]}, F32 file, F32 cache"
    for name, value in certificates["Q4_K_M"].total.figures.items():
        assert found.total.figures[name] == pytest.approx(value, rel=2e-3), name


def test_again_and_written_down(
    certificates: dict[str, Certificate], pico_model: Path, pico_files: dict[str, Path], text_file: Path
) -> None:
    """Alone or among others the same bytes; and back from JSON."""
    several = [pico_files[type] for type in ("Q2_K", "Q8_0", "Q4_K_M")]
    among = certify_all(several, pico_files["F32"], text=text_file, ctx=CTX)[1]
    again = certify(pico_files["Q8_0"], pico_files["F32"], text=text_file, ctx=CTX)
    assert again == among
    again = certificates["Q8_0"]
    text = json.dumps(again.to_json(), allow_nan=False)
    assert str(pico_model) not in text and Certificate.from_json(json.loads(text)) == again
    for wrong in ({}, {"schema_version": 2}, {"schema_version": 1}, again.to_json() | {"extra": 1}):
        with pytest.raises(CheckpointError):
            Certificate.from_json(wrong)


def test_source_tokenizer(pico_model: Path, pico_files: dict[str, Path], text_file: Path) -> None:
    """The source's ids are what both sides read; a file that would split the text otherwise is told of."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(pico_model / "tokenizer.json"))

    def source(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    same = certify(pico_files["F32"], pico_files["F32"], text=text_file, ctx=CTX, tokenize=source)
    assert same.notes == ()
    with LlamaFile(pico_files["F32"], vocab_only=True) as file:
        begin = file.bos
    other = certify(
        pico_files["F32"], pico_files["F32"], text=text_file, ctx=CTX, tokenize=lambda t: [*source(t)[:9], begin] * 20
    )
    assert other.notes == ("code.txt: the file's tokenizer gives other ids than the source's, from token 9 on",)
    assert other.texts[0]["tokens"] == 200


def test_several_texts_and_a_budget(pico_files: dict[str, Path]) -> None:
    """The committed slices: a row each and one over both; positions bounded; progress adds up."""

    class Counting(Silent):
        total = done = 0.0

        def start(self, task: str, total: float, unit: str = "") -> None:
            self.total, self.task = total, (task, unit)

        def advance(self, amount: float) -> None:
            self.done += amount

    progress = Counting()
    found = certify(pico_files["Q2_K"], pico_files["F32"], max_positions=2000, ctx=CTX, seed=3, progress=progress)
    code, prose, both = found.rows
    assert [row.text for row in found.rows] == ["evaluation-code", "evaluation-prose", "all"]
    assert found.total is both and both.n == code.n + prose.n == progress.total == progress.done <= 2000
    assert progress.task == ("certificate", "positions")
    for name in ("kld_mean", "top1_agreement"):
        mean = (code.n * (code.figures[name] or 0) + prose.n * (prose.figures[name] or 0)) / both.n
        assert both.figures[name] == pytest.approx(mean, rel=1e-5)
    assert both.figures["kld_max"] == max(code.figures["kld_max"] or 0, prose.figures["kld_max"] or 0)
    assert found["kld_mean_stderr"] < max(code.figures["kld_mean_stderr"] or 0, prose.figures["kld_mean_stderr"] or 0)
    heading, lines = found.table()
    assert heading == ["", "evaluation-code", "evaluation-prose", "all"]
    assert lines[0] == ["positions", str(code.n), str(prose.n), str(both.n)]
    assert "±" in lines[1][1] and len(lines) == 11 and all(len(line) == 4 for line in lines)
    assert [text["tokens"] > 10_000 for text in found.texts] == [True, True]


def test_one_chunk_has_no_error(pico_files: dict[str, Path], tmp_path: Path) -> None:
    """A short text is one chunk, whose figures have no standard error; the context is at most the model's."""
    file = tmp_path / "short.txt"
    file.write_text(pico.TEXT)
    found = certify(pico_files["Q8_0"], pico_files["F32"], text=file, ctx=100_000)
    with LlamaFile(pico_files["Q8_0"], vocab_only=True) as vocabulary:
        tokens = len(vocabulary.tokenize(pico.TEXT))
        trained = int(vocabulary.metadata("llama.context_length") or 0)
    assert found.ctx == trained and found.total.chunks == len(choose_chunks([tokens], trained, None, 0))
    short = tmp_path / "shorter.txt"
    short.write_text(pico.TEXT[:300])
    one = certify(pico_files["Q8_0"], pico_files["F32"], text=short)
    assert one.total.chunks == 1 and one.total.figures["kld_mean_stderr"] is None
    assert "±" not in one.table()[1][1][1] and one["kld_mean"] > 0
    with pytest.raises(GateError, match=r"is 0\.\d+ \(n = \d+\), expected at most 1e-09"):
        one.check(max_kld=1e-9)


def measured(**figures: float) -> Certificate:
    """A certificate with these figures."""
    return Certificate(artifact="m.gguf", origin="o", kind="divergence", rows=(Row("t", 510, 2, figures),))


def test_gates() -> None:
    """Figure, standard error, n, gate and flag are in the line; a gate met says nothing."""
    found = measured(kld_mean=0.0123, kld_mean_stderr=0.0004, top1_agreement=0.95, top1_agreement_stderr=0.01)
    found.check(max_kld=0.0123, min_top1=0.95)
    found.check()
    with pytest.raises(GateError) as caught:
        found.check(max_kld=0.01)
    assert caught.value.exit_code == 3
    expected = "m.gguf: mean KL divergence is 0.0123 ± 0.0004 (n = 510), expected at most 0.01 (--max-kld)"
    assert caught.value.line == expected
    with pytest.raises(GateError, match=r"top-1 agreement is 0.95 ± 0.01 .* expected at least 0.99 \(--min-top1\)"):
        found.check(max_kld=1, min_top1=0.99)
    with pytest.raises(UsageError, match="--min-cosine does not apply"):
        found.check(min_cosine=0.9)


def test_origin_absent() -> None:
    """Nothing is measured, and every gate is unmet."""
    found = certify(Path("m.gguf"), None)
    assert (found.status, found.rows, found.origin) == ("origin absent", (), None)
    assert Certificate.from_json(found.to_json()) == found
    found.check()
    with pytest.raises(GateError, match=r"--max-kld 0.1 cannot be met: origin absent"):
        found.check(max_kld=0.1)
    with pytest.raises(UsageError, match="origin absent"):
        found["kld_mean"]


def test_find_origin(pico_model: Path, tmp_path: Path) -> None:
    """Itself; the recorded directory, if its fingerprint is the recorded one; else absent."""
    plain = open_checkpoint(pico_model)
    assert find_origin(plain) is plain

    def compressed(**origin: Any) -> Path:
        folder = tmp_path / f"c{len(list(tmp_path.iterdir()))}"
        shutil.copytree(pico_model, folder)
        sidecar = {"version": 1, "kind": "checkpoint", "origin": origin}
        (folder / "efficli.json").write_text(json.dumps(sidecar))
        return folder

    there = find_origin(open_checkpoint(compressed(fingerprint=plain.fingerprint(), model=str(pico_model))))
    assert isinstance(there, Checkpoint) and there.root == plain.root
    other = f"sha256:{'0' * 64}"
    for origin in (
        {"fingerprint": other, "model": str(pico_model)},
        {"fingerprint": plain.fingerprint()},
        {"fingerprint": plain.fingerprint(), "model": str(tmp_path / "gone")},
        {"fingerprint": plain.fingerprint(), "model": "org/name"},
    ):
        assert isinstance(find_origin(open_checkpoint(compressed(**origin))), str)


def test_wrong_pairs(pico_model: Path, pico_files: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    """Another vocabulary; a few rows of padding; a tensor that transformers would fill with random numbers; NaN."""
    larger = convert(pico.write_llama(tmp_path / "larger", vocab=6000), tmp_path / "l", "F32")[0]
    with pytest.raises(UsageError, match="the base has 6000 tokens and the artifact 384: not the same vocabulary"):
        certify(pico_files["Q8_0"], larger, text=text_file, ctx=CTX)
    padded = convert(pico.write_llama(tmp_path / "padded", vocab=400), tmp_path / "p", "F32")[0]
    note = "the base has 384 rows of vocabulary and the file 400: compared on the first 384"
    assert certify(padded, pico_files["F32"], text=text_file, ctx=CTX).notes == (note,)

    broken = shutil.copytree(pico_model, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing 1 tensors: model\.layers\.1\.mlp\.up_proj\.weight"):
        TorchModel(broken, threads=1)

    poisoned = shutil.copy(pico_files["F32"], tmp_path / "poisoned.gguf")
    reader = gguf.GGUFReader(poisoned, "r+")
    next(t for t in reader.tensors if t.name == "output_norm.weight").data[3] = np.nan
    reader.data.flush()
    with pytest.raises(EffiError, match="the artifact computes NaN or Inf") as caught:
        certify(Path(poisoned), pico_files["F32"], text=text_file, ctx=CTX)
    assert caught.value.where == str(poisoned)
    with pytest.raises(UsageError, match="a context of 4 tokens"):
        certify(pico_files["F32"], pico_files["F32"], ctx=4)
