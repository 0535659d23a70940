"""Model registry: predictors on disk with their metrics and states, and an operator's pin.

`models/models.json` is the index, `models/VERSION.bin` an artifact. Artifacts are written first,
then the index is replaced in one step, so after a crash every artifact that it names exists.
An artifact is deleted only if the index before named it: what no readable index has named may be
the only copy of a predictor.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from calm_serve.errors import KnowledgeError, NewerRecordError
from calm_serve.prediction import Artifact, load_artifact
from calm_serve.protocol.formats import RecordFormat
from calm_serve.protocol.topics import PredictorChange

FOLDER = "models"
INDEX = "models.json"
UNREADABLE = ".unreadable"  # suffix of an index that was set aside
SHIPPED_FILE = "predictor.bin"
TRAINED, SHIPPED = "trained", "shipped"  # where a predictor comes from

# Predictors kept besides those in use, for an operator to pin. That of six SLMs has 250 kB.
KEPT = 5

_log = logging.getLogger(__name__)


class PredictorState(StrEnum):
    """What a predictor is used for, or why it is not used any more."""

    CHAMPION = "champion"  # decides
    PREVIOUS = "previous"  # decided before; a rollback publishes it again
    CHALLENGER = "challenger"  # decides in the shadow
    ROLLED_BACK = "rolled_back"
    REJECTED = "rejected"  # worse in the shadow
    RETIRED = "retired"


_IN_USE = (PredictorState.CHAMPION, PredictorState.PREVIOUS, PredictorState.CHALLENGER)


@dataclass(frozen=True, slots=True)
class LoadedPredictor:
    """A predictor in memory; `source` is TRAINED or SHIPPED."""

    artifact: Artifact
    blob: bytes
    source: str

    @property
    def version(self) -> str:
        """The artifact's version."""
        return self.artifact.version


@dataclass(frozen=True, slots=True)
class RegisteredPredictor:
    """One entry of the index."""

    version: str
    source: str  # TRAINED or SHIPPED
    state: PredictorState
    created_at: float  # Unix time in seconds
    trained_on: int  # labelled outcomes
    metrics: Mapping[str, Any]
    published_at: float | None = None  # Unix time in seconds, None before it was champion
    note: str = ""  # why it is in its state

    @classmethod
    def of(
        cls, predictor: LoadedPredictor, state: PredictorState, note: str = ""
    ) -> RegisteredPredictor:
        """The entry of a predictor."""
        artifact = predictor.artifact
        return cls(
            version=artifact.version,
            source=predictor.source,
            state=state,
            created_at=artifact.created_at,
            trained_on=artifact.trained_on,
            metrics=dict(artifact.metrics),
            note=note,
        )


@dataclass(frozen=True, slots=True)
class Index:
    """Content of the index file."""

    predictors: tuple[RegisteredPredictor, ...] = ()  # the one added or promoted last comes first
    pinned: str = ""
    last_change: PredictorChange | None = None
    by_version: Mapping[str, RegisteredPredictor] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_version", {p.version: p for p in self.predictors})

    def of(self, state: PredictorState) -> RegisteredPredictor | None:
        """The predictor in a state, None when there is none."""
        return next((p for p in self.predictors if p.state is state), None)

    def was_worse(self, version: str) -> bool:
        """Whether it was rolled back or rejected; if so, it is not promoted again."""
        known = self.by_version.get(version)
        return known is not None and known.state in (
            PredictorState.ROLLED_BACK,
            PredictorState.REJECTED,
        )

    def with_transition(
        self, state: PredictorState, into: PredictorState, note: str | None = None
    ) -> Index:
        """This index with the predictor in `state` moved to `into`, with `note` if given."""
        predictors = tuple(
            replace(p, state=into, note=p.note if note is None else note) if p.state is state else p
            for p in self.predictors
        )
        return replace(self, predictors=predictors)

    def with_predictor(self, predictor: RegisteredPredictor) -> Index:
        """This index with a predictor added or replaced; the newest KEPT unused ones stay."""
        entries = [predictor, *(p for p in self.predictors if p.version != predictor.version)]
        unused = [p.version for p in entries if p.state not in _IN_USE and p.version != self.pinned]
        dropped = set(unused[KEPT:])
        return replace(self, predictors=tuple(p for p in entries if p.version not in dropped))

    def promoted(self, champion: RegisteredPredictor, replaces_challenger: bool) -> Index:
        """This index with another champion; the one before becomes the previous predictor."""
        index = self.with_transition(PredictorState.PREVIOUS, PredictorState.RETIRED)
        index = index.with_transition(PredictorState.CHAMPION, PredictorState.PREVIOUS)
        if replaces_challenger:
            index = index.with_transition(
                PredictorState.CHALLENGER, PredictorState.RETIRED, "another predictor was promoted"
            )
        return index.with_predictor(champion)

    def rolled_back(self, reason: str) -> Index:
        """This index with the previous predictor as champion, and the champion as rolled back."""
        index = self.with_transition(
            PredictorState.CHALLENGER,
            PredictorState.RETIRED,
            "was compared with a predictor that was rolled back",
        )
        index = index.with_transition(PredictorState.CHAMPION, PredictorState.ROLLED_BACK, reason)
        return index.with_transition(
            PredictorState.PREVIOUS, PredictorState.CHAMPION, "rolled back to"
        )


