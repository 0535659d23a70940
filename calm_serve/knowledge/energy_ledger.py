"""Energy ledger: joules of each SLM, summed over its replicas, dead ones included. Bounded."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from calm_serve.protocol.reports import EnergyReport
from calm_serve.protocol.topics import SLMEnergy

MAX_SLMS = 256
MAX_REPLICAS = 64  # of one SLM; of older ones only the sums are kept
SUMS = ("requests_j", "idle_j", "total_j", "check_j")
# With less than this the resolution of the CPU clocks dominates the attribution error.
MIN_CHECK_J = 5.0


class EnergyLedger:
    """Last report of each replica, and the sums of dropped replicas. `clock` returns seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._replicas: OrderedDict[str, OrderedDict[str, tuple[float, EnergyReport]]] = (
            OrderedDict()
        )
        self._gone: dict[str, dict[str, float]] = {}

    def report(self, slm_id: str, replica_id: str, report: EnergyReport) -> None:
        """Take a replica's report."""
        replicas = self._replicas.setdefault(slm_id, OrderedDict())
        self._replicas.move_to_end(slm_id)
        replicas[replica_id] = self._clock(), report
        replicas.move_to_end(replica_id)
        if len(replicas) > MAX_REPLICAS:
            _, (_, last) = replicas.popitem(last=False)
            gone = self._gone.setdefault(slm_id, dict.fromkeys(SUMS, 0.0))
            for name in SUMS:
                gone[name] += getattr(last, name)
        if len(self._replicas) > MAX_SLMS:
            self._gone.pop(self._replicas.popitem(last=False)[0], None)

    def rows(self) -> dict[str, SLMEnergy]:
        """The sums of each SLM, and the error of its attribution to requests and idle time."""
        return {slm_id: self._row(slm_id) for slm_id in self._replicas}

    def _row(self, slm_id: str) -> SLMEnergy:
        replicas = self._replicas[slm_id].values()
        gone = self._gone.get(slm_id, {})
        sums = {n: gone.get(n, 0.0) + sum(getattr(r, n) for _, r in replicas) for n in SUMS}
        sources = {r.source for _, r in replicas}
        check_j = sums.pop("check_j")
        error = None
        if check_j >= MIN_CHECK_J:
            error = round(abs(sums["requests_j"] + sums["idle_j"] - check_j) / check_j, 4)
        return SLMEnergy(
            **{name: round(joules, 3) for name, joules in sums.items()},
            # A sum of joules from different sources is "mixed".
            source=sources.pop() if len(sources) == 1 else "mixed",
            estimated=any(r.source == "estimate" for _, r in replicas),
            attribution_error_ratio=error,
            at=max(at for at, _ in replicas),
        )
