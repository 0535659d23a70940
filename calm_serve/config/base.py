"""What every section of the configuration is made of."""

from __future__ import annotations

import difflib
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

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
    """Raise ValueError that names the first of `names` that is there twice."""
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise ValueError(f"duplicate or reserved {kind} {twice[0]!r}")


def nearest(word: str, known: list[str]) -> str:
    """The end of an error message: the known name that is most like `word`."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.0)
    return f"; the nearest is {near[0]!r}" if near else ""
