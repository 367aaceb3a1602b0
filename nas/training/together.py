"""A training that several processes of this machine make together: `python -m nas.training.together`."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, as_completed, wait
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.errors import DiskFull, TrainingError, UserError
from nas.files import scratch
from nas.process import Worker, WorkerError, serve, tell

if TYPE_CHECKING:
    from nas.training.device import TrainingDevice
    from nas.training.engine import Training

MODULE = "nas.training.together"
TELL_EVERY_S = 0.5
"""Between two tellings of how far it is."""
LOST_S = 1.0
"""In which a process that is gone is known, after another has met its absence."""
_group = ExitStack()
"""The child's: left by a training that ends well alone, as the others would fail for want of it, and be heard first."""


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
        TrainingError: the loss is no longer finite.
        DiskFull: no room for the checkpoint.
        UserError: one of the processes failed, or was lost: the others end.
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
        workers = [stack.enter_context(Worker(MODULE, trains=True)) for _ in range(count)]
        for rank, worker in enumerate(workers):
            worker.send("train", rank=rank, **where)
        pool = stack.enter_context(ThreadPoolExecutor(count))
        for worker in workers:  # before the pool: its threads wait for their answers
            stack.callback(worker.close)
        answers = [pool.submit(worker.receive, float("inf"), progress) for worker in workers]
        skipped = [name for each in _heard(answers) for name in each["skipped"]]
    training.loader.skipped.extend(name for name in dict.fromkeys(skipped) if name not in training.loader.skipped)
    training.restore()


def _heard(answers: Sequence[Future[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """What the processes answer, as they do.

    Raises:
        as `run_together`: at the first that failed, or that was lost where that is why others did.
    """
    for answer in as_completed(answers):
        if answer.exception() is None and "error" not in answer.result():
            yield answer.result()
            continue
        wait(answers, LOST_S, FIRST_EXCEPTION)
        first = next((each for each in answers if each.done() and each.exception() is not None), answer)
        try:
            found = first.result()
        except WorkerError as error:
            raise UserError(f"of {len(answers)} processes that trained together one failed: {error}") from None
        raise (TrainingError if found["of_network"] else UserError)(found["error"])


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

    try:
        device = _group.enter_context(processes("cuda" if visible else "cpu"))
        again: Callable[..., Training] = torch.load(Path(given), map_location="cpu", weights_only=False)
        training = again(device=device, workers=default_workers(device), say=lambda _: None)
        try:
            training.run(None, progress)
        finally:
            training.loader.close()
    except DiskFull:
        raise
    except UserError as found:
        return {"error": str(found), "of_network": isinstance(found, TrainingError)}
    _group.close()
    return {"skipped": [*training.loader.skipped]}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    serve({"train": train})
