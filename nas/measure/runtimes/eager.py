"""PyTorch eager on CPU or CUDA: a network with random weights, BatchNorm folded, cast to the precision as a whole."""

from pathlib import Path

from nas.measure.runtime import Infer, Settings, no_bf16, register

PRECISIONS = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "tf32", "bf16", "fp16")}


def check(settings: Settings) -> str | None:
    return no_bf16() if (settings.device, settings.precision) == ("cpu", "bf16") else None


@register("torch", precisions=PRECISIONS, artifact="module", package="torch", check=check)
def load(path: Path, settings: Settings) -> Infer:
    from nas.measure.runtimes.pytorch import inference, place

    model, images = place(path, settings)
    return inference(model, (images,), settings.device)
