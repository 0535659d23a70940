"""Artifact: a trained predictor as it is stored and sent, with the layout of its features."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from calm_serve.errors import KnowledgeError
from calm_serve.prediction.base import LOAD_NAMES
from calm_serve.requests import BUCKETS, NUMBER_NAMES
from calm_serve.types import Outcome

FORMAT = 2  # of the file; raised when the content changes its meaning
SUCCESS, OUTPUT_TOKENS = OWN_HEADS = ("success", "output_tokens")  # one booster per SLM
TTFT_RESIDUAL = "ttft_residual"  # one booster for all


@dataclass(frozen=True, slots=True)
class Artifact:
    """One trained predictor as plain data; written as JSON inside zlib."""

    version: str
    slm_ids: tuple[str, ...]  # the category of an SLM is its index here
    boosters: Mapping[str, str]  # TTFT_RESIDUAL, or own_head(head, slm), to a text model
    metrics: Mapping[str, Any]
    trained_on: int  # labelled outcomes
    created_at: float  # Unix time in seconds

    def to_bytes(self) -> bytes:
        """Serialise; equal artifacts give equal bytes."""
        data = {"format": FORMAT, "features": _layout(), **asdict(self)}
        text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return zlib.compress(text.encode(), 6)

    @classmethod
    def from_bytes(cls, blob: bytes) -> Artifact:
        """Read what `to_bytes` wrote. Raises KnowledgeError for anything else."""
        try:
            data = json.loads(zlib.decompress(blob))
            if data["format"] != FORMAT:
                raise KnowledgeError(f"predictor format {data['format']!r}, expected {FORMAT}")
            if data["features"] != _layout():
                raise KnowledgeError("the predictor was trained on another feature layout")
            return cls(
                version=str(data["version"]),
                slm_ids=tuple(map(str, data["slm_ids"])),
                boosters={str(k): str(v) for k, v in data["boosters"].items()},
                metrics=dict(data["metrics"]),
                trained_on=int(data["trained_on"]),
                created_at=float(data["created_at"]),
            )
        except (zlib.error, ValueError, KeyError, TypeError, AttributeError) as error:
            raise KnowledgeError(f"not a predictor artifact: {error!r}") from error


def load_artifact(path: Path) -> Artifact:
    """Read an artifact file. Raises KnowledgeError with the file's name."""
    try:
        return Artifact.from_bytes(path.read_bytes())
    except OSError as error:
        raise KnowledgeError(f"{path.name}: cannot be read: {error.strerror}") from error
    except KnowledgeError as error:
        raise KnowledgeError(f"{path.name}: {error.message}") from error


def own_head(head: str, slm_id: str) -> str:
    """Key of an SLM's own booster in `Artifact.boosters`; `head` is one of OWN_HEADS."""
    return f"{head}:{slm_id}"


def fits_layout(outcome: Outcome) -> bool:
    """Whether the outcome was logged under the present feature layout."""
    return (
        len(outcome.features.numbers) == len(NUMBER_NAMES)
        and len(outcome.decision.load_features) == len(LOAD_NAMES)
        and all(0 <= b < BUCKETS for b in outcome.features.buckets)
    )


def _layout() -> dict[str, Any]:
    return {"numbers": list(NUMBER_NAMES), "buckets": BUCKETS, "load": list(LOAD_NAMES)}
