"""Artifact: a trained predictor as it is stored and sent, with the layout of its features."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from calm_serve.errors import KnowledgeError
from calm_serve.prediction.base import LOAD_NAMES
from calm_serve.prediction.novelty import SeenPrompts
from calm_serve.prediction.pseudo_tasks import PseudoTasks
from calm_serve.requests import BUCKETS, NUMBER_NAMES
from calm_serve.types import FIRST_WORD, Outcome

FORMAT = 3  # of the file; raised when the content changes its meaning
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
    # SLM -> logit of P(success) in each pseudo-task, to which its booster adds; an SLM without a
    # start has the prior.
    starts: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    pseudo_tasks: PseudoTasks | None = None  # None: one group of all prompts
    seen: SeenPrompts | None = None  # None: no prompt is unfamiliar

    def content_hash(self) -> str:
        """12 digits that follow from what predicts: boosters, starts, seen prompts, SLMs."""
        names = ("slm_ids", "boosters", "starts", "pseudo_tasks", "seen")
        plain = self._plain()
        content = json.dumps([plain[name] for name in names], sort_keys=True).encode()
        return hashlib.sha256(content).hexdigest()[:12]

    def _plain(self) -> dict[str, Any]:
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("pseudo_tasks", "seen"):
            plain[name] = None if plain[name] is None else plain[name].to_plain()
        return plain

    def to_bytes(self) -> bytes:
        """Serialise; equal artifacts give equal bytes."""
        data = {"format": FORMAT, "features": _layout(), **self._plain()}
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
            plain = data["pseudo_tasks"]
            tasks = None if plain is None else PseudoTasks.from_plain(plain)
            seen = data["seen"]
            return cls(
                version=str(data["version"]),
                slm_ids=tuple(map(str, data["slm_ids"])),
                boosters={str(k): str(v) for k, v in data["boosters"].items()},
                metrics=dict(data["metrics"]),
                trained_on=int(data["trained_on"]),
                created_at=float(data["created_at"]),
                starts=_starts(data["starts"], tasks),
                pseudo_tasks=tasks,
                seen=None if seen is None else SeenPrompts.from_plain(seen),
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


def _starts(plain: Mapping[str, Any], tasks: PseudoTasks | None) -> dict[str, tuple[float, ...]]:
    starts = {str(slm): tuple(map(float, logits)) for slm, logits in plain.items()}
    if any(len(logits) != (1 if tasks is None else len(tasks)) for logits in starts.values()):
        raise ValueError("a start does not have one logit for each pseudo-task")
    return starts


def own_head(head: str, slm_id: str) -> str:
    """Key of an SLM's own booster in `Artifact.boosters`; `head` is one of OWN_HEADS."""
    return f"{head}:{slm_id}"


def fits_layout(outcome: Outcome) -> bool:
    """Whether the outcome was logged under the present feature layout.

    Another number of features, or a bucket of an earlier layout, shows that it was not. Such an
    outcome can be read and replayed with its logged predictions; no predictor reads its features.
    """
    return (
        len(outcome.features.numbers) == len(NUMBER_NAMES)
        and len(outcome.decision.load_features) == len(LOAD_NAMES)
        and all(FIRST_WORD <= b < FIRST_WORD + BUCKETS for b in outcome.features.buckets)
    )


def _layout() -> dict[str, Any]:
    return {"numbers": list(NUMBER_NAMES), "buckets": BUCKETS, "load": list(LOAD_NAMES)}
