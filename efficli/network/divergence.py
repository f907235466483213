"""How far a network is from what it was, while its matrices are replaced: mean KL divergence on a few chunks of tokens.

What does not change is not computed again: the layers before the first replaced matrix are skipped, and give what they
gave in the beginning. Of an encoder, which predicts nothing, the divergence is 1 - cosine of its last hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from efficli.errors import CheckpointError
from efficli.network.model import Network
from efficli.network.statistics import side_by_side

CONTEXT = 0.25
"""Share of a chunk that is context only; the positions after it are scored."""
BASE_BYTES = 1 << 30
"""Of the log-probabilities that are kept of the beginning; fewer chunks are taken where they would need more."""


class Divergence:
    """The divergence of a network from its state when this was made, on `chunks` of token ids.

    CheckpointError: the network computes NaN or infinite values.
    """

    def __init__(self, network: Network, chunks: Sequence[Sequence[int]]) -> None:
        import torch

        self._torch, self._network = torch, network
        self._layers = network.layers()
        size = (1 - CONTEXT) * len(chunks[0]) * 4 * network.vocab_size if network.causal else 1
        self.chunks = list(side_by_side(chunks[: max(1, int(BASE_BYTES / size))], network.vocab_size))
        """Runs of them, which are computed side by side."""
        self._outputs: list[list[Any]] = []
        """What each layer gave, by run."""
        self._base = self._held()

    @property
    def positions(self) -> int:
        """How many are scored."""
        return sum(base.shape[0] * base.shape[1] for base in self._base)

    def hold(self) -> float:
        """Take the network as it is now for what `measure` may skip; the mean divergence of this state."""
        with self._torch.inference_mode():
            found = [self._means(base, held) for base, held in zip(self._base, self._held(), strict=True)]
        return float(np.concatenate(found).mean())

    def measure(self, first: int = -1) -> NDArray[np.float64]:
        """Mean divergence of each chunk, nats, where no matrix before layer `first` was replaced since the beginning,
        or since `hold`.

        -1: embeddings may have been; the number of layers: nothing but the head was.
        """
        found = []
        with self._torch.inference_mode():
            for number, chunk in enumerate(self.chunks):
                with self._skipped(first, number):
                    found.append(self._means(self._base[number], self._scores(chunk)))
        means = np.concatenate(found)
        if not np.isfinite(means).all():
            raise CheckpointError("the network computes NaN or infinite values", where=self._network.checkpoint.name)
        return means

    def mean(self, first: int = -1) -> float:
        """`measure`, averaged over the chunks."""
        return float(self.measure(first).mean())

    def _held(self) -> list[Any]:
        """The scores of every chunk; what the layers gave is kept."""
        self._outputs, scores = [], []
        with self._torch.inference_mode():
            for chunk in self.chunks:
                with self._recorded():
                    scores.append(self._scores(chunk))
        return scores

    def _scores(self, chunks: Sequence[Sequence[int]]) -> Any:
        """Log-probabilities of the scored positions (chunks, n, vocabulary), or hidden states of an encoder."""
        values = self._network.forward_all(chunks, first=int(CONTEXT * len(chunks[0])))
        return self._torch.log_softmax(values, -1) if self._network.causal else values

    def _means(self, base: Any, found: Any) -> NDArray[np.float64]:
        """The mean distance of each chunk."""
        means: NDArray[np.float64] = self._distance(base, found).mean(1).double().numpy()
        return means

    def _distance(self, base: Any, found: Any) -> Any:
        if self._network.causal:
            return (base.exp() * (base - found)).sum(-1)
        return 1 - self._torch.nn.functional.cosine_similarity(base, found, dim=-1)

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        """Keep what every layer gives."""
        kept: list[Any] = [None] * len(self._layers)

        def keeper(number: int) -> Any:
            def keep(_module: Any, _inputs: Any, output: Any) -> None:
                kept[number] = output

            return keep

        hooks = [layer.register_forward_hook(keeper(number)) for number, layer in enumerate(self._layers)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self._outputs.append(kept)

    @contextmanager
    def _skipped(self, first: int, chunk: int) -> Iterator[None]:
        """Do not compute the layers before `first`: the last of them gives what it gave in the beginning."""
        replaced = list(self._layers[: max(0, first)])
        try:
            for number in range(len(replaced)):
                self._layers[number] = self._stand_in(replaced[number], self._outputs[chunk][number])
            yield
        finally:
            for number, layer in enumerate(replaced):
                self._layers[number] = layer

    def _stand_in(self, layer: Any, output: Any) -> Any:
        """A module that gives `output`, and whose attributes are those of `layer` for code that looks at them."""
        torch = self._torch

        class StandIn(torch.nn.Module):  # type: ignore[misc, name-defined]
            def __getattr__(self, name: str) -> Any:
                return getattr(layer, name)

            forward = staticmethod(lambda *_inputs, **_options: output)

        return StandIn()
