"""The processes that a search starts to train what it measures, one a training device."""

from __future__ import annotations

import base64
import contextlib
import math
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nas.errors import DiskFull, UserError
from nas.measure.device import is_here
from nas.process import Worker, WorkerError
from nas.study.jobs import MEASURES, TRAINS, at_work

if TYPE_CHECKING:
    import optuna

    from nas.search.request import SearchRequest
    from nas.training.device import TrainingDevice

MODULE = "nas.search.train_worker"
STARTS = 3
"""How often a worker of a device is started before the device is given up."""
STOP_S = 20.0
"""In which a worker puts its training aside before it is killed."""


class Crew:
    """A search's own training processes. What they say goes through the search's display.

    They end with this process, however it ends: each is in a session of its own, so that Ctrl-C does not reach it, and
    the kernel kills it with its parent.
    """

    def __init__(
        self,
        request: SearchRequest,
        devices: Sequence[TrainingDevice],
        say: Callable[[str], None],
        phase: Callable[[str, int, int], None],
        stack: ExitStack,
    ) -> None:
        self._request, self._devices, self._say, self._phase = request, devices, say, phase
        self._stack = stack
        self._display = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._workers: dict[TrainingDevice, Worker] = {}
        self._closing = threading.Event()
        self._lost = ""

    @property
    def size(self) -> int:
        return len(self._devices)

    def start(self, study: optuna.Study) -> None:
        """Have the study say that this process measures, and start them."""
        if self._request.plan is not None:
            trains = not self._devices and self._request.trains
            self._stack.enter_context(at_work(study, [MEASURES, TRAINS] if trains else [MEASURES]))
        if self._devices:
            names = ", ".join(each.name for each in self._devices)
            self._tell("say", f"processes of this search train on {names}, while this one measures")
        for device in self._devices:
            thread = threading.Thread(target=self._mind, args=(device,), name=f"worker {device.name}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def check(self) -> None:
        """Raises: UserError: none of them is left, and why."""
        if self._lost and not any(thread.is_alive() for thread in self._threads):
            raise UserError(f"nothing trains any more: {self._lost}")

    def close(self) -> None:
        """End them; what they train is put aside, and goes on with the next search."""
        self._closing.set()
        for worker in list(self._workers.values()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.pid, signal.SIGTERM)
        for thread in self._threads:
            thread.join(STOP_S)
        for worker in list(self._workers.values()):
            worker.close()
        self._threads = []

    def _mind(self, device: TrainingDevice) -> None:
        """Have a device trained on until the search ends."""
        for start in range(1, STARTS + 1):
            try:
                with Worker(MODULE, trains=True) as worker:  # the kernel ends it with this thread
                    self._workers[device] = worker
                    worker.send("train", **start_of(self._request, device))
                    try:
                        worker.receive(math.inf, self._tell)
                        return
                    finally:
                        refused = worker.alive
            except (WorkerError, DiskFull) as error:
                if self._closing.is_set():
                    return
                again = start < STARTS and not refused
                self._lost = f"the process that trains on {device.name}: {error}"
                goes_on = "another is started, and its training goes on" if again else "it is not started again"
                self._tell("say", f"{self._lost}; {goes_on}")
                if not again:
                    return

    def _tell(self, what: str, *values: Any) -> None:
        with self._display:
            if what == "say":
                self._say(*values)
            else:
                self._phase(*values)


def start_of(request: SearchRequest, device: TrainingDevice) -> dict[str, str]:
    """What a worker is started with: its environment's CUDA_VISIBLE_DEVICES, and the request, pickled by its parent."""
    names = ("cuda:0",) if device.uuid and device.name != "cpu" else (device.name,)
    own = replace(request, only="train", workers=0, train_devices=names, train_processes=1)
    return {
        "visible": device.uuid if device.name != "cpu" else "",
        "request": base64.b64encode(pickle.dumps(own)).decode(),
    }


@contextmanager
def open_crew(
    request: SearchRequest, say: Callable[[str], None], phase: Callable[[str, int, int], None]
) -> Iterator[Crew]:
    """The processes that a search starts, which end with the block.

    Raises:
        UserError: a training device that is not here, or more workers than devices.
    """
    with ExitStack() as stack:
        crew = Crew(request, chosen_devices(request), say, phase, stack)
        stack.callback(crew.close)
        yield crew


def chosen_devices(request: SearchRequest) -> list[TrainingDevice]:
    """The training devices that get a process of their own; none where this process trains by itself, or does not.

    With one device on the measured machine there is nothing to gain: a training gives way to what is timed there.

    Raises:
        UserError: as `open_crew`.
    """
    if request.plan is None or request.workers == 0 or request.only or request.quality == "supernet":
        return []
    from nas.training.device import training_devices

    devices = training_devices(request.train_devices)
    if request.workers is None:
        return devices if len(devices) > 1 or not is_here(request.settings.device) else []
    if request.workers > len(devices):
        names = ", ".join(each.name for each in devices)
        raise UserError(f"--workers is {request.workers}: one a training device, and there is {names}")
    return devices[: request.workers]
