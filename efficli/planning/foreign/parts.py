"""The tensors of a planned file, collected in the order of the network."""

from __future__ import annotations

from gguf import MODEL_TENSOR, TENSOR_NAMES

from efficli.export.gguf.layout import OutTensor
from efficli.planning.foreign.reading import Sizes

_KEEP_F32 = frozenset(
    {
        MODEL_TENSOR.FFN_GATE_INP,
        MODEL_TENSOR.FFN_GATE_INP_SHEXP,
        MODEL_TENSOR.SSM_CONV1D,
        MODEL_TENSOR.SHORTCONV_CONV,
        MODEL_TENSOR.ALTUP_CORRECT_COEF,
        MODEL_TENSOR.ALTUP_PREDICT_COEF,
    }
)
"""Matrices that the converter always writes in F32 (conversion/base.py, prepare_tensors)."""
_GATED = {
    "": (MODEL_TENSOR.FFN_GATE, MODEL_TENSOR.FFN_UP, MODEL_TENSOR.FFN_DOWN),
    "expert": (MODEL_TENSOR.FFN_GATE_EXP, MODEL_TENSOR.FFN_UP_EXP, MODEL_TENSOR.FFN_DOWN_EXP),
    "shared": (MODEL_TENSOR.FFN_GATE_SHEXP, MODEL_TENSOR.FFN_UP_SHEXP, MODEL_TENSOR.FFN_DOWN_SHEXP),
}


class Parts:
    """Tensors with llama.cpp's names; `layer` is that of all that follows until it is changed."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.tensors: list[OutTensor] = []
        self.layer: int | None = None

    def add(self, kind: MODEL_TENSOR, *shape: int, ending: str = ".weight") -> str:
        """One tensor, `shape` in numpy's order; its name."""
        name = f"{TENSOR_NAMES[kind].format(bid=self.layer)}{ending}"
        keep = len(shape) == 1 or ending != ".weight" or name.endswith("_norm.weight") or kind in _KEEP_F32
        self.tensors.append(OutTensor(name=name, shape=shape, sources=(), keep_f32=keep))
        return name

    def embedding(self) -> None:
        """The embedding of tokens."""
        self.add(MODEL_TENSOR.TOKEN_EMBD, self.sizes.vocab, self.sizes.hidden)

    def end(self, norm: MODEL_TENSOR = MODEL_TENSOR.OUTPUT_NORM) -> None:
        """The last norm, and the output matrix if it is not the embedding."""
        self.layer = None
        self.add(norm, self.sizes.hidden)
        if not self.sizes.tied:
            self.add(MODEL_TENSOR.OUTPUT, self.sizes.vocab, self.sizes.hidden)

    def norms(self, second: MODEL_TENSOR = MODEL_TENSOR.FFN_NORM, *, ending: str = ".weight") -> None:
        """The norms before attention (or what stands for it) and before the feed-forward."""
        self.add(MODEL_TENSOR.ATTN_NORM, self.sizes.hidden)
        self.add(second, self.sizes.hidden, ending=ending)

    def attention(
        self, *, biases: bool = False, out_bias: bool = False, head_norms: bool = False, twice: int = 1
    ) -> None:
        """Queries, keys, values and output; `twice` = 2 where the query matrix also makes a gate."""
        sizes = self.sizes
        for kind, rows in (
            (MODEL_TENSOR.ATTN_Q, twice * sizes.q),
            (MODEL_TENSOR.ATTN_K, sizes.kv),
            (MODEL_TENSOR.ATTN_V, sizes.kv),
        ):
            self.add(kind, rows, sizes.hidden)
            if biases:
                self.add(kind, rows, ending=".bias")
        self.add(MODEL_TENSOR.ATTN_OUT, sizes.hidden, sizes.q)
        if out_bias:
            self.add(MODEL_TENSOR.ATTN_OUT, sizes.hidden, ending=".bias")
        if head_norms:
            self.add(MODEL_TENSOR.ATTN_Q_NORM, sizes.head_dim)
            self.add(MODEL_TENSOR.ATTN_K_NORM, sizes.head_dim)

    def feed_forward(self, width: int, which: str = "") -> None:
        """Gate, up and down of an ordinary feed-forward, or of the experts that every token takes (`shared`)."""
        gate, up, down = _GATED[which]
        self.add(gate, width, self.sizes.hidden)
        self.add(up, width, self.sizes.hidden)
        self.add(down, self.sizes.hidden, width)

    def experts(self, count: int, width: int, *, biases: bool = False) -> None:
        """The router and all experts, each matrix as one tensor."""
        hidden = self.sizes.hidden
        self.add(MODEL_TENSOR.FFN_GATE_INP, count, hidden)
        if biases:
            self.add(MODEL_TENSOR.FFN_GATE_INP, count, ending=".bias")
        gate, up, down = _GATED["expert"]
        for kind, rows, columns in ((gate, width, hidden), (up, width, hidden), (down, hidden, width)):
            self.add(kind, count, rows, columns)
            if biases:
                self.add(kind, count, rows, ending=".bias")
