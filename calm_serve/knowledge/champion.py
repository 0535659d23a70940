"""Predictors read back at a start: the shelf's, an earlier version's file, the fleet's own."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from calm_serve.errors import KnowledgeError
from calm_serve.knowledge.models import Model, ModelShelf, ModelState
from calm_serve.prediction import Artifact, load_artifact

CHAMPION_FILE = "champion.bin"  # of versions that kept one predictor only
SHIPPED_FILE = "predictor.bin"
TRAINED, SHIPPED = "trained", "shipped"

_log = logging.getLogger(__name__)


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


def read_model(shelf: ModelShelf, model: Model) -> Champion:
    """A model of the shelf's index. Raises KnowledgeError."""
    blob = shelf.read(model.version)
    return Champion(Artifact.from_bytes(blob), blob, model.source)


def find_model(shelf: ModelShelf, state: ModelState) -> Champion | None:
    """The model in a state; None when there is none, or it cannot be read, which is logged."""
    model = shelf.index.of(state)
    if model is None:
        return None
    try:
        return read_model(shelf, model)
    except KnowledgeError as error:
        _log.warning("predictor passed over: %s", error.message)
        return None


def restore_champion(shelf: ModelShelf, state_dir: Path, shipped_dir: str) -> Champion | None:
    """The champion that decided last, unless another one is shipped now; the shelf follows.

    Blocks. Raises KnowledgeError when the shelf cannot be written.
    """
    index = shelf.index
    entry = index.of(ModelState.CHAMPION)
    if entry is not None and (entry.source == TRAINED or entry.version == index.pinned):
        found = find_model(shelf, ModelState.CHAMPION)
        if found is not None:
            return found
    found = load_champion(state_dir, shipped_dir)
    if found is None or (entry is not None and index.was_worse(found.artifact.version)):
        return find_model(shelf, ModelState.CHAMPION)
    if entry is None or entry.version != found.artifact.version:
        index = index.turned(ModelState.CHAMPION, ModelState.RETIRED)
        model = Model.of(found.artifact, found.source, ModelState.CHAMPION)
        shelf.write(index.with_model(model), {model.version: found.blob})
    if found.source == TRAINED:
        (state_dir / CHAMPION_FILE).unlink(missing_ok=True)  # it is in the folder now
    return found
