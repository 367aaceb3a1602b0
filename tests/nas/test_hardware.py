"""The machine's description, and which of its CPUs this process may use."""

import json
import math
import os
from pathlib import Path

import pytest

from nas.hardware import cpu_model, describe, fingerprint
from nas.measure import Settings
from nas.process import _cpu_quota, default_threads, physical_cores, usable_cpus


def test_fingerprint_is_stable_and_follows_the_settings() -> None:
    one = fingerprint(Settings(threads=1))
    assert one == fingerprint(Settings(threads=1)) == json.loads(json.dumps(one))
    assert all(one.values())
    for other, changed in (
        (Settings(threads=2), {"threads"}),
        (Settings(threads=1, runtime="torch"), {"runtime", "runtime_version"}),
    ):
        assert {key for key, value in fingerprint(other).items() if one[key] != value} == changed


def test_description_holds_the_fingerprint() -> None:
    settings = Settings()
    found = describe(settings)
    assert fingerprint(settings).items() <= found.items()
    assert found["memory_gb"] > 0.1
    assert len(found["load_average"]) == 3
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
