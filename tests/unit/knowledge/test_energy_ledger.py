"""GPU counters, a replica's energy accounts and their check, and the ledger of all replicas."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from calm_serve.errors import ComponentError
from calm_serve.knowledge.energy_ledger import MAX_REPLICAS, EnergyLedger
from calm_serve.protocol.reports import EnergyReport
from calm_serve.telemetry.nvml import NvmlMeter, visible_gpus
from calm_serve.testing import FakeClock, make_spec
from deployments.slm.energy import (
    REPORT_S,
    ProcessesCpu,
    ReplicaEnergy,
    gpu_meter,
)


class FakeNvml:
    """NVIDIA's binding, as far as it is used, over counters that the test moves."""

    class NVMLError(Exception):
        """As in the binding."""

    def __init__(self, **millijoules: int) -> None:
        self.millijoules = millijoules
        self.broken = ""

    def nvmlInit(self) -> None:
        self._maybe_fail("driver")

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return self.nvmlDeviceGetHandleByUUID(f"gpu{index}")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid not in self.millijoules:
            raise self.NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        self._maybe_fail("counter")
        return self.millijoules[handle]

    def _maybe_fail(self, what: str) -> None:
        if self.broken == what:
            raise self.NVMLError("Not Supported")


def test_a_gpu_meter_adds_its_gpus_and_takes_its_share() -> None:
    nvml = FakeNvml(gpu0=1_000, gpu1=500, other=0)
    meter = NvmlMeter(nvml, ["0", "gpu1"], share=0.5)
    nvml.millijoules |= {"gpu0": 5_000, "gpu1": 2_500, "other": 9_000}
    assert (meter.read_j(), meter.source) == (pytest.approx((4.0 + 2.0) / 2), "counter")


def test_a_counter_that_starts_anew_or_cannot_be_read_never_lowers_the_joules() -> None:
    nvml = FakeNvml(gpu0=1_000)
    meter = NvmlMeter(nvml, ["0"])
    nvml.millijoules["gpu0"] = 3_000
    assert meter.read_j() == pytest.approx(2.0)
    nvml.millijoules["gpu0"] = 100
    assert meter.read_j() == pytest.approx(2.0)
    nvml.broken = "counter"
    assert meter.read_j() == pytest.approx(2.0)
    nvml.broken, nvml.millijoules["gpu0"] = "", 1_100
    assert meter.read_j() == pytest.approx(3.0)


@pytest.mark.parametrize("broken", ["driver", "counter", ""])
def test_without_driver_counter_or_gpu_the_meter_refuses(broken: str) -> None:
    nvml = FakeNvml(gpu0=0)
    nvml.broken = broken
    with pytest.raises(ComponentError, match="no energy counter"):
        NvmlMeter(nvml, ["0"] if broken else ["7"])


def test_visible_gpus_are_those_of_the_environment_or_the_first() -> None:
    assert visible_gpus("2, GPU-abc", 1.0) == ["2", "GPU-abc"]
    assert visible_gpus(None, 2.0) == ["0", "1"]
    assert visible_gpus(None, 0.5) == ["0"]


def test_a_replica_takes_the_counter_of_its_gpu_and_else_the_next_best_meter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    visible = {"CUDA_VISIBLE_DEVICES": "0"}
    monkeypatch.setitem(__import__("sys").modules, "pynvml", FakeNvml(gpu0=0))
    meter = gpu_meter(0.5, visible)
    assert meter is not None
    assert meter.source == "counter"
    assert gpu_meter(0.0, visible) is None
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)  # not installed
    assert gpu_meter(1.0, visible) is None
    resources = make_spec(resources={"num_gpus": 1.0}).resources
    books = ReplicaEnergy(resources, lambda: [psutil.Process()], FakeClock(), visible)
    assert books.report().source in ("rapl", "estimate")


def process(pid: int, cpu_s: float) -> Any:
    return SimpleNamespace(pid=pid, cpu_times=lambda: SimpleNamespace(user=cpu_s, system=0.0))


def test_cpu_time_goes_on_when_an_engine_process_is_replaced() -> None:
    now = [process(1, 10.0), process(2, 50.0)]
    cpu_s = ProcessesCpu(lambda: now)
    before = cpu_s()
    now[:] = [process(1, 11.0)]
    assert cpu_s() - before == pytest.approx(1.0)
    now.append(process(3, 2.0))
    assert cpu_s() - before == pytest.approx(3.0)


def test_a_replica_reports_every_few_seconds_and_agrees_with_the_process_tree(
    tmp_path: Path,
) -> None:
    clock, processes = FakeClock(), [psutil.Process()]
    # A machine without counters, whatever this one has.
    books = ReplicaEnergy(make_spec().resources, lambda: processes, clock, {}, tmp_path)
    assert books.account.source == "estimate"
    books.account.start("a")
    end = psutil.Process().cpu_times().user + 0.3
    while psutil.Process().cpu_times().user < end:
        sum(range(100_000))
    books.account.add_tokens("a", 5)
    clock.advance(1.0)
    books.account.finish("a")
    assert books.tick() is None
    clock.advance(REPORT_S)
    report = books.tick()
    assert report is not None
    assert report.requests_j > 1.0
    assert report.requests_j + report.idle_j == pytest.approx(report.total_j)
    assert report.check_j == pytest.approx(report.total_j, abs=0.3)  # 5 ticks of 10 ms


def energy(
    requests_j: float, idle_j: float, check_j: float, source: str = "estimate"
) -> EnergyReport:
    return EnergyReport(requests_j, idle_j, requests_j + idle_j, check_j, source)


def test_the_ledger_adds_replicas_and_compares_with_the_check() -> None:
    ledger = EnergyLedger(FakeClock(7.0))
    ledger.report("small", "r1", energy(1.0, 1.0, 2.0))
    ledger.report("small", "r1", energy(60.0, 20.0, 88.0))
    ledger.report("small", "r2", energy(10.0, 5.0, 12.0))
    ledger.report("gpu", "r3", energy(10.0, 5.0, 15.0, "counter"))
    row = ledger.rows()["small"]
    assert (row.requests_j, row.idle_j, row.total_j) == (70.0, 25.0, 95.0)
    assert row.attribution_error_ratio == pytest.approx(0.05)
    assert (row.source, row.estimated, row.at) == ("estimate", True, 7.0)
    assert ledger.rows()["gpu"].estimated is False


def test_energy_of_replicas_long_gone_stays_in_the_sum() -> None:
    ledger = EnergyLedger(FakeClock())
    for number in range(3 * MAX_REPLICAS):
        ledger.report("small", f"r{number}", energy(1.0, 0.5, 1.5))
    assert ledger.rows()["small"].total_j == pytest.approx(1.5 * 3 * MAX_REPLICAS)


def test_there_is_no_error_ratio_before_there_is_something_to_compare() -> None:
    ledger = EnergyLedger(FakeClock())
    ledger.report("small", "r1", energy(0.1, 0.1, 0.3))
    assert ledger.rows()["small"].attribution_error_ratio is None
