"""The devices that train: which there are, batches on them, and what PyTorch raises there."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

from nas.data.batches import Batch
from nas.errors import TrainingError, UserError
from nas.lock import training_alone
from nas.machine import usable_cpus
from nas.text import first_line

OUT_OF_MEMORY = ("allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED", "std::bad_alloc")


@dataclass(frozen=True)
class TrainingDevice:
    """Where a process may train."""

    name: str
    """As torch calls it here: "cpu", "cuda:0"."""
    uuid: str = ""
    """Of a GPU, the same whatever CUDA_VISIBLE_DEVICES says; "" of the CPU."""


CPU = TrainingDevice("cpu")


def visible_gpus() -> list[TrainingDevice]:
    """The GPUs that this process may see, in CUDA's order."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [TrainingDevice(f"cuda:{i}", f"GPU-{torch.cuda.get_device_properties(i).uuid}") for i in range(count)]


def training_devices(names: Sequence[str] = ()) -> list[TrainingDevice]:
    """Those that an option names: cpu, cuda (every GPU), cuda:1, or GPU-UUID; without names every GPU, or the CPU where
    there is none.

    Raises:
        UserError: one that is not here, or is named twice.
    """
    gpus = visible_gpus()
    if not names:
        return gpus or [CPU]
    found: list[TrainingDevice] = []
    for name in names:
        here = [CPU, *gpus] if name != "cuda" else gpus
        those = [each for each in here if name in ("cuda", each.name, each.uuid)]
        if not those:
            able = ", ".join(each.name for each in gpus)
            seen = f"{able}; give cpu, or cuda:N of these" if gpus else "no GPU: give cpu"
            raise UserError(f"--train-device {name!r}: this process sees {seen}")
        found += those
    if len(set(found)) < len(found):
        raise UserError(f"--train-device {','.join(names)} names a device twice")
    return found


def together_on(devices: Sequence[TrainingDevice], processes: int) -> list[TrainingDevice]:
    """The devices of processes that train one network together: each has a GPU of its own, or all have the CPU.

    Raises:
        UserError: more processes than there are GPUs, or CPUs.
    """
    if devices[0] == CPU:
        able, what = len(usable_cpus()), "the CPUs that this process may use"
    else:
        able, what = len(devices), f"one a GPU, and there is {', '.join(each.name for each in devices)}"
    if not 1 <= processes <= able:
        raise UserError(f"--train-processes is {processes}: give 1 to {able}, {what}")
    return [CPU] * processes if devices[0] == CPU else [*devices[:processes]]


def alone_on(device: str) -> AbstractContextManager[None]:
    """Have a GPU for the trainings of this process: they take turns, as each fills its memory. On the CPU they share.

    Args:
        device: "cpu", "cuda" or "cuda:1".
    """
    kind, _, index = device.partition(":")
    if kind == "cpu":
        return nullcontext()
    return training_alone(visible_gpus()[int(index or 0)].uuid)


@contextmanager
def all_alone(devices: Sequence[TrainingDevice]) -> Iterator[None]:
    """Have several GPUs for the trainings of this process. They are taken in one order by all processes."""
    with ExitStack() as stack:
        for uuid in sorted(device.uuid for device in devices if device.uuid):
            stack.enter_context(training_alone(uuid))
        yield


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


@contextmanager
def failing_as(what: str, epoch: int = 0) -> Iterator[None]:
    """Turn what PyTorch raises into a TrainingError of one line; in several processes, which must end together, into a
    UserError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        line = f"{what} {'ran out of memory' if out_of_memory(error) else 'failed'}: {first_line(error)}"
        raise (UserError(line) if dist.is_initialized() else TrainingError(line, epoch)) from error


def out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch, or a library below it, found no memory."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
    )


def empty_cache(device: str | torch.device) -> None:
    """Give the memory that PyTorch keeps for later back to a GPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def to_device(device: str | torch.device, images: Tensor, labels: Tensor) -> Batch:
    """On `device`, images in channels_last; convolutions keep it: EfficientViT-M4 trains 1.1x as fast on a CPU."""
    return images.to(device, memory_format=torch.channels_last), labels.to(device)
