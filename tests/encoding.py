"""A pico checkpoint with its parts at hand, and llama.cpp's quantizer to compare with."""

import ctypes

import numpy as np

from efficli.checkpoint import open_checkpoint
from efficli.export.gguf.layout import string
from efficli.export.gguf.model import layout
from efficli.export.gguf.types import TypeRequest, choose_types
from efficli.export.gguf.writer import write_files
from efficli.families import read_shape
from efficli.ops.ggml_types import FILE_TYPES
from efficli.ops.llama_log import llama_cpp as bindings
from tests.gguf_reader import Reader
from tests.pico import write_llama


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
    llama_cpp = bindings()  # with the one log listener, which is never freed: another would crash the next test
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
