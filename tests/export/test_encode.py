"""Files written from one read: bit-equal to llama.cpp's quantizer, hashed, checked, whatever the number of threads."""

import ctypes
import hashlib
import json

import numpy as np
import pytest

from efficli.checkpoint import open_checkpoint
from efficli.checkpoint.sidecar import Sidecar, write_packed, write_sidecar
from efficli.errors import CheckpointError, OutputError, UnsupportedError
from efficli.export.gguf import encode, output, packed, stream
from efficli.export.gguf.layout import OutTensor, string
from efficli.export.gguf.model import layout
from efficli.export.gguf.types import FILE_TYPES, TypeChoice, TypeRequest, choose_types
from efficli.export.gguf.writer import write_files
from efficli.families import read_shape
from efficli.ops import ggml
from efficli.progress import Silent
from tests.gguf_reader import Reader
from tests.pico import write_llama, write_shards

# the tables of their encoders take seconds to build: 1, 3, 6 and 12
SLOW = {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS"}
PACKING = ("TQ1_0", "TQ2_0", "Q2_0", "Q1_0")


class Model:
    """A pico checkpoint, what its file consists of, and its F32 export."""

    def __init__(self, folder, **config):
        self.folder = folder
        self.ckpt = open_checkpoint(write_llama(folder / "model", **config))
        shape = read_shape(self.ckpt.config)
        metadata, self.tensors, _ = layout(shape, self.ckpt)
        arch = {"general.architecture": string("llama"), "tokenizer.ggml.model": string("none")}
        self.metadata = arch | metadata

    def choose(self, kind, **request):
        return choose_types(self.metadata, self.tensors, TypeRequest(type=kind, **request))

    def write(self, *choices, name="out", **how):
        files = [(self.folder / f"{name}-{n}.gguf", self.metadata, choice) for n, choice in enumerate(choices)]
        return write_files(self.ckpt, self.tensors, files, **how)

    def imatrix(self):
        generator = np.random.default_rng(1)
        return {
            t.name: generator.exponential(1.0, t.shape[-1]).astype(np.float32) for t in self.tensors if not t.keep_f32
        }


def quantize_by_llama(source, out, kind, imatrix=None, pure=False):
    """llama_model_quantize, by the binding's own structures."""
    import llama_cpp

    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, None)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.pure = FILE_TYPES[kind], 2, pure
    if imatrix:
        entries = (llama_cpp.llama_model_imatrix_data * (len(imatrix) + 1))()
        for entry, (name, values) in zip(entries, imatrix.items(), strict=False):
            entry.name, entry.size = name.encode(), values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = entries
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params)) == 0
    return Reader(out)


def assert_same_tensors(ours, theirs):
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name, tensor in theirs.tensors.items():
        assert ours.tensors[name].type == tensor.type, name
        assert ours.tensors[name].shape == tensor.shape, name
        assert ours.tensors[name].data == tensor.data, name
    assert ours.metadata["general.file_type"] == theirs.metadata["general.file_type"]
    assert ours.metadata["general.quantization_version"] == theirs.metadata["general.quantization_version"]


