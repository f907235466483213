"""A checkpoint in PyTorch, float32, whose matrices can be replaced and whose inputs can be watched."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from efficli.checkpoint import Checkpoint, open_checkpoint
from efficli.checkpoint.reader import to_float32
from efficli.errors import UnsupportedError
from efficli.families import family_of
from efficli.network.loading import libraries, load
from efficli.network.places import Place, Site, find_places
from efficli.surgery import Matrix, matrices

Float32 = NDArray[np.float32]


class Network:
    """The network of a checkpoint, float32, in evaluation mode; matrices have the names of the checkpoint's tensors.

    Of a tied model the embedding table is the head too: its matrix is both, and its input the head's.
    UnsupportedError: no known family. CheckpointError: transformers cannot load it. MissingExtra: no PyTorch.
    """

    def __init__(self, checkpoint: Checkpoint | str, *, threads: int | None = None) -> None:
        ckpt = open_checkpoint(checkpoint) if isinstance(checkpoint, str) else checkpoint
        torch, transformers = libraries()
        if threads:
            torch.set_num_threads(threads)
        family, _ = family_of(ckpt.config)
        found = matrices(ckpt)
        self.checkpoint = ckpt
        self.causal = family.causal
        self.runtime = f"PyTorch {torch.__version__} float32, transformers {transformers.__version__}"
        self._torch = torch
        loader = transformers.AutoModelForCausalLM if family.causal else transformers.AutoModel
        self._model = load(loader, ckpt.root).requires_grad_(False)
        self._keeps = "logits_to_keep" in inspect.signature(self._model.forward).parameters
        self._places = find_places(self._model, found, family)
        self.matrices: Mapping[str, Matrix] = MappingProxyType(
            {name: matrix for name, matrix in found.items() if self._places[name].views}
        )
        """What it computes with, in the order of the network: what can be read and replaced."""
        self.unwatched: Mapping[str, str] = MappingProxyType(
            {name: place.reason for name, place in self._places.items() if place.site is None}
        )
        """Matrices of the checkpoint that nothing is multiplied with here, or that are not here at all, and why."""

    @property
    def vocab_size(self) -> int:
        """Columns of the logits; of an encoder, rows of its table."""
        table = self._model.get_output_embeddings() if self.causal else self._model.get_input_embeddings()
        return int(table.weight.shape[0])

    def weight(self, name: str, index: int = 0) -> Float32:
        """A copy of the matrix as the network has it now, (out, in); `index`: which of a stack."""
        values: Float32 = self._view(name, index).detach().numpy().copy()
        return values

    def replace(self, name: str, values: NDArray[np.floating], index: int = 0) -> None:
        """Compute with other values (out, in) from now on; of a tied model both the table and the head change."""
        view = self._view(name, index)
        if values.shape != tuple(view.shape):
            raise ValueError(f"{name}: {values.shape} for {tuple(view.shape)}")
        with self._torch.no_grad():
            view.copy_(self._torch.from_numpy(np.ascontiguousarray(values, np.float32)))

    def restore(self, name: str, index: int | None = None) -> None:
        """Compute with the checkpoint's values again; `index`: of a stack this matrix only."""
        for i in range(self.matrices[name].count) if index is None else (index,):
            self.replace(name, self.original(name, i), i)

    def original(self, name: str, index: int = 0) -> Float32:
        """The checkpoint's own values of a matrix, (out, in), whatever the network has now."""
        matrix, ckpt = self.matrices[name], self.checkpoint
        if matrix.stacked:
            values = to_float32(ckpt.read_rows(name, index, index + 1)[0], ckpt.tensors[name].dtype)
        else:
            values = ckpt.read(name)
        return values.T if matrix.transposed else values

    def forward(self, ids: Sequence[int], *, first: int = 0) -> Float32:
        """Logits of positions first.. of one text: ids (n,) -> (n - first, vocabulary).

        An encoder has no logits: its last hidden states, (n - first, width).
        """
        values: Float32 = self.forward_all([ids], first=first)[0].numpy()
        return values

    def logit_blocks(
        self, ids: Sequence[int], *, first: int = 0, rows: int | None = None
    ) -> Iterator[tuple[int, Float32]]:
        """Logits of positions first.. in blocks of up to `rows`: (position of the first row, (rows, vocabulary))."""
        if not self.causal:
            raise UnsupportedError("an encoder has no logits", where=self.checkpoint.name)
        logits = self.forward(ids, first=first)
        for start in range(0, len(logits), rows or len(logits)):
            yield first + start, logits[start : start + (rows or len(logits))]

    def forward_all(self, texts: Sequence[Sequence[int]], *, first: int = 0) -> Any:
        """As `forward`, for texts of one length side by side: a tensor (texts, n - first, vocabulary or width)."""
        torch, kept = self._torch, len(texts[0]) - first
        with torch.inference_mode():
            options = {"logits_to_keep": kept} if self._keeps else {}
            out = self._model(torch.tensor([list(ids) for ids in texts]), **self._no_cache(), **options)
        return (out.logits if self.causal else out.last_hidden_state)[:, -kept:].float()

    def run(self, ids: Sequence[int]) -> None:
        """Compute for those who watch; no logits are kept."""
        self.run_all([ids])

    def run_all(self, texts: Sequence[Sequence[int]]) -> None:
        """`run` for texts of one length, side by side."""
        with self._torch.inference_mode():
            self._model(self._torch.tensor([list(ids) for ids in texts]), **self._no_cache())

    def site(self, name: str) -> tuple[Site, int | None]:
        """Where the input of a matrix is seen, and which of the site's experts it is; KeyError if nowhere."""
        place: Place = self._places[name]
        if place.site is None:
            raise KeyError(name)
        return place.site, place.index

    def is_head(self, site: Site) -> bool:
        """Whether it is the last matrix: what comes after it nobody watches."""
        return self.causal and site.module is self._model.get_output_embeddings()

    def layers(self) -> Any:
        """The list of its layers (a ModuleList), in order: those that the matrices of layers belong to."""
        count = max((matrix.layer for matrix in self.matrices.values() if matrix.layer is not None), default=-1) + 1
        table = self._model.get_input_embeddings()
        lists = [m for m in self._model.modules() if isinstance(m, self._torch.nn.ModuleList) and len(m) == count]
        own = [m for m in self._model.modules() if any(child is table for child in m.children())]
        inside = [m for m in lists if any(m is found for owner in own for found in owner.modules())]
        if not (inside or lists):
            raise UnsupportedError(f"the network has no list of {count} layers", where=self.checkpoint.name)
        return (inside or lists)[0]

    def _no_cache(self) -> dict[str, bool]:
        return {"use_cache": False} if self.causal else {}

    def _view(self, name: str, index: int) -> Any:
        if name not in self.matrices:
            raise KeyError(f"{name}: {self.unwatched.get(name, 'no matrix of the checkpoint')}")
        return self._places[name].views[index]
