"""What watches over the loop, as one router shows it: alarms, calibration, energy, choices."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from calm_serve.telemetry import Alarms, ContentGainMonitor, quantiles
from calm_serve.types import Decision

log = logging.getLogger("ray.serve")

CONSTANT = "constant_selector"


class WatchView:
    """The knowledge actor's findings of all routers, and this router's own of its choices.

    `clock` returns Unix time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._found: Mapping[str, Any] = {}
        self._energy: Mapping[str, Mapping[str, Any]] = {}
        self._selector = ContentGainMonitor()
        self._alarms = Alarms(clock)

    @property
    def calibration_factors(self) -> Mapping[str, float]:
        """SLM -> factor on P(success); 1 where it is missing."""
        factors: Mapping[str, float] = self._found.get("calibration_factors", {})
        return factors

    def set(self, found: Mapping[str, Any]) -> None:
        """Take the board's "watch"; see `calm_serve.learning.monitor`."""
        self._found = found

    def set_energy(self, energy: Mapping[str, Mapping[str, Any]]) -> None:
        """Take the board's "energy"; see `EnergyLedger.rows`."""
        self._energy = energy

    def chose(self, decision: Decision) -> None:
        """Count a decision of this router."""
        self._selector.observe(decision)

    def fleet(self) -> dict[str, Any]:
        """The fleet's part of `/v1/fleet`: alarms that are on, and what reading prompts gains."""
        gains = self._selector.gains()
        if gains is not None and (verdict := gains.verdict):
            if self._alarms.start(CONSTANT, "", gains.entropy_ratio, verdict):
                log.warning("content adds nothing to the choice: %s", verdict)
        else:
            self._alarms.end(CONSTANT)
        return {
            "alarms": [*self._found.get("alarms", ()), *self._alarms.rows()],
            "choices": {
                **(asdict(gains) if gains else {}),
                "calibration_error": self._found.get("calibration_error"),
            },
        }

    def row(self, slm_id: str) -> dict[str, Any]:
        """The SLM's part of `/v1/fleet`."""
        energy = dict(self._energy.get(slm_id, {}))
        if "at" in energy:
            energy["age_s"] = round(max(self._clock() - energy.pop("at"), 0.0), 1)
        return {
            "calibration_factor": self.calibration_factors.get(slm_id, 1.0),
            "calibration": self._found.get("calibration", {}).get(slm_id, {}),
            "energy": energy,
        }

    def explain(self, explained: dict[str, Any]) -> dict[str, Any]:
        """Add p50 and p95 to each predicted candidate of an explained decision, in place.

        They are those of now, not of the decision's time, and are not part of its record.
        """
        calibration = self._found.get("calibration", {})
        for candidate in explained.get("candidates", ()):
            factors = calibration.get(candidate["slm_id"])
            if candidate["prediction"] is not None and factors:
                candidate["quantiles"] = quantiles(candidate["prediction"], factors)
        return explained
