"""A recipe: what to do to which model, as strict YAML; a command line is a recipe with one step, and is saved as one.

Unknown keys are errors with file:line and a suggestion; only what differs from the defaults is written. Paths are
relative to the directory that the command runs in, as on a command line.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError, model_serializer, model_validator

from efficli import catalog, strict_schema
from efficli.errors import UsageError
from efficli.schema_types import Bytes, Words, or_list, words
from efficli.strict_schema import Inner, Part, Refused
from efficli.strict_yaml import Document, is_plain


def _numbers(value: Any) -> Any:
    """One number where a list of numbers is meant."""
    return (value,) if isinstance(value, int) and not isinstance(value, bool) else _listed(value)


def _listed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _one_or_more(value: Any) -> Any:
    """One mapping where a list of them is meant."""
    return (value,) if isinstance(value, dict) else _listed(value)


def _unless_false(value: Any) -> Any:
    """Nothing, where false is said."""
    return None if value is False else value


def _no_truth(value: Any) -> Any:
    """`true` equals 1 in Python, and is no version."""
    return str(value).lower() if isinstance(value, bool) else value


_Length = Annotated[int, Field(ge=0, le=2**31 - 1)]
_Threads = Annotated[int, Field(ge=1, le=512)]
Types = Annotated[tuple[str, ...], Field(min_length=1), or_list(str, words)]
Lengths = Annotated[tuple[_Length, ...], Field(min_length=1), or_list(_Length, _numbers)]
Counts = Annotated[tuple[_Threads, ...], Field(min_length=1), or_list(_Threads, _numbers)]


class Pass(Part):
    """A step that changes weights: `method` and, beside it in the file, the method's own keys."""

    method: str
    """Name of a method, as lowrank.svd."""
    config: SerializeAsAny[Part]
    """The method's own keys."""

    @model_validator(mode="before")
    @classmethod
    def _of_flat(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise Refused(f"{value!r}, expected a method and its keys", f"- method: {value}", at=("method",))
        if not isinstance(value, dict) or isinstance(value.get("config"), Part):
            return value
        own = {key: item for key, item in value.items() if key != "method"}
        word = value.get("method")
        if not isinstance(word, str):
            found = "key 'method' is missing" if word is None else f"method: {word!r}, expected a name"
            raise Refused(found, f"one of {', '.join(catalog.method_names())}", at=("method",))
        try:
            method = catalog.load_method(word)
        except UsageError as error:
            raise Refused(error.message, error.hint, at=("method",)) from None
        try:
            return {"method": method.name, "config": method.config.model_validate(own)}
        except ValidationError as error:
            raise Inner(method.config, error) from None

    @model_serializer
    def _flat(self) -> dict[str, Any]:
        return {"method": self.method, **self.config.model_dump(mode="json")}


class Calibration(Part):
    """The text that importance matrices and methods look at the model with."""

    text: str | None = None
    """Text file; without one the calibration slices that come with efficli."""
    ctx_size: Annotated[int, Field(ge=2)] = 512
    """Tokens of a window."""
    max_tokens: Annotated[int, Field(ge=512)] = 131_072
    """Tokens at most."""


class Export(Part):
    """Which file to write: keys are the options of `efficli export` with `_` for `-`."""

    format: Literal["gguf"] = "gguf"
    """File format."""
    type: Types = ("Q4_K_M",)
    """One type or several, which are then written in one read: Q4_K_M, Q8_0, F16. MIXED: the types that a pass
    allocated, and the default where one did."""
    imatrix: str | None = None
    """Importance matrix: a file, or auto."""
    tensor_type: Words = ()
    """REGEX=TYPE for tensors whose name matches; the first that matches counts."""
    output_tensor_type: str | None = None
    """Type of output.weight."""
    token_embedding_type: str | None = None
    """Type of token_embd.weight."""
    pure: bool = False
    """One type for all tensors, without the mixture that the type's name stands for."""
    pre_tokenizer: str | None = None
    """llama.cpp's name of the pre-tokenizer, where it cannot be recognised."""
    allow_non_ternary: bool = False
    """Write a ternary type from weights that are not ternary."""


class Certificate(Part):
    """What the artifact is compared with, and on which text."""

    enabled: bool = True
    """Measure at all."""
    base: str | None = None
    """Model to compare with instead of the origin."""
    text: str | None = None
    """Text file; without one the evaluation slice that comes with efficli."""
    ctx_size: Annotated[int, Field(ge=8)] = 512
    """Tokens of a window."""


class Bench(Part):
    """What is measured of the files that were written; keys are the options of `efficli bench`."""

    n_prompt: Lengths | None = None
    """Prompt lengths, one or a list."""
    n_gen: Lengths | None = None
    """Tokens to write."""
    depth: Lengths | None = None
    """Tokens that come before them."""
    threads: Counts | None = None
    """Threads; without it all cores."""
    repetitions: Annotated[int, Field(ge=5)] = 5
    """At least so many."""
    max_repetitions: Annotated[int, Field(ge=5)] = 30
    """At most so many, until a median is known to 5 %."""
    patience: Annotated[float, Field(ge=0)] = 20.0
    """Seconds at most, beyond the least."""
    scenario: Words = ()
    """Requests with objectives: names or YAML files."""
    starts: bool = True
    """Cold and warm starts."""


class Gates(Part):
    """What must hold: quality and speed or exit 3, size or exit 4."""

    max_kld: Annotated[float, Field(ge=0)] | None = None
    """Largest mean Kullback-Leibler divergence, in nats."""
    min_top1: Annotated[float, Field(ge=0, le=1)] | None = None
    """Smallest share of positions with the same most likely token, 0 to 1."""
    max_bytes: Bytes | None = None
    """Size of the largest file: bytes, or 350MiB."""
    min_decode: Annotated[float, Field(gt=0)] | None = None
    """Smallest median of tokens a second on this machine; needs bench."""


class Recipe(Part):
    """A model, what to do with it, and what must hold."""

    version: Annotated[Literal[1], BeforeValidator(_no_truth, json_schema_input_type=Literal[1])]
    """Version of this layout."""
    model: str
    """Directory, hub id or reference."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    target: Words = ()
    """Devices that must hold the files: names of targets, or YAML files."""
    ctx_size: Annotated[int, Field(ge=1)] = 2048
    """Tokens of context that the targets must hold."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of everything that is drawn."""
    trust_remote_code: bool = False
    """Take a checkpoint that names code of its own; the code is not run."""
    strict: bool = False
    """Fallbacks, unexpected tensors and an absent origin are errors."""
    calibration: Calibration = Calibration()
    """What importance matrices and methods look at."""
    passes: Annotated[tuple[Pass, ...], or_list(Pass, _one_or_more, 0)] = ()
    """Steps that change weights, in this order; one or a list."""
    exports: Annotated[tuple[Export, ...], Field(min_length=1), or_list(Export, _one_or_more)] = (Export(),)
    """What to write; one export or a list."""
    certificate: Certificate = Certificate()
    """What to measure of their quality."""
    bench: Annotated[Bench | None, BeforeValidator(_unless_false)] = None
    """What to measure of their speed; `bench: {}` measures with the defaults, false measures nothing."""
    gates: Gates = Gates()
    """What must hold."""

    @classmethod
    def from_export(
        cls,
        *,
        model: str,
        types: tuple[str, ...] | None,
        format: str = "gguf",
        revision: str | None = None,
        trust_remote_code: bool = False,
        seed: int = 0,
        strict: bool = False,
        passes: Sequence[Mapping[str, Any]] = (),
        calibration: str | None = None,
        imatrix: str | None = None,
        tensor_types: tuple[tuple[str, str], ...] = (),
        output_tensor_type: str | None = None,
        token_embedding_type: str | None = None,
        pure: bool = False,
        pre_tokenizer: str | None = None,
        allow_non_ternary: bool = False,
        certificate: bool = True,
        base: str | None = None,
        text: str | None = None,
        ctx: int = 512,
        max_kld: float | None = None,
        min_top1: float | None = None,
    ) -> Recipe:
        """The recipe with one export that a command line stands for; UsageError where a value is out of range.

        `types` None: those that the checkpoint has an allocation of, or Q4_K_M. `passes`: method and keys of each.
        `calibration`: a text file.
        """
        values = {
            "version": 1, "model": model, "revision": revision, "trust_remote_code": trust_remote_code,
            "seed": seed, "strict": strict,
            "passes": [dict(one) for one in passes], "calibration": {"text": calibration},
            "exports": [{
                "format": format, **({} if types is None else {"type": types}), "imatrix": imatrix,
                "tensor_type": tuple(f"{pattern}={type}" for pattern, type in tensor_types),
                "output_tensor_type": output_tensor_type, "token_embedding_type": token_embedding_type, "pure": pure,
                "pre_tokenizer": pre_tokenizer, "allow_non_ternary": allow_non_ternary,
            }],
            "certificate": {"enabled": certificate, "base": base, "text": text, "ctx_size": ctx},
            "gates": {"max_kld": max_kld, "min_top1": min_top1},
        }  # fmt: skip
        return strict_schema.validate(Recipe, Document("", values, {}))

    def to_json(self) -> dict[str, Any]:
        """All values, defaults too: what `efficli.json` keeps."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """The recipe as YAML with only what differs from the defaults; `parse_recipe` reads the same recipe back."""
        changed = self.model_dump(mode="json", exclude_defaults=True)
        changed["version"] = self.version
        if self.passes:
            changed["passes"] = [
                {"method": one.method, **one.config.model_dump(mode="json", exclude_defaults=True)}
                for one in self.passes
            ]
        changed["exports"] = [
            {
                "format": export.format,
                "type": list(export.type),
                **export.model_dump(mode="json", exclude_defaults=True),
            }
            for export in self.exports
        ]
        values = {key: changed[key] for key in Recipe.model_fields if key in changed}
        return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False)

    @property
    def sha256(self) -> str:
        """Of the YAML: two recipes with the same hash do the same."""
        return hashlib.sha256(self.to_yaml().encode()).hexdigest()


class _Dumper(yaml.SafeDumper):
    """Quotes every word that YAML 1.1 or 1.2 could read as something else."""

    def represent_word(self, word: str) -> yaml.ScalarNode:
        """A word, in quotes where plain text would be read as a number."""
        return self.represent_scalar("tag:yaml.org,2002:str", word, style=None if is_plain(word) else '"')


_Dumper.add_representer(str, _Dumper.represent_word)


def parse_recipe(text: str, name: str = "recipe.yaml") -> Recipe:
    """The recipe in `text`; `name` is what errors call it. No file that it names is looked at."""
    return strict_schema.loads(Recipe, text, name)
