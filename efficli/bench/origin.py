"""The model that an artifact is compared with: the origin run by PyTorch in float32, or by llama.cpp from an F32 file.

Hugging Face transformers is the definition of what a checkpoint computes; code of the checkpoint itself is never run.
Only used in the child process of a measurement, as torch and transformers are heavy.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from efficli.errors import CheckpointError, UnsupportedError, UsageError
from efficli.network.loading import libraries, load

Float32 = NDArray[np.float32]


class LogitSource(Protocol):
    """Anything that predicts: `LlamaFile` and `TorchModel`."""

    @property
    def vocab_size(self) -> int:
        """Columns of the logits."""

    def logit_blocks(
        self, ids: Sequence[int], *, first: int = 0, rows: int | None = None
    ) -> Iterator[tuple[int, Float32]]:
        """Logits of positions first.. in blocks of up to `rows`: (position of the first row, (rows, vocab))."""


class TorchModel:
    """A causal language model in float32, by transformers."""

    def __init__(self, root: str | Path, *, threads: int) -> None:
        torch, transformers = libraries()
        torch.set_num_threads(threads)
        self._torch = torch
        self._model = load(transformers.AutoModelForCausalLM, Path(root))
        self._keeps = "logits_to_keep" in inspect.signature(self._model.forward).parameters
        self.root = Path(root)
        self.runtime = f"PyTorch {torch.__version__} float32, transformers {transformers.__version__}"

    @property
    def vocab_size(self) -> int:
        """Columns of the logits."""
        return int(self._model.get_output_embeddings().weight.shape[0])

    def logit_blocks(
        self, ids: Sequence[int], *, first: int = 0, rows: int | None = None
    ) -> Iterator[tuple[int, Float32]]:
        """Logits of positions first.. in blocks of up to `rows`: (position of the first row, (rows, vocab))."""
        torch, kept = self._torch, len(ids) - first
        with torch.inference_mode():
            # Half a chunk at once: the head's rows are cheap to hold beside a float32 model of such a vocabulary.
            options = {"logits_to_keep": kept} if self._keeps else {}
            logits = self._model(torch.tensor([ids]), use_cache=False, **options).logits[0, -kept:]
        array: Float32 = logits.float().numpy()
        step = rows or kept
        for start in range(0, kept, step):
            yield first + start, array[start : start + step]


class TorchWriter:
    """A causal language model with its tokenizer and cache, for writing completions (`ops.sampling.Writer`)."""

    def __init__(self, root: str | Path, *, threads: int) -> None:
        torch, transformers = libraries()
        torch.set_num_threads(threads)
        self._torch = torch
        self._model = load(transformers.AutoModelForCausalLM, Path(root))
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(
                root, trust_remote_code=False, local_files_only=True
            )
        except (OSError, ValueError) as error:
            raise CheckpointError("transformers could not load its tokenizer", where=str(root)) from error
        config = self._model.config
        lengths = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions"))
        self.ctx = next((int(length) for length in lengths if length), 1 << 30)
        ends = self._model.generation_config.eos_token_id
        self._ends = set(ends) if isinstance(ends, list) else {ends}
        self._cache: Any = None
        self._before: list[int] = []

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a prompt, with the begin token where the tokenizer adds one and without an end token."""
        ids = [int(i) for i in self._tokenizer(text)["input_ids"]]
        ids = ids[:-1] if len(ids) > 1 and ids[-1] in self._ends else ids
        self._before = ids[-1:]
        return ids

    def read(self, ids: Sequence[int], at: int) -> Float32:
        """Read tokens at positions at.. (0 begins a new text) and return the last one's logits: (vocab,)."""
        with self._torch.inference_mode():
            cache = self._cache if at else None
            out = self._model(self._torch.tensor([list(ids)]), past_key_values=cache, use_cache=True)
        self._cache = out.past_key_values
        last: Float32 = out.logits[0, -1].float().numpy()
        return last

    def spell(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without control tokens; an unfinished character at the end is left out."""
        # SentencePiece drops the space of the first token it decodes: the prompt's last one goes before
        return self._decode([*self._before, *tokens]).removeprefix(self._decode(self._before)).removesuffix("\ufffd")

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def ends(self, token: int) -> bool:
        """Whether this token ends a text."""
        return token in self._ends


class TorchEncoder:
    """A sentence embedding model in float32, by transformers, pooled as its `1_Pooling/config.json` says."""

    def __init__(self, root: str | Path, *, threads: int) -> None:
        torch, transformers = libraries()
        torch.set_num_threads(threads)
        self._torch = torch
        self.pooling = read_pooling(Path(root))
        self._model = load(transformers.AutoModel, Path(root))
        self.runtime = f"PyTorch {torch.__version__} float32, transformers {transformers.__version__}"

    def embed(self, ids: Sequence[int]) -> Float32:
        """The pooled vector of one text: ids (n,) -> (width,)."""
        with self._torch.inference_mode():
            hidden = self._model(input_ids=self._torch.tensor([ids])).last_hidden_state[0]
        pooled: Float32 = {"mean": hidden.mean(0), "cls": hidden[0], "lasttoken": hidden[-1]}[self.pooling].numpy()
        return pooled


def read_pooling(root: Path) -> str:
    """How sentence-transformers pools this model: "mean", "cls" or "lasttoken"; mean where nothing is said."""
    file = root / "1_Pooling" / "config.json"
    if not file.is_file():
        return "mean"
    try:
        config = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"is not JSON: {error}", where=str(file)) from error
    names = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "lasttoken"}
    asked = {names.get(key, key) for key, value in config.items() if key.startswith("pooling_mode_") and value is True}
    asked |= {config["pooling_mode"]} if isinstance(config.get("pooling_mode"), str) else set()
    if len(asked) != 1 or not asked <= set(names.values()):
        found = ", ".join(sorted(asked)) or "none"
        raise UnsupportedError(f"pooling {found}, expected one of mean, cls, lasttoken", where=str(file))
    return str(asked.pop())


def check_vocabularies(base: LogitSource, judged: LogitSource) -> str | None:
    """A note where the columns differ by padding rows only; UsageError where these cannot be the same vocabulary."""
    a, b = base.vocab_size, judged.vocab_size
    if a == b:
        return None
    if abs(a - b) > max(1024, a // 20):
        raise UsageError(f"the base has {a} tokens and the artifact {b}: not the same vocabulary")
    return f"the base has {a} rows of vocabulary and the file {b}: compared on the first {min(a, b)}"
