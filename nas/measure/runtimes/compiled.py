"""`torch.compile` with its defaults (inductor) and static shapes, on CPU or CUDA: compiled while it is loaded."""

import importlib.util
import os
import shutil
from pathlib import Path

from nas.measure.runtime import Infer, Settings, register
from nas.measure.runtimes import eager


def check(settings: Settings) -> str | None:
    if settings.device == "cuda" and importlib.util.find_spec("triton") is None:
        return "torch.compile on cuda needs triton: pip install triton"
    if settings.device == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        return "torch.compile on cpu needs a C++ compiler: install g++, or name one in CXX"
    return eager.check(settings)


@register("torch.compile", precisions=eager.PRECISIONS, artifact="module", package="torch", check=check, patience_s=600)
def load(path: Path, settings: Settings) -> Infer:
    import torch
    from torch._inductor import config

    from nas.measure.runtimes.pytorch import inference, place

    config.compile_threads = 1  # no pool of compiling processes stays behind while networks are timed
    model, images = place(path, settings)
    compiled = torch.compile(model, dynamic=False)
    infer = inference(compiled, (images,), settings.device)
    infer()
    return infer
