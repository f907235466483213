"""From a file to a recipe that can be run: YAML, `--set`, schema, combinations; all that is wrong is said at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from efficli.errors import EffiError
from efficli.recipe.checks import check
from efficli.recipe.model import Recipe
from efficli.recipe.settings import apply_settings
from efficli.strict_schema import examine, read_text, salvage
from efficli.strict_yaml import Document, read
from efficli.strict_yaml import Path as Keys

_STAND_INS = {"version": 1, "model": "reference"}
"""For keys that are missing, so that the others can be checked."""


class Places(Protocol):
    """`LoadedRecipe.at`, or what stands for it where the recipe comes from no file."""

    def __call__(self, *keys: str | int, only: type[EffiError] = EffiError) -> AbstractContextManager[None]:
        """Errors inside, those of the kind `only`, get the place of this key before their own."""


def no_place(*keys: str | int, only: type[EffiError] = EffiError) -> AbstractContextManager[None]:
    """The places of a recipe that comes from no file: errors stay as they are."""
    return nullcontext()


@dataclass(frozen=True, slots=True)
class LoadedRecipe:
    """A recipe and what it was read from, for errors that come later."""

    recipe: Recipe
    document: Document

    def where(self, *keys: str | int) -> str:
        """`recipe.yaml:7`, or `--set exports.0.type`: where the value of a key comes from."""
        return self.document.where(keys)

    @contextmanager
    def at(self, *keys: str | int, only: type[EffiError] = EffiError) -> Iterator[None]:
        """Errors inside, those of the kind `only`, get the place of this key before their own."""
        try:
            yield
        except only as error:
            error.where = ": ".join(filter(None, (self.where(*keys), error.where)))
            raise


def load(path: Path) -> Recipe:
    """The recipe in a file, checked; UsageError with file:line and, in `others`, all else that is wrong."""
    return load_with(path).recipe


def load_with(path: Path, settings: Sequence[str] = ()) -> LoadedRecipe:
    """The recipe in a file with values of `--set key=value`, checked; UsageError as `load` has it."""
    document = apply_settings(read(read_text(path, "recipe"), str(path)), settings)
    recipe, problems = examine(Recipe, document)
    problems += document.problems
    if isinstance(document.values, dict):
        wrong = [problem.path for problem in problems]
        partly = recipe or salvage(Recipe, document.values, wrong, _STAND_INS)
        for finding in check(partly, document) if partly else ():
            keys = (finding.problem.path, *finding.with_keys)
            if not any(_is_inside(document, key, bad) for key in keys for bad in wrong):
                problems.append(finding.problem)
    if recipe is None or problems:
        raise document.error(problems)
    return LoadedRecipe(recipe, document)


def _is_inside(document: Document, path: Keys, bad: Keys) -> bool:
    own, bad = document.written(path), document.written(bad)
    return bool(bad) and own[: len(bad)] == bad
