"""Pseudo-tasks: prompts grouped by their features; P(success) of each SLM starts from its group.

Nobody tells the router a prompt's task. Groups of prompts that look alike stand in for it: k-means
over TF-IDF of the hashed words and, at half their weight, the standardised numbers. `of_prompt`
assigns one prompt within microseconds.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from calm_serve.prediction.single_row import FIRST_BUCKET, FIRST_LOAD, SparseRow
from calm_serve.requests import BUCKETS, NUMBER_NAMES

# Compared in decision 0045.
GROUPS = 16  # 8 and 32 were level with it, within the noise
MIN_PROMPTS_PER_GROUP = 20  # fewer prompts make fewer groups
NUMBERS_WEIGHT = 0.5  # length of the vector of all numbers, next to 1 of the words
MAX_SIGMAS = 3.0  # numbers are clipped there: one very long prompt is no group of its own
ITERATIONS = 15  # of k-means; it mostly ends before
MIN_SCALE = 1e-6  # a number with less spread says nothing
_LEVELS = 255  # of a centroid's values as they are stored

Floats = NDArray[np.float32]
Groups = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)  # arrays have no truth value
class PseudoTasks:
    """The groups of one artifact; a prompt belongs to that with the largest cosine."""

    mean: Floats  # (numbers,) of NUMBER_NAMES in training
    scale: Floats  # (numbers,) standard deviations; infinite for a constant
    number_weights: Floats  # (numbers, groups)
    idf: Floats  # (BUCKETS,) inverse document frequencies; 0 of a word that training did not have
    levels: NDArray[np.uint8]  # (BUCKETS, groups) of the centroids
    level: Floats  # (groups,) value of one level
    # (FIRST_LOAD, groups + 1), by column of a row; the last of each is the idf squared.
    _table: Floats = field(init=False, repr=False)

    def __post_init__(self) -> None:
        words = self.levels * (self.idf[:, None] * self.level)
        table = np.zeros((FIRST_LOAD, len(self) + 1), dtype=np.float32)
        table[FIRST_BUCKET:] = np.column_stack([words, self.idf**2])
        object.__setattr__(self, "_table", table)

    def __len__(self) -> int:
        return len(self.level)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PseudoTasks) and self.to_plain() == other.to_plain()

    def of_prompt(self, row: SparseRow) -> int:
        """The group of the prompt in a row."""
        found = self._numbers(row.numbers) @ self.number_weights
        words = self._table.take(row.words, axis=0).sum(axis=0)
        found += words[:-1] * (1.0 / math.sqrt(max(float(words[-1]), MIN_SCALE)))
        return int(found.argmax())

    def of_rows(self, rows: sparse.csr_matrix) -> Groups:
        """The groups of many prompts, as `of_prompt`; rows as of `prompt_rows`."""
        numbers = self._numbers(rows[:, :FIRST_BUCKET].toarray()) @ self.number_weights
        words = rows[:, FIRST_BUCKET:FIRST_LOAD] @ self._table[FIRST_BUCKET:]
        length = np.sqrt(np.maximum(words[:, -1:], MIN_SCALE))
        groups: Groups = (numbers + words[:, :-1] / length).argmax(axis=1)
        return groups

    def _numbers(self, numbers: Floats) -> Floats:
        sigmas = (numbers - self.mean) / self.scale
        clipped: Floats = np.minimum(np.maximum(sigmas, -MAX_SIGMAS), MAX_SIGMAS)
        return clipped

    def to_plain(self) -> dict[str, Any]:
        """Plain data for JSON; the arrays of words as base64."""
        return {
            "mean": self.mean.tolist(),
            "scale": [s if math.isfinite(s) else None for s in self.scale.tolist()],
            "number_weights": self.number_weights.tolist(),
            "level": self.level.tolist(),
            "idf": base64.b64encode(self.idf.astype("<f4").tobytes()).decode(),
            "levels": base64.b64encode(self.levels.tobytes()).decode(),
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> PseudoTasks:
        """The reverse of `to_plain`. Raises ValueError, KeyError or TypeError for anything else."""
        numbers, groups = len(NUMBER_NAMES), len(plain["level"])
        scale = [math.inf if s is None else s for s in plain["scale"]]
        return cls(
            mean=_floats(plain["mean"]).reshape(numbers),
            scale=_floats(scale).reshape(numbers),
            number_weights=_floats(plain["number_weights"]).reshape(numbers, groups),
            idf=_floats(_decoded(plain["idf"], "<f4")).reshape(BUCKETS),
            levels=_decoded(plain["levels"], "u1").reshape(BUCKETS, groups),
            level=_floats(plain["level"]),
        )


def find_pseudo_tasks(rows: sparse.csr_matrix, seed: int) -> PseudoTasks:
    """Group prompts, rows as of `prompt_rows`; equal rows and seed give equal groups.

    Takes about 10 us per prompt. Raises ValueError without a prompt.
    """
    count = rows.shape[0]
    if not count:
        raise ValueError("no prompts to group")
    numbers = rows[:, :FIRST_BUCKET].toarray().astype(np.float64)
    scale = numbers.std(axis=0)
    scale[scale < MIN_SCALE] = math.inf
    mean = numbers.mean(axis=0)
    sigmas = np.clip((numbers - mean) / scale, -MAX_SIGMAS, MAX_SIGMAS)
    weight = NUMBERS_WEIGHT / math.sqrt(len(NUMBER_NAMES))
    words = rows[:, FIRST_BUCKET:FIRST_LOAD].astype(np.float64)
    frequency = np.asarray(words.sum(axis=0)).ravel()
    idf = np.where(frequency > 0, np.log((1.0 + count) / (1.0 + frequency)), 0.0)
    tfidf = _unit(words @ sparse.diags(idf))
    vectors = _unit(sparse.hstack([sparse.csr_matrix(sigmas * weight), tfidf], format="csr"))
    k = max(min(GROUPS, count // MIN_PROMPTS_PER_GROUP), 1)
    centroids = _centroids(vectors, k, np.random.default_rng(seed))
    of_words = centroids[:, FIRST_BUCKET:].T
    level = np.maximum(of_words.max(axis=0), MIN_SCALE) / _LEVELS
    return PseudoTasks(
        mean=mean.astype(np.float32),
        scale=scale.astype(np.float32),
        number_weights=(centroids[:, :FIRST_BUCKET].T * weight).astype(np.float32),
        idf=idf.astype(np.float32),
        levels=np.rint(of_words / level).astype(np.uint8),
        level=level.astype(np.float32),
    )


def _centroids(vectors: sparse.csr_matrix, k: int, random: np.random.Generator) -> Any:
    """Spherical k-means (Dhillon and Modha, Machine Learning 42, 2001), seeded by k-means++."""
    count = vectors.shape[0]
    centroids = vectors[[random.integers(count)]].toarray()
    # A prompt that is like all others in everything has no direction and makes no group.
    length = np.asarray(vectors.multiply(vectors).sum(axis=1)).ravel()
    distance = length - (vectors @ centroids[0])
    while len(centroids) < k:
        weights = np.maximum(distance, 0.0)
        if weights.sum() <= MIN_SCALE:
            break  # no further prompt differs from the chosen ones
        drawn = random.choice(count, p=weights / weights.sum())
        centroids = np.vstack([centroids, vectors[[drawn]].toarray()])
        distance = np.minimum(distance, length - (vectors @ centroids[-1]))
    groups = np.full(count, -1)
    for _ in range(ITERATIONS):
        nearest = np.asarray(vectors @ centroids.T).argmax(axis=1)
        if (nearest == groups).all():
            break
        groups = nearest
        members = sparse.csr_matrix(
            (np.ones(count), (groups, np.arange(count))), shape=(len(centroids), count)
        )
        sums = (members @ vectors).toarray()
        lengths = np.linalg.norm(sums, axis=1, keepdims=True)
        centroids = np.where(lengths > 0.0, sums / np.maximum(lengths, MIN_SCALE), centroids)
    return centroids


def _unit(rows: sparse.csr_matrix) -> sparse.csr_matrix:
    lengths = np.sqrt(np.asarray(rows.multiply(rows).sum(axis=1)).ravel())
    return sparse.csr_matrix(sparse.diags(1.0 / np.maximum(lengths, MIN_SCALE)) @ rows)


def _floats(values: Any) -> Floats:
    return np.asarray(values, dtype=np.float32)


def _decoded(text: str, kind: str) -> NDArray[Any]:
    return np.frombuffer(base64.b64decode(text, validate=True), dtype=kind)
