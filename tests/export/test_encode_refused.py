"""What the encoder refuses, or is stopped by: damaged and unfit weights, changing inputs, full disks, interrupts."""

import json

import numpy as np
import pytest

from efficli.checkpoint import open_checkpoint
from efficli.errors import CheckpointError, OutputError, UnsupportedError
from efficli.export.gguf import encode, output, stream
from efficli.export.gguf.layout import OutTensor, string
from efficli.export.gguf.model import layout
from efficli.export.gguf.writer import write_files
from efficli.families import read_shape
from efficli.ops import ggml
from efficli.progress import Silent
from tests.encoding import Model
from tests.gguf_reader import Reader
from tests.pico import write_llama, write_shards

PACKING = ("TQ1_0", "TQ2_0", "Q2_0", "Q1_0")


def damaged(tmp_path, name, place, value, dtype="BF16", **config):
    """A pico checkpoint with one value replaced."""
    model = write_llama(tmp_path / "model", hidden=64, ffn=96, dtype=dtype, **config)
    from tests.pico import llama_tensors

    tensors = llama_tensors(json.loads((model / "config.json").read_text()), 0)
    for at, number in zip(place, value, strict=True):
        tensors[name][at] = number
    write_shards(model, tensors, dtype)
    made = Model.__new__(Model)
    made.folder, made.ckpt = tmp_path, open_checkpoint(model)
    metadata, made.tensors, _ = layout(read_shape(made.ckpt.config), made.ckpt)
    made.metadata = {"general.architecture": string("llama")} | metadata
    return made


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("threads", [1, 2])
def test_nan_and_inf_are_counted_and_placed(tmp_path, dtype, threads):
    name = "model.layers.1.self_attn.q_proj.weight"
    values = [np.nan, np.nan, -np.inf]
    model = damaged(tmp_path, name, [(3, 5), (60, 1), (61, 0)], values, dtype)
    with pytest.raises(CheckpointError) as raised:
        model.write(model.choose("Q8_0"), threads=threads)
    assert raised.value.line == f"2 NaN and 1 Inf in {name} (first at [3,5])"
    assert raised.value.exit_code == 1


def test_nan_in_a_vector_is_found_too(tmp_path):
    model = damaged(tmp_path, "model.norm.weight", [(7,)], [np.nan])
    with pytest.raises(CheckpointError, match=r"1 NaN in model\.norm\.weight \(first at \[7\]\)"):
        model.write(model.choose("F32"))


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_what_float16_cannot_hold_is_refused(tmp_path, dtype):
    name = "model.layers.0.mlp.up_proj.weight"
    model = damaged(tmp_path, name, [(0, 0), (1, 1)], [7e4, -65504.0 if dtype == "F32" else -65280.0], dtype)
    with pytest.raises(CheckpointError) as raised:
        model.write(model.choose("F16"))
    assert raised.value.line == f"{name}: 1 value overflows float16 (first at [0,0])"
    assert "--type BF16" in raised.value.hint
    model.write(model.choose("BF16"), model.choose("F32"), model.choose("Q8_0"))


def test_weights_whose_scale_overflows_are_refused(tmp_path):
    model = damaged(tmp_path, "model.layers.0.mlp.up_proj.weight", [(0, 0)], [1e8])
    with pytest.raises(CheckpointError, match=r"blk\.0\.ffn_up\.weight: its weights are too large for Q8_0"):
        model.write(model.choose("Q8_0"))


def test_the_first_fault_in_order_is_told_whatever_the_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "SLAB_WEIGHTS", 64)
    name = "model.layers.0.mlp.down_proj.weight"
    model = damaged(tmp_path, name, [(9, 9)], [np.nan])
    broken = damaged(tmp_path / "two", "model.layers.1.mlp.down_proj.weight", [(1, 1)], [np.inf])
    for threads in (1, 2, 4):
        with pytest.raises(CheckpointError, match=r"1 NaN in model\.layers\.0"):
            model.write(model.choose("Q8_0"), threads=threads)
        with pytest.raises(CheckpointError, match=r"1 Inf in model\.layers\.1"):
            broken.write(broken.choose("Q8_0"), threads=threads)


def ternary(tmp_path, levels, scale=0.02):
    """A checkpoint whose matrices hold `levels` times a scale per tensor; embeddings and vectors as ever."""
    folder = write_llama(tmp_path / "model", hidden=256, ffn=256, layers=1, dtype="BF16")
    from tests.pico import llama_tensors

    generator = np.random.default_rng(0)
    tensors = llama_tensors(json.loads((folder / "config.json").read_text()), 0)
    for name, values in tensors.items():
        if "proj" in name:
            tensors[name] = (generator.choice(levels, values.shape) * scale).astype(np.float32)
    write_shards(folder, tensors, "BF16")
    made = Model.__new__(Model)
    made.folder, made.ckpt = tmp_path, open_checkpoint(folder)
    metadata, made.tensors, _ = layout(read_shape(made.ckpt.config), made.ckpt)
    made.metadata = {"general.architecture": string("llama")} | metadata
    return made