@dataclass(frozen=True, slots=True)
class StoredIndex:
    """The index as its file has it."""

    models: tuple[RegisteredPredictor, ...]
    pinned: str
    last_change: PredictorChange | None


# The former build wrote version 1 without name and version in front.
INDEX_FORMAT: RecordFormat[StoredIndex] = RecordFormat("predictors_index", 1, StoredIndex, bare=1)


class ModelRegistry:
    """The folder. Methods block and raise KnowledgeError; `index` is what was last written."""

    def __init__(self, state_dir: Path) -> None:
        """Read the index; a malformed one is logged, and set aside under another name.

        Raises NewerRecordError for the index of a newer program, which stays as it is, and
        KnowledgeError for one that the disk does not give.
        """
        self._folder = state_dir / FOLDER
        self.index = self._read_index()

    def read(self, version: str) -> bytes:
        """The artifact of a predictor in the index."""
        path = self._path(version)
        try:
            return path.read_bytes()
        except OSError as error:
            raise KnowledgeError(f"{path.name}: cannot be read: {error.strerror}") from error

    def load(self, entry: RegisteredPredictor) -> LoadedPredictor:
        """A predictor of the index."""
        blob = self.read(entry.version)
        return LoadedPredictor(Artifact.from_bytes(blob), blob, entry.source)

    def find(self, state: PredictorState) -> LoadedPredictor | None:
        """The predictor in a state; None for none, and for an unreadable one, which is logged."""
        entry = self.index.of(state)
        if entry is None:
            return None
        try:
            return self.load(entry)
        except KnowledgeError as error:
            _log.warning("predictor ignored: %s", error.message)
            return None

    def write(self, index: Index, blobs: Mapping[str, bytes] | None = None) -> None:
        """Store artifacts, then the index, then delete artifacts that it no longer names."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for version, blob in (blobs or {}).items():
            _write_atomically(self._path(version), blob)
        stored = StoredIndex(index.predictors, index.pinned, index.last_change)
        _write_atomically(self._folder / INDEX, INDEX_FORMAT.encode(stored))
        dropped = {p.version for p in self.index.predictors} - set(index.by_version)
        self.index = index
        for version in dropped:
            self._path(version).unlink(missing_ok=True)

    def _path(self, version: str) -> Path:
        return self._folder / f"{version}.bin"

    def _read_index(self) -> Index:
        path = self._folder / INDEX
        try:
            stored = INDEX_FORMAT.decode(path.read_bytes())
        except FileNotFoundError:
            return Index()
        except OSError as error:
            raise KnowledgeError(f"{path}: cannot be read: {error.strerror}") from error
        except NewerRecordError as error:
            raise NewerRecordError(
                f"{path}: {error.message}; start the newer program, or move the folder away"
            ) from error
        except KnowledgeError as error:
            aside = _set_aside(path)
            _log.error(
                "%s is kept as %s, and the predictors that it names are not used: %s",
                path,
                aside.name,
                error.message,
            )
            return Index()
        return Index(stored.models, stored.pinned, stored.last_change)


def load_shipped(shipped_dir: str) -> LoadedPredictor | None:
    """The fleet's own predictor; None for none, and for an unreadable one, which is logged."""
    path = Path(shipped_dir) / SHIPPED_FILE
    if not shipped_dir or not path.is_file():
        return None
    try:
        artifact = load_artifact(path)
    except KnowledgeError as error:
        _log.warning("predictor ignored: %s", error.message)
        return None
    return LoadedPredictor(artifact, artifact.to_bytes(), SHIPPED)


def restore_champion(registry: ModelRegistry, shipped_dir: str) -> LoadedPredictor | None:
    """The last champion, unless another predictor is shipped now, which is then registered.

    A trained or pinned champion stays. Blocks. Raises KnowledgeError when the registry cannot be
    written.
    """
    index = registry.index
    entry = index.of(PredictorState.CHAMPION)
    if entry is not None and (entry.source == TRAINED or entry.version == index.pinned):
        champion = registry.find(PredictorState.CHAMPION)
        if champion is not None:
            return champion
    shipped = load_shipped(shipped_dir)
    if shipped is None or (entry is not None and index.was_worse(shipped.version)):
        return registry.find(PredictorState.CHAMPION)
    if entry is None or entry.version != shipped.version:
        index = index.with_transition(PredictorState.CHAMPION, PredictorState.RETIRED)
        new_entry = RegisteredPredictor.of(shipped, PredictorState.CHAMPION)
        registry.write(index.with_predictor(new_entry), {shipped.version: shipped.blob})
    return shipped


def _write_atomically(path: Path, data: bytes) -> None:
    """Replace a file; after a crash either the old or the new one is there."""
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)  # os.replace: atomic within one file system
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise KnowledgeError(f"{path.name}: cannot be saved: {error.strerror}") from error


def _set_aside(path: Path) -> Path:
    """Give a file a name that is not in use yet; return it."""
    aside = path.with_name(f"{path.stem}-{time.time_ns()}{UNREADABLE}")
    try:
        path.rename(aside)
    except OSError as error:
        raise KnowledgeError(f"{path}: cannot be set aside: {error.strerror}") from error
    return aside
