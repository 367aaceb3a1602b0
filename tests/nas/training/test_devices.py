"""The devices that train, with GPUs that are made up."""

from __future__ import annotations

import pytest

from nas.errors import UserError
from nas.training import device
from nas.training.device import CPU, TrainingDevice, alone_on, training_devices

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
