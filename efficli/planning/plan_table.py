"""A plan as a person reads it: files against devices at a glance, what to take, memory, links, notes; 80 columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import Protocol

from efficli.planning.fit import Fit
from efficli.planning.model import PlannedFile
from efficli.planning.plan import PlanResult
from efficli.planning.uplink import BUDGET
from efficli.target import Range, Target

Table = tuple[str, Sequence[str], list[list[str]]]
"""Title, headings, rows."""

NAMES = 40
"""Letters of several names in a title."""
GAP = 3
"""Columns between two cells."""
FALLEN, MATRIX, TERNARY = "*", "+", "!"
"""After a type's name: some tensors have another type; it needs an importance matrix; it ruins ordinary weights."""
_SHORT = {"compute scratch": "scratch", "repacked weights": "repack"}
_UNKNOWN = "?"
_GIB, _MIB, _KIB = 1 << 30, 1 << 20, 1 << 10


class Screen(Protocol):
    """Where a plan is shown; `efficli.console.Terminal` is one."""

    @property
    def width(self) -> int:
        """Columns that it has."""

    def table(
        self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, is_data: bool = False
    ) -> None:
        """Title, headings, rows."""

    def prose(self, paragraphs: Iterable[str], indent: int = 2) -> None:
        """Sentences below a table."""

    def text(self, text: str) -> None:
        """Text as it is."""


def show(screen: Screen, result: PlanResult, *, verbose: bool) -> None:
    """All of it, no wider than the screen."""
    for table in file_tables(result, screen.width):
        screen.table(*table, is_data=True)
        screen.text("\n")
    for table in recommendation_tables(result):
        screen.table(*table, is_data=True)
        screen.text("\n")
    if told := list(recommendations(result)):
        screen.prose(told)
        screen.text("\n")
    for table in (*memory_tables(result), *uplink_tables(result)):
        screen.table(*table, is_data=True)
        screen.text("\n")
    screen.prose(notes(result, verbose=verbose))


def title(result: PlanResult) -> str:
    """The model in a line."""
    model = result.model
    tied = "tied embeddings" if model.tied else "output matrix of its own"
    return f"{model.name}: {model.gguf_arch}, {_count(model.num_weights)} weights, {tied}"


def file_tables(result: PlanResult, width: int) -> Iterator[Table]:
    """The types as rows; beside them what each takes, or what devices do with them, as many as fit the width."""
    base = [[_name(file), size(file.nbytes), f"{file.bits_per_weight:.2f}"] for file in result.files]
    heading = ["type", "size", "bits/w"]
    pairs = _pairs(result)
    if not pairs:
        heading.insert(1, "bytes")
        base = [[row[0], f"{file.nbytes:,}", *row[1:]] for row, file in zip(base, result.files, strict=True)]
        needs = [
            (f"@{short(ctx)}", [size(file.nbytes + _beside(result, ctx)) for file in result.files])
            for ctx in result.contexts
        ]
        yield from _side_by_side(f"{title(result)}\nand what it needs with a context", heading, base, needs, width)
        return
    if len(pairs) == 1:
        found = result.of(*pairs[0])
        cells = [[_verdict(one), _speed(one), _largest(one)] for one in found]
        heads = ["fits", "tokens/s", "max ctx"]
        name = f"{title(result)}\non {pairs[0][0].name} with a context of {pairs[0][1]}, predicted"
        yield name, [*heading, *heads], [a + b for a, b in zip(base, cells, strict=True)]
        return
    columns = [(_where(result, *pair), [_cell(one) for one in result.of(*pair)]) for pair in pairs]
    if len({target.name for target, _ in pairs}) == 1:
        columns.append(("max ctx", [_largest(one) for one in result.of(*pairs[0])]))
    shared = "" if len(result.contexts) > 1 else f" with a context of {result.contexts[0]}"
    what = f"{title(result)}\nverdict and tokens/s{shared}, predicted"
    yield from _side_by_side(what, heading, base, columns, width)


