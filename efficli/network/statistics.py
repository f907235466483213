"""What the matrices of a network are given: sums of x² and of x xᵀ over their inputs, while it reads a text.

mean(x²) is what llama-imatrix computes on the same tokens; sum x xᵀ is the Hessian (but for a factor of 2) of the
squared error of a linear layer's output, as in OBQ and GPTQ (Frantar et al. 2022, arXiv:2210.17323, equation 1).
Streamed: one chunk at a time runs through the network, and nothing is kept but the sums.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from efficli.errors import CheckpointError, FitError
from efficli.network.model import Network
from efficli.network.places import Site
from efficli.ops.byte_size import binary_bytes
from efficli.progress import Progress, Silent

_PROBE_TOKENS = 4
_GRAM_BYTES = 4
_TOGETHER, _TOGETHER_BYTES = 8, 1 << 28

Unit = tuple[Site, int | None]
"""One accumulated sum x xᵀ, or stack of them: a site, and which expert of it (None: all)."""


@dataclass(frozen=True, slots=True)
class Statistic:
    """Sums over all inputs x that a matrix, or each matrix of a stack, was given. Matrices that are always given the
    same x share the arrays, which are read-only.
    """

    squares: NDArray[np.float64]
    """Sums of x², (matrices, columns); zeros where nothing was seen."""
    counts: NDArray[np.int64]
    """How many x, (matrices,); 0 for an expert that no token was sent to."""
    gram: NDArray[np.float32] | None = None
    """Sums of x xᵀ, (matrices, columns, columns), where they were asked for."""


def cut(ids: Sequence[int], length: int, *, bos: int | None = None) -> list[list[int]]:
    """Whole chunks of `length` tokens, the rest left out; with `bos` it replaces each first token, as llama-imatrix
    does where the model adds one. CheckpointError if no chunk is filled.
    """
    if len(ids) < length:
        raise CheckpointError(f"the calibration text has {len(ids)} tokens, expected at least {length}")
    pieces = (list(ids[at : at + length]) for at in range(0, len(ids) - length + 1, length))
    return [piece if bos is None else [bos, *piece[1:]] for piece in pieces]


def collect(
    network: Network,
    chunks: Sequence[Sequence[int]],
    *,
    hessians: Collection[str] = (),
    memory_bytes: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Statistic]:
    """The statistic of every watched matrix (those not in `network.unwatched`), with sum x xᵀ for names in `hessians`.

    FitError: all the sums x xᵀ together take more than `memory_bytes` (`in_passes` holds some at a time). KeyError: a
    name in `hessians` is not watched. CheckpointError: an input is not finite.
    """
    units = _units(network, chunks, hessians)
    needed = sum(_nbytes(unit) for unit in units)
    if memory_bytes is not None and needed > memory_bytes:
        raise FitError(
            f"sums of x xᵀ of {len(units)} inputs take {binary_bytes(needed)}, more than {binary_bytes(memory_bytes)}",
            where=network.checkpoint.name,
        )
    (found,) = in_passes(network, chunks, hessians=hessians, memory_bytes=needed, progress=progress)
    return found


def in_passes(
    network: Network,
    chunks: Sequence[Sequence[int]],
    *,
    hessians: Collection[str],
    memory_bytes: int,
    progress: Progress | None = None,
) -> Iterator[dict[str, Statistic]]:
    """As `collect`, in as many runs over the chunks as keep the sums x xᵀ of each run within `memory_bytes`.

    Each watched matrix is in one of the dictionaries: the first has all that are not in `hessians`, and the order is
    the network's. Drop one before asking for the next: that is what bounds memory. FitError: not even one fits.
    """
    leaders = _leaders(network, chunks)
    packs = _packs(_units(network, chunks, hessians, leaders), memory_bytes, network)
    watched = [name for name in network.matrices if name not in network.unwatched]
    progress = progress or Silent()
    progress.start("input statistics", len(packs) * sum(map(len, chunks)), "tokens")
    for number, pack in enumerate(packs):
        names = [
            name
            for name in watched
            if (_unit(network, name, leaders) in pack if name in hessians else not number)
        ]  # fmt: skip
        yield _run(network, chunks, names, pack, leaders, progress)
    progress.finish()


def side_by_side(chunks: Sequence[Sequence[int]], columns: int) -> Iterator[list[Sequence[int]]]:
    """Runs of chunks of one length, as many as have outputs of `columns` float32 for each token in 256 MiB."""
    together: list[Sequence[int]] = []
    for chunk in chunks:
        most = max(1, _TOGETHER_BYTES // (4 * columns * len(chunk)))
        if together and (len(together) >= min(most, _TOGETHER) or len(chunk) != len(together[0])):
            yield together
            together = []
        together.append(chunk)
    if together:
        yield together


def _run(
    network: Network,
    chunks: Sequence[Sequence[int]],
    names: Sequence[str],
    grams: Sequence[Unit],
    leaders: dict[Site, Site],
    progress: Progress,
) -> dict[str, Statistic]:
    """One run over the chunks for the matrices `names`, with the sums x xᵀ that `grams` lists."""
    sums = {site: Sums(site) for site in dict.fromkeys(_unit(network, name, leaders)[0] for name in names)}
    for site, index in grams:
        sums[site].want_gram(index)
    handles = [_watch(network, entry) for entry in sums.values()]
    try:
        for texts in side_by_side(chunks, network.vocab_size):
            network.run_all(texts)
            progress.advance(sum(map(len, texts)))
    finally:
        for handle in handles:
            handle.remove()
    results: dict[Unit, Statistic] = {}
    found = {}
    for name in names:
        unit = _unit(network, name, leaders)
        if unit not in results:
            results[unit] = sums[unit[0]].statistic(unit[1], name)
        found[name] = results[unit]
    return found


class Sums:
    """The sums of one site: of each of its matrices x² in float64, x xᵀ in float32 where wanted, and how many x."""

    def __init__(self, site: Site) -> None:
        import torch

        self.site = site
        self._torch = torch
        self._squares = torch.zeros(site.count, site.columns, dtype=torch.float64)
        self._counts = torch.zeros(site.count, dtype=torch.int64)
        self._grams: dict[int | None, Any] = {}

    def want_gram(self, index: int | None) -> None:
        """Sum x xᵀ too, of one expert or of all."""
        size = self.site.columns
        count = self.site.count if index is None else 1
        self._grams[index] = self._torch.zeros(count, size, size, dtype=self._torch.float32)

    def hear(self, args: tuple[Any, ...]) -> None:
        """A call of the site's module with these arguments."""
        x = args[0].reshape(-1, args[0].shape[-1])
        if self.site.kind == "rows":
            self._add(0, x)
            return
        chosen, module = args[1], self.site.module
        for expert in chosen.unique().tolist():
            if expert >= self.site.count:  # how transformers marks a slot that another device computes
                continue
            mine = x[(chosen == expert).any(-1)]
            if self.site.kind == "experts_down":
                gate, up = self._torch.nn.functional.linear(mine, module.gate_up_proj[expert]).chunk(2, dim=-1)
                mine = module.act_fn(gate) * up
            self._add(expert, mine)

    def _add(self, matrix: int, x: Any) -> None:
        """Rows x (n, columns) that a matrix is given."""
        self._squares[matrix] += x.double().square().sum(0)
        self._counts[matrix] += len(x)
        for gram in (self._grams.get(matrix), self._grams.get(None)):
            if gram is not None:
                gram[matrix if len(gram) > 1 else 0].addmm_(x.T, x)

    def statistic(self, index: int | None, name: str) -> Statistic:
        """The sums of one expert, or of all; CheckpointError where they are not finite."""
        one = slice(None) if index is None else slice(index, index + 1)
        squares, counts = self._squares[one].numpy(), self._counts[one].numpy()
        gram = self._grams[index].numpy() if index in self._grams else None
        if not np.isfinite(squares).all():
            raise CheckpointError(f"inputs of {name} are not finite on the calibration text")
        for values in (squares, counts, gram):
            if values is not None:
                values.flags.writeable = False
        return Statistic(squares, counts, gram)


