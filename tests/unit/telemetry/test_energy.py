"""Meters without a counter, and who is charged for what."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_serve.telemetry.energy import (
    CpuShare,
    CpuTimeMeter,
    RaplMeter,
    TokenShareAttributor,
    best_meter,
)
from calm_serve.testing import FakeClock


class Dial:
    """A reading that the test moves."""

    def __init__(self, value: float = 0.0) -> None:
        self.value = value

    def __call__(self) -> float:
        return self.value


class FakeMeter:
    """A meter that the test advances."""

    source = "counter"

    def __init__(self) -> None:
        self.joules = 50.0

    def read_j(self) -> float:
        return self.joules


def attributor(meter: FakeMeter) -> TokenShareAttributor:
    """One that reads the meter each time."""
    return TokenShareAttributor(meter, FakeClock(), min_read_s=0.0)


def rapl_files(values: dict[str, int]) -> Callable[[Path], str]:
    return lambda path: f"{values[f'{path.parent.name}/{path.name}']}\n"


def test_estimate_is_cpu_seconds_times_watts_since_construction() -> None:
    cpu_s = Dial(100.0)
    meter = CpuTimeMeter(cpu_s, watts_per_core=5.0)
    cpu_s.value = 103.0
    assert (meter.read_j(), meter.source) == (15.0, "estimate")


def test_estimate_never_falls_when_a_child_process_dies() -> None:
    cpu_s = Dial(10.0)
    meter = CpuTimeMeter(cpu_s, watts_per_core=1.0)
    cpu_s.value = 14.0
    meter.read_j()
    cpu_s.value = 2.0
    assert meter.read_j() == 4.0
    cpu_s.value = 3.0
    assert meter.read_j() == 5.0


def test_share_is_this_process_part_of_the_busy_time() -> None:
    own, host = Dial(), Dial()
    share = CpuShare(own, host)
    own.value, host.value = 1.0, 4.0
    assert share() == 0.25
    assert share() == 0.0
    own.value, host.value = 1.02, 4.01
    assert share() == 1.0


def test_rapl_adds_packages_and_survives_a_wrap() -> None:
    values = {
        "p0/max_energy_range_uj": 10_000_000,
        "p0/energy_uj": 9_000_000,
        "p1/max_energy_range_uj": 10_000_000,
        "p1/energy_uj": 0,
    }
    meter = RaplMeter([Path("p0"), Path("p1")], rapl_files(values), lambda: 0.5)
    values["p0/energy_uj"] = 1_000_000
    values["p1/energy_uj"] = 4_000_000
    assert meter.read_j() == pytest.approx((2.0 + 4.0) * 0.5)
    assert meter.source == "rapl"


def powercap(root: Path, *, readable: bool) -> Path:
    for name in ("intel-rapl:0", "intel-rapl:0:0"):
        (root / name).mkdir(parents=True)
        (root / name / "max_energy_range_uj").write_text("1000000\n")
        if readable:
            (root / name / "energy_uj").write_text("500\n")
    return root


def test_best_meter_takes_rapl_packages_without_their_subzones(tmp_path: Path) -> None:
    own, host = Dial(), Dial()
    root = powercap(tmp_path, readable=True)
    meter = best_meter(own, host, powercap=root)
    (root / "intel-rapl:0" / "energy_uj").write_text("2000500\n")
    (root / "intel-rapl:0:0" / "energy_uj").write_text("1000500\n")
    own.value = host.value = 1.0
    assert (meter.read_j(), meter.source) == (pytest.approx(2.0), "rapl")


def test_best_meter_estimates_where_rapl_cannot_be_read(tmp_path: Path) -> None:
    meter = best_meter(Dial(), Dial(), powercap=powercap(tmp_path, readable=False))
    assert meter.source == "estimate"


def test_best_meter_estimates_where_there_is_no_rapl(tmp_path: Path) -> None:
    assert best_meter(Dial(), Dial(), powercap=tmp_path).source == "estimate"


def test_joules_follow_the_tokens_each_request_produced() -> None:
    meter = FakeMeter()
    account = attributor(meter)
    account.start("a")
    account.start("b")
    account.add_tokens("a", 30)
    account.add_tokens("b", 10)
    meter.joules += 8.0
    done = account.finish("a")
    assert (done.energy_j, done.tokens, done.source) == (6.0, 30, "counter")
    assert account.running_j == 2.0


def test_energy_spent_before_a_request_came_is_idle() -> None:
    meter = FakeMeter()
    account = attributor(meter)
    meter.joules += 3.0
    account.start("a")
    meter.joules += 2.0
    account.add_tokens("a", 1)
    assert account.finish("a").energy_j == 2.0
    assert account.idle_j == 3.0


def test_prefill_is_shared_equally_while_no_request_has_a_token() -> None:
    meter = FakeMeter()
    account = attributor(meter)
    account.start("a")
    account.start("b")
    meter.joules += 4.0
    account.tick()
    assert account.finish("a").energy_j == 2.0


def test_tokens_are_charged_once() -> None:
    meter = FakeMeter()
    account = attributor(meter)
    account.start("a")
    account.start("b")
    account.add_tokens("a", 5)
    meter.joules += 1.0
    account.tick()
    account.add_tokens("b", 5)
    meter.joules += 1.0
    assert account.finish("a").energy_j == 1.0
    assert account.finish("b").energy_j == 1.0


def test_starting_a_running_request_again_is_an_error() -> None:
    account = attributor(FakeMeter())
    account.start("a")
    with pytest.raises(ValueError, match="runs already"):
        account.start("a")


steps = st.lists(
    st.tuples(
        st.sampled_from(("start", "tokens", "finish", "tick")),
        st.integers(0, 4),
        st.integers(0, 50),
        st.floats(0, 100, allow_nan=False),
        st.floats(0, 1, allow_nan=False),
    ),
    max_size=60,
)


@given(steps, st.sampled_from((0.0, 0.05, 0.5)))
def test_the_accounts_balance_whatever_starts_and_ends_between_two_readings(
    actions: list[tuple[str, int, int, float, float]], min_read_s: float
) -> None:
    meter, clock = FakeMeter(), FakeClock()
    account = TokenShareAttributor(meter, clock, min_read_s)
    running: set[str] = set()
    finished_j = 0.0
    for verb, request, tokens, joules, seconds in actions:
        name = str(request)
        meter.joules += joules
        clock.advance(seconds)
        if verb == "start" and name not in running:
            account.start(name)
            running.add(name)
        elif verb == "tokens" and name in running:
            account.add_tokens(name, tokens)
        elif verb == "finish" and name in running:
            finished_j += account.finish(name).energy_j
            running.remove(name)
        elif verb == "tick":
            account.tick()
        charged_j = finished_j + account.running_j + account.idle_j
        assert charged_j == pytest.approx(account.total_j + account.ahead_j)
        assert account.requests_j == pytest.approx(finished_j)
        assert account.ahead_j >= 0.0
    account.tick()
    assert account.total_j == pytest.approx(meter.joules - 50.0)


class SteadyMeter:
    """A machine of 10 W while the clock runs; counts how often it was read."""

    source = "estimate"

    def __init__(self, clock: FakeClock) -> None:
        self._clock = clock
        self.reads = 0

    def read_j(self) -> float:
        self.reads += 1
        return 10.0 * self._clock()


def test_between_two_readings_a_request_is_charged_the_recent_power() -> None:
    clock = FakeClock()
    meter = SteadyMeter(clock)
    account = TokenShareAttributor(meter, clock, min_read_s=0.05)
    charged = []
    for number in range(200):
        account.start(str(number))
        clock.advance(0.02)
        account.add_tokens(str(number), 8)
        charged.append(account.finish(str(number)).energy_j)
    assert charged == pytest.approx([0.2] * 200)
    assert meter.reads < 200 * 0.02 / 0.05 + 5
    assert account.ahead_j <= 10.0 * 0.05


def test_short_requests_with_pauses_between_them_pay_for_themselves() -> None:
    """10 W while a request runs, nothing in between; a request is shorter than two readings."""
    meter, clock = FakeMeter(), FakeClock()
    account = TokenShareAttributor(meter, clock, min_read_s=0.05)
    for number in range(100):
        account.start(str(number))
        clock.advance(0.03)
        meter.joules += 0.3
        account.add_tokens(str(number), 8)
        assert account.finish(str(number)).energy_j == pytest.approx(0.3, rel=0.05)
        clock.advance(0.07)
    account.tick()
    assert account.idle_j == pytest.approx(0.0, abs=0.3)


@pytest.mark.parametrize("whole", [True, False], ids=["in one piece", "streamed"])
def test_an_answer_costs_its_tokens_however_it_is_sent(whole: bool) -> None:
    """A step of 10 ms and 1 J makes one token for every running request."""
    meter, clock, random = FakeMeter(), FakeClock(), Random(1)
    account = TokenShareAttributor(meter, clock)
    left: dict[str, int] = {}
    made: dict[str, int] = {}
    true_j: dict[str, float] = {}
    charged_j: dict[str, float] = {}
    for step in range(4000):
        if random.random() < 0.05:
            account.start(str(step))
            left[str(step)] = made[str(step)] = random.randint(5, 60)
            true_j[str(step)] = 0.0
        meter.joules += 1.0 if left else 0.0
        clock.advance(0.01)
        for key in list(left):
            left[key] -= 1
            true_j[key] += 1.0 / len(left)
            if not whole:
                account.add_tokens(key, 1)
        for key in [k for k, tokens in left.items() if not tokens]:
            if whole:
                account.add_tokens(key, made[key])
            charged_j[key] = account.finish(key).energy_j
            del left[key]
    wrong_j = [abs(charged_j[key] - true_j[key]) for key in charged_j]
    assert sum(wrong_j) < 0.2 * sum(true_j[key] for key in charged_j)
