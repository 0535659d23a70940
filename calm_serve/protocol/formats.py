"""Record formats: name and version of a record, written in front of it when it leaves a process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Generic, TypeVar

import pydantic_core
from pydantic import TypeAdapter, ValidationError

from calm_serve.config import first_error
from calm_serve.errors import KnowledgeError, NewerRecordError

T = TypeVar("T")
Upgrade = Callable[[dict[str, Any]], dict[str, Any]]  # plain data of a version -> of the next one


class RecordFormat(Generic[T]):
    """How one kind of record is written as JSON, and how older versions of it are read.

    Both ends use the same format object. A version newer than this program's is refused, because
    the meaning of its fields is unknown; an older one is upgraded step by step.

    Args:
        name: of the kind of record, written in front of it.
        version: that this program writes; raise it when a field changes its name or meaning.
        record: the type: a dataclass, or a mapping of dataclasses.
        upgrades: version -> function that upgrades its plain data to the next version.
        bare: version of data without name and version in front; 0 when there is no such data.
    """

    def __init__(
        self,
        name: str,
        version: int,
        record: Any,
        upgrades: Mapping[int, Upgrade] | None = None,
        *,
        bare: int = 0,
    ) -> None:
        self.name, self.version = name, version
        self._record, self._upgrades, self._bare = record, dict(upgrades or {}), bare

    def encode(self, record: T) -> bytes:
        """One JSON document without a line break."""
        plain = self._adapter.dump_python(record)
        document = {"format": self.name, "version": self.version, "record": plain}
        return to_json(document)

    def decode(self, data: bytes | str) -> T:
        """Read a document of `encode`, also of an older program.

        Raises KnowledgeError; NewerRecordError if a newer program wrote it.
        """
        try:
            document = pydantic_core.from_json(data)
        except ValueError as error:
            raise KnowledgeError(f"{self.name}: not JSON: {error}") from error
        return self.from_plain(document)

    def from_plain(self, document: Any) -> T:
        """As `decode`, from parsed JSON."""
        if not isinstance(document, dict):
            raise KnowledgeError(f"{self.name}: not a record but {type(document).__name__}")
        if "format" in document:
            if document["format"] != self.name:
                raise KnowledgeError(f"expected {self.name!r}, found {document['format']!r}")
            version, plain = document.get("version"), document.get("record")
        else:
            version, plain = self._bare, document
        return self._validated(self._upgraded(plain, version))

    def _upgraded(self, plain: Any, version: Any) -> Any:
        if not isinstance(version, int) or version < 1:
            raise KnowledgeError(f"{self.name}: no version in front of it")
        if version > self.version:
            raise NewerRecordError(
                f"{self.name}: version {version} was written by a newer program; this one reads "
                f"versions up to {self.version}"
            )
        for step in range(version, self.version):
            upgrade = self._upgrades.get(step)
            if upgrade is None:
                raise KnowledgeError(f"{self.name}: version {version} is too old to be read")
            try:
                plain = upgrade(plain)
            except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
                raise KnowledgeError(
                    f"malformed {self.name} of version {version}: {error!r}"
                ) from error
        return plain

    def _validated(self, plain: Any) -> T:
        try:
            record: T = self._adapter.validate_python(plain)
        except ValidationError as error:
            raise KnowledgeError(f"malformed {self.name}: {first_error('', error)}") from error
        return record

    @cached_property
    def _adapter(self) -> TypeAdapter[Any]:
        return TypeAdapter(self._record)  # milliseconds, so not at import


def to_json(document: Any) -> bytes:
    """Records as JSON; infinity and NaN are written as the constants that `from_json` reads.

    A lone surrogate, which UTF-8 cannot encode, becomes "?", so that one text does not make a whole
    batch fail.
    """
    try:
        return pydantic_core.to_json(document, inf_nan_mode="constants")
    except pydantic_core.PydanticSerializationError:
        return pydantic_core.to_json(_without_surrogates(document), inf_nan_mode="constants")


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, dict):
        return {_without_surrogates(k): _without_surrogates(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_surrogates(item) for item in value]
    if (names := getattr(type(value), "__dataclass_fields__", None)) is not None:
        return {name: _without_surrogates(getattr(value, name)) for name in names}
    return value