def _side_by_side(
    what: str, heading: list[str], base: list[list[str]], columns: list[tuple[str, list[str]]], width: int
) -> Iterator[Table]:
    """Columns (heading, cells) beside those of `base`, in as many tables as it takes."""
    taken = sum(max(map(len, column)) + GAP for column in zip(heading, *base, strict=True))
    while columns:
        count, used = 0, taken - GAP
        for head, cells in columns:
            used += GAP + max(map(len, [head, *cells]))
            if count and used > width:
                break
            count += 1
        part, columns = columns[:count], columns[count:]
        rows = [row + [cells[i] for _, cells in part] for i, row in enumerate(base)]
        yield what, [*heading, *(head for head, _ in part)], rows
        what = "further"


def recommendation_tables(result: PlanResult) -> Iterator[Table]:
    """Where there are several devices or contexts: the largest quantized type that fits each."""
    pairs = _pairs(result)
    if len(pairs) < 2:
        return
    rows = []
    for target, ctx in pairs:
        best, name = result.best(target, ctx), _where(result, target, ctx)
        usable = size(result.of(target, ctx)[0].usable_bytes.value)
        if best is None:
            rows.append([name, "-", "-", "-", usable])
        else:
            rows.append([name, best[0].type, _speed(best[1]), size(best[1].need_bytes), usable])
    yield "The largest quantized type that fits, predicted", ("", "take", "tokens/s", "needs", "usable"), rows


def recommendations(result: PlanResult) -> Iterator[str]:
    """For each device and context what to take, where no table says it, or what is in the way."""
    pairs = _pairs(result)
    for target in result.targets:
        if "gguf" not in target.runs:
            yield f"{target.name}: {result.of(target, result.contexts[0])[0].reasons[0]}"
    for target, ctx in pairs:
        where, found, best = _where(result, target, ctx), result.of(target, ctx), result.best(target, ctx)
        if best is None:
            yield f"{where}: {_in_the_way(result, found)}"
            continue
        file, one = best
        also = _unrepacked(result, found, file)
        if len(pairs) == 1:
            speed = f", {one.decode.text('tokens/s')}" if one.decode else ""
            yield f"{where}: take {file.type}, the largest that fits{speed}; {_of(one)}{f'; {also}' if also else ''}"
        elif also:
            yield f"{where}: {also}"


def _in_the_way(result: PlanResult, found: Sequence[Fit]) -> str:
    """Why nothing fits, and what comes nearest."""
    chosen = [one for file, one in zip(result.files, found, strict=True) if result.is_choice(file)] or list(found)
    tight = next((one for one in chosen if one.verdict == "TIGHT"), None)
    if tight is not None:
        why = tight.reasons[0] if tight.reasons else f"limited by the {tight.limited_by}"
        return f"nothing fits safely; {tight.type} is tight, {_of(tight)}; {why}"
    one = min(chosen, key=lambda fit: fit.need_bytes - fit.repacked_bytes)
    return f"nothing fits; {one.reasons[0] if one.limited_by in ('runtime', 'type') else f'{one.type} {_of(one)}'}"


def _unrepacked(result: PlanResult, found: Sequence[Fit], best: PlannedFile) -> str:
    """A larger type that fits once no weights are repacked."""
    for file, one in zip(result.files, found, strict=True):
        if file.nbytes > best.nbytes and one.no_repack and result.is_choice(file):
            return f"{file.type} fits with --no-repack"
    return ""


def _of(one: Fit) -> str:
    """ "needs 4.2 of 7.2 GiB"."""
    need, usable = float(one.need_bytes), one.usable_bytes.value
    if one.verdict == "NO":
        need, usable = need - one.repacked_bytes, one.usable_bytes.high
    return f"needs {size(need)} of {size(usable)}"


def memory_tables(result: PlanResult) -> Iterator[Table]:
    """What of the memory is what: of the recommended type where devices are named, else of any."""
    pairs = _pairs(result)
    if len(pairs) == 1:
        one = _shown(result, *pairs[0])
        sizes = one.page_cache_bytes, one.kv_bytes, one.scratch_bytes.value, one.repacked_bytes, one.resident_bytes
        heads = ("", "page cache", "KV cache", "scratch", "repack", "resident", "usable")
        yield "Memory", heads, [[one.type, *map(size, sizes), size(one.usable_bytes.value)]]
        return
    rows = [[str(room.ctx), size(room.cache.nbytes), size(room.scratch.total.value)] for room in result.rooms]
    yield "Memory beside the weights, with a context of", ("", "KV cache", "scratch"), rows
    if pairs:
        rows = []
        for target, ctx in pairs:
            one = _shown(result, target, ctx)
            parts = one.page_cache_bytes, one.repacked_bytes, one.resident_bytes
            rows.append([_where(result, target, ctx), one.type, *map(size, parts)])
        yield "Memory of each", ("", "type", "page cache", "repack", "resident"), rows


