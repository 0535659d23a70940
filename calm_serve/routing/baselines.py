"""What every policy to compare with keeps to, and the draw that random ones share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from calm_serve.config import Fleet, SLMSpec
from calm_serve.routing.scoring import draw
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


def from_anywhere(ids: Sequence[str], context: RoutingContext) -> Choice:
    """Start at a random one of `ids`; the others follow in turn."""
    start = int(draw(context.request_id) * len(ids))
    return [*ids[start:], *ids[:start]], 1.0 / len(ids)


class Uniform(Baseline):
    """Every candidate with the same probability."""

    def choose(
        self,
        context: RoutingContext,
        candidates: Sequence[Candidate],
        states: Mapping[str, SLMState],
    ) -> Choice:
        """Start anywhere; the others follow in the order of their ids."""
        del states
        return from_anywhere(sorted(c.slm_id for c in candidates), context)


class RoundRobin(Baseline):
    """Whoever of the candidates has waited longest for a turn.

    The propensity is 1/n: turns know nothing of the request that comes next.
    """

    def __init__(self) -> None:
        super().__init__()
        self._turn = 0
        self._last: dict[str, int] = {}

    def set_fleet(self, fleet: Fleet) -> None:
        """Follow SLMs that came or went; a new one has the next turn."""
        super().set_fleet(fleet)
        self._last = {i: turn for i, turn in self._last.items() if i in self._specs}

    def choose(
        self,
        context: RoutingContext,
        candidates: Sequence[Candidate],
        states: Mapping[str, SLMState],
    ) -> Choice:
        """Longest without a turn first."""
        del context, states
        order = sorted((self._last.get(c.slm_id, -1), c.slm_id) for c in candidates)
        ids = [slm_id for _, slm_id in order]
        self._last[ids[0]] = self._turn
        self._turn += 1
        return ids, 1.0 / len(ids)


class LeastLoaded(Baseline):
    """The lowest share of busy slots; equal ones with the same probability."""

    def choose(
        self,
        context: RoutingContext,
        candidates: Sequence[Candidate],
        states: Mapping[str, SLMState],
    ) -> Choice:
        """Lowest load first."""
        order = sorted((states[c.slm_id].load_ratio, c.slm_id) for c in candidates)
        idle = [slm_id for load, slm_id in order if load == order[0][0]]
        first, propensity = from_anywhere(idle, context)
        return [*first, *(slm_id for _, slm_id in order[len(idle) :])], propensity


class Largest(Baseline):
    """The candidate with most parameters."""

    def choose(
        self,
        context: RoutingContext,
        candidates: Sequence[Candidate],
        states: Mapping[str, SLMState],
    ) -> Choice:
        """Most parameters first."""
        del context, states
        return sorted((c.slm_id for c in candidates), key=self._by_size), 1.0


class Single(Largest):
    """One SLM for everything it may serve; for the rest, the largest."""

    def __init__(self, slm_id: str) -> None:
        super().__init__()
        self._slm_id = slm_id

    def _by_size(self, slm_id: str) -> tuple[int, str]:
        smaller, name = super()._by_size(slm_id)
        return -1 << 62 if slm_id == self._slm_id else smaller, name


class Shares(Baseline):
    """Random with given shares, so that it spends what another policy does and reads nothing.

    Shares are scaled to the candidates at hand; candidates without any are as likely as another.
    """

    def __init__(self, shares: Mapping[str, float]) -> None:
        super().__init__()
        self._shares = shares

    def choose(
        self,
        context: RoutingContext,
        candidates: Sequence[Candidate],
        states: Mapping[str, SLMState],
    ) -> Choice:
        """The drawn one, then the others by share."""
        del states
        shares = {c.slm_id: self._shares.get(c.slm_id, 0.0) for c in candidates}
        order = sorted(shares, key=lambda i: (-shares[i], i))
        total = sum(shares[i] for i in order)  # in one order: floats do not add up alike in all
        if total <= 0.0:
            return from_anywhere(order, context)
        left = draw(context.request_id) * total
        for chosen in order:
            left -= shares[chosen]
            if left < 0.0:
                break
        else:  # the sum may round down
            chosen = order[0]
        return [chosen, *(i for i in order if i != chosen)], shares[chosen] / total


class Broadest(Baseline):
    """Where no rule decides: whoever lists most skills, then most parameters."""

    def choose(
        self,
        context: RoutingContext,
        candidates: Sequence[Candidate],
        states: Mapping[str, SLMState],
    ) -> Choice:
        """Most skills first."""
        del context, states
        return sorted((c.slm_id for c in candidates), key=self._by_breadth), 1.0

    def _by_breadth(self, slm_id: str) -> tuple[int, tuple[int, str]]:
        return -len(self._specs[slm_id].skills), self._by_size(slm_id)


class Fastest(Baseline):
    """The shortest predicted answer, whatever it is worth."""

    def choose(
        self,
        context: RoutingContext,
        candidates: Sequence[Candidate],
        states: Mapping[str, SLMState],
    ) -> Choice:
        """Shortest predicted end-to-end latency first."""
        del context, states
        times = {c.slm_id: c.prediction.e2e_s for c in candidates if c.prediction}
        return sorted(times, key=lambda i: (times[i], i)), 1.0
