"""Baseline selection policies for comparison, and the random draw that some share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from calm_serve.config import Fleet, SLMSpec
from calm_serve.routing.scoring import draw
from calm_serve.types import Candidate, Outcome, RoutingContext, SLMState

Choice = tuple[Sequence[str], float]  # ids best first; probability of the first one


class Baseline(ABC):
    """Interface of a baseline. Single-threaded; the time is bounded by the number of SLMs."""

    def __init__(self) -> None:
        self._specs: Mapping[str, SLMSpec] = {}

    def set_fleet(self, fleet: Fleet) -> None:
        """Swap the fleet: SLMs were added or removed."""
        self._specs = {spec.id: spec for spec in fleet.slms}

    @abstractmethod
    def choose(
        self,
        context: RoutingContext,
        candidates: Sequence[Candidate],
        states: Mapping[str, SLMState],
    ) -> Choice:
        """Rank the candidates: at least one, all with predictions, none excluded."""

    def observe(self, outcome: Outcome) -> None:
        """Learn from a finished request, of this policy or of another one."""
        del outcome

    def _by_size(self, slm_id: str) -> tuple[int, str]:
        return -self._specs[slm_id].parameters, slm_id


def random_rotation(ids: Sequence[str], context: RoutingContext) -> Choice:
    """Rotate `ids` to start at a random one."""
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
        """A random one first; the others follow in cyclic order of their ids."""
        del states
        return random_rotation(sorted(c.slm_id for c in candidates), context)


class RoundRobin(Baseline):
    """The candidate that was chosen longest ago.

    The propensity is 1/n, because turns do not depend on the request.
    """

    def __init__(self) -> None:
        super().__init__()
        self._turn = 0
        self._last: dict[str, int] = {}

    def set_fleet(self, fleet: Fleet) -> None:
        """Swap the fleet; a new SLM has the next turn."""
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
        first, propensity = random_rotation(idle, context)
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
    """One SLM for every request that it may serve; for the others the largest."""

    def __init__(self, slm_id: str) -> None:
        super().__init__()
        self._slm_id = slm_id

    def _by_size(self, slm_id: str) -> tuple[int, str]:
        size, name = super()._by_size(slm_id)
        return -1 << 62 if slm_id == self._slm_id else size, name


class Shares(Baseline):
    """Random with given shares: matches another policy's SLM mix without reading the request.

    Shares are scaled to the candidates. When no candidate has a share, all are equally likely.
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
        """The drawn candidate, then the others by share."""
        del states
        shares = {c.slm_id: self._shares.get(c.slm_id, 0.0) for c in candidates}
        order = sorted(shares, key=lambda i: (-shares[i], i))
        total = sum(shares[i] for i in order)  # in a fixed order, since float sums depend on it
        if total <= 0.0:
            return random_rotation(order, context)
        left = draw(context.request_id) * total
        for chosen in order:
            left -= shares[chosen]
            if left < 0.0:
                break
        else:  # the sum may round down
            chosen = order[0]
        return [chosen, *(i for i in order if i != chosen)], shares[chosen] / total


class Broadest(Baseline):
    """The policy `rules` where no rule matches: most skills, then most parameters."""

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
    """The lowest predicted end-to-end latency, regardless of quality."""

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
