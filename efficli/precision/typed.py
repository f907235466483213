"""A network whose matrices have the values that the types of a file leave them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from efficli.network.model import Network
from efficli.ops import ggml
from efficli.precision.encoder import Encoder
from efficli.precision.view import FileTensor, Part

CACHE_BYTES = 1 << 30
"""Of encodings that are kept, so that going back to a type costs no encoding."""


class TypedNetwork:
    """A network with a type for each of its tensors; in the beginning all have the checkpoint's own values."""

    def __init__(self, network: Network, tensors: Sequence[FileTensor], encoder: Encoder) -> None:
        self._network, self._encoder = network, encoder
        self.tensors = {tensor.name: tensor for tensor in tensors}
        self.types: dict[str, str | None] = dict.fromkeys(self.tensors)
        """None: as in the checkpoint."""
        self._layers = len(network.layers())
        self._kept: dict[tuple[str, str], list[NDArray[np.uint8]]] = {}
        self._kept_bytes = 0

    def first_layer(self, name: str) -> int:
        """The first layer that a change of this tensor changes: -1 for embeddings, the number of layers for a head."""
        tensor = self.tensors[name]
        if tensor.layer is not None:
            return tensor.layer
        return self._layers if tensor.group == "output" else -1

    def reaches(self, name: str) -> bool:
        """Whether the network computes with this tensor, so that its types can be tried."""
        parts = self.tensors[name].parts
        return bool(parts) and all(part.name in self._network.matrices for part in parts)

    def use(self, name: str, kind: str | None) -> None:
        """Give a tensor a type, None its own values."""
        if self.types[name] == kind:
            return
        tensor = self.tensors[name]
        if kind is None:
            for source, index in {(part.name, part.index) for part in tensor.parts}:
                self._network.restore(source, index)
            for other in self._sharing(tensor):  # of a fused matrix the other part keeps its type
                kept, self.types[other] = self.types[other], None
                self.types[name] = None
                self.use(other, kept)
        else:
            blocks = self._encoded(tensor, kind)
            for part, data in zip(tensor.parts, blocks, strict=True):
                self._put(part, ggml.decode(kind, data, part.stop - part.start, tensor.columns))
        self.types[name] = kind

    def use_all(self, types: Mapping[str, str | None]) -> int:
        """Give all these tensors their types; the first layer that is changed by it."""
        changed = [name for name, kind in types.items() if self.types[name] != kind and self.reaches(name)]
        for name in changed:
            self.use(name, types[name])
        return min((self.first_layer(name) for name in changed), default=self._layers)

    def noise(self, name: str, relative: float, seed: int) -> float:
        """Add Gaussian noise to a tensor, `relative` to its root mean square; the noise's error as curves count it.

        `use(name, None)` takes it away again.
        """
        tensor, total = self.tensors[name], 0.0
        random = np.random.default_rng([seed, *name.encode()])
        for number, part in enumerate(tensor.parts):
            rows = self._own(part)
            scale = relative * float(np.sqrt(np.mean(np.square(rows, dtype=np.float64))))
            error = (scale * random.standard_normal(rows.shape)).astype(np.float32)
            total += self.error(tensor, number, error)
            self._put(part, rows + error)
        self.types[name] = "noise"
        return total

    def error(self, tensor: FileTensor, part: int, error: NDArray[np.float32]) -> float:
        """tr(E H Eᵀ) of an error (rows, columns), or with the diagonal of H where that is all there is."""
        gram = self._encoder.statistics.gram(tensor, part)
        if gram is not None:
            return float(np.einsum("rc,rc->", error @ gram, error, dtype=np.float64))
        weights, squares = self._encoder.statistics.imatrix(tensor, part), np.square(error, dtype=np.float64).sum(0)
        return float(squares.sum() if weights is None else squares @ weights)

    def _encoded(self, tensor: FileTensor, kind: str) -> list[NDArray[np.uint8]]:
        key = (tensor.name, kind)
        if key not in self._kept:
            blocks = [
                self._encoder.encode(tensor, number, kind, self._own(part)) for number, part in enumerate(tensor.parts)
            ]
            size = sum(data.nbytes for data in blocks)
            while self._kept and self._kept_bytes + size > CACHE_BYTES:
                oldest = next(iter(self._kept))
                self._kept_bytes -= sum(data.nbytes for data in self._kept.pop(oldest))
            self._kept[key] = blocks
            self._kept_bytes += size
        return self._kept[key]

    def _own(self, part: Part) -> NDArray[np.float32]:
        """The checkpoint's own rows."""
        return self._network.original(part.name, part.index)[part.start : part.stop]

    def _put(self, part: Part, rows: NDArray[np.float32]) -> None:
        whole = self._network.matrices[part.name].rows
        if (part.start, part.stop) != (0, whole):
            values = self._network.weight(part.name, part.index)
            values[part.start : part.stop] = rows
            rows = values
        self._network.replace(part.name, rows, part.index)

    def _sharing(self, tensor: FileTensor) -> list[str]:
        """Other tensors of the file that are parts of the same matrices."""
        sources = {(part.name, part.index) for part in tensor.parts}
        return [
            other.name
            for other in self.tensors.values()
            if other.name != tensor.name
            and self.types[other.name] is not None
            and any((part.name, part.index) in sources for part in other.parts)
        ]
