"""Where the first champion comes from: an earlier version's file, or the fleet's own folder."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from calm_serve.analyze.lightgbm import Artifact, load_artifact
from calm_serve.errors import KnowledgeError

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
    places = [(state_dir / CHAMPION_FILE, TRAINED)]
    if shipped_dir:
        places.append((Path(shipped_dir) / SHIPPED_FILE, SHIPPED))
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
