"""Predictors on disk: the last ones with their metrics, what became of each, and a pin.

`models/models.json` is the index and `models/VERSION.bin` an artifact. The index is replaced in one
step and only after the artifact it names is there, so after a crash one of both states is found.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from calm_serve.errors import KnowledgeError
from calm_serve.prediction import Artifact, load_artifact
from calm_serve.protocol.topics import PredictorChange

FOLDER = "models"
INDEX = "models.json"
KEPT = 5  # besides those that still have a part to play

_log = logging.getLogger(__name__)


class PredictorState(StrEnum):
    """What a predictor is, or what became of it."""

    CHAMPION = "champion"  # decides
    PREVIOUS = "previous"  # decided before; the way back
    CHALLENGER = "challenger"  # decides in the shadow
    ROLLED_BACK = "rolled_back"
    REJECTED = "rejected"  # worse in the shadow
    RETIRED = "retired"


_IN_USE = (PredictorState.CHAMPION, PredictorState.PREVIOUS, PredictorState.CHALLENGER)


@dataclass(frozen=True, slots=True)
class Model:
    """One predictor of the index."""

    version: str
    source: str  # "trained" or "shipped"
    state: PredictorState
    created_at: float  # Unix time in seconds
    trained_on: int  # labelled outcomes
    metrics: Mapping[str, Any]
    published_at: float | None = None  # Unix time in seconds, None before it decided
    note: str = ""  # why it is what it is

    @classmethod
    def of(cls, artifact: Artifact, source: str, state: PredictorState, note: str = "") -> Model:
        """The entry of an artifact."""
        return cls(
            version=artifact.version,
            source=source,
            state=state,
            created_at=artifact.created_at,
            trained_on=artifact.trained_on,
            metrics=dict(artifact.metrics),
            note=note,
        )


@dataclass(frozen=True, slots=True)
class Index:
    """What the index file says."""

    models: tuple[Model, ...] = ()  # the latest to enter comes first
    pinned: str = ""
    last_change: PredictorChange | None = None
    by_version: Mapping[str, Model] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_version", {m.version: m for m in self.models})

    def of(self, state: PredictorState) -> Model | None:
        """The model in a state, None when there is none."""
        return next((m for m in self.models if m.state is state), None)

    def was_worse(self, version: str) -> bool:
        """Whether it was tried before and taken back; it is not tried again by itself."""
        known = self.by_version.get(version)
        return known is not None and known.state in (
            PredictorState.ROLLED_BACK,
            PredictorState.REJECTED,
        )

    def turned(self, state: PredictorState, into: PredictorState, note: str | None = None) -> Index:
        """This index with whoever is in `state` turned into something else."""
        models = tuple(
            replace(m, state=into, note=m.note if note is None else note) if m.state is state else m
            for m in self.models
        )
        return replace(self, models=models)

    def with_model(self, model: Model) -> Index:
        """This index with a model added or replaced; beyond KEPT the oldest unused one goes."""
        models = [model, *(m for m in self.models if m.version != model.version)]
        unused = [m.version for m in models if m.state not in _IN_USE and m.version != self.pinned]
        gone = set(unused[KEPT:])
        return replace(self, models=tuple(m for m in models if m.version not in gone))


class ModelRegistry:
    """The folder. Methods block and raise KnowledgeError; `index` is what was last written."""

    def __init__(self, state_dir: Path) -> None:
        """Read the index; an unreadable one is logged and begun anew."""
        self._folder = state_dir / FOLDER
        self.index = self._read_index()

    def read(self, version: str) -> bytes:
        """The artifact of a model in the index."""
        path = self._path(version)
        try:
            return path.read_bytes()
        except OSError as error:
            raise KnowledgeError(f"{path.name}: cannot be read: {error.strerror}") from error

    def write(self, index: Index, blobs: Mapping[str, bytes] | None = None) -> None:
        """Store artifacts, then the index, then delete artifacts that it does not name."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for version, blob in (blobs or {}).items():
            write_atomically(self._path(version), blob)
        data = {
            "pinned": index.pinned,
            "last_change": None if index.last_change is None else asdict(index.last_change),
            "models": [asdict(m) for m in index.models],
        }
        write_atomically(self._folder / INDEX, json.dumps(data, indent=1).encode())
        self.index = index
        named = {self._path(m.version) for m in index.models}
        for path in self._folder.glob("*.bin"):
            if path not in named:
                path.unlink(missing_ok=True)

    def _path(self, version: str) -> Path:
        return self._folder / f"{version}.bin"

    def _read_index(self) -> Index:
        path = self._folder / INDEX
        if not path.is_file():
            return Index()
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            change = data["last_change"]
            return Index(
                models=tuple(
                    Model(**{**m, "state": PredictorState(m["state"])}) for m in data["models"]
                ),
                pinned=str(data["pinned"]),
                last_change=None if change is None else PredictorChange(**change),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            _log.warning("index of predictors begun anew: %s: %r", path.name, error)
            return Index()


def write_atomically(path: Path, data: bytes) -> None:
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


CHAMPION_FILE = "champion.bin"  # of versions that kept one predictor only
SHIPPED_FILE = "predictor.bin"
TRAINED, SHIPPED = "trained", "shipped"


@dataclass(frozen=True, slots=True)
class Champion:
    """A published predictor; `source` is TRAINED or SHIPPED."""

    artifact: Artifact
    blob: bytes
    source: str


def load_champion(state_dir: Path, shipped_dir: str) -> Champion | None:
    """The champion of an earlier run, else the shipped predictor, else None.

    An unreadable file is logged and passed over: decisions must go on.
    """
    return _load(state_dir / CHAMPION_FILE, TRAINED) or load_shipped(shipped_dir)


def load_shipped(shipped_dir: str) -> Champion | None:
    """The fleet's own predictor; None when there is none or it cannot be read, which is logged."""
    return _load(Path(shipped_dir) / SHIPPED_FILE, SHIPPED) if shipped_dir else None


def _load(path: Path, source: str) -> Champion | None:
    if not path.is_file():
        return None
    try:
        artifact = load_artifact(path)
    except KnowledgeError as error:
        _log.warning("predictor passed over: %s", error.message)
        return None
    return Champion(artifact, artifact.to_bytes(), source)


def read_model(shelf: ModelRegistry, model: Model) -> Champion:
    """A model of the shelf's index. Raises KnowledgeError."""
    blob = shelf.read(model.version)
    return Champion(Artifact.from_bytes(blob), blob, model.source)


def find_model(shelf: ModelRegistry, state: PredictorState) -> Champion | None:
    """The model in a state; None when there is none, or it cannot be read, which is logged."""
    model = shelf.index.of(state)
    if model is None:
        return None
    try:
        return read_model(shelf, model)
    except KnowledgeError as error:
        _log.warning("predictor passed over: %s", error.message)
        return None


def restore_champion(shelf: ModelRegistry, state_dir: Path, shipped_dir: str) -> Champion | None:
    """The champion that decided last, unless another one is shipped now; the shelf follows.

    Blocks. Raises KnowledgeError when the shelf cannot be written.
    """
    index = shelf.index
    entry = index.of(PredictorState.CHAMPION)
    if entry is not None and (entry.source == TRAINED or entry.version == index.pinned):
        found = find_model(shelf, PredictorState.CHAMPION)
        if found is not None:
            return found
    found = load_champion(state_dir, shipped_dir)
    if found is None or (entry is not None and index.was_worse(found.artifact.version)):
        return find_model(shelf, PredictorState.CHAMPION)
    if entry is None or entry.version != found.artifact.version:
        index = index.turned(PredictorState.CHAMPION, PredictorState.RETIRED)
        model = Model.of(found.artifact, found.source, PredictorState.CHAMPION)
        shelf.write(index.with_model(model), {model.version: found.blob})
    if found.source == TRAINED:
        (state_dir / CHAMPION_FILE).unlink(missing_ok=True)  # it is in the folder now
    return found
