"""The devices that train, with GPUs that are made up."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

from nas.errors import UserError
from nas.training import device
from nas.training.device import CPU, TrainingDevice, all_alone, alone_on, together_on, training_devices

GPUS = [TrainingDevice("cuda:0", "GPU-a"), TrainingDevice("cuda:1", "GPU-b")]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "visible_gpus", lambda: GPUS)


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ((), GPUS),
        (("cuda",), GPUS),
        (("cuda:1",), GPUS[1:]),
        (("GPU-b", "cuda:0"), GPUS[::-1]),
        (("cpu",), [CPU]),
    ],
)
def test_devices_by_their_names(names: tuple[str, ...], expected: list[TrainingDevice]) -> None:
    assert training_devices(names) == expected


@pytest.mark.usefixtures("gpus")
def test_a_device_that_is_not_here_is_named() -> None:
    with pytest.raises(UserError, match="'cuda:7': this process sees cuda:0, cuda:1; give cpu, or cuda:N of these"):
        training_devices(["cuda:7"])
    with pytest.raises(UserError, match="names a device twice"):
        training_devices(["cuda", "cuda:1"])


def test_without_gpus_the_cpu_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "visible_gpus", list)
    assert training_devices() == [CPU]
    for name in ("cuda", "cuda:0"):
        with pytest.raises(UserError, match="sees no GPU"):
            training_devices([name])


@pytest.mark.usefixtures("gpus")
def test_a_gpu_is_locked_by_its_uuid_and_the_cpu_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    locked = []
    monkeypatch.setattr(device, "training_alone", locked.append)
    for name in ("cpu", "cuda", "cuda:1"):
        alone_on(name)
    assert locked == ["GPU-a", "GPU-b"]


def test_gpus_of_one_training_are_locked_in_the_same_order_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    locked = []
    monkeypatch.setattr(device, "training_alone", lambda uuid: locked.append(uuid) or nullcontext())
    for devices in (GPUS, GPUS[::-1], [CPU, CPU]):
        with all_alone(devices):
            pass
    assert locked == ["GPU-a", "GPU-b"] * 2


def test_processes_that_train_together_have_a_gpu_each_or_share_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "usable_cpus", lambda: [0, 1, 2])
    assert together_on([*GPUS, TrainingDevice("cuda:2", "GPU-c")], 2) == GPUS
    assert together_on([CPU], 3) == [CPU] * 3
    for devices, able in (
        (GPUS, "give 1 to 2, one a GPU, and there is cuda:0, cuda:1"),
        ([CPU], "give 1 to 3, the CPUs"),
    ):
        with pytest.raises(UserError, match=f"--train-processes is 4: {able}"):
            together_on(devices, 4)