@pytest.mark.parametrize("kind", PACKING)
def test_ternary_weights_are_packed_exactly(tmp_path, kind):
    model = ternary(tmp_path, (-1, 1) if kind == "Q1_0" else (-1, 0, 1))
    (written,) = model.write(model.choose(kind, token_embedding_type="Q8_0"))
    stored = Reader(written.path).tensors["blk.0.ffn_up.weight"]
    assert stored.type == kind
    back = ggml.decode(kind, np.frombuffer(stored.data, np.uint8), *stored.shape)
    weights = model.ckpt.read("model.layers.0.mlp.up_proj.weight")
    assert np.linalg.norm(back - weights) <= 1e-3 * np.linalg.norm(weights)


@pytest.mark.parametrize("kind", PACKING)
def test_packing_types_refuse_ordinary_weights(even, kind):
    with pytest.raises(UnsupportedError) as raised:
        even.write(even.choose(kind, token_embedding_type="Q8_0", output_tensor_type="Q8_0"))
    what = "binary" if kind == "Q1_0" else "ternary"
    assert f"its weights are not {what}: {kind} would keep them with a relative error of 0." in raised.value.line
    assert "--allow-non-ternary" in raised.value.hint
    assert raised.value.exit_code == 5
    even.write(even.choose(kind, allow_non_ternary=True))


def test_one_tensor_that_is_not_ternary_is_enough(tmp_path):
    model = ternary(tmp_path, (-1, 0, 1))
    choice = model.choose("Q8_0", overrides=((r"blk\.0\.ffn", "TQ2_0"), ("token_embd", "TQ2_0")))
    with pytest.raises(UnsupportedError, match=r"token_embd\.weight: its weights are not ternary"):
        model.write(choice)
    model.write(model.choose("Q8_0", overrides=((r"blk\.0\.ffn", "TQ2_0"),)))


def test_a_block_scaled_by_group_of_64_fits_q2_0_only(tmp_path):
    """methods.md: such a model must go to Q2_0, TQ2_0 would be wrong by half a scale."""
    model = ternary(tmp_path, (-1, 0, 1))
    weights = np.random.default_rng(3).integers(-1, 2, (256, 256)) * np.repeat([[1, 2, 3, 4]], 64, axis=1) * 0.01
    raw = weights.astype(np.float32)
    tensor = OutTensor(name="w", shape=(256, 256), sources=("w",))
    for kind, fits in (("Q2_0", True), ("TQ2_0", False)):
        target = encode.target_of(kind, None, False)
        if fits:
            encode.encode_slab(tensor, raw, [target], encode.Scratch())
        else:
            with pytest.raises(UnsupportedError):
                encode.encode_slab(tensor, raw, [target], encode.Scratch())
    assert model.ckpt


def test_progress_counts_every_weight_once(even):
    class Counter(Silent):
        def start(self, task, total, unit=""):
            self.total, self.done, self.finished = total, 0, False

        def advance(self, amount):
            self.done += amount

        def finish(self):
            self.finished = True

    progress = Counter()
    even.write(even.choose("Q8_0"), even.choose("F16"), progress=progress)
    assert progress.done == progress.total == sum(t.num_elements for t in even.tensors)
    assert progress.finished


def test_input_that_changes_meanwhile_is_an_error(tmp_path):
    model = Model(tmp_path, hidden=64, ffn=96)

    class Meddler(Silent):
        def finish(self):
            path = model.ckpt.root / "model.safetensors"
            with path.open("r+b") as file:
                file.seek(-1, 2)
                file.write(b"x")

    with pytest.raises(CheckpointError, match="input changed while reading"):
        model.write(model.choose("Q8_0"), progress=Meddler())


def test_an_interrupt_stops_every_thread(even, monkeypatch):
    import threading

    monkeypatch.setattr(stream, "SLAB_WEIGHTS", 256)

    class Impatient(Silent):
        def advance(self, amount):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        even.write(even.choose("Q8_0"), progress=Impatient())
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("encode-")]


def test_an_output_that_cannot_be_written_is_one_line(even, tmp_path):
    path = tmp_path / "missing" / "x.gguf"
    with pytest.raises(OutputError, match=r"cannot write x\.gguf: No such file or directory"):
        write_files(even.ckpt, even.tensors, [(path, even.metadata, even.choose("Q8_0"))])


def test_a_full_disk_is_one_line(even, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output.os, "pwrite", full)
    with pytest.raises(OutputError, match=r"cannot write out-0\.gguf: no space left"):
        even.write(even.choose("Q8_0"))
