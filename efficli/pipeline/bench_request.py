"""What `bench` was asked for, checked before anything runs: files, lengths, context, threads, cache types."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from efficli.bench.figures import FlashAttention, Settings, SpeedTest
from efficli.bench.gguf_engine import GgufFile
from efficli.bench.rounds import Effort
from efficli.bench.scenario import Scenario
from efficli.checkpoint.locate import EMBEDDED
from efficli.checkpoint.sidecar import IMATRIX
from efficli.errors import CheckpointError, UnsupportedError, UsageError, did_you_mean
from efficli.export.gguf.parse import GgufHeader, read_gguf
from efficli.ops.llama_model import available_threads

N_PROMPT, N_GEN, DEPTH = (128, 512), (128,), (0,)
"""Lengths that are measured by default, in tokens; shortened for a model with a shorter context."""

CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")
"""Types of the KV cache that llama.cpp's tools take."""

_UNQUANTIZED = ("f32", "f16", "bf16")
_FLASH = ("auto", "on", "off")
_EXPECTED = "give what `efficli export` wrote, or a .gguf file"
MOST_THREADS = 512
"""GGML_MAX_N_THREADS."""
MOST_TOKENS = 2**31 - 1
"""llama.cpp counts tokens in 32 bits: of a larger number it would take the rest."""
LEAST = 5
"""Repeats below which no interval says anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRequest:
    """The options of `bench` that say what to run; None is the default, which may be shortened to fit a model."""

    n_prompt: tuple[int, ...] | None
    n_gen: tuple[int, ...] | None
    depth: tuple[int, ...] | None
    threads: tuple[int, ...] | None
    ctx: int | None
    cache_type_k: str
    cache_type_v: str
    flash_attn: str
    effort: Effort
    scenarios: tuple[Scenario, ...]
    seed: int

    def check(self) -> None:
        """UsageError for what makes no sense for any model."""
        _numbers(self.threads, "--threads", 1)
        if self.threads and max(self.threads) > MOST_THREADS:
            raise UsageError(f"--threads {max(self.threads)}, expected at most {MOST_THREADS}, as ggml does")
        _numbers(self.n_prompt, "--n-prompt", 0)
        _numbers(self.n_gen, "--n-gen", 0)
        _numbers(self.depth, "--depth", 0)
        if self.ctx is not None and not 1 <= self.ctx <= MOST_TOKENS:
            raise UsageError(f"--ctx-size {self.ctx}, expected 1 to {MOST_TOKENS}")
        for option, type in (("--cache-type-k", self.cache_type_k), ("--cache-type-v", self.cache_type_v)):
            if type.lower() not in CACHE_TYPES:
                hint = did_you_mean(type, CACHE_TYPES) or f"one of {', '.join(CACHE_TYPES)}"
                raise UsageError(f"{option} {type!r} is no type of the KV cache", hint=hint)
        if self.flash_attn not in _FLASH:
            raise UsageError(f"--flash-attn {self.flash_attn!r}, expected one of {', '.join(_FLASH)}")
        if self.flash_attn == "off" and self.cache_type_v.lower() not in _UNQUANTIZED:
            raise UsageError(f"--cache-type-v {self.cache_type_v} needs flash attention", hint="--flash-attn on")
        if self.effort.least < LEAST:
            raise UsageError(
                f"--repetitions {self.effort.least}, expected {LEAST} or more",
                hint="fewer repeats give a number without knowing how far it is off",
            )
        if self.effort.most < self.effort.least:
            raise UsageError(
                f"--max-repetitions {self.effort.most} is less than --repetitions {self.effort.least}",
                hint=f"--max-repetitions {self.effort.least}",
            )
        if not self.effort.patience >= 0:  # NaN too
            raise UsageError(f"--patience {self.effort.patience:g}, expected 0 seconds or more")
        for name, count in Counter(scenario.name for scenario in self.scenarios).items():
            if count > 1:
                raise UsageError(f"--scenario: {count} scenarios are called {name}", hint="change `name` in the YAML")

    def tests(self, file: BenchFile, most: int = 0) -> tuple[SpeedTest, ...]:
        """The speed tests of a file; UsageError for one that its context cannot hold.

        Lengths that were not asked for are shortened to the context, and to one of `most` tokens.
        """
        room = self.ctx or min((length for length in (file.trained_ctx, most) if length), default=0)
        prompts = N_PROMPT if self.n_prompt is None else self.n_prompt
        gens = N_GEN if self.n_gen is None else self.n_gen
        depths = (DEPTH if self.depth is None else self.depth) if file.generates else (0,)
        tests: dict[SpeedTest, bool] = {}
        for threads in self.threads or (available_threads(),):
            for depth in depths:
                if room and depth >= room and None in (self.n_prompt, self.n_gen):
                    raise UsageError(
                        f"a depth of {depth} leaves no room in the context of {room}",
                        where=file.gguf.path.name,
                        hint=f"--ctx-size {depth + max(N_PROMPT)}",
                    )
                for n in prompts:
                    own = min(n, room - depth) if room and self.n_prompt is None else n
                    tests[SpeedTest(n_prompt=own, n_depth=depth, threads=threads)] = own > 0
                for n in gens if file.generates else ():
                    own = min(n, room - depth) if room and self.n_gen is None else n
                    tests[SpeedTest(n_gen=own, n_depth=depth, threads=threads)] = own > 0
        wanted = tuple(test for test, is_one in tests.items() if is_one)
        for test in wanted:
            self._check_room(test, room, file)
        return wanted

    def settings(self, file: BenchFile, tests: Sequence[SpeedTest]) -> Settings:
        """How the file is opened: as much context as the tests and scenarios need, unless it was given."""
        needs = max([test.positions for test in tests] + [64])
        for scenario in self.scenarios:
            wants = scenario.positions
            needs = max(needs, min(wants, file.trained_ctx) if file.trained_ctx else wants)
        flash: FlashAttention = "on" if self.flash_attn == "on" else "off" if self.flash_attn == "off" else "auto"
        return Settings(
            ctx=self.ctx or needs,
            threads=(self.threads or (available_threads(),))[0],
            cache_type_k=self.cache_type_k.lower(),
            cache_type_v=self.cache_type_v.lower(),
            flash_attn=flash,
            seed=self.seed,
        )

    def _check_room(self, test: SpeedTest, room: int, file: BenchFile) -> None:
        if not room or test.positions <= room:
            return
        what = f"a prompt of {test.n_prompt} tokens" if test.n_prompt else f"{test.n_gen} tokens to write"
        at = f" at a depth of {test.n_depth}" if test.n_depth else ""
        verb = "is" if test.n_prompt else "are"
        if self.ctx:
            raise UsageError(f"{what}{at} {verb} longer than the context of {room} (--ctx-size)")
        raise UsageError(
            f"{what}{at} {verb} longer than the context of {room} that the model was trained for",
            where=file.gguf.path.name,
            hint=f"--ctx-size {test.positions} measures it all the same",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchFile:
    """A model file whose header was read."""

    gguf: GgufFile
    header: GgufHeader
    trained_ctx: int
    """0 where the file does not say."""

    @property
    def generates(self) -> bool:
        """False for an embedding model."""
        return self.gguf.generates


def open_file(path: Path) -> BenchFile:
    """Read the header of a GGUF file; CheckpointError for what is none or is cut short, UnsupportedError for a part."""
    header = read_gguf(path)
    parts = header.metadata.get("split.count")
    if isinstance(parts, int) and parts > 1:
        hint = "llama-gguf-split --merge FIRST OUT makes one file of them"
        raise UnsupportedError(f"is one of {parts} parts of a model, expected a whole one", where=path.name, hint=hint)
    architecture = header.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise CheckpointError("names no architecture", where=path.name)
    if not header.tensors:
        raise CheckpointError("holds no tensors", where=path.name, hint="a vocabulary alone cannot be measured")
    length = header.metadata.get(f"{architecture}.context_length")
    generates = header.metadata.get(f"{architecture}.attention.causal") is not False
    return BenchFile(
        gguf=GgufFile(path=path.absolute(), generates=generates),
        header=header,
        trained_ctx=length if isinstance(length, int) and length > 0 else 0,
    )


def model_files(artifact: Path) -> list[Path]:
    """The model files that a word on the command line means: the file, or every one of the directory."""
    if artifact.is_dir():
        found = sorted(path for path in artifact.glob("*.gguf") if path.name != IMATRIX)
        found = [path for path in found if path.is_file()]  # of a pipe, opening would wait
        if not found:
            raise CheckpointError(
                "no .gguf file in it, expected an artifact",
                where=str(artifact),
                hint=_EXPECTED,
            )
        return found
    if not artifact.exists():
        hint = f"`efficli export {artifact} -o out` makes one" if str(artifact) in EMBEDDED else _EXPECTED
        raise CheckpointError("no such file or directory, expected an artifact", where=str(artifact), hint=hint)
    if not artifact.is_file():
        raise CheckpointError("not a regular file", where=str(artifact))
    return [artifact]


def _numbers(values: Sequence[int] | None, option: str, least: int) -> None:
    if values is not None and (not values or min(values) < least or max(values) > MOST_TOKENS):
        told, what = ",".join(map(str, values)) or "''", "numbers" if len(values or ()) > 1 else "a number"
        most = f" to {MOST_TOKENS}" if values and max(values) > MOST_TOKENS else ""
        raise UsageError(f"{option} {told}, expected {what} from {least}{most}")
