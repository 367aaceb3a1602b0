"""A training that several processes of this machine make together: `python -m nas.training.together`."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.errors import TrainingError
from nas.files import scratch
from nas.process import Worker, WorkerError, serve, tell

if TYPE_CHECKING:
    from nas.training.device import TrainingDevice
    from nas.training.engine import Training

MODULE = "nas.training.together"
TELL_EVERY_S = 0.5
"""Between two tellings of how far it is."""


def run_together(
    training: Training,
    devices: Sequence[TrainingDevice],
    progress: Callable[[int, int], None],
    say: Callable[[str], None],
) -> None:
    """Train to the last epoch, in a process for each device. They go on from the training's checkpoint and write it,
    and end with this process.

    Fewer processes are taken, which is told, where an update's images are not a multiple of their number.

    Args:
        training: prepared in this process, with a checkpoint; holds what was trained on return.
        progress: called with images done, and images of all epochs.

    Raises:
        TrainingError: the loss is no longer finite, or one of the processes failed.
        DiskFull: no room for the checkpoint.
    """
    import torch

    if training.epoch == training.recipe.epochs:
        return
    count = next(n for n in range(len(devices), 0, -1) if training.images % n == 0 and training.images // n > 1)
    if count < len(devices):
        say(f"updates of {training.images} images: {count} of {len(devices)} processes train")
    threads = max(1, torch.get_num_threads() // count)
    with scratch() as folder, ExitStack() as stack:
        given = folder / "given"
        torch.save(training.again, given)
        visible = ",".join(filter(None, (device.uuid for device in devices[:count])))
        where = {"world": count, "port": _free_port(), "visible": visible, "threads": threads, "given": str(given)}
        workers = [stack.enter_context(Worker(MODULE)) for _ in range(count)]
        for rank, worker in enumerate(workers):
            worker.send("train", rank=rank, **where)
        pool = stack.enter_context(ThreadPoolExecutor(count))
        for worker in workers:  # before the pool: its threads wait for their answers
            stack.callback(worker.close)
        answers = [pool.submit(worker.receive, float("inf"), progress) for worker in workers]
        ended = wait(answers, return_when=FIRST_EXCEPTION).done
        try:
            found = [answer.result() for answer in answers if answer in ended]
        except WorkerError as error:
            raise TrainingError(f"of {count} processes that trained together one failed: {error}") from None
    for each in found:
        if each["error"]:
            raise TrainingError(each["error"])
        training.loader.skipped.extend(name for name in each["skipped"] if name not in training.loader.skipped)
    training.restore()


def train(rank: int, world: int, port: int, visible: str, threads: int, given: str) -> dict[str, Any]:
    """Train, as one process of several.

    Args:
        visible: UUIDs of the GPUs of all; "" for the CPU.
        given: the file of `Training.again`, from this process's own parent.
    """
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(number) for name, number in numbers.items()}}
    if visible:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    import torch

    from nas.training.processes import processes
    from nas.training.request import default_workers

    torch.set_num_threads(threads)
    told = -TELL_EVERY_S

    def progress(done: int, total: int, _: float) -> None:
        nonlocal told
        if not rank and (done == total or time.monotonic() - told >= TELL_EVERY_S):
            told = time.monotonic()
            tell(done, total)

    with processes("cuda" if visible else "cpu") as device:
        again: Callable[..., Training] = torch.load(Path(given), map_location="cpu", weights_only=False)
        training = again(device=device, workers=default_workers(device), say=lambda _: None)
        error = ""
        try:
            training.run(None, progress)
        except TrainingError as found:
            error = str(found)
        finally:
            training.loader.close()
        return {"error": error, "skipped": [*training.loader.skipped]}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    serve({"train": train})