def _shown(result: PlanResult, target: Target, ctx: int) -> Fit:
    """The recommended file, or the smallest."""
    best = result.best(target, ctx)
    return best[1] if best else result.of(target, ctx)[-1]


def uplink_tables(result: PlanResult) -> Iterator[Table]:
    """Passes and days for each type, a table for each link."""
    for link in result.links:
        one = link.uplink
        rows = []
        for file in result.files:
            found = one.transfer(file.nbytes)
            budget = "yes" if found.in_budget else "no"
            rows.append([_name(file), size(file.nbytes), f"{found.passes:,}", _days(found.days), budget])
        names = ", ".join(link.targets)
        to = f" to {names if len(names) <= NAMES else f'{len(link.targets)} devices'}" if link.targets else ""
        name = (
            f"Uplink{to}{f', {link.about}' if link.about else ''}\n"
            f"{_rate(one.bits_per_s)}, {one.passes_per_day:g} passes a day of {one.pass_s / 60:g} min, "
            f"{100 * one.efficiency:g} % payload: {size(one.bytes_per_pass)} a pass"
        )
        yield name, ("type", "size", "passes", "days", f"in {BUDGET} passes"), rows


def notes(result: PlanResult, *, verbose: bool) -> Iterator[str]:
    """What marks mean, what the figures rest on, and what the model cannot have."""
    yield from _marks(result)
    model = result.model
    if model.refused:
        for why in dict.fromkeys(model.refused.values()):
            yield f"not possible: {', '.join(name for name, said in model.refused.items() if said == why)}: {why}"
    if not model.exportable:
        yield f"planned only, `efficli export` does not write it: {model.why_not}"
    source = "the weights' headers" if model.basis == "headers" else "config.json: the weights are not here"
    cache = "/".join(dict.fromkeys(result.cache_types))
    exact = "exact but for the vocabulary" if model.unread_nbytes else "exact"
    yield f"sizes are {exact}, from {source}; the KV cache is {cache}; context of at most {model.max_positions} tokens"
    if not result.targets:
        yield "needs: file + KV cache + scratch; --target pi5-8gb says whether that fits, and how fast"
    else:
        yield from _basis(result)
    yield from result.notes
    yield from model.notes
    if verbose:
        yield from _reasons(result)


def _marks(result: PlanResult) -> Iterator[str]:
    fallen: dict[str, list[str]] = {}
    for file in result.files:
        if file.fallbacks:
            kinds = Counter((one.wanted, one.got) for one in file.fallbacks)
            told = ", ".join(f"{count} {got} for {wanted}" for (wanted, got), count in sorted(kinds.items()))
            fallen.setdefault(told, []).append(file.type)
    if fallen:
        each = "; ".join(f"{', '.join(names)}: {told}" for told, names in fallen.items())
        yield f"{FALLEN} some tensors' rows do not fill the blocks of their type, and have a larger one. {each}"
    if names := [file.type for file in result.files if file.needs_imatrix]:
        yield f"{MATRIX} needs an importance matrix (export --imatrix auto): {', '.join(names)}"
    if names := [file.type for file in result.files if file.ternary]:
        yield f"{TERNARY} for weights of two or three values; ruins others, and export refuses: {', '.join(names)}"


