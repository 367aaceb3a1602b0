"""What can run a network: the registry of runtimes, and the settings a latency belongs to.

One file per runtime (`ort.py`, `eager.py`, ...) registers how it loads a network. Importing them imports no runtime.
"""

import difflib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nas.errors import UserError
from nas.process import usable_cpus


@dataclass(frozen=True)
class Settings:
    """What a latency is a property of, besides the network and the machine."""

    runtime: str = "onnxruntime"
    device: str = "cpu"
    threads: int = 1
    batch_size: int = 1
    precision: str = "fp32"


@dataclass(frozen=True)
class Runtime:
    """Something that runs networks. Its name is also its package, on the index and for import.

    devices: where it can run. artifact: the file it loads, "onnx" (one static float32 input, the batch
    included) or "arch" (arch.json). load(path, settings): a function that does one inference, done when
    it returns, on a fixed random float32 input.
    """

    name: str
    devices: tuple[str, ...]
    artifact: str
    load: Callable[[Path, Settings], Callable[[], None]]

    def version(self) -> str:
        return importlib.metadata.version(self.name)


RUNTIMES: dict[str, Runtime] = {}


def register(name: str, devices: tuple[str, ...], artifact: str) -> Callable:
    """Decorates a `load` function as the runtime `name` (the fields of `Runtime`)."""

    def add(load: Callable[[Path, Settings], Callable[[], None]]) -> Callable:
        RUNTIMES[name] = Runtime(name, devices, artifact, load)
        return load

    return add


def check_settings(settings: Settings) -> None:
    """Raises UserError where these settings cannot be measured on this machine."""
    _known("runtime", settings.runtime, list(RUNTIMES))
    runtime = RUNTIMES[settings.runtime]
    _known("device", settings.device, sorted({d for r in RUNTIMES.values() for d in r.devices}))
    if settings.device not in runtime.devices:
        able = [r.name for r in RUNTIMES.values() if settings.device in r.devices]
        raise UserError(f"runtime {settings.runtime} does not run on {settings.device}: use {' or '.join(able)}")
    usable = len(usable_cpus())
    if not 1 <= settings.threads <= usable:
        raise UserError(f"threads is {settings.threads}: give 1 to {usable}, the CPUs this process may use")
    if settings.batch_size < 1:
        raise UserError(f"batch size is {settings.batch_size}: give 1 or more")
    if importlib.util.find_spec(runtime.name) is None:
        raise UserError(f"{runtime.name} is not installed: pip install {runtime.name}")
    if settings.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UserError("device cuda: PyTorch finds no usable GPU here, use --device cpu")


def _known(what: str, name: str, choices: list[str]) -> None:
    if name not in choices:
        near = difflib.get_close_matches(name, choices, cutoff=0.4)
        meant = f"did you mean {' or '.join(near)}" if near else f"choose from {', '.join(choices)}"
        raise UserError(f"unknown {what} {name!r}: {meant}")


from nas.measure import eager, ort  # noqa: E402, F401 (each registers itself above)
