"""Any record of a type, made from its annotations: a new field is covered when it is added."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import is_dataclass
from enum import Enum
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from hypothesis import strategies as st
from pydantic import Base64Bytes

from calm_serve.config import ResidencyOptions
from calm_serve.types import QualitySignal

PLAIN = st.none() | st.booleans() | st.text(max_size=8) | st.floats(allow_nan=False)
OPTIONS = (
    ResidencyOptions(),
    ResidencyOptions.model_validate(
        {"memory_budget_bytes": "1.5GiB", "policy": "lru", "cold_after_s": 60.0}
    ),
)


def records(record: Any, *, finite: bool = False) -> st.SearchStrategy[Any]:
    """Records of a type as `RecordFormat` takes it, without NaN.

    `finite` leaves out what `outcomes.check` refuses: infinity and integers above 32 bits.
    """
    bits = 31 if finite else 53
    numbers = st.floats(allow_nan=False, allow_infinity=not finite)
    simple = {
        type(None): st.none(),
        Any: PLAIN,
        bool: st.booleans(),
        bytes: st.binary(max_size=100),
        float: numbers,
        int: st.integers(-(2**bits) + 1, 2**bits - 1),
        str: st.text(max_size=8),
        Base64Bytes: st.binary(max_size=100),
        ResidencyOptions: st.sampled_from(OPTIONS),
        QualitySignal: st.builds(
            QualitySignal, source=st.text(max_size=8), value=st.floats(0.0, 1.0), at=numbers
        ),
    }

    def of(hint: Any) -> st.SearchStrategy[Any]:
        if hint in simple:
            return simple[hint]
        if isinstance(hint, type) and issubclass(hint, Enum):
            return st.sampled_from(list(hint))
        if is_dataclass(hint):
            hints = get_type_hints(hint, include_extras=True)
            builder: Callable[..., Any] = hint  # type: ignore[assignment]
            return st.builds(builder, **{name: of(h) for name, h in hints.items()})
        return _of_generic(hint, of)

    return of(record)


def _of_generic(hint: Any, of: Callable[[Any], st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return st.one_of(*map(of, inner))
    if origin is dict:
        return st.dictionaries(of(inner[0]), of(inner[1]), max_size=3)
    if origin is tuple and inner[-1] is ...:
        return st.lists(of(inner[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*map(of, inner))
    if origin is Annotated:
        return of(inner[0])
    raise TypeError(f"a record has a field of a kind that no record had before: {hint!r}")
