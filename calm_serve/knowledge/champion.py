"""The published predictor on disk: replaced atomically, loaded again after a restart."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from calm_serve.analyze.lightgbm import Artifact, load_artifact
from calm_serve.errors import KnowledgeError

CHAMPION_FILE = "champion.bin"
SHIPPED_FILE = "predictor.bin"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Champion:
    """A published predictor; `source` is "trained" or "shipped"."""

    artifact: Artifact
    blob: bytes
    source: str


def load_champion(state_dir: Path, shipped_dir: str) -> Champion | None:
    """The champion of an earlier run, else the shipped predictor, else None.

    An unreadable file is logged and passed over: decisions must go on.
    """
    places = [(state_dir / CHAMPION_FILE, "trained")]
    if shipped_dir:
        places.append((Path(shipped_dir) / SHIPPED_FILE, "shipped"))
    for path, source in places:
        if not path.is_file():
            continue
        try:
            artifact = load_artifact(path)
        except KnowledgeError as error:
            _log.warning("predictor passed over: %s", error.message)
            continue
        return Champion(artifact, artifact.to_bytes(), source)
    return None


def save_champion(state_dir: Path, blob: bytes) -> None:
    """Replace the champion file; after a crash either the old or the new one is there."""
    path = state_dir / CHAMPION_FILE
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)  # os.replace: atomic within one file system
        folder = os.open(state_dir, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise KnowledgeError(f"cannot save the champion: {error.strerror}") from error
