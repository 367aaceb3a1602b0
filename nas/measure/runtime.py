"""What can run a network: the registry of runtimes, and the settings a latency belongs to.

One file per runtime (`ort.py`, `eager.py`, ...) registers how it loads a network. Importing them imports no runtime.
"""

import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nas.errors import UserError, unknown
from nas.machine import memory_bytes, usable_cpus

DEVICES = ("cpu", "cuda", "ssh://user@host")
PRECISIONS = ("fp32", "tf32", "bf16", "fp16", "int8")
LOWER = ("fp16", "bf16", "int8")
"""Those whose answers are judged beside fp32's."""
IMAGE_SIDE = 224  # the images that are weighed against this machine's memory


@dataclass(frozen=True)
class Settings:
    """What a latency is a property of, besides the network and the machine. precision: one of PRECISIONS."""

    runtime: str = "onnxruntime"
    device: str = "cpu"
    threads: int = 1
    batch_size: int = 1
    precision: str = "fp32"


Infer = Callable[[], Any]
Load = Callable[[Path, Settings], Infer]


@dataclass(frozen=True)
class Runtime:
    """Something that runs networks."""

    name: str
    precisions: Mapping[str, tuple[str, ...]]
    """Those it has on each device."""
    artifact: Literal["onnx", "module"]
    """The file it loads: "onnx" (one static input, the batch included), or "module" (the JSON of `networks.build`)."""
    package: str
    """What Python imports."""
    load: Load
    """(path, settings): a function that does one inference on fixed random images, done when it returns, and returns
    the logits."""
    extra: str | None = None
    """The pip extra that brings it; None for what vitnas itself needs."""
    patience_s: float = 60
    """Time in which a network is loaded and measured, or has failed."""
    check: Callable[[Settings], str | None] = lambda settings: None
    """(settings): a line on what this machine lacks for them, or None."""

    @property
    def devices(self) -> tuple[str, ...]:
        return tuple(self.precisions)

    def version(self) -> str:
        """Of the installed package, whose build for GPUs goes by another name on the index."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return str(importlib.import_module(self.package).__version__)


RUNTIMES: dict[str, Runtime] = {}


def register(name: str, **fields: Any) -> Callable[[Load], Load]:
    """Decorates a `load` function as the runtime `name`; fields: the others of `Runtime`."""

    def add(load: Load) -> Load:
        RUNTIMES[name] = Runtime(name, load=load, **fields)
        return load

    return add


def check_settings(settings: Settings) -> None:
    """Raises UserError where these settings cannot be measured on this machine."""
    device, precision = settings.device, settings.precision
    for what, name, choices in (
        ("runtime", settings.runtime, RUNTIMES),
        ("device", device, DEVICES),
        ("precision", precision, PRECISIONS),
    ):
        if name not in choices:
            raise unknown(what, name, choices)
    runtime = RUNTIMES[settings.runtime]
    if device not in runtime.devices:
        able = [r.name for r in RUNTIMES.values() if device in r.devices]
        raise UserError(f"runtime {runtime.name} does not run on {device}: use {' or '.join(able)}")
    if precision not in runtime.precisions[device]:
        able = [r.name for r in RUNTIMES.values() if precision in r.precisions.get(device, ())]
        raise UserError(
            f"runtime {runtime.name} has {', '.join(runtime.precisions[device])} on {device}, not {precision}: "
            + (f"{precision} is in {', '.join(able)}" if able else f"no runtime has {precision} on {device}")
        )
    usable = len(usable_cpus())
    if not 1 <= settings.threads <= usable:
        raise UserError(f"threads is {settings.threads}: give 1 to {usable}, the CPUs this process may use")
    _check_batch(settings.batch_size)
    if importlib.util.find_spec(runtime.package) is None:
        what = f"'vitnas[{runtime.extra}]'" if runtime.extra else runtime.package
        raise UserError(f"{runtime.package} is not installed: pip install {what}")
    if missing := (_no_gpu(precision) if device == "cuda" else None) or runtime.check(settings):
        raise UserError(missing)


def no_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """A line where this CPU has no bf16 instructions (AVX-512, AMX or Arm's), so that bf16 would be emulated."""
    flags = {"avx512_bf16", "amx_bf16", "bf16"}
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    if any(flags & set(line.split()) for line in lines if line.startswith(("flags", "Features"))):
        return None
    return "this CPU shows no bf16 instructions (avx512_bf16, amx_bf16 or Arm's bf16): use --precision fp32"


def _no_gpu(precision: str) -> str | None:
    """A line where PyTorch finds no GPU for it; without PyTorch, loading the first network tells."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    if not torch.cuda.is_available():
        return "device cuda: PyTorch finds no usable GPU here, use --device cpu"
    major, minor = torch.cuda.get_device_capability()
    if precision in ("tf32", "bf16") and major < 8:
        return f"{precision} needs a GPU of compute capability 8.0 or more, this one has {major}.{minor}: use fp16"
    return None


def _check_batch(batch_size: int) -> None:
    if batch_size < 1:
        raise UserError(f"batch size is {batch_size}: give 1 or more")
    needed, total = batch_size * 3 * IMAGE_SIDE**2 * 4, memory_bytes()
    if needed > total:
        raise UserError(
            f"batch size is {batch_size}: its images alone take {needed / 1e9:,.1f} GB, "
            f"this machine has {total / 1e9:,.1f} GB of memory"
        )
