"""The processes that `torchrun` started, which train one network together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed as dist

from nas.errors import UserError

T = TypeVar("T")
PATIENCE = timedelta(hours=1)
"""How long the other processes wait for the first one, which evaluates and writes."""


def agreed(found: T) -> T:
    """What the first process found, in all of them; they wait for each other here."""
    if not dist.is_initialized():
        return found
    everywhere = [found]
    dist.broadcast_object_list(everywhere)
    dist.barrier()
    return everywhere[0]


def ranks() -> tuple[int, int]:
    """This process's rank, and the number of processes that train together."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def together(device: str) -> list[str]:
    """The devices of this machine whose locks this process takes: its own; of torchrun's processes the first takes
    those of all, as two runs that each wait for a GPU of the other would wait for ever."""
    if not dist.is_initialized():
        return [device]
    if int(os.environ["LOCAL_RANK"]):
        return []
    count = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    return [f"cuda:{i}" for i in range(count)] if device.startswith("cuda") else [device]


@contextmanager
def processes(device: str) -> Iterator[str]:
    """Join the processes that `torchrun` started, if it did; yields the device that this one trains on.

    Raises:
        UserError: fewer GPUs than processes here.
    """
    cuda = device == "cuda"
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        yield device
        return
    local = int(os.environ["LOCAL_RANK"])
    if cuda:
        if local >= torch.cuda.device_count():
            raise UserError(
                f"process {local} has no GPU: torchrun --nproc-per-node {torch.cuda.device_count()} at most"
            )
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
    try:
        yield f"cuda:{local}" if cuda else device
    finally:
        dist.destroy_process_group()
