"""Base class of configuration sections, shared field types, and the text of validation errors."""

from __future__ import annotations

import difflib
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

Ratio = Annotated[float, Field(ge=0.0, le=1.0)]
Identifier = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]


class Config(BaseModel):
    """Base of every section: frozen, and unknown keys are errors with a suggestion."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_keys(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for key in data:
                if key not in cls.model_fields:
                    near = difflib.get_close_matches(str(key), cls.model_fields, n=1, cutoff=0.0)
                    hint = f"; the nearest valid key is {near[0]!r}" if near else ""
                    raise ValueError(f"unknown key {key!r}{hint}")
        return data


def unique(kind: str, names: list[str]) -> None:
    """Raise ValueError with the first duplicate in `names`."""
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise ValueError(f"duplicate or reserved {kind} {twice[0]!r}")


def nearest(name: str, known: list[str]) -> str:
    """Return the end of an error message: the known name closest to `name`."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f"; the nearest is {near[0]!r}" if near else ""


def first_error(name: str, error: ValidationError, *, counted: bool = True) -> str:
    """Return one line, `name.field: message`, for the first of pydantic's errors.

    With `counted`, the number of further errors follows. An empty `name` is left out.
    """
    place = ".".join(part for part in (name, error_field(error)) if part)
    message = error.errors()[0]["msg"].removeprefix("Value error, ")
    others = error.error_count() - 1
    more = f" (and {others} more)" if counted and others else ""
    return f"{place}: {message}{more}" if place else f"{message}{more}"


def error_field(error: ValidationError) -> str:
    """Return the dotted path of the first error's field; "" when the error is about the whole."""
    # Wrapping validators add a part of their own, which no client wrote.
    parts = (str(part) for part in error.errors()[0]["loc"])
    return ".".join(part for part in parts if not part.startswith("function-wrap["))