def _watch(network: Network, sums: Sums) -> Any:
    """Let the sums hear every call of their module; a handle that is to be removed."""
    names = ("hidden_states", "top_k_index")
    is_head = network.is_head(sums.site)

    def hook(_module: Any, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        sums.hear(args or tuple(given[name] for name in names if name in given))
        # nobody reads these logits: of all that the head was given it multiplies the last row only
        return ((args[0][..., -1:, :], *args[1:]), given) if is_head else None

    return sums.site.module.register_forward_pre_hook(hook, with_kwargs=True)


def _unit(network: Network, name: str, leaders: dict[Site, Site]) -> Unit:
    """Where a matrix's sums are made."""
    site, index = network.site(name)
    return leaders.get(site, site), index


def _units(
    network: Network,
    chunks: Sequence[Sequence[int]],
    hessians: Collection[str],
    leaders: dict[Site, Site] | None = None,
) -> list[Unit]:
    """Every sum x xᵀ that is asked for, once, in the order of the network."""
    for name in hessians:
        network.site(name)
    leaders = leaders if leaders is not None else _leaders(network, chunks)
    return list(dict.fromkeys(_unit(network, name, leaders) for name in network.matrices if name in hessians))


def _nbytes(unit: Unit) -> int:
    """Bytes of one of them."""
    site, index = unit
    return (site.count if index is None else 1) * site.columns**2 * _GRAM_BYTES


def _packs(units: Sequence[Unit], memory_bytes: int, network: Network) -> list[list[Unit]]:
    """Units in their order, as many in a run as fit; one run at least."""
    packs: list[list[Unit]] = [[]]
    held = 0
    for unit in units:
        size = _nbytes(unit)
        if size > memory_bytes:
            raise FitError(
                f"the sum of x xᵀ of {unit[0].name} takes {binary_bytes(size)}, more than {binary_bytes(memory_bytes)}",
                where=network.checkpoint.name,
            )
        if held + size > memory_bytes:
            packs.append([])
            held = 0
        packs[-1].append(unit)
        held += size
    return packs


def _leaders(network: Network, chunks: Sequence[Sequence[int]]) -> dict[Site, Site]:
    """For each site that is given the same tensor as an earlier one (q, k and v; gate and up), that one.

    Found by running a few tokens and holding every input, so that no memory is used twice.
    """
    if not chunks:
        raise CheckpointError("the calibration text fills no chunk")
    first: dict[tuple[Any, ...], Site] = {}
    leaders: dict[Site, Site] = {}
    held: list[Any] = []

    def hook(site: Site) -> Callable[[Any, tuple[Any, ...]], None]:
        def note(_module: Any, args: tuple[Any, ...]) -> None:
            x = args[0]
            held.append(x)
            leader = first.setdefault((x.data_ptr(), tuple(x.shape), x.stride()), site)
            if leader is not site:
                leaders[site] = leader

        return note

    sites = dict.fromkeys(network.site(name)[0] for name in network.matrices if name not in network.unwatched)
    handles = [site.module.register_forward_pre_hook(hook(site)) for site in sites if site.kind == "rows"]
    try:
        network.run(chunks[0][:_PROBE_TOKENS])
    finally:
        for handle in handles:
            handle.remove()
    return leaders