def _basis(result: PlanResult) -> Iterator[str]:
    """What the verdicts and speeds mean."""
    yield (
        "FIT: file + KV cache + scratch + repacked weights within the usable memory less 10 %; TIGHT: only just, or "
        "only with --no-repack; NO: not. The word after it is what it is limited by"
    )
    yield (
        "page cache: of the file, can be dropped and read again; resident: must be there; repack: weights that "
        "llama.cpp copies in another order. tokens/s: with half of the context filled"
    )
    for target in (one for one in result.targets if "gguf" in one.runs):
        found = [one for one in result.fits if one.target == target.name]
        known = list(dict.fromkeys(str(one.confidence) for one in found if one.confidence))
        runtime = target.decode[0].runtime if target.decode else None
        usable = target.ram.usable_mib
        parts = [f"memory {_usable(found[0].usable_bytes)} ({usable.confidence})"]
        if known:
            parts.append(f"speed of {runtime} ({' or '.join(known)})")
        else:
            parts.append("speed not known")
        first = next((one.ttft_ms for one in found if one.ttft_ms), None)
        if first is not None:
            parts.append(f"first token of a prompt of {found[0].prompt_tokens} after {_time(first)}")
        yield f"{target.name}: {'; '.join(parts)}"


def _reasons(result: PlanResult) -> Iterator[str]:
    """Where figures are from, each once a device."""
    for target in result.targets:
        said = [words for one in result.fits if one.target == target.name for words in one.sentences]
        yield from (f"{target.name}: {words}" for words in dict.fromkeys(said))
        yield f"{target.name}: memory from {target.ram.usable_mib.source}"


# ---- cells


def _name(file: PlannedFile) -> str:
    marks = (FALLEN, bool(file.fallbacks)), (MATRIX, file.needs_imatrix), (TERNARY, file.ternary)
    return file.type + "".join(mark for mark, there in marks if there)


def _verdict(one: Fit) -> str:
    return one.verdict if one.verdict == "FIT" else f"{one.verdict} {_SHORT.get(one.limited_by, one.limited_by)}"


def _cell(one: Fit) -> str:
    """Verdict and range of the speed, or what is in the way."""
    if one.verdict == "NO":
        return _verdict(one)
    return f"{one.verdict} {_ends(one.decode)}"


def _speed(one: Fit) -> str:
    if one.decode is None or one.verdict == "NO":
        return "-" if one.verdict == "NO" else _UNKNOWN
    return f"{_digits(one.decode.value)} ({_ends(one.decode)})"


def _ends(found: Range | None) -> str:
    return _UNKNOWN if found is None else f"{_digits(found.low)}-{_digits(found.high)}"


def _digits(value: float) -> str:
    return Range(value, value, value).text().replace(",", "")


def _largest(one: Fit) -> str:
    return str(one.largest_ctx) if one.largest_ctx else "-"


def _pairs(result: PlanResult) -> list[tuple[Target, int]]:
    """Devices that load such files at all, with each context."""
    return list(product((target for target in result.targets if "gguf" in target.runs), result.contexts))


def _where(result: PlanResult, target: Target, ctx: int) -> str:
    return f"{target.name} @{short(ctx)}" if len(result.contexts) > 1 else target.name


def short(ctx: int) -> str:
    """ "8k" for 8192."""
    return str(ctx) if ctx % 1024 or not ctx else f"{ctx // 1024}k"


def _time(found: Range) -> str:
    """Milliseconds, or from ten seconds on seconds."""
    if found.value < 10_000:
        return found.text("ms")
    return Range(found.value / 1000, found.low / 1000, found.high / 1000).text("s")


def _beside(result: PlanResult, ctx: int) -> int:
    room = next(room for room in result.rooms if room.ctx == ctx)
    return room.cache.nbytes + round(room.scratch.total.value)


def _usable(found: Range) -> str:
    return f"{size(found.low)} to {size(found.high)}" if found.low < found.high else size(found.value)


def size(nbytes: float) -> str:
    """Three digits: "4.58 GiB", "137 MiB"."""
    unit, name = (_GIB, "GiB") if nbytes >= 999.5 * _MIB else (_MIB, "MiB") if nbytes >= 999.5 * _KIB else (_KIB, "KiB")
    value = nbytes / unit
    if not nbytes:
        return "0"
    return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f} {name}"


def _count(number: int) -> str:
    for unit, name in ((1e9, "billion"), (1e6, "million")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:,}"


def _days(days: float) -> str:
    return f"{days:.1f}" if days < 99.95 else f"{days:,.0f}"


def _rate(bits: float) -> str:
    return f"{bits / 1e6:g} Mbit/s" if bits >= 1e6 else f"{bits / 1e3:g} kbit/s"
