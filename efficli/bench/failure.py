"""Why something was not measured, as values: the others go on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Self

from efficli.errors import EffiError
from efficli.ops.child import ChildError


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why an artifact, or a scenario, was not measured: an EffiError as values."""

    message: str
    where: str | None
    hint: str | None
    code: int
    log: str | None = None
    """What a process said that ended in a way that no user can act on."""

    @classmethod
    def of(cls, error: EffiError | ChildError) -> Self:
        """The error's words and its exit code."""
        if isinstance(error, ChildError):
            first, _, log = str(error).partition("\n")
            hint = "this may be a bug of efficli: report it with the lines above and `efficli --version`"
            return cls(message=first.removesuffix(":"), where=None, hint=hint, code=70, log=log.strip() or None)
        return cls(message=error.message, where=error.where, hint=error.hint, code=error.exit_code)

    def to_json(self) -> dict[str, Any]:
        """As plain data; the log only where there is one."""
        return {name: value for name, value in asdict(self).items() if name != "log" or value}

    @property
    def line(self) -> str:
        """The one line that a user reads."""
        return f"{self.where}: {self.message}" if self.where else self.message
