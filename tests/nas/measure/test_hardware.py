"""The machine's description, and which of its CPUs this process may use."""

import json
import math
import os
from pathlib import Path

import psutil
import pytest

from nas.machine import _cpu_quota, default_threads, memory_bytes, physical_cores, usable_cpus
from nas.measure import hardware
from nas.measure.hardware import busy_line, busy_share, cpu_model, describe, fingerprint, governor
from nas.measure.runtime import Settings


def test_fingerprint_is_stable_and_follows_the_settings() -> None:
    one = fingerprint(Settings(threads=1))
    assert one == fingerprint(Settings(threads=1)) == json.loads(json.dumps(one))
    assert all(one.values())
    assert "precision" not in one  # as in studies from before there were others
    for other, changed in (
        (Settings(threads=2), {"threads"}),
        (Settings(threads=1, runtime="torch"), {"runtime", "runtime_version"}),
        (Settings(threads=1, precision="int8"), {"precision"}),
    ):
        assert {key for key, value in fingerprint(other).items() if one.get(key) != value} == changed


def test_description_holds_the_fingerprint() -> None:
    settings = Settings(threads=len(usable_cpus()))
    found = describe(settings)
    assert fingerprint(settings).items() <= found.items()
    assert found["pinned_to"] == usable_cpus()
    assert found["memory_gb"] == round(psutil.virtual_memory().total / 1e9, 1)
    assert len(found["load_average"]) == 3
    assert 0 <= found["busy_share"] <= 1
    assert found["packages"]["onnxruntime"] == found["runtime_version"]
    json.dumps(found)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor : 0\nmodel name\t: Some CPU @ 2GHz\n\nmodel name\t: Other", "Some CPU @ 2GHz"),
        ("CPU implementer\t: 0x41\nCPU part\t: 0xd0c\n", "implementer 0x41 part 0xd0c"),
    ],
)
def test_cpu_model(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert cpu_model(tmp_path / "cpuinfo") == expected
    assert cpu_model(tmp_path / "absent")


STAT = """cpu  9000 9000 9000 9000 9000 9000 9000 9000 9000 9000
cpu0 {0} 10 20 {1} 30 1 2 {2} 999 999
cpu1 50 0 0 100 0 0 0 0 0 0
cpu2 {3} 0 0 0 0 0 0 0 0 0
intr 12345 0 0
"""


@pytest.mark.parametrize(
    ("cpus", "expected"),
    [
        ([0], 0.75),  # 20 ticks of user and 10 stolen, 10 idle
        ([0, 2], 0.865),  # and 34 of 34
        ([1], None),  # no time has passed
    ],
)
def test_busy_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpus: list[int], expected: float | None) -> None:
    stat = tmp_path / "stat"
    stat.write_text(STAT.format(100, 200, 300, 400))
    monkeypatch.setattr(hardware, "usable_cpus", lambda: cpus)
    monkeypatch.setattr(hardware.time, "process_time", lambda: 0)
    monkeypatch.setattr(hardware.time, "sleep", lambda s: stat.write_text(STAT.format(120, 210, 310, 434)))
    assert busy_share(stat) == expected


def test_own_work_is_not_the_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat, clock = tmp_path / "stat", iter([0.0, 0.2])
    stat.write_text(STAT.format(100, 200, 300, 400))
    monkeypatch.setattr(hardware, "usable_cpus", lambda: [0])
    monkeypatch.setattr(hardware.time, "process_time", lambda: next(clock))
    monkeypatch.setattr(hardware.os, "sysconf", lambda name: 100)
    monkeypatch.setattr(hardware.time, "sleep", lambda s: stat.write_text(STAT.format(120, 210, 310, 434)))
    assert busy_share(stat) == 0.25
    assert busy_share(tmp_path / "absent") is None


@pytest.mark.parametrize(
    ("share", "threads", "told"),
    [
        (0.02, 1, False),
        (0.09, 1, False),
        (0.09, 8, True),  # 0.7 of the CPUs that are measured on
        (0.01, 8, False),
        (0.35, 1, True),
        (None, 1, False),
    ],
)
def test_a_busy_machine_is_told(share: float | None, threads: int, told: bool) -> None:
    line = busy_line({"busy_share": share, "usable_cpus": 8, "threads": threads})
    assert (line is not None) == told
    if told:
        assert line.startswith(f"the machine is busy: other processes use {share:.0%} of its 8 CPUs")
    assert busy_line({"usable_cpus": 8, "threads": threads}) is None  # a description of old


def test_governors(tmp_path: Path) -> None:
    for cpu, name in enumerate(["performance", "powersave", "performance"]):
        (tmp_path / f"cpu{cpu}").write_text(f"{name}\n")
    assert governor([0, 2, 9], f"{tmp_path}/cpu{{}}") == "performance"
    assert governor([0, 1], f"{tmp_path}/cpu{{}}") == "performance, powersave"
    assert governor([9], f"{tmp_path}/cpu{{}}") is None


def test_memory() -> None:
    assert memory_bytes() == psutil.virtual_memory().total


def test_cpus_follow_the_affinity() -> None:
    allowed = os.sched_getaffinity(0)
    assert sorted(usable_cpus()) == sorted(allowed)
    assert 1 <= default_threads() <= physical_cores() <= len(allowed)
    try:
        os.sched_setaffinity(0, {max(allowed)})
        assert usable_cpus() == [max(allowed)]
        assert default_threads() == 1
    finally:
        os.sched_setaffinity(0, allowed)


def test_hyper_threads_come_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3, 5})
    monkeypatch.setattr(Path, "exists", lambda path: True)
    siblings = {0: "0,4", 1: "1,5", 2: "2,3", 3: "2,3", 5: "1,5"}
    monkeypatch.setattr(Path, "read_text", lambda path: siblings[int(path.parts[-3][3:])])
    assert usable_cpus() == [0, 1, 2, 5, 3]
    assert physical_cores() == 3


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, math.inf),
        ("0::/a/b\n", {"a/cpu.max": "400000 100000\n", "a/b/cpu.max": "max 100000\n"}, 4),
        ("0::/a/b\n", {"cpu.max": "50000 100000\n", "a/b/cpu.max": "200000 100000\n"}, 0.5),
        (
            "5:memory:/x\n4:cpu,cpuacct:/x\n",
            {
                "cpu,cpuacct/x/cpu.cfs_quota_us": "200000\n",
                "cpu,cpuacct/x/cpu.cfs_period_us": "100000\n",
            },
            2,
        ),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "1\n"}, math.inf),
        ("0::/gone\n", {}, math.inf),
    ],
)
def test_cpu_quota(tmp_path: Path, own: str, files: dict[str, str], expected: float) -> None:
    for name, text in files.items():
        path = tmp_path / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "own").write_text(own)
    assert _cpu_quota(tmp_path / "fs", tmp_path / "own") == expected
    assert _cpu_quota(tmp_path / "fs", tmp_path / "absent") == math.inf