@pytest.fixture(scope="module")
def even(tmp_path_factory):
    """Rows of 256 and 512: every type fits."""
    model = Model(tmp_path_factory.mktemp("even"), hidden=256, layers=2, heads=4, ffn=512, tie=False, dtype="BF16")
    model.write(model.choose("F32"), name="f32")
    return model


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Rows of 96 and 200: no block of 256 fits, and in `ffn_down` none of 32."""
    model = Model(tmp_path_factory.mktemp("odd"), hidden=96, layers=1, heads=4, ffn=200, tie=True, dtype="F16")
    model.write(model.choose("F32"), name="f32")
    return model


# but for Q1_0 where no row fits: see below
CASES = [
    pytest.param(which, kind, marks=pytest.mark.slow if kind in SLOW else ())
    for which in ("even", "odd")
    for kind in FILE_TYPES
    if (which, kind) != ("odd", "Q1_0")
]


@pytest.mark.parametrize(("which", "kind"), CASES)
def test_every_type_is_bit_equal_to_llama_cpps_quantizer(which, kind, request):
    model = request.getfixturevalue(which)
    imatrix = model.imatrix() if kind in SLOW or kind in {"Q2_K_S", "IQ3_XS", "IQ4_XS", "Q4_0"} else None
    choice = model.choose(kind, imatrix=imatrix, allow_non_ternary=True)
    (written,) = model.write(choice)
    ours = Reader(written.path)
    theirs = quantize_by_llama(model.folder / "f32-0.gguf", model.folder / "llama.gguf", kind, imatrix)
    assert_same_tensors(ours, theirs)
    kinds = {t.type for t in ours.tensors.values()}
    if which == "odd" and kind not in ("F32", "F16", "BF16"):
        assert choice.fallbacks
        assert "F16" in kinds
    elif which == "even":
        assert not choice.fallbacks


def test_a_type_without_a_fallback_is_refused_as_llama_cpp_does(odd):
    with pytest.raises(UnsupportedError, match="no tensor type fallback is defined for type q1_0") as raised:
        odd.choose("Q1_0")
    assert "rows do not fill the blocks" in raised.value.hint
    with pytest.raises(AssertionError):
        quantize_by_llama(odd.folder / "f32-0.gguf", odd.folder / "llama.gguf", "Q1_0")


def test_from_float16_equals_the_quantizer_on_the_f16_export(tmp_path):
    model = Model(tmp_path, hidden=256, ffn=256, dtype="F16")
    f16, q4 = model.write(model.choose("F16"), model.choose("Q4_K_M"))
    theirs = quantize_by_llama(f16.path, tmp_path / "llama.gguf", "Q4_K_M")
    assert_same_tensors(Reader(q4.path), theirs)


def test_overrides_and_pure_reach_the_bytes(even):
    choice = even.choose("Q4_K_M", overrides=((r"blk\.0\.ffn_down", "Q8_0"), ("attn_q", "NVFP4")), pure=True)
    (written,) = even.write(choice)
    mine = Reader(written.path).tensors
    assert {mine[f"blk.{n}.attn_q.weight"].type for n in (0, 1)} == {"NVFP4"}
    weights = even.ckpt.read("model.layers.0.mlp.down_proj.weight")
    expected = np.empty(256 * ggml.row_bytes("Q8_0", 512), np.uint8)
    ggml.encode("Q8_0", weights, expected)
    assert mine["blk.0.ffn_down.weight"].data == expected.tobytes()
    assert mine["blk.1.ffn_down.weight"].type == "Q4_K"


def test_several_types_in_one_read_equal_single_runs(even):
    kinds = ["Q8_0", "Q4_K_M", "F16", "BF16", "Q4_0"]
    choices = [even.choose(kind) for kind in kinds]
    together = even.write(*choices, name="together")
    for choice, one in zip(choices, together, strict=True):
        (alone,) = even.write(choice, name="alone")
        assert alone.path.read_bytes() == one.path.read_bytes()
        assert alone.tensors == one.tensors
        assert alone.sources == one.sources


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_bytes_do_not_depend_on_threads_slabs_or_blocks(even, threads, monkeypatch):
    choices = [even.choose(kind) for kind in ("Q4_K_M", "F32")]
    usual = [(f.sha256, f.tensors, f.sources) for f in even.write(*choices)]
    monkeypatch.setattr(stream, "SLAB_WEIGHTS", 5 * 256)
    monkeypatch.setattr(encode, "BLOCK_WEIGHTS", 2 * 256)
    cut = [(f.sha256, f.tensors, f.sources) for f in even.write(*choices, threads=threads)]
    assert cut == usual


def test_direct_io_writes_the_same_bytes(even, monkeypatch):
    (usual,) = even.write(even.choose("Q4_0"))
    expected = usual.path.read_bytes()
    monkeypatch.setattr(output, "DIRECT_BYTES", 0)
    for size in (4096, 12288, output.BUFFER_BYTES):
        monkeypatch.setattr(output, "BUFFER_BYTES", size)
        (direct,) = even.write(even.choose("Q4_0"), name="direct", threads=3)
        assert direct.path.read_bytes() == expected


@pytest.mark.parametrize("at", ["open", "pwrite"])
def test_where_direct_io_is_refused_the_page_cache_serves(even, monkeypatch, at):
    (usual,) = even.write(even.choose("Q4_0"))
    real_open, real_write, refused = output.os.open, output.os.pwrite, []

    def open_(path, flags, *mode, **more):
        if flags & output._O_DIRECT and at == "open":
            refused.append(path)
            raise OSError(22, "Invalid argument")
        return real_open(path, flags, *mode, **more)

    def pwrite(descriptor, view, offset):
        if at == "pwrite" and not refused:
            refused.append(descriptor)
            raise OSError(22, "Invalid argument")
        return real_write(descriptor, view, offset)

    monkeypatch.setattr(output, "DIRECT_BYTES", 0)
    monkeypatch.setattr(output.os, "open", open_)
    monkeypatch.setattr(output.os, "pwrite", pwrite)
    (other,) = even.write(even.choose("Q4_0"), name="refused")
    assert refused
    assert other.sha256 == usual.sha256 == hashlib.sha256(other.path.read_bytes()).hexdigest()


def test_hashes_are_those_of_the_bytes(even):
    (written,) = even.write(even.choose("Q4_K_M"))
    data = written.path.read_bytes()
    assert written.nbytes == len(data)
    assert written.sha256 == hashlib.sha256(data).hexdigest()
    for name, tensor in Reader(written.path).tensors.items():
        told = written.tensors[name]
        assert (told.type, told.nbytes) == (tensor.type, len(tensor.data))
        assert told.sha256 == hashlib.sha256(tensor.data).hexdigest()
    assert written.sources == {name: even.ckpt.hash(name) for name in even.ckpt.tensors}
    assert even.ckpt.fingerprint()  # of the same hashes


def test_without_hashes_the_same_bytes(even):
    hashed, bare = (even.write(even.choose("Q4_0"), name=str(h), hashes=h)[0] for h in (True, False))
    assert hashed.path.read_bytes() == bare.path.read_bytes()
    assert (bare.sha256, bare.sources) == ("", {})


def test_metadata_and_tensor_order_are_ours(even):
    (written,) = even.write(even.choose("Q8_0"))
    reader = Reader(written.path)
    assert list(reader.tensors) == [t.name for t in even.tensors]
    assert reader.metadata["general.file_type"] == 7
    assert reader.metadata["llama.block_count"] == 2


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


def packed_checkpoint(even, kind="Q4_K"):
    """Codes for other weights than those stored, so that encoding anew would show; on a plain and a permuted matrix."""
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"]
    blocks = {}
    for name in names:
        weights = even.ckpt.read(name) * np.float32(1.5)
        data = np.empty(len(weights) * ggml.row_bytes(kind, weights.shape[1]), np.uint8)
        ggml.encode(kind, weights, data)
        blocks[name] = (kind, data.tobytes())
    return names, blocks


def test_packed_blocks_are_copied_verbatim(tmp_path):
    model = Model(tmp_path, hidden=256, ffn=256, layers=1, dtype="BF16")
    (up, query), blocks = packed_checkpoint(model)
    write_sidecar(model.ckpt.root, Sidecar(packed=write_packed(model.ckpt.root, blocks)))
    model.ckpt = open_checkpoint(model.ckpt.root)
    four, eight = model.write(model.choose("Q4_K_S"), model.choose("Q8_0"))
    stored = Reader(four.path).tensors
    assert stored["blk.0.ffn_up.weight"].data == blocks[up][1]
    # row 2j of a head is its row j, row 2j + 1 its row j + half
    rows = np.frombuffer(blocks[query][1], np.uint8).reshape(4, 2, 32, -1)
    interleaved = np.stack([rows[:, 0], rows[:, 1]], axis=2)
    assert stored["blk.0.attn_q.weight"].data == interleaved.tobytes()
    weights = model.ckpt.read(up)
    plain = np.empty(256 * ggml.row_bytes("Q8_0", 256), np.uint8)
    ggml.encode("Q8_0", weights, plain)
    assert Reader(eight.path).tensors["blk.0.ffn_up.weight"].data == plain.tobytes()
    assert packed.notes(model.ckpt, model.tensors, model.choose("Q4_K_S")) == []
    assert packed.notes(model.ckpt, model.tensors, model.choose("Q8_0")) == [
        "blk.0.attn_q.weight: encoded anew as Q8_0, not copied from its Q4_K blocks",
        "blk.0.ffn_up.weight: encoded anew as Q8_0, not copied from its Q4_K blocks",
    ]


def test_packed_blocks_of_another_shape_are_refused(tmp_path):
    model = Model(tmp_path, hidden=256, ffn=256, layers=1, dtype="BF16")
    (up, _), blocks = packed_checkpoint(model)
    cut = {up: ("Q4_K", blocks[up][1][:-144])}
    write_sidecar(model.ckpt.root, Sidecar(packed=write_packed(model.ckpt.root, cut)))
    model.ckpt = open_checkpoint(model.ckpt.root)
    with pytest.raises(CheckpointError, match="bytes of packed blocks, expected 36864"):
        model.write(model.choose("Q4_K_S"))


def test_experts_take_their_own_importance(tmp_path):
    """A matrix of importances per expert, one after the other, as llama.cpp reads it."""

    class Stored:
        sidecar = None

        def __init__(self, weights):
            self.weights = weights
            self.tensors = {}

        def read_rows(self, name, start, stop):
            return self.weights[int(name)][start:stop]

        def check_unchanged(self):
            pass

    from efficli.checkpoint import TensorRef

    generator = np.random.default_rng(0)
    weights = generator.standard_normal((3, 8, 256)).astype(np.float32)
    importance = generator.exponential(1.0, (3, 256)).astype(np.float32)
    ckpt = Stored(weights)
    ckpt.tensors = {str(n): TensorRef(str(n), (8, 256), "F32", tmp_path, 0, 8 * 1024) for n in range(3)}
    tensor = OutTensor(name="e", shape=(3, 8, 256), sources=("0", "1", "2"), transform="stack")
    choice = TypeChoice(type="Q2_K", types={"e": "Q2_K"}, imatrix={"e": importance.reshape(-1)})
    write_files(ckpt, [tensor], [(tmp_path / "e.gguf", {}, choice)], hashes=False)
    expected = np.empty((3, 8 * 84), np.uint8)
    for n in range(3):
        ggml.encode("Q2_K", weights[n], expected[n], importance[n])
    assert Reader(tmp_path / "e.gguf").tensors["e"].data == expected.tobytes()


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
