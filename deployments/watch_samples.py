"""The part of GET /v1/fleet's answer that watches over the loop, as gauges."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

SLM_ALARMS = ("quality", "tokens", "speed")
FLEET_ALARMS = ("prompt_mix", "calibration", "constant_selector")
_GAINS = {"best_single": "gain_best_single", "share_matched": "gain_share_matched"}

Sample = tuple[str, tuple[str, ...], float]  # metric name, label values, value


def watch_samples(snapshot: Mapping[str, Any]) -> Iterator[Sample]:
    """Yield the gauges; a missing value yields nothing, an alarm that is off yields 0."""
    on = {(a["kind"], a["slm"]) for a in snapshot.get("alarms", ())}
    for kind in FLEET_ALARMS:
        yield "calm_alarm", (kind, ""), float((kind, "") in on)
    choices = snapshot.get("choices") or {}
    if (error := choices.get("calibration_error")) is not None:
        yield "calm_calibration_error_ratio", (), float(error)
    if (entropy := choices.get("entropy_ratio")) is not None:
        yield "calm_choice_entropy_ratio", (), float(entropy)
        for against, key in _GAINS.items():
            yield "calm_choice_gain", (against,), float(choices[key])
    for slm in snapshot.get("slms", ()):
        slm_id = str(slm["id"])
        for kind in SLM_ALARMS:
            yield "calm_alarm", (kind, slm_id), float((kind, slm_id) in on)
        yield from _slm_samples(slm_id, slm)


def _slm_samples(slm_id: str, slm: Mapping[str, Any]) -> Iterator[Sample]:
    if (factor := slm.get("calibration_factor")) is not None:
        yield "calm_slm_calibration_factor", (slm_id,), float(factor)
    for kind, found in (slm.get("calibration") or {}).items():
        if (coverage := found.get("coverage_ratio")) is not None:
            yield "calm_prediction_coverage_ratio", (slm_id, kind), float(coverage)
    energy = slm.get("energy") or {}
    if energy:
        yield "calm_energy_idle_joules", (slm_id, str(energy["source"])), float(energy["idle_j"])
    if (error := energy.get("attribution_error_ratio")) is not None:
        yield "calm_energy_attribution_error_ratio", (slm_id,), float(error)
