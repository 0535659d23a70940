"""An engine that has requests and makes no step is found, an idle or slow one is not."""

from __future__ import annotations

from calm_serve.testing import FakeClock
from deployments.slm.stall import MAX_GAP_S, STALL_S, StallDetector


class Engine:
    """A detector that is asked once a second."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.detector = StallDetector(self.clock)

    def after(self, seconds: int, requests: int, steps: int) -> float:
        for _ in range(seconds):
            self.clock.advance(1.0)
            stalled_s = self.detector.stalled_s(requests, steps)
        return stalled_s


def test_an_engine_with_requests_and_no_steps_is_stalled_from_its_last_step_on() -> None:
    engine = Engine()
    assert engine.after(1, 2, 10) == 0.0
    assert engine.after(40, 2, 10) == 40.0
    assert engine.after(40, 1, 10) == 80.0


def test_every_step_counts_as_progress() -> None:
    engine = Engine()
    for step in range(10):
        assert engine.after(40, 1, step) == 39.0


def test_an_idle_engine_makes_no_steps_and_is_not_stalled() -> None:
    engine = Engine()
    assert engine.after(1000, 0, 10) == 0.0
    assert engine.after(5, 1, 10) == 5.0


def test_a_machine_that_was_suspended_is_no_engine_that_hangs() -> None:
    engine = Engine()
    engine.after(2, 1, 10)
    engine.clock.advance(10 * STALL_S)
    assert engine.detector.stalled_s(1, 10) == 1.0 + MAX_GAP_S
