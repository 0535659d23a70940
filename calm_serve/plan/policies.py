"""Policies to compare with: who else could choose among the candidates that passed every filter.

All of them see what `calm` sees: the context, the candidates with their predictions, the states.
None explores, and none knows a quality floor. Draws are a hash of the decision's id, as in
`objective.explore`, so a record replays to itself; what `round_robin` and `paper` remember is a
matter of the requests before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from calm_serve.config import Fleet, Goals, Rule, SelectionPolicy, SelectionPolicyName
from calm_serve.plan.baseline import Baseline, Choice, draw, from_anywhere
from calm_serve.plan.paper import Paper
from calm_serve.plan.similarity import Reader
from calm_serve.types import Candidate, RoutingContext, SLMState


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


def rules_of(goals: Goals, fleet: Fleet) -> tuple[Rule, ...]:
    """The declarative rules, which only `calm` and `rules` follow."""
    return (
        fleet.rules
        if goals.policy.name in (SelectionPolicyName.CALM, SelectionPolicyName.RULES)
        else ()
    )


def build(goals: Goals, fleet: Fleet, read: Reader) -> Baseline | None:
    """The policy that the goals name, None for `calm`; `read` hashes texts as contexts are."""
    make: dict[SelectionPolicyName, Callable[[SelectionPolicy], Baseline]] = {
        SelectionPolicyName.PAPER: lambda _: Paper(read),
        SelectionPolicyName.RANDOM: lambda _: Uniform(),
        SelectionPolicyName.ROUND_ROBIN: lambda _: RoundRobin(),
        SelectionPolicyName.LEAST_LOADED: lambda _: LeastLoaded(),
        SelectionPolicyName.LARGEST: lambda _: Largest(),
        SelectionPolicyName.SINGLE: lambda policy: Single(policy.slm),
        SelectionPolicyName.SHARES: lambda policy: Shares(policy.shares),
        SelectionPolicyName.RULES: lambda _: Broadest(),
        SelectionPolicyName.FASTEST: lambda _: Fastest(),
    }
    if goals.policy.name is SelectionPolicyName.CALM:
        return None
    found = make[goals.policy.name](goals.policy)
    found.set_fleet(fleet)
    return found


class Shelf:
    """Keeps what policies remember while another one chooses; at most one of each name."""

    def __init__(self, read: Reader) -> None:
        self._read = read
        self._kept: dict[SelectionPolicyName, tuple[SelectionPolicy, Baseline]] = {}

    def take(self, goals: Goals, fleet: Fleet) -> Baseline | None:
        """The policy that the goals name, as it was when it last chose; None for `calm`."""
        policy, kept = self._kept.get(goals.policy.name, (None, None))
        if kept is None or policy != goals.policy:
            kept = build(goals, fleet, self._read)
            if kept is not None:
                self._kept[goals.policy.name] = goals.policy, kept
        else:
            kept.set_fleet(fleet)
        return kept
