"""What every policy to compare with keeps to, and the draw that random ones share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from zlib import crc32

from calm_serve.config import Fleet, SLMSpec
from calm_serve.types import Candidate, Outcome, RoutingContext, SLMState

Choice = tuple[Sequence[str], float]  # ids best first; probability of the first one


class Baseline(ABC):
    """What the loop asks of a policy. Single-threaded, bounded by the number of SLMs."""

    def __init__(self) -> None:
        self._specs: Mapping[str, SLMSpec] = {}

    def set_fleet(self, fleet: Fleet) -> None:
        """Follow SLMs that came or went."""
        self._specs = {spec.id: spec for spec in fleet.slms}

    @abstractmethod
    def choose(
        self,
        context: RoutingContext,
        candidates: Sequence[Candidate],
        states: Mapping[str, SLMState],
    ) -> Choice:
        """Rank the candidates: at least one, all scored, none excluded."""

    def observe(self, outcome: Outcome) -> None:
        """Learn from a finished request, whoever chose its SLM."""
        del outcome

    def _by_size(self, slm_id: str) -> tuple[int, str]:
        return -self._specs[slm_id].parameters, slm_id


def draw(decision_id: str) -> float:
    """A number in [0, 1) that follows from the decision's id alone."""
    return crc32(decision_id.encode()) / 2**32


def from_anywhere(ids: Sequence[str], context: RoutingContext) -> Choice:
    """Start at a random one of `ids`; the others follow in turn."""
    start = int(draw(context.request_id) * len(ids))
    return [*ids[start:], *ids[:start]], 1.0 / len(ids)
