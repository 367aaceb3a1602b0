"""Memory, file size and energy of a measured network; energy from a faked sysfs tree and a faked nvidia-smi."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from nas.measure import usage, worker
from nas.measure.device import compare
from nas.measure.protocol import _Model
from nas.measure.runtime import Settings
from nas.measure.samples import Measurement
from nas.measure.usage import Counter, Energy, Unread, counters, gpu_run_mj, peak_memory
from nas.measure.worker import TimedModel
from nas.process import WorkerError


def product(path: Path, width: int) -> Path:
    """An ONNX file of one matrix product, width x width floats."""
    weights = np.random.default_rng(0).standard_normal((width, width), dtype=np.float32)
    shape = [1, width]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["images", "weights"], ["logits"])],
        "product",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(weights, "weights")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def package(root: Path, number: int, uj: int, name: str = "package-0", most: int = 999_999) -> Path:
    """One zone of a faked powercap tree."""
    zone = root / f"intel-rapl:{number}"
    zone.mkdir(parents=True)
    for file, value in (("name", name), ("energy_uj", uj), ("max_energy_range_uj", most)):
        (zone / file).write_text(f"{value}\n")
    return zone


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_memory_and_file_size_are_those_of_the_network(tmp_path: Path, runtime: str) -> None:
    paths = {name: product(tmp_path / f"{name}.onnx", width) for name, width in (("small", 8), ("large", 2048))}
    found = compare(paths, Settings(runtime), rounds=3)
    small, large = found["small"], found["large"]
    assert isinstance(small, Measurement)
    assert isinstance(large, Measurement)
    assert large.file_mb == pytest.approx(2048 * 2048 * 4 / 1e6, rel=0.01)
    assert small.file_mb is not None
    assert small.file_mb < 0.01
    assert small.memory_mb is not None
    assert large.memory_mb is not None
    assert large.memory_mb - small.memory_mb > 16
    assert 0 <= small.memory_mb < 8  # none of the runtime's own
    assert Measurement.from_dict(large.to_dict()) == large


def test_a_system_that_does_not_tell_memory(tmp_path: Path) -> None:
    (tmp_path / "status").write_text("Name:\tpython\nVmHWM:\t   2048 kB\n")
    assert peak_memory(tmp_path / "status") == 2048 * 1024
    for content in ("Name:\tpython\n", "VmHWM:\n"):
        (tmp_path / "status").write_text(content)
        with pytest.raises(Unread, match=r"^memory is not told: .*status does not say it on this system$"):
            peak_memory(tmp_path / "status")
    with pytest.raises(Unread, match="memory is not told"):
        peak_memory(tmp_path / "absent")


def test_the_energy_of_all_packages_counts(tmp_path: Path) -> None:
    first, second = package(tmp_path, 0, 999_000), package(tmp_path, 1, 500, "package-1")
    package(tmp_path, 2, 7, "psys")
    package(tmp_path / "intel-rapl:0", 0, 7, "core")
    energy = Energy(counters(tmp_path))
    assert energy.run_mj is None
    energy.begin()
    (first / "energy_uj").write_text("1000\n")  # it began again after 999,999
    (second / "energy_uj").write_text("2500\n")
    energy.end(runs=4)
    assert energy.run_mj == (2000 + 2000) / 1000 / 4
    energy.begin()
    energy.end(runs=4)
    assert energy.run_mj == 0.5


def test_energy_that_cannot_be_read_is_said_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unread, match=rf"^energy is not told: {tmp_path} has no RAPL counters of a CPU package$"):
        counters(tmp_path)
    package(tmp_path, 0, 5)

    def refuse(_: Counter) -> int:
        raise PermissionError

    monkeypatch.setattr(Counter, "read", refuse)  # as of anybody but root
    with pytest.raises(Unread, match=rf"energy_uj is for root alone \(`sudo chmod a\+r {tmp_path}/\*/energy_uj`\)$"):
        counters(tmp_path)


@pytest.fixture
def timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TimedModel:
    """A network of which every inference takes 3,000 µJ, in batches of two."""
    zone = package(tmp_path, 0, 0, most=10**9)

    def infer() -> None:
        (zone / "energy_uj").write_text(str(int((zone / "energy_uj").read_text()) + 3000))

    monkeypatch.setattr(worker, "counters", lambda: counters(tmp_path))
    model = TimedModel()
    model.start({"batch_size": 2})
    model.infer, model.untimed, model.timed = infer, 2, 3
    return model


def test_the_measuring_process_tells_the_energy_of_an_image(timed: TimedModel) -> None:
    assert timed.usage()["energy_mj"] is None
    for _ in range(2):
        assert len(timed.time_slice()["samples_ms"]) == 3
    found = timed.usage()
    assert found["energy_mj"] == 1.5
    assert found["memory_mb"] >= 0
    assert found["unread"] == []


def test_a_measuring_process_that_can_read_nothing_measures(timed: TimedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def unread(*_: object) -> int:
        raise Unread("it is not told")

    monkeypatch.setattr(worker, "counters", unread)
    monkeypatch.setattr(worker, "peak_memory", unread)
    model = TimedModel()
    model.start({})
    model.infer, model.untimed, model.timed = timed.infer, 1, 1
    assert len(model.time_slice()["samples_ms"]) == 1
    assert model.usage() == {"memory_mb": None, "energy_mj": None, "unread": ["it is not told"] * 2}


def test_a_gpus_energy_is_its_power_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meter, told = tmp_path / "nvidia-smi", tmp_path / "told"
    now_s = 0.0

    def infer() -> None:  # a tenth of a second on this clock, once the meter has told
        nonlocal now_s
        while not told.exists():
            time.sleep(0.01)
        now_s += 0.1

    def energy_mj(*watts: str) -> float:
        told.unlink(missing_ok=True)
        meter.write_text(f"#!/bin/sh\nprintf '%s\\n' {' '.join(watts)}\ntouch {told}\nexec sleep 60\n")
        meter.chmod(0o755)
        return gpu_run_mj(infer, [str(meter)], seconds=0.5)

    monkeypatch.setattr(usage, "time", SimpleNamespace(monotonic=lambda: now_s))
    assert energy_mj("50", "50", "200", "220") == pytest.approx(210 * 0.1 * 1000)
    with pytest.raises(Unread, match="does not know this GPU's power"):
        energy_mj("'[N/A]'")
    with pytest.raises(Unread, match=r"^energy is not told: .*/none cannot be run here$"):
        gpu_run_mj(infer, [str(tmp_path / "none")], seconds=0)


@pytest.mark.parametrize(("visible", "used"), [(None, "0"), ("", "0"), ("3,1", "3"), ("GPU-8c,GPU-1", "GPU-8c")])
def test_the_power_is_that_of_the_gpu_in_use(visible: str | None, used: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert usage.gpu_power()[-1] == f"--id={used}"


def test_a_process_that_does_not_answer_any_more_is_told() -> None:
    class Dead(_Model):
        def __init__(self) -> None:
            self._has_file = False

        def _ask(self, *_: object) -> dict[str, object]:
            raise WorkerError("killed by signal 9 (SIGKILL)")

    found = Dead().with_usage(Measurement([[1.0]]), Path("x"), 0.0)
    assert found == Measurement([[1.0]], unread=["memory and energy are not told: killed by signal 9 (SIGKILL)"])


def test_memory_of_a_gpu_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "gpu_run_mj", lambda *_: 5.0)
    model = TimedModel()
    model.start({"device": "cuda", "batch_size": 2})
    model.infer = lambda: None
    assert model.usage() == {"memory_mb": None, "energy_mj": 2.5, "unread": ["memory is not told on a GPU"]}
